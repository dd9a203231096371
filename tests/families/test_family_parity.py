"""Every family computes what transformers computes, from the picture and the words to log-probs and greedy text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.families import all_cases
from helpers.tiny import Tiny, batch_of, prefill, quick_jit

from mmalign_jax import losses
from mmalign_jax.sampling import DecodeOptions, LaneStart, decode_lanes, lane_keys
from mmalign_jax.types import FIRST_ANSWER, PREFIX

TOKENS = 32
CASES = all_cases()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Torch's thread pool costs more than such small models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(tmp_path, name):
    case = CASES[name]
    directory = case.write(tmp_path, 5)
    model, tiny = case.load(directory), Tiny.load(directory)
    batch = batch_of(case.records, tiny.processor)

    @quick_jit
    def run(params):
        filled = prefill(tiny.model, params, batch)
        slots = {"prefix_slots": batch.prefix_slots, "answer_slots": batch.answer_slots}
        cap = tiny.config.decoder.final_softcap
        logps, _ = losses.answer_logps(filled.hidden, tiny.model.head(params), batch.tokens, batch.role, **slots, softcap=cap, chunk=7)
        keys = lane_keys(jax.random.key(0), batch.record_key, jnp.zeros(len(case.records), jnp.int32), 1)
        options, start = DecodeOptions(TOKENS), LaneStart.behind_prefix(batch.role)
        samples = decode_lanes(tiny.model, params, filled, batch, start, keys, options)
        return tiny.model.logits(params, filled.hidden), logps, samples

    logits, logps, samples = jax.device_get(run(tiny.params))
    tokens, roles = np.asarray(batch.tokens), np.asarray(batch.role)
    largest, written = 0.0, []
    for row, record in enumerate(case.records):
        prompt = case.inputs(directory, record)
        # what transformers' processor makes of the same picture and words
        assert tokens[row][roles[row] == PREFIX].tolist() == prompt["input_ids"][0].tolist(), record.id
        for answer in range(2):
            targets = tokens[row][roles[row] == FIRST_ANSWER + answer].tolist()
            with torch.no_grad():
                expected = model(**case.append(prompt, targets)).logits[0].float().numpy()
            slots = np.flatnonzero((roles[row] == PREFIX) | (roles[row] == FIRST_ANSWER + answer))
            np.testing.assert_allclose(logits[row, slots], expected, atol=1e-4, rtol=0, err_msg=f"{record.id}, answer {answer}")
            largest = max(largest, np.abs(logits[row, slots] - expected).max())
            before = -len(targets) - 1
            predicted = torch.log_softmax(torch.from_numpy(expected), -1)[before:-1].gather(1, torch.tensor(targets)[:, None])[:, 0]
            np.testing.assert_allclose(logps[row, answer, : len(targets)], predicted.numpy(), atol=1e-4, rtol=0)
        generated = model.generate(**prompt, do_sample=False, max_new_tokens=TOKENS, output_scores=True, return_dict_in_generate=True)
        top = torch.stack(generated.scores)[:, 0].topk(2).values
        assert (top[:, 0] - top[:, 1]).min() > 5 * largest, "the runner-up is too near: the comparison would be a matter of rounding"
        written.append(generated.sequences[0, prompt["input_ids"].shape[1] :].tolist())
        assert samples.tokens[row, 0].tolist() == written[-1]
    # the comparison means something: answers differ, and none is one token over and over
    assert len({tuple(answer) for answer in written}) == len(written)
    assert all(len(set(answer)) >= 4 for answer in written)
