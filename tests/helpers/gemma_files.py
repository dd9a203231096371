"""What tiny Gemma 3 and PaliGemma directories have in common: a Gemma-like tokenizer and random weights that write varied text."""

import json
import pathlib
from collections.abc import Sequence

import tokenizers
import torch
from helpers.checkpoints import SENTENCES
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

PAD, EOS, BOS = 0, 1, 2
NEWLINES = ("\n", "\n\n", "\n\n\n", "\n\n\n\n")


def write_tokenizer(
    directory: pathlib.Path, specials: Sequence[str], names: dict[str, str], extra: Sequence[str] = (), last: Sequence[str] = ()
) -> int:
    """Writes a tokenizer and returns its size: BPE without a leading space, bytes for what it does not cover, newlines as tokens.

    <pad> 0, <eos> 1, <bos> 2, <unk> 3, <mask> 4, then `specials`, at the end `last`, which are special, too; it writes a leading <bos>.

    Args:
      names: named tokens, such as `{"image_token": "<image>"}`.
      extra: ordinary words of its vocabulary.
    """
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *specials]
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator([text.replace(" ", "▁") for text in SENTENCES], trainers.BpeTrainer(vocab_size=140, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    words = [*first, *NEWLINES, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *extra, *last]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (*first, *last)])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in (*NEWLINES, *extra)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    values = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "add_bos_token": True, **names}
    values |= {"tokenizer_class": "GemmaTokenizer", "clean_up_tokenization_spaces": False, "extra_special_tokens": names}
    (directory / "tokenizer_config.json").write_text(json.dumps(values, indent=2))
    return len(vocabulary)


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random and large enough to be seen in the logits.

    A random tied model repeats its last token; a small embedding, strong layers and a large last norm make it say something.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("language_model.norm.weight"):
                parameter.copy_(20 + 2 * noise)
            elif "vision_tower" in name and "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.5 * noise)
            elif name.endswith("embed_tokens.weight"):
                parameter.copy_(0.02 * noise)
            elif "embed" in name:
                parameter.copy_(0.5 * noise)
            else:
                fan_in = parameter.shape[0] if name.endswith("mm_input_projection_weight") else parameter[0].numel()
                parameter.copy_(1.5 * noise / fan_in**0.5)
    return model.eval()
