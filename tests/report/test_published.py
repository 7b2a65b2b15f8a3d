"""Published results beside ours, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.report.test_report_choices import make_search, validation
from tests.report.test_report_repeats import interval
from tune_ego.errors import UserError
from tune_ego.evaluation.tables import PUBLISHED
from tune_ego.report.published import ROWS, reproduction_numbers
from tune_ego.report.write import write_reproduction
from tune_ego.results.experiment import Experiment

LABELLED = "repeats: 3\nspace: {label: {grid: [lu_v, lu_a]}}"


def evaluated_search(folder: Path, text: str, tests: dict[str, tuple[str, list[dict[str, Any] | str]]]) -> Experiment:
    """A search whose trials were tested; `tests` maps a configuration to its label and the test of each seed."""
    search = make_search(
        text,
        {
            f"{name}-{seed}": ({"label@0": label} if "space" in text else {}, [validation(20, 0.5)])
            for name, (label, of_seeds) in tests.items()
            for seed in range(len(of_seeds))
        },
    )
    for trial in search.trials:
        run = folder / trial.id
        run.mkdir(parents=True)
        trial.run = str(run)
        name, seed = trial.id.split("-")
        test = tests[name][1][int(seed)]
        (run / "evaluation.json").write_text(test if isinstance(test, str) else json.dumps(test))
    return search


def accuracies(rgb: float, fused: float, classes: int = 106, **more: Any) -> dict[str, Any]:
    """Content of `evaluation.json`; the micro accuracy is half of the mean class accuracy."""
    streams = {
        name: {"mean_class_accuracy": value, "micro_accuracy": value / 2}
        for name, value in (("rgb", rgb), ("fused", fused))
    }
    return {**streams, "classes": [{}] * classes, "split": 1, **more}


def two_searches(folder: Path, classes: int = 106) -> list[Experiment]:
    """-o has two tests (one file is damaged), -v three, -a two: one was trained on test clips."""
    stage_o = evaluated_search(
        folder / "o",
        "repeats: 3\nbase: {label: lu_o}",
        {"00000": ("lu_o", [accuracies(0.5, 0.6, classes), accuracies(0.54, 0.6), "{"])},
    )
    later = evaluated_search(
        folder / "later",
        LABELLED,
        {
            "00000": ("lu_v", [accuracies(0.55, 0.6), accuracies(0.57, 0.6), accuracies(0.9, 0.6)]),
            "00001": ("lu_a", [accuracies(0.56, 0.7), accuracies(0.58, 0.5), accuracies(1, 1, clips_trained_on=3)]),
        },
    )
    return [stage_o, later]


def test_each_row_names_a_published_result() -> None:
    keys = {(one.model, one.source) for one in PUBLISHED if one.split == "1"}
    assert {(row.published, row.source) for row in ROWS} <= keys
    assert len({(row.label, row.stream) for row in ROWS}) == len(ROWS) == 13


def test_means_intervals_and_differences(tmp_path: Path) -> None:
    numbers = reproduction_numbers(two_searches(tmp_path))
    rows = {(row["label"], row["stream"]): row for row in numbers["rows"]}
    without, attention = rows["lu_o", "rgb"]["mean_class"], rows["lu_v", "rgb"]["mean_class"]
    expected = interval([0.5, 0.54])
    assert {key: without[key] for key in ("mean", "low", "high")} == expected
    assert (without["published"], without["seeds"]) == (pytest.approx(0.5489), 2)
    assert without["from_published"] == pytest.approx(0.52 - 0.5489)
    assert without["from_published_low"] == pytest.approx(without["low"] - 0.5489)
    assert without["from_published_high"] == pytest.approx(without["high"] - 0.5489)
    assert without["from_reference"] is None and rows["lu_o", "rgb"]["reference"] is None

    assert rows["lu_v", "rgb"]["reference"] == "RGB, no attention (-o)" and attention["seeds"] == 3
    assert attention["published_from_reference"] == pytest.approx(0.5530 - 0.5489)
    assert attention["from_reference"] == {"mean": pytest.approx((0.55 + 0.57 + 0.9) / 3 - 0.52), "low": None}
    gaze = rows["lu_a", "rgb"]["mean_class"]
    assert gaze["from_reference"] == {**interval([0.01, 0.01]), "size": 2, "holds_zero": False}
    micro = rows["lu_v", "rgb"]["micro"]
    assert micro["published"] == pytest.approx(0.6266)
    fused = rows["lu_a", "fused"]["mean_class"]["from_reference"]
    assert fused == {**interval([0.1, -0.1]), "size": 2, "holds_zero": True}
    assert rows["lu_a", "fused"]["micro"]["from_reference"]["high"] == pytest.approx(fused["high"] / 2)
    assert rows["lu_a", "fused"]["mean_class"]["seeds"] == 2

    flow = rows["lu_o", "flow"]["mean_class"]  # no test has this stream
    assert (flow["mean"], flow["seeds"], flow["from_published"]) == (None, 0, None)
    assert rows["3_stacked_stam", "rgb"]["mean_class"]["mean"] is None
    assert numbers["not_comparable"] == ""
    (_, later) = numbers["searches"]
    assert (later["iterations"], later["seeds"], later["starts_from"]) == ([3000], [0, 1, 2], ["random weights"])
    assert (later["data"], later["versions"], later["changes"]) == ("/nowhere/shards", ["0"], {})


def test_the_page_has_each_number_and_says_what_cannot_be_compared(tmp_path: Path) -> None:
    searches = two_searches(tmp_path, classes=106)
    numbers = write_reproduction(searches, str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert json.loads((tmp_path / "page.json").read_text()) == numbers
    assert page.count("RGB, no gaze loss (-v)") == 4  # a row of both tables, and the reference of another in both
    assert 'data-key="rows/6/mean_class/from_reference/low"' in page and ">+1.0</span>" in page
    assert 'data-key="rows/3/mean_class/from_reference/mean"' in page
    assert 'data-key="rows/3/mean_class/from_reference/low"' not in page
    assert "0 is within" in page and "Not comparable" not in page and "random weights" in page
    write_reproduction(searches, str(tmp_path / "page.html"))  # its own numbers may be overwritten
    write_reproduction(two_searches(tmp_path / "few", classes=12), str(tmp_path / "few.html"))
    assert "Not comparable: 12 classes here, 106 in EGTEA" in (tmp_path / "few.html").read_text()
    searches[0].trials[0].run = str(tmp_path / "second")
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "evaluation.json").write_text(json.dumps(accuracies(0.5, 0.5, split=2)))
    assert reproduction_numbers(searches)["not_comparable"].startswith("tested on split 2")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"other.json, which no report wrote"):
        write_reproduction(searches, str(tmp_path / "other.html"))
