"""Videos whose frames are damaged, at other times than the session's clock, or stored turned."""

from __future__ import annotations

import io
import random
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import av.logging
import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.dataset.test_write_task import SESSION, annotated
from tune_ego.dataset import video
from tune_ego.dataset.decoder_log import DecoderLog
from tune_ego.dataset.flow import flow_method
from tune_ego.dataset.orientation import Orientation, matrix_orientation
from tune_ego.dataset.prepare import Settings, ShardTask, write_task
from tune_ego.dataset.shards import Problem
from tune_ego.dataset.video import Remark
from tune_ego.errors import UserError

VIDEOS = Path(__file__).parents[3] / "shared" / "video"
SIZE = (64, 48)


def scene(number: int, size: tuple[int, int] = (320, 240)) -> np.ndarray:
    """A texture that moves to the right with the number of the frame."""
    coarse = np.random.default_rng(0).uniform(0, 255, (16, 64, 3)).astype(np.float32)
    wide = np.clip(cv2.resize(coarse, (4 * size[0], size[1]), interpolation=cv2.INTER_CUBIC), 0, 255)
    return np.ascontiguousarray(wide[:, 3 * number : 3 * number + size[0]].astype(np.uint8))


def grey(number: int) -> np.ndarray:
    """A frame that shows its number: brightness 16 + 4 n."""
    return np.full((48, 64, 3), 16 + 4 * number, np.uint8)


def numbers(frames: Sequence[np.ndarray]) -> list[int]:
    return [round((float(frame.mean()) - 16) / 4) for frame in frames]


def encoded(
    images: Sequence[np.ndarray],
    times: Sequence[float] | None = None,
    rate: int = 24,
    format: str = "mp4",
    rotation: tuple[int, bool] | None = None,
    group: int = 12,
    start: float | None = None,
) -> bytes:
    """A video; `times` are presentation times in seconds, `rotation` is (degrees, whether mirrored)."""
    buffer = io.BytesIO()
    options = {} if start is None else {"muxdelay": str(start), "muxpreload": str(start), "mpegts_copyts": "1"}
    with av.open(buffer, "w", format=format, container_options=options) as container:
        stream = container.add_stream("libx264", rate=rate, options={"qp": "4", "g": str(group)})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 24000)
        if rotation is not None:
            stream.set_display_rotation(rotation[0], hflip=rotation[1])
        for place, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(24000 * times[place]), Fraction(1, 24000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def packets_of(data: bytes) -> list[tuple[int, int]]:
    """(offset, bytes) of each packet."""
    with av.open(io.BytesIO(data)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def shown(data: bytes, named: int | None = None) -> list[int]:
    return numbers(list(video.decode(data, SIZE, video.probe(data, named))))


@pytest.fixture(scope="module")
def clip() -> bytes:
    return encoded([scene(number) for number in range(29)])


def test_a_whole_clip_has_no_remarks(clip: bytes) -> None:
    facts = video.probe(clip, 29)
    assert (facts.frames, facts.shown, facts.size, facts.remarks) == (29, 29, (320, 240), [])
    assert len(list(video.decode(clip, SIZE, facts))) == 29


def test_zeros_inside_the_first_packet_are_noticed(clip: bytes) -> None:
    offset, size = packets_of(clip)[0]
    damaged = bytearray(clip)
    damaged[offset + size // 3 : offset + size // 3 + 32] = bytes(32)
    with pytest.raises(UserError, match=r"damaged \(h264: "):
        list(video.decode(bytes(damaged), SIZE))


def test_nearly_all_flipped_bits_are_noticed(clip: bytes) -> None:
    """H.264 has no checksum: a few bits, most of them near a packet's end, decode to another valid picture."""
    facts = video.probe(clip)
    packets = packets_of(clip)
    choose = random.Random(0)
    noticed = 0
    for _ in range(60):
        offset, size = choose.choice(packets)
        damaged = bytearray(clip)
        damaged[offset + 5 + choose.randrange(size - 5)] ^= 1 << choose.randrange(8)
        try:
            assert len(list(video.decode(bytes(damaged), SIZE, facts))) == 29
        except UserError:
            noticed += 1
    assert noticed >= 51  # measured: 365 of 400


def test_a_missing_reference_frame_is_noticed(clip: bytes) -> None:
    """Nothing of the packet is left but its length."""
    offset, size = packets_of(clip)[13]
    damaged = bytearray(clip)
    damaged[offset + 4 : offset + size] = bytes(size - 4)
    with pytest.raises(UserError, match=r"damaged (near frame \d+ )?\(h264: "):
        list(video.decode(bytes(damaged), SIZE))


def test_a_container_without_an_index_that_was_cut_off_is_noticed_without_decoding() -> None:
    whole = encoded([scene(number) for number in range(29)], format="matroska")
    assert video.probe(whole, 29).remarks == []
    cut = whole[: len(whole) * 6 // 10]
    with pytest.raises(UserError, match=r"damaged \(matroska,webm: File ended prematurely"):
        video.probe(cut, 29)
    facts = video.probe(cut, 29, keep_damaged=True)
    assert facts.frames < 29 and [remark.stage for remark in facts.remarks] == ["damage"]


def test_lost_bytes_in_the_middle_are_noticed(clip: bytes) -> None:
    offset, size = packets_of(clip)[3]
    with pytest.raises(UserError):
        list(video.decode(clip[:offset] + clip[offset + size // 2 :], SIZE))


def test_a_damaged_clip_is_kept_on_demand_with_a_remark(clip: bytes, tmp_path: Path) -> None:
    offset, size = packets_of(clip)[0]
    damaged = bytearray(clip)
    damaged[offset + size // 3 : offset + size // 3 + 32] = bytes(32)
    path = tmp_path / "a.mp4"
    path.write_bytes(damaged)
    method = flow_method("dis")
    with pytest.raises(UserError, match=r"damaged \(h264: "):
        video.encode_clip(str(path), SIZE, method, 29, keep_damaged=False)
    images, remarks = video.encode_clip(str(path), SIZE, method, 29, keep_damaged=True)
    assert len(images.rgb) == 29
    assert [remark.stage for remark in remarks] == ["damage"] and "damaged (h264: " in remarks[0].reason


def test_a_clip_with_packets_that_cannot_be_decoded_is_kept_on_demand(clip: bytes, tmp_path: Path) -> None:
    """The first packet of each second group of pictures is zeroed. Frames that can be decoded keep their places."""
    packets = packets_of(clip)
    for lost in ([12], [0], [0, 12, 28]):
        damaged = bytearray(clip)
        for offset, size in (packets[place] for place in lost):
            damaged[offset : offset + size] = bytes(size)
        path = tmp_path / "a.mp4"
        path.write_bytes(damaged)
        method = flow_method("dis")
        with pytest.raises(UserError):
            video.encode_clip(str(path), SIZE, method, 29, keep_damaged=False)
        images, remarks = video.encode_clip(str(path), SIZE, method, 29, keep_damaged=True)
        assert 27 <= len(images.rgb) <= 29
        assert [remark.stage for remark in remarks] == ["damage"]


def test_frames_keep_their_places_where_others_are_lost() -> None:
    """Frame 5, a frame with only references to itself, is lost: the next one stands in its place."""
    images = [grey(number) for number in range(12)]
    data = bytearray(encoded(images, group=1))
    offset, size = packets_of(bytes(data))[5]
    data[offset : offset + size] = bytes(size)
    facts = video.probe(bytes(data), 12, keep_damaged=True)
    damage: list[str] = []
    assert numbers(list(video.decode(bytes(data), SIZE, facts, damage))) == [0, 1, 2, 3, 4, 6, 6, 7, 8, 9, 10, 11]
    assert damage
    with pytest.raises(UserError):
        list(video.decode(bytes(data), SIZE))


@pytest.mark.parametrize("cut", [1, 6])
def test_packets_cut_out_of_a_transport_stream_are_damage(cut: int) -> None:
    """FFmpeg marks the packet, the decoder reports the frame, or nothing is lost. Other frames keep their places."""
    images = [scene(number) for number in range(40)]
    small = [cv2.resize(image, SIZE, interpolation=cv2.INTER_AREA).astype(int) for image in images]
    data = encoded(images, format="mpegts")
    choose = random.Random(3)
    for _ in range(12):
        first = choose.randrange(len(data) // 188 // 4, len(data) // 188 - cut - 2)
        damaged = data[: 188 * first] + data[188 * (first + cut) :]
        with av.open(io.BytesIO(damaged)) as container:
            marked = any(packet.is_corrupt for packet in container.demux(video=0))
        damage: list[str] = []
        facts = video.probe(damaged, 40, keep_damaged=True)
        frames = list(video.decode(damaged, SIZE, facts, damage))
        reported = any(remark.stage == "damage" for remark in facts.remarks)
        assert reported == marked
        if reported:
            with pytest.raises(UserError, match="damaged"):
                video.probe(damaged, 40)
        differences = [np.abs(frame[..., ::-1] - image).mean() for frame, image in zip(frames, small)]
        assert reported or damage or (len(frames) == 40 and max(differences) < 5)
        assert sum(difference < 5 for difference in differences) > 20


def test_times_of_decoding_are_not_those_of_the_frames() -> None:
    """AVI, and mp4 files copied from it, have no presentation times: those of their packets are in decoding order."""
    avi = encoded([grey(number) for number in range(29)], format="avi")
    copied = io.BytesIO()
    with av.open(io.BytesIO(avi)) as source, av.open(copied, "w", format="mp4") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts, packet.stream = packet.dts, stream
                target.mux(packet)
    for data in (avi, copied.getvalue()):
        assert shown(data, 29) == list(range(29))
        damage: list[str] = []
        kept = video.decode(data, SIZE, video.probe(data, 29, keep_damaged=True), damage)
        assert (numbers(list(kept)), damage) == (list(range(29)), [])


def test_the_delay_of_a_decoder_is_not_taken_for_lost_frames() -> None:
    """MPEG-TS begins some frames late; two frames are lost at the end, so that the clip's end seems to be as named."""
    data = encoded([grey(number) for number in range(29)], format="mpegts", start=0)
    with av.open(io.BytesIO(data)) as container:
        first = min(float(packet.pts * packet.time_base) for packet in container.demux(video=0) if packet.size)
    late = round(24 * first)
    assert 1 <= late <= 4
    assert shown(data, 29 + late) == list(range(29))


def boxes(data: bytes) -> dict[str, bytes]:
    """The boxes of an mp4 file, or of one of its boxes, by name."""
    found, offset = {}, 0
    while offset < len(data):
        size = int.from_bytes(data[offset : offset + 4], "big")
        found[data[offset + 4 : offset + 8].decode("latin-1")] = data[offset : offset + size]
        offset += size
    return found


def test_an_attached_picture_is_not_taken_for_the_video() -> None:
    """The cover picture of an mp4 file is its first stream where its box comes first."""
    picture = cv2.imencode(".png", np.full((48, 64, 3), 200, np.uint8))[1].tobytes()
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container, av.open(io.BytesIO(picture), format="png_pipe") as cover:
        stream = container.add_stream("libx264", rate=24, options={"qp": "4"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        copied = container.add_stream_from_template(cover.streams.video[0])
        copied.disposition = av.stream.Disposition.attached_pic
        for number in range(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey(number), format="rgb24")))
        packet = next(cover.demux(video=0))
        packet.stream = copied
        container.mux(packet)
        container.mux(stream.encode(None))
    parts = boxes(buffer.getvalue())
    inner = boxes(parts["moov"][8:])
    parts["moov"] = (
        parts["moov"][:8] + b"".join(inner.pop(name) for name in ("mvhd", "udta")) + b"".join(inner.values())
    )
    data = b"".join(parts.values())
    with av.open(io.BytesIO(data)) as container:
        assert [stream.codec_context.name for stream in container.streams.video] == ["png", "h264"]
    assert shown(data, 12) == list(range(12))


def test_the_log_of_ffmpeg_is_off_again_afterwards(clip: bytes) -> None:
    """Nested, and when the body raises."""
    with DecoderLog(), DecoderLog():
        pass

    def fail() -> None:
        with DecoderLog() as log:
            assert av.logging.get_level() == av.logging.INFO
            av.logging.log(av.logging.ERROR, "here", "bad")
            assert log.damage == "here: bad"
            log.ignored = {"here"}
            assert log.damage == ""
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert av.logging.get_level() is None


def test_damage_is_reported_to_the_thread_that_decodes_the_clip(clip: bytes) -> None:
    """A damaged and a whole clip at the same time, five times: each as if it were alone."""
    offset, size = packets_of(clip)[0]
    damaged = bytearray(clip)
    damaged[offset + size // 3 : offset + size // 3 + 32] = bytes(32)
    start = threading.Barrier(2)

    def reports(data: bytes) -> list[str]:
        facts = video.probe(data, 29, keep_damaged=True)
        damage = [remark.reason for remark in facts.remarks]
        assert len(list(video.decode(data, SIZE, facts, damage))) == 29
        return damage

    def repeated(data: bytes) -> list[list[str]]:
        found = []
        for _ in range(5):
            start.wait(10)
            found.append(reports(data))
        return found

    alone = reports(bytes(damaged))
    assert alone and reports(clip) == []
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(repeated, (bytes(damaged), clip))) == [[alone] * 5, [[]] * 5]


def test_messages_outside_a_log_are_not_printed() -> None:
    """In a process of its own: pytest's handlers would take the message."""
    code = """
import threading, av.logging
from tune_ego.dataset.decoder_log import DecoderLog
with DecoderLog():
    thread = threading.Thread(target=av.logging.log, args=(av.logging.ERROR, "there", "bad"))
    thread.start()
    thread.join()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")


@pytest.mark.skipif(not VIDEOS.exists(), reason="needs real videos")
@pytest.mark.parametrize(("name", "frames"), [("bikes", 250), ("bigbuckbunny", 132), ("carphone_pristine", 120)])
def test_real_videos_are_not_damaged(name: str, frames: int) -> None:
    source = str(VIDEOS / f"{name}.mp4")
    facts = video.probe(source, frames)
    assert facts.shown == frames and all(remark.stage == "time" for remark in facts.remarks)
    assert len(list(video.decode(source, SIZE, facts))) == facts.frames


def test_frames_of_30_a_second_are_resampled_to_the_session_s() -> None:
    """30 frames at 24 a second become 37 at 30 a second: frame n shows the last one begun by n / 30, rounded."""
    doubled = [max(k for k in range(30) if round(1.25 * k + 1e-9) <= n) for n in range(37)]
    data = encoded([grey(number) for number in doubled], rate=30)
    facts = video.probe(data, 30)
    assert facts.shown == 37 and facts.frames == 30
    assert shown(data, 30) == list(range(30))
    (remark,) = facts.remarks
    assert remark.stage == "time" and "resampled from 30 to 24 frames a second" in remark.reason


def test_lost_and_irregular_frames_are_placed_by_their_times() -> None:
    """Frames 7, 8 and 20 are lost: the nearest ones stand in their places, and later frames keep theirs."""
    kept = [number for number in range(29) if number not in (7, 8, 20)]
    data = encoded([grey(number) for number in kept], [number / 24 for number in kept])
    places = shown(data, 29)
    assert len(places) == 29
    assert [place for place, number in enumerate(places) if number == place] == kept
    assert (places[7], places[8]) == (6, 9) and places[20] in (19, 21)
    (remark,) = video.probe(data, 29).remarks
    assert remark == Remark(
        "time",
        "irregular times, placed by them: 3 of 29 session frames repeat a neighbour, 0 of 26 frames are not used",
    )


def test_a_wrong_rate_with_as_many_frames_as_named_is_placed_by_number() -> None:
    data = encoded([grey(number) for number in range(25)], rate=25)
    assert shown(data, 25) == list(range(25))
    assert [remark.reason for remark in video.probe(data, 25).remarks] == [
        "25 frames a second, as many as its name says: each is one session frame"
    ]
    assert len(shown(data, 24)) == 24  # another name: resampled


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_stored_turns_are_undone(degrees: int, mirrored: bool) -> None:
    """numpy's `rot90` turns counterclockwise, as FFmpeg's angle does; the mirror comes after it."""
    image = np.zeros((48, 64, 3), np.uint8)
    for value, (rows, columns) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        image[24 * rows : 24 * rows + 24, 32 * columns : 32 * columns + 32] = 40 + 50 * value
    expected = np.rot90(image, degrees // 90)
    expected = expected[:, ::-1] if mirrored else expected
    data = encoded([image] * 3, rotation=(degrees, mirrored))
    facts = video.probe(data, 3)
    size = (expected.shape[1], expected.shape[0])
    assert facts.size == size
    frames = list(video.decode(data, size, facts))
    assert len(frames) == 3
    assert np.abs(frames[0].astype(int) - expected).mean() < 3
    stages = [remark.stage for remark in facts.remarks]
    assert stages == ([] if not degrees and not mirrored else ["rotation"])
    assert not stages or (" and mirrored" in facts.remarks[0].reason) == mirrored


def test_a_slanted_display_matrix_is_refused() -> None:
    with pytest.raises(UserError, match="no multiple of 90 degrees"):
        video.probe(encoded([grey(0)] * 2, rotation=(30, False)))


ONE = 1 << 16  # in FFmpeg's display matrix


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ([[0, 0], [0, 0]], Orientation()),
        ([[ONE, 0], [0, ONE]], Orientation()),
        ([[ONE, 1], [-1, ONE]], Orientation()),
        ([[-ONE, 0], [1, -ONE]], Orientation(mirrored_x=True, mirrored_y=True)),
        ([[1, ONE], [-ONE, 1]], Orientation(transposed=True, mirrored_x=True)),
    ],
)
def test_display_matrices_of_zeros_and_with_rounded_numbers(turn: list[list[int]], expected: Orientation) -> None:
    matrix = np.zeros((3, 3), np.int32)
    matrix[:2, :2] = turn
    assert matrix_orientation(matrix) == expected


def test_what_was_done_is_on_record_and_gaze_is_that_of_the_shown_frame(tmp_path: Path) -> None:
    """The gaze of session frame k is (k / 128, k / 192); a clip at 30 frames a second that begins at frame 10."""
    name = f"{SESSION}-417-1667-F000010-F000040"
    doubled = [max(k for k in range(30) if round(1.25 * k + 1e-9) <= n) for n in range(37)]
    (tmp_path / f"{name}.mp4").write_bytes(encoded([grey(number) for number in doubled], rate=30))
    samples = [f"1\t{10 * k}\t{5 * k}\t{k}\tFixation" for k in range(60)]
    gaze = tmp_path / f"{SESSION}.txt"
    gaze.write_text("\n".join(["Time\tL POR X [px]\tL POR Y [px]\tFrame\tL Event Info", *samples]) + "\n")
    task = ShardTask(
        "part.parquet", [annotated(name)], [str(tmp_path / f"{name}.mp4")], [str(gaze)], {gaze.name: "identity"}
    )
    result = write_task(task, str(tmp_path / "out"), Settings(SIZE))
    assert [(problem.clip, problem.stage, problem.kept) for problem in result.problems] == [(name, "time", True)]
    assert result.records[0]["frames"] == 30
    table = pq.read_table(tmp_path / "out" / "part.parquet", partitioning=None)
    for row in table.to_pylist():
        image = cv2.imdecode(np.frombuffer(row["rgb"], np.uint8), cv2.IMREAD_COLOR)
        assert image is not None
        (number,) = numbers([image])
        assert number == row["frame"]
        assert row["gaze_x"] == pytest.approx((10 + number) / 128)


def test_a_damaged_clip_is_listed_and_left_out(tmp_path: Path, clip: bytes) -> None:
    name = f"{SESSION}-417-1625-F000010-F000039"
    offset, size = packets_of(clip)[0]
    damaged = bytearray(clip)
    damaged[offset + size // 3 : offset + size // 3 + 32] = bytes(32)
    (tmp_path / f"{name}.mp4").write_bytes(damaged)
    task = ShardTask("part.parquet", [annotated(name)], [str(tmp_path / f"{name}.mp4")], [None], {})
    (problem,) = write_task(task, str(tmp_path / "out"), Settings(SIZE)).problems
    assert (problem.stage, problem.kept) == ("video", False) and "damaged (h264: " in problem.reason
    result = write_task(task, str(tmp_path / "out"), Settings(SIZE, keep_damaged=True))
    assert result.problems[0] == Problem(name, "damage", problem.reason, True) and len(result.records) == 1
