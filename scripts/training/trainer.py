"""A training run: from its first step to its last, through crashes, Ctrl-C and several processes.

A script describes its training as a `Training`; `run` does the rest.  In its directory a run keeps
`checkpoint-*.pt`, `log.jsonl`, TensorBoard's scalars and the newest grids.  Everything random is
drawn from generators made of (seed, step), so that nothing but the step needs saving.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from PIL import Image
from safetensors.torch import save
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from scripts.data.files import write_bytes, write_text
from scripts.training import checkpoints
from scripts.training.cli import amount, duration, number, positive

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
PROBE = 10  # steps of the trial that measures speed for --time
# Settings that may differ when a run goes on: where things are, how often it saves, its rate.
FREE = {"images", "shards", "validation", "captions", "run", "clip", "vqgan", "start_from", "time",
        "save_minutes", "workers", "lr", "decoder_of"}


class Training(Protocol):
    """One training of `steps` steps; made anew to measure its speed, so it keeps no outside state.

    `step` returns what to log, `loss` among it; all is averaged over the steps between two lines.
    """

    def step(self, step: int) -> dict[str, Tensor]: ...
    def state(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...
    def validate(self) -> tuple[dict[str, float], dict[str, Image.Image]]: ...


def add_arguments(p: argparse.ArgumentParser, *, steps: int, batch: int, lr: float) -> None:
    """The flags that all trainings share."""
    p.add_argument("--run", type=Path, required=True, help="directory of checkpoints and result")
    length = p.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, default=steps, help=f"({steps})")
    length.add_argument("--time", type=duration, help="instead of --steps, as in 90s, 20m, 2h")
    p.add_argument("--batch", type=positive, default=batch, help=f"of each process ({batch})")
    p.add_argument("--lr", type=number(float, 0, 1e30), default=lr,
                   help=f"peak learning rate ({lr:g})")
    p.add_argument("--dtype", choices=PRECISIONS, default="float32", help="of autocast (float32)")
    p.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    p.add_argument("--save-minutes", type=amount, default=3.0, help="between checkpoints (3)")
    p.add_argument("--validations", type=positive, default=10, help="in the whole run (10)")


def start(dtype: str, seed: int) -> Accelerator:
    """The processes and devices of this run, as `accelerate launch` or its absence has it."""
    sys.excepthook = say_interrupted
    # TensorBoard's own thread meets a full disk too; the loop below is the one to say it.
    threading.excepthook = lambda fault: (None if isinstance(fault.exc_value, OSError)
                                          else threading.__excepthook__(fault))
    torch.manual_seed(seed)
    # One process may work while the others wait: it fetches CLIP, or evaluates.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    return Accelerator(mixed_precision=PRECISIONS[dtype], kwargs_handlers=[patience])


def say_interrupted(kind: type, error: BaseException, traceback: Any) -> None:
    """Ctrl-C while nothing can be saved (at the start, the second time) needs no traceback."""
    if kind is KeyboardInterrupt:
        print("stopped: the same command goes on from what is saved", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def claim(directory: Path, main: bool) -> contextlib.AbstractContextManager[IO | None]:
    """Make the directory and lock it: two runs in one would spoil each other's checkpoints.

    The lock ends with the process, however that ends.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / ".lock", "w") if main else contextlib.nullcontext()
    except OSError as error:
        raise SystemExit(f"--run {directory} cannot be written ({error.strerror}): give another "
                         "directory") from None
    if main:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another process trains in {directory}: stop it first, or give "
                             "another --run directory") from None
        except OSError:
            pass  # some network disks have no locks
    return lock


def run(a: argparse.Namespace, accelerator: Accelerator, make: Callable[[int], Training],
        **facts: Any) -> tuple[Training, int, dict[str, float]]:
    """Train `make(steps)` to its end, going on from a checkpoint in `a.run` if there is one.

    `facts`: what else a resumed run must share with its checkpoint (sizes, digests of its data).
    Returns the finished training, its steps and the last scores.  SystemExit, one sentence: other
    settings, a loss that is not finite, a disk that is full, Ctrl-C (after saving).
    """
    with claim(a.run, accelerator.is_main_process), enough_memory(a.batch):
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items()
                    if k not in FREE} | facts | {"processes": accelerator.num_processes}
        settings = json.loads(json.dumps(settings))
        state = checkpoints.load(a.run, report=accelerator.is_main_process)
        first = state["step"] if state else 0
        if broadcast_object_list([first])[0] != first:
            raise SystemExit(f"process {accelerator.process_index} does not see the checkpoints of "
                             f"process 0 in {a.run}: give a --run directory that all share")
        if state:
            if a.time:  # how many steps that meant was settled when the run began
                settings |= {k: state["settings"][k] for k in ("steps", "validations")}
            if changed := differences(state["settings"], settings):
                raise SystemExit(f"{a.run} holds a run with other settings ({changed}): give those "
                                 "again, or another --run directory")
        elif a.time:
            settings["steps"], settings["validations"] = affordable(a.time, accelerator, make,
                                                                    a.validations)
        steps = settings["steps"]
        training = make(steps)
        if state:
            training.load(state["training"])
            if accelerator.scaler and state["scaler"]:
                accelerator.scaler.load_state_dict(state["scaler"])
        return training, steps, Loop(a, accelerator, settings, training, steps).go(first)


@contextlib.contextmanager
def enough_memory(batch: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise SystemExit(f"out of memory with --batch {batch}: free some of the device's memory, "
                         "and the same command goes on; or give a smaller --batch in another --run"
                         ) from None


def differences(was: dict[str, Any], now: dict[str, Any]) -> str:
    """As in `width 128 became 256, gpt.width 128 became 256`."""
    def flat(settings: dict[str, Any]) -> dict[str, Any]:
        return {f"{k}.{name}" if name else k: value for k, given in settings.items() for name, value
                in (given.items() if isinstance(given, dict) else [("", given)])}

    was, now = flat(was), flat(now)
    return ", ".join(f"{k} {was.get(k)} became {now.get(k)}"
                     for k in sorted(was.keys() | now.keys()) if was.get(k) != now.get(k))


def affordable(seconds: float, accelerator: Accelerator, make: Callable[[int], Training],
               validations: int) -> tuple[int, int]:
    """(steps, validations) that fit into a time, measured on a short training, thrown away then."""
    began = time.monotonic()
    trial = make(PROBE)
    trial.step(0)  # the first one is slow
    ready = time.monotonic()
    took = []
    for step in range(PROBE):
        stepping = time.monotonic()
        trial.step(step)["loss"].item()
        took.append(time.monotonic() - stepping)
    stepped = time.monotonic()
    trial.validate()
    validated = time.monotonic()
    each = (sum(took) - max(took)) / (PROBE - 1)  # one step may do what happens once in a run
    validation = validated - stepped
    validations = max(1, min(validations, int(0.1 * seconds / max(validation, 1e-9))))
    left = 0.95 * (seconds - (validated - began) - (ready - began)) - validations * validation
    del trial
    accelerator.free_memory()
    steps, validations = broadcast_object_list([max(PROBE, int(left / each)), validations])
    if accelerator.is_main_process:
        print(f"{1 / each:.2f} steps/s: {steps} steps in {seconds / 60:.1f} min", file=sys.stderr)
    return steps, validations


class Loop:
    """The steps of a run, with progress, checks, logs and checkpoints."""

    def __init__(self, a: argparse.Namespace, accelerator: Accelerator, settings: dict,
                 training: Training, steps: int):
        self.directory, self.accelerator, self.settings = a.run, accelerator, settings
        self.training, self.steps, self.lr = training, steps, a.lr
        self.save_seconds = 60 * a.save_minutes
        self.log_every = max(1, min(20, steps // 20))
        self.validate_every = max(1, -(-steps // settings["validations"]))
        self.pending: list[dict[str, Tensor]] = []  # of the steps since the last line
        self.saved_step: int | None = None
        self.stop_signal = 0
        self.board: SummaryWriter | None = None
        self.scores: dict[str, float] = {}

    def go(self, first: int) -> dict[str, float]:
        """Do the steps that are left; returns the scores of the last validation."""
        if first == self.steps:
            return self.training.validate()[0]
        self.saved_step = first or None
        self.saved = self.line = time.monotonic()
        main = self.accelerator.is_main_process
        if main:
            self.forget_after(first)
        with self.writing():
            self.board = SummaryWriter(str(self.directory), purge_step=first) if main else None
        self.bar = tqdm(total=self.steps, initial=first, disable=not main, dynamic_ncols=True,
                        desc=self.directory.name, mininterval=0.5 if sys.stderr.isatty() else 10)
        try:
            with self.signals():
                for step in range(first, self.steps):
                    self.pending.append(self.training.step(step))
                    self.bar.update()
                    self.after(step + 1)
        finally:
            self.bar.close()
            if self.board:
                with contextlib.suppress(OSError):  # log.jsonl has it all
                    self.board.close()
        return self.scores

    def after(self, done: int) -> None:
        """What follows a step: a line of the log, validation, a checkpoint."""
        last = done == self.steps
        stop, due = self.agree(done)
        validating = last or done % self.validate_every == 0
        if done % self.log_every == 0 or validating or stop or due:
            self.log_steps(done)
        if validating:
            self.validate(done)
        if last or stop or due:
            self.save(done)
        if stop and not last:
            self.bar.close()
            if self.board:
                print(f"stopped after step {done} of {self.steps}, all of it saved in "
                      f"{self.directory}: the same command goes on from there", file=sys.stderr)
            raise SystemExit(128 + (self.stop_signal or signal.SIGTERM))

    def agree(self, done: int) -> tuple[bool, bool]:
        """(stop?, checkpoint due?), the same in all processes; those ask each other but rarely."""
        flags = [bool(self.stop_signal), time.monotonic() - self.saved >= self.save_seconds]
        if self.accelerator.num_processes > 1:
            if done % self.log_every:
                return False, False
            both = torch.tensor(flags, dtype=torch.float32, device=self.accelerator.device)
            flags = (self.accelerator.reduce(both, "sum") > 0).tolist()
        return flags[0], flags[1]

    def log_steps(self, done: int) -> None:
        """The means since the last line; SystemExit if the loss of a step is no number."""
        if not self.pending:
            return
        first = done - len(self.pending)
        losses = torch.stack([values["loss"].detach().float() for values in self.pending]).cpu()
        if not losses.isfinite().all():
            step = first + int((~losses.isfinite()).nonzero()[0]) + 1
            self.fail(f"the loss of step {step} is {losses[step - first - 1].item()}; "
                      f"{self.remedy(step)}")
        numbers = {}
        for name in dict.fromkeys(k for values in self.pending for k in values):
            given = [v[name].detach().float() for v in self.pending if name in v]
            numbers[name] = torch.stack(given).mean().item()
        numbers["memory_gb"] = memory_gb(self.accelerator.device)
        now = time.monotonic()
        numbers["steps_per_second"] = len(self.pending) / max(now - self.line, 1e-9)
        self.line, self.pending = now, []
        self.log(done, numbers)
        self.bar.set_postfix_str(f"loss {numbers['loss']:.4g}", refresh=False)

    def remedy(self, step: int) -> str:
        """What to do about numbers that are not finite in a step."""
        again = f"the same command with a lower --lr than {self.lr:g} goes on from"
        if not self.saved_step:
            return f"nothing was saved before it: start again with a lower --lr than {self.lr:g}"
        if self.saved_step == step - 1:  # its weights may be the cause
            return (f"it is the first after the checkpoint of step {self.saved_step}, which is "
                    f"kept: {again} it, or, once that is deleted, from the one before")
        return f"the checkpoint of step {self.saved_step} is kept, and {again} it"

    def fail(self, reason: str) -> None:
        """End all processes; one of them says why."""
        main = self.accelerator.is_main_process
        raise SystemExit(f"{self.directory}: {reason}" if main else 1)

    def validate(self, done: int) -> None:
        self.scores, grids = self.training.validate()
        self.log(done, self.scores)
        if self.board:
            with self.writing():
                for name, grid in grids.items():
                    grid.save(self.directory / f"{name}.png")
                    pixels = torch.frombuffer(bytearray(grid.tobytes()), dtype=torch.uint8)
                    self.board.add_image(name, pixels.view(grid.height, grid.width, 3), done,
                                         dataformats="HWC")
            text = "  ".join(f"{k} {v:.4g}" for k, v in self.scores.items())
            self.bar.write(f"step {done}: {text}", file=sys.stderr)
        self.line = time.monotonic()

    def log(self, done: int, numbers: dict[str, float]) -> None:
        """One line of log.jsonl and of TensorBoard's scalars."""
        if not self.board:
            return
        with self.writing():
            with open(self.directory / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": done} | {k: float(f"{v:.6g}") for k, v
                                                        in numbers.items()}) + "\n")
            for name, value in numbers.items():
                self.board.add_scalar(name, value, done)

    def forget_after(self, step: int) -> None:
        """Drop what an interrupted run logged beyond the checkpoint that this one goes on from."""
        path = self.directory / "log.jsonl"
        if path.is_file():
            lines = path.read_text(errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if 0 < step_of(line) <= step]
            if kept != lines:
                with self.writing():
                    write_text(path, "".join(kept))

    def save(self, done: int) -> None:
        fault = None
        if self.board:
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
            state = {"settings": self.settings, "step": done, "scaler": scaler,
                     "training": self.training.state()}
            if not all_finite(state["training"]):
                fault = (f"weights that are not finite after step {done} are not saved; "
                         f"{self.remedy(done)}")
            else:
                try:
                    checkpoints.save(self.directory, done, state)
                except OSError as error:
                    fault = self.unwritten(error)
        fault, = broadcast_object_list([fault])  # so all processes stop, or go on once it is saved
        if fault:
            self.fail(fault)
        self.saved, self.saved_step = time.monotonic(), done

    def unwritten(self, error: OSError) -> str:
        kept = (f"the checkpoint of step {self.saved_step} is kept" if self.saved_step else
                "nothing was saved yet")
        return (f"cannot be written ({error.strerror}); {kept}: make room, and the same command "
                f"{'goes on from it' if self.saved_step else 'starts again'}")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.fail(self.unwritten(error))

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM stop after the step; a second Ctrl-C at once."""
        def stop(sent: int, _: Any) -> None:
            self.stop_signal = sent
            signal.signal(sent, before[sent])

        before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def step_of(line: str) -> int:
    """The step of a line of log.jsonl; 0 where a crash or a disk spoiled it."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else 0
    except (ValueError, TypeError, KeyError):
        return 0


def logged(directory: Path, name: str) -> list[float]:
    """The values of that name in the log of a run."""
    lines = map(json.loads, (directory / "log.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def all_finite(state: Any) -> bool:
    if isinstance(state, Tensor):
        return not state.is_floating_point() or bool(state.isfinite().all())
    if isinstance(state, dict):
        return all(map(all_finite, state.values()))
    return all(map(all_finite, state)) if isinstance(state, list | tuple) else True


def generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def finish(directory: Path, name: str, state: dict[str, Tensor], config: Any,
           **others: Any) -> None:
    """Write a run's result: NAME.safetensors, then `others` as JSON files of their names, then
    NAME.json, without which it is not finished."""
    path = directory / f"{name}.safetensors"
    if not all_finite(state):
        raise SystemExit(f"{path} would hold weights that are not finite: train again with a lower "
                         "--lr")
    try:
        write_bytes(path, save({k: v.detach().cpu().contiguous()
                                            for k, v in state.items()}))
        for file, content in (others | {name: config}).items():
            write_text(directory / f"{file}.json", json.dumps(content))
    except OSError as error:
        raise SystemExit(f"{path} cannot be written ({error.strerror}): make room, and the same "
                         "command goes on from the last checkpoint") from None


def report(result: dict) -> None:
    """The last line of stdout, from one of the processes."""
    if PartialState().is_main_process:
        print(json.dumps(result))


def memory_gb(device: torch.device) -> float:
    """The most memory in GB that this process has held so far, on the device it trains on."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
