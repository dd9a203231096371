"""What else the logits of answer tokens tell: collision, entropy, KL from a reference, and the likeliest token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmalign_jax import losses, mesh
from mmalign_jax.types import FIRST_ANSWER, PREFIX

P, R, K, D, WIDE, V = 3, 4, 2, 8, 6, 16
SLOTS = {"prefix_slots": P, "answer_slots": R}
ALL = ("collision", "entropy", "kl", "argmax")
ANSWER_LENGTHS = [[4, 2], [1, 4], [0, 3], [2, 2]]


def rows(dtype=jnp.float32, repeat: int = 1):
    """Hidden states, kernel, tokens and roles; then those of a reference of another width. Slots without a token are NaN."""
    rng = np.random.default_rng(0)
    role = np.zeros((4 * repeat, P + K * R), np.int8)
    for b, lengths in enumerate(ANSWER_LENGTHS * repeat):
        role[b, : 1 + b % P] = PREFIX
        for k, n in enumerate(lengths):
            role[b, P + k * R : P + k * R + n] = FIRST_ANSWER + k
    tokens = rng.integers(V, size=role.shape)
    hidden, theirs = (np.where(role[..., None] > 0, rng.normal(size=(*role.shape, width)), np.nan) for width in (D, WIDE))
    heads = [rng.normal(size=(width, V)) * 1.5 for width in (D, WIDE)]
    real = lambda x: jnp.array(x, dtype)  # noqa: E731
    return (real(hidden), real(heads[0]), jnp.array(tokens, jnp.int32), jnp.array(role)), (real(theirs), real(heads[1]))


def softmax_log(hidden, head, softcap):
    logits = np.nan_to_num(np.asarray(hidden, np.float64)) @ np.asarray(head, np.float64)
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def dense(arrays, reference, softcap=None) -> dict[str, np.ndarray]:
    """The definitions, in float64."""
    hidden, head, tokens, role = arrays
    own, theirs = softmax_log(hidden, head, softcap), softmax_log(*reference, softcap)
    out = {name: np.zeros((len(tokens), K, R)) for name in ("logps", *ALL)}
    for b, k, j in np.ndindex(len(tokens), K, R):
        slot = P + k * R + j
        if role[b, slot] == FIRST_ANSWER + k:
            at = slot - 1 if j else np.flatnonzero(np.asarray(role[b]) == PREFIX)[-1]
            p, q = own[b, at], theirs[b, at]
            values = p[tokens[b, slot]], np.log(np.sum(np.exp(2 * p))), -np.sum(np.exp(p) * p), np.sum(np.exp(q) * (q - p)), np.argmax(p)
            for name, value in zip(out, values, strict=True):
                out[name][b, k, j] = value
    return out


@pytest.mark.parametrize(("chunk", "softcap"), [(1, None), (3, None), (128, None), (5, 2.0)])
def test_statistics_equal_their_definitions(chunk, softcap):
    arrays, reference = rows()
    found = losses.answer_statistics(*arrays, **SLOTS, chunk=chunk, softcap=softcap, wanted=ALL, reference=reference)
    for name, expected in dense(arrays, reference, softcap).items():
        np.testing.assert_allclose(getattr(found, name), expected, atol=1e-5, err_msg=name)
    assert found.argmax.dtype == jnp.int32 and found.kl.dtype == found.entropy.dtype == found.collision.dtype == jnp.float32
    np.testing.assert_array_equal(found.mask.sum(-1), ANSWER_LENGTHS)
    assert (found.kl >= -1e-6).all() and (found.entropy >= 0).all() and (found.collision <= 1e-6).all()


def test_what_is_not_wanted_is_none():
    arrays, reference = rows()
    found = losses.answer_statistics(*arrays, **SLOTS, wanted=("entropy",))
    assert found.collision is None and found.kl is None and found.argmax is None and found.entropy.shape == (4, K, R)
    logps, mask = losses.answer_logps(*arrays, **SLOTS)
    np.testing.assert_allclose(found.logps, logps, atol=1e-6)
    np.testing.assert_array_equal(found.mask, mask)
    with pytest.raises(ValueError, match="kl needs the reference's"):
        losses.answer_statistics(*arrays, **SLOTS, wanted=("kl",))
    with pytest.raises(ValueError, match=r"unknown statistics \['kld'\]; there are collision, entropy, kl, argmax"):
        losses.answer_statistics(*arrays, **SLOTS, wanted=("kld",), reference=reference)


def test_the_likeliest_of_the_allowed_tokens():
    arrays, _ = rows()
    free = losses.answer_statistics(*arrays, **SLOTS, wanted=("argmax",))
    allowed = np.ones(V, bool)
    allowed[np.unique(np.asarray(free.argmax)[np.asarray(free.mask)])[::2]] = False
    found = losses.answer_statistics(*arrays, **SLOTS, wanted=("argmax",), allowed=allowed, chunk=3)
    hidden, head, tokens, role = arrays
    kept = np.flatnonzero(allowed)
    expected = dense((hidden, head[:, kept], jnp.zeros_like(tokens), role), (hidden, head[:, kept]))["argmax"].astype(int)
    np.testing.assert_array_equal(found.argmax, np.where(found.mask, kept[expected], 0))
    np.testing.assert_array_equal(found.logps, free.logps)


def test_kl_from_itself_is_0():
    arrays, _ = rows()
    found = losses.answer_statistics(*arrays, **SLOTS, wanted=("kl",), reference=arrays[:2])
    np.testing.assert_allclose(found.kl, 0.0, atol=1e-5)


@pytest.mark.parametrize("chunk", [3, 128])
def test_with_kl_come_the_references_own_log_probs(chunk):
    arrays, reference = rows()
    found = losses.answer_statistics(*arrays, **SLOTS, chunk=chunk, wanted=("kl",), reference=reference)
    expected = losses.answer_statistics(*reference, *arrays[2:], **SLOTS)
    np.testing.assert_allclose(found.reference, expected.logps, rtol=1e-6, atol=1e-6)
    assert expected.reference is None and np.abs(found.reference - found.logps).max() > 0.1


@pytest.mark.parametrize("name", ["kl", "entropy", "collision"])
def test_gradient_equals_finite_differences_and_the_reference_gets_none(name):
    with jax.enable_x64(True):
        arrays, reference = rows(jnp.float64)
        weight = np.random.default_rng(1).normal(size=(4, K, R))

        def total(hidden, head, reference):
            found = losses.answer_statistics(hidden, head, *arrays[2:], **SLOTS, chunk=3, wanted=(name,), reference=reference)
            return jnp.sum(getattr(found, name) * weight)

        by_hidden, by_head, by_reference = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*arrays[:2], reference)
        rng = np.random.default_rng(2)
        moves = rng.normal(size=arrays[0].shape), rng.normal(size=arrays[1].shape)
        step = 1e-4
        up, down = (
            np.sum(dense((arrays[0] + sign * moves[0], arrays[1] + sign * moves[1], *arrays[2:]), reference)[name] * weight) for sign in (step, -step)
        )
        expected = (up - down) / (2 * step)
        # float32 inside, whatever the inputs are
        np.testing.assert_allclose(np.sum(by_hidden * moves[0]) + np.sum(by_head * moves[1]), expected, rtol=1e-4)
    assert not any(np.any(x) for x in jax.tree.leaves(by_reference))
    # no NaN comes back from the slots that hold no token
    assert not np.any(np.asarray(by_hidden)[np.asarray(arrays[3]) == 0])


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 1, "tensor": 8}])
def test_same_statistics_on_eight_devices(sizes):
    # the reference is as wide as the policy, so that its kernel shards alike
    (hidden, head, *ints), _ = rows(repeat=2)
    hidden = jnp.nan_to_num(hidden)
    reference, allowed = (hidden[:, ::-1] * 0.5, head[::-1]), np.arange(V) % 3 > 0

    def step(hidden, head, reference, tokens, role):
        def total(hidden, head):
            found = losses.answer_statistics(hidden, head, tokens, role, **SLOTS, chunk=3, wanted=ALL, reference=reference, allowed=allowed)
            return jnp.sum(found.kl) + jnp.sum(found.entropy * found.collision), found

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, head)

    expected = jax.jit(step)(hidden, head, reference, *ints)
    grid = mesh.make_mesh(**sizes)
    with jax.set_mesh(grid):
        place = lambda x, *axes: jax.device_put(x, mesh.sharding(grid, *axes))  # noqa: E731
        states, kernel = ("batch", None, None), ("embed", "vocab")
        placed = place(hidden, *states), place(head, *kernel), (place(reference[0], *states), place(reference[1], *kernel))
        found = jax.jit(step)(*placed, *(place(x, "batch", None) for x in ints))
        assert jax.typeof(found[0][1].kl).sharding.spec == mesh.spec("batch", None, None)
        assert jax.typeof(found[1][1]).sharding.spec == mesh.spec(*kernel)
    for own, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(own, theirs, rtol=1e-4, atol=1e-5)
