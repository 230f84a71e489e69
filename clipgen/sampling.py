"""Sampling: embeddings and seeds to codes, one GPT step with a KV cache for each code."""

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

# Matrix products round differently for different batch sizes.  If every block has the same size, an
# image depends on its seed alone, not on the number of images in the call.  Where the products of
# all sizes are equal (`rows_agree`), a few images use the smallest block that holds them.
ROWS = 16
SIZES = 1, 2, 4, 8, ROWS
BUCKET = 64  # a captured step reads the cache up to the next multiple of this
FEW = 128  # so many of the likeliest codes usually include all that top-p keeps
SORTED = 1024  # for a top-k up to this a captured step sorts this many codes, otherwise all
FREE = -1  # in forced codes: draw the code at this position
SEEDS = 2**31  # seeds are from 0 to SEEDS - 1 and wrap around


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
    # Above 1000 nothing changes any more, and very large numbers overflow float32.
    for name, value, high in (("temperature", temperature, 1000), ("top_p", top_p, 1),
                              ("guidance", guidance, 1000)):
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= high:
            raise ValueError(f"{name} must be a number from 0 to {high}, got {value!r}")


def filter_logits(logits: Tensor, temperature: float, top_k: int, top_p: float
                  ) -> tuple[Tensor, Tensor]:
    """Divide by the temperature, then apply top-k (0: all codes), then top-p (1: all codes).

    logits (N, K) -> (probabilities (N, k) in descending order, their codes int64 (N, k)).  Codes
    that top-p removes have the probability 0; the others are not normalised again.  top-p keeps the
    codes up to and including the first whose cumulative probability exceeds top_p.  Codes at the
    end that are removed in every row may be missing from the result.
    """
    size, logits = logits.shape[1], logits.float()
    k = top_k if 0 < top_k < size else size
    temperature = max(temperature, 1e-6)
    if k == size > FEW and top_p < 1 and logits.device.type == "cpu":
        # Sorting all codes takes longer than the rest of a small step.  Reading a value back
        # costs nothing on a CPU.
        best, codes = logits.topk(FEW, dim=1)
        probabilities = ((logits - best[:, :1]) / temperature).softmax(1)
        if (probabilities.gather(1, codes).sum(1) <= top_p).any():
            # The first codes stay the same and in the same order: no row may depend on another row.
            rest = logits.scatter(1, codes, float("-inf")).topk(size - FEW, dim=1).indices
            codes = torch.cat([codes, rest], dim=1)
        return filter_top_p(probabilities.gather(1, codes), top_p), codes
    best, codes = logits.topk(k, dim=1)
    # The largest logit is subtracted first, so that a small temperature cannot overflow.
    probabilities = ((best - best[:, :1]) / temperature).softmax(1)
    return (filter_top_p(probabilities, top_p) if top_p < 1 else probabilities), codes


def filter_captured(logits: Tensor, temperature: Tensor, most: int, top_p: Tensor, top_k: Tensor
                    ) -> tuple[Tensor, Tensor]:
    """`filter_logits` for a captured step: the settings are 0-d tensors, read at every replay.

    temperature is above 0.  An infinite top_p or top_k keeps all codes; a finite top_k is at most
    `most`.
    """
    best, codes = logits.float().topk(min(most, logits.shape[1]), dim=1)
    scaled = (best - best[:, :1]) / temperature
    positions = torch.arange(best.shape[1], device=logits.device)
    scaled = scaled.masked_fill(positions >= top_k, float("-inf"))
    return filter_top_p(scaled.softmax(1), top_p), codes


def filter_top_p(probabilities: Tensor, top_p: float | Tensor) -> Tensor:
    """Probabilities (N, k) in descending order, with 0 for the codes that top-p removes."""
    before = probabilities.cumsum(1).roll(1, 1)  # cumulative probability of the codes before
    before[:, 0] = 0
    removed = before > top_p
    removed[:, 0] = False
    return probabilities.masked_fill(removed, 0)


def draw(probabilities: Tensor, codes: Tensor, uniform: Tensor) -> Tensor:
    """Inverse CDF: probabilities (N, k) of codes (N, k), uniform (N,) in [0, 1) -> codes (N,)."""
    cdf = probabilities.cumsum(1)
    index = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)
    last = (probabilities > 0).sum(1, keepdim=True) - 1  # rounding must not select a removed code
    return codes.gather(1, index.minimum(last).clamp(min=0))[:, 0]


def uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """Uniform numbers (N, steps) in [0, 1), one row from the CPU generator of each seed.

    Seeds are taken modulo 2**31.
    """
    return torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(seed % SEEDS))
                        for seed in seeds])


def check_forced(forced: Tensor, shape: tuple[int, int], codebook_size: int) -> Tensor:
    """`forced` as int64 on the CPU.  ValueError: a wrong dtype, shape or code."""
    if forced.is_floating_point() or forced.is_complex() or forced.dtype is torch.bool:
        raise ValueError(f"forced codes must be whole numbers, got {forced.dtype}")
    if tuple(forced.shape) != shape:
        raise ValueError(f"forced codes must have shape {shape}, got {tuple(forced.shape)}")
    forced = forced.to("cpu", torch.int64)
    outside = forced[(forced < FREE) | (forced >= codebook_size)]
    if len(outside):
        raise ValueError(f"forced codes must be from 0 to {codebook_size - 1}, or {FREE} where "
                         f"a code is drawn, got {outside[0]}")
    return forced


class Settings(NamedTuple):
    """The sampling settings: those of `filter_logits`, and the guidance."""

    temperature: float | Tensor
    top_k: int
    top_p: float | Tensor
    guidance: float | Tensor
    limit: Tensor | None = None


class Sampler:
    """Samples codes from a GPT.  Owns the static buffers and, on CUDA, the captured steps.

    On a CPU `self.gpt` is a copy of the given GPT with packed weights, or with `int8` weights of 8
    bits.  ValueError: int8 without float32 weights, or on a machine that does not support it.
    """

    def __init__(self, gpt: GPT, int8: bool = False):
        self.gpt = rounded(gpt) if int8 else packed(gpt, ROWS)
        self.sizes = SIZES if rows_agree(self.gpt, (*SIZES, 2 * ROWS)) else (ROWS,)
        self.blocks: dict[bool, RowBlock] = {}  # by guided or not: guidance doubles the rows
        self.lock = threading.Lock()  # one call at a time uses the blocks

    def prepare(self, top_k: int, guidance: float) -> None:
        """Allocate what `sample` needs for ROWS images or more; on CUDA also capture the steps."""
        with torch.inference_mode():
            self.block(ROWS, guidance != 1).prepare(top_k)

    def sample(self, embeddings: Tensor, seeds: Sequence[int], temperature: float, top_k: int,
               top_p: float, guidance: float, forced: Tensor | None = None,
               negative: Tensor | None = None,
               progress: Callable[[int, int], None] | None = None) -> Tensor:
        """embeddings (N, D) unit rows, seeds: N ints -> codes int64 (N, block_size) on the CPU.

        `forced`: int codes (N, block_size) to keep, -1 where a code is drawn.  `negative`: a unit
        embedding (D,) that guidance uses instead of the null embedding.  `progress` is called after
        every step with the number of codes so far and the number of all codes.

        ValueError: a setting out of range; not one seed for each row; an embedding of another width
        than the GPT's; guidance other than 1 without a null embedding and without `negative`;
        forced codes of a wrong shape or outside the codebook.  FloatingPointError: logits that are
        not finite.  Calls from several threads run one after the other.
        """
        check_settings(temperature, top_k, top_p, guidance)
        seeds = [whole_number("seed", seed, 0) for seed in seeds]
        # A temperature of 0 means the likeliest code, which is top-k 1.
        settings = Settings(temperature or 1.0, int(top_k) if temperature else 1, top_p, guidance)
        config = self.gpt.config
        if guidance != 1 and not config.null_embedding and negative is None:
            raise ValueError(f"guidance {guidance} needs a GPT that was trained with condition "
                             "dropout, which this GPT was not: use guidance 1")
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
                padding = block.rows - len(own)  # copies of the last row; their codes are discarded
                e = torch.cat([e, e[-1:].expand(padding, -1)])
                block.begin(e, uniforms(own + own[-1:] * padding, config.block_size), settings,
                            None if forced is None else forced[start:start + ROWS], negative)
                for i in range(config.block_size):
                    block.advance(i)
                    if progress is not None:
                        progress(start * config.block_size + len(own) * (i + 1), result.numel())
                if not block.largest.isfinite():
                    dtype = self.gpt.position.dtype
                    fault = ("are damaged: make the bundle again" if dtype is torch.float32
                             else f"do not fit {dtype}: use float32")
                    raise FloatingPointError("the GPT's logits are not finite, so its weights "
                                             + fault)
                result[start:start + len(own)] = block.codes[:len(own)].cpu()
        return result

    def block(self, images: int, guided: bool) -> RowBlock:
        """The smallest block for that many images, at most ROWS.  The latest block is kept."""
        rows = next(size for size in self.sizes if size >= images)
        if guided not in self.blocks or self.blocks[guided].rows != rows:
            kind = StaticRowBlock if self.gpt.position.is_cuda else RowBlock
            self.blocks[guided] = kind(self.gpt, rows, guided)
        return self.blocks[guided]


class RowBlock:
    """The state of `rows` unfinished images, and the step that adds one code to each of them."""

    def __init__(self, gpt: GPT, rows: int, guided: bool):
        config, like = gpt.config, gpt.position
        self.gpt, self.rows, self.guided = gpt, rows, guided
        both = rows * (1 + guided)  # guidance needs each image a second time, unconditioned
        self.cache = KVCache(config, both, like.device, like.dtype)
        self.x = like.new_zeros(both, config.width)  # the embedding of the last code
        self.uniforms = torch.zeros(rows, config.block_size, device=like.device)
        # A neighbour outside the image reads the last column.
        self.padded = torch.full((rows, config.block_size + 1), config.codebook_size,
                                 device=like.device)
        self.codes = self.padded[:, :-1]
        self.forced = torch.full_like(self.codes, FREE)
        self.forcing = False  # whether the step reads them
        self.places = neighbour_places(config, like.device) if config.neighbours else None
        self.modulation = self.modulations = None
        if config.modulated:
            self.modulation = like.new_zeros(config.layers, 4, both, config.width)
            self.modulations = [own.unbind() for own in self.modulation.unbind()]
        self.layout = None
        if config.layouts:
            self.layout = like.new_zeros(both, config.block_size, config.width)
        self.largest = torch.zeros((), device=like.device)  # absolute logit; NaN and infinity stay
        self.settings = Settings(1.0, 0, 1.0, 1.0)

    def prepare(self, top_k: int) -> None:
        """Does nothing: there is no graph to capture."""

    def begin(self, embeddings: Tensor, uniforms: Tensor, settings: Settings,
              forced: Tensor | None = None, negative: Tensor | None = None) -> None:
        """Start new images: embeddings (rows, D), uniforms (rows, block_size) in [0, 1).

        forced: int64 (n, block_size) of the first n images, FREE where a code is drawn.
        negative (D,): used instead of the null embedding.
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
        if self.layout is not None:
            self.layout.copy_(self.gpt.lay_out(condition))
        self.uniforms.copy_(uniforms)
        self.cache.position.zero_()
        self.largest.zero_()
        self.settings = settings

    def filter(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """`filter_logits` with the current settings."""
        own = self.settings
        return filter_logits(logits, own.temperature, own.top_k, own.top_p)

    def advance(self, position: int) -> None:
        """Add the code at `position`; all codes before it must be there."""
        self.step(position + 1, True)

    def step(self, prefix: int, exact: bool) -> None:
        """One step on the buffers, never waiting for the device; arguments as `KVCache.look_at`."""
        gpt, at, own = self.gpt, self.cache.position, self.settings
        self.cache.look_at(prefix, exact)
        logits = gpt.step(self.x, self.cache, self.modulations, self.layout).float()
        low, high = logits.aminmax()  # abs() would copy all logits
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
    """A RowBlock whose changing values are tensors, so that CUDA graphs can replay its step.

    There is one graph for each bucket of the cache and each number of sorted codes.  All graphs
    share one memory pool: they never run at the same time, and the buffers hold all that outlives a
    step.  Without CUDA the step is called directly; the tests use that.
    """

    def __init__(self, gpt: GPT, rows: int, guided: bool):
        super().__init__(gpt, rows, guided)
        self.forcing = True  # a captured step always reads them: one graph serves both cases
        self.numbers = torch.ones(4, device=self.x.device)
        temperature, top_p, guidance, limit = self.numbers.unbind()
        self.settings = Settings(temperature, 0, top_p, guidance, limit)
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        if self.x.is_cuda:  # a memory pool works within one stream only
            self.pool = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream(self.x.device)

    def prepare(self, top_k: int) -> None:
        """Capture the steps for this top_k that are not captured yet."""
        size, length = self.gpt.config.codebook_size, self.gpt.config.block_size
        few = 0 < top_k <= SORTED < size
        self.settings = self.settings._replace(top_k=SORTED if few else size)
        for prefix in sorted({self._bucket(i) for i in range(length)}, reverse=True):
            key = prefix, self.settings.top_k
            if self.x.is_cuda and key not in self.graphs:
                self.graphs[key] = self._capture(prefix)

    def begin(self, embeddings: Tensor, uniforms: Tensor, settings: Settings,
              forced: Tensor | None = None, negative: Tensor | None = None) -> None:
        self.prepare(settings.top_k)  # first, since capturing runs the step and changes the buffers
        super().begin(embeddings, uniforms, self.settings, forced, negative)
        self.forcing = True
        top_p = settings.top_p if settings.top_p < 1 else float("inf")
        self.numbers.copy_(torch.tensor([max(settings.temperature, 1e-6), top_p, settings.guidance,
                                         settings.top_k or float("inf")]))
        self.cache.store.zero_()  # new memory, or images that overflowed, may hold NaN

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
            stream = self.stream  # the warm-up before a capture must run on a side stream
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
