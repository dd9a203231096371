"""Tiny CLIP and SigLIP directories, written by transformers on torch."""

import json
import pathlib
from typing import Any

import tokenizers
import torch
import transformers
from helpers.checkpoints import SENTENCES, quiet
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

WORDS = " ".join(SENTENCES).lower().replace(".", "").replace(",", "").replace("?", "").replace("!", "").replace(":", "").split()
_TOWER = {"num_hidden_layers": 2, "num_attention_heads": 2}
_VISION = _TOWER | {"hidden_size": 16, "intermediate_size": 20, "image_size": 28, "patch_size": 7}


def tiny_clip(directory: pathlib.Path, **text: Any) -> pathlib.Path:
    """Vectors of 10, texts of up to 40 tokens. CLIP's own kind of tokenizer: pairs of bytes, lower case."""
    directory.mkdir(parents=True, exist_ok=True)
    end, size = _write_clip_tokenizer(directory)
    text = _TOWER | {"hidden_size": 12, "intermediate_size": 18, "vocab_size": size, "max_position_embeddings": 40, "eos_token_id": end} | text
    _save(transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=10)), directory)
    _write_processor(directory, {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}, "do_center_crop": True,
        "crop_size": {"height": 28, "width": 28}, "image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.26, 0.27],
    })  # fmt: skip
    return directory


def tiny_siglip(directory: pathlib.Path, **text: Any) -> pathlib.Path:
    """Vectors of 16, texts of up to 24 tokens, padded with the end token. A token a word."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: number for number, word in enumerate(["<unk>", "</s>", *dict.fromkeys(WORDS)])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["</s>", "<unk>"])
    tokenizer.enable_padding(length=7)
    tokenizer.enable_truncation(5)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write(directory / "tokenizer_config.json", {"tokenizer_class": "SiglipTokenizer", "eos_token": "</s>", "pad_token": {"content": "</s>"}})
    text = _TOWER | {"hidden_size": 12, "intermediate_size": 18, "vocab_size": 80, "max_position_embeddings": 24, "projection_size": 16} | text
    _save(transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=_VISION)), directory)
    size = {"height": 28, "width": 28}
    _write_processor(directory, {"image_processor_type": "SiglipImageProcessor", "size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    return directory


def _write_clip_tokenizer(directory: pathlib.Path) -> tuple[int, int]:
    """Id of the end token, and the size of the vocabulary."""
    split = tokenizers.Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()])
    split = pre_tokenizers.Split(split, behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=640, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator([*SENTENCES, *(f"{a}" for a in alphabet)], trainer)
    start, end = tokenizer.get_vocab_size(), tokenizer.get_vocab_size() + 1
    learned = json.loads(tokenizer.to_str())
    learned["model"]["vocab"] |= {"<|startoftext|>": start, "<|endoftext|>": end}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(learned))
    tokenizer.post_processor = processors.RobertaProcessing(("<|endoftext|>", end), ("<|startoftext|>", start), False, False)
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    _write(directory / "tokenizer_config.json", {
        "tokenizer_class": "CLIPTokenizer", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>", "model_max_length": 40,
    })  # fmt: skip
    return end, end + 1


@torch.no_grad()
def _save(model: torch.nn.Module, directory: pathlib.Path) -> None:
    """Every parameter is random, and large enough to be seen in the vectors."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        elif parameter.ndim < 2 or "embed" in name or "probe" in name:
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
    with quiet():
        model.save_pretrained(directory)


def _write_processor(directory: pathlib.Path, values: dict[str, Any]) -> None:
    steps = {"do_convert_rgb": True, "do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    _write(directory / "preprocessor_config.json", steps | values)


def _write(file: pathlib.Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values))
