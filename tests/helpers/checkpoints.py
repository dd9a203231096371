"""Tiny LLaVA checkpoint directories, written by transformers on torch, for tests of everything that reads or writes one."""

import contextlib
import json
import pathlib
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, decoders, models, normalizers, processors, trainers

LAYOUTS = ("hub", "fresh", "memory")

# The chat template of llava-hf/llava-1.5-7b-hf, which writes no end-of-sequence token after an answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

SENTENCES = (
    "USER: What is in the picture? ASSISTANT: There is a red cat on a small table.",
    "A dog sits next to a blue chair, and a cup stands on the left of the book.",
    "Is there a bird in the image? Yes, there are two birds. No, there is not any bird!",
    "Describe this image in detail. The picture shows a green tree, a yellow car and three people.",
)


def tiny_llava(
    directory: str | pathlib.Path,
    *,
    seed: int = 0,
    layout: str = "hub",
    dtype: str = "float32",
    shards: int = 1,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    **top: Any,
) -> pathlib.Path:
    """Writes a loadable LLaVA directory (weights, configs, tokenizer, chat template, processor) and returns its path.

    Args:
      directory: made when missing.
      seed: of the weights; every tensor, biases and norms too, is random and large enough to be seen in the logits.
      layout: of the weight names: "hub" (as llava-hf/llava-1.5-7b-hf), "fresh" (transformers 5, model built from a config) or
        "memory" (transformers' module names).
      dtype: "float32", "bfloat16" or "float16".
      shards: at least so many safetensors files when above 1.
      text: changes to the LLaMA config. The default is 2 layers, width 24, 4 query and 2 key/value heads.
      vision: changes to the CLIP config. The default is 3 layers, width 16, 28 pixels in patches of 7 (16 image tokens).
      **top: changes to the top of `config.json`, such as `vision_feature_layer=[-2, -1]` or `tie_word_embeddings=True`.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = tiny_config(text=text, vision=vision, **top)
    _save(torch_model(config, seed).to(getattr(torch, dtype)), directory, layout, shards)
    write_tokenizer(directory)
    write_processor(directory, config)
    return directory


def tiny_config(*, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **top: Any) -> transformers.LlavaConfig:
    text = {
        "model_type": "llama", "vocab_size": 416, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 4,
    } | (text or {})  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 7, "projection_dim": 12,
    } | (vision or {})  # fmt: skip
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    full = top.get("vision_feature_select_strategy") == "full"
    top = {"image_token_index": 3, "image_seq_length": patches + full, "pad_token_id": 4} | top
    return transformers.LlavaConfig(text_config=text, vision_config=vision, **top)


def torch_model(config: transformers.LlavaConfig, seed: int = 0) -> torch.nn.Module:
    """A float32 model in eval mode whose every parameter is random: matrices scaled by fan-in, norms around 1, biases around 0."""
    model = transformers.LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1 or "embed" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model


def _save(model: torch.nn.Module, directory: pathlib.Path, layout: str, shards: int) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not one of {LAYOUTS}")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    limit = 10**12 if shards == 1 else size // shards
    with quiet():
        if layout == "hub":
            # transformers writes a loaded model back under the names that it was loaded from
            model.save_pretrained(directory)
            file = directory / "model.safetensors"
            renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in load_file(file).items()}
            save_file(renamed, file, {"format": "pt"})
            model = transformers.LlavaForConditionalGeneration.from_pretrained(directory, dtype=model.dtype)
            file.unlink()
        model.save_pretrained(directory, max_shard_size=limit, save_original_format=layout != "memory")


@contextlib.contextmanager
def quiet():
    """Silences transformers' progress bars."""
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.enable_progress_bar()


def tensors(directory: str | pathlib.Path) -> dict[str, np.ndarray | torch.Tensor]:
    """Every tensor of a directory as torch (which knows bfloat16), by name."""
    found = {}
    for file in sorted(pathlib.Path(directory).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}
    return found


def write_tokenizer(directory: str | pathlib.Path, chat_template: str = CHAT_TEMPLATE) -> None:
    """A LLaMA-like tokenizer of 405 tokens or fewer: BPE pieces with a leading underscore, bytes for what they do not cover.

    <unk> 0, <s> 1, </s> 2, <image> 3, <pad> 4; a leading <s> is written.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    specials = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trained.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=140, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    vocabulary = {piece: i for i, piece in enumerate([*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces])}
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", {
        "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "padding_side": "left",
        "model_max_length": 512,
        "extra_special_tokens": {"image_token": "<image>"}, "image_token": "<image>", "processor_class": "LlavaProcessor",
    })  # fmt: skip
    (directory / "chat_template.jinja").write_text(chat_template)


def write_processor(directory: str | pathlib.Path, config: transformers.LlavaConfig) -> None:
    """`preprocessor_config.json` and `processor_config.json` with the keys that llava-hf/llava-1.5-7b-hf has."""
    side = config.vision_config.image_size
    _write_json(pathlib.Path(directory) / "preprocessor_config.json", {
        "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"shortest_edge": side}, "resample": 3, "do_center_crop": True, "crop_size": {"height": side, "width": side},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    })  # fmt: skip
    _write_json(pathlib.Path(directory) / "processor_config.json", {
        "processor_class": "LlavaProcessor", "image_token": "<image>", "num_additional_image_tokens": 1,
        "patch_size": config.vision_config.patch_size, "vision_feature_select_strategy": config.vision_feature_select_strategy,
    })  # fmt: skip


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False))
