import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmalign_jax import losses, mesh
from mmalign_jax.types import FIRST_ANSWER, PAD, PREFIX

P, R, K, D, V = 5, 7, 2, 8, 16
PREFIX_LENGTHS = [5, 2, 1, 4]
ANSWER_LENGTHS = [[7, 3], [1, 7], [4, 0], [2, 2]]


def rows(prefix_slots=P, answer_slots=R, seed=0, dtype=jnp.float32, repeat=1):
    """Random rows of unequal lengths. The values at a token do not depend on the number of slots."""
    prefixes, answers = PREFIX_LENGTHS * repeat, ANSWER_LENGTHS * repeat
    slots = prefix_slots + K * answer_slots
    rng = np.random.default_rng(seed)
    hidden = np.full((len(prefixes), slots, D), np.nan, np.float32)
    tokens, role = np.zeros((2, len(prefixes), slots), np.int32)
    for b, (prefix, lengths) in enumerate(zip(prefixes, answers, strict=True)):
        spans = [(0, prefix, PREFIX)] + [(prefix_slots + k * answer_slots, n, FIRST_ANSWER + k) for k, n in enumerate(lengths)]
        for start, length, kind in spans:
            at = slice(start, start + length)
            hidden[b, at], tokens[b, at], role[b, at] = rng.normal(size=(length, D)), rng.integers(V, size=length), kind
    head = np.random.default_rng(99).normal(size=(D, V)).astype(np.float32)
    kwargs = {"prefix_slots": prefix_slots, "answer_slots": answer_slots}
    return jnp.array(hidden, dtype), jnp.array(head, dtype), jnp.array(tokens), jnp.array(role, jnp.int8), kwargs


def dense(hidden, head, tokens, role, prefix_slots, answer_slots):
    """The definition, one token at a time, in float64."""
    hidden, head, tokens, role = (np.asarray(x) for x in (hidden, head, tokens, role))
    out = np.zeros((len(hidden), K, answer_slots))
    for b, k, j in np.ndindex(out.shape):
        slot = prefix_slots + k * answer_slots + j
        if role[b, slot] != PAD:
            predictor = slot - 1 if j else np.flatnonzero(role[b] == PREFIX)[-1]
            logits = hidden[b, predictor].astype(np.float64) @ head.astype(np.float64)
            out[b, k, j] = logits[tokens[b, slot]] - np.log(np.sum(np.exp(logits)))
    return out


@pytest.mark.parametrize("chunk", [1, 4, 5, 14, 128])
def test_chunked_equals_dense(chunk):
    *arrays, slots = rows()
    logps, mask = jax.jit(lambda *a: losses.answer_logps(*a, **slots, chunk=chunk))(*arrays)
    assert logps.dtype == jnp.float32 and logps.shape == mask.shape == (4, K, R)
    np.testing.assert_allclose(logps, dense(*arrays, **slots), atol=1e-5)
    np.testing.assert_array_equal(mask.sum(-1), ANSWER_LENGTHS)
    assert not np.any(np.asarray(logps)[~np.asarray(mask)])


def test_gradient_equals_finite_differences_and_padding_gets_none():
    with jax.enable_x64(True):
        hidden, head, tokens, role, slots = rows(dtype=jnp.float64)
        weight = jnp.array(np.random.default_rng(1).normal(size=(4, K, R)))
        total = lambda h, w: jnp.sum(losses.answer_logps(h, w, tokens, role, **slots, chunk=5)[0] * weight)  # noqa: E731
        reference = lambda h, w: np.sum(dense(h, w, tokens, role, **slots) * np.asarray(weight))  # noqa: E731
        by_hidden, by_head = jax.jit(jax.grad(total, argnums=(0, 1)))(hidden, head)
        step = 1e-5
        for index in np.ndindex(D, V):
            up, down = (np.asarray(head).copy() for _ in range(2))
            up[index] += step
            down[index] -= step
            np.testing.assert_allclose(by_head[index], (reference(hidden, up) - reference(hidden, down)) / (2 * step), atol=2e-6)
        rng = np.random.default_rng(2)
        direction = rng.normal(size=hidden.shape)
        difference = reference(hidden + step * direction, head) - reference(hidden - step * direction, head)
        np.testing.assert_allclose(np.sum(by_hidden * direction), difference / (2 * step), rtol=1e-6)
    # the slots that hold no token are NaN in `hidden`
    np.testing.assert_array_equal(np.asarray(by_hidden)[np.asarray(role) == PAD], 0)


def test_slots_of_padding_change_nothing():
    *arrays, slots = rows()
    *wide_arrays, wide_slots = rows(prefix_slots=P + 3, answer_slots=R + 4)
    logps, mask = losses.answer_logps(*arrays, **slots)
    wide, wide_mask = losses.answer_logps(*wide_arrays, **wide_slots)
    np.testing.assert_allclose(wide[..., :R], logps, atol=1e-6)
    assert not wide_mask[..., R:].any() and not wide[..., R:].any()
    np.testing.assert_allclose(losses.sums(wide, wide_mask)[0], losses.sums(logps, mask)[0], atol=1e-5)


def test_packed_answers_equal_rows_of_their_own():
    hidden, head, tokens, role, slots = rows()
    packed, _ = losses.answer_logps(hidden, head, tokens, role, **slots)
    for k in range(K):
        own = np.r_[0:P, P + k * R : P + (k + 1) * R]
        own_role = jnp.where(role[:, own] >= FIRST_ANSWER, FIRST_ANSWER, role[:, own])
        alone, _ = losses.answer_logps(hidden[:, own], head, tokens[:, own], own_role, **slots)
        np.testing.assert_allclose(packed[:, k], alone[:, 0], atol=1e-6)


def test_pairs_that_share_a_row_have_the_log_probs_and_gradients_of_rows_of_their_own():
    """All four one behind the other in each region, the third with an empty answer."""
    hidden, head, tokens, role, slots = rows()
    p, r = sum(PREFIX_LENGTHS) + 2, max(map(sum, zip(*ANSWER_LENGTHS, strict=True))) + 3
    source, segment = np.full(p + K * r, -1), np.full(p + K * r, -1)
    filled = [0, *(p + k * r for k in range(K))]
    for b, lengths in enumerate(zip(PREFIX_LENGTHS, ANSWER_LENGTHS, strict=True)):
        for part, length in enumerate((lengths[0], *lengths[1])):
            here = slice(filled[part], filled[part] + length)
            source[here] = b * hidden.shape[1] + (part and P + (part - 1) * R) + np.arange(length)
            segment[here] = b
            filled[part] += length

    def packed(values, filler):
        flat = values.reshape(-1, *values.shape[2:])
        return jnp.where((source < 0).reshape(-1, *[1] * (flat.ndim - 1)), filler, flat[source])[None]

    own_slots = {"prefix_slots": p, "answer_slots": r, "segment": jnp.array(segment[None]), "segments": 5}
    weight = jnp.array(np.random.default_rng(1).normal(size=(4, K, R)), jnp.float32)
    there = jnp.array(source)[None, p:] >= 0
    flat_weight = jnp.where(there, packed(jnp.concatenate([jnp.zeros((4, P)), weight.reshape(4, -1)], axis=1), 0.0)[:, p:], 0.0).reshape(1, K, r)

    def together(hidden, head):
        found = losses.answer_statistics(packed(hidden, jnp.nan), head, packed(tokens, 0), packed(role, PAD), **own_slots, chunk=7)
        return jnp.sum(jnp.where(found.mask, found.logps, 0.0) * flat_weight), found

    def alone(hidden, head):
        found = losses.answer_statistics(hidden, head, tokens, role, **slots)
        return jnp.sum(found.logps * weight), found

    (grads, found), (expected_grads, expected) = (jax.grad(f, argnums=(0, 1), has_aux=True)(hidden, head) for f in (together, alone))
    for b, k in np.ndindex(4, K):
        theirs = np.asarray(expected.logps)[b, k][: ANSWER_LENGTHS[b][k]]
        np.testing.assert_allclose(np.asarray(found.logps)[0, k][segment[p + k * r : p + (k + 1) * r] == b], theirs, atol=1e-5)
    assert int(found.mask.sum()) == sum(map(sum, ANSWER_LENGTHS))
    for one, other in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_bfloat16_inputs_get_float32_logits():
    hidden, head, tokens, role, slots = rows(dtype=jnp.bfloat16)
    logps, _ = losses.answer_logps(hidden, head, tokens, role, **slots)
    assert logps.dtype == jnp.float32
    np.testing.assert_allclose(logps, dense(hidden, head, tokens, role, **slots), atol=1e-5)
    gradient = jax.grad(lambda h: losses.answer_logps(h, head, tokens, role, **slots)[0].sum())(hidden)
    assert gradient.dtype == jnp.bfloat16


def _largest(jaxpr) -> int:
    """Elements of the largest value that a program makes, inner programs included."""
    sizes = [variable.aval.size for equation in jaxpr.eqns for variable in equation.outvars]
    inner = [getattr(x, "jaxpr", x) for equation in jaxpr.eqns for x in jax.tree.leaves(tuple(equation.params.values()))]
    return max(sizes + [_largest(x) for x in inner if hasattr(x, "eqns")], default=0)


@pytest.mark.parametrize("chunk", [8, 64])
def test_no_more_than_one_chunk_of_logits_exists_forward_or_backward(chunk):
    batch, slots, width, vocabulary = 2, 32, 4, 4096
    shapes = (jnp.zeros((batch, 2 * slots + 8, width)), jnp.zeros((width, vocabulary)))
    ints = (jnp.zeros((batch, 2 * slots + 8), jnp.int32), jnp.zeros((batch, 2 * slots + 8), jnp.int32))
    total = lambda h, w: losses.answer_logps(h, w, *ints, prefix_slots=8, answer_slots=slots, chunk=chunk)[0].sum()  # noqa: E731
    program = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(*shapes)
    assert _largest(program.jaxpr) == batch * chunk * vocabulary


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 1, "tensor": 8}])
def test_same_numbers_on_eight_devices(sizes):
    hidden, head, tokens, role, slots = rows(repeat=2)
    hidden = jnp.nan_to_num(hidden)

    def step(hidden, head, tokens, role):
        def total(hidden, head):
            logps, mask = losses.answer_logps(hidden, head, tokens, role, **slots, chunk=4)
            summed, lengths = losses.sums(logps, mask)
            return jnp.sum(summed / jnp.maximum(lengths, 1.0)), summed

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, head)

    (expected, expected_sums), expected_gradient = jax.jit(step)(hidden, head, tokens, role)
    grid = mesh.make_mesh(**sizes)
    with jax.set_mesh(grid):
        place = lambda x, *axes: jax.device_put(x, mesh.sharding(grid, *axes))  # noqa: E731
        arrays = (
            place(hidden, "batch", None, None),
            place(head, "embed", "vocab"),
            place(tokens, "batch", None),
            place(role, "batch", None),
        )
        (value, summed), gradient = jax.jit(step)(*arrays)
        assert jax.typeof(summed).sharding.spec == mesh.spec("batch", None)
        for x, g in zip(arrays, gradient, strict=False):
            assert jax.typeof(g).sharding.spec == jax.typeof(x).sharding.spec
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(summed, expected_sums, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, expected_gradient)


def test_sums_weigh_tokens():
    logps, mask = jnp.array([[[-1.0, -0.5, -2.0, -0.25, -9.0]]]), jnp.array([[[True, True, True, True, False]]])
    total, length = losses.sums(logps, mask)
    assert (total.item(), length.item()) == (-3.75, 4.0)
    total, length = losses.sums(logps, mask, jnp.array([[[1.0, 5.0, 5.0, 1.0, 7.0]]]))
    assert (total.item(), length.item()) == (-13.75, 12.0)
    total, length = losses.sums(logps.astype(jnp.bfloat16), mask)
    assert total.dtype == length.dtype == jnp.float32


def test_slots_must_make_up_the_row():
    *arrays, _ = rows()
    with pytest.raises(ValueError, match="19 slots are not 5 for the prefix and a multiple of 6"):
        losses.answer_logps(*arrays, prefix_slots=5, answer_slots=6)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        losses.answer_logps(*arrays, prefix_slots=5, answer_slots=7, chunk=0)


@pytest.mark.parametrize("chunk", [5, 128])
def test_a_single_row_under_a_mesh(chunk):
    *arrays, slots = rows()
    arrays = [array if array.ndim == 2 and array.shape == (D, V) else array[:1] for array in arrays]

    def total(hidden, head, tokens, role):
        return jnp.sum(losses.answer_logps(hidden, head, tokens, role, **slots, chunk=chunk)[0])

    expected = jax.grad(total, argnums=1)(*arrays)
    one = mesh.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(one):
        shardings = [mesh.sharding(one, *axes) for axes in (("batch",), ("embed", "vocab"), ("batch",), ("batch",))]
        placed = jax.device_put(arrays, shardings)
        found = jax.jit(jax.grad(total, argnums=1))(*placed)
    np.testing.assert_allclose(np.nan_to_num(found), np.nan_to_num(expected), rtol=1e-5, atol=1e-6)
