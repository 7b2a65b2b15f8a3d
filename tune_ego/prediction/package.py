"""`package`: a trained model as a folder that runs without tune_ego, Ray or shards."""

from __future__ import annotations

import importlib.util
import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from tune_ego import __version__, storage
from tune_ego.console import say
from tune_ego.dataset.flow import BOUND
from tune_ego.dataset.gaze import FPS
from tune_ego.errors import UserError
from tune_ego.feed.augmentation import crop_shape
from tune_ego.feed.batches import model_input
from tune_ego.prediction.model_card import model_card
from tune_ego.prediction.segments import SegmentSettings
from tune_ego.prediction.trained_model import TrainedModel, load_model
from tune_ego.results.checkpoint_files import PACKAGE_CONFIG, PACKAGE_FILE, find_checkpoint, run_of
from tune_ego.results.experiment import EVALUATION_FILE
from tune_ego.training.metrics import fuse

EXPORTED, ONNX, CARD, EXAMPLE = "model.pt2", "model.onnx", "README.md", "example.py"


class ExportedModel(nn.Module):
    """Uint8 windows in, scores and attention out: what `model.pt2` and `model.onnx` compute, in float32."""

    def __init__(self, trained: TrainedModel) -> None:
        super().__init__()
        self.model, self._fusion_weight = trained.model, trained.config.fusion_weight
        self.inputs = trained.streams
        """Names of the inputs, in order: `rgb` uint8 [B, T, side, side, 3], `flow` uint8 [B, T, 2, side, side]."""
        outputs = ["scores", *(f"{name}_scores" for name in trained.streams)]
        attention = [f"{name}_attention" for name in trained.streams] if trained.config.model.stam_depth else []
        self.outputs = [*outputs, *attention]
        """Names of the outputs, in order."""

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs: softmax scores [B, K] (fused first), then attention maps [B, T', H, W]."""
        inputs = dict(zip(self.inputs, images))
        outputs = self.model(model_input(inputs.get("rgb"), inputs.get("flow")))
        scores = {name: output.logits_BK.softmax(dim=1) for name, output in outputs.items()}
        fused = fuse(scores, self._fusion_weight) if len(scores) > 1 else next(iter(scores.values())).clone()
        attention = [output.attention_BTHW for output in outputs.values() if output.attention_BTHW is not None]
        return (fused, *scores.values(), *attention)


def package(source: str, out: str, *, onnx: bool = False) -> str:
    """Write a model's package: weights, configuration, exported model, model card and an example.

    Args:
        source: A trained model, as `load_model` reads it.
        out: Folder or URI; absent or empty.
        onnx: Write `model.onnx` as well.

    Returns:
        The folder, absolute.

    Raises:
        UserError: The source is no trained model, the folder is not empty, or a package for ONNX is missing.
    """
    target = storage.absolute(out)
    if storage.list_names(target):
        raise UserError(f"{out}: the folder is not empty; choose another")
    if onnx and not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        raise UserError("--onnx needs two further packages: pip install 'tune_ego[onnx]'")
    trained = load_model(source, "cpu")
    file = find_checkpoint(source)
    config = package_config(trained)
    # last is the file that makes the folder a model
    exported = ExportedModel(trained).eval().requires_grad_(False)
    storage.write_bytes(storage.join(target, EXPORTED), _export(exported, trained))
    if onnx:
        storage.write_bytes(storage.join(target, ONNX), _export_onnx(exported, trained))
    storage.write_text(storage.join(target, CARD), model_card(config, _read_evaluation(file, trained.iteration)))
    storage.write_text(storage.join(target, EXAMPLE), (Path(__file__).parent / "package_example.py").read_text())
    storage.write_json(storage.join(target, PACKAGE_CONFIG), config)
    state = {name: value.contiguous() for name, value in trained.model.state_dict().items()}
    storage.write_bytes(storage.join(target, PACKAGE_FILE), save(state))
    say(f"{target}: {', '.join(storage.list_names(target))}")
    return target


def _read_evaluation(file: str, iteration: int) -> dict[str, Any] | None:
    """Return the content of `evaluation.json` beside a file of weights, if it is a test of these weights."""
    uri = storage.join(run_of(file), EVALUATION_FILE)
    if not storage.exists(uri):
        return None
    evaluation: dict[str, Any] = storage.read_json(uri)
    tested = str(evaluation.get("checkpoint", ""))
    same_file = tested.removeprefix(run_of(tested)) == file.removeprefix(run_of(file))
    return evaluation if same_file and evaluation.get("iteration") == iteration else None


def package_config(trained: TrainedModel) -> dict[str, Any]:
    """Return the content of a package's `config.json`."""
    exported = ExportedModel(trained)
    return {
        "tune_ego": __version__,
        "classes": trained.classes,
        "inputs": list(exported.inputs),
        "outputs": exported.outputs,
        "image_size": list(trained.image_size),
        "crop": trained.config.data.crop,
        "window_frames": trained.config.data.window_frames,
        "frame_step": trained.config.data.frame_step,
        "frames_per_second": FPS,
        "flow_method": trained.flow_method,
        "flow_pixels": BOUND,
        "fusion_weight": trained.config.fusion_weight,
        "detection": SegmentSettings()._asdict(),
        "iteration": trained.iteration,
        "config": json.loads(trained.config.model_dump_json()),
    }


def _examples(exported: ExportedModel, trained: TrainedModel, batch: int) -> tuple[Tensor, ...]:
    side, frames = trained.config.data.crop, trained.config.data.window_frames
    return tuple(torch.zeros(batch, frames, *crop_shape(name, side), dtype=torch.uint8) for name in exported.inputs)


def _dynamic(exported: ExportedModel) -> tuple[Any, ...]:
    batch = torch.export.Dim("batch", min=1)
    return (tuple({0: batch} for _ in exported.inputs),)  # `forward` takes its inputs as one tuple


def _export(exported: ExportedModel, trained: TrainedModel) -> bytes:
    with torch.no_grad():
        program = torch.export.export(exported, _examples(exported, trained, 2), dynamic_shapes=_dynamic(exported))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _export_onnx(exported: ExportedModel, trained: TrainedModel) -> bytes:
    with torch.no_grad(), warnings.catch_warnings():
        # the inputs share their batch size, and so the name of that axis
        warnings.filterwarnings("ignore", "# The axis name: batch will not be used")
        program = torch.onnx.export(
            exported,
            _examples(exported, trained, 2),
            input_names=list(exported.inputs),
            output_names=exported.outputs,
            dynamic_shapes=_dynamic(exported),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content
