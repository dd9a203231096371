"""Tiny Qwen2-VL, Qwen2.5-VL and Qwen3-VL checkpoints: pictures and videos of any size."""

import functools
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from helpers.families.case import FamilyCase, Inputs, append_tokens
from helpers.tile_checkpoints import VOCABULARY, load, png, save_random, write_json, write_tokenizer
from PIL import Image
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor, smart_resize

from mmalign_jax.types import Media, Part, Preference, PreferenceRecord, Response, Turn

SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>",
)  # fmt: skip
PATCH = 4

# The chat template of Qwen/Qwen2.5-VL-7B-Instruct.
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 100.0}
TOWER = {"patch_size": PATCH, "depth": 4, "num_heads": 2, "intermediate_size": 20}
# Windows of 2 x 2 tokens, which is 16 pixels.
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "text_config": TEXT | {"rope_parameters": MROPE | {"mrope_section": [2, 1, 1]}},
        "vision_config": {"patch_size": PATCH, "depth": 2, "num_heads": 2, "embed_dim": 16, "mlp_ratio": 2, "hidden_size": 32},
    },
    "qwen2_5_vl": {
        "text_config": TEXT | {"rope_parameters": MROPE | {"mrope_section": [1, 2, 1]}},
        "vision_config": TOWER | {
            "hidden_size": 16, "window_size": 16, "fullatt_block_indexes": [1, 3], "out_hidden_size": 32, "tokens_per_second": 2,
        },
    },
    "qwen3_vl": {
        "text_config": TEXT | {"head_dim": 16, "rope_parameters": MROPE | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}},
        "vision_config": TOWER | {
            "hidden_size": 16, "out_hidden_size": 32, "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2],
        },
    },
}  # fmt: skip
NAMED = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}


def config_of(family: str, tied: bool = False) -> transformers.PretrainedConfig:
    ids = {name: SPECIALS.index(f"<|{text}|>") for name, text in (
        ("image_token_id", "image_pad"), ("video_token_id", "video_pad"),
        ("vision_start_token_id", "vision_start"), ("vision_end_token_id", "vision_end"),
    )}  # fmt: skip
    return getattr(transformers, f"{NAMED[family]}Config")(**VARIANTS[family], **ids, tie_word_embeddings=tied)


def write(directory: pathlib.Path, seed: int, *, family: str, tied: bool = False) -> pathlib.Path:
    """Writes a checkpoint. Pictures take 4 to 64 tokens of 8 x 8 pixels; all frames of a video together 4 to 128."""
    directory.mkdir(parents=True, exist_ok=True)
    save_random(getattr(transformers, f"{NAMED[family]}ForConditionalGeneration")(config_of(family, tied)), directory, seed)
    values = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "processor_class": f"{NAMED[family]}Processor"}
    write_tokenizer(directory, SPECIALS, TEMPLATE, **values)
    pictures = {
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "rescale_factor": 1 / 255, "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2,
    }  # fmt: skip
    videos = pictures | {"video_processor_type": f"Qwen{'3' if '3' in family else '2'}VLVideoProcessor"}
    write_json(directory / "preprocessor_config.json", pictures | {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": f"{NAMED[family]}Processor",
        "size": {"shortest_edge": 4 * 64, "longest_edge": 64 * 64},
    })  # fmt: skip
    write_json(directory / "video_preprocessor_config.json", videos | {"size": {"shortest_edge": 4 * 64, "longest_edge": 128 * 64}})
    return directory


class TheirVideos:
    """Stands where a processor wants its video processor, which needs torchvision: the same steps, frames resized by PIL."""

    merge_size = temporal_patch_size = 2
    model_input_names = ()

    def __init__(self, directory: pathlib.Path, images: Any):
        self.images, self.times = images, []
        self.limits = json.loads((directory / "video_preprocessor_config.json").read_text())["size"].values()
        self.by_frame = json.loads((directory / "config.json").read_text())["model_type"] != "qwen3_vl"

    def __call__(self, videos: Sequence[Sequence[Image.Image]], **_: Any) -> dict[str, Any]:
        patches, grids, metadata = [], [], []
        for frames, times in zip(videos, self.times, strict=True):
            width, height = frames[0].size
            low, high = self.limits
            factor = PATCH * self.merge_size
            if self.by_frame:
                from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as resize_one

                size = resize_one(height, width, factor, low, high)
            else:
                size = smart_resize(len(frames), height, width, 2, factor, low, high)
            resized = np.stack([np.asarray(frame.resize(size[::-1], Image.Resampling.BICUBIC)) for frame in frames]) / np.float32(255)
            mean, std = (np.array(values, np.float32) for values in (self.images.image_mean, self.images.image_std))
            video = torch.from_numpy(((resized - mean) / std).transpose(0, 3, 1, 2).copy())[None]
            flat, *grid = Qwen3VLVideoProcessor.patchify(None, video, PATCH, self.merge_size, self.temporal_patch_size)
            patches.append(flat[0])
            grids.append(grid)
            # frames are numbered by hundredths of a second, so that any times can be said
            numbers = [round(100 * time) for time in times]
            sampled = 1.0 if len(times) < 2 else 1 / (times[1] - times[0])
            metadata.append(SimpleNamespace(fps=100.0, frames_indices=numbers, sampled_fps=sampled))
        return {"pixel_values_videos": torch.cat(patches), "video_grid_thw": torch.tensor(grids), "video_metadata": metadata}


@functools.cache
def _processor(directory: pathlib.Path) -> Any:
    """transformers' own, from its parts, which are checked by a type that needs torchvision."""
    family = json.loads((directory / "config.json").read_text())["model_type"]
    own = getattr(transformers, f"{NAMED[family]}Processor")
    kind = type("Processor", (own,), {"check_argument_for_proper_class": lambda *_: None})
    images = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return kind(images, tokenizer, TheirVideos(directory, images), chat_template=TEMPLATE)


def inputs(directory: pathlib.Path, record: PreferenceRecord) -> Inputs:
    processor = _processor(directory)
    messages = [
        {"role": turn.role, "content": [
            {"type": "text", "text": part.text} if part.text is not None else {"type": record.media[part.media].kind} for part in turn.parts
        ]} for turn in record.turns
    ]  # fmt: skip
    shown = [record.media[part.media] for turn in record.turns for part in turn.parts if part.text is None]
    decoded = {kind: [[Image.open(io.BytesIO(data)) for data in m.pictures] for m in shown if m.kind == kind] for kind in ("image", "video")}
    processor.video_processor.times = [medium.times for medium in shown if medium.kind == "video"]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    images, videos = [picture for (picture,) in decoded["image"]], decoded["video"]
    given = processor(text=[text], images=[images] if images else None, videos=videos or None, return_tensors="pt")
    return {key: value if isinstance(value, torch.Tensor) else torch.tensor(value) for key, value in given.items() if key != "video_metadata"}


def image(height: int, width: int) -> Media:
    return Media("image", png(height, width, 31 * height + width))


def video(height: int, width: int, times: Sequence[float]) -> Media:
    return Media("video", frames=tuple(png(height, width, number + 7 * height) for number in range(len(times))), times=tuple(times))


def record(name: str, prompt: str, *answers: str, media: Sequence[Media] = ()) -> PreferenceRecord:
    parts = (*(Part(media=index) for index in range(len(media))), Part(text=prompt))
    return PreferenceRecord(name, tuple(media), (Turn("user", parts),), tuple(map(Response, answers)), (Preference(0, 1),))


# One that fills its windows, one that does not, and one that grows to the least size; two in a row; a row of text.
PICTURES = (
    record("full", "What is in the picture?", "There is a red cat.", "There is a blue dog on the table.", media=[image(32, 48)]),
    record("two", "Describe this image in detail.", "A dog sits next to a blue chair.", "A cup.", media=[image(23, 41), image(57, 26)]),
    record("text", "Is there a bird?", "No, there is not any bird!", "Yes, there are two birds."),
    record("small", "Describe?", "A yellow car and three people.", "No.", media=[image(9, 11)]),
)
# Even and odd numbers of frames, beside a picture. Their last times are no later than a picture of their size is wide, where transformers'
# numbers for the text behind a video are those of the paper.
VIDEOS = (
    record("film", "What is in the picture?", "There is a red cat.", "A table.", media=[video(40, 56, (0.0, 0.5, 1.0, 1.5))]),
    record(
        "odd", "Describe this image in detail.", "A dog.", "A cup and a book.", media=[image(23, 41), video(33, 24, (2.0, 2.5, 3.0))]
    ),
    record("still", "Is there a bird?", "No, there is not any bird!", "Yes, there are two birds.", media=[image(30, 20)]),
)  # fmt: skip


def cases() -> list[FamilyCase]:
    variants: Mapping[str, tuple[dict[str, Any], tuple[PreferenceRecord, ...]]] = {
        "qwen2_vl": ({"family": "qwen2_vl"}, PICTURES),
        "qwen2_5_vl": ({"family": "qwen2_5_vl"}, PICTURES),
        "qwen2_5_vl videos": ({"family": "qwen2_5_vl"}, VIDEOS),
        "qwen3_vl": ({"family": "qwen3_vl", "tied": True}, PICTURES),
        "qwen3_vl videos": ({"family": "qwen3_vl"}, VIDEOS),
    }
    return [
        FamilyCase(name, functools.partial(write, **values), load, inputs, append_tokens, records)
        for name, (values, records) in variants.items()
    ]

