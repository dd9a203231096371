"""BDHS as one writes it with `generate` of transformers: one call a sentence and attempt, everything else as it comes.

    python -m mmalign_jax.benchmark.bdhs_transformers DIRECTORY

serves it (see `items`). Model and processor are transformers' own, in float32, without gradients, with the attention that transformers
chooses (SDPA) and its key-value cache; the picture is prepared once a record, and shown to every call. Hidden image tokens are zeros of the
attention mask, and `position_ids` keep every token where it is. Sentences, splits and similarity follow the rules of `pairs`, the draws are
of torch and numpy. This module and the one for verifying are the only ones that import torch.
"""

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import transformers
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mmalign_jax.benchmark.child import peak_bytes
from mmalign_jax.benchmark.items import serve_items
from mmalign_jax.benchmark.workload import Item, Options, Result, Workload, result
from mmalign_jax.pairs.ngrams import ngram_cosine
from mmalign_jax.pairs.sentences import split_sentences, swap_yes_no

_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*\s*$")


class Straightforward:
    """The sampler."""

    def __init__(self, model: str, options: Options):
        self._options = options
        self._model = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32, local_files_only=True).eval()
        # a checkpoint's own settings (penalties, top-k) are none of BDHS
        self._model.generation_config = transformers.GenerationConfig()
        self._processor = AutoProcessor.from_pretrained(model, local_files_only=True, backend="pil")
        self._tokenizer = tokenizer = self._processor.tokenizer
        self._image_token = self._model.config.image_token_id
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
        ends = [number for number, text in enumerate(_texts(tokenizer)) if _SENTENCE_END.search(text) and number not in special]
        eos, without_token = tokenizer.eos_token_id, set(range(self._model.config.text_config.vocab_size)) - set(tokenizer.get_vocab().values())
        common = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
        if options.temperature == 0:
            common = {"do_sample": False}
        common |= {"suppress_tokens": sorted((special | without_token | {self._image_token}) - {eos}), "pad_token_id": eos, "use_cache": True}
        self._of_sentence = common | {"eos_token_id": [eos, *ends], "max_new_tokens": options.max_sentence_tokens}
        self._of_answer = common | {"eos_token_id": [eos], "max_new_tokens": options.max_answer_tokens}
        self._random = np.random.default_rng(options.seed)
        torch.manual_seed(options.seed)

    @torch.no_grad()
    def __call__(self, item: Item) -> Result:
        options, reference = self._options, item.answer
        content = [{"type": "image"}, {"type": "text", "text": item.prompt}]
        prompt = self._processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        with PIL.Image.open(item.picture) as picture:
            shown = self._processor(images=picture.convert("RGB"), text=prompt, return_tensors="pt")
        prompt = _Prompt(self._expand(prompt, shown["input_ids"][0]), shown["input_ids"][0], shown["pixel_values"])
        sentences = [reference[start:end] for start, end in split_sentences(reference)]
        for iteration in range(1, options.n_iter + 1):
            mask = self._mask(prompt.ids)
            if iteration == options.n_iter > 1:
                rejected = self._generate(prompt, mask, "", self._of_answer).strip()
            else:
                written = [self._complete(prompt, mask, "".join(sentences[:k]), sentence) for k, sentence in enumerate(sentences)]
                rejected = "".join(written).strip()
            similarity = ngram_cosine(rejected, reference)
            if similarity < options.eps:
                break
        return result(item, rejected, iteration, similarity, options.eps)

    def _expand(self, prompt: str, ids: torch.Tensor) -> str:
        """The prompt with as many image tokens as the processor has made of its placeholder."""
        token = self._tokenizer.convert_ids_to_tokens(self._image_token)
        return prompt.replace(token, token * int((ids == self._image_token).sum()))

    def _mask(self, ids: torch.Tensor) -> torch.Tensor:
        """1 where a token of the prompt may be seen: each image token with probability 1 - rho_th, and all text."""
        hidden = (ids == self._image_token) & torch.from_numpy(self._random.random(len(ids)) < self._options.rho_th)
        return (~hidden).long()

    def _complete(self, prompt: "_Prompt", mask: torch.Tensor, before: str, sentence: str) -> str:
        """The sentence up to a random word, and what the model writes behind it."""
        behind = 0
        if (swap := swap_yes_no(sentence)) is not None and self._random.random() < self._options.yes_no_swap:
            sentence, behind = swap
        starts = [word.start() for word in re.finditer(r"\S+", sentence) if word.start() >= behind]
        if not starts:
            return sentence
        kept = sentence[: int(self._random.choice(starts))].rstrip()
        return kept + self._generate(prompt, mask, (before + kept).strip(), self._of_sentence)

    def _generate(self, prompt: "_Prompt", mask: torch.Tensor, context: str, how: dict) -> str:
        """What the model writes behind prompt and context, the space in front of it included."""
        ids = prompt.ids[None]
        if context:
            ids = self._tokenizer(f"{prompt.text} {context}", return_tensors="pt")["input_ids"]
        start, length = len(prompt.ids), ids.shape[1]
        seen = torch.cat([mask, mask.new_ones(length - start)])[None]
        positions = torch.arange(length)[None]
        out = self._model.generate(input_ids=ids, pixel_values=prompt.pixels, attention_mask=seen, position_ids=positions, **how)
        answer, known = (self._tokenizer.decode(some, skip_special_tokens=True) for some in (out[0, start:], out[0, start:length]))
        return answer[len(known) :]


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """A prompt as text with all its image tokens, as ids, and its picture."""

    text: str
    ids: torch.Tensor
    pixels: torch.Tensor


def _texts(tokenizer: transformers.PreTrainedTokenizerBase) -> list[str]:
    return [tokenizer.decode([number]) for number in range(len(tokenizer))]


def main() -> None:
    imported = peak_bytes()
    transformers.utils.logging.disable_progress_bar()
    workload = Workload.read(Path(sys.argv[1]))
    sampler = Straightforward(workload.model, workload.options)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "torch threads": str(torch.get_num_threads())}
    serve_items(workload, imported, versions, lambda asked: [sampler(one.item) for one in asked])


if __name__ == "__main__":
    main()
