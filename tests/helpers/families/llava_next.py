"""Tiny LLaVA-NeXT and LLaVA-NeXT-Video checkpoints, and transformers' view of them."""

import functools
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from helpers.checkpoints import CHAT_TEMPLATE, quiet, write_tokenizer
from helpers.families.case import FamilyCase, Inputs, append_tokens
from PIL import Image

from mmalign_jax.types import Media, Part, Preference, PreferenceRecord, Response, Turn

SIDE, PATCH = 28, 7
VIDEO_TOKEN = 401  # the first behind those of `write_tokenizer`
PINPOINTS = [[28, 56], [56, 28], [56, 56]]

# The chat template of llava-hf/llava-v1.6-mistral-7b-hf, which knows no generation prompt.
MISTRAL_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '</s> '}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
VIDEO_TEMPLATE = CHAT_TEMPLATE.replace(
    "{# Render all text next #}",
    "{# Render all video then #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}"
    "{# Render all text next #}",
)

TEXT = {
    "vocab_size": 416, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 4,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
CLIP, SIGLIP = VISION | {"model_type": "clip_vision_model", "projection_dim": 12}, VISION | {"model_type": "siglip_vision_model"}
LLAMA = TEXT | {"model_type": "llama"}
VARIANTS: dict[str, dict[str, Any]] = {
    "llava_next": {"text_config": LLAMA, "vision_config": CLIP},
    "llava_next mistral": {"text_config": TEXT | {"model_type": "mistral", "head_dim": 6, "sliding_window": 24}, "vision_config": CLIP},
    "llava_next qwen2 siglip": {
        "text_config": TEXT | {"model_type": "qwen2"}, "vision_config": SIGLIP, "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
    },
    "llava_next_video": {"text_config": LLAMA, "vision_config": CLIP, "image_token_index": 3, "video_token_index": VIDEO_TOKEN},
}  # fmt: skip


def is_video(variant: str) -> bool:
    return variant.startswith("llava_next_video")


def config_of(variant: str) -> transformers.PretrainedConfig:
    values = {"image_token_index": 3, "image_grid_pinpoints": PINPOINTS, "pad_token_id": 4} | VARIANTS[variant]
    return (transformers.LlavaNextVideoConfig if is_video(variant) else transformers.LlavaNextConfig)(**values)


def write(directory: pathlib.Path, seed: int, variant: str) -> pathlib.Path:
    directory.mkdir(parents=True, exist_ok=True)
    config = config_of(variant)
    model = getattr(transformers, _architecture(variant))(config).eval()
    # many random models repeat themselves; these say something
    generator = torch.Generator().manual_seed(seed if "siglip" in variant else seed + 5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1 or "embed" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    with quiet():
        model.save_pretrained(directory)
    template = VIDEO_TEMPLATE if is_video(variant) else MISTRAL_TEMPLATE if "mistral" in variant else CHAT_TEMPLATE
    write_tokenizer(directory, template)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    if is_video(variant):
        tokenizer.add_tokens(["<video>"], special_tokens=True)
        assert tokenizer.convert_tokens_to_ids("<video>") == config.video_token_index
    tokenizer.save_pretrained(directory)
    images = {
        "crop_size": {"height": SIDE, "width": SIDE}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
        "do_rescale": True, "do_resize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "rescale_factor": 1 / 255, "size": {"shortest_edge": SIDE},
    }  # fmt: skip
    values = {
        "image_token": "<image>", "num_additional_image_tokens": int("siglip" not in variant), "patch_size": PATCH,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "image_processor": images | {
            "image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": PINPOINTS, "do_pad": True,
        },
        "processor_class": "LlavaNextVideoProcessor" if is_video(variant) else "LlavaNextProcessor",
    }  # fmt: skip
    if is_video(variant):
        values |= {"video_token": "<video>", "video_processor": images | {"video_processor_type": "LlavaNextVideoVideoProcessor"}}
    (directory / "processor_config.json").write_text(json.dumps(values, indent=2))
    return directory


def _architecture(variant: str) -> str:
    return "LlavaNextVideoForConditionalGeneration" if is_video(variant) else "LlavaNextForConditionalGeneration"


def load(directory: pathlib.Path, variant: str) -> torch.nn.Module:
    with quiet():
        model = getattr(transformers, _architecture(variant)).from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=4)
    return model


def processor(directory: pathlib.Path) -> Any:
    """transformers' own, on PIL. The video half, which needs torchvision, is put in by `inputs`."""
    values = json.loads((directory / "processor_config.json").read_text())
    images = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    parts = {name: values[name] for name in ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")}
    template = (directory / "chat_template.jinja").read_text()
    return transformers.LlavaNextProcessor(images, tokenizer, **parts, chat_template=template)


def inputs(directory: pathlib.Path, record: PreferenceRecord) -> Inputs:
    theirs = processor(directory)
    messages, images, videos = [], [], []
    for turn in record.turns:
        content = []
        for part in turn.parts:
            if part.text is not None:
                content.append({"type": "text", "text": part.text})
                continue
            medium = record.media[part.media]
            pictures = [Image.open(io.BytesIO(data)) for data in medium.pictures]
            (videos if medium.kind == "video" else images).append(pictures)
            content.append({"type": medium.kind})
        messages.append({"role": turn.role, "content": content})
    text = theirs.apply_chat_template(messages, add_generation_prompt=True)
    found = {}
    for frames in videos:
        # what LlavaNextVideoProcessor.replace_video_token writes
        text = text.replace("<video>\n", "<VIDEO>" * (len(frames) * (SIDE // PATCH) ** 2 // 4) + "\n", 1)
    if videos:
        # the values of the video processor, which is written for torchvision only, in the image processor that does the same steps
        values = json.loads((directory / "processor_config.json").read_text())["video_processor"]
        values.pop("video_processor_type")
        plain = transformers.CLIPImageProcessorPil(**values)
        found["pixel_values_videos"] = torch.stack([plain(frames, return_tensors="pt")["pixel_values"] for frames in videos])
    text = text.replace("<VIDEO>", "<video>")
    given = theirs(text=[text], images=[frames[0] for frames in images] or None, return_tensors="pt")
    return {name: value for name, value in given.items()} | found


def picture(seed: int, height: int, width: int) -> bytes:
    """Noise over a slope, so that orientation and place are seen."""
    random = np.random.default_rng(seed)
    slope = np.linspace(0, 120, height)[:, None, None] + np.linspace(0, 80, width)[None, :, None] * np.array([1.0, 0.2, 0.6])
    out = io.BytesIO()
    Image.fromarray((slope + random.integers(0, 50, (height, width, 3))).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def record(name: str, prompt: str, *answers: str, media: Sequence[Media] = ()) -> PreferenceRecord:
    parts = (*(Part(media=index) for index in range(len(media))), Part(text=prompt))
    return PreferenceRecord(name, tuple(media), (Turn("user", parts),), tuple(map(Response, answers)), (Preference(0, 1),))


WIDE, TALL = Media("image", picture(1, 40, 90)), Media("image", picture(2, 75, 30))
CLIP_OF_3 = Media("video", frames=tuple(picture(seed, 33, 50) for seed in (3, 4, 5)), times=(0.0, 0.5, 1.0))
RECORDS = (
    record("wide", "What is in the picture?", "There is a red cat.", "There is a blue dog on the table.", media=[WIDE]),
    record("two", "Describe this image in detail.", "A dog sits next to a blue chair.", "A cup.", media=[TALL, WIDE]),
    record("text", "Is there a bird?", "No, there is not any bird!", "Yes, there are two birds."),
    record("tall", "Describe?", "A yellow car and three people.", "No.", media=[TALL]),
)
VIDEO_RECORDS = (
    *RECORDS,
    record("video", "What is in the picture?", "A dog and a cat.", "A red book.", media=[CLIP_OF_3]),
    record("both", "Describe?", "A small tree.", "A car is in the image.", media=[TALL, CLIP_OF_3]),
)


def cases() -> list[FamilyCase]:
    return [
        FamilyCase(
            name=variant,
            write=functools.partial(write, variant=variant),
            load=functools.partial(load, variant=variant),
            inputs=inputs,
            append=append_tokens,
            records=VIDEO_RECORDS if is_video(variant) else RECORDS,
        )
        for variant in VARIANTS
    ]
