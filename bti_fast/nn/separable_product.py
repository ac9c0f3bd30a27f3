"""1x1 convolutions for inference: of several maps at once, convolved depthwise first or not, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bti_fast.nn.dilated_depthwise import takes_kernels

PANEL = 16  # columns of a packed matrix that lie together


@dataclass(frozen=True)
class Source:
    """What is multiplied of one map (B, channels, H, W): the map itself, or its 3x3 depthwise convolution by
    kernel (channels, 1, 3, 3) of that dilation, at "same" padding."""

    channels: int
    kernel: Tensor | None = None
    dilation: int = 1


class SeparableProduct(nn.Module):
    """Sum of 1x1 convolutions of maps, for inference.

    maps (B, C_i, H, W), one for each of `sources`, by weight (K, sum of C_i) -> (B, K, H, W):
    bounded(silu(weight · (factor · sources of the maps) + bias + skip)), the silu where asked for and the
    bounds `lower` and `upper` (K,) where given. forward's factor is (B, sum of C_i), its bias (K,) or (B, K),
    in the place of the module's own, and its skip like the result.

    The matrix is kept as the CPU's kernel reads it and nowhere else; other devices, dtypes and layouts bring
    it back to its order in every call.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        lower: Tensor | None = None,
        upper: Tensor | None = None,
        silu: bool = False,
    ) -> None:
        super().__init__()
        self.columns = len(weight)
        self.silu = silu
        self.channels = [source.channels for source in sources]
        self.dilations = [source.dilation for source in sources]
        self.register_buffer("matrix", pack(weight.detach()))
        for number, source in enumerate(sources):
            taps = weight.new_empty(0) if source.kernel is None else source.kernel.detach().flatten(1).T
            self.register_buffer(f"taps{number}", taps.contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().contiguous())
        self.register_buffer("lower", lower)
        self.register_buffer("upper", upper)

    @property
    def taps(self) -> list[Tensor]:
        """(9, C_i) of each source's kernel, no elements where there is none."""
        return [getattr(self, f"taps{number}") for number in range(len(self.channels))]

    @property
    def weight(self) -> Tensor:
        """(K, sum of C_i), as given."""
        return unpack(self.matrix, self.columns)

    def forward(
        self,
        *maps: Tensor,
        factor: Tensor | None = None,
        bias: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        bias = self.bias if bias is None else bias
        if not self._is_compiled(maps, factor, bias, skip):
            return self._plain(maps, factor, bias, skip)
        return torch.ops.bti_fast_cpu.separable_product(
            list(maps),
            self.taps,
            self.dilations,
            self.matrix,
            self.columns,
            factor,
            bias,
            skip,
            self.lower,
            self.upper,
            self.silu,
        )

    def _is_compiled(
        self, maps: Sequence[Tensor], factor: Tensor | None, bias: Tensor | None, skip: Tensor | None
    ) -> bool:
        first, *others = maps
        return (
            first.ndim == 4
            and [m.shape[1] for m in maps] == self.channels  # the plain path says what does not fit
            and all(m.shape[2:] == first.shape[2:] and len(m) == len(first) for m in others)
            and not (torch.is_grad_enabled() and any(m.requires_grad for m in maps))
            and takes_kernels(first, *others, self.matrix, factor, bias, skip)
            and all(
                m.is_contiguous(memory_format=torch.channels_last) for m in (*others, skip) if m is not None
            )
            and all(value is None or value.is_contiguous() for value in (factor, bias))
        )

    def _plain(
        self, maps: Sequence[Tensor], factor: Tensor | None, bias: Tensor | None, skip: Tensor | None
    ) -> Tensor:
        taken = [
            m if taps.numel() == 0 else _convolved(m, taps, dilation)
            for m, taps, dilation in zip(maps, self.taps, self.dilations, strict=True)
        ]
        x = taken[0] if len(taken) == 1 else torch.cat(taken, 1)
        x = x if factor is None else x * factor[:, :, None, None]
        shared = bias if bias is None or bias.ndim == 1 else None
        y = F.conv2d(x, self.weight[:, :, None, None], shared)
        y = y if bias is shared else y + bias[:, :, None, None]
        y = y if skip is None else y + skip
        y = F.silu(y) if self.silu else y
        bounds = [bound if bound is None else bound[:, None, None] for bound in (self.lower, self.upper)]
        return y if bounds == [None, None] else y.clamp(*bounds)


def pack(weight: Tensor) -> Tensor:
    """(..., K, C) -> (..., K / 16 rounded up, C, 16): panels of columns, zeros beyond the last."""
    columns = weight.shape[-2]
    panels = -(-columns // PANEL)
    missing = panels * PANEL - columns
    padded = F.pad(weight, (0, 0, 0, missing)) if missing else weight
    return padded.unflatten(-2, (panels, PANEL)).transpose(-1, -2).contiguous()


def unpack(matrix: Tensor, columns: int) -> Tensor:
    """pack() undone: (K, C)."""
    return matrix.transpose(1, 2).flatten(0, 1)[:columns]


def product_by(x: Tensor, weight: Tensor) -> Tensor:
    """weight · x at every position, for maps and weights that the CPU's kernel takes.

    x (B, C, H, W) channels_last, weight (K, C) or (B, K, C) -> (B, K, H, W), channels_last.
    """
    nothing = (None,) * 5
    return torch.ops.bti_fast_cpu.separable_product(
        [x], [x.new_empty(0)], [1], pack(weight), weight.shape[-2], *nothing, False
    )


def _convolved(x: Tensor, taps: Tensor, dilation: int) -> Tensor:
    kernel = taps.T.unflatten(1, (1, 3, 3))
    return F.conv2d(x, kernel, padding=dilation, dilation=dilation, groups=x.shape[1])
