"""Scores of another program: accuracies by hand, and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tune_ego.cli import app
from tune_ego.dataset.annotations import read_split
from tune_ego.errors import UserError
from tune_ego.evaluation.score_files import evaluate_scores, read_scores


@pytest.fixture(scope="module")
def labels(egtea: Path) -> list[int]:
    """Actions of the test clips of split 1, from 0, in the order of the split file."""
    return [line.action - 1 for line in read_split(egtea / "action_annotation" / "test_split1.txt")]


def write_scores(path: Path, scores_NK: np.ndarray, separator: str = " ") -> str:
    path.write_text("\n".join(separator.join(f"{value:.8f}" for value in row) for row in scores_NK) + "\n")
    return str(path)


def probabilities(labels: list[int], classes: int, right: set[int], confidence: float) -> np.ndarray:
    """Scores by which the clips of `right` are classified correctly and others as the next class."""
    scores_NK = np.full((len(labels), classes), (1 - confidence) / (classes - 1))
    for clip, label in enumerate(labels):
        scores_NK[clip, label if clip in right else (label + 1) % classes] = confidence
    return scores_NK


def test_accuracies_of_each_stream_and_of_the_fused_scores_by_hand(
    egtea: Path, labels: list[int], tmp_path: Path
) -> None:
    """RGB is right and sure for one half of the clips, flow for the other half: fused, all are right."""
    count = len(labels)
    even, odd = set(range(0, count, 2)), set(range(1, count, 2))
    rgb = np.where(
        np.isin(np.arange(count), [*even])[:, None],
        probabilities(labels, 4, even, 0.9),
        probabilities(labels, 4, even, 0.4),
    )
    flow = np.where(
        np.isin(np.arange(count), [*odd])[:, None],
        probabilities(labels, 4, odd, 0.9),
        probabilities(labels, 4, odd, 0.4),
    )
    files = (write_scores(tmp_path / "rgb.txt", rgb), write_scores(tmp_path / "flow.txt", flow, ","))
    result = evaluate_scores(*files, str(egtea), 1, str(tmp_path / "out.json"))
    assert result["rgb"]["micro_accuracy"] == pytest.approx(len(even) / count)
    assert result["flow"]["micro_accuracy"] == pytest.approx(len(odd) / count)
    assert result["fused"]["micro_accuracy"] == result["fused"]["mean_class_accuracy"] == 1
    recalls = [
        np.mean([clip in even for clip, label in enumerate(labels) if label == action]) for action in sorted({*labels})
    ]
    assert result["rgb"]["mean_class_accuracy"] == pytest.approx(np.mean(recalls))
    assert (result["clips"], result["chance"], result["fusion_weight"]) == (count, 0.25, 0.5)
    assert json.loads((tmp_path / "out.json").read_text()) == result
    # With RGB alone fused scores are those of RGB.
    alone = evaluate_scores(*files, str(egtea), fusion_weight=1.0)
    assert alone["fused"] == result["rgb"]
    assert "fused" not in evaluate_scores(files[0], "-", str(egtea))


def test_logits_become_probabilities(labels: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = np.random.default_rng(0).normal(size=(len(labels), 4))
    file = write_scores(tmp_path / "a.txt", rows)
    exponents = np.exp(np.loadtxt(file))
    read = read_scores(file, rows.shape)
    np.testing.assert_allclose(read, exponents / exponents.sum(axis=1, keepdims=True), rtol=1e-12)
    assert "a softmax makes them so" in capsys.readouterr().out
    np.testing.assert_array_equal(
        read_scores(write_scores(tmp_path / "b.txt", read), rows.shape).round(6), read.round(6)
    )
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "0.5 0.5\n",
            "has 1 rows of 2 scores; expected a row for each of the 3 test clips and a column for each of the 2",
        ),
        ("1 0\n0 1\n1\n", "not a text file of scores"),
        ("1 0\n0 one\n1 0\n", "not a text file of scores"),
        ("1 0\n0 nan\n1 0\n", "row 2 holds a score that is not finite"),
        ("", "expected a row for each of the 3 test clips"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*input contained no data")
def test_other_files_are_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UserError) as caught:
        read_scores(tmp_path / "a.txt", (3, 2))
    assert str(caught.value).startswith(f"{tmp_path}/a.txt: ") and words in str(caught.value)


def test_the_command_shows_tables_beside_the_published_ones(
    egtea: Path, labels: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_scores(tmp_path / "a.txt", probabilities(labels, 4, set(range(len(labels))), 0.7))
    app(
        ["evaluate", "--scores", file, file, "--data", str(egtea), "--compare", "--fusion-sweep"], standalone_mode=False
    )
    shown = capsys.readouterr().out
    assert f"Test of split 1: {len(labels)} clips, accuracy" in shown and "these scores, fused" in shown
    assert "68.60 %" in shown and "100.0 %" in shown
    with pytest.raises(UserError, match="needs a checkpoint or search, or --scores"):
        app(["evaluate", "--data", str(egtea)], standalone_mode=False)
    with pytest.raises(UserError, match="needs a checkpoint or search, or --scores"):
        app(["evaluate", "run", "--scores", file, "-", "--data", str(egtea)], standalone_mode=False)
    with pytest.raises(UserError, match="one stream at least"):
        app(["evaluate", "--scores", "-", "-", "--data", str(egtea)], standalone_mode=False)


def test_files_of_the_real_size_are_read(shared: Path, tmp_path: Path) -> None:
    """2,022 rows of 106 scores; random ones are right by chance."""
    rows = np.random.default_rng(0).dirichlet(np.ones(106), 2022)
    file = write_scores(tmp_path / "a.txt", rows)
    result = evaluate_scores(file, "-", str(shared / "egtea"), 1)
    assert result["clips"] == 2022 and 0 < result["rgb"]["micro_accuracy"] < 0.03
