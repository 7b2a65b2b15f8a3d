"""Decoding and encoding of a clip: mp4 -> resized frames -> JPEG files of frames and flow."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import av
import cv2
import numpy as np

from tune_ego import storage
from tune_ego.dataset import flow
from tune_ego.errors import UserError

JPEG_QUALITY = 90
# FFmpeg's numbers, including the number for "unspecified", which FFmpeg treats in the same way.
_BT_601 = (2, 5, 6)
_LIMITED = (0, 1)


class EncodedClip(NamedTuple):
    """Images of a clip; both lists have a JPEG file for each frame."""

    rgb: list[bytes]
    """Colour images."""
    flow: list[bytes]
    """Grey images: `flow.quantise` of the motion to the next frame. The last frame repeats the image before."""


class VideoFacts(NamedTuple):
    """Facts from a video's index and packets, without decoding."""

    frames: int
    """Displayed frames. An mp4 that was cut without re-encoding holds further frames, which only the decoder needs."""
    size: tuple[int, int]
    """(width, height), pixels."""
    bytes: int
    """Size of the displayed frames' packets."""


def encode_clip(uri: str, image_size: tuple[int, int], method: flow.FlowMethod) -> EncodedClip:
    """Decode a video, resize it to `image_size` (width, height), compute its flow and encode both.

    Raises `UserError` for a video that is not whole: no part of such a video is used.
    """
    return encode_frames(decode(uri, image_size), method)


def encode_frames(frames: Iterable[np.ndarray], method: flow.FlowMethod) -> EncodedClip:
    """Encode consecutive BGR frames of one clip with their flow. Raises `UserError` where there are no frames."""
    cv2.setNumThreads(1)  # the job runs a task for each core
    encoded = EncodedClip([], [])
    pending: list[np.ndarray] = []  # preprocessed frames without flow yet

    def encode_pending_flow() -> None:
        if len(pending) > 1:
            encoded.flow.extend(_jpeg(flow.quantise(field)) for field in method.fields(pending))
            del pending[:-1]

    for frame in frames:
        encoded.rgb.append(_jpeg(frame))
        pending.append(method.preprocess(frame))
        if len(pending) > method.batch:
            encode_pending_flow()
    encode_pending_flow()
    if not pending:
        raise UserError("the video holds no frame")
    still = np.zeros((*pending[-1].shape[:2], 2), np.float32)  # a single frame has no motion
    encoded.flow.append(encoded.flow[-1] if encoded.flow else _jpeg(flow.quantise(still)))
    return encoded


def decode(uri: str, image_size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield resized BGR frames, uint8 [H, W, 3]. Raises `UserError` for a damaged frame or a truncated video."""
    with _open(uri) as container:
        declared, count = container.streams.video[0].frames, 0
        try:
            for frame in container.decode(video=0):
                if frame.is_corrupt:
                    raise UserError(f"frame {count} is damaged")
                yield _resize(_to_bgr(frame), image_size)
                count += 1
        except (av.error.FFmpegError, OSError) as error:
            raise UserError(f"frame {count} cannot be decoded ({error})") from error
    if count < declared and count < (shown := probe(uri).frames):
        raise UserError(f"breaks off after {count} of {shown} frames")


def probe(uri: str) -> VideoFacts:
    """Read a whole file without decoding it. Raises `UserError` for a file that is no video or is truncated."""
    with _open(uri) as container:
        stream = container.streams.video[0]
        declared, size = stream.frames, (stream.width, stream.height)  # 0 frames where the index has no number
        packets = _read_packets(container)
    if len(packets) < declared:
        # FFmpeg skips packets that an edit list leaves out; count these packets, too.
        with _open(uri, {"ignore_editlist": "1"}) as container:
            count = len(_read_packets(container))
        if count < declared:
            raise UserError(f"breaks off after {count} of {declared} frames")
    shown = [packet.size for packet in packets if not packet.is_discard]
    return VideoFacts(len(shown), size, sum(shown))


def _read_packets(container: av.container.InputContainer) -> list[av.Packet]:
    """Return the undamaged packets of the video stream."""
    try:
        return [packet for packet in container.demux(video=0) if packet.size and not packet.is_corrupt]
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"cannot be read ({error})") from error


def check_opens(uri: str) -> None:
    """Raise `UserError` for a file that is no video. Reads little of the file."""
    _open(uri).close()


def _open(uri: str, options: dict[str, str] | None = None) -> av.container.InputContainer:
    try:
        # A clip is about 2 MB. From an object store it is read in one request, instead of a request for each seek.
        container = av.open(uri if storage.is_local(uri) else io.BytesIO(storage.read_bytes(uri)), options=options)
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"cannot be opened ({error})") from error
    if not container.streams.video:
        container.close()
        raise UserError("the file holds no video stream")
    return container


def _to_bgr(frame: av.VideoFrame) -> np.ndarray:
    """Convert a frame to BGR, uint8 [H, W, 3].

    OpenCV converts the format of nearly all cameras in half the time of FFmpeg. FFmpeg converts all others.
    """
    even = frame.width % 2 == frame.height % 2 == 0
    if even and frame.format.name == "yuv420p" and frame.colorspace in _BT_601 and frame.color_range in _LIMITED:
        return cv2.cvtColor(frame.to_ndarray(), cv2.COLOR_YUV2BGR_I420)
    return frame.to_ndarray(format="bgr24")


def _resize(image: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    if image.shape[1::-1] == image_size:
        return image
    shrinks = image.shape[1] >= image_size[0]
    return cv2.resize(image, image_size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _jpeg(image: np.ndarray) -> bytes:
    encoded, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    assert encoded
    return data.tobytes()
