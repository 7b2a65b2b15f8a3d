from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests import literal
from tests.conftest import tiny_config
from tune_ego.config import ModelConfig
from tune_ego.model import build_stream
from tune_ego.model.i3d import MaxPool3dSame, Triple, Unit3D, _pad, max_pool3d_deterministic, same_padding, scaled
from tune_ego.model.stam import AttentionBlock, scale_attention
from tune_ego.model.two_stream import CHANNELS


@pytest.mark.parametrize(
    ("modality", "depth", "parameters"),
    [
        ("rgb", 0, 12_395_914),
        ("rgb", 1, 15_326_060),
        ("rgb", 2, 18_255_180),
        ("rgb", 3, 21_184_300),
        ("flow", 0, 12_373_962),
        ("flow", 1, 15_304_108),
        ("flow", 2, 18_233_228),
        ("flow", 3, 21_162_348),
    ],
)
def test_parameter_counts(modality: str, depth: int, parameters: int) -> None:
    with torch.device("meta"):
        stream = build_stream(modality, num_classes=106, model=ModelConfig(stam_depth=depth))
    assert sum(p.numel() for p in stream.parameters()) == parameters


def test_forward_cost_and_shapes_at_full_size() -> None:
    with torch.device("meta"):
        stream = build_stream("rgb", num_classes=106, model=ModelConfig())
        with FlopCounterMode(display=False) as counter:
            logits, attention = stream(torch.zeros(1, 3, 16, 224, 224))
    assert counter.get_total_flops() / 1e9 == pytest.approx(56.15, abs=0.005)
    assert logits.shape == (1, 106)
    assert attention is not None and attention.shape == (1, 2, 7, 7)


def randomised(stream: torch.nn.Module) -> torch.nn.Module:
    """Weights and BatchNorm statistics that leave no factor of the formula at 0 or 1."""
    generator = torch.Generator().manual_seed(5)
    for name, value in stream.state_dict().items():
        if name.endswith(("bn.weight", "running_var")):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif name.endswith(("bn.bias", "running_mean")):
            value.copy_(torch.randn(value.shape, generator=generator) / 3)
        elif name == "attention_pred.conv3d.weight":
            value.abs_()  # else ReLU may leave nothing of the map
        elif not name.endswith("num_batches_tracked"):
            value.mul_(2)
    return stream


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("modality", "size", "model"),
    [
        ("rgb", (16, 32, 32), {}),
        ("flow", (16, 33, 47), {"stam_depth": 3}),
        ("rgb", (11, 40, 35), {"stam_depth": 2, "attention_scale": "subtract_min"}),
        ("flow", (7, 32, 32), {"stam_depth": 0}),
        ("rgb", (16, 32, 45), {"activation": "swish"}),
        # Of a map of two cells min and max would leave nothing but (0, 1).
        ("rgb", (16, 32, 32), {"activation": "elu", "stam_depth": 2, "attention_scale": "subtract_min"}),
        ("flow", (9, 37, 32), {"activation": "mish", "activation_scope": "all", "stam_depth": 2}),
        ("rgb", (16, 32, 32), {"activation": "gelu", "activation_scope": "all", "attention_scale": "subtract_min"}),
        (
            "rgb",
            (16, 32, 32),
            {"activation": "leaky_relu", "activation_scope": "all", "attention_scale": "subtract_min"},
        ),
        ("flow", (16, 32, 32), {"activation": "elu", "activation_scope": "all", "attention_scale": "subtract_min"}),
    ],
)
def test_a_stream_equals_its_formula(
    modality: str, size: tuple[int, int, int], model: dict[str, Any], training: bool
) -> None:
    torch.manual_seed(0)
    chosen = ModelConfig(width=0.06, dropout=0.0, **model)
    stream = randomised(build_stream(modality, 5, chosen)).double().train(training)
    clip = torch.rand(2, CHANNELS[modality], *size, dtype=torch.float64) * 2 - 1
    expected = literal.stream(
        {name: value.clone() for name, value in stream.state_dict().items()},
        clip,
        chosen.stam_depth,
        chosen.attention_scale,
        chosen.activation,
        chosen.activation_scope,
        training,
    )
    logits, attention = stream(clip)
    torch.testing.assert_close(logits, expected[0], rtol=1e-5, atol=1e-8)
    assert (attention is None) == (chosen.stam_depth == 0)
    if attention is not None:
        assert expected[1] is not None and attention.std() > 0
        torch.testing.assert_close(attention, expected[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        (7, 7, 2, (3, 3)),  # 4 outputs reach over 3 x 2 + 7 = 13 places: 6 more than there are
        (8, 7, 2, (2, 3)),  # 13 - 8 = 5, the odd one behind
        (224, 7, 2, (2, 3)),
        (7, 3, 2, (1, 1)),
        (8, 3, 2, (0, 1)),
        (7, 3, 1, (1, 1)),
        (8, 3, 1, (1, 1)),
        (1, 3, 1, (1, 1)),
        (1, 3, 2, (1, 1)),
        (7, 2, 2, (0, 1)),
        (8, 2, 2, (0, 0)),
        (8, 1, 1, (0, 0)),
        (8, 1, 2, (0, 0)),
    ],
)
def test_same_padding_is_tensorflows(size: int, kernel: int, stride: int, padding: tuple[int, int]) -> None:
    assert same_padding((size,), (kernel,) * 3, (stride,) * 3) == [padding]


def test_same_padding_takes_each_dimension_by_itself() -> None:
    assert same_padding((16, 8, 7), (1, 3, 2), (1, 2, 2)) == [(0, 0), (0, 1), (0, 1)]


@pytest.mark.parametrize(
    ("channels", "width", "expected"),
    [(64, 1.0, 64), (64, 0.25, 16), (192, 0.25, 48), (16, 0.05, 1), (24, 0.05, 1), (32, 0.05, 2), (16, 0.01, 1)],
)
def test_channels_with_a_width_are_rounded_and_one_at_least(channels: int, width: float, expected: int) -> None:
    assert scaled(channels, width) == expected


@pytest.mark.parametrize(
    ("kernel", "stride"),
    [((3, 3, 3), (1, 1, 1)), ((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (2, 2, 2)), ((2, 2, 2), (2, 2, 2))],
)
def test_pools_pad_with_zeros_at_every_size(kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    for size in itertools.product((1, 2, 3, 4), (1, 3, 4), (2, 5)):  # every remainder by a stride, and one window
        for shift in (0.0, -2.0):  # below zero everywhere, the padding is what counts
            x = (torch.randn(2, 3, *size) + shift).requires_grad_()
            twin = x.detach().clone().requires_grad_()
            pooled = MaxPool3dSame(kernel, stride, non_negative=False)(x)
            expected = F.max_pool3d(literal.padded(twin, kernel, stride), kernel, stride)
            assert torch.equal(pooled, expected)
            weight = torch.randn(pooled.shape)
            (pooled * weight).sum().backward()
            (expected * weight).sum().backward()
            torch.testing.assert_close(x.grad, twin.grad)
            with torch.no_grad():  # another way, where no gradient has to find its place
                assert torch.equal(MaxPool3dSame(kernel, stride, non_negative=False)(x), expected)
        positive = torch.rand(1, 2, *size)
        fast = MaxPool3dSame(kernel, stride, non_negative=True)(positive)
        assert torch.equal(fast, literal.max_pool(positive, kernel, stride))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("stride", "size"), [(1, 7), (2, 7), (2, 8), (2, 33)])
def test_a_convolution_s_gradients_are_right_in_16_bits_and_with_strides(
    stride: int, size: int, dtype: torch.dtype
) -> None:
    """Some of torch's own CPU kernels are not, when they are told to pad."""
    torch.manual_seed(0)
    unit = Unit3D(16, 32, (3, 3, 3), (stride, stride, stride), activation=None, batch_norm=False)
    x = torch.randn(1, 16, 2, size, size)
    torch.nn.init.zeros_(unit.conv3d.bias)  # type: ignore[arg-type]
    weight = unit.conv3d.weight
    padded = _pad(x, same_padding(x.shape[2:], unit.kernel, unit.stride)).double()
    exact = weight.detach().double().requires_grad_()
    expected = F.conv3d(padded, exact, stride=stride)
    seen = torch.randn(expected.shape)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = unit(x)
    (found.float() * seen).sum().backward()
    (expected * seen).sum().backward()
    assert weight.grad is not None and exact.grad is not None
    for ours, theirs in ((found, expected), (weight.grad, exact.grad)):
        allowed = 1e-5 if dtype == torch.float32 else 0.02
        assert (ours - theirs).abs().max() < allowed * theirs.abs().max()


@pytest.mark.parametrize("activation", ["relu", "swish", "mish", "gelu", "leaky_relu", "elu"])
def test_every_activation_trains(activation: str) -> None:
    config = tiny_config(model__activation=activation, model__activation_scope="all", model__stam_depth=2)
    stream = build_stream("flow", 5, config.model)
    logits, attention = stream(torch.randn(2, 2, 16, 32, 32))
    assert attention is not None
    (logits.square().sum() + attention.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in stream.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("span", [0.0, 1e-30, 1e-8, 6e-8, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("how", ["min_max", "subtract_min"])
def test_attention_scaling_is_finite(how: str, span: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a = (torch.rand(3, 2, 7, 7) * span).to(dtype).requires_grad_()
    scaled = scale_attention(a, how)
    (scaled * torch.randn(scaled.shape) * 100).sum().backward()
    assert scaled.isfinite().all() and a.grad is not None and a.grad.isfinite().all()
    if how == "min_max":
        assert scaled.min() == 0 and scaled.max() in (0, 1)
        assert (scaled.max() == 1) == (a.detach().float().amax() > a.detach().float().amin())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_only_maps_of_equal_values_scale_to_zeros(dtype: torch.dtype) -> None:
    """Down to the type's smallest difference; a derivative beyond the type is its largest number, with its sign."""
    spans = [1e-3, 1e-6, 2.0**-24] + ([1e-20, torch.finfo(dtype).tiny] if dtype != torch.float16 else [])
    for span in spans:
        a = torch.zeros(1, 2, 2, 2, dtype=dtype)
        a[0, 0, 0, 0], a[0, 1, 0, 1] = span, span / 2 if span > 1e-6 else 0.0
        a.requires_grad_()
        scaled = scale_attention(a, "min_max")
        torch.testing.assert_close(scaled, literal.scale(a.detach().to(scaled.dtype), "min_max"), rtol=1e-6, atol=0)
        assert scaled.max() == 1 and scaled.min() == 0
        weight = torch.zeros_like(scaled)
        weight[0, 0, 1, 1] = 1e3
        (scaled * weight).sum().backward()
        assert a.grad is not None and a.grad.isfinite().all()
        # Lower cells rise with theirs, and the lowest are all the minimum that is taken off.
        assert a.grad[0, 0, 1, 1] > 0 > a.grad[0, 1, 1, 1]
        assert a.grad[0, 0, 1, 1] <= torch.finfo(dtype).max


def test_gradient_of_the_attention_scaling_with_ties() -> None:
    """Equal extremes share their derivative, in torch too."""
    torch.manual_seed(0)
    a = torch.randint(0, 3, (4, 2, 3, 3)).double().requires_grad_()
    weight = torch.randn(a.shape, dtype=torch.float64)
    (scale_attention(a, "min_max") * weight).sum().backward()
    twin = a.detach().clone().requires_grad_()
    low, high = twin.amin((1, 2, 3), keepdim=True), twin.amax((1, 2, 3), keepdim=True)
    ((twin - low) / (high - low) * weight).sum().backward()
    torch.testing.assert_close(a.grad, twin.grad)


def test_an_overflow_before_the_attention_scaling_stays_visible() -> None:
    a = torch.rand(1, 2, 7, 7).half().requires_grad_()
    (scale_attention(a, "min_max") * torch.inf).sum().backward()
    assert a.grad is not None and not a.grad.isfinite().all()


def test_a_derivative_beyond_float16_reaches_the_loss_scaler() -> None:
    """Under autocast the loss is scaled: a derivative cut to the largest float16 would be wrong, not skipped."""
    a = (torch.rand(1, 2, 7, 7) * 1e-6).half().requires_grad_()
    with torch.autocast("cpu", torch.float16):
        scaled = scale_attention(a, "min_max")
    (scaled * torch.randn(scaled.shape) * 2.0**16).sum().backward()
    assert a.grad is not None and not a.grad.isfinite().all()


@pytest.mark.parametrize("how", ["min_max", "subtract_min"])
def test_gradient_of_the_attention_scaling(how: str) -> None:
    torch.manual_seed(0)
    a = torch.rand(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: scale_attention(a, how), a)
    equal = torch.full((1, 2, 3, 3), 0.3, dtype=torch.float64, requires_grad=True)
    scale_attention(equal, how).square().sum().backward()
    assert equal.grad is not None and (equal.grad == 0).all()
    torch.testing.assert_close(scale_attention(a, how), literal.scale(a.detach(), how), rtol=1e-12, atol=0)


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_batch_norm_s_running_statistics_equal_their_formula(momentum: float | None) -> None:
    """running = (1 - m) running + m of the batch, everywhere, with the unbiased variance; m is 0.01 by default."""
    torch.manual_seed(0)
    model = ModelConfig(width=0.06, stam_depth=2)
    if momentum is not None:
        model = model.model_copy(update={"bn_momentum": momentum})
    stream = randomised(build_stream("flow", 5, model)).train()
    share = 0.01 if momentum is None else momentum
    expected = {}

    def note(name: str, norm: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        x = inputs[0].detach().double().transpose(0, 1).flatten(1)
        mean = (1 - share) * norm.running_mean.double() + share * x.mean(dim=1)  # type: ignore[operator]
        squares = (x - x.mean(dim=1, keepdim=True)).square().sum(dim=1) / (x.shape[1] - 1)
        expected[name] = (mean, (1 - share) * norm.running_var.double() + share * squares)  # type: ignore[operator]

    norms = {name: part for name, part in stream.named_modules() if isinstance(part, torch.nn.BatchNorm3d)}
    for name, norm in norms.items():
        norm.register_forward_pre_hook(functools.partial(note, name))
    stream(torch.randn(2, 2, 16, 33, 33))
    assert expected.keys() == norms.keys() and "attention_pred.bn" in norms
    for name, (mean, variance) in expected.items():
        torch.testing.assert_close(norms[name].running_mean, mean.float(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(norms[name].running_var, variance.float(), rtol=1e-4, atol=1e-6)


def test_an_unknown_modality_is_refused() -> None:
    with pytest.raises(ValueError, match="no stream 'audio'; allowed: rgb, flow"):
        build_stream("audio", 5, ModelConfig())


def test_self_attention_equals_its_formula() -> None:
    """Softmax over all positions of (q . k / sqrt(d) + one term per axis and offset), then the MLP."""
    torch.manual_seed(0)
    block = AttentionBlock(256, "gelu").double()
    torch.nn.init.normal_(block.offset_terms)
    x = torch.randn(1, 256, 2, 3, 10, dtype=torch.float64)  # an offset of 9 is cut off at 7
    places = list(itertools.product(range(2), range(3), range(10)))
    tokens = torch.stack([x[0, :, t, i, j] for t, i, j in places])
    normed = block.attention_norm(tokens)
    q, k, v = (block.qkv(normed)[:, at : at + 128] for at in (0, 128, 256))
    attended = torch.zeros(len(places), 128, dtype=torch.float64)
    for head in range(2):
        of_head = slice(64 * head, 64 * head + 64)
        for n, here in enumerate(places):
            scores = []
            for m, there in enumerate(places):
                score = (q[n, of_head] * k[m, of_head]).sum() / 8
                for axis in range(3):
                    offset = max(-7, min(7, here[axis] - there[axis]))
                    score = score + block.offset_terms[axis, offset + 7, head]
                scores.append(score)
            attended[n, of_head] = torch.stack(scores).softmax(dim=0) @ v[:, of_head]
    tokens = tokens + block.attention_out(attended)
    tokens = tokens + block.mlp_out(F.gelu(block.mlp_in(block.mlp_norm(tokens))))
    out = block(x)
    for n, (t, i, j) in enumerate(places):
        torch.testing.assert_close(out[0, :, t, i, j], tokens[n], rtol=1e-9, atol=1e-11)


def test_self_attention_trains_at_every_depth_and_size() -> None:
    model = ModelConfig(width=0.25, stam_block="attention", stam_depth=2, activation="gelu")
    stream = build_stream("rgb", 5, model)
    logits, attention = stream(torch.randn(2, 3, 16, 64, 96))
    assert attention is not None and attention.shape == (2, 2, 2, 3)
    (logits.square().sum() + attention.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in stream.parameters())


def test_self_attention_has_about_the_parameters_of_the_inception_block() -> None:
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in build_stream("rgb", 106, ModelConfig(stam_block=block)).parameters())
            for block in ("inception", "attention")
        ]
    assert counts[1] == pytest.approx(counts[0], rel=0.02)


@pytest.mark.parametrize(("kernel", "stride"), [((3, 3, 3), (2, 2, 2)), ((1, 3, 3), (1, 2, 2)), ((2, 2, 2), (2, 2, 2))])
def test_the_deterministic_max_pool_is_the_kernels(kernel: Triple, stride: Triple) -> None:
    """Values and gradients, to the bit, with many equal values."""
    torch.manual_seed(0)
    x = torch.randint(0, 4, (2, 3, 7, 9, 8)).float()
    padding = [amount for pair in reversed(same_padding(x.shape[2:], kernel, stride)) for amount in pair]
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    pooled = MaxPool3dSame(kernel, stride, non_negative=True)(leaves[0])
    deterministic = max_pool3d_deterministic(F.pad(leaves[1], padding), kernel, stride)
    assert torch.equal(pooled, deterministic)
    for output in (pooled, deterministic):
        output.backward(torch.arange(output.numel(), dtype=torch.float32).reshape(output.shape))
    above = x > 0  # a zero may be the padding's, which has no gradient to give; ReLU takes it away in any case
    gradients = [leaf.grad for leaf in leaves]
    assert gradients[0] is not None and gradients[1] is not None
    assert torch.equal(gradients[0][above], gradients[1][above])
