"""One question to a chat model behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, a hosted model, any server the user runs."""

import base64
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import requests
import urllib3

from mmalign_jax.errors import UserError
from mmalign_jax.types import Media

_CONNECT_S = 10.0
_MOST_BYTES = 1 << 20  # of a reply; what is longer is no verdict
_CHUNK = 1 << 14
_AGAIN = (408, 409, 425, 429)  # and all of 500 and above: the server may think better of it
_TYPES = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}


class NoReplyError(Exception):
    """A question that got no reply, for a reason that may pass. `reason` is a few words that can be counted, `wait_s` the server's wish."""

    def __init__(self, reason: str, wait_s: float | None = None):
        super().__init__(reason)
        self.reason, self.wait_s = reason, wait_s


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where a model is asked, and how.

    Args:
      url: up to the version, such as http://127.0.0.1:8000/v1.
      model: its name there.
      key: sent as bearer token; "" for none.
      timeout_s: for a whole reply, however slowly it drips.
      max_tokens, temperature: of the reply.
    """

    url: str
    model: str
    key: str = dataclasses.field(default="", repr=False)
    timeout_s: float = 120.0
    max_tokens: int = 1024
    temperature: float = 0.0

    def body(self, text: str, pictures: Sequence[Media] = ()) -> dict[str, Any]:
        """The request that asks `text` about the pictures, which stand before it. All that a reply depends on is in it."""
        content = [{"type": "image_url", "image_url": {"url": _data_url(data)}} for medium in pictures for data in medium.pictures]
        message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        return {"model": self.model, "messages": [message], "max_tokens": self.max_tokens, "temperature": self.temperature}

    def ask(self, session: requests.Session, body: Mapping[str, Any]) -> str:
        """The text of the reply.

        Raises:
          NoReplyError: time-out, broken connection, an error of the server, or a reply in another form.
          UserError: the server refuses the request for good: key, model name, address.
        """
        end = time.monotonic() + self.timeout_s
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        options = {"timeout": (min(_CONNECT_S, self.timeout_s), self.timeout_s), "stream": True, "allow_redirects": False}
        try:
            with session.post(f"{self.url.rstrip('/')}/chat/completions", json=body, headers=headers, **options) as response:
                content = b""
                # read1 gives what is there; requests' own iteration waits for a whole chunk, and a reply may drip
                while chunk := response.raw.read1(_CHUNK):
                    content += chunk
                    if time.monotonic() > end:
                        raise NoReplyError("time-out")
                    if len(content) > _MOST_BYTES:
                        raise NoReplyError("reply too long")
                status, wait = response.status_code, response.headers.get("Retry-After", "")
        except (requests.Timeout, urllib3.exceptions.TimeoutError) as error:
            raise NoReplyError("time-out") from error
        except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, requests.exceptions.MissingSchema) as error:
            raise UserError(f"{self.url}: no address of a server ({error})") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise NoReplyError("connection broken") from error
        if status in _AGAIN or status >= 500:
            raise NoReplyError(f"status {status}", float(wait) if wait.isdecimal() else None)
        if status != 200:
            raise UserError(f"{self.url}: the server refuses with status {status}: {content[:300].decode(errors='replace')}")
        return _text_of(content)


def _text_of(content: bytes) -> str:
    try:
        text = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise NoReplyError("reply in another form") from error
    if not isinstance(text, str):
        raise NoReplyError("reply in another form")
    return text


def _data_url(data: bytes) -> str:
    kind = next((kind for magic, kind in _TYPES.items() if data.startswith(magic)), None)
    if kind is None:
        raise UserError("a picture is in a format that judges are not sent: JPEG, PNG, GIF, WEBP and BMP are")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
