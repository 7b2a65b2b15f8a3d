"""The arguments that each command line hands to its function, and its exit code: what they call is replaced."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from tune_ego import __version__, cli, options
from tune_ego.bench.record import Benchmark
from tune_ego.config import Config
from tune_ego.config_io import override_config
from tune_ego.dataset.prepare import Settings
from tune_ego.driver_signals import end_interrupted
from tune_ego.errors import UserError
from tune_ego.options import parse_size
from tune_ego.prediction.predict import PredictionSettings, WindowSettings
from tune_ego.prediction.segments import SegmentSettings

Call = tuple[tuple[Any, ...], dict[str, Any]]
PLACES = ["--data", "D", "--storage", "/s", "--name", "n"]
SYNTHETIC = {"verbs": 3, "nouns": 4, "clips": 480, "seconds": 1.5, "size": (320, 240), "distractors": 1, "seed": 0}
SYNTHETIC |= {"imbalance": 1.0, "sessions": False}
PREPARE = {"allow_missing": False, "jobs": None, "address": None}
RESUME = {"data": None, "samples": None, "iterations": None, "concurrent": None}
BOARD = {"track": ["tensorboard"]}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tune-ego", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize(
    ("line", "function", "positional", "named"),
    [
        ("demo", "demo.run_demo", ("tune-ego-demo", 0), {}),
        ("demo --out o --seed 7", "demo.run_demo", ("o", 7), {}),
        ("synthesize out", "dataset.synthetic.synthesize", ("out",), SYNTHETIC),
        (
            "synthesize out --verbs 5 --nouns 6 --clips 70 --seconds 2.5 --size 96x72 --distractors 0 --imbalance 4"
            " --sessions --seed 9",
            "dataset.synthetic.synthesize",
            ("out",),
            {"verbs": 5, "nouns": 6, "clips": 70, "seconds": 2.5, "size": (96, 72), "distractors": 0}
            | {"imbalance": 4.0, "sessions": True, "seed": 9},
        ),
        ("prepare e s", "dataset.prepare.prepare", ("e", "s", Settings((320, 240), "dis", None, 0)), PREPARE),
        (
            "prepare e s --image-size 64x48 --flow raft --flow-weights w --frame-offset -1 --allow-missing --jobs 3"
            " --address auto",
            "dataset.prepare.prepare",
            ("e", "s", Settings((64, 48), "raft", "w", -1)),
            {"allow_missing": True, "jobs": 3, "address": "auto"},
        ),
        (
            "prepare e --check",
            "dataset.check.check",
            ("e", Settings((320, 240), "dis", None, 0), None),
            {"allow_missing": False},
        ),
        (
            "prepare e s --check --flow tvl1 --allow-missing",
            "dataset.check.check",
            ("e", Settings((320, 240), "tvl1"), "s"),
            {"allow_missing": True},
        ),
        ("inspect s", "evaluation.inspection.show_counts", ("s",), {}),
        ("inspect s c", "evaluation.inspection.draw_clip", ("s", "c", "c.png"), {}),
        ("inspect s c --out p.png", "evaluation.inspection.draw_clip", ("s", "c", "p.png"), {}),
        ("tune demo PLACES", "search.tune.start_search", ("demo", "D", "/s/n", {}, 0, None, None), BOARD),
        (
            "tune full PLACES --seed 3 --concurrent 2 --set a=1 --set b.c=x --address auto --track mlflow"
            " --track wandb",
            "search.tune.start_search",
            ("full", "D", "/s/n", {"a": 1, "b.c": "x"}, 3, 2, "auto"),
            {"track": ["mlflow", "wandb"]},
        ),
        (
            "tune demo PLACES --dry-run",
            "search.dry_run.show_plan",
            ("demo", "D", "/s/n", {}, 0, None, None),
            {"probe": False, "price": None},
        ),
        (
            "tune demo PLACES --dry-run --probe --price 1.5 --seed 4 --concurrent 6",
            "search.dry_run.show_plan",
            ("demo", "D", "/s/n", {}, 4, 6, None),
            {"probe": True, "price": 1.5},
        ),
        ("resume /s/n", "search.tune.resume_search", ("/s/n", None), RESUME),
        (
            "resume /s/n --node-type CPU=16,GPU=1,max=8 --node-type CPU=4",
            "search.tune.resume_search",
            ("/s/n", None),
            {**RESUME, "node_types": ["CPU=16,GPU=1,max=8", "CPU=4"]},
        ),
        (
            "resume /s/n --data d --samples 5 --iterations 60 --concurrent 7 --address auto",
            "search.tune.resume_search",
            ("/s/n", "auto"),
            {"data": "d", "samples": 5, "iterations": 60, "concurrent": 7},
        ),
        (
            "predict m v w",
            "prediction.write.predict_files",
            ("m", ["v", "w"], None, PredictionSettings(), []),
            {"overlay": False},
        ),
        (
            "predict m v --out o --stride 4 --crops 3 --flips --threshold 0.5 --smooth 0 --merge 1 --shortest 2"
            " --nms 0.1 --overlay --truth t --truth u --flow-weights f",
            "prediction.write.predict_files",
            (
                "m",
                ["v"],
                "o",
                PredictionSettings(WindowSettings(4, 3, True), SegmentSettings(0.5, 0, 1, 2, 0.1), "f"),
                ["t", "u"],
            ),
            {"overlay": True},
        ),
        ("package m o", "prediction.package.package", ("m", "o"), {"onnx": False}),
        ("package m o --onnx", "prediction.package.package", ("m", "o"), {"onnx": True}),
        ("report e", "report.write.write_report", ("e", "report.html", None, None, None, None), {}),
        (
            "report e --out o.html --evaluation v --checkpoint c --data D --reference 00003",
            "report.write.write_report",
            ("e", "o.html", "v", "c", "D", "00003"),
            {},
        ),
        ("report e f --out o.html", "report.write.write_comparison", (("e", "f"), "o.html"), {}),
        ("visualize c clip --data D", "evaluation.visualize.visualize", ("c", "clip", "D", "clip"), {}),
        ("visualize c clip --data D --out o", "evaluation.visualize.visualize", ("c", "clip", "D", "o"), {}),
    ],
)
def test_a_command_s_options_reach_its_function(
    line: str, function: str, positional: tuple[Any, ...], named: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Call] = []
    module, _, name = function.rpartition(".")
    for target in ("search.dry_run.show_plan", "search.tune.start_search", function):  # nothing is really started
        place, _, other = target.rpartition(".")
        monkeypatch.setattr(
            importlib.import_module(f"tune_ego.{place}"), other, lambda *_, **__: pytest.fail("another")
        )
    called = importlib.import_module(f"tune_ego.{module}")
    monkeypatch.setattr(called, name, lambda *args, **kwargs: calls.append((args, kwargs)))
    words = [word for part in line.split() for word in (PLACES if part == "PLACES" else [part])]
    assert run(monkeypatch, *words) == 0
    if name in ("start_search", "resume_search", "show_plan"):
        named = {"node_types": (), **named}
    assert calls == [(positional, named)]


@pytest.mark.parametrize(
    ("options", "changes", "address", "named"),
    [
        ([], {}, None, {"test": True, "track": ["tensorboard"]}),
        (["--no-evaluate", "--track", "wandb"], {}, None, {"test": False, "track": ["wandb"]}),
        (["--iterations", "77", "--address", "auto"], {"train.iterations": 77}, "auto", {"test": True, **BOARD}),
        (
            ["--iterations", "77", "--set", "train.iterations=5"],
            {"train.iterations": 77},
            None,
            {"test": True, **BOARD},
        ),
        (
            ["--set", "optimizer.lr=1e-3", "--set", "seed=4"],
            {"optimizer.lr": 0.001, "seed": 4},
            None,
            {"test": True, **BOARD},
        ),
    ],
)
def test_train_overrides_the_configuration(
    options: list[str],
    changes: dict[str, Any],
    address: str | None,
    named: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Call] = []
    monkeypatch.setattr("tune_ego.runs.final.train_final", lambda *args, **kwargs: calls.append((args, kwargs)))
    file = tmp_path_factory.mktemp("c") / "config.yaml"
    file.write_text("label: mine\nprovenance: {trial: 3}\n")
    assert run(monkeypatch, "train", str(file), *PLACES, *options) == 0
    config = override_config(Config(label="mine"), changes, "t")
    assert calls == [((config, "D", "/s/n", address), {"node_types": (), **named})]


@pytest.mark.parametrize(
    ("workers", "note"), [(1, ""), (4, "Note: 4 workers: 3 samples in a forward pass instead of 12")]
)
def test_train_notes_smaller_passes_than_those_of_its_file(
    workers: int, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tune_ego.runs.final.train_final", lambda *_, **__: None)
    file = tmp_path / "config.yaml"
    file.write_text("train: {batch_size: 12}\n")
    assert run(monkeypatch, "train", str(file), *PLACES, "--set", f"compute.workers={workers}") == 0
    printed = capsys.readouterr().out
    assert printed.startswith(note) and bool(printed) == bool(note)


@pytest.mark.parametrize(
    ("options", "positional", "shown"),
    [
        ([], ("c", "D", None, None, None), {"sweep": False, "compare": False}),
        (
            ["--split", "2", "--out", "o", "--fusion-weight", "0.3", "--fusion-sweep"],
            ("c", "D", 2, "o", 0.3),
            {"sweep": True, "compare": False},
        ),
        (
            ["--fusion-weight", "0", "--compare", "--crops", "3", "--flips"],
            ("c", "D", None, None, 0.0),
            {"sweep": False, "compare": True},
        ),
    ],
)
def test_evaluate_shows_its_result(
    options: list[str], positional: tuple[Any, ...], shown: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def evaluate(*args: Any, **views: Any) -> dict[str, int]:
        calls.append((args, views))
        return {"a": 1}

    monkeypatch.setattr("tune_ego.evaluation.evaluate.evaluate", evaluate)
    monkeypatch.setattr("tune_ego.evaluation.tables.show", lambda *args, **kwargs: calls.append((args, kwargs)))
    assert run(monkeypatch, "evaluate", "c", "--data", "D", *options) == 0
    views = {"crops": 3 if "--crops" in options else 1, "flips": "--flips" in options}
    assert calls == [(positional, views), (({"a": 1},), shown)]


BENCHES = {
    "feed.bench_feed": "feed",
    "step.bench_step": "step",
    "loop.bench_loop": "loop",
    "prepare.bench_prepare": "prepare",
    "predict.bench_predict": "predict",
    "search.bench_search": "search",
    "resume.bench_resume": "resume",
    "resume.bench_resume_search": "resume-search",
}


@pytest.mark.parametrize(
    ("line", "calls"),
    [
        ("feed", [("feed", None)]),
        ("feed s", [("feed", "s")]),
        ("loop s", [("loop", "s", 160, 5)]),
        ("loop s --iterations 80 --repeats 2", [("loop", "s", 80, 2)]),
        ("step", [("step", 224, None, 5)]),
        ("step --side 64 --batch 3 --repeats 2", [("step", 64, 3, 2)]),
        ("prepare e", [("prepare", "e")]),
        ("predict --width 0.25 --repeats 2", [("predict", 0.25, 2)]),
        ("search", [("search", 1000, 20)]),
        ("search --trials 16 --seeds 2", [("search", 16, 2)]),
        ("resume", [("resume", 20, 0)]),
        ("resume --kills 3 --seed 8", [("resume", 3, 8)]),
        ("resume --search", [("resume-search", 5, 0)]),
        ("resume --search --kills 2", [("resume-search", 2, 0)]),
        (
            "all",
            [("step",), ("feed",), ("loop",), ("search", 1000, 20), ("prepare",), ("predict",)]
            + [("resume", 20, 0), ("resume-search", 5, 0)],
        ),
    ],
)
def test_a_benchmark_s_options_reach_it_and_its_record_is_written(
    line: str, calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Any, ...]] = []
    written: list[tuple[str, str]] = []

    def bench(name: str, *args: Any, **named: Any) -> Benchmark:
        save = named.pop("save", None)
        made.append((name, *args, *named.values()))
        benchmark = Benchmark(name, {})
        if save is not None:
            save(benchmark)
        return benchmark

    for place, name in BENCHES.items():
        monkeypatch.setattr(f"tune_ego.bench.{place}", functools.partial(bench, name))
    monkeypatch.setattr(Benchmark, "show", lambda benchmark: None)
    monkeypatch.setattr(Benchmark, "write", lambda benchmark, out: written.append((benchmark.name, out)))
    assert run(monkeypatch, "bench", *line.split()) == 0
    assert made == calls and not written
    assert run(monkeypatch, "bench", *line.split(), "--out", "/o") == 0
    names = [call[0] for call in calls]
    places = [(name, f"/o/{name}.json" if line == "all" else "/o") for name in names]
    assert written == (places * 2 if line.startswith("step") else places)  # `step` keeps what it has, too


@pytest.mark.parametrize(
    ("raised", "code", "printed"),
    [
        (UserError("two\n  lines"), 2, "tune-ego: two lines\n"),
        (PermissionError(13, "no permission"), 2, "tune-ego: PermissionError: [Errno 13] no permission\n"),
        (typer.Exit(3), 3, ""),
    ],
)
def test_the_exit_code_of_a_mistake(
    raised: Exception, code: int, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr("tune_ego.demo.run_demo", fails)
    assert run(monkeypatch, "demo") == code
    assert capsys.readouterr().err == printed


def test_an_interrupted_command_ends_with_130_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tune_ego.demo.run_demo", lambda *_: end_interrupted("tune-ego resume /s/n"))
    assert run(monkeypatch, "demo") == 130
    assert capsys.readouterr().out == "Interrupted. To resume from the last checkpoint, run: tune-ego resume /s/n\n"


@pytest.mark.parametrize(
    ("pair", "key", "value"),
    [
        ("optimizer.lr=1e-3", "optimizer.lr", 0.001),
        ("optimizer.lr=1E3", "optimizer.lr", 1000.0),
        ("train.iterations=30", "train.iterations", 30),
        ("model.copy_init=true", "model.copy_init", True),
        ("compute.workers=[1, 4]", "compute.workers", [1, 4]),
        ("init_from.rgb=null", "init_from.rgb", None),
        ("init_from.rgb=s3://b/w.pt?a=b", "init_from.rgb", "s3://b/w.pt?a=b"),
        ("label=1e", "label", "1e"),
    ],
)
def test_a_change_s_value_is_yaml(pair: str, key: str, value: Any) -> None:
    changes = options.parse_changes([pair])
    assert changes == {key: value} and type(changes[key]) is type(value)


def test_of_changes_of_one_key_the_last_counts() -> None:
    assert options.parse_changes(["seed=1", "label=x", "seed=2"]) == {"seed": 2, "label": "x"}
    assert options.parse_changes(None) == {}


@pytest.mark.parametrize(
    ("text", "size"),
    [("320x240", (320, 240)), ("64x48", (64, 48)), ("0x48", None), ("64x0", None), ("64", None), ("-4x8", None)],
)
def test_a_size_is_width_x_height(text: str, size: tuple[int, int] | None) -> None:
    if size is None:
        with pytest.raises(UserError, match=f"'{text}' is not a size; write WIDTHxHEIGHT"):
            parse_size(text)
    else:
        assert parse_size(text) == size


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tune demo PLACES --probe", "--probe belongs to --dry-run"),
        ("tune demo PLACES --dry-run --price 1", "--price to --probe"),
        ("prepare e", "give a folder or URI for the shards, or --check"),
        ("report a b --data D", "are for a report of one"),
        ("tune demo PLACES --seed -1", "--seed"),
        ("tune demo PLACES --concurrent 0", "--concurrent"),
        ("resume e --samples 0", "--samples"),
        ("train c PLACES --iterations 0", "--iterations"),
        ("evaluate c --data D --split 4", "--split"),
        ("evaluate c --data D --split 0", "--split"),
        ("evaluate c --data D --fusion-weight 1.1", "--fusion-weight"),
        ("prepare e s --jobs 0", "--jobs"),
        ("prepare e s --flow none", "--flow"),
        ("tune demo", "--data"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    line: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [word for part in line.split() for word in (PLACES if part == "PLACES" else [part])]
    assert run(monkeypatch, *parts) == 2
    assert words in capsys.readouterr().err


def test_the_version_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("command", ["tune demo", "train c.yaml"])
def test_names_that_leave_the_storage_are_refused(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text("seed: 1\n")
    monkeypatch.chdir(tmp_path)
    for name in ("../up", ""):
        monkeypatch.setattr("sys.argv", ["tune-ego", *command.split(), "--data", "d", "--storage", "s", "--name", name])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert exit.value.code == 2 and f"--name {name!r}: a name has" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]
