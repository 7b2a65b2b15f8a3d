from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import tiny_config
from tune_ego.checkpoint import Origin, pack, read_checkpoint, rebuild, to_bytes
from tune_ego.config import ModelConfig
from tune_ego.errors import UserError
from tune_ego.model import TwoStream, build_stream, load_weights
from tune_ego.model.i3d import MaxPool3dSame, same_padding


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


def test_full_size_shapes() -> None:
    stream = build_stream("flow", num_classes=106, model=ModelConfig()).eval()
    with torch.inference_mode():
        logits, attention = stream(torch.zeros(1, 2, 16, 224, 224))
    assert logits.shape == (1, 106)
    assert attention is not None and attention.shape == (1, 2, 7, 7)


@pytest.mark.parametrize("size", [7, 8, 9, 10, 11])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (2, 2), (3, 1), (3, 2), (7, 2)])
def test_same_padding_gives_ceil_of_size_over_stride(size: int, kernel: int, stride: int) -> None:
    ((front, back), *_) = same_padding((size,), (kernel,) * 3, (stride,) * 3)
    assert 0 <= back - front <= 1
    assert (size + front + back - kernel) // stride + 1 == -(-size // stride)


@pytest.mark.parametrize("size", [(3, 7, 8), (2, 4, 5)])
def test_pool_pads_with_zeros(size: tuple[int, int, int]) -> None:
    x = -torch.rand(1, 2, *size) - 0.5
    pooled = MaxPool3dSame((3, 3, 3), (1, 1, 1), non_negative=False)(x)
    assert torch.equal(pooled, F.max_pool3d(F.pad(x, [1] * 6), 3, 1))
    fast = MaxPool3dSame((3, 3, 3), (1, 1, 1), non_negative=True)(-x)
    assert torch.equal(fast, F.max_pool3d(F.pad(-x, [1] * 6), 3, 1))


@pytest.mark.parametrize("scope", ["stam", "all"])
@pytest.mark.parametrize("activation", ["relu", "swish", "mish", "gelu", "leaky_relu", "elu"])
def test_every_variant_trains(activation: str, scope: str) -> None:
    config = tiny_config(model__activation=activation, model__activation_scope=scope, model__stam_depth=2)
    model = TwoStream(("rgb", "flow"), 5, config.model)
    outputs = model({"rgb": torch.randn(2, 3, 16, 32, 32), "flow": torch.randn(2, 2, 16, 32, 32)})
    sum(output.logits_BK.square().sum() + output.attention_BTHW.sum() for output in outputs.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def small(modality: str = "rgb", classes: int = 5, depth: int = 1) -> torch.nn.Module:
    return build_stream(modality, classes, ModelConfig(width=0.05, stam_depth=depth))


def test_published_weights_without_attention_and_with_other_classes(tmp_path: Path) -> None:
    published = small(classes=9, depth=0)
    torch.save({f"module.{name}": value for name, value in published.state_dict().items()}, tmp_path / "w.pt")
    stream = small()
    report = load_weights(stream, tmp_path / "w.pt")  # type: ignore[arg-type]
    assert sorted(report.left_out) == ["logits.conv3d.bias", "logits.conv3d.weight"]
    assert all(name.startswith(("attention_", "logits.")) for name in report.fresh)
    name = "Mixed_4b.b1b.conv3d.weight"
    assert name in report.loaded
    assert torch.equal(stream.state_dict()[name], published.state_dict()[name])


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
    loaded["config"]["model"]["stam_depth"] = 2
    with pytest.raises(UserError, match=r"another model: flow\.attention_inc_2.*absent"):
        rebuild(loaded, "c")
