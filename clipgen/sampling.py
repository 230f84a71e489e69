"""Sampling: embeddings and seeds to codes, one cached GPT step a code, in fixed row blocks."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from clipgen.gpt import GPT, KVCache

# Matrix products round differently for different row counts.  With one size for every block, an
# image depends on its own seed alone, not on how many are made beside it.
ROWS = {"cpu": 8, "cuda": 16}
SEEDS = 2**31  # seeds are 0 … SEEDS - 1 and wrap


def whole(name: str, value: float, low: int) -> int:
    """`value` as an int; ValueError unless it is a whole number from `low` on."""
    integral = isinstance(value, float) and value.is_integer()
    try:
        number = int(value) if integral else operator.index(value)
    except TypeError:
        number = low - 1
    if number < low:
        raise ValueError(f"{name} must be a whole number, {low} or more, got {value!r}")
    return number


def check_settings(temperature: float, top_k: int, top_p: float, guidance: float) -> None:
    """ValueError, in one sentence, for the first sampling setting outside its range."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    whole("top_k", top_k, 0)
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p must lie between 0 and 1, got {top_p}")
    if not 0 <= guidance < float("inf"):
        raise ValueError(f"guidance must be 0 or more, got {guidance}")


def filter_logits(logits: Tensor, temperature: float, top_k: int,
                  top_p: float) -> tuple[Tensor, Tensor]:
    """÷ temperature (above 0), then top-k, then top-p.

    logits (N, K) -> probabilities (N, k) in descending order, zero where top-p removed the code and
    not normalised again, and the codes int64 (N, k) they belong to.  top-p keeps every code up to
    and including the first that takes the cumulative probability over top_p.
    """
    size = logits.shape[1]
    k = top_k if 0 < top_k < size else size
    values, codes = logits.float().topk(k, dim=1)
    # Differences from the best, so that no temperature however small overflows.
    probabilities = ((values - values[:, :1]) / max(temperature, 1e-6)).softmax(1)
    if top_p < 1:
        before = probabilities.cumsum(1).roll(1, 1)  # cumulative probability of the better codes
        before[:, 0] = 0
        removed = before > top_p
        removed[:, 0] = False
        probabilities = probabilities.masked_fill(removed, 0)
    return probabilities, codes


def draw(probabilities: Tensor, codes: Tensor, uniform: Tensor) -> Tensor:
    """Inverse CDF: probabilities (N, k) of codes (N, k), uniform (N,) in [0, 1) -> codes (N,)."""
    cdf = probabilities.cumsum(1)
    index = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)
    last = (probabilities > 0).sum(1, keepdim=True) - 1  # rounding must not reach a removed code
    return codes.gather(1, index.minimum(last).clamp(min=0))[:, 0]


def uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """One number in [0, 1) per (image, step), (N, steps), from each image's own CPU generator.

    Seeds are taken modulo 2**31.
    """
    return torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(seed % SEEDS))
                        for seed in seeds])


class Sampler:
    """Draws codes from a GPT.  Holds the static cache and, on CUDA, the captured step."""

    def __init__(self, gpt: GPT):
        self.gpt = gpt
        self.rows = ROWS["cuda" if gpt.position.is_cuda else "cpu"]
        self.steps: dict[int, Step] = {}  # by rows of the transformer: guidance doubles them

    def prepare(self) -> None:
        """Allocate, and on CUDA capture, all that `sample` will need."""
        with torch.inference_mode():
            self._step(self.rows)
            if self.gpt.config.null_embedding:
                self._step(2 * self.rows)

    def sample(self, embeddings: Tensor, seeds: Sequence[int], temperature: float, top_k: int,
               top_p: float, guidance: float) -> Tensor:
        """embeddings (N, D) unit rows, seeds: N ints -> codes int64 (N, block_size) on the CPU.

        ValueError: a setting out of range, other than one seed a row, a width other than the GPT's,
        or guidance other than 1 with a GPT that has no null embedding.  FloatingPointError: logits
        that are not finite.
        """
        check_settings(temperature, top_k, top_p, guidance)
        top_k, seeds = int(top_k), [whole("seed", seed, 0) for seed in seeds]
        config = self.gpt.config
        if guidance != 1 and not config.null_embedding:
            raise ValueError(f"guidance {guidance} needs a GPT that was trained with condition "
                             "dropout, and this one was not: use guidance 1")
        if embeddings.dim() != 2 or embeddings.shape[1] != config.embedding_dim:
            raise ValueError(f"embeddings must have shape (N, {config.embedding_dim}), "
                             f"got {tuple(embeddings.shape)}")
        if len(seeds) != len(embeddings):
            raise ValueError(f"{len(embeddings)} embeddings need as many seeds, got {len(seeds)}")
        result = torch.empty(len(seeds), config.block_size, dtype=torch.int64)
        with torch.inference_mode():
            embeddings = embeddings.to(self.gpt.position)
            for start in range(0, len(seeds), self.rows):
                block = seeds[start:start + self.rows]
                e = embeddings[start:start + self.rows]
                padding = self.rows - len(block)  # rows that repeat the last image, thrown away
                e = torch.cat([e, e[-1:].expand(padding, -1)])
                codes = self._block(e, block + block[-1:] * padding, temperature, top_k, top_p,
                                    guidance)
                result[start:start + len(block)] = codes[:len(block)].cpu()
        return result

    def _block(self, embeddings: Tensor, seeds: list[int], temperature: float, top_k: int,
               top_p: float, guidance: float) -> Tensor:
        """One full block: embeddings (rows, D) -> codes (rows, block_size) on the GPT's device."""
        gpt, device, guided = self.gpt, embeddings.device, guidance != 1
        u = uniforms(seeds, gpt.config.block_size).to(device)
        out = torch.empty(u.shape, dtype=torch.int64, device=device)
        if guided:
            null = gpt.null_embedding.expand(len(embeddings), -1)
            embeddings = torch.cat([embeddings, null])
        x = gpt.condition(embeddings)
        step = self._step(len(x))
        finite = torch.ones((), dtype=torch.bool, device=device)
        for i in range(gpt.config.block_size):
            logits = step(x, i).float()
            finite &= logits.isfinite().all()
            if guided:
                conditional, null = logits.chunk(2)
                logits = null + guidance * (conditional - null)
            if temperature == 0:
                out[:, i] = logits.argmax(1)
            else:
                probabilities, codes = filter_logits(logits, temperature, top_k, top_p)
                out[:, i] = draw(probabilities, codes, u[:, i])
            x = gpt.code_embedding(out[:, i])
            if guided:
                x = torch.cat([x, x])
        if not finite:
            raise FloatingPointError("the GPT's logits are not finite: its weights do not fit "
                                     f"{gpt.position.dtype}, use float32")
        return out

    def _step(self, rows: int) -> Step:
        if rows not in self.steps:
            self.steps[rows] = (GraphStep if self.gpt.position.is_cuda else Step)(self.gpt, rows)
        return self.steps[rows]


class Step:
    """The cached GPT step of one row count: (x (rows, C), position) -> logits (rows, K)."""

    def __init__(self, gpt: GPT, rows: int):
        self.gpt = gpt
        self.cache = KVCache(gpt.config, rows, gpt.position.device, gpt.position.dtype)

    def __call__(self, x: Tensor, position: int) -> Tensor:
        self.cache.position = position
        return self.gpt.step(x, self.cache)


class GraphStep(Step):
    """The same, captured once as a CUDA graph and replayed over static buffers."""

    def __init__(self, gpt: GPT, rows: int):
        super().__init__(gpt, rows)
        self.x = torch.zeros(rows, gpt.config.width, device=gpt.position.device,
                             dtype=gpt.position.dtype)
        self.cache.position = torch.zeros((), dtype=torch.int64, device=self.x.device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.x.device):
            stream = torch.cuda.Stream()  # a capture wants its warm-up on a side stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    gpt.step(self.x, self.cache)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.logits = gpt.step(self.x, self.cache)

    def __call__(self, x: Tensor, position: int) -> Tensor:
        if position == 0:
            self.cache.reset()
        self.x.copy_(x)
        self.cache.position.fill_(position)  # a kernel argument, so the loop never waits
        self.graph.replay()
        return self.logits
