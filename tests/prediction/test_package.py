"""Packages: outputs of every form equal those of the checkpoint; what is in the folder; a package as a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
import yaml

from tests.dataset.test_irregular_videos import encoded, grey
from tests.evaluation.test_evaluate import checkpoint
from tune_ego.dataset.shards import open_shards
from tune_ego.errors import UserError
from tune_ego.evaluation.evaluate import evaluate
from tune_ego.prediction.package import package
from tune_ego.prediction.trained_model import load_model


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory, shards: str) -> tuple[str, str]:
    """(run, its package), of a run with test results."""
    folder = tmp_path_factory.mktemp("packaged")
    checkpoint(folder, shards, fusion_weight=0.3)
    evaluate(str(folder / "run"), shards)
    return str(folder / "run"), package(str(folder / "run"), str(folder / "package"))


def windows(batch: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(batch)
    return {
        "rgb": random.integers(0, 256, (batch, 16, 32, 32, 3)).astype(np.uint8),
        "flow": random.integers(0, 256, (batch, 16, 2, 32, 32)).astype(np.uint8),
    }


def outputs(run: str, images: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of the checkpoint, by the names of a package's outputs."""
    prediction = load_model(run, "cpu")(*map(torch.from_numpy, images.values()))
    values = {"scores": prediction.scores}
    values |= {f"{name}_scores": value for name, value in prediction.stream_scores.items()}
    values |= {f"{name}_attention": value for name, value in prediction.attention.items()}
    return {name: value.numpy() for name, value in values.items()}


@pytest.mark.parametrize("batch", [1, 3])
def test_the_exported_model_gives_the_outputs_of_the_checkpoint(packaged: tuple[str, str], batch: int) -> None:
    run, folder = packaged
    config = json.loads(Path(folder, "config.json").read_text())
    images = windows(batch)
    expected = outputs(run, images)
    assert config["inputs"] == ["rgb", "flow"] and config["outputs"] == list(expected)
    tensors = [torch.from_numpy(images[name]) for name in config["inputs"]]
    weights = load_model(folder, "cpu")(*tensors)
    np.testing.assert_array_equal(weights.scores.numpy(), expected["scores"])
    exported = torch.export.load(Path(folder, "model.pt2")).module()(*tensors)
    for (name, value), result in zip(expected.items(), exported, strict=True):
        np.testing.assert_allclose(result.numpy(), value, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_onnx_gives_the_outputs_of_the_checkpoint(packaged: tuple[str, str], tmp_path: Path) -> None:
    """Of the package of a package. The export to ONNX takes most of a minute."""
    run, folder = packaged
    again = package(folder, str(tmp_path / "again"), onnx=True)
    assert Path(again, "model.safetensors").read_bytes() == Path(folder, "model.safetensors").read_bytes()
    assert "Not tested" in Path(again, "README.md").read_text()
    session = onnxruntime.InferenceSession(str(Path(again, "model.onnx")), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = windows(batch)
        expected = outputs(run, images)
        for (name, value), result in zip(expected.items(), session.run(list(expected), images), strict=True):
            np.testing.assert_allclose(result, value, atol=1e-4, err_msg=name)


def test_what_is_in_a_package(packaged: tuple[str, str], shards: str) -> None:
    run, folder = packaged
    names = ["README.md", "config.json", "example.py", "model.pt2", "model.safetensors"]
    assert sorted(os.listdir(folder)) == names
    config = json.loads(Path(folder, "config.json").read_text())
    data = open_shards(shards)
    assert config["classes"] == data.actions and config["image_size"] == list(data.image_size)
    assert (config["crop"], config["flow_method"], config["frames_per_second"]) == (32, "dis", 24)
    state = safetensors.torch.load_file(Path(folder, "model.safetensors"))
    assert state.keys() == load_model(run, "cpu").model.state_dict().keys()
    _, metadata, card = Path(folder, "README.md").read_text().split("---\n", 2)
    results = json.loads(Path(run, "evaluation.json").read_text())
    metrics = yaml.safe_load(metadata)["model-index"][0]["results"][0]["metrics"]
    assert {m["type"]: m["value"] for m in metrics} == {
        kind: round(results["fused"][kind], 4) for kind in ("micro_accuracy", "mean_class_accuracy")
    }
    assert f"| optical flow | {100 * results['flow']['micro_accuracy']:.1f} % |" in card and "{" not in card


def test_a_package_is_a_model_for_every_command(packaged: tuple[str, str], shards: str, tmp_path: Path) -> None:
    run, folder = packaged
    tested = evaluate(folder, shards, out=str(tmp_path / "e.json"))
    before = json.loads(Path(run, "evaluation.json").read_text())
    assert tested["fused"] == before["fused"] and tested["iteration"] == before["iteration"]


@pytest.mark.parametrize(("frames", "windows"), [(30, 2), pytest.param(5, 1, marks=pytest.mark.slow)])
def test_the_example_needs_nothing_of_ours(
    frames: int, windows: int, packaged: tuple[str, str], tmp_path: Path
) -> None:
    """It runs where tune_ego cannot be imported, and prints a line for each window. A short video repeats a frame."""
    video, example = tmp_path / "v.mp4", str(Path(packaged[1], "example.py"))
    video.write_bytes(encoded([grey(number) for number in range(frames)]))
    program = f"""
import runpy, sys
sys.modules["tune_ego"] = sys.modules["ray"] = sys.modules["av"] = None
sys.argv = ["example.py", {str(video)!r}]
runpy.run_path({example!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    classes = json.loads(Path(packaged[1], "config.json").read_text())["classes"]
    lines = done.stdout.splitlines()
    assert [float(line.split()[0]) for line in lines] == pytest.approx([n / 3 for n in range(windows)], abs=0.01)
    assert all(any(name in line for name in classes) and line.endswith(" %") for line in lines)
    assert len(Path(packaged[1], "example.py").read_text().splitlines()) <= 40


def test_what_cannot_be_packaged_or_loaded(packaged: tuple[str, str], tmp_path: Path) -> None:
    run, folder = packaged
    with pytest.raises(UserError, match="is not empty"):
        package(run, folder)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"its config\.json is missing"):
        load_model(broken)
    (broken / "config.json").write_text('{"config": {}}')
    with pytest.raises(UserError, match="it has no classes"):
        load_model(broken)
    (broken / "config.json").write_bytes(Path(folder, "config.json").read_bytes())
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_model(broken)
