"""The Python interface: what `import tune_ego` offers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tune_ego
from tests import handmade
from tests.conftest import tiny_config
from tests.six_trials import write_six_trials
from tune_ego.config_io import dump_config
from tune_ego.evaluation.evaluate import score_clips
from tune_ego.feed.reader import WindowReader
from tune_ego.feed.sampling import centre_window
from tune_ego.results.checkpoint_files import MODEL_FILE
from tune_ego.training.checkpoint import Origin, to_bytes, write_checkpoint
from tune_ego.training.trainer import Trainer

ORIGIN = Origin(handmade.ACTIONS, (48, 40), "dis")


def write_run(folder: Path, **changes: Any) -> Trainer:
    """A run with one checkpoint of weights drawn by chance."""
    trainer = Trainer(tiny_config(**changes), ORIGIN, torch.device("cpu"))
    write_checkpoint(str(folder), trainer.checkpoint())
    return trainer


def test_the_names_are_there_and_cost_nothing_until_they_are_used() -> None:
    program = """
import sys
import tune_ego
assert {"load_config", "load_model", "open_shards", "read_experiment", "train"} < set(dir(tune_ego))
tune_ego.load_config, tune_ego.Config, tune_ego.UserError
sys.exit("torch" in sys.modules or "ray" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    for name in tune_ego.__all__:
        assert getattr(tune_ego, name)
    with pytest.raises(AttributeError, match="'nothing'"):
        tune_ego.nothing  # noqa: B018


def test_a_configuration_is_read(tmp_path: Path) -> None:
    config = tiny_config(optimizer__lr=0.25)
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert tune_ego.load_config(tmp_path / "c.yaml") == config
    with pytest.raises(tune_ego.UserError, match=r"absent\.yaml"):
        tune_ego.load_config(tmp_path / "absent.yaml")


def test_a_model_scores_windows_as_evaluation_does(handmade_shards: str, tmp_path: Path) -> None:
    """A clip of 16 frames has one evaluation window, in the centre."""
    trainer = write_run(tmp_path / "run", fusion_weight=0.3)
    model = tune_ego.load_model(tmp_path / "run", device="cpu")
    assert model.streams == ("rgb", "flow") and model.classes == handmade.ACTIONS
    assert model.image_size == (48, 40) and model.flow_method == "dis"
    assert model.config == trainer.config and not model.training
    shards = tune_ego.open_shards(handmade_shards)
    clips = [shards.clip(row) for row in shards.table.to_pylist()]
    (index,) = [n for n, clip in enumerate(clips) if clip.frames == 16]
    reader = WindowReader(clips, model.streams, shards.image_size, model.config.data.crop)
    batch = reader.read_batch([centre_window(index, 0, shards.image_size, model.config.data.crop)])
    prediction = model(torch.from_numpy(batch["rgb"]), torch.from_numpy(batch["flow"]))
    tested = score_clips(trainer.model, trainer.config, [clips[index]], shards)[0].reduce(0.3)
    torch.testing.assert_close(prediction.scores.double(), tested["fused"].double(), rtol=1e-5, atol=1e-6)
    for name in ("rgb", "flow"):
        torch.testing.assert_close(prediction.stream_scores[name].double(), tested[name].double(), rtol=1e-5, atol=1e-6)
        assert prediction.attention[name].shape == (1, 2, 1, 1)
    mean = 0.3 * prediction.stream_scores["rgb"] + 0.7 * prediction.stream_scores["flow"]
    torch.testing.assert_close(prediction.scores, mean)


def test_a_model_of_one_stream_without_attention(tmp_path: Path) -> None:
    write_run(tmp_path, streams="flow", model__stam_depth=0)
    model = tune_ego.load_model(tmp_path, device="cpu")
    flow = torch.randint(0, 256, (2, 16, 2, 32, 32), dtype=torch.uint8)
    prediction = model(flow=flow)
    assert model.streams == ("flow",) and prediction.attention == {}
    torch.testing.assert_close(prediction.scores, prediction.stream_scores["flow"])
    torch.testing.assert_close(prediction.scores.sum(dim=1), torch.ones(2))


def test_final_weights_come_before_checkpoints(tmp_path: Path) -> None:
    trainer = write_run(tmp_path)
    state = {name: torch.zeros_like(value) for name, value in trainer.model.state_dict().items()}
    (tmp_path / MODEL_FILE).parent.mkdir()
    (tmp_path / MODEL_FILE).write_bytes(to_bytes(state))
    for source in (tmp_path, tmp_path / MODEL_FILE):
        model = tune_ego.load_model(source, device="cpu")
        assert not any(value.any() for value in model.model.state_dict().values())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"rgb": (1, 16, 32, 32, 3)}, "takes rgb and flow: flow is not given"),
        ({"rgb": (1, 16, 32, 32, 3), "flow": (1, 16, 32, 32, 2)}, r"flow: expected uint8 \[B, 16, 2, H, W\], found"),
        ({"rgb": (1, 8, 32, 32, 3), "flow": (1, 16, 2, 32, 32)}, r"rgb: expected uint8 \[B, 16, H, W, 3\], found"),
        ({"rgb": (16, 32, 32, 3), "flow": (1, 16, 2, 32, 32)}, r"rgb: expected .* found torch.uint8 \[16, 32, 32, 3\]"),
    ],
)
def test_inputs_of_another_shape_are_refused(inputs: dict[str, tuple[int, ...]], message: str, tmp_path: Path) -> None:
    write_run(tmp_path)
    model = tune_ego.load_model(tmp_path, device="cpu")
    with pytest.raises(ValueError, match=message):
        model(**{name: torch.zeros(shape, dtype=torch.uint8) for name, shape in inputs.items()})
    with pytest.raises(ValueError, match=r"rgb: expected uint8 .* found torch\.float32"):
        model(torch.zeros(1, 16, 32, 32, 3), torch.zeros(1, 16, 2, 32, 32, dtype=torch.uint8))


def test_a_search_is_a_table(tmp_path: Path) -> None:
    write_six_trials(tmp_path)
    search = tune_ego.read_experiment(tmp_path)
    table = search.to_arrow()
    assert table.num_rows == len(search.trials) == 6
    rows = {row["trial"]: row for row in table.to_pylist()}
    for trial in search.trials:
        row = rows[trial.id]
        assert (row["state"], row["iteration"], row["run"]) == (trial.state, trial.iteration, trial.run)
        assert row["val_mean_class_accuracy"] == trial.accuracy and row["seed"] == trial.config.seed
        assert row["best_iteration"] == (trial.best["iteration"] if trial.best else None)
        for key in search.space.searched_keys:
            value: Any = trial.config
            for part in key.split("."):
                value = getattr(value, part, None)
            assert row[key] == (list(value) if isinstance(value, tuple) else value)
    frame = search.to_pandas()
    assert list(frame["trial"]) == [trial.id for trial in search.trials]
    assert np.array_equal(frame["val_mean_class_accuracy"].isna(), [trial.accuracy is None for trial in search.trials])


def test_the_examples_of_the_documentation_run(
    handmade_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training is started in name only: `tests/runs` trains."""
    write_run(tmp_path / "run")
    write_six_trials(tmp_path / "search")
    (tmp_path / "best.yaml").write_text(dump_config(tiny_config()))
    started: list[Any] = []

    def train_final(*arguments: Any, **options: Any) -> str:
        started.append((arguments, options))
        return "weights"

    monkeypatch.setattr("tune_ego.runs.final.train_final", train_final)
    places = {"RUN": "run", "SEARCH": "search", "best.yaml": "best.yaml"}
    text = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
    for name, file in places.items():
        text = text.replace(f'"{name}"', repr(str(tmp_path / file)))
    text = text.replace('"SHARDS"', repr(handmade_shards))
    scopes: list[dict[str, Any]] = []
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        scopes.append({})
        exec(example, scopes[-1])
    scored, read, searched, trained = scopes
    assert scored["attention"].shape[:2] == (1, 2) and capsys.readouterr().out.split("\n")[0] in handmade.ACTIONS
    assert len(read["clips"]) == len(handmade.CLIPS)
    assert searched["best"].accuracy == max(searched["search"].best.accuracies) and len(searched["frame"]) == 6
    assert trained["weights"] == "weights"
    run = str(tmp_path / "run")
    assert started == [((tiny_config(), handmade_shards, run, None), {"test": True, "track": ()})]
