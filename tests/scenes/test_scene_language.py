import ast
from pathlib import Path

import pytest
import transformers

from mmalign_jax import scenes
from mmalign_jax.scenes import language, splits
from mmalign_jax.scenes.world import KINDS, SceneObject


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    language.build_tokenizer(directory)
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def exchanges():
    """(prompt, answer) of every kind of record, and every kind, count and colour in one sentence or another."""
    found = [(r.turns[0].parts[1].text, r.responses[0].text) for split in splits.SPLITS for r in splits.records(0, split, 150)]
    return sorted(set(found))


def chat(prompt, answer):
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    return [user, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def test_caption_by_hand():
    things = (
        SceneObject("cup", "red", 2, "top left", (0, 1)),
        SceneObject("spoon", "red", 1, "top left", (4,)),
        SceneObject("fish", "black", 3, "bottom right", (10, 11, 14)),
    )
    expected = "At the top left there are two red cups and a red spoon. At the bottom right there are three black fish."
    assert language.caption(things) == expected
    assert language.caption(things[1:2]) == "At the top left there is a red spoon."


def test_decoding_gives_the_text_back(tokenizer, exchanges):
    assert len(exchanges) > 300
    for text in {text for exchange in exchanges for text in exchange}:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_chat_template(tokenizer, exchanges):
    for prompt, answer in exchanges[::7]:
        whole = tokenizer.apply_chat_template(chat(prompt, answer), chat_template=language.CHAT_TEMPLATE, tokenize=False)
        assert whole == f"USER: <image>\n{prompt} ASSISTANT: {answer}</s>"
        opened = tokenizer.apply_chat_template(
            chat(prompt, answer)[:1], chat_template=language.CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
        )
        assert opened == f"USER: <image>\n{prompt} ASSISTANT:"
        ids = tokenizer.encode(whole, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == whole


def test_prompt_and_answer_are_encoded_apart_as_together(tokenizer, exchanges):
    for prompt, answer in exchanges[::7]:
        opened = f"USER: <image>\n{prompt} ASSISTANT:"
        apart = tokenizer.encode(opened, add_special_tokens=False) + tokenizer.encode(answer, add_special_tokens=False)
        assert apart + [tokenizer.eos_token_id] == tokenizer.encode(f"{opened} {answer}</s>", add_special_tokens=False)


def test_a_sentence_can_be_cut_at_any_word(tokenizer, exchanges):
    answer = max((answer for _, answer in exchanges), key=len)
    words = answer.split(" ")
    whole = tokenizer.encode(answer, add_special_tokens=False)
    for cut in range(1, len(words)):
        left, right = (tokenizer.encode(" ".join(part), add_special_tokens=False) for part in (words[:cut], words[cut:]))
        assert left + right == whole


def test_special_tokens(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<pad>", "<image>"])
    assert ids == [0, 1, 2, 3, 4]
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2, 3)
    assert tokenizer.encode("a cup") == [1, *tokenizer.encode("a cup", add_special_tokens=False)]
    assert tokenizer.encode("a zebra", add_special_tokens=False)[1] == 0


def test_the_vocabulary_is_closed_and_used(tokenizer, exchanges):
    assert len(tokenizer) == len(language.vocabulary()) == len(set(language.vocabulary()))
    assert tokenizer.get_vocab() == {token: number for number, token in enumerate(language.vocabulary())}
    texts = " ".join(text for exchange in exchanges for text in exchange)
    for mark in ".,?":
        texts = texts.replace(mark, f" {mark}")
    assert set(texts.split()) <= set(language.words())


def test_answers_by_hand():
    assert language.question("cup") == "Is there a cup in the picture?"
    cups = SceneObject("cup", "red", 2, "top left", (0, 1))
    assert language.answer("cup", cups) == "Yes, there are two red cups." and language.answer("cup", None) == "No, there is no cup."


def test_every_name_has_one_kind():
    names = [name for kind in KINDS for name in language.synonyms()[kind]]
    assert len(set(names)) == len(names)
    assert language.synonyms()["cup"] == ("cup", "cups") and language.synonyms()["fish"] == ("fish",)


def test_the_world_needs_no_jax():
    for path in Path(scenes.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert not {name.split(".")[0] for name in names} & {"jax", "jaxlib", "flax"}, path
