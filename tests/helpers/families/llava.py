"""LLaVA-1.5."""

import functools
import io
import pathlib

import torch
import transformers
from helpers import checkpoints
from helpers.families.case import FamilyCase, append_tokens
from helpers.tiny import MIXED
from PIL import Image

from mmalign_jax.types import PreferenceRecord


def load(directory: pathlib.Path) -> torch.nn.Module:
    with checkpoints.quiet():
        model = transformers.LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=4)
    return model


@functools.cache
def _processor(directory: pathlib.Path) -> transformers.LlavaProcessor:
    images = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    values = {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaProcessor(images, tokenizer, chat_template=checkpoints.CHAT_TEMPLATE, **values)


def inputs(directory: pathlib.Path, record: PreferenceRecord) -> dict[str, torch.Tensor]:
    processor = _processor(directory)
    parts = [{"type": "image"} if part.text is None else {"type": "text", "text": part.text} for part in record.turns[0].parts]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    pictures = [Image.open(io.BytesIO(medium.data)) for medium in record.media]
    return dict(processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt"))


def cases() -> list[FamilyCase]:
    def write(directory: pathlib.Path, seed: int) -> pathlib.Path:
        return checkpoints.tiny_llava(directory, seed=seed, layout="hub")

    return [FamilyCase("llava", write, load, inputs, append_tokens, MIXED)]
