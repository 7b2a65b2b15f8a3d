"""Reading and encoding a clip's frames: mp4 -> resized frames -> JPEG files of frames and flow."""

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
# FFmpeg's numbers; with the one for "not said", which FFmpeg takes for the same.
_BT_601 = (2, 5, 6)
_LIMITED = (0, 1)


class EncodedClip(NamedTuple):
    rgb: list[bytes]
    """A JPEG file a frame."""
    flow: list[bytes]
    """A grey JPEG file a frame: `flow.quantise` of the motion to the next frame, the last one repeated."""


class VideoFacts(NamedTuple):
    """What a file's own tables and packets say; nothing was decoded."""

    frames: int
    """Those that are shown: an mp4 that was cut without encoding it anew holds others too, for the decoder alone."""
    size: tuple[int, int]
    bytes: int


def encode_clip(uri: str, image_size: tuple[int, int], method: flow.FlowMethod) -> EncodedClip:
    """Decode a video, resize it to `image_size` (width, height), compute its flow and encode both.

    Raises `UserError` where it is not whole: nothing of it is used then.
    """
    return encode_frames(decode(uri, image_size), method)


def encode_frames(frames: Iterable[np.ndarray], method: flow.FlowMethod) -> EncodedClip:
    """Consecutive BGR frames of one clip, encoded with their flow; raises `UserError` where there are none."""
    cv2.setNumThreads(1)  # the job runs a task per core
    encoded = EncodedClip([], [])
    pending: list[np.ndarray] = []  # what the method sees of frames whose flow is still to be computed

    def advance() -> None:
        if len(pending) > 1:
            encoded.flow.extend(_jpeg(flow.quantise(field)) for field in method.fields(pending))
            del pending[:-1]

    for frame in frames:
        encoded.rgb.append(_jpeg(frame))
        pending.append(method.view(frame))
        if len(pending) > method.batch:
            advance()
    advance()
    if not pending:
        raise UserError("the video holds no frame")
    still = np.zeros((*pending[-1].shape[:2], 2), np.float32)  # a single frame moves nowhere
    encoded.flow.append(encoded.flow[-1] if encoded.flow else _jpeg(flow.quantise(still)))
    return encoded


def decode(uri: str, image_size: tuple[int, int]) -> Iterator[np.ndarray]:
    """BGR frames, uint8 [H, W, 3], resized; raises `UserError` at a damaged one and where the video breaks off."""
    with _opened(uri) as container:
        declared, count = container.streams.video[0].frames, 0
        try:
            for frame in container.decode(video=0):
                if frame.is_corrupt:
                    raise UserError(f"frame {count} is damaged")
                yield _resized(_bgr(frame), image_size)
                count += 1
        except (av.error.FFmpegError, OSError) as error:
            raise UserError(f"frame {count} cannot be decoded ({error})") from error
    if count < declared and count < (shown := probe(uri).frames):
        raise UserError(f"breaks off after {count} of {shown} frames")


def probe(uri: str) -> VideoFacts:
    """Read a whole file without decoding it; raises `UserError` where it is no video or breaks off."""
    with _opened(uri) as container:
        stream = container.streams.video[0]
        declared, size = stream.frames, (stream.width, stream.height)  # 0 frames where its index does not say
        packets = _packets(container)
    if len(packets) < declared:
        # FFmpeg passes over packets that an edit list leaves out: count them all.
        with _opened(uri, {"ignore_editlist": "1"}) as container:
            count = len(_packets(container))
        if count < declared:
            raise UserError(f"breaks off after {count} of {declared} frames")
    shown = [packet.size for packet in packets if not packet.is_discard]
    return VideoFacts(len(shown), size, sum(shown))


def _packets(container: av.container.InputContainer) -> list[av.Packet]:
    """Those of the video that are whole."""
    try:
        return [packet for packet in container.demux(video=0) if packet.size and not packet.is_corrupt]
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"cannot be read ({error})") from error


def check_opens(uri: str) -> None:
    """Raise `UserError` where a file is no video; reads little of it."""
    _opened(uri).close()


def _opened(uri: str, options: dict[str, str] | None = None) -> av.container.InputContainer:
    try:
        # A clip is about 2 MB: from an object store in one request, not in one for each seek.
        container = av.open(uri if storage.is_local(uri) else io.BytesIO(storage.read_bytes(uri)), options=options)
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"cannot be opened ({error})") from error
    if not container.streams.video:
        container.close()
        raise UserError("the file holds no video stream")
    return container


def _bgr(frame: av.VideoFrame) -> np.ndarray:
    """[H, W, 3] uint8. What nearly all cameras write, OpenCV converts in half the time that FFmpeg takes."""
    even = frame.width % 2 == frame.height % 2 == 0
    if even and frame.format.name == "yuv420p" and frame.colorspace in _BT_601 and frame.color_range in _LIMITED:
        return cv2.cvtColor(frame.to_ndarray(), cv2.COLOR_YUV2BGR_I420)
    return frame.to_ndarray(format="bgr24")


def _resized(image: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    if image.shape[1::-1] == image_size:
        return image
    shrinks = image.shape[1] >= image_size[0]
    return cv2.resize(image, image_size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _jpeg(image: np.ndarray) -> bytes:
    done, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    assert done
    return data.tobytes()
