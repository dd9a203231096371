"""What the tests of the two families with tiles and pixel shuffle share: a byte-level tokenizer, random weights, records."""

import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from helpers.checkpoints import SENTENCES, quiet
from PIL import Image
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from mmalign_jax.types import Media, Part, Preference, PreferenceRecord, Response, Turn

VOCABULARY = 448


def write_tokenizer(directory: pathlib.Path, specials: Sequence[str], template: str, **values: Any) -> dict[str, int]:
    """A byte-level BPE, as GPT-2's and Qwen's, in which two newlines are one token; returns the ids of the special tokens, from 0 on."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 16, show_progress=False, special_tokens=[AddedToken(token, normalized=False, special=True) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    trained.train_from_iterator([*SENTENCES * 4, *["a\n\n"] * 40], trainer)
    trained.save(str(directory / "tokenizer.json"))
    values = {"clean_up_tokenization_spaces": False, "model_max_length": 4096, "tokenizer_class": "PreTrainedTokenizerFast"} | values
    write_json(directory / "tokenizer_config.json", values)
    (directory / "chat_template.jinja").write_text(template)
    ids = {token: trained.token_to_id(token) for token in specials}
    assert trained.encode("\n\n").ids == [trained.token_to_id("ĊĊ")]
    return ids


def save_random(model: torch.nn.Module, directory: pathlib.Path, seed: int) -> None:
    """Saves the model with every parameter random: matrices scaled by fan-in, norms around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1 or "embeddings" in name or "embed_tokens" in name:
                parameter.copy_((0.1 if tied and "embed_tokens" in name else 0.5) * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            # random models repeat themselves, unless their layers add much to what goes in; tied ones, to a small embedding
            if name.endswith(tuple(f"{layer}_proj.weight" for layer in (("v", "gate", "up", "o", "down") if tied else ("v", "gate", "up")))):
                parameter.mul_(2)
            if tied and name.endswith(("text_model.norm.weight", "language_model.norm.weight")):
                parameter.mul_(10)
    with quiet():
        model.save_pretrained(directory)


def load(directory: pathlib.Path) -> torch.nn.Module:
    """The model in float32 with a neutral generation config."""
    with quiet():
        model = transformers.AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return model


class Frames:
    """Stands where a processor wants its video processor, which needs torchvision: frames on PIL, without crops."""

    model_input_names = ()

    def __init__(self, directory: pathlib.Path):
        self._images = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")

    def __call__(self, videos: Sequence[Sequence[Image.Image]], **kwargs: Any) -> dict[str, torch.Tensor]:
        made = [self._images(list(frames), crop_to_patches=False, return_tensors="pt")["pixel_values"] for frames in videos]
        return {"pixel_values_videos": torch.stack(made)}


def processor(kind: type, directory: pathlib.Path, **values: Any) -> Any:
    """transformers' processor from its parts, with the image processor on PIL."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    images = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    return kind(images, tokenizer, chat_template=tokenizer.chat_template, **values)


def inputs(made: Any, record: PreferenceRecord) -> Mapping[str, torch.Tensor]:
    """What transformers' processor makes of a record's prompt."""
    messages, shown = [], {"image": [], "video": []}
    for turn in record.turns:
        content = []
        for part in turn.parts:
            if part.text is None:
                medium = record.media[part.media]
                shown[medium.kind].append([Image.open(io.BytesIO(data)) for data in medium.pictures])
                content.append({"type": medium.kind})
            else:
                content.append({"type": "text", "text": part.text})
        messages.append({"role": turn.role, "content": content})
    text = made.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    given = {"images": [[picture for (picture,) in shown["image"]]]} if shown["image"] else {}
    given |= {"videos": shown["video"]} if shown["video"] else {}
    return dict(made(text=[text], return_tensors="pt", **given))


def png(height: int, width: int, seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def record(name: str, prompt: str, *answers: str, sizes: Sequence[tuple[int, int]] = (), media: Sequence[Media] = ()) -> PreferenceRecord:
    """A record whose pictures are noise of these sizes (height, width), and stand before `media`."""
    media = (*(Media("image", png(*size, seed=31 * number + size[1])) for number, size in enumerate(sizes)), *media)
    parts = (*(Part(media=index) for index in range(len(media))), Part(text=prompt))
    return PreferenceRecord(name, media, (Turn("user", parts),), tuple(map(Response, answers)), (Preference(0, 1),))


# Wide, high and square pictures, which take unlike numbers of tiles, and a row of text.
RECORDS = (
    record("wide", "What is in the picture?", "There is a red cat.", "There is a blue dog on the table.", sizes=[(20, 61)]),
    record("two", "Describe this image in detail.", "A dog sits next to a blue chair.", "A cup.", sizes=[(50, 23), (33, 33)]),
    record("text", "Is there a bird?", "No, there is not any bird!", "Yes, there are two birds."),
    record("high", "Describe?", "A yellow car and three people.", "No.", sizes=[(90, 30)]),
)
VIDEO = Media("video", frames=tuple(png(33, 50, seed) for seed in (3, 4, 5)), times=(0.0, 0.5, 1.0))
VIDEO_RECORDS = (
    *RECORDS,
    record("video", "What is in the picture?", "A dog and a cat.", "A red book.", media=[VIDEO]),
    record("both", "Describe?", "A small tree.", "A car is in the image.", sizes=[(20, 61)], media=[VIDEO]),
)


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False))
