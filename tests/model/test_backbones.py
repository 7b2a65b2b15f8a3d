"""Backbones of torchvision: parameters, operations and features against torchvision's own models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import video

from tests.conftest import tiny_config
from tests.training.test_step import CPU, ORIGIN, batch
from tests.training.test_train import assert_same_state
from tune_ego.config import ModelConfig
from tune_ego.errors import UserError
from tune_ego.model import Stream, build_stream, load_weights
from tune_ego.model.backbones import FACTS, first_convolution
from tune_ego.training.trainer import Trainer, _saved_buffers

WEIGHTS = {
    "s3d": video.S3D_Weights,
    "r2plus1d_18": video.R2Plus1D_18_Weights,
    "mvit_v2_s": video.MViT_V2_S_Weights,
    "swin3d_t": video.Swin3D_T_Weights,
}
SHAPES = {
    "s3d": (1024, 2, 3, 3),
    "r2plus1d_18": (512, 2, 6, 6),
    "mvit_v2_s": (768, 8, 3, 3),
    "swin3d_t": (768, 8, 3, 3),
}
"""Shape of the feature map of 16 frames of 96 x 96 pixels."""
NAMES = list(FACTS)


def torchvision_model(name: str) -> nn.Module:
    """The model with weights and running statistics drawn at random."""
    torch.manual_seed(1)
    model: nn.Module = getattr(video, name)(weights=None)
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif key.endswith(("running_mean", "norm.weight", "norm.bias")):
            value.uniform_(-0.5, 1.5)
    return model.eval()


def stream_of(name: str, modality: str = "rgb", classes: int = 5, **changes: Any) -> Stream:
    torch.manual_seed(2)
    return build_stream(modality, classes, ModelConfig.model_validate({"backbone": name, **changes})).eval()


def torchvision_features(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """Output of the last module before torchvision's head, as [B, C, T', H', W']."""
    last = {"s3d": "features", "r2plus1d_18": "layer4", "mvit_v2_s": "norm", "swin3d_t": "norm"}[name]
    seen: list[Tensor] = []
    handle = model.get_submodule(last).register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        model(x)
    handle.remove()
    (output,) = seen
    if name == "mvit_v2_s":
        return output[:, 1:].transpose(1, 2).reshape(len(x), 768, 8, 7, 7)
    return output.permute(0, 4, 1, 2, 3) if name == "swin3d_t" else output


@pytest.mark.parametrize("name", NAMES)
def test_published_weights_give_torchvision_s_features(name: str, tmp_path: Path) -> None:
    """A state dict of the published form, saved and loaded both ways. MViT knows clips of 16 x 224 x 224 only."""
    model, stream = torchvision_model(name), stream_of(name)
    torch.save(model.state_dict(), tmp_path / "kinetics.pth")
    result = load_weights(stream, tmp_path / "kinetics.pth")
    head = [key for key in model.state_dict() if key.split(".")[0] in FACTS[name].head]
    assert head and result.left_out == head
    assert set(result.fresh_modules) == {"attention_inc", "attention_pred", "logits"}
    transforms = WEIGHTS[name].DEFAULT.transforms()
    mean, std = (torch.tensor(values).reshape(3, 1, 1, 1) for values in (transforms.mean, transforms.std))
    x = torch.rand(1, 3, 16, *([224, 224] if name == "mvit_v2_s" else [225, 225] if name == "s3d" else [96, 80]))
    x = x[..., :224, :224]
    expected = torchvision_features(model, name, (x - mean) / std)
    with torch.no_grad():
        found = stream.get_submodule("trunk")(2 * x - 1)
    assert expected.abs().mean() > 0.01
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_the_trunk_has_torchvision_s_parameters_and_operations(name: str) -> None:
    model, stream = torchvision_model(name), stream_of(name, stam_depth=0)
    head = sum(p.numel() for part in FACTS[name].head for p in model.get_submodule(part).parameters())
    trunk = stream.get_submodule("trunk")
    assert sum(p.numel() for p in trunk.parameters()) == sum(p.numel() for p in model.parameters()) - head
    side = 224 if name in ("mvit_v2_s", "s3d") else 64
    counts = []
    for network in (model, trunk):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.to("meta")(torch.empty(1, 3, 16, side, side, device="meta"))
        counts.append(counter.get_total_flops())
    classes = {
        "s3d": 2 * 1024 * 400,
        "r2plus1d_18": 2 * 512 * 400,
        "mvit_v2_s": 2 * 768 * 400,
        "swin3d_t": 2 * 768 * 400,
    }
    assert counts[1] == counts[0] - classes[name] > 1e8


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("modality", ["rgb", "flow"])
def test_attention_is_on_the_backbone_s_own_map(name: str, modality: str) -> None:
    stream = stream_of(name, modality, stam_block="attention" if modality == "flow" else "inception")
    channels, *size = SHAPES[name]
    clip = torch.rand(2, 3 if modality == "rgb" else 2, 16, 96, 96) * 2 - 1
    with torch.no_grad():
        assert stream.get_submodule("trunk")(clip).shape == (2, channels, *size)
        output = stream(clip)
    assert output.logits_BK.shape == (2, 5) and output.attention_BTHW is not None
    assert output.attention_BTHW.shape == (2, *size) and 16 // stream.frames_per_slice == size[0]


@pytest.mark.parametrize("name", NAMES)
def test_flow_starts_from_the_mean_of_the_colour_filters(name: str, tmp_path: Path) -> None:
    model, stream = torchvision_model(name), stream_of(name, "flow")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "kinetics.pth")
    load_weights(stream, tmp_path / "kinetics.pth")
    trunk, first = stream.get_submodule("trunk"), first_convolution(model)
    weight = trunk.get_parameter(f"{first}.weight")
    published = model.get_parameter(f"{first}.weight")
    assert weight.shape == (len(published), 2, *published.shape[2:])
    torch.testing.assert_close(weight[:, 1], published.mean(dim=1))
    torch.testing.assert_close(weight[:, 0], published.mean(dim=1))
    others = [key for key in trunk.state_dict() if not key.startswith(first)]
    assert all(torch.equal(trunk.state_dict()[key], model.state_dict()[key]) for key in others)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    torch.save(torchvision_model("r2plus1d_18").state_dict(), tmp_path / "r.pth")
    torch.save(build_stream("rgb", 400, ModelConfig(stam_depth=0)).state_dict(), tmp_path / "i3d.pt")
    stream = stream_of("s3d")
    for file in ("r.pth", "i3d.pt"):
        with pytest.raises(UserError, match=rf"{file}: not weights of this model: \d+ unknown \(first "):
            load_weights(stream, tmp_path / file)
    wrong = torchvision_model("s3d").state_dict()
    wrong["features.0.0.0.weight"] = torch.zeros(64, 3, 1, 5, 5)
    torch.save(wrong, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=r"trunk\.features\.0\.0\.0\.weight is \(64, 3, 1, 5, 5\) in the file"):
        load_weights(stream, tmp_path / "wrong.pth")


def test_a_checkpoint_of_ours_is_loaded_by_its_own_names(tmp_path: Path) -> None:
    first = stream_of("s3d", classes=3)
    torch.save({f"rgb.{key}": value for key, value in first.state_dict().items()}, tmp_path / "model.pt")
    second = stream_of("s3d", classes=3)
    for parameter in second.parameters():
        parameter.data.zero_()
    result = load_weights(second, tmp_path / "model.pt")
    assert result.fresh == result.left_out == [] and all(map(torch.equal, first.parameters(), second.parameters()))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model__width": 0.5}, "model.width"),
        ({"model__activation_scope": "all"}, "model.activation_scope"),
        ({"train__activation_checkpointing": True}, "train.activation_checkpointing"),
        ({"train__deterministic": True}, "train.deterministic"),
    ],
)
def test_keys_of_i3d_are_refused(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=f"{key}: only model.backbone i3d has it, not s3d"):
        tiny_config(**{"model__backbone": "s3d", "model__width": 1.0, **changes})


@pytest.mark.parametrize("name", NAMES)
def test_a_backbone_trains_and_resumes_to_the_bit(name: str) -> None:
    """Two steps at once, and one step, a checkpoint, and another one; dropout and stochastic depth are seeded."""
    config = tiny_config(
        model__backbone=name, model__width=1.0, streams="rgb", train__precision="off", train__batch_size=2
    )
    batches = [batch(number, clips=2) for number in range(2)]
    whole = Trainer(config, ORIGIN, CPU)
    start = {key: value.clone() for key, value in whole.model.state_dict().items()}
    losses = [whole.step(iter([one])).clone() for one in batches]
    first = Trainer(config, ORIGIN, CPU)
    first.step(iter(batches[:1]))
    first.flush_status()
    second = Trainer(config, ORIGIN, CPU)
    second.load(first.checkpoint(), "checkpoint")
    assert torch.equal(second.step(iter(batches[1:])), losses[1]) and losses[1].isfinite().all()
    whole.flush_status()
    second.flush_status()
    assert_same_state(second.checkpoint(), whole.checkpoint())
    moved = [key for key, value in whole.model.named_parameters() if not torch.equal(value, start[key])]
    assert len(moved) > 0.9 * len(list(whole.model.parameters()))


def test_running_statistics_move_with_the_configured_momentum() -> None:
    stream = stream_of("s3d", bn_momentum=0.25)
    norms = [module for module in stream.modules() if isinstance(module, nn.BatchNorm3d)]
    assert len(norms) > 50 and {norm.momentum for norm in norms} == {0.25}


def test_the_gaze_loss_is_a_mean_over_the_backbone_s_own_slices() -> None:
    """Eight slices of two frames; gaze in frames 3, 5 and 14 of the first window alone: three slices have a target."""
    config = tiny_config(
        model__backbone="swin3d_t", model__width=1.0, streams="rgb", train__batch_size=2, train__precision="off"
    )
    trainer, one = Trainer(config, ORIGIN, CPU), batch(0, clips=2)
    valid = torch.zeros(2, 16, dtype=torch.bool)
    valid[0, [3, 5, 14]] = True
    one = one._replace(gaze_valid_BT=valid, gaze_BT2=torch.full((2, 16, 2), 0.3))
    assert trainer._gaze_slices([one]).item() == 3
    assert trainer.step(iter([one])).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_memory_format_of_mixed_precision_changes_no_output(name: str) -> None:
    """A GPU in 16 bits has the model in channels last."""
    stream = stream_of(name)
    clip = torch.rand(1, 3, 16, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = stream(clip).logits_BK
        found = stream.to(memory_format=torch.channels_last_3d)(clip).logits_BK
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_constants_are_not_shared_between_workers() -> None:
    trainer = Trainer(tiny_config(model__backbone="s3d", model__width=1.0, streams="rgb"), ORIGIN, CPU)
    shared = {id(buffer) for buffer in _saved_buffers(trainer.model)}
    names = {name for name, buffer in trainer.model.named_buffers() if id(buffer) not in shared}
    assert names == {"rgb.trunk._shift", "rgb.trunk._scale"}
