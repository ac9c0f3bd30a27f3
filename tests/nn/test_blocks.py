import pytest
import torch
import torch.nn.functional as F

from bti_fast.nn.blocks import (
    AttentionGate,
    DualPathAttention,
    MultiScaleContextFusion,
    ResidualBlock,
    SeparableConv,
)

from .golden import Golden, keras_layers, relative_error

FORWARD, WEIGHTS = 1e-5, 1e-4  # of max|.|, the limits the recorded numbers support

BLOCKS = {
    "msf_c48_13x11": lambda: MultiScaleContextFusion(48),
    "msf_c32_7x7": lambda: MultiScaleContextFusion(32),
    "dpa_c48_10x14": lambda: DualPathAttention(48),
    "dpa_c192_6x6": lambda: DualPathAttention(192),
    "resblock_att_c48_14x14": lambda: ResidualBlock(48, 48, attention=True),
    "resblock_noatt_c72to40_14x14": lambda: ResidualBlock(72, 40),
    "resblock_noatt_c40_7x7": lambda: ResidualBlock(40, 40),
    "attgate_same_14x14": lambda: AttentionGate(32, 24, 24),
    "attgate_resize_up_7to14": lambda: AttentionGate(32, 24, 24),
    "attgate_resize_down_28to14": lambda: AttentionGate(32, 24, 24),
    "attgate_resize_frac_9x11to14x15": lambda: AttentionGate(32, 24, 24),
}


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
@pytest.mark.parametrize("name", BLOCKS)
def test_block_matches_the_published_code(shared_dir, name, memory_format):
    golden = Golden(shared_dir / "golden" / f"{name}.npz")
    block = BLOCKS[name]().eval()
    layers = keras_layers(block)
    golden.fill(layers)
    inputs = [golden.leaf(k) for k in ("in0", "in1") if k in golden.arrays]
    out = block.to(memory_format=memory_format)(*[x.to(memory_format=memory_format) for x in inputs])
    (out * golden.tensor("cot")).sum().backward()

    assert relative_error(out, golden.tensor("out")) <= FORWARD
    for i, x in enumerate(inputs):
        assert relative_error(x.grad, golden.tensor(f"grad_in{i}")) <= FORWARD
    errors = golden.weight_gradient_errors(layers)
    assert set(errors) == golden.weight_gradients()
    assert max(errors.values()) <= WEIGHTS, max(errors, key=errors.get)


def test_dilated_separable_convolution_matches_the_published_code(shared_dir):
    golden = Golden(shared_dir / "golden" / "prim_sepconv_dil4_same_7x6.npz")
    conv = SeparableConv(3, 5, dilation=4)
    golden.fill({"l": conv})
    x = golden.leaf("in0")
    out = conv(x)
    (out * golden.tensor("cot")).sum().backward()
    assert relative_error(out, golden.tensor("out")) <= FORWARD
    assert relative_error(x.grad, golden.tensor("grad_in0")) <= FORWARD


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_folded_fusion_equals_the_written_out_one(memory_format):
    """24 channels: 4x6 positions are folded, and one position less is not."""
    torch.manual_seed(0)
    fusion = MultiScaleContextFusion(24).double()
    x = torch.randn(3, 24, 4, 6, dtype=torch.float64).to(memory_format=memory_format)
    weights = torch.nn.functional.linear(
        torch.relu(fusion.scale_fc1(x.mean((2, 3)))), fusion.scale_fc2.weight, fusion.scale_fc2.bias
    ).softmax(1)
    branches = zip(weights.unbind(1), (fusion.sep_d1, fusion.sep_d2, fusion.sep_d4), strict=True)
    truth = fusion.fusion(sum(w[:, None, None, None] * branch(x) for w, branch in branches))
    out = fusion(x)
    torch.testing.assert_close(out, truth)
    assert out.is_contiguous(memory_format=memory_format)
    captured = []
    fusion.sep_d1.register_forward_hook(lambda *_: captured.append(True))
    fusion(x)
    assert not captured
    fusion(x[:, :, :, :5])
    assert captured


def test_maximum_shares_its_gradient_among_ties():
    attention = DualPathAttention(16).double()
    x = torch.zeros(1, 16, 7, 7, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        attention.spatial.weight[:, 1] = 0  # only the maximum speaks
    captured = {}
    attention.spatial.register_forward_hook(lambda _m, args, _o: captured.update(summary=args[0]))
    attention(x)
    (grad,) = torch.autograd.grad(captured["summary"][:, 0].sum(), x)
    assert torch.equal(grad, torch.full_like(grad, 1 / 16))


def test_training_normalises_by_batch_statistics_after_the_relu():
    torch.manual_seed(0)
    block = ResidualBlock(8, 8).double().train()
    x = torch.randn(3, 8, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        block(x)
        activated = F.relu(block.conv1(x))
    mean, var = activated.mean((0, 2, 3)), activated.var((0, 2, 3))  # unbiased, as torch keeps it
    torch.testing.assert_close(block.bn1.running_mean, 0.01 * mean)
    torch.testing.assert_close(block.bn1.running_var, 0.99 + 0.01 * var)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SeparableConv(4, 4, kernel_size=2), "kernel_size"),
        (lambda: MultiScaleContextFusion(4), "channels"),
    ],
)
def test_impossible_sizes_are_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()
