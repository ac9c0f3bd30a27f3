"""Sums of 1x1 convolutions, depthwise ones before and bounds behind, against torch's layers in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bti_fast import _library
from bti_fast.nn.separable_product import SeparableProduct, Source, pack, unpack

compiled = pytest.mark.skipif(_library.load("cpu") is not None, reason=str(_library.load("cpu")))
CHANNELS_LAST = torch.channels_last
CASES = [  # (channels, dilation or 0 for the map itself) of the sources, K, (B, H, W)
    ([(5, 0)], 1, (2, 1, 1)),
    ([(33, 0)], 17, (2, 7, 7)),
    ([(24, 1), (24, 2), (24, 4)], 24, (3, 9, 5)),
    ([(5, 4), (8, 4), (9, 0)], 9, (2, 3, 3)),
    ([(390, 4), (50, 0)], 70, (3, 1, 13)),  # blocks of the depth
    ([(7, 1)], 40, (1, 30, 41)),  # many positions
    ([(12, 2), (4, 0)], 600, (2, 14, 14)),  # many columns
    ([(800, 1)], 33, (2, 10, 11)),
]
IDS = ["-".join(f"{c}@{d}" for c, d in sources) + f"-{k}" for sources, k, _ in CASES]


def made(sources, columns: int, **options) -> SeparableProduct:
    parts = [Source(c, torch.randn(c, 1, 3, 3) if d else None, max(d, 1)) for c, d in sources]
    depth = sum(c for c, _ in sources)
    return SeparableProduct(parts, torch.randn(columns, depth) / depth**0.5, **options)


def maps_of(sources, size, memory_format=CHANNELS_LAST) -> list[Tensor]:
    batch, *spatial = size
    return [torch.randn(batch, c, *spatial).contiguous(memory_format=memory_format) for c, _ in sources]


def truth(product: SeparableProduct, maps, *, factor=None, bias=None, skip=None) -> Tensor:
    """What the layers one by one give, in float64."""
    parts = []
    for x, taps, dilation in zip(maps, product.taps, product.dilations, strict=True):
        x = x.double()
        if taps.numel():
            kernel = taps.double().T.reshape(-1, 1, 3, 3)
            x = F.conv2d(x, kernel, padding=dilation, dilation=dilation, groups=x.shape[1])
        parts.append(x)
    x = torch.cat(parts, 1)
    x = x if factor is None else x * factor.double()[:, :, None, None]
    y = torch.einsum("kc,bchw->bkhw", product.weight.double(), x)
    bias = product.bias if bias is None else bias
    y = y if bias is None else y + bias.double()[..., :, None, None]
    y = y if skip is None else y + skip.double()
    y = F.silu(y) if product.silu else y
    for bound, pick in ((product.lower, torch.maximum), (product.upper, torch.minimum)):
        y = y if bound is None else pick(y, bound.double()[:, None, None])
    return y


@compiled
@pytest.mark.parametrize(
    "rest", ["", "bias", "factor bias skip silu", "factor sample_bias bounds", "skip bounds"]
)
@pytest.mark.parametrize(("sources", "columns", "size"), CASES, ids=IDS)
def test_kernel_of_every_instruction_set(isa, sources, columns, size, rest):
    torch.manual_seed(0)
    bounds = torch.randn(2, columns).sort(0).values if "bounds" in rest else (None, None)
    bias = torch.randn(columns) if rest.startswith("bias") or " bias" in rest else None
    product = made(sources, columns, bias=bias, lower=bounds[0], upper=bounds[1], silu="silu" in rest)
    maps = maps_of(sources, size)
    batch, *spatial = size
    given = {
        "factor": torch.rand(batch, sum(c for c, _ in sources)) if "factor" in rest else None,
        "bias": torch.randn(batch, columns) if "sample_bias" in rest else None,
        "skip": torch.randn(batch, columns, *spatial).contiguous(memory_format=CHANNELS_LAST)
        if "skip" in rest
        else None,
    }
    maps[0][-1, -1, 0, -1] = torch.nan  # in every sum that it is part of, and in no other
    with torch.no_grad():
        got = product(*maps, **given)
    assert got.is_contiguous(memory_format=CHANNELS_LAST)
    torch.testing.assert_close(
        got.double(), truth(product, maps, **given), rtol=1e-5, atol=1e-5, equal_nan=True
    )


@compiled
@torch.no_grad()
@pytest.mark.parametrize(("sources", "columns", "size"), CASES, ids=IDS)
def test_threads_change_no_bit(sources, columns, size):
    torch.manual_seed(0)
    product, maps = made(sources, columns), maps_of(sources, size)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(product(*maps))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@compiled
@torch.no_grad()
def test_bounds_keep_nan_and_take_infinity():
    product = made(
        [(3, 0)], 3, lower=torch.tensor([0.0, -torch.inf, 0]), upper=torch.tensor([torch.inf, 0, 1])
    )
    product.matrix.copy_(pack(torch.eye(3)))
    x = torch.tensor([torch.nan, -torch.inf, torch.inf, 5, -5]).expand(1, 3, 1, 5)
    got = product(x.contiguous(memory_format=CHANNELS_LAST))[0, :, 0]
    # 0 · inf is NaN beside its own row, so that only finite values stand alone
    assert got[:, 3:].tolist() == [[5, 0], [0, -5], [1, 0]]
    assert got[:, :3].isnan().all()


@torch.no_grad()
@pytest.mark.parametrize("size", [(0, 4, 4), (2, 0, 4), (2, 4, 0)], ids=str)
def test_empty_maps(size):
    product = made([(8, 2), (3, 0)], 5, bias=torch.ones(5))
    batch, *spatial = size
    assert product(*maps_of([(8, 2), (3, 0)], size)).shape == (batch, 5, *spatial)


@pytest.mark.parametrize(
    ("kind", "convert"),
    [
        ("nchw", lambda x: x.contiguous()),
        ("strided", lambda x: torch.cat((x, x), 3)[..., ::2]),
        ("float64", lambda x: x.double()),
        ("bfloat16", lambda x: x.bfloat16()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@torch.no_grad()
def test_other_maps_take_torchs_layers(kind, convert):
    torch.manual_seed(0)
    sources = [(6, 1), (4, 0)]
    product = made(sources, 7, bias=torch.randn(7), lower=torch.zeros(7), silu=True)
    maps = [convert(x) for x in maps_of(sources, (2, 5, 6))]
    product = product.to(maps[0].dtype)
    factor, skip = torch.rand(2, 10).to(maps[0]), convert(torch.randn(2, 7, 5, 6))
    expected = truth(product, maps, factor=factor, skip=skip)
    tolerance = {"bfloat16": 3e-2, "float64": 1e-12}.get(kind, 1e-5)
    got = product(*maps, factor=factor, skip=skip)
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_gradients_transforms_autocast_and_export():
    torch.manual_seed(0)
    sources = [(6, 2), (4, 0)]
    product = made(sources, 7, bias=torch.randn(7), silu=True)
    maps = maps_of(sources, (2, 5, 6))
    with torch.no_grad():
        expected = product(*maps)
        exported = torch.export.export(product, tuple(maps)).module()
        torch.testing.assert_close(exported(*maps), expected)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(product(*maps).float(), expected, rtol=5e-2, atol=5e-2)
    per_sample = torch.vmap(lambda *one: product(*(m[None] for m in one))[0])(*maps)
    torch.testing.assert_close(per_sample, expected)
    _, tangent = torch.func.jvp(product, tuple(maps), tuple(torch.zeros_like(m) for m in maps))
    assert not tangent.any()
    exact = copy.deepcopy(product).double()
    assert torch.autograd.gradcheck(exact, [m.double().requires_grad_() for m in maps])
    maps[0].requires_grad_()
    product(*maps).sum().backward()
    assert maps[0].grad is not None


def test_what_does_not_fit_is_told():
    product = made([(6, 1), (4, 0)], 7)
    with pytest.raises(RuntimeError, match="channels|Sizes of tensors"):
        product(*maps_of([(6, 1), (5, 0)], (1, 3, 3)))
    with pytest.raises(RuntimeError, match="Sizes of tensors"):
        product(*maps_of([(6, 1)], (1, 3, 3)), *maps_of([(4, 0)], (1, 3, 4)))


@compiled
def test_the_operator_checks_what_it_gets():
    x = torch.randn(1, 4, 3, 3).contiguous(memory_format=CHANNELS_LAST)
    matrix, none = pack(torch.randn(5, 4)), torch.empty(0)

    def call(maps=(x,), taps=(none,), dilations=(1,), matrix=matrix, columns=5, *rest):
        rest = (*rest, *[None] * (5 - len(rest)))
        return torch.ops.bti_fast_cpu.separable_product(
            list(maps), list(taps), list(dilations), matrix, columns, *rest, False
        )

    assert call().shape == (1, 5, 3, 3)
    for message, arguments in [
        ("at least one", {"maps": ()}),
        ("as many", {"dilations": (1, 1)}),
        ("channels_last", {"maps": (x.contiguous().transpose(2, 3)[:, :, ::2],)}),
        (
            "one batch, height and width",
            {
                "maps": (x, x[:, :, :2].contiguous(memory_format=CHANNELS_LAST)),
                "taps": (none, none),
                "dilations": (1, 1),
            },
        ),
        ("taps must be", {"taps": (torch.randn(9, 5),)}),
        ("dilations must be at least 1", {"taps": (torch.randn(9, 4),), "dilations": (0,)}),
        ("matrix must be", {"columns": 17}),
        ("matrix must be", {"matrix": matrix.transpose(1, 2)}),
        ("matrix must be one, or 1", {"matrix": matrix.expand(2, -1, -1, -1)}),
        ("maps must be float32", {"maps": (x.double(),)}),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(**arguments)
    for number, name in enumerate(("factor", "bias", "skip", "lower", "upper")):
        wrong = torch.randn(2, 3, 3, 3) if name == "skip" else torch.randn(2, 3)
        with pytest.raises(RuntimeError, match=f"{name} must be"):
            call((x,), (none,), (1,), matrix, 5, *[None] * number, wrong)


@compiled
@torch.no_grad()
@pytest.mark.parametrize(("sources", "columns", "size"), CASES, ids=IDS)
def test_a_matrix_for_each_sample(isa, sources, columns, size):
    torch.manual_seed(0)
    product, maps = made(sources, columns, silu=True), maps_of(sources, size)
    batch, *spatial = size
    weights = torch.randn(batch, columns, sum(c for c, _ in sources))
    factor, bias = torch.rand(batch, weights.shape[2]), torch.randn(batch, columns)
    skip = torch.randn(batch, columns, *spatial).contiguous(memory_format=CHANNELS_LAST)
    got = torch.ops.bti_fast_cpu.separable_product(
        maps, product.taps, product.dilations, pack(weights), columns, factor, bias, skip, None, None, True
    )
    for sample, weight in enumerate(weights):
        product.matrix.copy_(pack(weight))
        one = slice(sample, sample + 1)
        expected = truth(product, [m[one] for m in maps], factor=factor[one], bias=bias[one], skip=skip[one])
        torch.testing.assert_close(got[one].double(), expected, rtol=1e-5, atol=1e-5 * weight.shape[1] ** 0.5)


@pytest.mark.parametrize("shape", [(1, 1), (15, 3), (16, 4), (17, 5), (40, 2)], ids=str)
def test_packing(shape):
    weight = torch.randn(shape)
    matrix = pack(weight)
    assert matrix.is_contiguous() and matrix.shape == (-(-shape[0] // 16), shape[1], 16)
    assert torch.equal(unpack(matrix, shape[0]), weight)
    assert matrix.sum().isclose(weight.sum(), rtol=1e-4, atol=1e-4)
