"""TRL's `DPOTrainer` as a side of the step benchmark (https://huggingface.co/docs/trl).

    python -m mmalign_jax.benchmark.step_trl DIRECTORY

serves it (see `child`). The trainer runs as its users run it, with its own data loader, optimizer and loss; between two requests it waits
behind a step. Dropout does not exist in the models, the tower is frozen, and nothing is truncated.
"""

import os
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

from mmalign_jax.benchmark.child import Requests, peak_bytes
from mmalign_jax.benchmark.pairs import PairWorkload


def rows_of(workload: PairWorkload) -> Dataset:
    message = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    rows = []
    for pair in workload.pairs:
        images = [Image.open(picture).convert("RGB") for picture in pair.pictures]
        answers = {name: message("assistant", getattr(pair, name)) for name in ("chosen", "rejected")}
        rows.append({"images": images, "prompt": message("user", pair.prompt), **answers})
    return Dataset.from_list(rows)


class Steps(TrainerCallback):
    """Answers requests between steps: the time from one step's end to the next one's, data included."""

    def __init__(self, requests: Requests):
        self._requests = requests
        self._seconds: list[float] = []
        self._logged: dict[str, float] = {}
        self._wait()

    def _wait(self) -> None:
        request = self._requests.next()
        if request is None:
            sys.exit()
        self._asked, self._since = request["steps"], time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._logged = self._logged or {name: value for name, value in logs.items() if isinstance(value, float)}

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self._seconds.append(now - self._since)
        self._since = now
        # the loss is logged behind the step
        control.should_log = not self._logged

    def on_step_begin(self, args, state, control, **kwargs):
        # not at the step's end: its logs come behind that
        if len(self._seconds) == self._asked:
            self._answer()
            self._wait()

    def _answer(self) -> None:
        self._requests.answer({
            "seconds": self._seconds, "input_wait": None, "peak_bytes": peak_bytes(), "loss": float(self._logged["loss"]),
            "device_peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "logps_chosen": float(self._logged["logps/chosen"]),
        })  # fmt: skip
        self._seconds, self._logged = [], {"loss": float("nan"), "logps/chosen": float("nan")}


def main() -> None:
    """Trains until no requests are left."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable_progress_bar()
    imported, workload = peak_bytes(), PairWorkload.read(Path(sys.argv[1]))
    on_cpu = not torch.cuda.is_available()
    dtype = torch.float32 if on_cpu else torch.bfloat16
    processor = AutoProcessor.from_pretrained(workload.model, local_files_only=True)
    model = AutoModelForImageTextToText.from_pretrained(workload.model, dtype=dtype, local_files_only=True)
    for name, parameter in model.named_parameters():
        if "vision_tower" in name:
            parameter.requires_grad_(False)
    with tempfile.TemporaryDirectory() as out:
        args = DPOConfig(
            output_dir=out, per_device_train_batch_size=workload.shape.batch, max_steps=1 << 20, beta=workload.beta, max_length=None,
            use_cpu=on_cpu, bf16=not on_cpu, gradient_checkpointing=False, report_to=[], logging_strategy="no", save_strategy="no",
            learning_rate=workload.learning_rate, lr_scheduler_type="constant", optim="adamw_torch", disable_tqdm=True,
        )  # fmt: skip
        trainer = DPOTrainer(model=model, args=args, train_dataset=rows_of(workload), processing_class=processor)
        tokens = next(iter(trainer.get_train_dataloader()))["input_ids"]
        versions = {name: metadata.version(name) for name in ("torch", "transformers", "trl")}
        versions["torch threads"] = str(torch.get_num_threads())
        ready = {"imported_bytes": imported, "versions": versions, "tokens_of_a_row": int(tokens.shape[1]), "slots": int(tokens.numel())}
        ready |= {"device": "cpu" if on_cpu else torch.cuda.get_device_name(), "dtype": str(dtype).removeprefix("torch.")}
        trainer.add_callback(Steps(Requests(ready)))
        trainer.train()


if __name__ == "__main__":
    main()
