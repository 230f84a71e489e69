"""What training runs share: learning rate, progress line, checkpoints that survive a crash."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up from peak / warmup, then a cosine to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def adamw(module: nn.Module, peak: float, decay: float) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95) that decays matrices alone, not biases, norms and vectors."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
              {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))


def save_weights(state: dict[str, Tensor], path: Path) -> None:
    """Write a state dict as safetensors."""
    save_file({k: v.cpu().contiguous() for k, v in state.items()}, path)
    print(f"wrote {path}", file=sys.stderr)


class Average:
    """Exponential moving average of a module's parameters and buffers."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))  # early weights are forgotten soon
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - decay)
            else:
                self.state[name].copy_(value)


def settings_of(arguments: argparse.Namespace) -> dict:
    """What a resumed run must have in common with its checkpoint: all but the paths of its data."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()
            if k not in ("images", "shards", "validation", "run", "clip")}


class Run:
    """A training run in a directory: `checkpoint.pt` (atomic), `log.jsonl`, TensorBoard scalars."""

    def __init__(self, directory: Path, settings: dict):
        self.directory, self.settings = directory, settings
        directory.mkdir(parents=True, exist_ok=True)
        self.began, self.first_step = time.time(), 0
        self.saved = time.time()
        self.board = SummaryWriter(str(directory))

    def resume(self) -> dict | None:
        """The last checkpoint, or None; refuses one that was made with other settings."""
        path = self.directory / "checkpoint.pt"
        if not path.is_file():
            return None
        state = torch.load(path, map_location="cpu", weights_only=True)
        changed = sorted(k for k in self.settings if self.settings[k] != state["settings"].get(k))
        if changed:
            raise ValueError(f"{path} was made with other settings ({', '.join(changed)}): "
                             "give those again or another --run directory")
        self.first_step = state["step"]
        return state

    def save(self, step: int, **parts: dict) -> None:
        """Write the checkpoint of `step` completed steps beside the old one, then rename."""
        path = self.directory / "checkpoint.pt"
        part = path.with_suffix(".part")
        with open(part, "wb") as file:
            torch.save({"settings": self.settings, "step": step, **parts}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        self.saved = time.time()

    def due(self, minutes: float = 3.0) -> bool:
        return time.time() - self.saved > 60 * minutes

    def log(self, step: int, steps: int, **values: float | Tensor) -> None:
        """One line on stderr and in log.jsonl."""
        numbers = {k: round(float(v), 5) for k, v in values.items()}
        if not math.isfinite(sum(numbers.values())):
            raise FloatingPointError(f"step {step}: {numbers}; the last checkpoint is kept")
        seconds = time.time() - self.began
        speed = (step - self.first_step) / max(seconds, 1e-9)
        left = (steps - step) / max(speed, 1e-9)
        with open(self.directory / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "seconds": round(seconds, 1), **numbers}) + "\n")
        for name, value in numbers.items():
            self.board.add_scalar(name, value, step)
        text = "  ".join(f"{k} {v:.4g}" for k, v in numbers.items())
        print(f"{step}/{steps}  {text}  {speed:.2f} steps/s  {left / 60:.0f} min left",
              file=sys.stderr, flush=True)
