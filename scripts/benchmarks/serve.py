"""What serving adds to the model's own time: requests to the real Cog server, one after another.

    python -m scripts.benchmark serve [--weights weights/emoji] [--requests 10]

The model's time is that of `ClipGen.generate`, which predict.py reports as codes per second; all
else between request and response is the server's: checks, encoding the files, HTTP.  Numbers are
medians.

Then predictions of 64 candidates are cancelled, each at another moment of the time they would take:
the seconds from that request until the server is READY for the next, the median and the most.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scripts.serving.schema import ROOT, openapi_schema
from scripts.training.cli import number, positive

TEXT = "a cat on the beach at night"
LONGEST = 600  # seconds that a start or a request may take
MOST = 64  # candidates that a request may have


@contextlib.contextmanager
def serving(weights: Path) -> Iterator[str]:
    """The URL of a READY server of that bundle.  ChildProcessError, its log: it failed."""
    with tempfile.TemporaryDirectory() as name, socket.socket() as listener:
        directory = Path(name)
        (directory / "predict.py").symlink_to(ROOT / "predict.py")
        (directory / ".cog").mkdir()
        schema = openapi_schema((ROOT / "predict.py").read_text(encoding="utf-8"))
        (directory / ".cog" / "openapi_schema.json").write_text(json.dumps(schema))
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        listener.close()
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "COG_PREDICT_TYPE_STUB": "predict.py:Predictor", "COG_WEIGHTS": str(weights.resolve()),
            "PORT": str(port)}
        with open(directory / "log", "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"], cwd=directory,
                env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            status, end = "STARTING", time.monotonic() + LONGEST
            while status == "STARTING" and process.poll() is None and time.monotonic() < end:
                with contextlib.suppress(OSError):
                    status = answer(f"{url}/health-check")["status"]
                time.sleep(0.02)
            if status != "READY":
                raise ChildProcessError(
                    f"the server is {status}: {(directory / 'log').read_text()}")
            yield url
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def answer(url: str, body: Any = None, method: str | None = None) -> Any:
    """JSON that the server answers to a GET, or to a POST of that body or what `method` says."""
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(),
                                     {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=LONGEST) as response:
        return json.load(response)


def wait_until_ready(url: str) -> None:
    while answer(f"{url}/health-check")["status"] != "READY":  # shortly after a response
        time.sleep(0.02)


def cancelled(url: str, times: int, seconds: float) -> list[float]:
    """Seconds from the request to cancel a prediction, which would take `seconds`, until the server
    is READY."""
    found = []
    with ThreadPoolExecutor(1) as pool:
        for i in tqdm(range(times), desc="cancels", file=sys.stderr):
            wait_until_ready(url)
            name = f"{url}/predictions/cancelled-{i}"
            running = pool.submit(answer, name, {"input": {
                "text": TEXT, "candidates": MOST, "num_outputs": 1}}, "PUT")
            while answer(f"{url}/health-check")["status"] != "BUSY" and not running.done():
                time.sleep(0.005)
            time.sleep(seconds * i / (times + 1))
            began = time.perf_counter()
            with contextlib.suppress(urllib.error.HTTPError):  # it has ended by itself
                answer(f"{name}/cancel", {})
            status = running.result()["status"]
            wait_until_ready(url)
            if status == "canceled":
                found.append(time.perf_counter() - began)
    return found


def measure(a: argparse.Namespace) -> dict[str, Any]:
    codes = json.loads((a.weights / "config.json").read_text())["gpt"]["block_size"] * a.candidates
    whole, model = [], []
    with serving(a.weights) as url:
        for seed in tqdm(range(a.requests + 1), desc="requests", file=sys.stderr):
            inputs = {"text": TEXT, "seed": seed, "candidates": a.candidates,
                      "num_outputs": a.outputs}
            wait_until_ready(url)
            began = time.perf_counter()
            result = answer(f"{url}/predictions", {"input": inputs})
            whole.append(time.perf_counter() - began)
            if result["status"] != "succeeded":
                raise ChildProcessError(f"the server answered {result['error']}")
            model.append(codes / result["metrics"]["codes_per_second"])
        cancels = cancelled(url, a.cancels, statistics.median(model) * MOST / a.candidates)
    added = [w - m for w, m in zip(whole[1:], model[1:], strict=True)]  # the first is warm-up
    request = statistics.median(whole[1:])
    return {"weights": str(a.weights), "candidates": a.candidates, "outputs": a.outputs,
            "requests": a.requests, "request_s": request, "model_s": statistics.median(model[1:]),
            "added_s": statistics.median(added), "added_share": statistics.median(added) / request,
            "first_request_s": whole[0], "cancels": len(cancels),
            "cancel_s": statistics.median(cancels or [float("nan")]),
            "cancel_s_most": max(cancels, default=float("nan"))}


def table(r: dict[str, Any]) -> str:
    return (f"{r['outputs']} images of {r['candidates']} candidates: request to response "
            f"{r['request_s']:.3f} s, of it the model {r['model_s']:.3f} s, "
            f"all else {1000 * r['added_s']:.0f} ms ({r['added_share']:.1%}); "
            f"the first request {r['first_request_s']:.3f} s; {r['cancels']} cancels: median "
            f"{r['cancel_s']:.3f} s, at most {r['cancel_s_most']:.3f} s")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m scripts.benchmark serve", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--weights", type=Path, default=ROOT / "weights" / "emoji", help="bundle (weights/emoji)")
    add("--requests", type=positive, default=10, help="after one to warm up (10)")
    add("--candidates", type=number(int, 1, MOST), default=16, help="(16)")
    add("--cancels", type=positive, default=8, help="predictions that are cancelled (8)")
    add("--outputs", type=number(int, 1, 8), default=4, help="(4)")
    a = p.parse_args(arguments)
    if not (a.weights / "config.json").is_file():
        raise ValueError(f"--weights {a.weights} is no bundle, it has no config.json")
    a.candidates = max(a.candidates, a.outputs)
    return a
