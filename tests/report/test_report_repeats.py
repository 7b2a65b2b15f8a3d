"""Intervals over the repeats of configurations in a report, by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.report.test_report_choices import BOLD, PLAIN, REPEATS, make_search, repeated, validation
from tune_ego.errors import UserError
from tune_ego.report.numbers import experiment_numbers
from tune_ego.report.page import render
from tune_ego.report.repeats import repeats_numbers
from tune_ego.report.repeats_chart import draw_repeats
from tune_ego.results.experiment import Experiment

NO_GAZE = {"rgb": None, "flow": None, "centre": None}
"""Scores of attention where no test frame has gaze."""
T = {1: 12.706205, 2: 4.302653}
"""97.5 % quantiles of the t distribution, by degrees of freedom."""


def interval(values: list[float]) -> dict[str, Any]:
    """Mean and interval, re-stated."""
    count = len(values)
    centre = sum(values) / count
    deviation = math.sqrt(sum((value - centre) ** 2 for value in values) / (count - 1))
    half = T[count - 1] * deviation / math.sqrt(count)
    return {"mean": pytest.approx(centre), "low": pytest.approx(centre - half), "high": pytest.approx(centre + half)}


def three_seeds(space: str = REPEATS.replace("repeats: 2", "repeats: 3")) -> Experiment:
    """At the last validation: plain 0.4, 0.5, 0.6 and bold 0.5, 0.5, 0.7. At the best one plain is better."""
    lines: dict[str, tuple[dict[str, Any], list[tuple[float, float]]]] = {
        "00000": (PLAIN, [(0.9, 0.4), (0.9, 0.5), (0.9, 0.6)]),
        "00001": (BOLD, [(0.2, 0.5), (0.3, 0.5), (0.4, 0.7)]),
    }
    return make_search(
        space,
        {
            f"{name}-{seed}": (sampled, [validation(20, first), validation(40, last)])
            for name, (sampled, accuracies) in lines.items()
            for seed, (first, last) in enumerate(accuracies)
        },
    )


def test_configurations_are_compared_at_the_last_validation_by_seed() -> None:
    numbers = repeats_numbers(three_seeds())
    assert numbers["reference"] == "00001"
    bold, plain = numbers["rows"]
    assert bold["last"] == {**interval([0.5, 0.5, 0.7]), "size": 3}
    assert plain["last"] == {**interval([0.4, 0.5, 0.6]), "size": 3}
    assert plain["best"]["mean"] == pytest.approx(0.9) and bold["best"] == {**interval([0.5, 0.5, 0.7]), "size": 3}
    assert (bold["difference"], bold["test"], bold["iterations"]) == (None, None, [40])
    assert plain["difference"] == {**interval([-0.1, 0.0, -0.1]), "size": 3, "holds_zero": True}
    assert plain["values"] == ["plain", "sgd", "0.9"]


def test_another_configuration_can_be_the_reference() -> None:
    numbers = repeats_numbers(three_seeds(), "00000")
    bold, plain = numbers["rows"]
    assert numbers["reference"] == "00000" and plain["difference"] is None
    assert bold["difference"] == {**interval([0.1, 0.0, 0.1]), "size": 3, "holds_zero": True}
    with pytest.raises(UserError, match=r"--reference 7: no validated configuration; there are 00001, 00000"):
        repeats_numbers(three_seeds(), "7")
    once = make_search(REPEATS.replace("repeats: 2", "repeats: 1"), {"00000": (PLAIN, [validation(20, 0.5)])})
    with pytest.raises(UserError, match="the search has no repeats"):
        repeats_numbers(once, "00000")


def test_a_missing_repeat_pairs_with_none_and_comes_behind() -> None:
    rows = repeats_numbers(repeated())["rows"]
    assert [row["configuration"] for row in rows] == ["00000", "00001"]
    assert rows[0]["last"] == {**interval([0.4, 0.3]), "size": 2}
    assert rows[1]["last"] == {"mean": 0.7, "low": None, "high": None, "size": 1}
    assert rows[1]["difference"] is None and rows[1]["iterations"] == [20]


def test_a_search_without_repeats_has_no_rows() -> None:
    search = make_search(REPEATS.replace("repeats: 2", "repeats: 1"), {"00000": (PLAIN, [validation(20, 0.5)])})
    assert repeats_numbers(search) == {"reference": None, "rows": []}


def test_the_test_accuracies_are_those_of_the_trials_evaluations(tmp_path: Path) -> None:
    """Of one repeat the file is damaged, and one was trained on the test clips: both count as not tested."""
    search = three_seeds()
    for trial in search.trials:
        trial.run = str(tmp_path / trial.id)
        (tmp_path / trial.id).mkdir()

    def write(trial: str, content: dict[str, Any] | str) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / trial / "evaluation.json").write_text(text)

    attention = {"rgb": {"nss": 1.5}, "flow": {"nss": 0.25}, "centre": {"nss": 0.5}}
    both = {"rgb": {"mean_class_accuracy": 0.9}, "fused": {"mean_class_accuracy": 0.3}}
    write("00000-0", {**both, "flow": {"mean_class_accuracy": 0.2}, "attention": attention})
    write("00000-1", {"rgb": {"mean_class_accuracy": 0.4}, "clips_trained_on": 0, "attention": NO_GAZE})
    write("00000-2", "{")
    write("00001-0", {"flow": {"mean_class_accuracy": 0.5}})
    write("00001-1", {"flow": {"mean_class_accuracy": 0.7}, "attention": None})
    write("00001-2", {"flow": {"mean_class_accuracy": 0.1}, "clips_trained_on": 3})
    bold, plain = repeats_numbers(search)["rows"]
    assert bold["test"] == {**interval([0.5, 0.7]), "size": 2}
    assert plain["test"] == {**interval([0.3, 0.4]), "size": 2}
    assert plain["test_difference"] == {**interval([-0.2, -0.3]), "size": 2, "holds_zero": True}
    once = {"low": None, "high": None, "size": 1}
    assert plain["streams"] == {
        "rgb": {
            "test": {**interval([0.9, 0.4]), "size": 2},
            "test_difference": None,
            "nss": {"mean": 1.0, **once},
            "nss_difference": None,
        },
        "flow": {
            "test": {"mean": 0.2, **once},
            "test_difference": None,
            "nss": {"mean": -0.25, **once},
            "nss_difference": None,
        },
    }
    assert bold["streams"]["flow"]["test"] == bold["test"] and bold["streams"]["rgb"]["test"] is None


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"rgb": 0.5}',
        '{"rgb": {"mean_class_accuracy": "high"}}',
        '{"fused": {"mean_class_accuracy": 0.5}, "rgb": {"mean_class_accuracy": 7.0}}',
        '{"rgb": {"mean_class_accuracy": 0.5}, "attention": {"rgb": {"nss": "high"}, "centre": {"nss": 0.5}}}',
    ],
)
def test_a_damaged_test_counts_as_none(tmp_path: Path, text: str) -> None:
    search = three_seeds()
    for trial in search.trials:
        trial.run = str(tmp_path)
    (tmp_path / "evaluation.json").write_text(text)
    for row in repeats_numbers(search)["rows"]:
        assert row["test"] is None and row["streams"]["rgb"]["nss"] is None


def test_tests_with_other_crops_are_not_compared(tmp_path: Path) -> None:
    search = three_seeds()
    for number, trial in enumerate(search.trials):
        trial.run = str(tmp_path / trial.id)
        (tmp_path / trial.id).mkdir()
        content = {"rgb": {"mean_class_accuracy": number / 10}, "crops": 3 if number == 1 else 1, "flips": False}
        (tmp_path / trial.id / "evaluation.json").write_text(json.dumps(content))
    bold, plain = repeats_numbers(search)["rows"]
    assert plain["test"] == {**interval([0.0, 0.2]), "size": 2} and bold["test"]["size"] == 3


def test_streams_and_gaze_scores_are_compared_by_seed(tmp_path: Path) -> None:
    search = three_seeds()
    rgb = {"00000": [0.1, 0.2, 0.3], "00001": [0.2, 0.2, 0.5]}
    nss = {"00000": [0.5, 0.5, 0.5], "00001": [1.5, 0.5, 1.0]}
    for trial in search.trials:
        trial.run = str(tmp_path / trial.id)
        (tmp_path / trial.id).mkdir()
        name, _, seed = trial.id.partition("-")
        attention = {"rgb": {"nss": nss[name][int(seed)] + 0.25}, "centre": {"nss": 0.25}}
        content = {"rgb": {"mean_class_accuracy": rgb[name][int(seed)]}, "attention": attention}
        (tmp_path / trial.id / "evaluation.json").write_text(json.dumps(content))
    numbers = experiment_numbers(search, {"why": "none"}, [], "00000")
    bold, plain = numbers["repeats"]["rows"]
    assert bold["streams"]["rgb"]["test_difference"] == {**interval([0.1, 0.0, 0.2]), "size": 3, "holds_zero": True}
    assert bold["streams"]["rgb"]["nss"] == {**interval([1.5, 0.5, 1.0]), "size": 3}
    assert bold["streams"]["rgb"]["nss_difference"] == {**interval([1.0, 0.0, 0.5]), "size": 3, "holds_zero": True}
    assert plain["streams"]["rgb"]["test_difference"] is None
    page = render({**numbers, "attention_cases": {"why": "none", "cases": []}}, [])
    assert 'data-key="repeats/rows/0/streams/rgb/nss_difference/mean" data-format="score">0.500<' in page
    assert 'streams/rgb/test_difference/mean" data-format="signed">+10.0' in page


@pytest.mark.parametrize(("labels", "shown"), [(("one", "two"), True), (("same", "same"), False), (("", "two"), False)])
def test_the_chart_names_configurations_by_labels_that_differ(labels: tuple[str, str], shown: bool) -> None:
    numbers = experiment_numbers(three_seeds(), {"why": "none"}, [])
    assert [row["label"] for row in numbers["repeats"]["rows"]] == ["bold", "plain"]
    for row, label in zip(numbers["repeats"]["rows"], labels):
        row["label"] = label
    figure = draw_repeats.__wrapped__(numbers)  # type: ignore[attr-defined]
    names = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert names[0] == f"00001: {labels[0]}" if shown else names[0].startswith("00001: ") and "bold" in names[0]


@pytest.mark.parametrize("tested", [False, True])
def test_the_page_has_the_table_and_the_chart(tested: bool) -> None:
    numbers = experiment_numbers(three_seeds(), {"why": "none"}, [])
    numbers["attention_cases"] = {"why": "none", "cases": []}
    if tested:
        numbers["repeats"]["rows"][0]["test"] = {"mean": 0.6123, "low": 0.5, "high": 0.7, "size": 3}
    page = render(numbers, [])
    assert "paired difference from 00001, mean and 95 % interval" in page
    assert 'data-key="repeats/rows/1/difference/low"' in page
    assert ("61.2 %" in page) == tested and ("No trial was tested" in page) != tested
