"""The commands `predict` and `package`. Imports are inside the functions so that `--help` prints at once."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from tune_ego.errors import UserError
from tune_ego.options import Crops, Flips

_Model = Annotated[
    str, typer.Argument(help="A run, a checkpoint's folder or file, final weights, or a folder that `package` wrote.")
]
_Videos = Annotated[
    Optional[list[str]],
    typer.Argument(help="Video files, folders of them, or URIs; - reads a stream from standard input."),
]
_Camera = Annotated[Optional[int], typer.Option("--camera", min=0, help="Number of a camera to watch.")]
_Out = Annotated[
    Optional[str], typer.Option("--out", help="Folder or URI for the files; by default they go beside each video.")
]
_Stride = Annotated[int, typer.Option(help="Frames (of 24 a second) between two windows, 1 to 16.")]
_Threshold = Annotated[float, typer.Option(help="Lowest class score of an action; below it is background.")]
_Smooth = Annotated[float, typer.Option(help="Standard deviation of the smoothing of scores in time, seconds.")]
_Merge = Annotated[float, typer.Option(help="Longest gap between segments of a class that are merged, seconds.")]
_Shortest = Annotated[float, typer.Option(help="Shortest segment, seconds.")]
_Nms = Annotated[float, typer.Option("--nms", help="Largest overlap of two segments, as a share of the shorter one.")]
_Overlay = Annotated[bool, typer.Option("--overlay", help="Write a video with captions and attention, too.")]
_Truth = Annotated[
    Optional[list[str]],
    typer.Option(
        "--truth",
        help="True actions, for scores of the detection: EGTEA's split files, or a CSV file with the columns video, "
        "start, end (seconds) and action; repeatable.",
    ),
]
_FlowWeights = Annotated[
    Optional[str], typer.Option("--flow-weights", help="State dict of RAFT, for models trained with its flow.")
]


def predict(
    model: _Model,
    videos: _Videos = None,
    camera: _Camera = None,
    out: _Out = None,
    stride: _Stride = 8,
    crops: Crops = 1,
    flips: Flips = False,
    threshold: _Threshold = 0.15,
    smooth: _Smooth = 0.25,
    merge: _Merge = 0.5,
    shortest: _Shortest = 0.5,
    nms: _Nms = 0.3,
    overlay: _Overlay = False,
    truth: _Truth = None,
    flow_weights: _FlowWeights = None,
) -> None:
    """Detect actions in videos of any length, rate, size and format.

    Reads a trained model and videos. Writes for each VIDEO: VIDEO.actions.json and .csv with the detected actions,
    VIDEO.windows.parquet with the class scores of each window, and VIDEO.html, a page to look at. Uses a GPU where
    there is one. `tune-ego bench predict` measures the speed of this machine.

    Of a stream (- or --camera) it prints a line of JSON for each window instead: action, scores, and the delay. Where
    the model is slower than the stream, windows are skipped and counted.
    """
    if bool(videos) == (camera is not None):
        raise UserError("predict needs videos, - or --camera")
    from tune_ego.prediction.predict import PredictionSettings, WindowSettings
    from tune_ego.prediction.segments import SegmentSettings
    from tune_ego.prediction.write import predict_files

    detection = SegmentSettings(threshold, smooth, merge, shortest, nms)
    settings = PredictionSettings(WindowSettings(stride, crops, flips), detection, flow_weights)
    if videos and videos != ["-"]:
        predict_files(model, videos, out, settings, truth or [], overlay=overlay)
        return
    if out is not None or overlay or truth:
        raise UserError("--out, --overlay and --truth are for files, not for a stream")
    if detection != SegmentSettings():
        raise UserError("a stream gives the scores of windows; the options of the detection are for files")
    from tune_ego.prediction.live import predict_live
    from tune_ego.prediction.trained_model import load_model

    predict_live(load_model(model), "-" if camera is None else camera, settings, lambda line: print(line, flush=True))


def package(
    model: _Model,
    out: Annotated[str, typer.Argument(help="Folder or URI to write; must be empty or absent.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="Write model.onnx, too; needs the extra `onnx`.")] = False,
) -> None:
    """Write a model as a folder that runs without tune_ego, Ray or shards.

    Writes the weights (safetensors), the configuration, the model of torch.export, a model card, and an example that
    needs torch and OpenCV only. Test the run with `evaluate` before: the card then has its accuracies.
    """
    from tune_ego.prediction.package import package as run

    run(model, out, onnx=onnx)
