"""Benchmarks in a short form: what they do and write down, not how fast this machine is."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

from tune_ego.bench import feed
from tune_ego.bench.feed import clips_of_egtea_lengths
from tune_ego.bench.prepare import _MOTIONS, bench_prepare, moving_pairs, plain_loop
from tune_ego.bench.record import Benchmark, time_in_turn
from tune_ego.bench.search import bench_search, draw_curves, run_fifo
from tune_ego.dataset.flow import flow_method
from tune_ego.dataset.shards import open_shards
from tune_ego.dataset.synthetic import synthesize
from tune_ego.errors import UserError
from tune_ego.feed.reader import WindowReader
from tune_ego.feed.sampling import Window
from tune_ego.space_io import parse_space


def test_in_turn_warms_up_and_alternates() -> None:
    calls: list[str] = []
    seconds = time_in_turn(2, warm_up=1, a=lambda: calls.append("a"), b=lambda: calls.append("b"))
    assert calls == ["a", "b"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_a_record_holds_medians_spread_and_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = Benchmark("test", {"clips": 3})
    fast = benchmark.add("fast", "clips/s", [4.0, 5.0, 9.0])
    benchmark.compare("fast / slow", fast, benchmark.add("slow", "clips/s", [2.0]))
    benchmark.show()
    shown = capsys.readouterr().out
    assert "fast / slow" in shown and "2.50" in shown and "4 to 9" in shown
    benchmark.write(str(tmp_path / "b.json"))
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["figures"][0] == {
        "name": "fast",
        "unit": "clips/s",
        "median": 5.0,
        "least": 4.0,
        "most": 9.0,
        "repeats": 3,
    }
    assert record["ratios"] == [{"name": "fast / slow", "value": 2.5}]
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert record["machine"]["cores"] >= 1 and record["date"].startswith("20") and record["about"] == {"clips": 3}


@pytest.mark.slow
def test_bench_prepare_measures_every_part(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes read are those counted before and after 8 windows; the frames those of the same synthetic videos."""
    counts: list[int] = []
    bytes_read = feed._bytes_read

    def count() -> int:
        counts.append(bytes_read())
        return counts[-1]

    monkeypatch.setattr(feed, "_bytes_read", count)
    threads = cv2.getNumThreads(), torch.get_num_threads()
    benchmark = bench_prepare(clips=10, seconds=0.8, repeats=1, windows=8)
    figures = {figure.name: figure for figure in benchmark.figures}
    assert {figure.unit for figure in benchmark.figures} == {"frames/s", "ms a pair", "windows/s", "MB a window"}
    assert all(value > 0 for figure in benchmark.figures for value in figure.values)
    synthesize(tmp_path, verbs=2, nouns=1, clips=10, seconds=0.8, size=(64, 48))
    assert benchmark.facts["frames"] == sum(frames_of(file) for file in tmp_path.rglob("*.mp4"))
    before, after = counts
    assert figures["feed reads, a shard opened each time"].values == [(after - before) / 1e6 / 8]
    ratios = {ratio.name: ratio.value for ratio in benchmark.ratios}
    bare = {"feed / bare cv2.imdecode", "feed / bare simplejpeg, the feed's decoder"}
    assert set(ratios) == {"prepare / plain loop", "flow tvl1 / dis", *bare}
    by_hand = figures["feed, one core"].median / figures["bare cv2.imdecode, one core"].median
    assert ratios["feed / bare cv2.imdecode"] == by_hand
    assert (cv2.getNumThreads(), torch.get_num_threads()) == threads


def frames_of(file: Path) -> int:
    with av.open(str(file)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_bytes_read_are_the_process_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rchar` of /proc/self/io: bytes of read calls, from the page cache too; a file of 4 MB counts 4 MB."""
    file = tmp_path / "file"
    file.write_bytes(bytes(4_000_000))
    before = feed._bytes_read()
    file.read_bytes()
    assert feed._bytes_read() - before == pytest.approx(4_000_000, rel=0.01)  # and the two reads of /proc themselves
    (tmp_path / "io").write_text("rchar: 123456\nwchar: 7\nsyscr: 8\n")
    monkeypatch.setattr(feed, "_IO_COUNTS", tmp_path / "io")
    assert feed._bytes_read() == 123456


def test_a_clip_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"a\.mp4: cannot be decoded"):
        plain_loop([str(tmp_path / "a.mp4")], (48, 36))


def test_the_pairs_move_as_said() -> None:
    """Scaled and turned about the centre (160, 120), counter-clockwise in an image whose y points down, then shifted.

    DIS misses the motion by 0.06 to 0.14 pixels on average.
    """
    dis, pairs = flow_method("dis"), moving_pairs((320, 240))
    y, x = np.mgrid[-120.0:120.0, -160.0:160.0]  # from the centre
    assert len(pairs) == len(_MOTIONS) == 4
    for pair, (shift_x, shift_y, degrees, scale) in zip(pairs, _MOTIONS):
        cosine, sine = scale * np.cos(np.deg2rad(degrees)), scale * np.sin(np.deg2rad(degrees))
        expected = np.stack([cosine * x + sine * y + shift_x - x, cosine * y - sine * x + shift_y - y], axis=-1)
        assert np.linalg.norm(dis.fields(pair)[0] - expected, axis=-1).mean() < 0.2


def test_clips_of_egtea_lengths_are_as_egteas(shards: str, tmp_path: Path) -> None:
    """The lengths are log-normal draws of seed 0, rounded, 15 at least; as many clips as there are frames for."""
    data = open_shards(shards)
    clips = clips_of_egtea_lengths(data, tmp_path)
    lengths = [67, 52, 114, 66, 34, 86, 225, 156, 29, 16, 31, 62, 15, 47, 16, 28, 34, 43, 90, 172]
    assert sum(lengths) > data.info["frames"]
    count = sum(end <= data.info["frames"] for end in accumulate(lengths))
    assert [clip.frames for clip in clips] == lengths[:count] and count >= 7
    reader = WindowReader(clips, ("rgb", "flow"), data.image_size, 32)
    windows = [Window(index, max(clip.frames - 16, 0), 0, 0, False) for index, clip in enumerate(clips)]
    assert reader.read_batch([*windows])["rgb"].any(axis=(1, 2, 3, 4)).all()


def test_asha_spends_little_and_finds_the_best() -> None:
    """400 stub trials through the scheduler of `tune`, beside running each to its end."""
    benchmark = bench_search(trials=400, seeds=2)
    share, best, many, few = (figure.median for figure in benchmark.figures)
    assert share < 0.25
    assert best > 0.99
    assert many < 20  # ms a report
    assert many < 4 * few


def test_the_yardstick_runs_every_trial_to_its_end() -> None:
    space = parse_space("base: {train: {iterations: 300, validate_every: 100}}\nspace: {seed: {choice: [1, 2]}}", "t")
    curves = draw_curves(5, 0)
    fifo = run_fifo(space, curves)
    assert fifo.iterations == 1500 and fifo.reports == 15
    assert fifo.best == max(curve.at(iteration) for curve in curves for iteration in (100, 200, 300))
