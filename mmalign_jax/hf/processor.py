"""A checkpoint's processor: turns and answers to token ids, as transformers' processors do, without torch. Pixels: `hf.pictures`.

Nothing is truncated or replaced: a word without a token, or a special token written in a user's text, is an error.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Collection, Sequence
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Bool, Int32

from mmalign_jax.errors import DataError, UserError
from mmalign_jax.hf import families
from mmalign_jax.hf.files import read_json
from mmalign_jax.hf.pictures import Expansion, Pictures, RowTraits
from mmalign_jax.models.config import MllmConfig
from mmalign_jax.types import Turn

_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*\s*$")


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """An answer's tokens as they follow the generation prompt; the last one ends the turn.

    Args:
      ids: token ids.
      scored: whether a token is scored; tokens of the prefix are not.
      spans: first and one-past-last character of each token in the answer's text; the end token has an empty span at the end.
      word_start: whether a token starts a word of the text.
    """

    ids: Int32[np.ndarray, " R"]
    scored: Bool[np.ndarray, " R"]
    spans: Int32[np.ndarray, "R 2"]
    word_start: Bool[np.ndarray, " R"]


@dataclasses.dataclass(frozen=True, eq=False)
class Processor:
    """Made by `load_processor`.

    Args:
      pictures: the family's pictures: pixels, and what stands in the prompt for each.
      image_token_ids: tokens on which image features land.
      mean, std: float32 triples; the tower sees `(pixels / 255 - mean) / std`.
      eos_ids: tokens that end an answer. The one that the chat template writes, or else the first, is written after answers.
      banned_ids: tokens that must never be generated: special tokens but those of `eos_ids`, and ids without a token.
      sentence_end_ids: tokens whose text ends with a full stop, an exclamation or a question mark, closing quotes aside.
      pad_id: fills slots that are masked; the tokenizer's padding token, or else the first of `eos_ids`.
      traits: what a row's arrays depend on beside the tokens.
    """

    pictures: Pictures
    image_token_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]
    banned_ids: tuple[int, ...]
    sentence_end_ids: tuple[int, ...]
    pad_id: int
    traits: RowTraits
    _tokenizer: Any = dataclasses.field(repr=False)
    _chat_template: str | None = dataclasses.field(repr=False, default=None)

    @property
    def mean(self) -> tuple[float, float, float]:
        return self.pictures.mean

    @property
    def std(self) -> tuple[float, float, float]:
        return self.pictures.std

    @property
    def chat_template(self) -> str:
        """What turns become a prompt by: the checkpoint's own template, or the family's."""
        return self._chat_template or self._tokenizer.chat_template

    def render(self, turns: Sequence[Turn], videos: Collection[int] = ()) -> str:
        """The prompt as text, with one placeholder a picture or video and ending where the answer begins.

        Args:
          videos: which of the media, in the order of their placeholders, are videos.

        Raises:
          UserError: a text holds a special token, or the chat template refuses the turns or leaves some of them out.
        """
        messages, placed = [], 0
        for turn in turns:
            parts = []
            for part in turn.parts:
                if part.text is None:
                    parts.append({"type": "video" if placed in videos else "image"})
                    placed += 1
                else:
                    parts.append({"type": "text", "text": self._plain(part.text)})
            messages.append({"role": turn.role, "content": parts})
        text = self._template(messages, True)
        written, kinds = self._placeholders.findall(text), (self.pictures.placeholder, self.pictures.video_placeholder)
        if len(written) != placed:
            raise UserError(f"the chat template wrote {len(written)} image placeholders for {placed} images")
        if written != [kinds[number in videos] for number in range(placed)]:
            raise UserError("the chat template moves pictures before videos, or videos before pictures; give them in its order")
        at = 0
        for turn in turns:
            for part in turn.parts:
                if part.text is not None:
                    found = text.find(part.text.strip(), at)
                    if found < 0:
                        raise UserError(f"the chat template leaves out or changes this text of a {turn.role} turn: {_short(part.text)}")
                    at = found + len(part.text.strip())
        return text

    def prompt_ids(self, turns: Sequence[Turn], expansions: Sequence[Expansion]) -> Int32[np.ndarray, " P"]:
        """Token ids of the rendered prompt: one beginning-of-sequence token where the tokenizer writes one, every picture expanded.

        Args:
          expansions: of the media, in the order of their placeholders.

        Raises:
          UserError: see `render`; or the tokenizer has no token for a word.
        """
        text = self.render(turns, [number for number, medium in enumerate(expansions) if medium.video])
        left = iter(expansions)
        ids = self._encode_runs(self._placeholders.sub(lambda _: next(left).text, text))
        if self._writes_bos and self._tokenizer.bos_token not in text:
            ids = np.concatenate([[self._tokenizer.bos_token_id], ids])
        return ids.astype(np.int32)

    def answer(self, text: str, prefix: str = "") -> Answer:
        """Tokenises an answer as it stands after the generation prompt and ends it.

        Args:
          text: the whole answer. It begins with `prefix`.
          prefix: the part that is conditioned on and not scored. A token that reaches over its end is scored.

        Raises:
          UserError: the answer is empty, does not begin with the prefix, holds a special token or a word without a token, or its
            first characters would merge with the prompt.
        """
        if not text.strip():
            raise UserError("an answer is empty")
        if not text.startswith(prefix):
            raise UserError(f"the answer {_short(text)} does not begin with its prefix {_short(prefix)}")
        context, lead, trimmed, end = self._frame(self._plain(text))
        shift = len(text) - len(text.lstrip()) if trimmed else 0
        body = text.strip() if trimmed else text
        before = self._encode(context)[0]
        ids, spans = self._encode(context + lead + body)
        if not np.array_equal(ids[: len(before)], before):
            raise UserError(f"the answer {_short(text)} merges with the prompt before it into other tokens")
        ids, spans = ids[len(before) :], np.maximum(spans[len(before) :] - len(context + lead), 0) + shift
        word_start = np.array([_starts_word(text, *span) for span in spans.tolist()], bool)
        return Answer(
            ids=np.append(ids, end).astype(np.int32),
            # without a prefix everything is scored, a token that is only the template's space too
            scored=np.append(spans[:, 1] > len(prefix) if prefix else np.ones(len(ids), bool), True),
            spans=np.append(spans, [[len(text)] * 2], axis=0).astype(np.int32),
            word_start=np.append(word_start, False),
        )

    def readable(self, text: str) -> bool:
        """Whether the text can be an answer: what a model writes may be empty, or hold special tokens."""
        try:
            self.answer(text)
        except UserError:
            return False
        return True

    def answer_ids(self, text: str, prefix: str = "") -> tuple[Int32[np.ndarray, " R"], Bool[np.ndarray, " R"]]:
        """Ids and scored mask of `answer`."""
        answer = self.answer(text, prefix)
        return answer.ids, answer.scored

    def decode(self, ids: Sequence[int] | Int32[np.ndarray, " R"]) -> str:
        """The text of an answer's tokens, without special tokens and surrounding space."""
        return self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    def token_texts(self) -> list[str]:
        """What each token of the vocabulary adds to a text behind a full stop, "" for special tokens and numbers without one."""
        stop = self._encode(".")[0][-1:].tolist()
        rows = [[*stop, token] for token in range(len(self._tokenizer))]
        texts = self._tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.lstrip()[1:] for text in texts]

    def check_plain(self, text: str) -> None:
        """Raises UserError for a text that holds a special token."""
        self._plain(text)

    def _template(self, messages: list[dict], add_generation_prompt: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages, chat_template=self._chat_template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template refuses these turns: {error}") from error

    def _plain(self, text: str) -> str:
        for token in self._specials:
            if token in text:
                raise UserError(f"the text {_short(text)} holds the special token {token}; remove it; images are parts of a turn")
        return text

    def _encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids and character spans, without the tokens that a tokenizer adds around a text."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = np.array(encoded["input_ids"], np.int64), np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        unknown = self._tokenizer.unk_token_id
        if unknown is not None and (ids == unknown).any():
            words = dict.fromkeys(_word_at(text, *span) for span in spans[ids == unknown].tolist())
            raise UserError(f"the tokenizer has no token for {', '.join(map(repr, list(words)[:8]))}")
        return ids, spans

    def _encode_runs(self, text: str) -> np.ndarray:
        """The ids of `_encode`, where thousands of image tokens stand side by side.

        Tokenizers cut a text at its added tokens, from left to right, before they look at what is between. So one token for a run of
        the same (`_repeatable`) gives the same ids, repeated: in 0.1 ms instead of 7 ms for 2,880 tokens.
        """
        runs: list[int] = []

        def shorten(run: re.Match) -> str:
            runs.append(len(run[0]) // len(run[1]))
            return run[1]

        ids = self._encode(self._run.sub(shorten, text))[0]
        (at,) = np.nonzero(np.isin(ids, list(self._repeatable)))
        if len(at) != len(runs):
            # an added token that ends within an image token took its characters; of a longer run it would leave the rest
            return self._encode(text)[0]
        counts = np.ones(len(ids), np.int64)
        counts[at] = runs
        return np.repeat(ids, counts)

    def _frame(self, answer: str) -> tuple[str, str, bool, int]:
        """What the template writes around an answer: a prompt, and the space between the two; whether it trims the answer; the end token."""
        user = {"role": "user", "content": [{"type": "text", "text": "?"}]}
        prompt = self._template([user], True)
        whole = self._template([user, {"role": "assistant", "content": [{"type": "text", "text": answer}]}], False)
        after = whole.removeprefix(prompt)
        at, trimmed = after.find(answer), False
        if at < 0:
            at, trimmed = after.find(answer.strip()), True
        if len(after) == len(whole) or at < 0 or after[:at].strip():
            raise UserError("the chat template writes an answer differently after its own generation prompt; answers cannot be placed")
        rest = after[at + len(answer.strip() if trimmed else answer) :].strip()
        ends = {self._tokenizer.convert_ids_to_tokens(end): end for end in self.eos_ids}
        if rest and rest not in ends:
            raise UserError(f"the chat template ends an answer with {rest!r}, which is none of the end tokens {list(ends)}")
        return prompt, after[:at], trimmed, ends.get(rest, self.eos_ids[0])

    @functools.cached_property
    def _placeholders(self) -> re.Pattern:
        known = filter(None, (self.pictures.placeholder, self.pictures.video_placeholder))
        return re.compile("|".join(map(re.escape, known)))

    @functools.cached_property
    def _repeatable(self) -> dict[int, str]:
        """Image tokens that are cut out wherever they stand: with no regard to what is beside them, and no longer token begins so."""
        added = self._tokenizer.added_tokens_decoder

        def longer(token: str) -> bool:
            return any(other.content.startswith(token) and other.content != token for other in added.values())

        tokens = {number: added[number] for number in self.image_token_ids}
        alone = {number for number, token in tokens.items() if not (token.normalized or token.single_word or longer(token.content))}
        return {number: tokens[number].content for number in alone}

    @functools.cached_property
    def _run(self) -> re.Pattern:
        tokens = "|".join(map(re.escape, self._repeatable.values()))
        return re.compile(rf"({tokens})\1*" if tokens else "(?!)")

    @functools.cached_property
    def _specials(self) -> tuple[str, ...]:
        special = (str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special)
        images = self._tokenizer.convert_ids_to_tokens(list(self.image_token_ids))
        return tuple(dict.fromkeys([self.pictures.placeholder, *images, *special]))

    @functools.cached_property
    def _writes_bos(self) -> bool:
        bos = self._tokenizer.bos_token_id
        return bos is not None and self._tokenizer("a")["input_ids"][:1] == [bos]


def load_processor(directory: str | pathlib.Path, config: MllmConfig) -> Processor:
    """Reads tokenizer, chat template and image processor. Nothing in the directory is executed, nothing is fetched.

    Raises:
      UserError: a file is missing or does not fit the model's config.
    """
    directory, family = pathlib.Path(directory), families.of(config)
    tokenizer = _load_tokenizer(directory, family.chat_template)
    image_ids = tuple(token for token in (config.image_token_id, config.video_token_id) if token is not None)
    for token in image_ids:
        if token >= len(tokenizer) or token not in tokenizer.added_tokens_decoder:
            raise UserError(f"{directory}: config.json's image token {token} is not an added token of the tokenizer")
    # an image token is replaced by a feature, so it alone may lie behind the embedding's rows
    if len(set(range(config.decoder.vocab_size, len(tokenizer))) - set(image_ids)):
        raise UserError(f"{directory}: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {config.decoder.vocab_size}")
    eos = _eos_ids(directory, tokenizer)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special} | set(tokenizer.all_special_ids)
    without_token = set(range(config.decoder.vocab_size)) - set(tokenizer.get_vocab().values())
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    ends = [token for token, text in enumerate(texts) if token not in special and _SENTENCE_END.search(text)]
    return Processor(
        pictures=family.pictures(directory, config, tokenizer),
        image_token_ids=image_ids,
        eos_ids=eos,
        banned_ids=tuple(sorted((special | without_token | set(image_ids)) - set(eos))),
        sentence_end_ids=tuple(ends),
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0],
        traits=RowTraits.of(config),
        _tokenizer=tokenizer,
        _chat_template=None if isinstance(tokenizer.chat_template, str) else family.chat_template,
    )


def _load_tokenizer(directory: pathlib.Path, chat_template: str | None) -> Any:
    import transformers  # late: it takes seconds, and a mistake in a config should be told at once

    for name in ("tokenizer_config.json", "tokenizer.json"):
        read_json(directory / name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory}: the tokenizer cannot be loaded ({error})") from error
    legacy = directory / "chat_template.json"  # transformers 4 wrote it, and only its processors read it
    if not (directory / "chat_template.jinja").is_file() and legacy.is_file():
        tokenizer.chat_template = read_json(legacy).get("chat_template")
    if not isinstance(tokenizer.chat_template, str) and chat_template is None:
        raise UserError(f"{directory}: no chat template; expected chat_template.jinja")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{directory / 'tokenizer_config.json'}: the tokenizer has no eos_token")
    return tokenizer


def _eos_ids(directory: pathlib.Path, tokenizer: Any) -> tuple[int, ...]:
    file = directory / "generation_config.json"
    listed = read_json(file).get("eos_token_id") if file.is_file() else None
    listed = [] if listed is None else [listed] if isinstance(listed, int) else listed
    if not all(isinstance(token, int) and 0 <= token < len(tokenizer) for token in listed):
        raise DataError(f"eos_token_id {listed} is not in the tokenizer", file=str(file), mend="Give ids of the tokenizer's tokens")
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *listed]))


def _word_at(text: str, start: int, stop: int) -> str:
    """The part of a text between spaces that a span lies in."""
    while start > 0 and not text[start - 1].isspace():
        start -= 1
    while stop < len(text) and not text[stop].isspace():
        stop += 1
    return text[start:stop].strip()


def _starts_word(text: str, start: int, stop: int) -> bool:
    start += len(text[start:stop]) - len(text[start:stop].lstrip())
    return start < stop and text[start].isalnum() and (start == 0 or not (text[start - 1].isalnum() or text[start - 1] in "'’"))


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
