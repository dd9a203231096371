"""Pixels and token ids equal those of transformers' LlavaProcessor; what cannot be written faithfully is an error."""

import json
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import tokenizers
import transformers
from helpers.checkpoints import tiny_llava
from helpers.tiny import prompt_ids
from skimage import data
from tokenizers import models, pre_tokenizers

from mmalign_jax.errors import DataError, UserError
from mmalign_jax.hf.import_ import read_config
from mmalign_jax.hf.processor import load_processor
from mmalign_jax.types import Part, Turn

IMAGE = Part(media=0)
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text | trim }}"
    "{% endif %}{% endfor %}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def ask(*parts: Part | str) -> tuple[Turn, ...]:
    return (Turn("user", tuple(Part(text=part) if isinstance(part, str) else part for part in parts)),)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def ours(base):
    return load_processor(base, read_config(base))


@pytest.fixture(scope="module")
def theirs(base):
    return transformers.AutoProcessor.from_pretrained(base, backend="pil")


def with_template(base, directory, template):
    for file in base.iterdir():
        if not file.name.startswith("model"):
            (directory / file.name).write_bytes(file.read_bytes())
    (directory / "chat_template.jinja").write_text(template)
    return load_processor(directory, read_config(base))


def pictures():
    astronaut = PIL.Image.fromarray(data.astronaut())
    yield astronaut
    yield astronaut.resize((37, 91))
    yield astronaut.resize((300, 29))
    yield astronaut.convert("L")
    yield astronaut.convert("RGBA")
    yield astronaut.convert("P")
    yield astronaut.resize((28, 28))
    yield astronaut.resize((5, 9))


def test_pixels_are_the_processors(ours, theirs):
    for image in pictures():
        pixels = ours.pictures.pixels([image])[0]
        assert pixels.dtype == np.uint8 and pixels.shape == (28, 28, 3)
        expected = theirs.image_processor(image, do_convert_rgb=True)["pixel_values"][0].transpose(1, 2, 0)
        normalised = (pixels.astype(np.float32) / 255 - np.float32(ours.mean)) / np.float32(ours.std)
        np.testing.assert_allclose(normalised, expected, atol=1e-6)
        raw = theirs.image_processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_array_equal(pixels, raw)


def test_switched_off_normalisation_and_odd_rescaling_are_folded_in(base, tmp_path):
    values = json.loads((base / "preprocessor_config.json").read_text())
    for changes in ({"do_normalize": False}, {"rescale_factor": 1 / 127.5}, {"do_rescale": False}):
        with_template(base, tmp_path, (base / "chat_template.jinja").read_text())
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values | changes))
        ours = load_processor(tmp_path, read_config(base))
        image = next(pictures())
        expected = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(image)["pixel_values"][0].transpose(1, 2, 0)
        found = (ours.pictures.pixels([image])[0].astype(np.float32) / 255 - np.float32(ours.mean)) / np.float32(ours.std)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


PROMPTS = {
    "image first": ask(IMAGE, "What is in the picture?"),
    "image last": ask("What is über this? ", IMAGE),
    "two images": ask(IMAGE, Part(media=1), "Compare."),
    "text only": ask("Is there a bird?"),
    "turns": (
        Turn("system", (Part(text="Be short."),)),
        *ask(IMAGE, "What is it?"),
        Turn("assistant", (Part(text="A dog."),)),
        *ask("Where is it?\n\nSay it in Greek: σκύλος"),
    ),
}


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("turns", PROMPTS.values(), ids=PROMPTS)
def test_prompt_ids_are_the_processors(base, tmp_path, ours, theirs, turns, template):
    if template:
        ours = with_template(base, tmp_path, template)
    images, messages = [], []
    for turn in turns:
        content = []
        for part in turn.parts:
            if part.text is None:
                images.append(PIL.Image.new("RGB", (30, 40)))
                content.append({"type": "image", "image": images[-1]})
            else:
                content.append({"type": "text", "text": part.text})
        messages.append({"role": turn.role, "content": content})
    expected = theirs.apply_chat_template(messages, chat_template=template, tokenize=True, return_dict=True, add_generation_prompt=True)
    ids = prompt_ids(ours, turns)
    np.testing.assert_array_equal(ids, expected["input_ids"][0])
    assert ids.dtype == np.int32 and (ids == 1).sum() == 1 and (ids == 3).sum() == 16 * len(images)


@pytest.mark.parametrize("template", [None, CHATML])
def test_an_answer_continues_the_prompt_and_ends_once(base, tmp_path, ours, template):
    if template:
        ours = with_template(base, tmp_path, template)
    for text in ("A red cat.", "Yes", "No, there is not!\nLook: é 🐱", "x", "3 dogs"):
        ids, scored = ours.answer_ids(text)
        assert ids[-1] == 2 and (ids == 2).sum() == 1 and scored.all() and ids.dtype == np.int32
        turns = ask("What is it?")
        whole = ours.render((*turns, Turn("assistant", (Part(text=text),))))
        whole = whole[: whole.index(text) + len(text)]
        expected = ours._tokenizer(whole, add_special_tokens=not template)["input_ids"]
        assert [*prompt_ids(ours, turns), *ids[:-1]] == expected
        assert ours.decode(ids) == text
        assert whole.startswith(ours.render(turns))


def test_spans_cover_the_text_and_words_are_found(ours):
    text = "There isn't a dog, no 2 birds."
    answer = ours.answer(text)
    assert answer.spans[0, 0] == 0 and answer.spans[-1].tolist() == [len(text)] * 2
    np.testing.assert_array_equal(answer.spans[1:, 0], answer.spans[:-1, 1])
    starts = [text[start:stop].strip() for (start, stop), word in zip(answer.spans, answer.word_start, strict=True) if word]
    words = ["There", "isn't", "a", "dog", "no", "2", "birds"]
    assert len(starts) == len(words) and all(word.startswith(piece) for word, piece in zip(words, starts, strict=True))


def test_a_prefix_is_not_scored(ours):
    prefix, text = "A red cat. ", "A red cat. A dog sits."
    answer = ours.answer(text, prefix)
    assert answer.scored[-1]
    assert "".join(text[a:b] for (a, b), s in zip(answer.spans, answer.scored, strict=True) if s).strip() == "A dog sits."
    assert "".join(text[a:b] for (a, b), s in zip(answer.spans, answer.scored, strict=True) if not s).strip() == "A red cat."
    with pytest.raises(UserError, match="does not begin with its prefix"):
        ours.answer("A dog sits.", prefix)


def test_spans_are_in_the_text_that_was_given_even_where_the_template_trims_it(base, tmp_path):
    ours = with_template(base, tmp_path, CHATML)
    text = "  A red cat.\n"
    answer = ours.answer(text)
    np.testing.assert_array_equal(answer.ids, ours.answer(text.strip()).ids)
    assert "".join(text[a:b] for a, b in answer.spans) == "A red cat."


def test_special_tokens_and_empty_answers_are_refused(ours):
    for text in ("look <image>", "a </s> b", "<s>", "<pad>"):
        with pytest.raises(UserError, match="holds the special token <"):
            prompt_ids(ours, ask(text))
        with pytest.raises(UserError, match="holds the special token <"):
            ours.answer(text)
    for text in ("", " \n"):
        with pytest.raises(UserError, match="empty"):
            ours.answer(text)


def test_ids_that_end_or_are_banned(ours):
    assert ours.eos_ids == (2,)
    assert ours.image_token_ids == (3,) and ours.pad_id == 4
    assert ours.banned_ids == (0, 1, 3, 4, *range(len(ours._tokenizer), 416))
    pieces = set(ours._tokenizer.convert_ids_to_tokens(list(ours.sentence_end_ids)))
    assert {".", "?", "!", "<0x2E>", "<0x21>", "<0x3F>"} <= pieces
    assert not [piece for piece in pieces if piece[-1] not in ".?!" and not piece.startswith("<0x")]


def test_generation_config_adds_end_tokens(base, tmp_path):
    with_template(base, tmp_path, CHATML)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [4, 2]}))
    ours = load_processor(tmp_path, read_config(base))
    assert ours.eos_ids == (2, 4) and 4 not in ours.banned_ids
    file.write_text(json.dumps({"eos_token_id": 70_000}))
    with pytest.raises(DataError, match="generation_config.json: eos_token_id"):
        load_processor(tmp_path, read_config(base))


TEMPLATES = {
    "{% for m in messages %}{% for c in m.content %}{{ c.text or '' }}{% endfor %}{% endfor %}A:": "wrote 0 image placeholders for 1",
    "<image>{% for m in messages %}{{ m.role }}{% endfor %}A:": "leaves out or changes this text of a user turn: 'What'",
    "{{ raise_exception('roles must alternate') }}": "refuses these turns: roles must alternate",
}


@pytest.mark.parametrize(("template", "message"), TEMPLATES.items(), ids=["image", "text", "raises"])
def test_templates_that_lose_something_are_refused(base, tmp_path, template, message):
    with pytest.raises(UserError, match=message):
        prompt_ids(with_template(base, tmp_path, template), ask(IMAGE, "What"))


def test_a_template_that_ends_answers_in_its_own_way_is_refused(base, tmp_path):
    ours = with_template(base, tmp_path, CHATML.replace("</s>", "<end>"))
    with pytest.raises(UserError, match="ends an answer with '<end>'"):
        ours.answer("A dog.")


def test_the_old_template_file_is_read(base, tmp_path):
    with_template(base, tmp_path, CHATML)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template; expected chat_template.jinja"):
        load_processor(tmp_path, read_config(base))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    assert load_processor(tmp_path, read_config(base)).render(ask("Hi")).endswith("<|assistant|>\n")


def test_words_without_a_token_are_named(base, tmp_path):
    with_template(base, tmp_path, (base / "chat_template.jinja").read_text())
    listed = ["<unk>", "<s>", "</s>", "<image>", "<pad>", "USER", "ASSISTANT", ":", "?", ".", "a", "dog"]
    words = {token: i for i, token in enumerate(listed)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(listed[:5])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    ours = load_processor(tmp_path, read_config(base))
    ids, _ = ours.answer_ids("a dog.")
    assert ids.tolist() == [10, 11, 9, 2] and ours.answer("a dog.").word_start.tolist() == [True, True, False, False]
    assert prompt_ids(ours, ask("a dog?")).tolist() == [5, 7, 10, 11, 8, 6, 7]
    with pytest.raises(UserError, match="no token for 'purple', 'cat.'"):
        ours.answer("a purple cat.")
    with pytest.raises(UserError, match="no token for 'Why'"):
        prompt_ids(ours, ask("Why ?"))


def test_processors_that_do_not_fit_the_model_are_refused_on_loading(base, tmp_path):
    with_template(base, tmp_path, CHATML)
    config = read_config(base)
    file = tmp_path / "preprocessor_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"crop_size": {"height": 14, "width": 14}}))
    with pytest.raises(UserError, match=r"the image processor made uint8\(14, 14, 3\) of an image, the model takes uint8\(28, 28, 3\)"):
        load_processor(tmp_path, config)
    file.unlink()
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(UserError, match="no image processor"):
        load_processor(tmp_path, config)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json: no such file"):
        load_processor(tmp_path, config)


def test_nothing_in_the_directory_is_executed_and_torch_is_not_needed(base, tmp_path):
    with_template(base, tmp_path, CHATML)
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')\nclass Evil: pass\n")
    for name, key in (("preprocessor_config.json", "AutoImageProcessor"), ("tokenizer_config.json", "AutoTokenizer")):
        values = json.loads((tmp_path / name).read_text())
        target = "evil.Evil" if key == "AutoImageProcessor" else ["evil.Evil", None]
        (tmp_path / name).write_text(json.dumps(values | {"auto_map": {key: target}}))
    (tmp_path / "model.safetensors").symlink_to(base / "model.safetensors")
    code = f"""
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] in ("torch", "torchvision") else find(name, *rest)
import PIL.Image
from mmalign_jax.hf.import_ import read_config
from mmalign_jax.hf.processor import load_processor
p = load_processor({str(tmp_path)!r}, read_config({str(tmp_path)!r}))
assert p.pictures.pixels([PIL.Image.new("RGB", (40, 30))]).shape == (1, 28, 28, 3) and "torch" not in sys.modules
print(p.answer("A dog.").ids.tolist())
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().startswith("[") and run.stdout.strip().endswith(", 2]")
