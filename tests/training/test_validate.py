"""Validation by the trainer, on batches and scores made by hand: what is measured, kept, and given to the schedules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tune_ego.config import Config
from tune_ego.config_io import override_config
from tune_ego.feed.batches import ClipBatch
from tune_ego.model import StreamOutput
from tune_ego.results.experiment import METRIC
from tune_ego.training.checkpoint import Origin
from tune_ego.training.trainer import Trainer

CPU = torch.device("cpu")
LABELS = [0, 0, 0, 1, 2]
# Windows of five clips: the clip, and each stream's scores of three classes. Clip 0 has two windows.
WINDOWS: list[tuple[int, list[float], list[float]]] = [
    (0, [0.9, 0.05, 0.05], [0.6, 0.35, 0.05]),
    (1, [0.8, 0.1, 0.1], [0.45, 0.5, 0.05]),
    (2, [0.35, 0.6, 0.05], [0.6, 0.35, 0.05]),
    (0, [0.7, 0.15, 0.15], [0.3, 0.65, 0.05]),
    (3, [0.3, 0.6, 0.1], [0.6, 0.3, 0.1]),
    (4, [0.5, 0.1, 0.4], [0.1, 0.1, 0.8]),
]
# What each clip is taken for, worked out from their mean scores:
#   RGB    0 0 1 1 0   right: 3 of 5   recalls 2/3, 1, 0
#   flow   1 1 0 0 2   right: 2 of 5   recalls 1/3, 0, 1
#   fused  0 0 0 0 2   right: 4 of 5   recalls 1, 0, 1     (0.3 RGB + 0.7 flow)
# With 0.7 RGB + 0.3 flow it would be 0 0 1 1 2, recalls 2/3, 1, 1.
RGB, FLOW, FUSED = (2 / 3 + 1 + 0) / 3, (1 / 3 + 0 + 1) / 3, (1 + 0 + 1) / 3
OWN_SCORES = {"rgb": [0.8, 0.8, 0.35, 0.6, 0.4], "flow": [0.45, 0.45, 0.6, 0.3, 0.8]}


class Plan:
    """The part of a `FeedPlan` that `Trainer.validate` reads."""

    validation_items = 2
    validation_labels = LABELS


class Model:
    """A forward pass that gives the scores of the window whose number the images are filled with."""

    def __init__(self, windows: list[tuple[int, list[float], list[float]]] = WINDOWS) -> None:
        scores = [*windows, (0, [0.01, 0.01, 0.98], [0.01, 0.01, 0.98])]  # of padding
        self.logits = {
            "rgb": torch.tensor([rgb for _, rgb, _ in scores]).log() + 2,
            "flow": torch.tensor([flow for _, _, flow in scores]).log() - 1,
        }
        self.streams: tuple[str, ...] = ("rgb", "flow")
        self.seeds: list[Any] = []

    def __call__(self, clips: Mapping[str, Tensor], seeds: Any = None) -> dict[str, StreamOutput]:
        self.seeds.append(seeds)
        numbers = {name: ((clip[:, 0, 0, 0, 0] + 1) * 127.5).round().long() for name, clip in clips.items()}
        return {name: StreamOutput(self.logits[name][numbers[name]], None) for name in self.streams}


def batches() -> list[ClipBatch]:
    """Two batches of four windows each; the last has one window of padding, numbered as one of clip 0."""
    made = []
    for numbers in ([0, 1, 2, 3], [4, 5, 6, 6]):
        clips = [WINDOWS[number][0] if number < 6 else 0 for number in numbers]
        image = torch.tensor(numbers, dtype=torch.uint8).reshape(4, 1, 1, 1, 1)
        made.append(
            ClipBatch(
                image.expand(4, 16, 2, 2, 3),
                image.expand(4, 16, 2, 2, 2),
                torch.zeros(4, 16, 2),
                torch.zeros(4, 16, dtype=torch.bool),
                torch.tensor([LABELS[clip] for clip in clips]),
                torch.tensor(clips),
                torch.tensor(numbers) < 6,
            )
        )
    return made


def trainer(monkeypatch: pytest.MonkeyPatch, model: Model, **changes: object) -> Trainer:
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    config = override_config(Config(), {"model.width": 0.05, "fusion_weight": 0.3, **keys}, "test")
    model.streams = config.stream_names
    made = Trainer(config, Origin(["a", "b", "c"], (36, 36), "dis"), CPU)
    monkeypatch.setattr(made.model, "forward", model)
    return made


def validate(made: Trainer, iteration: int = 2) -> dict[str, float]:
    plan: Any = Plan()
    made.iteration = iteration
    return made.validate(iter(batches()), plan)


def test_validation_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean class accuracies of both streams and of the fused scores, of which the last is the main metric."""
    model = Model()
    made = trainer(monkeypatch, model)
    loss = -sum(math.log(score) for scores in OWN_SCORES.values() for score in scores) / 5
    assert validate(made) == {
        "val_mean_class_accuracy": pytest.approx(FUSED),
        "val_micro_accuracy": pytest.approx(4 / 5),
        "val_mean_class_accuracy_rgb": pytest.approx(RGB),
        "val_mean_class_accuracy_flow": pytest.approx(FLOW),
        "val_mean_class_accuracy_fused": pytest.approx(FUSED),
        "val_loss": pytest.approx(loss, rel=1e-6),
    }
    assert METRIC == "val_mean_class_accuracy"
    assert made.best == {"iteration": 2, METRIC: pytest.approx(FUSED)}
    assert not made.model.training and model.seeds == [None, None]
    assert made.seen is not None and made.seen[0].clip_B.tolist() == [0, 1, 2, 0]  # the first batch
    assert made.seen[1]["flow"].logits_BK.tolist() == model.logits["flow"][:4].tolist()


@pytest.mark.parametrize(("stream", "micro", "mean_class"), [("rgb", 3 / 5, RGB), ("flow", 2 / 5, FLOW)])
def test_the_main_metric_of_one_stream_is_its_own(
    monkeypatch: pytest.MonkeyPatch, stream: str, micro: float, mean_class: float
) -> None:
    made = trainer(monkeypatch, Model(), streams=stream)
    assert validate(made) == {
        METRIC: pytest.approx(mean_class),
        "val_micro_accuracy": pytest.approx(micro),
        f"{METRIC}_{stream}": pytest.approx(mean_class),
        "val_loss": pytest.approx(-sum(map(math.log, OWN_SCORES[stream])) / 5, rel=1e-6),
    }


def test_each_schedule_gets_the_mean_class_accuracy_of_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(monkeypatch, Model())
    accuracies: dict[str, list[float]] = {"rgb": [], "flow": []}
    for modality, optimizer in made.optimizers.items():
        monkeypatch.setattr(optimizer.schedule, "after_validation", accuracies[modality].append)
    validate(made)
    assert accuracies == {"rgb": [pytest.approx(RGB)], "flow": [pytest.approx(FLOW)]}


def test_a_plateau_is_one_of_mean_class_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The RGB stream's second validation is 0 1 1 1 2: 3 of 5 are right as before, but recalls are 1/3, 1, 1, better.

    The flow stream's is as before. Without patience, its rate is halved, and RGB's is not.
    """
    better = {1: [0.1, 0.8, 0.1], 5: [0.1, 0.1, 0.8]}
    second = Model([(clip, better.get(number, rgb), flow) for number, (clip, rgb, flow) in enumerate(WINDOWS)])
    changes = {"schedule__name": "plateau", "schedule__patience": 0, "schedule__factor": 0.5, "optimizer__lr": 0.08}
    made = trainer(monkeypatch, Model(), **changes)
    validate(made, 2)
    assert [optimizer.learning_rate for optimizer in made.optimizers.values()] == [0.08, 0.08]
    monkeypatch.setattr(made.model, "forward", second)
    metrics = validate(made, 4)
    assert metrics["val_mean_class_accuracy_rgb"] == pytest.approx(7 / 9)
    assert made.optimizers["rgb"].learning_rate == pytest.approx(0.08)
    assert made.optimizers["flow"].learning_rate == pytest.approx(0.04)


def test_the_first_of_equal_validations_stays_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    better = Model([(clip, rgb, [0.1, 0.8, 0.1] if clip == 3 else flow) for clip, rgb, flow in WINDOWS])
    worse = Model([(clip, rgb, [0.98, 0.01, 0.01]) for clip, rgb, flow in WINDOWS])
    made = trainer(monkeypatch, Model())
    for iteration, model, best, accuracy in (
        (2, Model(), 2, FUSED),
        (4, Model(), 2, FUSED),
        (6, worse, 2, FUSED),
        (8, better, 8, 1.0),
        (10, Model(), 8, 1.0),
        (12, better, 8, 1.0),
    ):
        monkeypatch.setattr(made.model, "forward", model)
        validate(made, iteration)
        assert made.best == {"iteration": best, METRIC: pytest.approx(accuracy)}


def test_every_worker_validates_with_the_mean_of_all_batch_norm_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collective calls are stood in for: the other worker's buffers are fives, and its scores those of here."""
    made = trainer(monkeypatch, Model())
    made.distributed, made.workers, made._statistics_differ = True, 2, True
    reduced: list[Tensor] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: reduced.append(tensor.add_(5)))
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, source: tensor.fill_(7))
    metrics = validate(made)
    buffers = dict(made.model.named_buffers())
    for name, buffer in buffers.items():
        expected = 7 if name.endswith("num_batches_tracked") else 2.5 if name.endswith("mean") else 3.0
        assert (buffer == expected).all()
    count = len(reduced)
    assert 0 < count < len(buffers) and metrics[METRIC] == pytest.approx(FUSED)
    validate(made)  # nothing has been trained since
    assert len(reduced) == count
