"""The VQGAN: pixels to codes (encoder, quantizer) and back (decoder).

Modules and parameter names follow the published file, so converting it renames nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VQGANConfig:
    """Sizes of a VQGAN; every entry of `channels` after the first halves the resolution.

    With `patch` above 1 the first convolution sees squares of so many pixels a side as one place,
    and the last one makes them: no layer runs at full resolution, where most of the time goes.
    """

    image_size: int
    channels: tuple[int, ...]
    attention_sizes: tuple[int, ...]  # resolutions (pixels a side) that get self-attention
    blocks_per_level: int  # the decoder has one more
    code_dim: int
    codebook_size: int
    l2_normalised: bool  # compare unit vectors (ViT-VQGAN, arXiv 2110.04627)
    norm_groups: int = 32  # of GroupNorm; 0: no normalisation, which learns much faster at first
    patch: int = 1  # pixels a side of a place of the first level
    middle_attention: bool = True  # self-attention where the resolution is least

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "attention_sizes", tuple(self.attention_sizes))
        for name in ("image_size", "blocks_per_level", "code_dim", "codebook_size",
                     "patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"VQGAN {name} must be at least 1, got {getattr(self, name)}")
        if self.norm_groups < 0:
            raise ValueError(f"VQGAN norm_groups must be at least 0, got {self.norm_groups}")
        if not self.channels or any(c < 1 or c % (self.norm_groups or 1) for c in self.channels):
            raise ValueError(f"VQGAN channels must be multiples of norm_groups {self.norm_groups}, "
                             f"got {list(self.channels)!r:.60}")
        if len(self.channels) > 30:
            raise ValueError(f"VQGAN channels must be those of at most 30 levels, got "
                             f"{len(self.channels)}")
        if self.image_size % self.factor:
            raise ValueError(f"image size {self.image_size} is not a multiple of {self.factor}, "
                             f"the reduction of {len(self.channels)} levels"
                             + (f" and patches of {self.patch}" if self.patch > 1 else ""))

    @property
    def factor(self) -> int:
        """Pixels a side of one code."""
        return self.patch * 2 ** (len(self.channels) - 1)

    @property
    def grid(self) -> int:
        """Codes a side."""
        return self.image_size // self.factor

    @classmethod
    def published(cls) -> VQGANConfig:
        """The shape of the published COCO checkpoint: f16, 16,384 codes of 256 dimensions."""
        return cls(image_size=256, channels=(128, 128, 256, 256, 512), attention_sizes=(16,),
                   blocks_per_level=2, code_dim=256, codebook_size=16384, l2_normalised=False)


def group_norm(channels: int, groups: int) -> nn.Module:
    return nn.GroupNorm(groups, channels, eps=1e-6) if groups else nn.Identity()


class ResBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, groups: int):
        super().__init__()
        self.block = nn.Sequential(
            group_norm(channels_in, groups), nn.SiLU(),
            nn.Conv2d(channels_in, channels_out, 3, padding=1),
            group_norm(channels_out, groups), nn.SiLU(), nn.Dropout(0.0),
            nn.Conv2d(channels_out, channels_out, 3, padding=1))
        same = channels_in == channels_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.block(x)


class Attention(nn.Module):
    """Single-head self-attention over all places."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.attn = nn.MultiheadAttention(channels, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)  # (N, h*w, C)
        h = self.attn(h, h, h, need_weights=False)[0]
        return x + h.transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # the published asymmetric pad: right and bottom


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def middle(channels: int, config: VQGANConfig) -> nn.Sequential:
    groups = config.norm_groups
    attention = [Attention(channels, groups)] if config.middle_attention else []
    return nn.Sequential(ResBlock(channels, channels, groups), *attention,
                         ResBlock(channels, channels, groups))


class Encoder(nn.Module):
    """Pixels in [-1, 1] (N, 3, H, W) to features (N, code_dim, h, w)."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        levels, channels = config.channels, config.channels[0]
        size, groups = config.image_size // config.patch, config.norm_groups
        self.patch = config.patch
        self.conv_in = nn.Conv2d(3 * self.patch**2, channels, 3, padding=1)
        down: list[nn.Module] = []
        for level, width in enumerate(levels):
            for _ in range(config.blocks_per_level):
                down.append(ResBlock(channels, width, groups))
                channels = width
                if size in config.attention_sizes:
                    down.append(Attention(channels, groups))
            if level < len(levels) - 1:
                down.append(Downsample(channels))
                size //= 2
        self.down = nn.Sequential(*down)
        self.mid = middle(channels, config)
        self.final = nn.Sequential(group_norm(channels, groups), nn.SiLU(),
                                   nn.Conv2d(channels, config.code_dim, 3, padding=1),
                                   nn.Conv2d(config.code_dim, config.code_dim, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(pixels, self.patch)  # (N, 3 * patch², H / patch, W / patch)
        return self.final(self.mid(self.down(self.conv_in(patches))))


class Decoder(nn.Module):
    """Code vectors (N, code_dim, h, w) to pixels around [-1, 1] (N, 3, H, W)."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        levels, size, channels = config.channels[::-1], config.grid, config.channels[-1]
        groups = config.norm_groups
        self.quant_conv_in = nn.Conv2d(config.code_dim, config.code_dim, 1)
        self.conv_in = nn.Conv2d(config.code_dim, channels, 3, padding=1)
        self.mid = middle(channels, config)
        up: list[nn.Module] = []
        for level, width in enumerate(levels):
            for _ in range(config.blocks_per_level + 1):
                up.append(ResBlock(channels, width, groups))
                channels = width
                if size in config.attention_sizes:
                    up.append(Attention(channels, groups))
            if level < len(levels) - 1:
                up.append(Upsample(channels))
                size *= 2
        self.up = nn.Sequential(*up)
        self.patch = config.patch
        self.final = nn.Sequential(group_norm(channels, groups), nn.SiLU(),
                                   nn.Conv2d(channels, 3 * self.patch**2, 3, padding=1))

    def forward(self, vectors: Tensor) -> Tensor:
        patches = self.final(self.up(self.mid(self.conv_in(self.quant_conv_in(vectors)))))
        return F.pixel_shuffle(patches, self.patch)


class Quantizer(nn.Module):
    """The codebook: features to the nearest code and back."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.l2_normalised = config.l2_normalised
        self.embedding = nn.Embedding(config.codebook_size, config.code_dim)

    def codebook(self) -> Tensor:
        """Code vectors (K, D), of unit length where the config says so."""
        weight = self.embedding.weight
        return F.normalize(weight, dim=1) if self.l2_normalised else weight

    def normalise(self, features: Tensor) -> Tensor:
        """Features (N, D, h, w) as the codebook compares them."""
        return F.normalize(features, dim=1) if self.l2_normalised else features

    def nearest(self, features: Tensor) -> Tensor:
        """Codes int64 (N, h, w) of the code vectors nearest to features (N, D, h, w)."""
        z = self.normalise(features).permute(0, 2, 3, 1)  # (N, h, w, D)
        book = self.codebook()
        distance = book.square().sum(1) - 2 * z @ book.T  # without |z|², equal for all codes
        return distance.argmin(-1)

    def vectors(self, codes: Tensor) -> Tensor:
        """Code vectors (N, D, h, w) of codes (N, h, w)."""
        return F.embedding(codes, self.codebook()).permute(0, 3, 1, 2).contiguous()


class VQGAN(nn.Module):
    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantizer = Quantizer(config)

    @torch.no_grad()
    def initialise(self) -> None:
        """He's initialisation with every residual branch silent at first (Fixup, 1901.09321), so
        that a model without normalisation starts well-behaved."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.block[-1].weight)
            elif isinstance(module, Attention):
                nn.init.zeros_(module.attn.out_proj.weight)

    @property
    def code_grid(self) -> tuple[int, int]:
        """(h, w) of an image's codes."""
        return self.config.grid, self.config.grid

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels float (N, 3, S, S) in [0, 1], S = config.image_size, to codes int64 (N, h, w)."""
        size = self.config.image_size
        if pixels.dim() != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(f"this VQGAN encodes pixels of shape (N, 3, {size}, {size}), "
                             f"got {tuple(pixels.shape)}")
        pixels = pixels.to(self.quantizer.embedding.weight)
        return self.quantizer.nearest(self.encoder(pixels * 2 - 1))

    def decode_raw(self, codes: Tensor) -> Tensor:
        """The decoder's own output for codes (N, h, w): (N, 3, S, S) around [-1, 1], unclamped."""
        codes = codes.to(self.quantizer.embedding.weight.device)
        return self.decoder(self.quantizer.vectors(codes))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes int (N, h, w) to pixels float (N, 3, S, S) in [0, 1]."""
        return (self.decode_raw(codes) * 0.5 + 0.5).clamp(0, 1)
