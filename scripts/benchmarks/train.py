"""Throughput of GPT training, measured beside the same step done the public way, in one run.

    python -m scripts.benchmark train [--size weights/emoji] [--batch 64] [--steps 20]

clipgen   the step of `scripts.train_gpt` itself; codes and embeddings are read from shards
          (temporary ones of random codes, read as any others)
public    the same step, of the same GPT with the same optimizer, moving average and batch, but in
          float32 and not compiled, and VQGAN and CLIP make the codes and embeddings from pixels
          in every step; the pixels are in memory, so that reading files and decoding them, which
          the public way does as well, is not counted; nor is torch's default of TF32 in
          convolutions on CUDA changed; both favour the public way

Blocks of steps of the two alternate, since machines are noisy; numbers are medians over blocks.
TFLOP/s and MFU (of the device's dense bf16 peak) count the GPT's own operations alone, for both.
The peak of memory is the allocator's on CUDA, the whole process's until then on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import AutocastKwargs
from torch import Tensor
from tqdm import tqdm

from clipgen import bundle
from clipgen.clip import CLIP, CLIPConfig
from clipgen.device import default_dtype
from clipgen.gpt import GPT, GPTConfig
from clipgen.vqgan import VQGAN, VQGANConfig
from scripts.benchmarks.device import settle
from scripts.data import shards
from scripts.training.cli import positive
from scripts.training.gpt import (
    OPTIMIZERS,
    GPTSettings,
    GPTTask,
    make_gpt,
    operations_per_code,
    peak_flops,
)
from scripts.training.run_directory import memory_gb
from scripts.training.trainer import Part, State, start

IMAGES, CROPS = 4096, 4  # of the temporary shards
BLOCKS = 10  # of steps, of each way, at most
WARM_UP = 2  # steps of each way: the first compiles, and allocates the optimizer's state


class Pixels:
    """Random images in memory in place of `Shards`: encoded anew whenever they are asked for."""

    crops = 1

    def __init__(self, count: int, clip: CLIP, vqgan: VQGAN, device: torch.device):
        self.clip, self.vqgan, self.device = clip.to(device), vqgan.to(device), device
        size = vqgan.config.image_size
        self.images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, index: Tensor, crop: Tensor) -> tuple[Tensor, Tensor]:
        """As `Shards.rows`: codes int64 (B, L) and unit embeddings float32 (B, D)."""
        pixels = self.images[index].to(self.device).float() / 255
        return self.vqgan.encode(pixels).flatten(1), self.clip.embed_pixels(pixels)


def parts(size: str) -> tuple[CLIP, VQGAN, dict[str, Any]]:
    """CLIP, VQGAN and the settings with which `train_gpt` makes the GPT of that size."""
    if size == "published":
        gpt = GPTConfig.published()
        return (CLIP(CLIPConfig.published()).eval(), VQGAN(VQGANConfig.published()).eval(),
                {"layers": gpt.layers, "width": gpt.width, "heads": gpt.heads})
    if not (Path(size) / "config.json").is_file():
        raise ValueError(f"--size {size} is neither 'published' nor the directory of a bundle, it "
                         "has no config.json: give for example weights/emoji")
    return bundle.load_clip(size), bundle.load_vqgan(size), {"start_from": size}


def write_random_shards(directory: Path, vqgan: VQGANConfig, embedding_dim: int) -> None:
    rng = np.random.default_rng(0)
    shape = IMAGES, CROPS
    shards.write_shard(directory, "train", 0, {
        "codes": rng.integers(vqgan.codebook_size, size=(*shape, vqgan.grid**2)),
        "embeddings": rng.standard_normal((*shape, embedding_dim)),
        "images": np.arange(IMAGES)})
    shards.write_manifest(directory, {
        "crops": CROPS, "grid": [vqgan.grid, vqgan.grid], "codebook_size": vqgan.codebook_size,
        "embedding_dim": embedding_dim,
        "parts": {"train": [shards.describe_shard(directory, "train", 0)]}})


class PublicTask(GPTTask):
    """The same training in float32 and not compiled, whatever the precision of the process is."""

    def parts(self) -> dict[str, Part]:
        self.accelerator = copy.copy(self.accelerator)
        self.accelerator.autocast_handler = AutocastKwargs(enabled=False)
        self.forward = self.model
        optimizers = OPTIMIZERS[self.settings.optimizer](self.model, self.settings.lr,
                                                        self.settings.decay)
        return {"model": Part(self.model, optimizers, self.loss)}


def make_training(kind: type[GPTTask], settings: GPTSettings, gpt: GPT,
                  data: shards.Shards | Pixels) -> State:
    """The training that `scripts.train_gpt` would do with these settings, its grids left out."""
    accelerator = start(settings.dtype, settings.seed)
    return State(kind(settings, accelerator, gpt, data, data), settings, accelerator,
                 settings.steps)


def seconds(call: Callable[[], Any], times: int, device: torch.device) -> float:
    """Of one call, the mean of so many."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(times):
        call()
    wait()
    return (time.perf_counter() - began) / times


def warm_up(call: Callable[[], Any], device: torch.device) -> int:
    """Returns the peak of memory in bytes."""
    seconds(call, WARM_UP - 1, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds(call, 1, device)
    return round(1e9 * memory_gb(device))


def measure(a: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    clip, vqgan, sizes = parts(a.size)
    device = PartialState(cpu=a.device == "cpu").device
    number = itertools.count()
    with tempfile.TemporaryDirectory() as directory:
        write_random_shards(Path(directory), vqgan.config, clip.embedding_dim)
        settings = GPTSettings(shards=Path(directory), run=Path("unused"), batch=a.batch,
                               dtype=a.dtype, compile=a.compile, **sizes)
        data = shards.read_shards(settings.shards)
        gpt = make_gpt(settings, data)
        training = make_training(GPTTask, settings, gpt, data)
        calls = {"clipgen": lambda: training.step(next(number))}
        memory = {"clipgen": warm_up(calls["clipgen"], device)}  # before the encoders come
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        pixels = Pixels(a.batch, clip, vqgan, device)
        public = make_training(PublicTask, settings, gpt, pixels)
        calls["public"] = lambda: public.step(next(number))
        memory["public"] = warm_up(calls["public"], device) - held
        batch = torch.arange(a.batch)
        calls["encoding"] = lambda: pixels.rows(batch, batch)
        took = {name: [] for name in calls}
        block = -(-a.steps // BLOCKS)
        for first in tqdm(range(0, a.steps, block), desc="measuring", file=sys.stderr):
            for name, call in calls.items():
                took[name].append(seconds(call, min(block, a.steps - first), device))
    each = {name: statistics.median(values) for name, values in took.items()}
    length, peak = data.length, peak_flops(device)
    results = []
    for name in memory:
        codes = a.batch * length / each[name]
        operations = operations_per_code(gpt) * codes
        results.append({
            "name": name, "images_per_s": codes / length, "codes_per_s": codes,
            "ms_per_step": 1000 * each[name], "tflops": operations / 1e12,
            "mfu": operations / peak if peak else None, "peak_bytes": memory[name]})
    return {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "dtype": a.dtype, "compile": a.compile, "size": a.size, "batch": a.batch,
            "steps": a.steps, "results": results,
            "encoding_share": each["encoding"] / each["public"],
            "ratio": each["public"] / each["clipgen"]}


def table(r: dict[str, Any]) -> str:
    compiled = ", compiled" if r["compile"] else ""
    lines = [f"{r['size']} on {r['device']}, batch {r['batch']}, {r['dtype']}{compiled}; "
             "public: float32",
             f"{'':8}{'images/s':>10}{'codes/s':>11}{'ms/step':>10}{'TFLOP/s':>9}{'MFU':>8}"
             f"{'peak GB':>9}"]
    for x in r["results"]:
        mfu = "-" if x["mfu"] is None else f"{x['mfu']:.1%}"
        lines.append(f"{x['name']:8}{x['images_per_s']:10.4g}{x['codes_per_s']:11.0f}"
                     f"{x['ms_per_step']:10.4g}{x['tflops']:9.3g}{mfu:>8}"
                     f"{x['peak_bytes'] / 1e9:9.2f}")
    return "\n".join([*lines, f"ratio {r['ratio']:.2f}; VQGAN and CLIP take "
                              f"{r['encoding_share']:.0%} of the public way's step"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m scripts.benchmark train", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--size", help="'published' (random weights) or a bundle's directory (default: published "
        "on CUDA, weights/emoji on a CPU)")
    add("--batch", type=positive, default=64, help="images in a step (64)")
    add("--device", choices=("cpu", "cuda"), help="(default: CUDA if there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="of our autocast (default: bfloat16 on "
        "CUDA where it has it, else float32)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile in our step "
        "(default: on CUDA)")
    add("--steps", type=positive, default=20, help=f"timed steps of each way, in {BLOCKS} "
        "blocks or fewer (20)")
    a = p.parse_args(arguments)
    on_cuda = settle(a)
    modern = default_dtype(torch.device(a.device)) is torch.bfloat16
    a.dtype = a.dtype or ("bfloat16" if modern else "float32")
    a.compile = on_cuda if a.compile is None else a.compile
    return a
