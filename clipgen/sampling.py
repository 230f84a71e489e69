"""Sampling: embeddings and seeds to codes, one cached GPT step a code, in blocks of rows."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from clipgen.gpt import GPT, KVCache, neighbour_places
from clipgen.packed import packed, rounded, rows_agree

# Matrix products round differently for different row counts.  With one size for every block, an
# image depends on its own seed alone, not on how many are made beside it.  Where all products are
# found to agree (`rows_agree`), few images take the smallest block that holds them.
ROWS = 16
SIZES = 1, 2, 4, 8, ROWS
BUCKET = 64  # a captured step reads its cache up to the next multiple of this
FEW = 128  # of the likeliest codes usually hold what top-p keeps
SORTED = 1024  # a captured step sorts so many codes for any top-k up to it, else all
FREE = -1  # of forced codes: the place of one that is to be drawn
SEEDS = 2**31  # seeds are 0 … SEEDS - 1 and wrap


def whole_number(name: str, value: float, low: int) -> int:
    """`value` as an int; ValueError unless it is a whole number from `low` on."""
    integral = isinstance(value, float) and value.is_integer()
    try:
        number = int(value) if integral else operator.index(value)
    except TypeError:
        number = low - 1
    if number < low or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, {low} or more, got {value!r}")
    return number


def check_settings(temperature: float, top_k: int, top_p: float, guidance: float) -> None:
    """ValueError, in one sentence, for the first sampling setting outside its range."""
    whole_number("top_k", top_k, 0)
    # No one needs more than 1000, and far beyond it float32 ends.
    for name, value, high in (("temperature", temperature, 1000), ("top_p", top_p, 1),
                              ("guidance", guidance, 1000)):
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= high:
            raise ValueError(f"{name} must be a number from 0 to {high}, got {value!r}")


def filter_logits(logits: Tensor, temperature: float, top_k: int, top_p: float
                  ) -> tuple[Tensor, Tensor]:
    """÷ temperature, then top-k (0: all), then top-p (1: all).

    logits (N, K) -> probabilities (N, k) in descending order, zero where top-p removed the code and
    not normalised again, and the codes int64 (N, k) they belong to.  top-p keeps every code up to
    and including the first that takes the cumulative probability over top_p.  Codes at the far end
    that are removed in every row may be left out of the result.
    """
    size, logits = logits.shape[1], logits.float()
    k = top_k if 0 < top_k < size else size
    temperature = max(temperature, 1e-6)
    if k == size > FEW and top_p < 1 and logits.device.type == "cpu":
        # Sorting all costs more than the rest of a small step, looking at a value nothing on a CPU.
        best, codes = logits.topk(FEW, dim=1)
        probabilities = ((logits - best[:, :1]) / temperature).softmax(1)
        if (probabilities.gather(1, codes).sum(1) <= top_p).any():
            # Behind the same few, equal ones in the same order: no row must depend on another one.
            rest = logits.scatter(1, codes, float("-inf")).topk(size - FEW, dim=1).indices
            codes = torch.cat([codes, rest], dim=1)
        return filter_top_p(probabilities.gather(1, codes), top_p), codes
    best, codes = logits.topk(k, dim=1)
    # Differences from the best, so that no temperature however small overflows.
    probabilities = ((best - best[:, :1]) / temperature).softmax(1)
    return (filter_top_p(probabilities, top_p) if top_p < 1 else probabilities), codes


def filter_captured(logits: Tensor, temperature: Tensor, most: int, top_p: Tensor, top_k: Tensor
                    ) -> tuple[Tensor, Tensor]:
    """The same in a captured step, whose settings are 0-d tensors that every replay reads.

    temperature is above 0; top_p and top_k are infinite to keep all, top_k is at most `most`.
    """
    best, codes = logits.float().topk(min(most, logits.shape[1]), dim=1)
    scaled = (best - best[:, :1]) / temperature
    positions = torch.arange(best.shape[1], device=logits.device)
    scaled = scaled.masked_fill(positions >= top_k, float("-inf"))
    return filter_top_p(scaled.softmax(1), top_p), codes


def filter_top_p(probabilities: Tensor, top_p: float | Tensor) -> Tensor:
    """Probabilities (N, k), descending, of which those that top-p removes are made zero."""
    before = probabilities.cumsum(1).roll(1, 1)  # cumulative probability of the better codes
    before[:, 0] = 0
    removed = before > top_p
    removed[:, 0] = False
    return probabilities.masked_fill(removed, 0)


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


def check_forced(forced: Tensor, shape: tuple[int, int], codebook_size: int) -> Tensor:
    """`forced` as int64 on the CPU; ValueError: no whole numbers, another shape, no such code."""
    if forced.is_floating_point() or forced.is_complex() or forced.dtype is torch.bool:
        raise ValueError(f"forced codes must be whole numbers, got {forced.dtype}")
    if tuple(forced.shape) != shape:
        raise ValueError(f"forced codes must have shape {shape}, got {tuple(forced.shape)}")
    forced = forced.to("cpu", torch.int64)
    outside = forced[(forced < FREE) | (forced >= codebook_size)]
    if len(outside):
        raise ValueError(f"forced codes must lie between 0 and {codebook_size - 1}, or be {FREE} "
                         f"where free, got {outside[0]}")
    return forced


class Settings(NamedTuple):
    """How codes are drawn: as `filter_logits` takes it, and the guidance."""

    temperature: float | Tensor
    top_k: int
    top_p: float | Tensor
    guidance: float | Tensor
    limit: Tensor | None = None


class Sampler:
    """Draws codes from a GPT.  Holds the static buffers and, on CUDA, the captured steps.

    On a CPU `gpt` becomes a copy of the one given, whose weights are packed, or with `int8` rounded
    to 8 bits (from float32; ValueError where this machine cannot).
    """

    def __init__(self, gpt: GPT, int8: bool = False):
        self.gpt = rounded(gpt) if int8 else packed(gpt, ROWS)
        self.sizes = SIZES if rows_agree(self.gpt, (*SIZES, 2 * ROWS)) else (ROWS,)
        self.blocks: dict[bool, RowBlock] = {}  # by whether they are guided, which doubles the rows
        self.lock = threading.Lock()  # one call at a time has the blocks

    def prepare(self, top_k: int, guidance: float) -> None:
        """Allocate, and on CUDA capture, what `sample` needs for ROWS images or more so drawn."""
        with torch.inference_mode():
            self.block(ROWS, guidance != 1).prepare(top_k)

    def sample(self, embeddings: Tensor, seeds: Sequence[int], temperature: float, top_k: int,
               top_p: float, guidance: float, forced: Tensor | None = None,
               negative: Tensor | None = None,
               progress: Callable[[int, int], None] | None = None) -> Tensor:
        """embeddings (N, D) unit rows, seeds: N ints -> codes int64 (N, block_size) on the CPU.

        `forced`: int codes (N, block_size) that are written instead of drawn ones, -1 where free.
        `negative`: a unit embedding (D,) in the null embedding's place, to be steered away from.
        `progress` is called after every step with the codes made so far and their number.

        ValueError: a setting out of range, other than one seed a row, a width other than the GPT's,
        guidance other than 1 with a GPT that has no null embedding and no `negative`, forced codes
        of another shape or outside the codebook.  FloatingPointError: logits that are not finite.
        Threads may call it at the same time; they wait for each other.
        """
        check_settings(temperature, top_k, top_p, guidance)
        seeds = [whole_number("seed", seed, 0) for seed in seeds]
        # The best code alone is what a temperature of 0 means.
        settings = Settings(temperature or 1.0, int(top_k) if temperature else 1, top_p, guidance)
        config = self.gpt.config
        if guidance != 1 and not config.null_embedding and negative is None:
            raise ValueError(f"guidance {guidance} needs a GPT that was trained with condition "
                             "dropout, and this one was not: use guidance 1")
        if embeddings.dim() != 2 or embeddings.shape[1] != config.embedding_dim:
            raise ValueError(f"embeddings must have shape (N, {config.embedding_dim}), "
                             f"got {tuple(embeddings.shape)}")
        if len(seeds) != len(embeddings):
            raise ValueError(f"{len(embeddings)} embeddings need as many seeds, got {len(seeds)}")
        if not embeddings.isfinite().all():
            raise ValueError("embeddings must be finite")
        if negative is not None and negative.shape != (config.embedding_dim,):
            raise ValueError(f"negative must have shape ({config.embedding_dim},), "
                             f"got {tuple(negative.shape)}")
        result = torch.empty(len(seeds), config.block_size, dtype=torch.int64)
        if forced is not None:
            forced = check_forced(forced, tuple(result.shape), config.codebook_size)
        with self.lock, torch.inference_mode():
            embeddings = embeddings.to(self.gpt.position)
            for start in range(0, len(seeds), ROWS):
                own = seeds[start:start + ROWS]
                e = embeddings[start:start + ROWS]
                block = self.block(len(own), guidance != 1)
                padding = block.rows - len(own)  # rows that repeat the last, thrown away
                e = torch.cat([e, e[-1:].expand(padding, -1)])
                block.begin(e, uniforms(own + own[-1:] * padding, config.block_size), settings,
                            None if forced is None else forced[start:start + ROWS], negative)
                for i in range(config.block_size):
                    block.advance(i)
                    if progress is not None:
                        progress(start * config.block_size + len(own) * (i + 1), result.numel())
                if not block.largest.isfinite():
                    dtype = self.gpt.position.dtype
                    fault = ("are damaged, make the bundle again" if dtype is torch.float32
                             else f"do not fit {dtype}, use float32")
                    raise FloatingPointError("the GPT's logits are not finite: its weights "
                                             + fault)
                result[start:start + len(own)] = block.codes[:len(own)].cpu()
        return result

    def block(self, images: int, guided: bool) -> RowBlock:
        """The smallest block that holds so many images, up to ROWS; the last one is kept."""
        rows = next(size for size in self.sizes if size >= images)
        if guided not in self.blocks or self.blocks[guided].rows != rows:
            kind = StaticRowBlock if self.gpt.position.is_cuda else RowBlock
            self.blocks[guided] = kind(self.gpt, rows, guided)
        return self.blocks[guided]


class RowBlock:
    """`rows` images in the making, and the whole step that adds a code to each."""

    def __init__(self, gpt: GPT, rows: int, guided: bool):
        config, like = gpt.config, gpt.position
        self.gpt, self.rows, self.guided = gpt, rows, guided
        both = rows * (1 + guided)  # with guidance, the same images without their condition
        self.cache = KVCache(config, both, like.device, like.dtype)
        self.x = like.new_zeros(both, config.width)  # the embedding of the last code
        self.uniforms = torch.zeros(rows, config.block_size, device=like.device)
        # The last column is what a neighbour outside the image looks at.
        self.padded = torch.full((rows, config.block_size + 1), config.codebook_size,
                                 device=like.device)
        self.codes = self.padded[:, :-1]
        self.forced = torch.full_like(self.codes, FREE)
        self.forcing = False  # whether the step looks at them
        self.places = neighbour_places(config, like.device) if config.neighbours else None
        self.modulation = self.modulations = None
        if config.modulated:
            self.modulation = like.new_zeros(config.layers, 4, both, config.width)
            self.modulations = [own.unbind() for own in self.modulation.unbind()]
        self.largest = torch.zeros((), device=like.device)  # of all logits; keeps NaN and infinity
        self.settings = Settings(1.0, 0, 1.0, 1.0)

    def prepare(self, top_k: int) -> None:
        """Nothing: there is no graph to capture."""

    def begin(self, embeddings: Tensor, uniforms: Tensor, settings: Settings,
              forced: Tensor | None = None, negative: Tensor | None = None) -> None:
        """Start new images: embeddings (rows, D), uniforms (rows, block_size) in [0, 1).

        forced: int64 (n, block_size) of the first n images, FREE where a code is to be drawn;
        negative (D,): instead of the null embedding.
        """
        if self.guided:
            null = self.gpt.null_embedding if negative is None else negative.to(embeddings)
            embeddings = torch.cat([embeddings, null.expand(self.rows, -1)])
        self.forced.fill_(FREE)
        if forced is not None:
            self.forced[:len(forced)].copy_(forced)
        self.forcing = forced is not None
        self.x.copy_(condition := self.gpt.condition(embeddings))
        if self.modulation is not None:
            self.modulation.copy_(self.gpt.modulate(condition))
        self.uniforms.copy_(uniforms)
        self.cache.position.zero_()
        self.largest.zero_()
        self.settings = settings

    def filter(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """As `filter_logits`, by the settings."""
        own = self.settings
        return filter_logits(logits, own.temperature, own.top_k, own.top_p)

    def advance(self, position: int) -> None:
        """Add code number `position`, all before it being there."""
        self.step(position + 1, True)

    def step(self, prefix: int, exact: bool) -> None:
        """One step over the buffers, reading the cache as `KVCache.look_at` says; never waits."""
        gpt, at, own = self.gpt, self.cache.position, self.settings
        self.cache.look_at(prefix, exact)
        logits = gpt.step(self.x, self.cache, self.modulations).float()
        low, high = logits.aminmax()  # no copy of all logits, as abs() would be
        self.largest.copy_(self.largest.maximum(high).maximum(-low))
        if self.guided:
            conditional, null = logits.chunk(2)
            logits = null + own.guidance * (conditional - null)
        probabilities, codes = self.filter(logits)
        code = draw(probabilities, codes, self.uniforms.index_select(1, at)[:, 0])
        if self.forcing:
            forced = self.forced.index_select(1, at)[:, 0]
            code = torch.where(forced == FREE, code, forced)
        self.codes.index_copy_(1, at, code[:, None])
        at += 1
        x = gpt.code_embedding(code)
        if self.places is not None:
            x = x + gpt.beside(self.padded, self.places.index_select(0, at))[:, 0]
        self.x.copy_(torch.cat([x, x]) if self.guided else x)


class StaticRowBlock(RowBlock):
    """The same with tensors for all that changes, so that captured CUDA graphs can replay its step.

    One graph for each bucket of the cache and number of sorted codes.  They share one memory pool:
    no two run at once, and what outlives a step is in the buffers.  Without CUDA the step is called
    instead, which is how it is tested.
    """

    def __init__(self, gpt: GPT, rows: int, guided: bool):
        super().__init__(gpt, rows, guided)
        self.forcing = True  # a captured step always looks, so that it need not be captured twice
        self.numbers = torch.ones(4, device=self.x.device)
        temperature, top_p, guidance, limit = self.numbers.unbind()
        self.settings = Settings(temperature, 0, top_p, guidance, limit)
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        if self.x.is_cuda:  # memory is shared within one stream alone
            self.pool = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream(self.x.device)

    def prepare(self, top_k: int) -> None:
        """Capture, where it is not yet done, the steps that any such top_k takes."""
        size, length = self.gpt.config.codebook_size, self.gpt.config.block_size
        few = 0 < top_k <= SORTED < size
        self.settings = self.settings._replace(top_k=SORTED if few else size)
        for prefix in sorted({self._bucket(i) for i in range(length)}, reverse=True):
            key = prefix, self.settings.top_k
            if self.x.is_cuda and key not in self.graphs:
                self.graphs[key] = self._capture(prefix)

    def begin(self, embeddings: Tensor, uniforms: Tensor, settings: Settings,
              forced: Tensor | None = None, negative: Tensor | None = None) -> None:
        self.prepare(settings.top_k)  # before the buffers are filled: capturing runs the step
        super().begin(embeddings, uniforms, self.settings, forced, negative)
        self.forcing = True
        top_p = settings.top_p if settings.top_p < 1 else float("inf")
        self.numbers.copy_(torch.tensor([max(settings.temperature, 1e-6), top_p, settings.guidance,
                                         settings.top_k or float("inf")]))
        self.cache.store.zero_()  # for new memory and images that overflowed may hold anything

    def filter(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        own = self.settings
        return filter_captured(logits, own.temperature, own.top_k, own.top_p, own.limit)

    def advance(self, position: int) -> None:
        prefix = self._bucket(position)
        if self.x.is_cuda:
            self.graphs[prefix, self.settings.top_k].replay()
        else:
            self.step(prefix, False)

    def _bucket(self, position: int) -> int:
        return min((position // BUCKET + 1) * BUCKET, self.gpt.config.block_size)

    def _capture(self, prefix: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.x.device):
            stream = self.stream  # a capture wants its warm-up on a side stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self.cache.position.zero_()
                    self.step(prefix, False)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, pool=self.pool, stream=stream,
                                  capture_error_mode="thread_local"):
                self.step(prefix, False)
        return graph
