"""What `config.judge` says, as the parts that ask."""

import os
from pathlib import Path

from mmalign_jax.config import JudgeConfig
from mmalign_jax.errors import UserError
from mmalign_jax.pairs.judge.asker import Asking
from mmalign_jax.pairs.judge.endpoint import Endpoint
from mmalign_jax.pairs.judge.replies import Replies
from mmalign_jax.types import PreferenceRecord


def check_endpoint(config: JudgeConfig, who: str) -> None:
    """Raises UserError where the endpoint is not named, or its key not set."""
    for name in ("url", "model"):
        if not getattr(config, name):
            raise UserError(f"config.judge.{name}: {who} asks a chat model behind an endpoint; give its url and its name")
    if config.key_variable and not os.environ.get(config.key_variable):
        raise UserError(f"config.judge.key_variable: the environment has no {config.key_variable}")


def endpoint_of(config: JudgeConfig) -> Endpoint:
    """The endpoint, with its key from the environment."""
    key = os.environ[config.key_variable] if config.key_variable else ""
    options = {"timeout_s": config.timeout_s, "max_tokens": config.max_tokens, "temperature": config.temperature}
    return Endpoint(config.url, config.model, key, **options)


def asking_of(config: JudgeConfig) -> Asking:
    return Asking(attempts=config.attempts, workers=config.workers)


def replies_of(config: JudgeConfig, usual: Path) -> Replies:
    """The replies that are kept in the file of the settings, or in `usual`."""
    return Replies(Path(config.replies) if config.replies else usual)


def question_of(record: PreferenceRecord) -> str:
    """The texts of a record's turns; who speaks stands before each where there are several."""
    texts = ["\n".join(part.text for part in turn.parts if part.text is not None).strip() for turn in record.turns]
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"{turn.role.capitalize()}: {text}" for turn, text in zip(record.turns, texts, strict=True))
