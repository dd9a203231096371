"""Tiny PaliGemma checkpoints: version 1 on Gemma, version 2 on Gemma 2 with soft caps and a window narrower than the prompt.

Version 1 has its image token behind the embedding's rows, version 2 among them.
"""

import functools
import io
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
import transformers
from helpers.checkpoints import quiet
from helpers.families.case import FamilyCase, Inputs, append_tokens
from helpers.gemma_files import BOS, EOS, PAD, randomise, write_tokenizer
from helpers.tiny import MIXED
from transformers.models.paligemma.processing_paligemma import EXTRA_TOKENS
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mmalign_jax.types import PreferenceRecord

GEMMA = {"model_type": "gemma"}
GEMMA2 = {
    "model_type": "gemma2", "num_hidden_layers": 4, "sliding_window": 7, "query_pre_attn_scalar": 11, "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 20.0,
}  # fmt: skip


def tiny_config(vocabulary: int, image_token: int, text: dict[str, Any]) -> transformers.PaliGemmaConfig:
    text = {
        "vocab_size": vocabulary, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512,
    } | text  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 7, "vision_use_head": False,
    }  # fmt: skip
    return transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=image_token, projection_dim=24, hidden_size=24, vocab_size=vocabulary,
        eos_token_id=EOS, bos_token_id=BOS, pad_token_id=PAD,
    )  # fmt: skip


def write(directory: pathlib.Path, seed: int, text: dict[str, Any]) -> pathlib.Path:
    size = write_tokenizer(directory, (), {"image_token": "<image>"}, EXTRA_TOKENS, last=("<image>",))
    vocabulary = size - 1 if text == GEMMA else size + 7
    model = randomise(transformers.PaliGemmaForConditionalGeneration(tiny_config(vocabulary, size - 1, text)), seed)
    model.generation_config = transformers.GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    with quiet():
        model.save_pretrained(directory)
    images = SiglipImageProcessorPil(size={"height": 28, "width": 28}, image_seq_length=16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    transformers.PaliGemmaProcessor(images, tokenizer).save_pretrained(directory)
    return directory


def load(directory: pathlib.Path) -> torch.nn.Module:
    with quiet():
        model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()  # sdpa knows no soft caps
    model.generation_config = transformers.GenerationConfig(pad_token_id=PAD)
    return model


def inputs(directory: pathlib.Path, record: PreferenceRecord) -> Inputs:
    processor = transformers.AutoProcessor.from_pretrained(directory, backend="pil")
    (turn,) = record.turns
    prompt = "".join(part.text or "" for part in turn.parts)
    pictures = [PIL.Image.open(io.BytesIO(record.media[part.media].data)) for part in turn.parts if part.text is None]
    if pictures:
        given = processor(images=[pictures], text="<image>" * len(pictures) + prompt)
        return {name: torch.tensor(np.array(given[name])) for name in ("input_ids", "attention_mask", "token_type_ids", "pixel_values")}
    # the processor takes no prompt without an image
    ids = processor.tokenizer(f"<bos>{prompt}\n", add_special_tokens=False, return_tensors="pt")["input_ids"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def append(given: Inputs, tokens: Sequence[int]) -> Inputs:
    out = append_tokens(given, tokens)
    out["token_type_ids"][:, given["input_ids"].shape[1] :] = 1  # answers are causal
    return out


def cases() -> list[FamilyCase]:
    return [
        FamilyCase("paligemma", functools.partial(write, text=GEMMA), load, inputs, append, MIXED),
        FamilyCase("paligemma 2", functools.partial(write, text=GEMMA2), load, inputs, append, MIXED),
    ]
