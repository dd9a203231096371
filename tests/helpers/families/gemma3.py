"""Tiny Gemma 3 checkpoints: four layers with a window narrower than an image's tokens to one without, and rotary positions of both kinds."""

import io
import pathlib
from collections.abc import Sequence

import PIL.Image
import torch
import transformers
from helpers.checkpoints import quiet
from helpers.families.case import FamilyCase, Inputs, append_tokens
from helpers.gemma_files import BOS, EOS, PAD, randomise, write_tokenizer
from helpers.tiny import MIXED
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from mmalign_jax.types import PreferenceRecord

SPECIALS = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>")
END_OF_TURN, START_OF_IMAGE, END_OF_IMAGE, IMAGE = 6, 7, 8, 9

# The chat template of google/gemma-3-4b-it.
CHAT_TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""

ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}


def tiny_config(vocabulary: int) -> transformers.Gemma3Config:
    text = {
        "vocab_size": vocabulary, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 5, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 11, "max_position_embeddings": 512, "sliding_window": 7,
        "sliding_window_pattern": 5, "rope_parameters": ROPE,
    }  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 48, "patch_size": 6, "vision_use_head": False,
    }  # fmt: skip
    return transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=16, boi_token_index=START_OF_IMAGE, eoi_token_index=END_OF_IMAGE,
        image_token_index=IMAGE, eos_token_id=[EOS, END_OF_TURN], bos_token_id=BOS, pad_token_id=PAD,
    )  # fmt: skip


def write(directory: pathlib.Path, seed: int) -> pathlib.Path:
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    size = write_tokenizer(directory, SPECIALS, names)
    config = tiny_config(size + 3)
    model = randomise(transformers.Gemma3ForConditionalGeneration(config), seed)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=BOS, eos_token_id=[EOS, END_OF_TURN], pad_token_id=PAD, do_sample=True, top_k=64, top_p=0.95
    )
    with quiet():
        model.save_pretrained(directory)
    images = Gemma3ImageProcessorPil(size={"height": 48, "width": 48}, do_pan_and_scan=None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    transformers.Gemma3Processor(images, tokenizer, CHAT_TEMPLATE, image_seq_length=16).save_pretrained(directory)
    return directory


def load(directory: pathlib.Path) -> torch.nn.Module:
    with quiet():
        model = transformers.Gemma3ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=PAD)
    return model


def inputs(directory: pathlib.Path, record: PreferenceRecord) -> Inputs:
    processor = transformers.AutoProcessor.from_pretrained(directory, backend="pil")
    messages = []
    for turn in record.turns:
        content = []
        for part in turn.parts:
            if part.text is None:
                content.append({"type": "image", "image": PIL.Image.open(io.BytesIO(record.media[part.media].data))})
            else:
                content.append({"type": "text", "text": part.text})
        messages.append({"role": turn.role, "content": content})
    return dict(processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True))


def append(given: Inputs, tokens: Sequence[int]) -> Inputs:
    return append_tokens(given, tokens)


def cases() -> list[FamilyCase]:
    return [FamilyCase("gemma3", write, load, inputs, append, MIXED)]
