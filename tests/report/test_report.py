"""The report: every number on the page is in report.json, every section is there, whatever state the search is in."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tests.stub_experiment import write_evaluation, write_experiment
from tune_ego.errors import UserError
from tune_ego.report import charts
from tune_ego.report.charts import _draw_axis
from tune_ego.report.commands import report
from tune_ego.report.page import COMPARED, SECTIONS, look_up
from tune_ego.report.write import write_comparison, write_report
from tune_ego.results.experiment import METRIC
from tune_ego.results.reading import read_experiment
from tune_ego.results.tables import config_value

SCALES = {"plain": 1, "percent": 100, "fine": 100, "points": 100, "count": 1, "score": 1, "speed": 1, "general": 1}
ODD_SPACE = """
base: {train: {iterations: 300, validate_every: 50}}
space:
  label: {choice: ["$a_$ #010105", 'id="x" url(#y']}
  seed: {randint: [0, 1000000]}
  optimizer.name: {choice: [sgd, ranger]}
  optimizer.lr: [{when: {label: ["$a_$ #010105"]}, loguniform: [1e-3, 1e-2]}, {loguniform: [1e-2, 1e-1]}]
  optimizer.momentum: [{when: {optimizer.name: sgd}, uniform: [0.8, 0.95]}]
  optimizer.weight_decay: {loguniform: [1e-8, 1e-4]}
  schedule.name: {choice: [plateau, multistep]}
  schedule.gamma: [{when: {schedule.name: multistep}, choice: [0.1, 0.5]}]
  model.activation: {choice: [relu, swish]}
  model.stam_depth: {choice: [1, 2, 3]}
  model.dropout: {uniform: [0.3, 0.8]}
  loss.gaze_weight: {loguniform: [0.01, 1.0]}
  loss.gaze_sigma: {uniform: [1.0, 4.0]}
  train.batch_size: {choice: [8, 16, 128]}
  fusion_weight: {uniform: [0.3, 0.8]}
samples: 16
scheduler: {name: asha, grace: 50, reduction: 3}
"""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Content of a page: its headings' ids, its numbers, what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.numbers: list[tuple[str, str, str]] = []
        """(place, format, text)"""
        self.loads: list[str] = []
        self.text = ""
        self._open: tuple[str, str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids += [values["id"]] if "id" in values else []
        for name in ("src", "href", "xlink:href"):
            if not values.get(name, "#").startswith(("#", "data:")):
                self.loads.append(values[name])
        self.loads += [tag] if tag in ("script", "link", "iframe") else []
        self._open = (values["data-key"], values["data-format"]) if "data-key" in values else None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open is not None:
            self.numbers.append((*self._open, data))
            self._open = None


def check_page(file: Path, sections: dict[str, str]) -> Page:
    """All sections, nothing loaded, ids once, and every number equal to its place in the JSON file."""
    page = Page(file.read_text())
    assert [name for name in page.ids if name in sections] == list(sections)
    assert not page.loads
    assert len(set(page.ids)) == len(page.ids)
    numbers = json.loads(file.with_suffix(".json").read_text())
    for place, form, text in page.numbers:
        value, shown = look_up(numbers, place), text.replace(",", "")
        if form == "hours":
            form, scale = "count", 60 if shown.endswith("min") else 1
        else:
            scale = SCALES[form]
        digits = re.match(r"-?[\d.]+(e-?\d+)?", shown)
        assert digits, (place, text)
        decimals = len(digits[0].partition(".")[2].partition("e")[0])
        rough = abs(value * scale) * 1e-3 if form == "general" else 0.5 * 10**-decimals
        assert float(digits[0]) == pytest.approx(value * scale, abs=rough + 1e-9), place
    return page


def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the drawings of a page, which take most of its time."""
    for name in ("learning_curves", "choices", "stopping", "parallel", "importance", "confusion", "recall"):
        monkeypatch.setattr(charts, name, lambda numbers: "")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a search of 200 trials and an evaluation of 106 classes."""
    folder = tmp_path_factory.mktemp("large")
    write_experiment(folder / "search", 200)
    write_evaluation(folder / "evaluation.json")
    return folder


def test_200_trials(large: Path) -> None:
    """Built in seconds, small, and its numbers are the experiment's."""
    start, out = time.process_time(), large / "report.html"
    numbers = write_report(str(large / "search"), str(out), str(large / "evaluation.json"))
    assert time.process_time() - start < 30  # not of a machine that others use too
    assert out.stat().st_size < 5e6
    page = check_page(out, SECTIONS)
    assert len(page.numbers) > 1500
    assert json.loads(out.with_suffix(".json").read_text()) == numbers

    # The metrics of 200 trials, read without the package: the lines of a stopped one end with the stop.
    runs = {run.name: run for run in (large / "search" / "runs").iterdir()}
    lines = {name: [json.loads(line) for line in (run / "metrics.jsonl").open()] for name, run in runs.items()}
    best = {name: max((line.get(METRIC, -1) for line in of_one), default=-1) for name, of_one in lines.items()}
    assert numbers["answer"]["accuracy"] == max(best.values()) == best[numbers["trials"][0]["trial"]]
    assert [(row["trial"], row["accuracy"]) for row in numbers["trials"][:192]] == sorted(
        ((name, accuracy) for name, accuracy in best.items() if accuracy >= 0), key=lambda one: -one[1]
    )
    rates = [p for p in numbers["choices"]["parameters"] if p["key"] == "optimizer.lr"]
    assert [p["when"] for p in rates] == ["optimizer.name sgd", "optimizer.name ranger", "optimizer.name adamw"]
    assert sorted(name for p in rates for value in p["values"] for name in value["members"]) == sorted(
        name for name, accuracy in best.items() if accuracy >= 0
    )
    assert numbers["choices"]["even_iteration"] == 150
    ended = [name for name in runs if int(name) % 25 != 3]  # the others failed
    assert numbers["stopping"]["spent_iterations"] == sum(lines[name][-1]["iteration"] for name in ended)
    assert numbers["stopping"]["full_iterations"] == 1500 * 192
    assert [rung["iterations"] for rung in numbers["stopping"]["rungs"]] == [150, 450, 1350]
    row = [place.rpartition("/")[2] for place, _, _ in page.numbers if place.startswith("stopping/rungs/0/")]
    assert row == ["iterations", "reported", "stopped", "went_on"]
    assert re.search(
        r">rung, iterations</th>.*?>trials that reached[^<]*</th>.*?>stopped</th>.*?>continued</th>", out.read_text()
    )
    assert {entry["key"] for entry in numbers["importance"]["entries"][:2]} == {"optimizer.lr"}
    assert sum(entry["share"] for entry in numbers["importance"]["entries"]) == pytest.approx(1)
    seconds = sum(
        10 * 12 / line["clips_per_second"] + line.get("validation_seconds", 0) + line["report_seconds"]
        for of_one in lines.values()
        for line in of_one
    )
    assert numbers["cost"]["gpu_hours"] == pytest.approx(seconds / 3600)
    assert "Not logged by these trials: validation loss" in page.text
    assert "stratified fold 0 of split 1" in page.text and "published: Straminsky et al." in page.text


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_charts(monkeypatch)
    search = str(tmp_path / "search")
    write_experiment(tmp_path / "search", 4)
    out = str(tmp_path / "report.html")
    with pytest.raises(UserError, match="no experiment here"):
        write_report(str(tmp_path), out)
    with pytest.raises(UserError, match="this is a run"):
        write_report(f"{search}/runs/00000", out)
    for content in ('{"name": "other"}', "[]", "{"):
        (tmp_path / "experiment.json").write_text(content)
        with pytest.raises(UserError, match=r"experiment\.json: (not an experiment of tune_ego|damaged)"):
            write_report(str(tmp_path), out)
    spec = json.loads((tmp_path / "search" / "experiment.json").read_text())
    odd = {"trials": "x", "seed": None, "gpus_per_worker": "y"}
    (tmp_path / "experiment.json").write_text(json.dumps(spec | odd))
    with pytest.raises(UserError, match=r"damaged: trials is 'x', seed is None, gpus_per_worker is 'y'"):
        write_report(str(tmp_path), out)
    with pytest.raises(UserError, match="neither an evaluation"):
        write_report(search, out, str(tmp_path))
    with pytest.raises(UserError, match="not written by `tune-ego evaluate`"):
        write_report(search, out, f"{search}/trials.json")
    with pytest.raises(UserError, match=r"end with \.html"):
        write_report(search, str(tmp_path / "report.pdf"))
    with pytest.raises(UserError, match="name their shards with --data"):
        write_report(search, out, checkpoint=search)
    with pytest.raises(UserError, match="name a run with --checkpoint"):
        write_report(search, out, data=str(tmp_path))
    assert not Path(out).exists()
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write_report(search, str(tmp_path / "folder.html"))
    assert (tmp_path / "folder.json").is_file()  # before the page


def test_odd_names_conditions_and_many_parameters(tmp_path: Path) -> None:
    """Labels are drawn as they are; what a trial does not have is no value of it; what has no axis is named."""
    space = tmp_path / "odd.yaml"
    space.write_text(ODD_SPACE)
    root, out = tmp_path / "search", tmp_path / "report.html"
    write_experiment(root, 16, str(space))
    numbers = write_report(str(root), str(out))
    page = check_page(out, SECTIONS)
    for label in ("$a_$ #010105", 'id="x" url(#y', "where label $a_$ #010105"):
        assert label in page.text
    assert "mean recall of the classes" in page.text and "loss, nats, sum over streams" in page.text
    assert "learning rate, lowest of the streams" in page.text
    values = [value["value"] for one in numbers["choices"]["parameters"] for value in one["values"]]
    values += [row["value"] for row in numbers["answer"]["values"]]
    assert values and "-" not in values
    shown, left_out = numbers["parallel"]["keys"], numbers["parallel"]["left_out"]
    assert sorted(shown + left_out) == sorted(numbers["experiment"]["keys"]) and len(shown) == 13 and len(left_out) == 2
    assert f"Parameters without an axis: {', '.join(left_out)}." in page.text
    shares = {entry["key"]: entry["share"] for entry in numbers["importance"]["entries"]}
    assert max(shares, key=lambda key: shares[key]) == shown[0]
    assert f"seeds of the trials{numbers['reproduce']['trial_seeds'][0]} " in page.text.replace("\n", "")


def test_axes_of_parallel_coordinates() -> None:
    axis = Figure().add_subplot()
    heights = _draw_axis(axis, 0, "uniform", ["0.8", "-", "0.9"], [0.8, None, 0.9])
    assert heights == pytest.approx([0, -0.05, 1])
    heights = _draw_axis(axis, 1, "choice", ["16", "8", "128", "-"], [16, 8, 128, None])
    assert heights == pytest.approx([0.5, 0, 1, -0.05], abs=0.021)
    assert [text.get_text() for text in axis.texts[3:]] == ["8", "16", "128"]


def test_two_experiments(tmp_path: Path) -> None:
    write_experiment(tmp_path / "search", 16)
    write_experiment(tmp_path / "other", 12, "table1", seed=4)
    out = tmp_path / "report.html"
    numbers = write_comparison((str(tmp_path / "search"), str(tmp_path / "other")), str(out))
    page = check_page(out, COMPARED)
    assert {row["what"] for row in numbers["differences"]} >= {"scheduler", "samples", "searched parameters"}
    assert "The budgets differ" in page.text
    for name, root in (("a", "search"), ("b", "other")):
        search = read_experiment(str(tmp_path / root))
        values = {row["key"]: row[name] for row in numbers["best_values"]}
        keys = search.space.searched_keys
        assert keys and all(values[key] == config_value(search.best.config, key) for key in keys)
        assert all(values[key] == "not searched" for key in values.keys() - {*keys})
    assert any(row["a"] != row["b"] for row in numbers["best_values"])
    write_experiment(tmp_path / "empty", 4)
    (tmp_path / "empty" / "trials.json").unlink()
    write_comparison((str(tmp_path / "empty"), str(tmp_path / "other")), str(out))
    assert "no trial has been validated" in check_page(out, COMPARED).text


def test_labelled_trials_stand_beside_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_charts(monkeypatch)
    write_experiment(tmp_path / "search", 4, "table1")
    rows = write_report(str(tmp_path / "search"), str(tmp_path / "r.html"))["published"]["ours"]
    assert {row["model"] for row in rows} == {
        f"trial {label}" for label in ("lu_original", "1_mixed_precision", "2_ranger", "3_stacked_stam")
    }
    assert all("validation clips: stratified fold 0 of split 1" in row["on"] for row in rows)


def test_what_does_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="are for a report of one"):
        report("search", "search", str(tmp_path / "x.html"), data="shards")
    assert not (tmp_path / "x.html").exists()


def test_without_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report says what to install, and has all the rest."""
    write_experiment(tmp_path / "search", 16)
    monkeypatch.setitem(sys.modules, "optuna", None)
    numbers = write_report(str(tmp_path / "search"), str(tmp_path / "plain.html"))
    assert numbers["importance"]["entries"] == []
    assert "pip install 'tune_ego[optuna]'" in check_page(tmp_path / "plain.html", SECTIONS).text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_it(tmp_path: Path, large: Path) -> None:
    """Headless Chromium, without a network: no error, every section, the numbers, and it fits 1280 pixels."""
    out = large / "browser.html"
    numbers = write_report(str(large / "search"), str(out), str(large / "evaluation.json"))
    probe = tmp_path / "probe.html"
    watch = "<script>document.title = ''; onerror = m => document.title += m; onload = () => document.title +="
    watch += " 'width ' + document.documentElement.scrollWidth</script>"
    probe.write_text(out.read_text().replace("</head>", f"{watch}</head>", 1))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1280,2000", "--enable-logging=stderr", "--v=0"]
    done = subprocess.run(
        [*command, "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title and re.fullmatch(r"width 12[0-8]\d", title[1]), title
    page = Page(done.stdout)
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    assert ("answer/accuracy", "percent", f"{100 * numbers['answer']['accuracy']:.1f} %") in page.numbers
    assert done.stdout.count("<svg ") == 7


def test_a_report_does_not_go_over_other_files(tmp_path: Path) -> None:
    """`--out E/experiment.html` would write its numbers over the search's own record."""
    write_experiment(tmp_path)
    before = (tmp_path / "experiment.json").read_bytes()
    with pytest.raises(UserError, match=r"would overwrite .*experiment\.json, which no report wrote"):
        write_report(str(tmp_path), str(tmp_path / "experiment.html"), None)
    assert (tmp_path / "experiment.json").read_bytes() == before and not (tmp_path / "experiment.html").exists()
