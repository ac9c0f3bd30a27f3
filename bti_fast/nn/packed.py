"""1x1 convolutions for inference that keep their weights as the CPU's library wants to read them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bti_fast.nn.pointwise import by_product, product
from bti_fast.ops.straight import any_requires_grad, is_ordinary

POSITIONS = range(32, 513)  # for fewer the call costs more than it saves, for more a convolution does as well
LARGE = 2**14  # elements of a weight
_KNOWN = all(
    hasattr(where, name)
    for where, name in (
        (torch.ops.mkldnn, "_convolution_pointwise"),  # what torch.compile uses, but promises nobody else
        (torch._C._nn, "mkldnn_reorder_conv2d_weight"),
    )
)
_PLAIN = [0, 0], [1, 1], [1, 1], 1  # padding, stride, dilation, groups


class PackedConv1x1(nn.Conv2d):
    """1x1 convolution of x (B, C, H, W) by weight (K, C, 1, 1) and bias (K,) or None, for inference.

    The library brings a weight into an order of its own in every call, which for few positions (B·H·W) takes
    up to half of the time. Here it is kept in that order, beside the weight as it is. The order depends on
    the shape of x, so it is made when a shape comes twice in a row: changing sizes cost nothing.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], 1, bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._last_shape = None
        self._packed = None  # what it was made of and for, see _sources, and itself

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if not self._packs(x):
            return product(x, weight, bias) if by_product(x) else super().forward(x)
        packed = self._packed  # read once: another thread may replace it
        sources = weight.data_ptr(), weight._version, x.shape
        if packed is None or packed[0] != sources:
            if x.shape != self._last_shape:
                self._last_shape = x.shape
                return super().forward(x)
            # The weight itself stays with it, so that no other can come to lie at its address.
            packed = self._packed = sources, _pack(weight, x.shape), weight.detach()
        return torch.ops.mkldnn._convolution_pointwise(x, packed[1], bias, *_PLAIN, "none", [], "")

    def _packs(self, x: Tensor) -> bool:
        weight = self.weight
        tensors = (x, weight) if self.bias is None else (x, weight, self.bias)
        return (
            _KNOWN
            and weight.numel() >= LARGE
            and is_ordinary(tensors)  # x may be anything before this
            and all(tensor.is_cpu and tensor.dtype == torch.float32 for tensor in tensors)
            and x.ndim == 4
            and x.shape[1] == weight.shape[1]
            and x.shape[0] * x.shape[2] * x.shape[3] in POSITIONS
            and x.shape[2] * x.shape[3] > 1  # as pooled maps, which a product suits better
            and x.is_contiguous(memory_format=torch.channels_last)
            and not (torch.is_grad_enabled() and any_requires_grad(*tensors))
            and not weight.is_inference()  # which would have no version to tell changes by
            and torch.backends.mkldnn.enabled
        )

    def __getstate__(self) -> dict:
        """For copies and pickles, which pack anew."""
        return {**self.__dict__, "_packed": None}

    def _apply(self, *args, **kwargs):  # noqa: ANN002, ANN003, ANN202 (as torch's)
        self._packed = None  # .to(): a weight that moves away is not to stay here too
        return super()._apply(*args, **kwargs)


def _pack(weight: Tensor, shape: torch.Size) -> Tensor:
    return torch._C._nn.mkldnn_reorder_conv2d_weight(
        weight.detach().contiguous().to_mkldnn(), *_PLAIN, list(shape)
    )


def pack_(module: nn.Module) -> None:
    """Puts a PackedConv1x1 in the place of every plain 1x1 convolution in `module`."""
    made = {conv: PackedConv1x1(conv.weight, conv.bias) for conv in module.modules() if _is_plain(conv)}
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if child in made:
                setattr(parent, name, made[child])


def _is_plain(conv: nn.Module) -> bool:
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.groups == 1
        and conv.padding in ((0, 0), "valid", "same")
    )
