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
from typing import Any

import pytest
from matplotlib.figure import Figure

from tests.stub_experiment import write_evaluation, write_experiment
from tune_ego import storage
from tune_ego.config import Config, dump_config, override_config
from tune_ego.errors import UserError
from tune_ego.experiment import TrialRecords, read_experiment
from tune_ego.report.charts import _heights
from tune_ego.report.commands import report
from tune_ego.report.numbers import even_iteration
from tune_ego.report.page import COMPARED, SECTIONS, look_up
from tune_ego.report.write import write_comparison, write_report

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
    """What a page shows: its headings' ids, its numbers, what it would load."""

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

    found = read_experiment(str(large / "search"))
    validated = {trial.id: trial for trial in found.trials if trial.accuracy is not None}
    assert numbers["answer"]["accuracy"] == found.best.accuracy == max(t.accuracy or 0 for t in validated.values())
    assert numbers["trials"][0]["trial"] == found.best.id
    chosen = {row["key"]: row["value"] for row in numbers["answer"]["values"]}
    assert chosen["optimizer.name"] == found.best.config.optimizer.name
    for parameter in numbers["choices"]["parameters"]:
        for value in parameter["values"]:
            accuracies = [validated[member].accuracy or 0 for member in value["members"]]
            assert value["trials"] == len(accuracies) and value["best"] == max(accuracies)
            assert value["mean"] == pytest.approx(sum(accuracies) / len(accuracies))
    rates = [p for p in numbers["choices"]["parameters"] if p["key"] == "optimizer.lr"]
    assert [p["when"] for p in rates] == ["optimizer.name sgd", "optimizer.name ranger"]
    assert sum(value["trials"] for p in rates for value in p["values"]) == len(validated)
    assert numbers["choices"]["even_iteration"] == 150 == even_iteration(found.trials)

    stopping = numbers["stopping"]
    ended = [trial for trial in found.trials if trial.state in ("finished", "stopped")]
    assert stopping["spent_iterations"] == sum(trial.iteration for trial in ended)
    assert stopping["full_iterations"] == 1500 * len(ended)
    assert [rung["iterations"] for rung in stopping["rungs"]] == [150, 450, 1350]
    assert sum(rung["stopped"] for rung in stopping["rungs"]) == sum(t.state == "stopped" for t in found.trials)
    assert {entry["key"] for entry in numbers["importance"]["entries"][:2]} == {"optimizer.lr"}
    assert sum(entry["share"] for entry in numbers["importance"]["entries"]) == pytest.approx(1)
    seconds = sum(
        10 * 12 / line["clips_per_second"] + line.get("validation_seconds", 0) + line["report_seconds"]
        for t in found.trials
        for line in t.metrics
    )
    assert numbers["cost"]["gpu_hours"] == pytest.approx(seconds / 3600)
    assert "Not logged by these runs: validation loss" in page.text
    assert "stratified fold 0 of split 1" in page.text and "published: Straminsky et al." in page.text


def test_an_evaluation_in_readable_order(large: Path) -> None:
    content = json.loads((large / "evaluation.json").read_text())
    found = write_report(str(large / "search"), str(large / "e.html"), str(large / "evaluation.json"))["evaluation"]
    clips = [one["clips"] for one in found["classes"]]
    assert clips == sorted(clips, reverse=True)
    place = {one["action"]: index for index, one in enumerate(content["classes"])}
    for row, one in zip(found["confusion"], found["classes"]):
        assert one["recall"]["fused"] == content["fused"]["recall"][place[one["action"]]]
        for count, other in zip(row, found["classes"]):
            assert count == content["fused"]["confusion"][place[one["action"]]][place[other["action"]]]
    worst = found["confused"][0]
    counts = content["fused"]["confusion"]
    assert worst["clips"] == counts[place[worst["true"]]][place[worst["predicted"]]]
    assert worst["clips"] == max(n for t, row in enumerate(counts) for p, n in enumerate(row) if t != p)


def test_states(tmp_path: Path) -> None:
    """Running, interrupted, all failed and empty searches say so, and have all sections."""
    root, out = tmp_path / "search", tmp_path / "report.html"

    def state() -> str:
        told = str(write_report(str(root), str(out))["experiment"]["state"])
        check_page(out, SECTIONS)
        return told

    def note(changes: dict[str, object]) -> None:
        records = json.loads((root / "trials.json").read_text())
        storage.write_json(str(root / "trials.json"), {**records, **changes})

    write_experiment(root, 4)
    assert state() == "over: 4 of 4 trials have ended"
    records = TrialRecords(str(root))
    for name in ("00002", "00003"):
        records.note(name, "running")
    assert state().startswith("interrupted: 2 of 4 trials")
    beat = {"id": "x", "host": "elsewhere", "pid": 1, "beat": time.time()}
    storage.write_json(str(root / "driver.json"), beat)
    assert state().startswith("running: 2 of 4 trials have ended")
    for content in ("{}", "[]", "{", '{"beat": "x"}'):
        (root / "driver.json").write_text(content)
        assert state().startswith("interrupted: 2 of 4 trials")
    (root / "driver.json").unlink()
    for trial in read_experiment(str(root)).trials:
        records.note(trial.id, "failed", "out of memory")
        shutil.rmtree(trial.run)
    assert state() == "over, and every trial failed, the first for: out of memory"
    assert "There is no answer: no trial has been validated" in Page(out.read_text()).text
    note({"00003": None})
    assert state().startswith("interrupted: 3 of 4 trials have ended")
    (root / "trials.json").unlink()
    assert state().startswith("empty")


ENTRIES: dict[str, dict[str, object]] = {
    "entry": {"sampled": None},
    "unknown": {"sampled": {"a@0": 1}},
    "state": {"state": None},
    "other_state": {"state": "lost"},
    "short": {"state": "finished"},
}
DECISIONS = {
    "decisions": "[[1, 2",
    "words": '[["a", "b", "c", "d", "e"]]',
    "nothing": '[[1, "00001", null, null, "STOP"]]',
    "mapping": '{"a": 1}',
}
REASONS = {
    "nan": "metrics.jsonl: line 1: gaze_loss is nan",
    "no_iteration": "metrics.jsonl: line 2 has no iteration",
    "empty": "it was stopped, but .*metrics.jsonl has no line",
    "short": "it has finished, but .*metrics.jsonl ends at iteration 450 of 1500",
    "state": "unknown state: None",
    "other_state": "unknown state: 'lost'",
    **dict.fromkeys(DECISIONS, "decisions.json: damaged"),
}


@pytest.mark.parametrize("damage", ["metrics", "cut", "nan", "no_iteration", "empty", *ENTRIES, *DECISIONS])
def test_a_damaged_trial_is_named_and_the_others_shown(tmp_path: Path, damage: str) -> None:
    """Not shown itself, nor counted among what was saved."""
    root, out = tmp_path / "search", tmp_path / "report.html"
    write_experiment(root, 4)
    run = root / "runs" / "00001"
    records = json.loads((root / "trials.json").read_text())
    assert records["00001"]["state"] == "stopped"
    if damage in ENTRIES:
        records["00001"] |= ENTRIES[damage]
        (root / "trials.json").write_text(json.dumps(records))
    elif damage in DECISIONS:
        (run / "decisions.json").write_text(DECISIONS[damage])
    else:
        text = (run / "metrics.jsonl").read_text()
        changed = {
            "metrics": "\x00" * 9,
            "cut": text[:-20],
            "nan": text.replace('"gaze_loss": 0.', '"gaze_loss": NaN, "x": 0.', 1),
            "no_iteration": text.replace('"iteration": 20,', ""),
            "empty": "",
        }
        (run / "metrics.jsonl").write_text(changed[damage])
    numbers = write_report(str(root), str(out))
    page = check_page(out, SECTIONS)
    ((trial, reason),) = [(one["trial"], one["reason"]) for one in numbers["damaged"]]
    assert trial == "00001" and reason and f"trial 00001: {reason}" in page.text
    shown = [row["trial"] for row in numbers["trials"]]
    assert sorted(shown) == ["00000", "00002", "00003"]
    assert re.search(REASONS.get(damage, ""), reason)
    assert numbers["stopping"]["trials_counted"] == 3 and numbers["experiment"]["trials_drawn"] == 4


def test_a_validation_without_micro_accuracy(tmp_path: Path) -> None:
    root, out = tmp_path / "search", tmp_path / "report.html"
    write_experiment(root, 4)
    for file in root.glob("runs/*/metrics.jsonl"):
        file.write_text(re.sub(r'"val_micro_accuracy": [\d.e-]+, ', "", file.read_text()))
    numbers = write_report(str(root), str(out))
    assert not numbers["damaged"] and numbers["answer"]["micro_accuracy"] is None
    check_page(out, SECTIONS)


def test_bad_input(tmp_path: Path, large: Path) -> None:
    out = str(tmp_path / "report.html")
    with pytest.raises(UserError, match="no experiment here"):
        write_report(str(tmp_path), out)
    with pytest.raises(UserError, match="this is a run"):
        write_report(str(large / "search" / "runs" / "00000"), out)
    for content in ('{"name": "other"}', "[]", "{"):
        (tmp_path / "experiment.json").write_text(content)
        with pytest.raises(UserError, match=r"experiment\.json: (not an experiment of tune_ego|damaged)"):
            write_report(str(tmp_path), out)
    search = str(large / "search")
    spec = json.loads((large / "search" / "experiment.json").read_text())
    odd = {"trials": "x", "seed": None, "gpus_per_worker": "y"}
    (tmp_path / "experiment.json").write_text(json.dumps(spec | odd))
    with pytest.raises(UserError, match=r"damaged: trials is 'x', seed is None, gpus_per_worker is 'y'"):
        write_report(str(tmp_path), out)
    with pytest.raises(UserError, match="neither an evaluation"):
        write_report(search, out, str(tmp_path))
    with pytest.raises(UserError, match="not what `tune-ego evaluate` writes"):
        write_report(search, out, str(large / "search" / "trials.json"))
    with pytest.raises(UserError, match=r"end with \.html"):
        write_report(search, str(tmp_path / "report.pdf"))
    with pytest.raises(UserError, match="say with --data"):
        write_report(search, out, checkpoint=search)
    with pytest.raises(UserError, match="name a run with --checkpoint"):
        write_report(search, out, data=str(tmp_path))
    assert not Path(out).exists()
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write_report(search, str(tmp_path / "folder.html"))
    assert (tmp_path / "folder.json").is_file()  # before the page


def _evaluated(folder: Path, config: Config, data: str = "/nowhere/shards", **changes: object) -> Path:
    """A run of `config` with an evaluation."""
    storage.write_text(str(folder / "config.yaml"), dump_config(config))
    storage.write_json(str(folder / "run.json"), {"data": data, "version": "0.1.0"})
    content = write_evaluation(folder / "evaluation.json", 12)
    storage.write_json(str(folder / "evaluation.json"), {**content, **changes})
    return folder


def test_what_an_evaluation_is_of(tmp_path: Path) -> None:
    """Found are runs of the best configuration alone; a given one of another, or on known clips, says so."""
    root, out = tmp_path / "a" / "search", tmp_path / "report.html"
    write_experiment(root, 4)
    best = read_experiment(str(root)).best.config
    longer = override_config(best, {"train.iterations": 3000, "seed": 5}, "")
    changes = {"data.split": 3, "streams": "rgb", "model.width": 0.5, "init_from.rgb": "/x.pt"}
    others = [override_config(longer, {key: value}, "") for key, value in changes.items()]
    for number, (config, key) in enumerate([*zip(others, changes), (longer, "data")]):
        run = _evaluated(tmp_path / "a" / f"other{number}", config, "/other" if key == "data" else "/nowhere/shards")
        numbers = write_report(str(root), str(out), str(run))
        assert numbers["evaluation"]["differs"] == [key]
        assert f"not the best configuration: other {key}" in check_page(out, SECTIONS).text
    assert "no evaluated run" in write_report(str(root), str(out))["evaluation"]["why"]

    run = _evaluated(tmp_path / "a" / "final", longer, clips_trained_on=7, fusion_weight=0.3)
    numbers = write_report(str(root), str(out))
    page = check_page(out, SECTIONS)
    assert numbers["evaluation"]["run"] == str(run) and numbers["evaluation"]["differs"] == []
    assert "NOT A TEST: mean class accuracy, fused" in page.text
    assert all("not a test: 7 of them were trained on" in row["on"] for row in numbers["published"]["ours"][:3])
    commands = [one["command"] for one in numbers["reproduce"]["commands"]]
    assert f"tune-ego train {run}/config.yaml --data /nowhere/shards" in " ".join(commands)
    assert any(command.endswith("--split 1 --fusion-weight 0.3") for command in commands)

    damages: list[dict[str, Any]] = [
        {"attention": {"rgb": {"auc": 0.5}}},
        {"classes": []},
        {"fused": {"recall": []}},
    ]
    for damage in damages:
        _evaluated(run, longer, **damage)
        assert "not what `tune-ego evaluate` writes" in write_report(str(root), str(out))["evaluation"]["why"]
        check_page(out, SECTIONS)
        with pytest.raises(UserError, match="not what `tune-ego evaluate` writes"):
            write_report(str(root), str(out), str(run))


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
    assert f"Without an axis: {', '.join(left_out)}." in page.text
    shares = {entry["key"]: entry["share"] for entry in numbers["importance"]["entries"]}
    assert max(shares, key=lambda key: shares[key]) == shown[0]
    assert f"seeds of the trials{numbers['reproduce']['trial_seeds'][0]} " in page.text.replace("\n", "")


def test_axes_of_parallel_coordinates() -> None:
    axis = Figure().add_subplot()
    found = _heights(axis, 0, "uniform", ["0.8", "-", "0.9"], [0.8, None, 0.9])
    assert found == pytest.approx([0, -0.05, 1])
    found = _heights(axis, 1, "choice", ["16", "8", "128", "-"], [16, 8, 128, None])
    assert found == pytest.approx([0.5, 0, 1, -0.05], abs=0.021)
    assert [text.get_text() for text in axis.texts[3:]] == ["8", "16", "128"]


def test_the_evaluated_run_beside_a_search_is_found(tmp_path: Path) -> None:
    root = tmp_path / "search"
    write_experiment(root, 4)
    trials = sorted(read_experiment(str(root)).trials, key=lambda trial: trial.accuracy or 0)
    for name, trial in (("final", trials[-1]), ("another", trials[0])):
        storage.write_text(str(tmp_path / name / "config.yaml"), dump_config(trial.config))
        write_evaluation(tmp_path / name / "evaluation.json", 12)
    numbers = write_report(str(root), str(tmp_path / "report.html"))
    assert numbers["evaluation"]["file"] == str(tmp_path / "final" / "evaluation.json")
    assert numbers["published"]["comparable"] is False
    assert "Not comparable: 12 classes" in check_page(tmp_path / "report.html", SECTIONS).text
    shutil.copytree(tmp_path / "final", tmp_path / "final2")
    assert "2 runs beside" in write_report(str(root), str(tmp_path / "report.html"))["evaluation"]["why"]


def test_two_experiments(tmp_path: Path, large: Path) -> None:
    write_experiment(tmp_path / "other", 12, "table1", seed=4)
    out = tmp_path / "report.html"
    numbers = write_comparison((str(large / "search"), str(tmp_path / "other")), str(out))
    page = check_page(out, COMPARED)
    assert {row["what"] for row in numbers["differences"]} >= {"scheduler", "samples", "searched parameters"}
    assert "other budgets" in page.text
    write_experiment(tmp_path / "empty", 4)
    (tmp_path / "empty" / "trials.json").unlink()
    write_comparison((str(tmp_path / "empty"), str(tmp_path / "other")), str(out))
    assert "nothing has been validated" in check_page(out, COMPARED).text


def test_labelled_trials_stand_beside_the_table(tmp_path: Path) -> None:
    write_experiment(tmp_path / "search", 4, "table1")
    rows = write_report(str(tmp_path / "search"), str(tmp_path / "r.html"))["published"]["ours"]
    assert {row["model"] for row in rows} == {
        f"trial {label}" for label in ("lu_original", "1_mixed_precision", "2_ranger", "3_stacked_stam")
    }
    assert all("validation clips: stratified fold 0 of split 1" in row["on"] for row in rows)


def test_what_does_not_go_together(large: Path) -> None:
    with pytest.raises(UserError, match="belong to a report of one"):
        report(str(large / "search"), str(large / "search"), str(large / "x.html"), data="shards")
    assert not (large / "x.html").exists()


def test_without_optuna(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report says what to install, and has all the rest."""
    monkeypatch.setitem(sys.modules, "optuna", None)
    numbers = write_report(str(large / "search"), str(large / "plain.html"))
    assert numbers["importance"]["entries"] == []
    assert "pip install 'tune_ego[optuna]'" in check_page(large / "plain.html", SECTIONS).text


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
    with pytest.raises(UserError, match=r"experiment\.json, which is there and no report's"):
        write_report(str(tmp_path), str(tmp_path / "experiment.html"), None)
    assert (tmp_path / "experiment.json").read_bytes() == before and not (tmp_path / "experiment.html").exists()
