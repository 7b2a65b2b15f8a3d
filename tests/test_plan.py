"""`tune --dry-run`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_search import assert_nothing_is_left, write_space
from tune_ego import experiment
from tune_ego.bench.search import draw_curves, run_asha
from tune_ego.errors import UserError
from tune_ego.plan import show_plan
from tune_ego.progress import share_of_iterations
from tune_ego.search_space import parse_space


def test_the_expected_share_is_about_what_asha_runs(tmp_path: Path) -> None:
    text = "base: {train: {iterations: 3000, validate_every: 100}}\nscheduler: "
    space = parse_space(text + "{name: asha, grace: 100, reduction: 3}", "")
    expected = share_of_iterations(space, 3000)
    assert expected == pytest.approx((100 + 200 / 3 + 600 / 9 + 1800 / 27 + 300 / 81) / 3000)
    ran = run_asha(space, draw_curves(300, 0), str(tmp_path)).iterations / 3000 / 300
    assert ran == pytest.approx(expected, rel=0.35)
    assert share_of_iterations(parse_space(text + "{name: fifo}", ""), 3000) == 1
    assert share_of_iterations(parse_space(text + "{name: median}", ""), 3000) is None


def test_a_plan_with_hours_and_price(
    tmp_path: Path, shards: str, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    space = write_space(tmp_path, **{"train.iterations": 1000, "train.validate_every": 100})
    before = sorted(tmp_path.iterdir())
    root = str(tmp_path / "search")
    experiment.write_metrics(f"{root}-probe", [{"iteration": 16}])  # of one that was killed
    (tmp_path / "search-probe" / experiment.CONFIG_FILE).write_text("")
    plan = show_plan(space, shards, root, {}, 0, None, None, probe=True, price=3.0)
    assert sorted(tmp_path.iterdir()) == before
    assert_nothing_is_left()
    assert (plan["trials"], plan["trials_at_a_time"], plan["workers"], plan["iterations_at_most"]) == (2, 1, 1, 2000)
    seconds = plan["seconds"]
    assert all(0 < value < 60 for value in seconds.values())
    trial = seconds["start"] + 1000 * seconds["iteration"] + 10 * seconds["validation"]
    assert plan["hours_at_most"] == pytest.approx(2 * trial / 3600)
    assert plan["price_at_most"] == pytest.approx(plan["hours_at_most"] * 3)
    assert plan["hours_expected"] < plan["hours_at_most"]
    output = capsys.readouterr().out
    assert "2,000 at most, with asha about" in output and "hours" in output and "price" in output


def test_a_plan_without_a_probe_has_no_hours_and_refuses_what_cannot_be(
    tmp_path: Path, shards: str, ray_cluster: None
) -> None:
    space = write_space(tmp_path)
    assert "hours_at_most" not in show_plan(space, shards, str(tmp_path / "s"), {}, 0, None, None)
    with pytest.raises(UserError, match="64 GPUs each"):
        show_plan(space, shards, str(tmp_path / "s"), {"compute.gpus_per_worker": 64.0}, 0, None, None)
