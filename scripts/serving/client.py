"""A client of a Cog server of clipgen: inputs in, pictures with their seeds and scores out.

The standard library alone, for whoever has neither torch nor Cog.
"""

from __future__ import annotations

import base64
import json
import mimetypes
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVERY = 0.1  # seconds between two looks at the health
BUSY = 409  # HTTP status of a server that draws for someone else
READY_WITHIN = 600  # seconds


@dataclass(frozen=True)
class Picture:
    """A file as the server wrote it, the seed and the score (CLIP's cosine) of its image."""

    content: bytes
    suffix: str  # .webp
    seed: int
    score: float


@dataclass(frozen=True)
class Answer:
    pictures: list[Picture]  # best first
    warnings: list[str]


class Client:
    """Of the server at `url`, such as http://127.0.0.1:5000."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def health(self) -> dict[str, Any]:
        """The health check; its status is STARTING, too, while nobody listens."""
        try:
            return self._request("/health-check")[1]
        except (OSError, ValueError):
            return {"status": "STARTING"}

    def wait(self, alive: Callable[[], bool] = lambda: True, seconds: float = READY_WITHIN) -> None:
        """Until the server is free.  RuntimeError, one sentence: it will not be."""
        until = time.monotonic() + seconds
        while (health := self.health())["status"] != "READY":
            if health["status"] in ("SETUP_FAILED", "DEFUNCT"):
                logs = (health.get("setup") or {}).get("logs", "").strip()
                last = (logs or "its log says why").splitlines()[-1]
                raise RuntimeError(f"the model cannot be loaded: {last}")
            if not alive():
                raise RuntimeError("the server has ended; its log says why")
            if time.monotonic() > until:
                raise RuntimeError(f"the server is {health['status']} after {seconds:.0f} seconds")
            time.sleep(EVERY)

    def predict(self, **inputs: Any) -> Answer:
        """The pictures of those inputs (see predict.py); paths are sent as files, None left out.

        Waits while the server is busy.  RuntimeError: the server's sentence, or why it gave none.
        """
        body = {"input": {name: data_url(value) if isinstance(value, Path) else value
                          for name, value in inputs.items() if value is not None}}
        while True:
            self.wait()
            try:
                status, answer = self._request("/predictions", body)
            except (OSError, ValueError) as error:
                raise RuntimeError(f"the server at {self.url} gave no answer: {error}") from None
            if status != BUSY:
                break
            time.sleep(EVERY)
        if status != 200 or answer["status"] != "succeeded":
            raise RuntimeError(reason(answer))
        metrics = answer["metrics"]
        pictures = [Picture(*content(url), seed, score) for url, seed, score in
                    zip(answer["output"], metrics["seeds"], metrics["scores"], strict=True)]
        lines = answer["logs"].splitlines()
        return Answer(pictures, [line.removeprefix("Warning: ") for line in lines
                                 if line.startswith("Warning: ")])

    def _request(self, path: str, body: Any = None) -> tuple[int, Any]:
        """HTTP status and what the JSON says; with a body it is a POST, which may take long."""
        request = urllib.request.Request(
            self.url + path, None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=10 if body is None else None) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)


def reason(answer: dict[str, Any]) -> str:
    """Why there is no picture: the error of predict.py, or what Cog's schema does not allow."""
    if error := answer.get("error"):  # Cog says it twice
        return re.sub("^(Prediction failed: )*(ValueError: |RuntimeError: )?", "", error)
    detail = answer.get("detail", answer)
    if not isinstance(detail, list):
        return json.dumps(detail)
    return "; ".join(f"{each['loc'][-1]}: {each['msg']}" for each in detail)


def data_url(path: Path) -> str:
    """A file as a URL that holds it."""
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def content(url: str) -> tuple[bytes, str]:
    """What a data URL holds, and the suffix of such a file."""
    head, _, text = url.partition(",")
    kind = head.removeprefix("data:").partition(";")[0]
    return base64.b64decode(text), f".{kind.rpartition('/')[2].replace('jpeg', 'jpg')}"
