"""Tiny InternVL checkpoints."""

import functools
import pathlib
from typing import Any

import transformers
from helpers.families.case import FamilyCase, append_tokens
from helpers.tile_checkpoints import VIDEO_RECORDS, VOCABULARY, Frames, inputs, load, processor, save_random, write_json, write_tokenizer

# The chat template of OpenGVLab/InternVL3-1B-hf.
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
NAMED = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}


def write(directory: pathlib.Path, seed: int, *, images: Any = None, text: Any = None, vision: Any = None, **top: Any):
    """Writes a checkpoint: tiles of 28 pixels in patches of 7, 4 image tokens a tile, up to 4 tiles and a thumbnail."""
    directory.mkdir(parents=True, exist_ok=True)
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *NAMED.values())
    ids = write_tokenizer(
        directory, specials, TEMPLATE, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=NAMED,
        processor_class="InternVLProcessor",
    )  # fmt: skip
    text = {
        "model_type": "qwen2", "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "eos_token_id": ids["<|im_end|>"], "pad_token_id": 0,
    } | (text or {})  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": [28, 28],
        "patch_size": [7, 7], "attention_bias": True,
    } | (vision or {})  # fmt: skip
    top = {"tie_word_embeddings": False, "image_seq_length": 4} | top
    config = transformers.InternVLConfig(text_config=text, vision_config=vision, image_token_id=ids["<IMG_CONTEXT>"], **top)
    save_random(transformers.InternVLForConditionalGeneration(config), directory, seed)
    write_json(directory / "preprocessor_config.json", {
        "image_processor_type": "GotOcr2ImageProcessor", "processor_class": "InternVLProcessor", "do_convert_rgb": True, "do_resize": True,
        "crop_to_patches": False, "min_patches": 1, "max_patches": 4, "size": {"height": 28, "width": 28}, "resample": 3,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    } | (images or {}))  # fmt: skip
    write_json(directory / "processor_config.json", {"processor_class": "InternVLProcessor", "image_seq_length": 4})
    return directory


def theirs(directory: pathlib.Path) -> Any:
    """transformers' processor of a directory."""
    # its parts are checked by type, and the type of the video processor needs torchvision
    kind = type("Processor", (transformers.InternVLProcessor,), {"check_argument_for_proper_class": lambda *_: None})
    return processor(kind, directory, video_processor=Frames(directory), image_seq_length=4)


def cases() -> list[FamilyCase]:
    """Three decoders, both norms, with and without query and key norms, with and without biases, other layers, one tile a picture."""
    variants = {
        "internvl": {},
        "internvl rms, query and key norms, layer before the last, tied qwen3": {
            "vision": {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False, "layer_norm_eps": 1e-5},
            "text": {"model_type": "qwen3", "head_dim": 8}, "tie_word_embeddings": True, "vision_feature_layer": -2,
        },
        "internvl last norm, no positions, llama, one tile": {
            "vision": {"use_mean_pooling": False, "use_absolute_position_embeddings": False}, "text": {"model_type": "llama"},
            "images": {"max_patches": 1},
        },
    }  # fmt: skip
    return [
        FamilyCase(
            name=name,
            write=functools.partial(write, **values),
            load=load,
            inputs=lambda directory, record: inputs(theirs(directory), record),
            append=append_tokens,
            records=VIDEO_RECORDS,
        )
        for name, values in variants.items()
    ]
