"""What of a picture stays and what is drawn anew: a mask to forced codes, and the pasting back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgen.sampling import FREE


@dataclass(frozen=True)
class Canvas:
    """A picture of which some is drawn anew."""

    pixels: Tensor  # float (3, S, S) in [0, 1]: the picture
    codes: Tensor  # int64 (h, w): its codes, FREE where they are to be drawn
    share: Tensor  # float (S, S): of the new image in the result, 1 in the mask, 0 far from it

    def paste(self, pixels: Tensor) -> Tensor:
        """New images (N, 3, S, S) with the picture in place of what is to stay of it."""
        share = self.share.to(pixels)
        return pixels * share + self.pixels.to(pixels) * (1 - share)


def make_canvas(pixels: Tensor, codes: Tensor, anew: Tensor) -> Canvas:
    """pixels (3, S, S), its codes (h, w), bool (S, S): where it is drawn anew.

    A code is drawn where any of its pixels is.  Outside, the picture comes back within an eighth of
    a code on either side of a line that lies so far from the mask: wide enough to hide the seam.
    """
    mask = anew.to(pixels.device, torch.float32)[None, None]  # (1, 1, S, S)
    factor = anew.shape[0] // codes.shape[0]
    free = F.max_pool2d(mask, factor)[0, 0] > 0
    reach = max(1, factor // 8)
    wide = F.max_pool2d(mask, 2 * reach + 1, 1, reach)
    share = F.avg_pool2d(wide, 2 * reach + 1, 1, reach, count_include_pad=False)[0, 0]
    return Canvas(pixels, codes.masked_fill(free.to(codes.device), FREE), share.clamp(max=1))


def lower_rows(keep: float, size: int, rows: int) -> Tensor:
    """bool (size, size): all but the share `keep` of `rows` rows of codes, from the top."""
    kept = int(keep * rows + 0.5) * (size // rows)
    return (torch.arange(size) >= kept)[:, None].expand(size, size)
