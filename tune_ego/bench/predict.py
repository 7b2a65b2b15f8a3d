"""`bench predict`: the whole of `predict` beside its parts, the model's forward pass and the flow, measured apart."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import torch

from tune_ego.bench.record import Benchmark, time_in_turn
from tune_ego.config import WINDOW_FRAMES, Config
from tune_ego.config_io import override_config
from tune_ego.console import console
from tune_ego.dataset.flow import flow_method
from tune_ego.dataset.frame_stream import FrameStream
from tune_ego.dataset.gaze import FPS
from tune_ego.dataset.synthetic import synthesize
from tune_ego.feed.batches import blank_batch
from tune_ego.feed.sampling import EVALUATION_STEP
from tune_ego.model import TwoStream
from tune_ego.prediction.predict import PredictionSettings, predict_video
from tune_ego.prediction.trained_model import TrainedModel
from tune_ego.training.checkpoint import Origin
from tune_ego.training.hardware import autocast_dtype

_SIZE = (320, 240)
_BATCH = 8
_WINDOWS = 2 * _BATCH


def bench_predict(width: float = 1.0, repeats: int = 3) -> Benchmark:
    """Measure `predict` on a video of 16 windows of 320 x 240, both streams, random weights.

    Args:
        width: Width of the model, `model.width`.
        repeats: Timed calls of each part.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = override_config(Config(), {"model.width": width}, "bench")
    streams = TwoStream(config.stream_names, 106, config.model, dict.fromkeys(config.stream_names, 0))
    origin = Origin([f"action {number}" for number in range(106)], _SIZE, "dis")
    model = TrainedModel(config, origin, streams, 0).to(device)
    frames = WINDOW_FRAMES + EVALUATION_STEP * (_WINDOWS - 1)
    benchmark = Benchmark("predict", {"windows": _WINDOWS, "frames": frames, "images": "320x240", "width": width})
    with tempfile.TemporaryDirectory(prefix="tune-ego-bench-") as name:
        video = _write_video(Path(name), frames)
        seconds = time_in_turn(
            repeats,
            predict=lambda: predict_video(model, video, PredictionSettings()),
            forward=_forward(model, device),
            flow=_flow(video),
        )
    whole = benchmark.add("predict", "windows/s", [_WINDOWS / value for value in seconds["predict"]])
    forward = benchmark.add("forward pass", "windows/s", [_WINDOWS / value for value in seconds["forward"]])
    benchmark.add("decoding and flow", "frames/s", [frames / value for value in seconds["flow"]])
    apart = [_WINDOWS / (one + other) for one, other in zip(seconds["forward"], seconds["flow"])]
    parts = benchmark.add("forward pass, then decoding and flow", "windows/s", apart)
    benchmark.compare("predict / its parts one after another", whole, parts)
    benchmark.compare("predict / forward pass", whole, forward)
    return benchmark


def _write_video(folder: Path, frames: int) -> str:
    """Write a synthetic clip, forward and backward in turn, until it has so many frames; return its path."""
    with console.capture():
        synthesize(folder / "egtea", verbs=1, nouns=1, clips=5, seconds=1, size=_SIZE)
    clip = next((folder / "egtea" / "cropped_clips").rglob("*.mp4"))
    with FrameStream(str(clip)) as stream:
        images = [frame.image for frame in stream.frames(_SIZE)]
    path = str(folder / "video.mp4")
    with av.open(path, "w") as container:
        track = container.add_stream("libx264", rate=FPS, options={"crf": "18"})
        (track.width, track.height), track.pix_fmt = _SIZE, "yuv420p"
        for image in itertools.islice(itertools.cycle([*images, *reversed(images)]), frames):
            container.mux(track.encode(av.VideoFrame.from_ndarray(image, format="bgr24")))
        container.mux(track.encode(None))
    return path


def _forward(model: TrainedModel, device: torch.device) -> Callable[[], None]:
    batch = blank_batch(_BATCH, model.config.data.crop, model.streams, device)
    dtype = autocast_dtype(model.config.train.precision, device) if device.type == "cuda" else None

    def run() -> None:
        for _ in range(_WINDOWS // _BATCH):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                model(batch.rgb_BTHWC, batch.flow_BT2HW)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def _flow(video: str) -> Callable[[], None]:
    method = flow_method("dis")

    def pairs() -> Iterator[None]:
        before = None
        with FrameStream(video) as stream:
            for frame in stream.frames(_SIZE):
                after = method.preprocess(frame.image)
                if before is not None:
                    method.fields([before, after])
                    yield
                before = after

    return lambda: sum(1 for _ in pairs())  # type: ignore[return-value]
