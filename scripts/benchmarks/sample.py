"""Speed of sampling beside two other ways of doing the same, in one run.

    python -m scripts.benchmark sample --weights weights/emoji
    python -m scripts.benchmark sample --size published --rows 1,16 --baseline uncached,transformers
    python -m scripts.benchmark sample --busy 2

clipgen       the step of `clipgen.sampling`; rows that pad a block cost time and count not
uncached      the public algorithm: at every step a full pass over all that is there so far, with
              the same block and kernels (F.linear, SDPA) and the head on every position; too slow
              to run whole, so it is timed at 4 steps spread evenly over the image
transformers  Hugging Face's GPT-2 of the same shape with its own `generate` and static cache of an
              image's length (an optional dependency: pip install transformers)

All draw with temperature 1, top-k 500, top-p 0.95 and no guidance.  A step adds one code to every
row; --steps of them are spread evenly over the image, which matters as later ones read more cache.
The ways take turns, several rounds long, since machines are noisy; numbers are medians.

GB/s counts what a step must read, the weights and the cache, once for every block of rows, and the
share is that of a large copy (read and write) of the same run.  The peak of memory is the
allocator's on CUDA, the weights of ways measured earlier included, and the whole process's until
then on a CPU.  With --candidates the parts from a text to image files are timed too, with the
bundle's own settings.

With --busy, on a CPU, that many busy processes are put beside a whole `generate`, in the rest's
place: benchmarks/busy.py.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from clipgen import ClipGen, bundle
from clipgen.clip import CLIP, CLIPConfig
from clipgen.device import default_dtype
from clipgen.gpt import GPT, GPTConfig
from clipgen.pipeline import to_image
from clipgen.sampling import ROWS, RowBlock, Sampler, Settings, draw, filter_logits, uniforms
from clipgen.vqgan import VQGAN, VQGANConfig
from scripts.benchmarks import busy
from scripts.benchmarks.device import settle
from scripts.training.cli import positive, whole
from scripts.training.trainer import memory_gb

ROUNDS = 3
UNCACHED_STEPS = 4
DRAWN = Settings(temperature=1.0, top_k=500, top_p=0.95, guidance=1.0)
TEXT = "a cat on the beach at night"


def spread(steps: int, length: int) -> list[int]:
    """That many of `length` steps, evenly spread; all of them if steps is as large."""
    count = min(steps, length)
    return [int((i + 0.5) * length / count) for i in range(count)]


def inputs(gpt: GPT, rows: int) -> tuple[Tensor, Tensor]:
    """Random unit embeddings (rows, D) on the GPT's device and uniforms (rows, block_size)."""
    embeddings = F.normalize(torch.randn(rows, gpt.config.embedding_dim), dim=1)
    return embeddings.to(gpt.position), uniforms(range(rows), gpt.config.block_size)


def blocks(sampler: Sampler, rows: int) -> list[RowBlock]:
    """Those that so many images take."""
    return [sampler.block(min(ROWS, rows - start), guided=False) for start in range(0, rows, ROWS)]


def cached(sampler: Sampler, rows: int, steps: int) -> tuple[Callable[[], Any], int]:
    """Our steps as one call, and how many there are."""
    taken = blocks(sampler, rows)
    for block in {*taken}:
        block.begin(*inputs(sampler.gpt, block.rows), DRAWN)
    places = spread(steps, sampler.gpt.config.block_size)

    def call() -> None:
        for block in taken:
            for i in places:
                block.cache.position.fill_(i)
                block.advance(i)

    return call, len(places)


def uncached(gpt: GPT, rows: int, steps: int) -> tuple[Callable[[], Any], int]:
    """The public algorithm's steps as one call, and how many there are."""
    embeddings, u = inputs(gpt, rows)
    u = u.to(embeddings.device)
    codes = torch.randint(gpt.config.codebook_size, u.shape, device=u.device)
    places = spread(min(steps, UNCACHED_STEPS), gpt.config.block_size)

    def call() -> None:
        for i in places:
            logits = gpt(embeddings, codes[:, :i])[:, -1]
            draw(*filter_logits(logits, *DRAWN[:3]), u[:, i])

    return call, len(places)


def hugging_face(gpt: GPT) -> Any:
    """A random GPT-2 of the same shape, as `transformers` makes it."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
        from transformers.utils import logging
    except ImportError:
        raise ValueError("--baseline transformers needs the package transformers: pip install "
                         "transformers") from None
    logging.set_verbosity_error()
    c = gpt.config
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=c.codebook_size, n_positions=c.block_size, n_embd=c.width, n_layer=c.layers,
        n_head=c.heads, activation_function="gelu", tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=None))
    model.generation_config.disable_compile = True  # on CUDA it would compile by itself
    return model.eval().requires_grad_(False).to(gpt.position)


def generating(model: Any, rows: int, steps: int) -> tuple[Callable[[], Any], int]:
    """Steps of the model's own `generate` as one call, and how many there are."""
    from transformers import StaticCache

    start = torch.zeros(rows, 1, dtype=torch.int64, device=model.device)
    count = min(steps, model.config.n_positions - 1)  # the start token takes a place

    def call() -> None:
        made = model.generate(start, attention_mask=torch.ones_like(start), do_sample=True,
                              temperature=DRAWN.temperature, top_k=DRAWN.top_k, top_p=DRAWN.top_p,
                              max_new_tokens=count, pad_token_id=0, past_key_values=StaticCache(
                                  config=model.config, max_cache_len=model.config.n_positions))
        assert made.shape == (rows, count + 1)

    return call, count


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def copy_gb_per_s(device: torch.device) -> float:
    """What a large copy reaches, reading and writing."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    took = [seconds(lambda: target.copy_(source), device) for _ in range(8)]
    return 2 * source.numel() / statistics.median(took[1:]) / 1e9


def bytes_per_step(config: GPTConfig, weight: int, cached: int, passes: Sequence[int]) -> float:
    """What one step must read: for every pass the weights, of so many bytes each, without the
    tables it looks codes and places up in, and half the cache of so many rows, the mean over an
    image, of `cached` bytes a number."""
    c = config
    layer = 12 * c.width**2 + 13 * c.width  # matrices; biases and norms
    weights = weight * (c.layers * layer + 2 * c.width + (c.width + 1) * c.codebook_size)
    cache = cached * c.layers * c.width * c.block_size  # of keys and of values, by half
    return sum(weights + rows * cache for rows in passes)


def bundle_of(size: str, device: torch.device, dtype: torch.dtype) -> bundle.Bundle:
    """A bundle, or random weights of the published sizes."""
    if size != "published":
        return bundle.load_bundle(size, device, dtype)
    clip, vqgan = CLIP(CLIPConfig.published()), VQGAN(VQGANConfig.published())
    gpt = GPT(GPTConfig.published())
    gpt.initialise()
    for part in (clip, vqgan, gpt):
        part.eval().requires_grad_(False).to(device)
    return bundle.Bundle(clip, vqgan, gpt.to(dtype),
                         bundle.SamplingDefaults(top_k=DRAWN.top_k, top_p=DRAWN.top_p), {},
                         Path(size))


def time_parts(model: ClipGen, candidates: int, images: int) -> dict[str, float]:
    """Seconds of each part of `ClipGen.generate` and of writing WebP files, in order."""
    device, found = model.clip.device, {}
    with tempfile.TemporaryDirectory() as directory:

        def save() -> None:
            best = found["scores"].topk(images).indices.tolist()
            for i in best:
                to_image(found["pixels"][i]).save(Path(directory) / f"{i}.webp", quality=80)

        def part(name: str, call: Callable[[], Any]) -> Callable[[], None]:
            return lambda: found.__setitem__(name, call())

        calls = {
            "text": part("embedding", lambda: model.clip.embed_texts([TEXT])),
            "sampling": part("codes", lambda: model.sample(
                found["embedding"].expand(candidates, -1), range(candidates))),
            "decoding": part("pixels", lambda: model.decode(found["codes"])),
            "ranking": part("scores", lambda: (model.clip.embed_pixels(found["pixels"])
                                               @ found["embedding"][0])),
            "saving": save}
        rounds = [{name: seconds(call, device) for name, call in calls.items()} for _ in range(2)]
    return rounds[1]  # the first is warm-up


@torch.inference_mode()
def measure(a: argparse.Namespace) -> dict[str, Any]:
    if a.busy:
        return busy.measure(a, TEXT)
    torch.manual_seed(0)
    device = torch.device(a.device)
    int8 = a.dtype == "int8"  # ours alone: the baselines are float32 then
    own = bundle_of(a.size, device, torch.float32 if int8 else getattr(torch, a.dtype))
    model, gpt = ClipGen(own, int8), own.gpt
    del own
    if not a.baseline:
        gpt = model.gpt  # on a CPU the plain weights go
    ways: dict[str, Callable[[int], tuple[Callable[[], Any], int]]] = {
        "clipgen": lambda rows: cached(model.sampler, rows, a.steps)}
    if "uncached" in a.baseline:
        ways["uncached"] = lambda rows: uncached(gpt, rows, a.steps)
    if "transformers" in a.baseline:
        other: list[Any] = []  # made when it is its turn, so that the peaks before are without it

        def transformers(rows: int) -> tuple[Callable[[], Any], int]:
            other.extend([] if other else [hugging_face(gpt)])
            return generating(other[0], rows, a.steps)

        ways["transformers"] = transformers
    calls, peaks = {}, {}
    for name, rows in itertools.product(ways, a.rows):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        calls[name, rows], count = ways[name](rows)
        if name != "uncached":  # nothing to warm up but seconds to lose
            calls[name, rows]()
        peaks[name, rows] = round(1e9 * memory_gb(device))
        calls[name, rows] = calls[name, rows], count
    took: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    copies = []
    for _ in tqdm(range(ROUNDS), desc="measuring", file=sys.stderr):
        copies.append(copy_gb_per_s(device))
        for key, (call, count) in calls.items():
            took[key].append(seconds(call, device) / count)
    copy = statistics.median(copies)
    results = []
    for (name, rows), values in took.items():
        each = statistics.median(values)
        weight = number = gpt.position.element_size()  # bytes of one, and of one in the cache
        passes = [0 if name == "uncached" else rows]
        if name == "clipgen":
            taken = blocks(model.sampler, rows)
            passes = [block.rows for block in taken]
            weight, number = 1 if int8 else weight, taken[0].cache.store.element_size()
        moved = bytes_per_step(gpt.config, weight, number, passes)
        results.append({
            "name": name, "rows": rows, "ms_per_step": 1000 * each,
            "images_per_s": rows / each / gpt.config.block_size,
            "gb_per_s": moved / each / 1e9, "bandwidth_share": moved / each / 1e9 / copy,
            "peak_bytes": peaks[name, rows]})
    ours = {x["rows"]: x["ms_per_step"] for x in results if x["name"] == "clipgen"}
    ratios = {name: {x["rows"]: x["ms_per_step"] / ours[x["rows"]] for x in results
                     if x["name"] == name} for name in a.baseline}
    return {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "dtype": a.dtype, "copy_gb_per_s": copy, "results": results, "ratios": ratios,
            "size": a.size, "steps": a.steps, "threads": torch.get_num_threads(),
            "candidates": a.candidates, "images": min(a.images, a.candidates),
            "parts": time_parts(model, a.candidates, min(a.images, a.candidates))
            if a.candidates else None}


def table(r: dict[str, Any]) -> str:
    if "busy" in r:
        return busy.table(r)
    where = r["device"] if r["device"] != "cpu" else f"cpu, {r['threads']} threads"
    lines = [f"{r['size']} on {where}, {r['dtype']}; a large copy: {r['copy_gb_per_s']:.1f} GB/s",
             f"{'':13}{'rows':>5}{'ms/step':>10}{'images/s':>10}{'GB/s':>8}{'share':>7}"
             f"{'peak GB':>9}{'ours is':>10}"]
    for x in r["results"]:
        ratio = r["ratios"].get(x["name"], {}).get(x["rows"])
        lines.append(f"{x['name']:13}{x['rows']:5}{x['ms_per_step']:10.4g}{x['images_per_s']:10.3g}"
                     f"{x['gb_per_s']:8.3g}{x['bandwidth_share']:7.0%}{x['peak_bytes'] / 1e9:9.2f}"
                     + (f"{f'{ratio:.2f} x':>10}" if ratio else ""))
    if "uncached" in r["ratios"]:
        lines.append(f"uncached is timed at {min(UNCACHED_STEPS, r['steps'])} evenly spread steps")
    if r["parts"]:
        parts = ", ".join(f"{name} {value:.3f}" for name, value in r["parts"].items())
        lines.append(f"{r['images']} images of {r['candidates']} candidates: "
                     f"{sum(r['parts'].values()):.3f} s ({parts})")
    return "\n".join(lines)


def counts(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    parts = text.split(",")
    if not set(parts) <= {"uncached", "transformers"}:
        raise argparse.ArgumentTypeError(f"{text!r}: give uncached, transformers, or both with a "
                                         "comma")
    return parts


def parse(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m scripts.benchmark sample", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--size", "--weights", dest="size", help="'published' (random weights) or a bundle's "
        "directory (default: published on CUDA, weights/emoji on a CPU)")
    add("--rows", type=counts, default=[1, 8, 16, 64], help="images made at once (1,8,16,64)")
    add("--device", choices=("cpu", "cuda"), help="(default: CUDA if there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16", "int8"), help="of the GPT (default: "
        "what suits the device); int8, on a CPU, is ours alone: the baselines are float32")
    add("--baseline", type=names, action="extend", default=[], help="uncached, transformers, or "
        "both with a comma")
    add("--steps", type=positive, help="steps timed in a round (default: a whole image on CUDA, "
        "16 on a CPU)")
    add("--candidates", type=whole, help="time all parts with so many, 0 for none (default: 64 on "
        "CUDA, 16 on a CPU, none for published on a CPU)")
    add("--images", type=positive, help="of them, saved (default: 8 on CUDA, 4 on a CPU)")
    add("--busy", type=whole, default=0, help="time whole images alone and beside so many busy "
        "processes, on a CPU (0)")
    a = p.parse_args(arguments)
    on_cuda = settle(a)
    if a.busy and (on_cuda or a.size == "published" or a.candidates == 0):
        raise ValueError("--busy times a bundle's images on a CPU: give --device cpu, a bundle "
                         "with --weights, and --candidates from 1")
    a.dtype = a.dtype or str(default_dtype(torch.device(a.device))).removeprefix("torch.")
    a.steps = a.steps or (10**9 if on_cuda else 16)
    a.images = a.images or (8 if on_cuda else 4)
    if a.candidates is None:
        a.candidates = 64 if on_cuda else 0 if a.size == "published" else 16
    a.baseline = sorted(set(a.baseline), reverse=True)
    return a
