"""The GPT: from a CLIP embedding and the codes so far to logits of the next code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYOUT_WIDTH = 512  # of the hidden layer that mixes layouts
# (rows, columns) from the code to be predicted to one that may be added to the input, beside the
# code before it; the first few of them are.
NEIGHBOURS = (-1, 0), (-1, 1), (-1, -1), (0, -2), (-2, 0)


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT; `block_size` = codes of an image = 1 condition + (block_size - 1) codes.

    The defaults of the last four are the published GPT.  `neighbours`: how many of NEIGHBOURS are
    added to the input, the codes being a square; `modulated`: the condition scales and shifts what
    each block normalises; `squared_relu`: instead of GELU; `layouts`: how many tables, each with an
    input for every place, the condition mixes and adds to the inputs: it says what is where.
    """

    layers: int
    width: int
    heads: int
    codebook_size: int
    block_size: int
    embedding_dim: int
    null_embedding: bool = False  # learned by condition dropout; guidance needs it
    neighbours: int = 0
    modulated: bool = False
    squared_relu: bool = False
    layouts: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "codebook_size", "block_size", "embedding_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"GPT {name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"GPT width {self.width} is not a multiple of its {self.heads} heads")
        if not 0 <= self.neighbours <= len(NEIGHBOURS):
            raise ValueError(f"GPT neighbours must be from 0 to {len(NEIGHBOURS)}, got "
                             f"{self.neighbours}")
        if self.layouts < 0:
            raise ValueError(f"GPT layouts must be at least 0, got {self.layouts}")
        if self.neighbours and math.isqrt(self.block_size) ** 2 != self.block_size:
            raise ValueError(f"GPT neighbours need a square of codes, and block_size "
                             f"{self.block_size} is none: give neighbours 0")

    @classmethod
    def published(cls) -> GPTConfig:
        """The shape of the published COCO checkpoint."""
        return cls(layers=24, width=1024, heads=16, codebook_size=16384, block_size=256,
                   embedding_dim=512)


class KVCache:
    """Keys and values of every layer for a fixed block of rows, allocated once, written in place.

    `position` (1,) is where the next token goes, a tensor because a captured CUDA graph must find
    it anew at every replay.  `look_at` says how much is read.  On a CPU it is float32 whatever
    `dtype` is: attention in bfloat16 takes twice as long there.
    """

    def __init__(self, config: GPTConfig, rows: int, device: torch.device, dtype: torch.dtype):
        dtype = torch.float32 if device.type == "cpu" else dtype
        self.store = torch.empty(config.layers, 2, rows, config.heads, config.block_size,
                                 config.width // config.heads, device=device, dtype=dtype)
        self.slots = torch.arange(config.block_size, device=device)
        self.position = torch.zeros(1, device=device, dtype=torch.int64)
        self.look_at(config.block_size, True)

    def look_at(self, prefix: int, exact: bool) -> None:
        """Let the next step read the first `prefix` slots.

        exact: `position` is the last of them, prefix - 1.  Otherwise there are more, which a mask
        hides; they must be finite, which new memory need not be: under a mask 0 · NaN is NaN.
        """
        seen = self.store[..., :prefix, :]
        self.keys, self.values = (part.unbind() for part in seen.unbind(1))  # layer by layer
        self.newest, self.mask = seen[..., -1:, :].unbind(), None
        if not exact:
            hidden = self.slots[:prefix] > self.position
            self.mask = torch.zeros_like(hidden, dtype=self.store.dtype)
            self.mask = self.mask.masked_fill(hidden, float("-inf"))[None]  # (1, prefix)

    def append(self, layer: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Store kv (2, N, H, 1, d) at `position`; return keys, values, each (N, H, prefix, d)."""
        if self.mask is None:  # a plain copy is faster
            self.newest[layer].copy_(kv)
        else:
            self.store[layer].index_copy_(3, self.position, kv.to(self.store))
        return self.keys[layer], self.values[layer]


def neighbour_places(config: GPTConfig, device: torch.device) -> Tensor:
    """Where the neighbours of each place are, int64 (block_size + 1, neighbours).

    One outside the square is said to be at block_size, as are those of the place after the last.
    """
    side = math.isqrt(config.block_size)
    place = torch.arange(config.block_size + 1, device=device)[:, None]
    steps = torch.tensor(NEIGHBOURS[:config.neighbours], device=device).view(-1, 2)
    rows, columns = place // side + steps[:, 0], place % side + steps[:, 1]
    inside = (rows >= 0) & (columns >= 0) & (columns < side) & (place < config.block_size)
    return torch.where(inside, rows * side + columns, config.block_size)


class LinearGELU(nn.Linear):
    """A linear layer and the exact GELU of its outputs, which a packed one does in one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(super().forward(x))


class SquaredReLU(torch.autograd.Function):
    """The square of what is above 0 (arXiv 2109.08668), in half the trips to memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y * y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        y, = ctx.saved_tensors
        return (gradient * y).mul_(2)


squared_relu = SquaredReLU.apply


class LinearSquaredReLU(nn.Linear):
    """A linear layer and the squared ReLU of its outputs."""

    def forward(self, x: Tensor) -> Tensor:
        return squared_relu(super().forward(x))


class Block(nn.Module):
    """Pre-norm transformer block; the same code serves the full pass and the cached step."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        activated = LinearSquaredReLU if config.squared_relu else LinearGELU
        self.fc1 = activated(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, layer: int = 0, cache: KVCache | None = None,
                dropout: float = 0.0, modulation: Sequence[Tensor] | None = None) -> Tensor:
        """x (N, T, C); with a cache (N, C), what is at its position.

        modulation: shift and scale of what each norm gives, four of (N, 1, C); with a cache (N, C).
        """
        h = self.norm1(x)
        if modulation is not None:
            h = torch.addcmul(modulation[0], h, modulation[1])
        qkv = self.qkv(h).view(len(x), -1, 3, self.heads, x.shape[-1] // self.heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, N, H, T, d)
        if cache is None:
            a = F.scaled_dot_product_attention(*qkv, is_causal=True)
        else:
            k, v = cache.append(layer, qkv[1:])
            a = F.scaled_dot_product_attention(qkv[0].to(k), k, v, attn_mask=cache.mask).to(x)
        a = self.proj(a.transpose(1, 2).reshape(x.shape))
        x = x + (F.dropout(a, dropout, self.training) if dropout else a)
        h = self.norm2(x)
        if modulation is not None:
            h = torch.addcmul(modulation[2], h, modulation[3])
        h = self.fc2(self.fc1(h))
        return x + (F.dropout(h, dropout, self.training) if dropout else h)


class GPT(nn.Module):
    """The published GPT by config: learned positions, pre-norm, exact GELU, untied head.

    What it can have beyond that is in its config.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.position = nn.Parameter(torch.zeros(config.block_size, config.width))
        self.code_embedding = nn.Embedding(config.codebook_size, config.width)
        self.condition = nn.Linear(config.embedding_dim, config.width)
        if config.null_embedding:
            self.null_embedding = nn.Parameter(torch.zeros(config.embedding_dim))
        if config.neighbours:  # a table for each, of all codes and of none
            self.neighbour_embedding = nn.Embedding(
                config.neighbours * (config.codebook_size + 1), config.width)
        if config.modulated:
            self.modulation = nn.Linear(config.width, config.layers * 4 * config.width)
        if config.layouts:
            self.layout_hidden = LinearSquaredReLU(config.width, LAYOUT_WIDTH)
            self.layout_mix = nn.Linear(LAYOUT_WIDTH, config.layouts)
            self.layout_tables = nn.Linear(config.layouts, config.block_size * config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.codebook_size)
        self.dropout = 0.0  # set by training

    def initialise(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), residual projections scaled by 1/sqrt(2 * layers)."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() > 1 or name == "null_embedding":
                residual = name.endswith(("proj.weight", "fc2.weight"))
                nn.init.normal_(p, std=0.02 / (2 * self.config.layers) ** 0.5 if residual else 0.02)
        # Unit embeddings have entries of about D^-1/2, so that N(0, 1) keeps them at scale 1.
        nn.init.normal_(self.condition.weight, std=1.0)
        if self.config.modulated:  # at first nothing is shifted, and scaled by 1
            nn.init.zeros_(self.modulation.weight)
            with torch.no_grad():
                self.modulation.bias.view(-1, 2, self.config.width)[:, 1] = 1
        if self.config.layouts:  # at first nothing is added; the weights of the mix are near 1
            nn.init.zeros_(self.layout_tables.weight)
            nn.init.normal_(self.layout_hidden.weight, std=self.config.width ** -0.5)
            nn.init.normal_(self.layout_mix.weight, std=LAYOUT_WIDTH ** -0.5)

    def forward(self, embedding: Tensor, codes: Tensor) -> Tensor:
        """Full pass.  embedding (N, D) unit rows; codes int (N, L), L from 0 to block_size - 1;
        both are moved to the GPT's device, the embedding to its dtype.

        Returns logits (N, L + 1, codebook_size); entry i predicts code i.
        """
        length = codes.shape[1] + 1
        if length > self.config.block_size:
            raise ValueError(f"{codes.shape[1]} codes given; this GPT takes at most "
                             f"{self.config.block_size - 1} before the last one it predicts")
        embedding, codes = embedding.to(self.position), codes.to(self.position.device)
        condition, inputs = self.condition(embedding), self.code_embedding(codes)
        if self.config.neighbours:
            none = codes.new_full((len(codes), 1), self.config.codebook_size)
            places = neighbour_places(self.config, codes.device)[1:length]
            places = places.where(places < self.config.block_size, length - 1)
            inputs = inputs + self.beside(torch.cat([codes, none], dim=1), places)
        x = torch.cat([condition[:, None], inputs], dim=1)
        x = x + self.position[:length]  # (N, T, C)
        if self.config.layouts:
            x = x + self.lay_out(condition)[:, :length]
        modulations = [None] * self.config.layers
        if self.config.modulated:
            modulations = [own.unsqueeze(2).unbind() for own in self.modulate(condition)]
        for block, modulation in zip(self.blocks, modulations, strict=True):
            x = block(x, dropout=self.dropout, modulation=modulation)
        return self.head(self.norm(x))

    def beside(self, codes: Tensor, places: Tensor) -> Tensor:
        """What the neighbours add to the inputs: int (N, L), int (T, neighbours) -> (N, T, C).

        A code of codebook_size is none.
        """
        tables = torch.arange(self.config.neighbours, device=codes.device)
        indices = codes[:, places] + tables * (self.config.codebook_size + 1)
        added = F.embedding_bag(indices.flatten(0, 1), self.neighbour_embedding.weight, mode="sum")
        return added.view(len(codes), len(places), self.config.width)

    def lay_out(self, condition: Tensor) -> Tensor:
        """`condition(embedding)` (N, C) -> what is added to the inputs, (N, block_size, C)."""
        mix = self.layout_mix(self.layout_hidden(condition))
        return self.layout_tables(mix).view(len(condition), *self.position.shape)

    def modulate(self, condition: Tensor) -> Tensor:
        """`condition(embedding)` (N, C) -> shifts and scales (layers, 4, N, C) for the blocks."""
        shape = len(condition), self.config.layers, 4, self.config.width
        return self.modulation(F.gelu(condition)).view(shape).permute(1, 2, 0, 3)

    def step(self, x: Tensor, cache: KVCache,
             modulations: Sequence[Sequence[Tensor]] | None = None,
             layout: Tensor | None = None) -> Tensor:
        """One cached step.  x (N, C): `condition(embedding)` first, then `code_embedding(code)`,
        plus what is `beside` it; modulations: of `modulate`, layer by layer; layout: of `lay_out`.

        Writes the cache at `cache.position`, which the caller advances, and reads what
        `cache.look_at` said.  Returns logits (N, K).
        """
        x = x + self.position.index_select(0, cache.position)
        if layout is not None:
            x = x + layout.index_select(1, cache.position)[:, 0]
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, cache,
                      modulation=None if modulations is None else modulations[layer])
        return self.head(self.norm(x))
