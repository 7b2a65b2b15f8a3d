from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests import literal
from tests.conftest import tiny_config
from tune_ego.checkpoint import Origin, pack, read_checkpoint, rebuild, to_bytes
from tune_ego.config import ModelConfig
from tune_ego.errors import UserError
from tune_ego.model import TwoStream, build_stream, load_weights
from tune_ego.model.i3d import MaxPool3dSame, Triple, Unit3D, _pad, max_pool3d_deterministic, same_padding
from tune_ego.model.stam import AttentionBlock, scale_attention
from tune_ego.model.two_stream import CHANNELS
from tune_ego.model.weights import load_tensors


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
        ("flow", (9, 37, 32), {"activation": "mish", "activation_scope": "all", "stam_depth": 2}),
        ("rgb", (16, 32, 32), {"activation": "gelu", "activation_scope": "all"}),
        ("rgb", (16, 32, 32), {"activation": "leaky_relu", "activation_scope": "all"}),
        ("flow", (16, 32, 32), {"activation": "elu", "activation_scope": "all"}),
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


@pytest.mark.parametrize("size", [7, 8, 9, 10, 11])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (2, 2), (3, 1), (3, 2), (7, 2)])
def test_same_padding_gives_ceil_of_size_over_stride(size: int, kernel: int, stride: int) -> None:
    ((front, back), *_) = same_padding((size,), (kernel,) * 3, (stride,) * 3)
    assert 0 <= back - front <= 1
    assert (size + front + back - kernel) // stride + 1 == -(-size // stride)


@pytest.mark.parametrize(
    ("kernel", "stride"),
    [((3, 3, 3), (1, 1, 1)), ((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (2, 2, 2)), ((2, 2, 2), (2, 2, 2))],
)
def test_pools_pad_with_zeros_at_every_size(kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    for size in itertools.product(range(1, 5), range(1, 7), range(1, 7)):
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


@pytest.mark.parametrize("scope", ["stam", "all"])
@pytest.mark.parametrize("activation", ["relu", "swish", "mish", "gelu", "leaky_relu", "elu"])
def test_every_variant_trains(activation: str, scope: str) -> None:
    config = tiny_config(model__activation=activation, model__activation_scope=scope, model__stam_depth=2)
    model = TwoStream(("rgb", "flow"), 5, config.model)
    outputs = model({"rgb": torch.randn(2, 3, 16, 32, 32), "flow": torch.randn(2, 2, 16, 32, 32)})
    sum(output.logits_BK.square().sum() + output.attention_BTHW.sum() for output in outputs.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


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
        assert (scaled.max() == 1) == (a.detach().float().amax() - a.detach().float().amin() > 1e-12)


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


def test_copy_init_copies_the_first_block_unless_a_file_has_the_others(tmp_path: Path) -> None:
    model = ModelConfig(width=0.05, stam_depth=3, copy_init=True)

    def blocks(stream: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
        return [
            {key.partition(".")[2]: value for key, value in stream.state_dict().items() if key.startswith(f"{name}.")}
            for name in ("attention_inc", "attention_inc_2", "attention_inc_3")
        ]

    def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(value, other[key]) for key, value in one.items())

    first, second, third = blocks(build_stream("rgb", 5, model))
    assert same(first, second) and same(first, third)
    first, second, _ = blocks(build_stream("rgb", 5, model.model_copy(update={"copy_init": False})))
    assert not same(first, second)
    torch.save(small(depth=2).state_dict(), tmp_path / "two.pt")
    stream = build_stream("rgb", 5, model)
    load_weights(stream, tmp_path / "two.pt")
    loaded = load_tensors(tmp_path / "two.pt")
    first, second, third = blocks(stream)
    assert torch.equal(first["b0.conv3d.weight"], loaded["attention_inc.b0.conv3d.weight"])
    assert torch.equal(second["b0.conv3d.weight"], loaded["attention_inc_2.b0.conv3d.weight"])
    assert same(first, third) and not same(first, second)


def small(modality: str = "rgb", classes: int = 5, depth: int = 1) -> torch.nn.Module:
    return build_stream(modality, classes, ModelConfig(width=0.05, stam_depth=depth))


def test_published_weights_without_attention_and_with_other_classes(tmp_path: Path) -> None:
    published = small(classes=9, depth=0)
    torch.save({f"module.{name}": value for name, value in published.state_dict().items()}, tmp_path / "w.pt")
    stream = small()
    report = load_weights(stream, tmp_path / "w.pt")  # type: ignore[arg-type]
    assert sorted(report.left_out) == ["logits.conv3d.bias", "logits.conv3d.weight"]
    assert report.modules_left_out == ["logits"]
    assert report.fresh_modules == ["attention_inc", "attention_pred", "logits"]
    name = "Mixed_4b.b1b.conv3d.weight"
    assert name in report.loaded
    assert torch.equal(stream.state_dict()[name], published.state_dict()[name])


def test_attention_is_left_out_only_where_the_stream_has_none(tmp_path: Path) -> None:
    torch.save(small(depth=2).state_dict(), tmp_path / "deep.pt")
    report = load_weights(small(depth=0), tmp_path / "deep.pt")  # type: ignore[arg-type]
    assert report.modules_left_out == ["attention_inc", "attention_inc_2", "attention_pred"] and not report.fresh
    with pytest.raises(UserError, match=r"unknown \(first attention_inc_2\."):
        load_weights(small(depth=1), tmp_path / "deep.pt")  # type: ignore[arg-type]
    torch.save(small(depth=1).state_dict(), tmp_path / "shallow.pt")
    report = load_weights(small(depth=2), tmp_path / "shallow.pt")  # type: ignore[arg-type]
    assert report.fresh_modules == ["attention_inc_2"] and not report.left_out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("attention_pred.conv3d.weight", r"1 absent \(first attention_pred\.conv3d\.weight"),
        ("attention_inc.b0.bn.weight", r"1 absent \(first attention_inc\.b0\.bn\.weight"),
        ("logits.conv3d.bias", r"1 absent \(first logits\.conv3d\.bias"),
    ],
)
def test_weights_with_a_hole_are_refused(tmp_path: Path, change: str, reason: str) -> None:
    state = small().state_dict()
    del state[change]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=reason):
        load_weights(small(), tmp_path / "w.pt")  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(9, 7, 1, 1, 1), (9, 50, 3, 1, 1), (8, 50, 1, 1, 1), (9, 50)])
def test_a_classifier_of_another_shape_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    state = small().state_dict()
    assert state["logits.conv3d.weight"].shape == (5, 50, 1, 1, 1)
    state.update({"logits.conv3d.weight": torch.zeros(shape), "logits.conv3d.bias": torch.zeros(9)})
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"logits\.conv3d\.(weight|bias) is \("):
        load_weights(small(), tmp_path / "w.pt")  # type: ignore[arg-type]


def test_weights_of_the_other_modality_are_refused(tmp_path: Path) -> None:
    torch.save(small("flow").state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"Conv3d_1a_7x7\.conv3d\.weight.*\(3, 2, 7, 7, 7\).*\(3, 3, 7, 7, 7\)"):
        load_weights(small("rgb"), tmp_path / "w.pt")  # type: ignore[arg-type]


class Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("this ran",))


def test_files_that_are_no_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": Runs()}, tmp_path / "code.pt")
    good = tmp_path / "good.pt"
    torch.save(small().state_dict(), good)
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:5000])
    for name in ("code.pt", "cut.pt", "absent.pt"):
        with pytest.raises(UserError, match=name):
            load_weights(small(), tmp_path / name)  # type: ignore[arg-type]
    assert "this ran" not in capsys.readouterr().out


def test_a_checkpoint_rebuilds_its_model_and_refuses_another(tmp_path: Path) -> None:
    config = tiny_config()
    origin = Origin(["a", "b"], (48, 36), "dis")
    model = TwoStream(config.stream_names, 2, config.model)
    content = pack(config, origin, 7, {}, model=model.state_dict())
    (tmp_path / "checkpoint.pt").write_bytes(to_bytes(content))
    loaded = read_checkpoint(str(tmp_path))
    again_config, again_origin, again = rebuild(loaded, "c")
    assert (again_config, again_origin) == (config, origin)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    loaded["model"]["rgb.logits.conv3d.bias"] = "text"
    with pytest.raises(UserError, match=r"another model: rgb\.logits\.conv3d\.bias is absent there, \(2,\) in"):
        rebuild(loaded, "c")
    loaded["model"] = model.state_dict()
    loaded["config"]["model"]["stam_depth"] = 2
    with pytest.raises(UserError, match=r"another model: flow\.attention_inc_2.*absent"):
        rebuild(loaded, "c")


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
