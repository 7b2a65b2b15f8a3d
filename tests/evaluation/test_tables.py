"""The tables that `evaluate` prints, row by row."""

from __future__ import annotations

from typing import Any

import pytest

from tune_ego.evaluation import tables as evaluation_tables
from tune_ego.evaluation.tables import show

# True class by predicted class: clips of seven classes, of which the sixth has none.
CONFUSION = [
    [1, 3, 0, 0, 0, 0, 0],  # 25 %
    [0, 2, 0, 0, 0, 0, 0],  # 100 %
    [1, 1, 2, 0, 0, 0, 0],  # 50 %; of classes that are taken for it as often, the first
    [0, 0, 2, 0, 0, 0, 0],  # 0 %
    [0, 1, 2, 0, 0, 0, 0],  # 0 %, of more clips
    [0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 4],  # 100 %, of more clips
]
RECALL = [0.25, 1.0, 0.5, 0.0, 0.0, None, 1.0]


def stream(micro: float, mean_class: float, verb: float, noun: float) -> dict[str, Any]:
    accuracies = {"micro_accuracy": micro, "mean_class_accuracy": mean_class, "verb_accuracy": verb}
    return {**accuracies, "noun_accuracy": noun, "recall": RECALL, "confusion": CONFUSION}


def made_up(**changes: Any) -> dict[str, Any]:
    attention = {"auc_judd": 0.9, "auc": 0.8, "nss": 1.25, "f1": 0.3, "precision": 0.2, "recall": 0.6, "frames": 12345}
    clips = [sum(row) for row in CONFUSION]
    result = {
        "split": 2,
        "trained_on_split": 2,
        "clips": 19,
        "clips_trained_on": 0,
        "chance": 0.125,
        "iteration": 3000,
        "rgb": stream(0.5, 0.25, 0.75, 0.6),
        "flow": stream(0.4, 0.2, 0.7, 0.55),
        "fused": stream(0.625, 0.375, 0.8, 0.65),
        "classes": [{"action": f"action {index}", "clips": count} for index, count in enumerate(clips)],
        "attention": {"rgb": attention, "flow": None, "centre": {**attention, "auc": 0.7}},
        "fusion_sweep": [
            {"rgb_weight": 0.0, "micro_accuracy": 0.4, "mean_class_accuracy": 0.2},
            {"rgb_weight": 0.5, "micro_accuracy": 0.625, "mean_class_accuracy": 0.375},
            {"rgb_weight": 1.0, "micro_accuracy": 0.7, "mean_class_accuracy": 0.25},
        ],
    }
    return {**result, **changes}


class Printed:
    """The lines and tables that were printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lines: list[str] = []
        self.tables: dict[str, tuple[list[str], list[list[str]]]] = {}
        monkeypatch.setattr(evaluation_tables, "say", self.lines.append)
        monkeypatch.setattr(evaluation_tables, "print_table", self._keep)

    def _keep(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        self.tables[title] = (columns, rows)


ACCURACIES = "Test of split 2: 19 clips, iteration 3000, accuracy"
ATTENTION = "Attention against gaze; centre is a Gaussian at the crop's centre"
SWEEP = "Fused accuracy by RGB's weight (chosen on test clips: not for reporting)"
PUBLISHED = "Beside the published results on EGTEA Gaze+"


def test_accuracies_attention_and_the_weakest_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = Printed(monkeypatch)
    show(made_up())
    assert printed.lines == []
    assert printed.tables == {
        ACCURACIES: (
            ["", "micro", "mean class", "verb", "noun"],
            [
                ["rgb", "50.0 %", "25.0 %", "75.0 %", "60.0 %"],
                ["flow", "40.0 %", "20.0 %", "70.0 %", "55.0 %"],
                ["fused", "62.5 %", "37.5 %", "80.0 %", "65.0 %"],
                ["chance", "12.5 %", "12.5 %", "", ""],
            ],
        ),
        ATTENTION: (
            ["", "AUC (Judd)", "AUC", "NSS", "F1", "precision", "recall", "window frames"],
            [
                ["rgb", "0.900", "0.800", "1.250", "0.300", "0.200", "0.600", "12,345"],
                ["centre", "0.900", "0.700", "1.250", "0.300", "0.200", "0.600", "12,345"],
            ],
        ),
        "Weakest classes, fused": (
            ["action", "clips", "recall", "mostly taken for"],
            [
                ["action 4", "3", "0.0 %", "action 2 (2)"],
                ["action 3", "2", "0.0 %", "action 2 (2)"],
                ["action 0", "4", "25.0 %", "action 1 (3)"],
                ["action 2", "4", "50.0 %", "action 0 (1)"],
                ["action 6", "4", "100.0 %", "-"],
            ],
        ),
    }


@pytest.mark.parametrize(("counts", "shown"), [([9, 5, 2], True), ([4, 4, 4], False)])
def test_recall_by_frequency_is_shown_where_classes_differ(
    counts: list[int], shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {
        name: {"classes": 2, "training_clips": [count, count], "recall": count / 10}
        for name, count in zip(("many", "medium", "few"), counts)
    }
    printed = Printed(monkeypatch)
    show(
        made_up(**{name: {**stream(0.5, 0.25, 0.75, 0.6), "by_frequency": parts} for name in ("rgb", "flow", "fused")})
    )
    title = "Mean recall of a third of the classes each, by training clips"
    assert (title in printed.tables) == shown
    if shown:
        columns, rows = printed.tables[title]
        assert columns == ["", "many (9 to 9)", "medium (5 to 5)", "few (2 to 2)"]
        assert rows[-1] == ["fused", "90.0 %", "50.0 %", "20.0 %"]


def test_clips_that_were_trained_on_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = Printed(monkeypatch)
    show(made_up(trained_on_split=1, clips_trained_on=7))
    assert printed.lines == ["NOT A TEST: trained on split 1, which trains on 7 of these clips."]


def test_the_weakest_classes_of_one_stream_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    result = made_up(attention={})
    del result["fused"], result["rgb"], result["fusion_sweep"]
    printed = Printed(monkeypatch)
    show(result, sweep=True)
    assert list(printed.tables) == [ACCURACIES, "Weakest classes, flow"]
    assert [row[0] for row in printed.tables[ACCURACIES][1]] == ["flow", "chance"]
    assert printed.lines == ["No fusion to sweep: there is one stream."]


def test_the_sweep_names_the_weight_with_the_best_mean_class_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar of 40 characters is 100 %."""
    printed = Printed(monkeypatch)
    show(made_up(), sweep=True)
    assert printed.tables[SWEEP] == (
        ["RGB", "micro", "mean class", ""],
        [
            ["0.00", "40.0 %", "20.0 %", "█" * 8],
            ["0.50", "62.5 %", "37.5 %", "█" * 15 + " best"],
            ["1.00", "70.0 %", "25.0 %", "█" * 10],
        ],
    )


@pytest.mark.parametrize(("classes", "comparable"), [(7, False), (106, True)])
def test_published_results_stand_beside(monkeypatch: pytest.MonkeyPatch, classes: int, comparable: bool) -> None:
    """Two of Lu et al.'s and one of the paper's, as they were published."""
    printed = Printed(monkeypatch)
    more = [{"action": "", "clips": 0}] * (classes - 7)
    show(made_up(classes=[*made_up()["classes"], *more], crops=3, flips=True), compare=True)
    columns, rows = printed.tables[PUBLISHED]
    assert columns == ["model", "split", "micro", "mean class", "starts from", "source"]
    assert rows[:3] == [
        ["this checkpoint, rgb", "2", "50.00 %", "25.00 %", "", "measured now, 3 crops, also mirrored"],
        ["this checkpoint, flow", "2", "40.00 %", "20.00 %", "", "measured now, 3 crops, also mirrored"],
        ["this checkpoint, fused", "2", "62.50 %", "37.50 %", "", "measured now, 3 crops, also mirrored"],
    ]
    assert len(rows) == 3 + 20
    for row in (
        ["fused (-a)", "1", "68.60 %", "60.54 %", "Kinetics", "published: Lu et al."],
        ["fused (-a)", "mean of 1 to 3", "65.97 %", "57.02 %", "Kinetics", "published: Lu et al."],
        ["(1) RGB, mixed precision", "1", "63.30 %", "55.00 %", "Lu's -o", "published: Straminsky et al."],
        ["RGB, TimeSformer-B", "1", "-", "70.12 %", "Ego4D with narrations", "published: Zhao et al."],
    ):
        assert row in rows
    assert printed.lines[0] == "Lu et al.: Lu, Liao, Li, ICCV Workshops 2019"
    warning = "NOT COMPARABLE: 7 classes here, 106 in EGTEA Gaze+."
    assert printed.lines[5:] == ([] if comparable else [warning])
