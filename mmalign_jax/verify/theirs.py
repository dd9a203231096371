"""transformers' side: the same directory in torch, float32, on the CPU. The only module of the package that imports torch.

Nothing here knows a family: the model comes from transformers' registry, its modules are found by the names of their parameters, and
answers are appended by `generate`, which knows each model's positions, masks and token types.
"""

import dataclasses
import functools
import io
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
import PIL.Image
import torch
import transformers

from mmalign_jax.errors import UserError
from mmalign_jax.hf.family import Family
from mmalign_jax.hf.names import NameTable
from mmalign_jax.hf.pictures import load_image_processor
from mmalign_jax.models.config import MllmConfig
from mmalign_jax.types import PreferenceRecord
from mmalign_jax.verify.probe import NEW_TOKENS, Row

Scale = tuple[Sequence[float], Sequence[float]]


class Refused(Exception):
    """transformers' processor does not take this record."""


class _NoVideo:
    """Stands where a processor wants its video processor, which needs torchvision. No probe shows a video."""

    num_frames = fps = 1
    model_input_names = ()


@dataclasses.dataclass(frozen=True)
class Stages:
    """What passes through the decoder for a prompt of n tokens, and what the projector got.

    Args:
      features: of the tower, `[rows, Z]`; None where the projector is no module of its own.
      inputs: of each layer, and of the final norm, `[n, D]`: what a model adds between two layers is in them.
      normed: behind the final norm.
    """

    features: np.ndarray | None
    inputs: tuple[np.ndarray, ...]
    normed: np.ndarray


@dataclasses.dataclass(frozen=True)
class Theirs:
    """A directory as transformers reads it.

    Args:
      odd_names: tensors that transformers misses or does not expect in the directory, those aside that no number depends on.
    """

    model: Any
    processor: Any
    table: NameTable
    odd_names: tuple[str, ...]

    @classmethod
    def load(cls, directory: pathlib.Path, family: Family, config: MllmConfig) -> "Theirs":
        """Raises UserError when transformers cannot load the model or the parts of its processor."""
        try:
            model, info = transformers.AutoModelForImageTextToText.from_pretrained(
                directory, dtype=torch.float32, attn_implementation="eager",  # the other implementations know no soft caps
                output_loading_info=True, use_safetensors=True, trust_remote_code=False, local_files_only=True,
            )  # fmt: skip
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{directory}: transformers cannot load the model ({error})") from error
        # a checkpoint's own settings (sampling, penalties) would make "greedy" something else than the largest logit
        model.generation_config = transformers.GenerationConfig(pad_token_id=0)
        table = family.names(config)
        odd = [str(name) for names in info.values() for name in names]
        odd = [name for name in odd if not table.unused(table.reduce(name) or "")]
        return cls(model.eval(), _processor(directory, family, config), table, tuple(odd))

    def inputs(self, record: PreferenceRecord) -> dict[str, torch.Tensor]:
        """What transformers' processor makes of a record's prompt.

        Raises:
          Refused: the model takes no such prompt.
        """
        (turn,) = record.turns
        shown = [PIL.Image.open(io.BytesIO(medium.data)) for medium in record.media]
        words = [part.text for part in turn.parts if part.text is not None]
        try:
            if getattr(self.processor, "chat_template", None):
                content = [{"type": "image", "image": picture} for picture in shown] + [{"type": "text", "text": text} for text in words]
                given = self.processor.apply_chat_template(
                    [{"role": turn.role, "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
                    return_tensors="np",
                )  # fmt: skip
            else:  # models without a template take the pictures in front of the words
                text = self.processor.image_token * len(shown) + "".join(words)
                given = self.processor(images=[shown] if shown else None, text=[text], return_tensors="np")
        except (ValueError, jinja2.TemplateError) as error:
            raise Refused(" ".join(str(error).split())) from error
        return {name: torch.from_numpy(np.asarray(value)) for name, value in given.items()}

    @torch.no_grad()
    def row(self, inputs: Mapping[str, torch.Tensor], answer: Sequence[int], stops: Sequence[int], banned: Sequence[int], scale: Scale) -> Row:
        """Everything about one prompt.

        Args:
          answer: ids of the fixed answer.
          stops, banned: as in `DecodeOptions`.
          scale: mean and deviation by which pixels are made grey levels again: ours, so that other ones of transformers show.
        """
        ids = inputs["input_ids"]
        start, choices = ids.shape[1], {"do_sample": False, "return_dict_in_generate": True}
        before = self.model(**inputs).logits[0].numpy()

        def forced(_: int, so_far: torch.Tensor) -> list[int]:
            return [int(answer[len(so_far) - start])]

        spelt = self.model.generate(
            **inputs, **choices, max_new_tokens=len(answer), prefix_allowed_tokens_fn=forced, output_logits=True
        )
        behind = torch.cat(spelt.logits)
        logps = torch.log_softmax(behind, -1).gather(1, torch.tensor(list(answer))[:, None])[:, 0].numpy()
        greedy = self.model.generate(
            **inputs, **choices, max_new_tokens=NEW_TOKENS, eos_token_id=list(stops), suppress_tokens=list(banned) or None, output_scores=True
        )
        best = torch.cat(greedy.scores).topk(2).values
        return Row(
            ids=ids[0].numpy().astype(np.int32),
            levels=_levels(inputs.get("pixel_values"), scale, self.model.config.vision_config),
            logits=np.concatenate([before, behind[1:].numpy()]),
            logps=logps,
            greedy=tuple(greedy.sequences[0, start:].tolist()),
            gaps=tuple((best[:, 0] - best[:, 1]).tolist()),
        )

    def tensors(self) -> Iterator[tuple[str, str, np.ndarray]]:
        """(reduced name, transformers' name, values) of every parameter; the reduced name is "" for one that we have no place for."""
        for name, parameter in self.model.named_parameters():
            yield self.table.reduce(name) or "", name, parameter.detach().numpy()

    @torch.no_grad()
    def stages(self, inputs: Mapping[str, torch.Tensor]) -> Stages:
        """Runs the prompt once more and listens at the modules on the way."""
        heard: dict[str, torch.Tensor] = {}

        def on_input(name: str, module: Any, given: tuple, named: dict) -> None:
            heard.setdefault(name, given[0] if given else next(iter(named.values())))

        def on_output(name: str, module: Any, given: tuple, made: torch.Tensor) -> None:
            heard[name] = made

        modules, norm = dict(self.model.named_modules()), self._path("decoder.norm.weight", "weight")
        stack = [*self._layers(), norm]
        wanted = dict(zip(stack, stack, strict=True)) | dict.fromkeys(self._projectors(), "features")
        listeners = [modules[norm].register_forward_hook(functools.partial(on_output, "normed"))]
        for path, name in wanted.items():
            listeners.append(modules[path].register_forward_pre_hook(functools.partial(on_input, name), with_kwargs=True))
        self.model(**inputs)
        for listener in listeners:
            listener.remove()
        features = heard.get("features")
        return Stages(
            None if features is None else features.reshape(-1, features.shape[-1]).numpy(),
            tuple(heard[path][0].numpy() for path in stack), heard["normed"][0].numpy(),
        )  # fmt: skip

    def _path(self, reduced: str, rest: str) -> str:
        """The module whose parameter `rest` has this reduced name."""
        found = next(name for name, _ in self.model.named_parameters() if self.table.reduce(name) == reduced)
        return found.removesuffix("." + rest)

    def _layers(self) -> list[str]:
        paths: dict[int, str] = {}
        for name, _ in self.model.named_parameters():
            reduced = self.table.reduce(name) or ""
            if reduced.startswith("decoder.layers."):
                number, rest = reduced.removeprefix("decoder.layers.").split(".", 1)
                paths[int(number)] = name.removesuffix("." + rest)
        return [paths[number] for number in sorted(paths)]

    def _projectors(self) -> list[str]:
        """The largest modules that hold parameters of the projector and of nothing else."""
        part = {name: (self.table.reduce(name) or "").split(".")[0] for name, _ in self.model.named_parameters()}
        found: list[str] = []
        for path, _ in self.model.named_modules():
            held = {kind for name, kind in part.items() if name.startswith(path + ".")}
            if held == {"projector"} and not any(path.startswith(outer + ".") for outer in found):
                found.append(path)
        return found


def _processor(directory: pathlib.Path, family: Family, config: MllmConfig) -> Any:
    """transformers' processor, built from its parts: the whole, asked for by name, wants torchvision for some models' videos.

    Image processing is on PIL, as here: the two back ends of transformers differ by a grey level in places.
    """
    own = getattr(transformers, family.processor_class)
    # transformers checks the types of the parts, and writes every processor that it makes to its log
    kind = type(own.__name__, (own,), {"check_argument_for_proper_class": lambda *_: None, "__repr__": lambda _: own.__name__})
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        values, _ = own.get_processor_dict(directory, local_files_only=True)
        token = tokenizer.convert_ids_to_tokens(config.image_token_id)
        parts = {"tokenizer": tokenizer, "image_processor": load_image_processor(directory), "video_processor": _NoVideo()}
        values = {"chat_template": tokenizer.chat_template, **family.processor_values(config, token)} | values
        return kind.from_args_and_dict([parts[name] for name in own.get_attributes()], values)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"{directory}: transformers' {family.processor_class} cannot be built ({error}); nothing can be compared") from error


def _levels(pixels: torch.Tensor | None, scale: Scale, vision: Any) -> np.ndarray:
    """Grey levels of what the tower gets, without tiles that only fill up the batch, which are exactly zero."""
    if pixels is None:
        return np.zeros((0, 1, 1, 3), np.float32)
    mean, std = (np.array(value, np.float32) for value in scale)
    if pixels.ndim == 2:  # patches: colour, frames, rows, columns
        side = vision.patch_size
        channels_last = pixels.numpy().reshape(-1, 3, vision.temporal_patch_size, side, side).transpose(0, 2, 3, 4, 1)
    else:
        tiles = pixels.numpy().reshape(-1, *pixels.shape[-3:])
        channels_last = tiles[np.any(tiles, axis=(1, 2, 3))].transpose(0, 2, 3, 1)
    return (channels_last * std + mean) * 255
