"""What `config.judge` says, as the parts that ask."""

import os
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmalign_jax.config import Config, JudgeConfig
from mmalign_jax.errors import UserError
from mmalign_jax.hf.pretrained import Pretrained
from mmalign_jax.pairs.judge.asker import Asker, Asking, Asks
from mmalign_jax.pairs.judge.endpoint import Endpoint
from mmalign_jax.pairs.judge.local import LocalAsker
from mmalign_jax.pairs.judge.replies import Replies
from mmalign_jax.types import PreferenceRecord

POLICY = "policy"  # as config.judge.directory


def check_asked(config: JudgeConfig, who: str) -> None:
    """Raises UserError where nobody is named who is asked, or the key is not set."""
    if config.directory:
        if config.url:
            raise UserError("config.judge.directory: that model is asked in the place of an endpoint; leave it or config.judge.url empty")
        return
    for name in ("url", "model"):
        if not getattr(config, name):
            raise UserError(f"config.judge.{name}: {who} asks a chat model; give an endpoint's url and the name there, or config.judge.directory")
    if urllib.parse.urlsplit(config.url).username is not None:
        raise UserError("config.judge.url: it holds a user's name or password, and settings are written down; name config.judge.key_variable")
    if config.key_variable and not os.environ.get(config.key_variable):
        raise UserError(f"config.judge.key_variable: the environment has no {config.key_variable}")


def asks_of(config: Config, policy: Pretrained, read: Callable[[str], Any], replies: Path) -> Asks:
    """Who is asked: a chat model behind an endpoint, with its key from the environment, or a model of ours.

    Args:
      policy: who is asked where `config.judge.directory` says so.
      read: what a reply says; None where it does not say what it was asked for.
      replies: file of an endpoint's replies, unless `config.judge.replies` names one.

    Raises:
      UserError: the directory holds no model.
    """
    judge = config.judge
    if judge.directory:
        model = policy if judge.directory == POLICY else Pretrained.read(Path(judge.directory), policy.mesh, config.model.compute_dtype)
        return LocalAsker(model, read, judge, config.data)
    key = os.environ[judge.key_variable] if judge.key_variable else ""
    options = {"timeout_s": judge.timeout_s, "max_tokens": judge.max_tokens, "temperature": judge.temperature}
    kept = Replies(Path(judge.replies) if judge.replies else replies)
    return Asker(Endpoint(judge.url, judge.model, key, **options), kept, read, Asking(attempts=judge.attempts, workers=judge.workers, insists=True))


def question_of(record: PreferenceRecord) -> str:
    """The texts of a record's turns; who speaks stands before each where there are several."""
    texts = ["\n".join(part.text for part in turn.parts if part.text is not None).strip() for turn in record.turns]
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"{turn.role.capitalize()}: {text}" for turn, text in zip(record.turns, texts, strict=True))
