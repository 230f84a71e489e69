"""The training loop: data, forward, loss, backward, step, average, log, validate, save.

What is trained describes itself as a `Task`; everything else about a run is here, once.  In its
directory a run keeps `checkpoint-*.pt`, `log.jsonl`, TensorBoard's scalars and the newest pictures.
All that is random is drawn from generators made of (seed, step): a run that goes on needs to know
nothing but its step, and ends with the same bits on one CPU process.  A run with a time instead of
steps plans these anew all the time, from its speed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from scripts.data.files import write_text
from scripts.training import checkpoints
from scripts.training.cli import Stopped
from scripts.training.optim import EMA, learning_rate, set_learning_rate
from scripts.training.run_directory import all_finite, claim, memory_gb, step_of
from scripts.training.settings import (
    PRECISIONS,
    RunSettings,
    identity,
    on_any_processes,
    require_same,
)
from scripts.training.verdict import too_few

KEPT = 0.98  # of a --time is planned with: some is spent after the last step
PROBE = 10  # steps of the trial that measures speed for --time
LEAST = 100  # steps that a --time must allow
FIRST_SAVE = 30.0  # seconds to the first checkpoint, at most
GRADIENT_NORM = 1.0  # longer gradients are scaled down to it


@dataclass
class Part:
    """A module that is trained: its optimizers, which share its parameters out, and its loss.

    `loss` takes the batch of a step and returns what is minimized, and values to log by name.  The
    part sits out a share `begins` of the steps and takes `rate` times the learning rate.
    """

    module: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    loss: Callable[[Any], tuple[Tensor, dict[str, Tensor]]]
    begins: float = 0.0
    rate: float = 1.0


class Task(Protocol):
    """What is trained, for `steps` steps.  It is made anew to measure its speed."""

    model: nn.Module  # the one that is averaged, validated and kept
    steps: int  # of the whole training; `State` sets it, and again where a time is kept

    def parts(self) -> dict[str, Part]:
        """By name, in the order of their steps; `model` is one.  Called once: it may wrap them."""

    def batch(self, step: int) -> Any:
        """What `loss` takes, for this process; a function of the step alone."""

    def after(self, step: int) -> dict[str, Tensor]:
        """Whatever else follows a step; values to log."""

    def buffers(self) -> dict[str, Tensor]:
        """What else a checkpoint must hold; written in place when a run goes on."""

    def validate(self, model: nn.Module) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """Scores of the averaged model on held-out data, and pictures by name."""


def start(dtype: str, seed: int) -> Accelerator:
    """The processes and devices of this run, as `accelerate launch` or its absence has it.

    ValueError: a launcher started several processes, each of which takes itself for the only one.
    """
    sys.excepthook = say_interrupted
    # TensorBoard's own thread meets a full disk too; the loop below is the one to say it.
    threading.excepthook = lambda fault: (None if isinstance(fault.exc_value, OSError)
                                          else threading.__excepthook__(fault))
    torch.manual_seed(seed)
    # Numbers too small for float32's normal form take a CPU a hundred times as long.  Late in a
    # training gradients are full of them: a VQGAN's step took 3.2 times as long.
    torch.set_flush_denormal(True)
    # One process may work while the others wait: it fetches CLIP, or evaluates.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    accelerator = Accelerator(mixed_precision=PRECISIONS[dtype], kwargs_handlers=[patience])
    begun = os.environ.get("WORLD_SIZE", "1")
    if begun != "1" and accelerator.num_processes == 1:
        raise ValueError(f"the launcher started {begun} processes, and without GPUs each trains "
                         "alone: set ACCELERATE_USE_CPU=true, and they train together")
    return accelerator


def say_interrupted(kind: type, error: BaseException, traceback: Any) -> None:
    """Ctrl-C while nothing can be saved (at the start, the second time) needs no traceback."""
    if kind is KeyboardInterrupt:
        print("stopped: the same command goes on from what is saved", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


class State:
    """A task in training: its parts, their optimizers, the averaged model."""

    def __init__(self, task: Task, settings: RunSettings, accelerator: Accelerator, steps: int):
        self.task, self.settings, self.accelerator = task, settings, accelerator
        self.plan(steps)
        self.average = EMA(task.model, settings.ema)  # a copy made before anything wraps the model
        self.parts = task.parts()

    def plan(self, steps: int) -> None:
        """So many steps in all."""
        self.steps = self.task.steps = steps

    def step(self, step: int) -> dict[str, Tensor]:
        """One training step; returns what to log, `loss` among it."""
        settings, accelerator, task = self.settings, self.accelerator, self.task
        rate = learning_rate(step, self.steps, settings.lr, settings.warmup)
        values: dict[str, Tensor] = {}
        batch = task.batch(step)
        for name, part in self.parts.items():
            if step < round(part.begins * self.steps):
                continue
            loss, found = part.loss(batch)
            for optimizer in part.optimizers:
                set_learning_rate(optimizer, part.rate * rate)
                optimizer.zero_grad(set_to_none=True)
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(part.module.parameters(), GRADIENT_NORM)
            values |= found | {"gradient" if name == "model" else f"{name}_gradient": norm}
            for optimizer in part.optimizers:
                optimizer.step()
                # In all parts alike: the scaler of float16 looks at every optimizer's gradients.
                optimizer.zero_grad(set_to_none=True)
        values |= task.after(step)
        self.average.update(task.model, step)
        if accelerator.num_processes > 1:
            values = {k: accelerator.reduce(v.detach(), "mean") for k, v in values.items()}
        return values

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"average": self.average.state()} | self.task.buffers()
        for name, part in self.parts.items():
            state[name] = part.module.state_dict()
            state[f"{name}_optimizers"] = [each.state_dict() for each in part.optimizers]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.module.load_state_dict(state[name])
            for optimizer, saved in zip(part.optimizers, state[f"{name}_optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        self.average.load(state["average"])
        for name, buffer in self.task.buffers().items():
            buffer.copy_(state[name])

    def validate(self) -> tuple[dict[str, float], dict[str, Image.Image]]:
        return self.task.validate(self.average.module)


@dataclass
class Speed:
    """Seconds that a step took lately, and the last validation and checkpoint."""

    step: float = 0.0
    validation: float = 0.0
    saving: float = 0.0

    def stepped(self, count: int, seconds: float) -> None:
        """A mean in which the newest steps weigh as much as all before."""
        each = seconds / count
        self.step = (self.step + each) / 2 if self.step else each


@dataclass
class Result:
    """A finished training."""

    task: Task
    model: nn.Module  # averaged, in eval mode
    steps: int
    scores: dict[str, float] = field(default_factory=dict)  # of the last validation


def train(settings: RunSettings, accelerator: Accelerator, make: Callable[[int], Task],
          **facts: Any) -> Result:
    """Train `make(steps)` to its end, going on from a checkpoint in `settings.run` if there is one.

    `facts`: what else a run that goes on must share with its checkpoint (sizes, digests of data).
    One sentence each: ValueError, other settings or too little time; FloatingPointError, a loss or
    weights that are not finite; OSError, a disk that is full; MemoryError; `Stopped` by Ctrl-C,
    after saving.
    """
    began = time.monotonic()
    with claim(settings.run, accelerator.is_main_process), enough_memory(settings.batch):
        own = identity(settings, processes=accelerator.num_processes, **facts)
        checkpoint = checkpoints.load(settings.run, report=accelerator.is_main_process)
        first = checkpoint["step"] if checkpoint else 0
        for process, seen in enumerate(gather_object([first])):
            if seen != first:
                raise ValueError(f"process {process} does not see the checkpoints of process 0 in "
                                 f"{settings.run}: give a --run directory that all share")
        if checkpoint:
            if settings.time:  # how many steps that meant at first
                own |= {k: checkpoint["settings"][k] for k in ("steps", "validations")}
            require_same(settings.run, on_any_processes(checkpoint["settings"]),
                         on_any_processes(own))
        elif settings.time:
            own["steps"], own["validations"] = affordable(settings, accelerator, make)
            if own["steps"] < LEAST and not settings.anyway:
                raise ValueError(too_few(own["steps"], LEAST, settings.time))
        state = State(make(own["steps"]), settings, accelerator, own["steps"])
        if checkpoint:
            state.load_state_dict(checkpoint["training"])
            began -= checkpoint.get("seconds", 0)
            state.plan(checkpoint.get("steps", own["steps"]))
            if accelerator.scaler and checkpoint["scaler"]:
                accelerator.scaler.load_state_dict(checkpoint["scaler"])
        scores = Trainer(settings, accelerator, own, state, began).train(first)
        return Result(state.task, state.average.module, state.steps, scores)


class Trainer:
    """The loop of a run, with its progress, checks, logs and checkpoints."""

    def __init__(self, settings: RunSettings, accelerator: Accelerator, own: dict[str, Any],
                 state: State, began: float):
        self.directory, self.accelerator, self.own, self.state = (settings.run, accelerator, own,
                                                                  state)
        self.began = began  # by the monotonic clock, as if the run had never been stopped
        self.lr, self.seconds = settings.lr, settings.time
        self.save_seconds = 60 * settings.save_minutes
        self.log_every = max(1, min(20, state.steps // 20))
        self.validate_every = max(1, -(-state.steps // own["validations"]))
        self.speed = Speed()
        self.pending: list[dict[str, Tensor]] = []  # values of the steps since the last line
        self.saved_step: int | None = None
        self.stop_signal = 0
        self.board: SummaryWriter | None = None
        self.scores: dict[str, float] = {}

    def train(self, first: int) -> dict[str, float]:
        """Take the steps that are left; returns the scores of the last validation."""
        if first >= self.state.steps:
            return self.state.validate()[0]
        self.begin(first)
        done = first
        try:
            with self.signals():
                while done < self.state.steps:
                    self.pending.append(self.state.step(done))
                    self.bar.update()
                    done += 1
                    stop, due = self.agree(done)
                    if done % self.log_every == 0 or done == self.state.steps or stop or due:
                        self.log_steps(done)
                        self.keep_time(done)
                    last = done == self.state.steps
                    if last or done - self.validated >= self.validate_every:
                        self.log_steps(done)
                        self.validate(done)
                    if last or stop or due:
                        self.save(done)
                    if stop:
                        break
        finally:
            self.end()
        if self.agree(done)[0]:  # also where it came while the last step was saved
            raise Stopped(f"stopped after step {done} of {self.state.steps}, all of it saved in "
                          f"{self.directory}: the same command goes on from there",
                          self.stop_signal or signal.SIGTERM)
        return self.scores

    def begin(self, first: int) -> None:
        self.saved_step = first or None
        self.validated = first - first % self.validate_every
        self.saved = self.line = time.monotonic()
        main = self.accelerator.is_main_process
        if main:
            self.forget_after(first)
        with self.writing():
            self.board = SummaryWriter(str(self.directory), purge_step=first) if main else None
        self.bar = tqdm(total=self.state.steps, initial=first, disable=not main, dynamic_ncols=True,
                        desc=self.directory.name, mininterval=0.5 if sys.stderr.isatty() else 10)

    def end(self) -> None:
        self.bar.close()
        if self.board:
            with contextlib.suppress(OSError):  # log.jsonl has it all
                self.board.close()

    def agree(self, done: int) -> tuple[bool, bool]:
        """(stop?, checkpoint due?), the same in all processes; those ask each other but rarely."""
        patience = self.save_seconds if self.saved_step else min(FIRST_SAVE, self.save_seconds)
        flags = [bool(self.stop_signal), time.monotonic() - self.saved >= patience]
        if self.accelerator.num_processes > 1:
            if done % self.log_every and done < self.state.steps:
                return False, False
            both = torch.tensor(flags, dtype=torch.float32, device=self.accelerator.device)
            flags = (self.accelerator.reduce(both, "sum") > 0).tolist()
        return flags[0], flags[1]

    def log_steps(self, done: int) -> None:
        """The means since the last line; FloatingPointError if the loss of a step is not finite."""
        if not self.pending:
            return
        first = done - len(self.pending)
        losses = torch.stack([values["loss"].detach().float() for values in self.pending]).cpu()
        if not losses.isfinite().all():
            step = first + int((~losses.isfinite()).nonzero()[0]) + 1
            raise FloatingPointError(f"{self.directory}: the loss of step {step} is "
                                     f"{losses[step - first - 1].item()}; {self.remedy(step)}")
        numbers = {}
        for name in dict.fromkeys(k for values in self.pending for k in values):
            given = [v[name].detach().float() for v in self.pending if name in v]
            numbers[name] = torch.stack(given).mean().item()
        numbers["memory_gb"] = memory_gb(self.accelerator.device)
        now = time.monotonic()
        numbers["steps_per_second"] = len(self.pending) / max(now - self.line, 1e-9)
        self.speed.stepped(len(self.pending), now - self.line)
        self.line, self.pending = now, []
        self.log(done, numbers)
        self.bar.set_postfix_str(f"loss {numbers['loss']:.4g}", refresh=False)

    def keep_time(self, done: int) -> None:
        """Plan the steps anew that fit into what is left of the time, where there is one."""
        if not self.seconds or not self.speed.step:
            return
        left = KEPT * self.seconds - (time.monotonic() - self.began)
        validations = max(1, -(-(self.state.steps - done) // self.validate_every))
        left -= validations * self.speed.validation + self.speed.saving
        steps = done + max(0, int(left / self.speed.step))
        steps, = broadcast_object_list([steps])  # the clocks of other processes differ a little
        if done == self.state.steps and steps - done < self.log_every:
            return  # too few to go on for
        self.state.plan(steps)
        self.validate_every = max(self.validate_every, -(-steps // self.own["validations"]))
        self.bar.total = steps

    def remedy(self, step: int) -> str:
        """What to do about numbers that are not finite in a step."""
        again = f"the same command with a lower --lr than {self.lr:g} goes on from"
        if not self.saved_step:
            return f"nothing was saved before it: start again with a lower --lr than {self.lr:g}"
        if self.saved_step == step - 1:  # its weights may be the cause
            return (f"it is the first after the checkpoint of step {self.saved_step}, which is "
                    f"kept: {again} it, or, once that is deleted, from the one before")
        return f"the checkpoint of step {self.saved_step} is kept, and {again} it"

    def validate(self, done: int) -> None:
        began = time.monotonic()
        self.scores, pictures = self.state.validate()
        self.validated = done
        self.log(done, self.scores)
        if self.board:
            with self.writing():
                for name, picture in pictures.items():
                    picture.save(self.directory / f"{name}.png")
                    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
                    self.board.add_image(name, pixels.view(picture.height, picture.width, 3), done,
                                         dataformats="HWC")
            text = "  ".join(f"{k} {v:.4g}" for k, v in self.scores.items())
            self.bar.write(f"step {done}: {text}", file=sys.stderr)
        self.line = time.monotonic()
        self.speed.validation = self.line - began

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
        """Write a checkpoint; what prevents it ends all processes."""
        fault: Exception | None = None
        began = time.monotonic()
        if self.board:
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
            state = {"settings": self.own, "step": done, "scaler": scaler,
                     "steps": self.state.steps, "seconds": began - self.began,
                     "training": self.state.state_dict()}
            if not all_finite(state["training"]):
                fault = FloatingPointError(f"{self.directory}: weights that are not finite after "
                                           f"step {done} are not saved; {self.remedy(done)}")
            else:
                try:
                    checkpoints.save(self.directory, done, state)
                except OSError as error:
                    fault = self.unwritten(error)
        fault, = broadcast_object_list([fault])  # so all processes stop, or go on once it is saved
        if fault:
            raise fault
        self.line = self.saved = time.monotonic()
        self.saved_step, self.speed.saving = done, self.saved - began

    def unwritten(self, error: OSError) -> OSError:
        kept = (f"the checkpoint of step {self.saved_step} is kept" if self.saved_step else
                "nothing was saved yet")
        return OSError(f"{self.directory}: cannot be written ({error.strerror}); {kept}: make "
                       "room, and the same command "
                       f"{'goes on from it' if self.saved_step else 'starts again'}")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self.unwritten(error) from None

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


@contextlib.contextmanager
def enough_memory(batch: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise MemoryError(f"out of memory with --batch {batch}: free some of the device's memory, "
                          "and the same command goes on; or give a smaller --batch in another "
                          "--run") from None


def affordable(settings: RunSettings, accelerator: Accelerator, make: Callable[[int], Task]
               ) -> tuple[int, int]:
    """(steps, validations) that fit into `settings.time`, measured on a short training."""
    seconds, began = settings.time, time.monotonic()
    trial = State(make(PROBE), settings, accelerator, PROBE)
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
    validations = max(1, min(settings.validations, int(0.1 * seconds / max(validation, 1e-9))))
    left = 0.95 * (seconds - (validated - began) - (ready - began)) - validations * validation
    del trial
    accelerator.free_memory()
    steps, validations = broadcast_object_list([max(PROBE, int(left / each)), validations])
    if accelerator.is_main_process:
        print(f"{1 / each:.2f} steps/s: {steps} steps in {seconds / 60:.1f} min", file=sys.stderr)
    return steps, validations
