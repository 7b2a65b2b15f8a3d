"""Decoding and encoding of a clip: mp4 -> resized frames -> JPEG files of frames and flow."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import NamedTuple, Union

import av
import cv2
import numpy as np

from tune_ego import storage
from tune_ego.dataset import flow
from tune_ego.dataset.decoder_log import DecoderLog
from tune_ego.dataset.foreign_files import HEAD, describe_foreign_file
from tune_ego.dataset.frame_times import Placement, place_frames
from tune_ego.dataset.gaze import FPS
from tune_ego.dataset.orientation import Orientation, frame_orientation
from tune_ego.errors import UserError

Source = Union[str, bytes]
"""A video: its path or URI, or the content of its file."""
JPEG_QUALITY = 90
READER_VERSION = "3"
"""Version of the reading of videos. Shards of another version are written again."""
# FFmpeg's numbers, including the number for "unspecified", which FFmpeg treats in the same way.
_BT_601 = (2, 5, 6)
_LIMITED = (0, 1)


class EncodedClip(NamedTuple):
    """Images of a clip; both lists have a JPEG file for each frame."""

    rgb: list[bytes]
    """Colour images."""
    flow: list[bytes]
    """Grey images: `flow.quantise` of the motion to the next frame. The last frame repeats the image before."""


class Remark(NamedTuple):
    """Irregularity of a video that is nevertheless used."""

    stage: str
    """`damage`, `time` or `rotation` (`shards.Problem`)."""
    reason: str


class VideoFacts(NamedTuple):
    """Facts from a video's index, packets and first frame, without decoding the others."""

    placement: Placement
    shown: int
    """Displayed frames. An mp4 that was cut without re-encoding holds further frames, which only the decoder needs."""
    order: dict[int, int]
    """Presentation time, in the stream's unit -> position among the displayed frames. Empty where times are absent, or
    are not those of the frames."""
    size: tuple[int, int]
    """(width, height) of the displayed image, pixels."""
    bytes: int
    """Size of the displayed frames' packets."""
    orientation: Orientation
    remarks: list[Remark]

    @property
    def frames(self) -> int:
        """Number of session frames."""
        return len(self.placement.sources)


def encode_clip(
    uri: str, image_size: tuple[int, int], method: flow.FlowMethod, named: int | None = None, *, keep_damaged: bool
) -> tuple[EncodedClip, list[Remark]]:
    """Decode a video, resize it to `image_size` (width, height), compute its flow and encode both.

    `named` is the number of session frames in the clip's name. Raises `UserError` for a video that is not whole: no
    part of such a video is used, unless `keep_damaged`: then a remark says what the decoder has reported.
    """
    source = uri if storage.is_local(uri) else storage.read_bytes(uri)
    facts = probe(source, named, keep_damaged=keep_damaged)
    damage: list[str] | None = [] if keep_damaged else None
    encoded = encode_frames(decode(source, image_size, facts, damage), method)
    remarks = list(facts.remarks)
    if damage and not any(remark.stage == "damage" for remark in remarks):
        remarks.append(Remark("damage", damage[0]))
    return encoded, remarks


def encode_frames(frames: Iterable[np.ndarray], method: flow.FlowMethod) -> EncodedClip:
    """Encode consecutive BGR frames of one clip with their flow. Raises `UserError` where there are no frames."""
    cv2.setNumThreads(1)  # the job runs a task for each core
    encoded = EncodedClip([], [])
    for rgb, motion in encode_each(frames, method):
        encoded.rgb.append(rgb)
        encoded.flow.append(motion)
    return encoded


def encode_each(frames: Iterable[np.ndarray], method: flow.FlowMethod) -> Iterator[tuple[bytes, bytes]]:
    """Yield the JPEG files of each frame and of its flow, as `encode_frames` returns them.

    Up to `method.batch` frames are held. Raises `UserError` where there are no frames.
    """
    images: list[bytes] = []
    pending: list[np.ndarray] = []  # preprocessed frames without flow yet
    motion = b""
    for frame in frames:
        images.append(_jpeg(frame))
        pending.append(method.preprocess(frame))
        if len(pending) > method.batch:
            for motion in _encode_flow(pending, method):
                yield images.pop(0), motion
    if len(pending) > 1:
        for motion in _encode_flow(pending, method):
            yield images.pop(0), motion
    if not pending:
        raise UserError("the video holds no frame")
    still = np.zeros((*pending[-1].shape[:2], 2), np.float32)  # a single frame has no motion
    yield images[0], motion or _jpeg(flow.quantise(still))


def _encode_flow(pending: list[np.ndarray], method: flow.FlowMethod) -> list[bytes]:
    """Encode the flow between preprocessed frames, and remove all but the last frame from the list."""
    files = [_jpeg(flow.quantise(field)) for field in method.fields(pending)]
    del pending[:-1]
    return files


def decode(
    source: Source, image_size: tuple[int, int], facts: VideoFacts | None = None, damage: list[str] | None = None
) -> Iterator[np.ndarray]:
    """Yield the session frames of a clip: turned upright, resized, BGR, uint8 [H, W, 3].

    Args:
        source: A video.
        image_size: (width, height), pixels.
        facts: The result of `probe`, which is called without it.
        damage: A list for the decoder's reports about damaged frames. Without it the first report is an error.

    Raises:
        UserError: The video is damaged or truncated.
    """
    facts = probe(source) if facts is None else facts
    sources, count = facts.placement.sources, 0
    last = -1  # position of the latest frame so far, among those that are displayed
    with _open(source) as container:
        for frame in decoded_frames(container, damage):
            count += 1
            # Without a list for damage every frame has to be there, so that their count is their position.
            position = last + 1 if damage is None else facts.order.get(frame.pts, last + 1)
            if position > last + 1 and damage is not None:
                damage.append(f"{position - last - 1} frames before frame {position} cannot be decoded")
            # Session frames of displayed frames that were lost get the next one.
            first, end = np.searchsorted(sources, [last + 1, position + 1])
            if first < end:
                image = resize(facts.orientation.apply(to_bgr(frame)), image_size)
                yield from [image] * int(end - first)
            last = max(last, position)
    if count < facts.shown:
        report = f"breaks off after {count} of {facts.shown} frames"
        if damage is None:
            raise UserError(report)
        damage.append(report)


def decoded_frames(container: av.container.InputContainer, damage: list[str] | None) -> Iterator[av.VideoFrame]:
    """Yield the frames of the video stream. Reports about damage are collected, or without a list raise `UserError`."""
    count, packet = 0, None
    packets = container.demux(video_stream(container))
    while True:
        with DecoderLog() as log:
            try:
                packet = next(packets, None)
                frames = [] if packet is None else packet.decode()
                fault = log.damage
            except (av.error.FFmpegError, OSError) as error:
                frames, fault = [], str(error)
                if damage is None:
                    raise UserError(f"frame {count} cannot be decoded ({error})") from error
        if any(frame.is_corrupt for frame in frames):
            fault = fault or "marked as corrupt"
        if fault:
            report = f"damaged near frame {count} ({fault})"
            if damage is None:
                raise UserError(report)
            damage.append(report)
        if packet is None:
            return
        yield from frames
        count += len(frames)


def probe(source: Source, named: int | None = None, *, keep_damaged: bool = False) -> VideoFacts:
    """Read a whole file and decode its first frame.

    `named` is the number of session frames in the clip's name. Raises `UserError` for a file that is no video, is
    damaged or is truncated; with `keep_damaged` damage that FFmpeg can work around becomes a remark.
    """
    with DecoderLog() as log, _open(source) as container:
        log.ignored = {stream.codec_context.name for stream in container.streams.audio}
        stream = video_stream(container)
        declared = stream.frames  # 0 where the index has no number
        rate = stream.guessed_rate or stream.average_rate  # of raw streams; their average rate is FFmpeg's default
        reorders = bool(stream.codec_context.has_b_frames)
        packets = _read_packets(container)
    whole = [packet for packet in packets if not packet.is_corrupt]
    if len(whole) < declared:
        # FFmpeg skips packets that an edit list leaves out; count these packets, too.
        with _open(source, {"ignore_editlist": "1"}) as container:
            count = sum(not packet.is_corrupt for packet in _read_packets(container))
        if count < declared:
            raise UserError(f"breaks off after {count} of {declared} frames")
    damage = f"damaged ({log.damage})" if log.damage else ""
    if len(whole) < len(packets):
        damage = damage or f"damaged: {len(packets) - len(whole)} of {len(packets)} packets are marked as corrupt"
    if damage and not keep_damaged:
        raise UserError(damage)
    shown = [packet for packet in packets if not packet.is_discard]
    times, order = _presentation_times(shown, rate, reorders=reorders)
    size, orientation, turn = _look_at_first_frame(source, [] if keep_damaged else None) if shown else _NO_FRAME
    placement = place_frames(times, named, reorders=reorders)
    reasons = {"damage": damage, "time": placement.remark, "rotation": turn}
    remarks = [Remark(stage, reason) for stage, reason in reasons.items() if reason]
    return VideoFacts(placement, len(shown), order, size, sum(packet.size for packet in shown), orientation, remarks)


_NO_FRAME = ((0, 0), Orientation(), "")


def _presentation_times(
    packets: list[av.Packet], rate: Fraction | None, *, reorders: bool
) -> tuple[np.ndarray, dict[int, int]]:
    """Return the packets' presentation times in seconds, ascending, and the position of each in the stream's unit.

    Raw streams have no times: their rate decides. Streams with B-frames from containers such as AVI have the times at
    which packets are decoded: these are as far apart, but are not those of the frames, so no positions are returned.
    """
    if any(packet.pts is None for packet in packets):
        return np.arange(len(packets)) / float(rate or FPS), {}
    ordered = sorted(packets, key=lambda packet: packet.pts)
    if reorders and ordered == packets and len(packets) > 2:
        return np.array([float(packet.pts * packet.time_base) for packet in ordered]), {}
    order = {packet.pts: position for position, packet in enumerate(ordered)}
    return np.array([float(packet.pts * packet.time_base) for packet in ordered]), order


def _look_at_first_frame(source: Source, damage: list[str] | None) -> tuple[tuple[int, int], Orientation, str]:
    """Return ((width, height) of the displayed image, its orientation, the turn in words)."""
    with _open(source) as container:
        frame = next(decoded_frames(container, damage), None)
    if frame is None:
        raise UserError("the video holds no frame")
    orientation, turn = frame_orientation(frame)
    size = (frame.height, frame.width) if orientation.transposed else (frame.width, frame.height)
    return size, orientation, turn


def _read_packets(container: av.container.InputContainer) -> list[av.Packet]:
    """Return the packets of the video stream."""
    try:
        return [packet for packet in container.demux(video_stream(container)) if packet.size]
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"cannot be read ({error})") from error


def check_opens(uri: str) -> None:
    """Raise `UserError` for a file that is no video. Reads little of the file."""
    _open(uri).close()


def _open(source: Source, options: dict[str, str] | None = None) -> av.container.InputContainer:
    try:
        # A clip is about 2 MB. From an object store it is read in one request, instead of a request for each seek.
        if isinstance(source, str) and not storage.is_local(source):
            source = storage.read_bytes(source)
        container = av.open(io.BytesIO(source) if isinstance(source, bytes) else source, options=options)
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(_describe_unreadable(source) or f"cannot be opened ({error})") from error
    try:
        video_stream(container).codec_context.thread_count = 1  # `DecoderLog` reads the log of this thread
    except UserError:
        container.close()
        raise
    return container


def video_stream(container: av.container.InputContainer) -> av.video.VideoStream:
    """Return the first video stream that is no attached picture, such as a thumbnail. Raises `UserError`."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    raise UserError("the file holds no video stream")


def _describe_unreadable(source: Source) -> str:
    try:
        head = source if isinstance(source, bytes) else storage.read_bytes(source, HEAD)
    except (OSError, UserError):
        return ""
    foreign = describe_foreign_file(head)
    return foreign and f"no video but {foreign}"


def to_bgr(frame: av.VideoFrame) -> np.ndarray:
    """Convert a frame to BGR, uint8 [H, W, 3].

    OpenCV converts the format of nearly all cameras in half the time of FFmpeg. FFmpeg converts all others.
    """
    even = frame.width % 2 == frame.height % 2 == 0
    if even and frame.format.name == "yuv420p" and frame.colorspace in _BT_601 and frame.color_range in _LIMITED:
        return cv2.cvtColor(frame.to_ndarray(), cv2.COLOR_YUV2BGR_I420)
    return frame.to_ndarray(format="bgr24")


def resize(image: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    if image.shape[1::-1] == image_size:
        return image
    shrinks = image.shape[1] >= image_size[0]
    return cv2.resize(image, image_size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _jpeg(image: np.ndarray) -> bytes:
    encoded, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    assert encoded
    return data.tobytes()
