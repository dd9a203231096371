"""Tiny Idefics3 and SmolVLM checkpoints."""

import functools
import pathlib
from typing import Any

import transformers
from helpers.families.case import FamilyCase, append_tokens
from helpers.tile_checkpoints import RECORDS, VOCABULARY, Frames, inputs, load, processor, save_random, write_json, write_tokenizer

# The chat template of HuggingFaceTB/SmolVLM-256M-Instruct.
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>",
    *(f"<row_{row + 1}_col_{column + 1}>" for row in range(3) for column in range(3)),
)  # fmt: skip


def write(directory: pathlib.Path, seed: int, *, family: str = "smolvlm", images: Any = None, text: Any = None, vision: Any = None, **top: Any):
    """Writes a checkpoint: tiles of 28 pixels in patches of 7, 4 image tokens a tile, pictures of 56 pixels in up to 2 x 2 tiles."""
    directory.mkdir(parents=True, exist_ok=True)
    named = "Idefics3" if family == "idefics3" else "SmolVLM"
    ids = write_tokenizer(
        directory, SPECIALS, TEMPLATE, bos_token="<|im_start|>", eos_token="<end_of_utterance>", pad_token="<|im_start|>",
        unk_token="<|endoftext|>", processor_class=f"{named}Processor",
    )  # fmt: skip
    text = {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "bos_token_id": 1,
        "eos_token_id": ids["<end_of_utterance>"], "pad_token_id": 0,
    } | (text or {})  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7,
    } | (vision or {})  # fmt: skip
    config_type = getattr(transformers, f"{named}Config")
    config = config_type(text_config=text, vision_config=vision, image_token_id=ids["<image>"], **top)
    save_random(getattr(transformers, f"{named}ForConditionalGeneration")(config), directory, seed)
    side = vision["image_size"]
    write_json(directory / "preprocessor_config.json", {
        "image_processor_type": f"{named}ImageProcessor", "processor_class": f"{named}Processor", "do_convert_rgb": True, "do_resize": True,
        "do_image_splitting": True, "do_pad": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, "resample": 1,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": {"longest_edge": 2 * side},
        "max_image_size": {"longest_edge": side},
    } | (images or {}))  # fmt: skip
    write_json(directory / "processor_config.json", {"processor_class": f"{named}Processor", "image_seq_len": tokens(config)})
    return directory


def tokens(config: Any) -> int:
    """Image tokens of a tile."""
    return (config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor) ** 2


def theirs(directory: pathlib.Path) -> Any:
    """transformers' processor of a directory."""
    config = transformers.AutoConfig.from_pretrained(directory)
    if config.model_type == "idefics3":
        return processor(transformers.Idefics3Processor, directory, image_seq_len=tokens(config))
    # its parts are checked by type, and the type of this one needs torchvision
    kind = type("Processor", (transformers.SmolVLMProcessor,), {"check_argument_for_proper_class": lambda *_: None})
    return processor(kind, directory, video_processor=Frames(directory), image_seq_len=tokens(config))


def cases() -> list[FamilyCase]:
    """SmolVLM with pictures of several tiles; Idefics3 with one tile each, wider squares of patches, another decoder, and a tied head."""
    variants = {
        "smolvlm": {},
        "idefics3 one tile, 3 x 3 patches a token, tied qwen3": {
            "family": "idefics3", "scale_factor": 3, "tie_word_embeddings": True, "vision": {"image_size": 30, "patch_size": 5},
            "text": {"model_type": "qwen3", "head_dim": 8}, "images": {"do_image_splitting": False},
        },
    }  # fmt: skip
    return [
        FamilyCase(
            name=name,
            write=functools.partial(write, **values),
            load=load,
            inputs=lambda directory, record: inputs(theirs(directory), record),
            append=append_tokens,
            records=RECORDS,
        )
        for name, values in variants.items()
    ]
