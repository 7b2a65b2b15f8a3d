"""A trained recogniser for inference: uint8 windows in, class scores and attention maps out.

B batch, T frames of a window, T' slices of an attention map, H, W pixels or cells, K classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Union

import numpy as np
import torch
from torch import Tensor, nn

from tune_ego.config import Config
from tune_ego.feed.batches import model_input
from tune_ego.feed.sampling import views
from tune_ego.model import TwoStream
from tune_ego.prediction.predict import PredictionSettings, Segments, predict_video
from tune_ego.results.checkpoint_files import find_checkpoint
from tune_ego.training.checkpoint import Origin, load_trained
from tune_ego.training.metrics import fuse

Images = Union[Tensor, np.ndarray]


class Prediction(NamedTuple):
    """Class scores and attention for a batch of windows."""

    scores: Tensor
    """Softmax scores [B, K], float32: fused over the streams where the model has two."""
    stream_scores: dict[str, Tensor]
    """Stream (`rgb`, `flow`) -> its softmax scores [B, K]."""
    attention: dict[str, Tensor]
    """Stream -> its attention map [B, T', H, W], float32, scaled as `model.attention_scale` says. Empty for models
    without an attention module."""


class TrainedModel(nn.Module):
    """A trained recogniser in evaluation mode: uint8 windows in, class scores and attention maps out."""

    def __init__(self, config: Config, origin: Origin, model: TwoStream, iteration: int) -> None:
        super().__init__()
        self.config = config
        """Configuration of the run that trained it."""
        self.classes = list(origin.actions)
        """Names of the K classes, in the order of the scores."""
        self.streams = config.stream_names
        """Streams that `forward` takes: `("rgb", "flow")`, `("rgb",)` or `("flow",)`."""
        self.image_size = origin.image_size
        """Width and height of the frames of the training shards, before the crop, pixels."""
        self.flow_method = origin.flow
        """Optical-flow method of the training shards, e.g. `dis`."""
        self.iteration = iteration
        """Iterations that it was trained for."""
        self.model = model
        self.eval()

    @torch.inference_mode()
    def forward(self, rgb: Tensor | None = None, flow: Tensor | None = None) -> Prediction:
        """Recognise the action in each window, in float32.

        Args:
            rgb: Frames, uint8 [B, T, H, W, 3], RGB; T is `data.window_frames`.
            flow: Flow from each frame to the next one, uint8 [B, T, 2, H, W], x before y: -20 to 20 pixels as 0 to
                255, as in the shards.

        Raises:
            ValueError: A stream is missing or not part of the model, or an input has another type or shape.
        """
        inputs = {"rgb": rgb, "flow": flow}
        for name, images in inputs.items():
            self._check(name, images)
        device = next(self.model.parameters()).device
        on_device = {name: None if images is None else images.to(device) for name, images in inputs.items()}
        outputs = self.model(model_input(on_device["rgb"], on_device["flow"]))
        stream_scores = {name: output.logits_BK.float().softmax(dim=1) for name, output in outputs.items()}
        attention = {
            name: output.attention_BTHW.float() for name, output in outputs.items() if output.attention_BTHW is not None
        }
        both = len(stream_scores) > 1
        scores = fuse(stream_scores, self.config.fusion_weight) if both else next(iter(stream_scores.values()))
        return Prediction(scores, stream_scores, attention)

    def predict(self, video: str | Path, settings: PredictionSettings | None = None) -> Segments:
        """Detect the actions in a video of any length.

        Args:
            video: Path or URI of a video of any format that FFmpeg reads.
            settings: Windows, crops and detection.

        Returns:
            The detected actions by start: a list, with `to_arrow()`.

        Raises:
            UserError: The file is no video, or a setting is out of range.
        """
        return predict_video(self, str(video), settings or PredictionSettings())

    def predict_windows(self, rgb: Images | None = None, flow: Images | None = None) -> Prediction:
        """Recognise the action in each window, from whole images: the model sees their centre crop.

        Args:
            rgb: Frames, uint8 [B, T, H, W, 3], RGB, as large as `image_size`.
            flow: Flow from each frame to the next one, uint8 [B, T, 2, H, W], as in `forward`.

        Raises:
            ValueError: A stream is missing or not part of the model, or an input has another type, shape or size.
        """
        width, height = self.image_size
        view, side = views(self.image_size, self.config.data.crop)[0], self.config.data.crop
        rows, columns = slice(view.top, view.top + side), slice(view.left, view.left + side)
        inputs: dict[str, Tensor | None] = {"rgb": None, "flow": None}
        for name, images in (("rgb", rgb), ("flow", flow)):
            if images is None:
                continue
            tensor = torch.as_tensor(images)
            size = tuple(tensor.shape[-3:-1] if name == "rgb" else tensor.shape[-2:])
            if size != (height, width):
                raise ValueError(
                    f"{name}: expected images of {width} x {height} pixels, found shape {list(tensor.shape)}"
                )
            inputs[name] = tensor[..., rows, columns, :] if name == "rgb" else tensor[..., rows, columns]
        prediction: Prediction = self(**inputs)
        return prediction

    def _check(self, name: str, images: Tensor | None) -> None:
        if (images is not None) != (name in self.streams):
            raise ValueError(
                f"this model takes {' and '.join(self.streams)}: {name} is {'not ' * (images is None)}given"
            )
        if images is None:
            return
        frames = self.config.data.window_frames
        channels = images.shape[-1] == 3 if name == "rgb" else images.dim() == 5 and images.shape[2] == 2
        if images.dtype != torch.uint8 or images.dim() != 5 or images.shape[1] != frames or not channels:
            expected = f"[B, {frames}, H, W, 3]" if name == "rgb" else f"[B, {frames}, 2, H, W]"
            raise ValueError(f"{name}: expected uint8 {expected}, found {images.dtype} {list(images.shape)}")


def load_model(source: str | Path, device: str | torch.device | None = None) -> TrainedModel:
    """Load a trained model for inference.

    Args:
        source: A run (its final weights, or its last checkpoint), a checkpoint's folder or file, `model.pt`, or a
            folder that `package` wrote; a path or URI.
        device: Device of the model; by default a GPU where there is one.

    Raises:
        UserError: The source holds no whole checkpoint of this package.
    """
    config, origin, model, iteration = load_trained(find_checkpoint(str(source)))
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return TrainedModel(config, origin, model, iteration).to(device)
