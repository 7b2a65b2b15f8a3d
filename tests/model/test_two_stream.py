"""A stream after its trunk, and the pair of streams: made-up features, numbers worked out by hand."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tune_ego.config import ModelConfig
from tune_ego.model import Stream, TwoStream, build_stream
from tune_ego.model.i3d import Unit3D
from tune_ego.model.two_stream import _statistics_kept


def after_the_trunk(stream: Stream, classifier: list[list[float]]) -> Stream:
    """A stream whose clip is the trunk's output already, with a classifier [classes, channels]; the unscaled map is the
    clip's first channel."""
    stream._trunk = ()
    stream.logits = Unit3D(len(classifier[0]), len(classifier), activation=None, batch_norm=False)
    with torch.no_grad():
        stream.logits.conv3d.weight.copy_(torch.tensor(classifier)[..., None, None, None])
        stream.logits.conv3d.bias.copy_(torch.arange(len(classifier)))  # type: ignore[union-attr]
    for name in stream.attention_modules:
        setattr(stream, name, torch.nn.Identity())
    return stream


def test_the_features_are_multiplied_by_the_map_and_averaged() -> None:
    """Channel 0 is (2, 4 | 6, 10), its map by min and max (0, 1/4 | 1/2, 1): it gives (0 + 1 + 3 + 10) / 4 = 3.5, and
    channel 1 of (8, 8 | 4, 2) gives (0 + 2 + 2 + 2) / 4 = 1.5; logits 3.5 + 2 x 1.5 + 0 and 1.5 + 1. The second clip's
    map is its own: (0, 0 | 0, 1), channel 0 gives 9 / 4, channel 1 gives 0."""
    stream = build_stream("rgb", 2, ModelConfig(width=0.05, dropout=0.0))
    after_the_trunk(stream, [[1.0, 2.0], [0.0, 1.0]])
    clips = torch.tensor([[[2, 4, 6, 10], [8, 8, 4, 2]], [[1, 1, 1, 9], [8, 8, 4, 0]]]).float()
    logits, attention = stream(clips.reshape(2, 2, 2, 1, 2))
    assert attention is not None
    assert attention.tolist() == [[[[0, 0.25]], [[0.5, 1]]], [[[0, 0]], [[0, 1]]]]
    assert logits.tolist() == [[6.5, 2.5], [2.25, 1.0]]


def test_the_map_less_its_minimum_is_not_divided() -> None:
    """(2, 4 | 6, 10) less 2: (0, 2 | 4, 8); (0 + 8 + 24 + 80) / 4 = 28."""
    model = ModelConfig(width=0.05, dropout=0.0, attention_scale="subtract_min")
    stream = after_the_trunk(build_stream("rgb", 1, model), [[1.0]])
    logits, attention = stream(torch.tensor([2.0, 4, 6, 10]).reshape(1, 1, 2, 1, 2))
    assert attention is not None and attention.flatten().tolist() == [0, 2, 4, 8]
    assert logits.tolist() == [[28]]


@pytest.mark.parametrize("dropout", [0.5, 0.2])
def test_dropout_is_applied_in_training_alone_and_after_the_average(dropout: float) -> None:
    """A classifier that hands on its input, ones, shows what dropout made of it: nothing, or 1 / (1 - p) of it."""
    torch.manual_seed(0)
    stream = build_stream("rgb", 1000, ModelConfig(width=0.05, stam_depth=0, dropout=dropout))
    after_the_trunk(stream, torch.eye(1000).tolist())
    torch.nn.init.zeros_(stream.logits.conv3d.bias)  # type: ignore[arg-type]
    clip = torch.ones(2, 1000, 2, 2, 2)
    kept = stream.train()(clip).logits_BK
    assert kept.unique().tolist() == pytest.approx([0, 1 / (1 - dropout)])
    assert (kept == 0).double().mean().item() == pytest.approx(dropout, abs=0.05)
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(stream.eval()(clip).logits_BK, torch.ones(2, 1000))


class Notes(torch.nn.Module):
    """A stream that gives the first number that dropout would draw, and its clip's."""

    def forward(self, clip: torch.Tensor) -> tuple[float, float]:
        return torch.initial_seed(), clip.sum().item()


def test_each_stream_has_its_own_clip_and_its_own_dropout_s_seed() -> None:
    model = TwoStream((), 2, ModelConfig())
    model["rgb"], model["flow"] = Notes(), Notes()
    clips = {"flow": torch.tensor([7.0]), "rgb": torch.tensor([3.0])}
    assert model(clips, {"flow": 22, "rgb": 11}) == {"rgb": (11, 3.0), "flow": (22, 7.0)}
    torch.manual_seed(5)
    assert model(clips) == {"rgb": (5, 3.0), "flow": (5, 7.0)}


def test_a_stream_s_first_weights_come_from_its_own_seed() -> None:
    """Whether it is alone or not."""
    config = ModelConfig(width=0.05)
    seeds = {"rgb": 1, "flow": 2}
    both, flow = TwoStream(("rgb", "flow"), 2, config, seeds), TwoStream(("flow",), 2, config, seeds)
    for modality, seed in seeds.items():
        torch.manual_seed(seed)
        expected = build_stream(modality, 2, config).state_dict()
        for name, value in both[modality].state_dict().items():
            assert torch.equal(value, expected[name])
    assert all(torch.equal(value, both.state_dict()[name]) for name, value in flow.state_dict().items())


def test_recomputing_is_set_for_every_stream_and_only_where_gradients_are() -> None:
    model = TwoStream(("rgb", "flow"), 2, ModelConfig(width=0.05, stam_depth=0, dropout=0.0))
    calls = {"rgb": 0, "flow": 0}

    def count(modality: str, *_: Any) -> None:
        calls[modality] += 1

    for modality, stream in model.items():
        stream.Mixed_5c.register_forward_pre_hook(functools.partial(count, modality))  # type: ignore[union-attr]
    clips = {"rgb": torch.zeros(1, 3, 16, 32, 32), "flow": torch.zeros(1, 2, 16, 32, 32)}
    for recomputes, times in ((True, 2), (False, 1)):
        calls.update(rgb=0, flow=0)
        model.recompute(recomputes)
        sum(output.logits_BK.sum() for output in model(clips).values()).backward()
        assert calls == {"rgb": times, "flow": times}
    model.recompute(True)
    calls.update(rgb=0, flow=0)
    with torch.no_grad():
        model(clips)
    assert calls == {"rgb": 1, "flow": 1}


KINDS = [torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d]


def test_the_counter_of_batches_stays_a_tensor_while_recomputing() -> None:
    """BatchNorm over all workers refuses a counter of None."""
    norm = torch.nn.SyncBatchNorm(2)
    with _statistics_kept(norm):
        assert norm.num_batches_tracked is not None and norm.momentum == 0.0
    assert norm.momentum == 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_leaves_the_statistics_of_every_batch_norm(
    kind: type[torch.nn.modules.batchnorm._BatchNorm],
) -> None:
    norm = kind(2)
    x = torch.rand(4, 2, *[3] * {torch.nn.BatchNorm1d: 0, torch.nn.BatchNorm2d: 2}.get(kind, 3))
    expected = norm(x)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with _statistics_kept(norm):
        assert torch.equal(norm(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    norm(x)
    assert norm.num_batches_tracked == 2


def test_a_module_with_other_buffers_is_not_recomputed() -> None:
    model = TwoStream(("flow",), 2, ModelConfig(width=0.05, stam_depth=0))
    model["flow"].add_module("Mixed_5c", torch.nn.InstanceNorm3d(2, track_running_stats=True))
    with pytest.raises(TypeError, match="InstanceNorm3d"):
        model.recompute(True)
    model.recompute(False)
    model["flow"].add_module("Mixed_5c", torch.nn.Sequential(torch.nn.InstanceNorm3d(2)))
    model.recompute(True)  # without statistics
    model["flow"].add_module("Mixed_5c", torch.nn.Sequential(torch.nn.Dropout(0.5)))
    with pytest.raises(TypeError, match="Dropout"):
        model.recompute(True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recomputes", [False, True])
def test_the_map_is_computed_in_float32_under_autocast(dtype: torch.dtype, recomputes: bool) -> None:
    """Nearly every cell has a value of its own; in 16 bits the scaled maps of 98 cells share some 30 values."""
    torch.manual_seed(0)
    model = TwoStream(("flow",), 3, ModelConfig(width=0.1, dropout=0.0))
    model.recompute(recomputes)
    model.eval()
    clips = {"flow": torch.rand(1, 2, 16, 224, 224) * 2 - 1}
    with torch.autocast("cpu", dtype):
        output = model(clips)["flow"]
    attention = output.attention_BTHW
    assert attention is not None and attention.dtype == torch.float32 and output.logits_BK.dtype == dtype
    positive = attention[attention > 0]
    assert len(positive.unique()) > 0.95 * len(positive)
    if dtype == torch.bfloat16:
        (attention.sum() + output.logits_BK.float().sum()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
