"""Optical flow between consecutive frames, and its 8-bit form in the shards.

N pairs of frames, H, W pixels; 2 is x, y. Torch is imported inside the methods that use it: DIS and
Farneback do not need it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np

from tune_ego import storage
from tune_ego.errors import UserError

BOUND = 20.0
"""Flow is clipped to [-BOUND, BOUND] pixels (Lu, Liao, Li, ICCV Workshops 2019)."""
FlowName = Literal["dis", "tvl1", "farneback", "raft"]
RAFT_SMALLEST_SIDE = 128
"""Pixels. RAFT's feature maps have an eighth of the image's side; its correlation pyramid halves them three times."""


class FlowMethod(NamedTuple):
    """Optical flow method, in two steps for each frame."""

    preprocess: Callable[[np.ndarray], np.ndarray]
    """BGR frame, uint8 [H, W, 3] -> input of `fields`: a grey or RGB image."""
    fields: Callable[[Sequence[np.ndarray]], np.ndarray]
    """N + 1 consecutive preprocessed frames -> [N, H, W, 2] float32: motion to the next frame, pixels."""
    batch: int
    """Largest N to pass at once."""


@lru_cache(maxsize=1)
def flow_method(name: FlowName, weights: str | None = None) -> FlowMethod:
    """Return the flow method of this name, on a GPU where the process has one and the method can use it.

    Args:
        name: `dis`, `farneback`, `tvl1` or `raft`.
        weights: Path or URI of RAFT's state dict (torchvision's `raft_large` or `raft_small`); for `raft` only.

    Raises:
        ValueError: There is no method of this name.
    """
    match name:
        case "dis":
            return _dis()
        case "farneback":
            return FlowMethod(_grey, _each_pair(_farneback), 1)
        case "tvl1":
            return _tv_l1()
        case "raft":
            return _raft(weights)
        case _:
            raise ValueError(f"no flow method {name!r}")


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit OpenCV, and torch where it is imported, to one thread each in this process."""
    torch: Any = sys.modules.get("torch")
    before = cv2.getNumThreads(), torch and torch.get_num_threads()
    cv2.setNumThreads(1)
    if torch:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before[0])
        if torch:
            torch.set_num_threads(before[1])


def uses_gpu(name: FlowName) -> bool:
    """Return whether the method runs on a GPU where the process has one."""
    match name:
        case "tvl1" | "raft":
            return True
        case "dis" | "farneback":
            return False
        case unknown:
            raise ValueError(f"no flow method {unknown!r}")


def runs_on_gpu(name: FlowName) -> bool:
    """Return whether the method runs on a GPU in this process."""
    if not uses_gpu(name):
        return False
    import torch

    return torch.cuda.is_available()


def _grey(frame: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)


def _each_pair(flow_between: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    """Return a `FlowMethod.fields` from a function that computes the flow [H, W, 2] of one pair."""

    def fields(frames: Sequence[np.ndarray]) -> np.ndarray:
        fields_HW2 = [flow_between(before, after) for before, after in pairwise(frames)]
        return fields_HW2[0][None] if len(fields_HW2) == 1 else np.stack(fields_HW2)

    return fields


def _dis() -> FlowMethod:
    """Return dense inverse search (Kroeger et al., ECCV 2016)."""
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    # Never pass an initial field: OpenCV would use the same field in all later calls, and results would depend on the
    # order of the clips.
    return FlowMethod(_grey, _each_pair(lambda before, after: dis.calc(before, after, None)), 1)


def _farneback(before_HW: np.ndarray, after_HW: np.ndarray) -> np.ndarray:
    """Compute flow by polynomial expansion (Farneback, SCIA 2003), with the constants of OpenCV's own example."""
    return cv2.calcOpticalFlowFarneback(before_HW, after_HW, None, 0.5, 3, 15, 3, 5, 1.2, 0)


def _tv_l1() -> FlowMethod:
    """Return TV-L1 (see `dataset.tv_l1`)."""
    import torch

    from tune_ego.dataset.tv_l1 import tv_l1

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def fields(frames: Sequence[np.ndarray]) -> np.ndarray:
        grey = torch.from_numpy(np.stack(frames)).to(device)
        return tv_l1(grey[:-1], grey[1:]).cpu().numpy()

    # On a CPU one pair fits into its caches and four pairs do not.
    return FlowMethod(_grey, fields, 64 if device.type == "cuda" else 1)


def _raft(weights: str | None) -> FlowMethod:
    """Return RAFT (Teed, Deng, ECCV 2020), torchvision's implementation with its 12 updates."""
    import torch
    import torch.nn.functional as F

    assert weights is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_raft(weights).to(device)

    @torch.inference_mode()
    def fields(frames: Sequence[np.ndarray]) -> np.ndarray:
        images = torch.from_numpy(np.stack(frames)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        height, width = images.shape[2:]
        images = F.pad(images, (0, -width % 8, 0, -height % 8), mode="replicate")
        field_N2HW = model(images[:-1], images[1:])[-1][..., :height, :width]
        return field_N2HW.permute(0, 2, 3, 1).cpu().numpy()

    return FlowMethod(lambda frame: cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), fields, 8 if device.type == "cuda" else 1)


def load_raft(weights: str) -> Any:
    """Load torchvision's RAFT from a state dict. Raises `UserError` for a file that is not such a state dict."""
    import io

    import torch
    from torchvision.models.optical_flow import raft_large, raft_small

    try:
        state = torch.load(io.BytesIO(storage.read_bytes(weights)), map_location="cpu", weights_only=True)
    except Exception as error:  # torch passes on any exception of its unpickler and zip reader
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{weights}: cannot be read as weights ({reason})") from error
    for build in (raft_large, raft_small):
        model = build(weights=None).eval()
        if isinstance(state, dict) and {k: getattr(v, "shape", None) for k, v in state.items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }:
            model.load_state_dict(state)
            return model
    raise UserError(f"{weights}: not a state dict of torchvision's raft_large or raft_small")


def quantise(field_HW2: np.ndarray) -> np.ndarray:
    """Convert flow [H, W, 2] in pixels to levels [2H, W] uint8, the x component above the y component.

    Linear from [-20, 20] to [0, 255]; larger motion is clipped.
    """
    levels = np.clip(field_HW2.transpose(2, 0, 1).reshape(-1, field_HW2.shape[1]), -BOUND, BOUND)
    levels += BOUND
    levels *= 255 / (2 * BOUND)
    return np.rint(levels, out=levels).astype(np.uint8)


def split_components(grey: np.ndarray) -> np.ndarray:
    """View stored levels [2H, W] uint8 as [2, H, W], x and y, without a copy."""
    return grey.reshape(2, -1, grey.shape[1])


def dequantise(levels: np.ndarray) -> np.ndarray:
    """Convert stored levels, uint8, to pixels, float32 of the same shape."""
    return levels.astype(np.float32) * (2 * BOUND / 255) - BOUND
