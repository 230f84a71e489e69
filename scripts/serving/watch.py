"""Cog's server for predict.py, started anew when its worker has died.

    python -m scripts.serving.watch PORT [--restarts 5]

Cog's server outlives its worker: once that is killed, for want of memory say, GET /health-check
says UNHEALTHY and every prediction fails, for good. And a prediction for which Cog cannot make its
folders, as on a full disk, leaves the server BUSY for good; only its log tells. So the health is
asked for every second and the log is read on its way to stderr. A server that was READY and is ill
three times in a row, or has lost its place for predictions, is ended and started anew, after a
pause that doubles each time; ten minutes without make the count start again. After the last restart
the exit status is 1, so that a supervisor takes over. SIGTERM, SIGINT and SIGHUP end the running
prediction, then everything; a second one ends everything at once.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from scripts.training.cli import Parser, number, whole

EVERY = 1  # seconds between two looks at the health
TIMES = 3  # so many ill looks in a row: one alone may be a busy machine
PATIENCE = 10  # seconds that a server without a worker gets to end
LONGEST = 60  # seconds of pause before a restart, at most
CALM = 600  # seconds that a server ran, after which earlier restarts count no more
WELL = {"READY", "BUSY"}
ILL = {"UNHEALTHY", "DEFUNCT", "SETUP_FAILED"}  # the first one only after setup
LOST = re.compile(rb"(dropped without|poisoned).*coglet::permit::pool")  # in Cog's log
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PARENT_DEATH = 1  # PR_SET_PDEATHSIG


class Signals:
    """Signals that would end this process, as something to wait for."""

    def __init__(self) -> None:
        self.reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(each) != signal.SIG_IGN:  # as nohup has it
                signal.signal(each, lambda *_: None)

    def wait(self, seconds: float) -> bool:
        """Wait for so long, or for a signal, which is true."""
        if not select.select([self.reader], [], [], seconds)[0]:
            return False
        os.read(self.reader, 64)
        return True


class Ended(NamedTuple):
    """Why a server is watched no more."""

    reason: str  # empty: a signal came, or it ended as it was asked to
    status: int = 0  # of the exit, where no restart could help
    calm: bool = False  # it ran for long


def say(text: str) -> None:
    print(f"clipgen: {text}", file=sys.stderr, flush=True)


def bound_to_this_process() -> None:
    """In the server, before it starts: killing this process outright must not leave it behind."""
    if LIBC is not None:
        LIBC.prctl(PARENT_DEATH, signal.SIGTERM)


class Log(threading.Thread):
    """Passes a server's log on to stderr; `lost`: it told of a place for predictions that is."""

    def __init__(self, process: subprocess.Popen):
        super().__init__(daemon=True)
        self.process, self.lost = process, False
        self.start()

    def run(self) -> None:
        for line in self.process.stderr:
            self.lost = self.lost or LOST.search(line) is not None
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()


@contextlib.contextmanager
def server(port: int, signals: Signals) -> Iterator[tuple[subprocess.Popen, Log]]:
    """Cog's server; with it ends its worker, and what the two left among the temporary files."""
    python = Path(sys.executable)
    with tempfile.TemporaryDirectory(prefix="clipgen-serve-",
                                     ignore_cleanup_errors=True) as temporary:
        process = subprocess.Popen(
            [python, "-m", "cog.server.http", "--host", "127.0.0.1"], stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # A group of its own: Ctrl-C is for this process, which passes it on once.
            process_group=0, preexec_fn=bound_to_this_process,
            env=os.environ | {
                "PORT": str(port), "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
                "TMPDIR": temporary,
                "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"})  # of the worker
        log = Log(process)
        try:
            yield process, log
        finally:
            end(process, signals)
            log.join()


def end(process: subprocess.Popen, signals: Signals) -> None:
    """End a server and its worker: within PATIENCE, or at once when a signal comes."""
    until = time.monotonic() + PATIENCE
    process.terminate()
    while process.poll() is None and time.monotonic() < until and not signals.wait(0.1):
        pass
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def health(port: int) -> str | None:
    """What GET /health-check says; None: nothing yet."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health-check")
        return json.load(connection.getresponse())["status"]
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()


def watch(process: subprocess.Popen, log: Log, port: int, signals: Signals, was_ready: bool
          ) -> Ended:
    """Until a signal comes, the server ends, it is ill after it was ready, or BUSY for good."""
    ill, began = 0, time.monotonic()

    def ended(reason: str) -> Ended:
        return Ended(reason, calm=time.monotonic() - began > CALM)

    while True:
        if signals.wait(EVERY):
            process.terminate()  # it ends the running prediction first
            while process.poll() is None and not signals.wait(0.1):
                pass
            return Ended("")
        if (status := process.poll()) is not None:
            if status and was_ready:
                return ended(f"Cog's server ended with status {status}")
            return Ended("", 1 if status < 0 else status)  # its own words are in the log
        if log.lost:
            return ended("Cog's server is BUSY for good, its log says why")
        found = health(port)
        was_ready = was_ready or found in WELL | {"UNHEALTHY"}
        if found in WELL:
            ill = 0
        elif found in ILL and was_ready:
            ill += 1
            if ill == TIMES:
                return ended(f"the worker is gone or does not work (health {found})")


def serve(port: int, restarts: int) -> int:
    """Serve until a signal, POST /shutdown or one failure too many; returns the exit status."""
    signals, failures, was_ready = Signals(), 0, False
    while True:
        with server(port, signals) as (process, log):
            ended = watch(process, log, port, signals, was_ready)
        if not ended.reason:
            return ended.status
        was_ready = True
        failures = 1 if ended.calm else failures + 1
        if failures > restarts:
            say(f"{ended.reason} after {restarts} restarts: giving up; where memory ran out, give "
                "the machine more, or allow fewer candidates")
            return 1
        pause = min(LONGEST, 2 ** (failures - 1))
        say(f"{ended.reason}: restart {failures} of {restarts} in {pause} s")
        if signals.wait(pause):
            return 0


def main() -> None:
    parser = Parser(prog="python -m scripts.serving.watch", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=number(int, 1, 65535), help="on 127.0.0.1")
    parser.add_argument("--restarts", type=whole, default=5, help="in a row, at most (5)")
    a = parser.parse_args()
    sys.exit(serve(a.port, a.restarts))


if __name__ == "__main__":
    main()
