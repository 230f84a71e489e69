"""The real Cog HTTP server on a free port, and a sink for what it sends out."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from scripts.serving.schema import ROOT, openapi_schema


def free_port() -> int:
    """One below those that the kernel gives to whoever asks for any, who may be a test beside."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def wait_for(condition, seconds: float, what: str):
    """The first true result of `condition()`, or AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.02)
    raise AssertionError(f"{what}: not within {seconds} s")


class Server:
    """A running server; use as a context manager.

    It works in `directory`, which gets a link to predict.py and, with `schema`, the schema file.
    `weights` is passed as COG_WEIGHTS (None: predict.py chooses).  `command`: start this instead.
    `added`: lines at the end of a copy of predict.py, in the link's place.
    """

    def __init__(self, directory: Path, weights: str | Path | None, *, schema: bool = True,
                 upload_url: str | None = None, command: list[str] | None = None,
                 added: str | None = None):
        self.port = free_port()
        self.log_path = directory / "server.log"
        self.temporary = directory / "tmp"
        self.temporary.mkdir(parents=True)
        if added is None:
            (directory / "predict.py").symlink_to(ROOT / "predict.py")
        else:
            text = (ROOT / "predict.py").read_text(encoding="utf-8")
            (directory / "predict.py").write_text(f"{text}\n\n{added}\n", encoding="utf-8")
        if schema:
            (directory / ".cog").mkdir()
            text = json.dumps(openapi_schema((ROOT / "predict.py").read_text()))
            (directory / ".cog" / "openapi_schema.json").write_text(text)
        if command is None:
            command = [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"]
            command += ["--upload-url", upload_url] if upload_url else []
        else:
            command = [*command, str(self.port)]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {
            "PATH": path, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary),
            "PORT": str(self.port), "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
        }
        environment.pop("COG_WEIGHTS", None)
        if weights is not None:
            environment["COG_WEIGHTS"] = str(weights)
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=directory, env=environment, stdout=log, stderr=log,
                start_new_session=True,
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        """SIGTERM, on which Cog ends a running prediction first; then make sure nothing is left."""
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def ready(self) -> Server:
        """Wait for the end of a setup that works."""
        assert self.set_up()["status"] == "READY", self.health()
        return self

    def set_up(self) -> dict:
        """The health check after setup, whether it worked or not."""
        return wait_for(
            lambda: (health := self.health())["status"] != "STARTING" and health, 300,
            f"setup, see {self.log_path}",
        )

    def health(self) -> dict:
        """GET /health-check; its status is STARTING, too, before the port is open."""
        assert self.process.poll() is None, self.log_path.read_text()
        try:
            return self.request("GET", "/health-check")[1]
        except OSError:
            return {"status": "STARTING"}

    def request(self, method: str, path: str, body=None, headers=()) -> tuple[int, object]:
        """HTTP status and body, read as JSON where it is JSON; bytes are sent as they are."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, method=method,
            headers={"Content-Type": "application/json", **dict(headers)},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                status, content = response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                status, content = error.code, error.read()
        try:
            return status, json.loads(content)
        except ValueError:
            return status, content.decode()

    def post(self, body, headers=()) -> tuple[int, object]:
        """POST /predictions once the server is free, which it is shortly after a response."""
        wait_for(lambda: self.health()["status"] == "READY", 60, "READY")
        return self.request("POST", "/predictions", body, headers)

    def predict(self, **inputs) -> dict:
        """The response to a prediction, whose HTTP status must be 200."""
        status, response = self.post({"input": inputs})
        assert status == 200, response
        return response

    def files(self, **inputs) -> list[bytes]:
        """The output files of a prediction that must succeed."""
        response = self.predict(**inputs)
        assert response["status"] == "succeeded", response
        return [data(url) for url in response["output"]]

    def start(self, name: str, **inputs) -> threading.Thread:
        """Run the prediction `name` in a thread that ends with it; its `.response` is the body."""
        def run() -> None:
            body = {"input": inputs}
            thread.response = self.request("PUT", f"/predictions/{name}", body)[1]
            thread.ended = time.monotonic()

        wait_for(lambda: self.health()["status"] == "READY", 60, "READY")
        thread = threading.Thread(target=run)
        thread.start()
        wait_for(lambda: self.health()["status"] == "BUSY", 10, "the start of a prediction")
        return thread

    def processes(self) -> dict[str, int]:
        """By command line, the ids of all that this process has started, at any depth."""
        lines = subprocess.check_output(["ps", "-A", "-o", "pid=,ppid=,args="], text=True)
        rows = [line.split(None, 2) for line in lines.splitlines()]
        found, family = {}, [self.process.pid]
        for member in family:  # grows meanwhile
            for pid, parent, command in rows:
                if int(parent) == member:
                    family.append(int(pid))
                    found[command] = int(pid)
        return found

    def kill(self, named: str) -> None:
        """Kill outright the one process below that has this in its command line."""
        (pid,) = (pid for command, pid in self.processes().items() if named in command)
        os.kill(pid, signal.SIGKILL)

    def memory(self) -> int:
        """Resident bytes of the server with its workers."""
        lines = subprocess.check_output(["ps", "-A", "-o", "pgid=,rss="], text=True).splitlines()
        rows = [map(int, line.split()) for line in lines]
        return sum(rss * 1024 for group, rss in rows if group == self.process.pid)


def data(url: str) -> bytes:
    """The content of a data URL."""
    return base64.b64decode(url.partition(",")[2])


class Sink:
    """An HTTP server that keeps what it gets: `.requests` holds (path, headers, body) in order.

    A request whose path contains `slow` is answered, and kept, after `delay` seconds.
    """

    def __init__(self, slow: str | None = None, delay: float = 1.0):
        self.requests: list[tuple[str, dict, bytes]] = []

        class Handler(BaseHTTPRequestHandler):
            def receive(handler) -> None:  # noqa: N805
                if "chunked" in handler.headers.get("Transfer-Encoding", ""):
                    body = b""
                    while size := int(handler.rfile.readline(), 16):
                        body += handler.rfile.read(size)
                        handler.rfile.readline()
                    handler.rfile.readline()
                else:
                    body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
                if slow is not None and slow in handler.path:
                    time.sleep(delay)
                self.requests.append((handler.path, dict(handler.headers), body))
                handler.send_response(200)
                handler.send_header("Content-Length", "0")
                handler.end_headers()

            do_GET = do_POST = do_PUT = receive

            def log_message(handler, *_) -> None:  # noqa: N805
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()
