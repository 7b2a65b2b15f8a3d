"""Model card of a package, in the form of the Hugging Face Hub: YAML metadata, then Markdown."""

from __future__ import annotations

from typing import Any

import yaml

from tune_ego.console import percent

_STREAMS = {"rgb": "frames", "flow": "optical flow", "fused": "both, fused"}


def model_card(config: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    """Return the card of a package.

    Args:
        config: Content of its `config.json`.
        evaluation: Content of the run's `evaluation.json`; None where the model was not tested.
    """
    metadata: dict[str, Any] = {
        "library_name": "pytorch",
        "pipeline_tag": "video-classification",
        "license": "other",
        "license_name": "see-card",
        "tags": ["action-recognition", "egocentric-vision", "gaze", config["config"]["model"]["backbone"]],
    }
    if evaluation is not None:
        metadata["model-index"] = [_model_index(evaluation)]
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n{_CARD.format(**_texts(config, evaluation))}"


_CARD = """# Action recognition in first-person video

A window of {frames} frames goes in, {spacing} of a video of {rate} frames a second. Scores of {classes} actions
come out{maps}.
Streams: {streams}. Each is {backbone} with {attention}. It was made with tune_ego {version}.

## Use

```bash
pip install torch opencv-python
python example.py VIDEO
```

- Input: frames of {image_size} pixels, of which the model sees the central {side} x {side}.
- `model.pt2` takes {inputs} as uint8 and returns {outputs}.
  `rgb` is [B, {frames}, {side}, {side}, 3], RGB. `flow` is [B, {frames}, 2, {side}, {side}]: x, y, with
  -{pixels:g} to {pixels:g} pixels as 0 to 255.
- Optical flow: {flow}, the method of the training. Another method gives other scores.
- `model.safetensors` has the weights. `config.json` has the class names and all settings.
- With tune_ego: `tune-ego predict FOLDER VIDEO` detects actions in a video of any length.

## Training

- Data: {classes} actions, split {split}; {iterations} iterations of {batch} windows.
- Recipe: {recipe}.
- Starting weights: {weights}.

## Accuracy

{accuracies}

## Limits

- The model knows the actions of its training set only, and gives one of them the highest score whatever it sees.
- It has seen trimmed clips of few scenes and cameras. Other cameras, places and people may lower its accuracy.
{limit}
## Licences

The code is under Apache 2.0. The weights are derived from the training data and the starting weights, whose licences
apply to them. If the data is EGTEA Gaze+: it is for research; ask its authors about other uses.
"""


def _texts(config: dict[str, Any], evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """Return the values of the fields in `_CARD`."""
    trained = config["config"]
    model, optimizer = trained["model"], trained["optimizer"]
    depth = model["stam_depth"]
    gaze = f"gaze loss of weight {trained['loss']['gaze_weight']:g}" if depth else "no gaze loss"
    return {
        "frames": config["window_frames"],
        "rate": config["frames_per_second"],
        "classes": len(config["classes"]),
        "streams": " and ".join(_STREAMS[name] for name in config["inputs"]),
        "spacing": "every frame" if config["frame_step"] == 1 else f"one in {config['frame_step']} frames",
        "backbone": f"an I3D of width {model['width']}" if model["backbone"] == "i3d" else model["backbone"],
        "maps": ", and maps of where the model attends" if depth else "",
        "limit": "- Attention maps show where the model attends. They are no measurement of gaze.\n" if depth else "",
        "attention": f"a STAM of depth {depth} ({model['stam_block']})" if depth else "no attention",
        "version": config["tune_ego"],
        "image_size": " x ".join(map(str, config["image_size"])),
        "side": config["crop"],
        "inputs": ", ".join(f"`{name}`" for name in config["inputs"]),
        "outputs": ", ".join(f"`{name}`" for name in config["outputs"]),
        "pixels": config["flow_pixels"],
        "flow": config["flow_method"],
        "split": trained["data"]["split"],
        "iterations": config["iteration"],
        "batch": trained["train"]["batch_size"],
        "recipe": f"{optimizer['name']}, learning rate {optimizer['lr']:g}{_trunk_rate(optimizer)}; {gaze}; "
        f"dropout {model['dropout']:g}; {model['activation']}",
        "weights": _starting_weights(trained),
        "accuracies": _accuracies(evaluation),
    }


def _trunk_rate(optimizer: dict[str, Any]) -> str:
    return f" ({optimizer['trunk_lr']:g} for the trunk)" if optimizer["trunk_lr"] is not None else ""


def _starting_weights(trained: dict[str, Any]) -> str:
    sources = {name: uri for name, uri in (trained.get("init_from") or {}).items() if uri}
    return ", ".join(f"{name} from {uri}" for name, uri in sources.items()) or "none, random"


def _accuracies(evaluation: dict[str, Any] | None) -> str:
    if evaluation is None:
        return "Not tested: run `tune-ego evaluate` on the run, and package it again."
    rows = [
        f"| {_STREAMS[name]} | {percent(evaluation[name]['micro_accuracy'])} | "
        f"{percent(evaluation[name]['mean_class_accuracy'])} |"
        for name in _STREAMS
        if name in evaluation
    ]
    table = "\n".join(["| stream | accuracy | mean class accuracy |", "|---|---|---|", *rows])
    clips, split, chance = evaluation["clips"], evaluation["split"], percent(evaluation["chance"])
    seen = evaluation.get("clips_trained_on", 0)
    warning = f" The model was trained on {seen:,} of them: these figures are too good." if seen else ""
    return f"{clips:,} test clips of split {split}; chance is {chance}.{warning}\n\n{table}"


def _model_index(evaluation: dict[str, Any]) -> dict[str, Any]:
    name = "fused" if "fused" in evaluation else next(name for name in _STREAMS if name in evaluation)
    metrics = [
        {"type": kind, "name": kind.replace("_", " "), "value": round(evaluation[name][kind], 4)}
        for kind in ("micro_accuracy", "mean_class_accuracy")
    ]
    task = {"type": "video-classification", "name": "Action recognition"}
    dataset = {"type": "custom", "name": f"test clips of split {evaluation['split']}"}
    return {"name": "tune_ego", "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}
