"""Faults while shards are made: a reader never takes a faulty shard for a good one."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import COMMAND
from tests.dataset.test_check_inspect import cut_in_the_middle
from tests.dataset.test_write_task import MOVING, SHORT, STILL, write_folder
from tune_ego.dataset.annotations import find_clips, find_gaze, read_annotations
from tune_ego.dataset.prepare import Settings, plan_shards, prepare, write_task
from tune_ego.dataset.shards import open_shards, read_clip
from tune_ego.errors import UserError

SETTINGS = Settings((48, 36))


def contents(folder: Path | str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_the_number_of_workers_changes_nothing(egtea: Path, shards: str, tmp_path: Path, ray_cluster: None) -> None:
    prepare(str(egtea), str(tmp_path / "out"), SETTINGS, jobs=1)
    assert contents(tmp_path / "out") == contents(shards)


def test_a_clip_cut_in_the_middle_is_left_out(tmp_path: Path, made: list[str]) -> None:
    root, out = write_folder(tmp_path / "egtea"), str(tmp_path / "out")
    file = root / "cropped_clips" / f"{MOVING}.mp4"
    content = file.read_bytes()
    cut_in_the_middle(file)
    info = prepare(str(root), out, SETTINGS, allow_missing=True)
    (problem,) = (problem for problem in info["problems"] if not problem["kept"])
    assert (problem["clip"], problem["stage"]) == (MOVING, "video")
    assert open_shards(out).table["clip"].to_pylist() == [SHORT, STILL]
    # The clip is fetched anew: its shard is made again, and only that one.
    made.clear()
    file.write_bytes(content)
    assert prepare(str(root), out, SETTINGS)["clips_left_out"] == 0
    assert len(made) == 1 and open_shards(out).table["clip"].to_pylist() == [MOVING, SHORT, STILL]


def test_a_shard_cut_off_is_made_anew(
    egtea: Path, shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(shards, tmp_path / "out"))
    victim = sorted(out.rglob("part-*.parquet"))[3]
    victim.write_bytes(victim.read_bytes()[:-500])
    data = open_shards(str(out))
    row = next(row for row in data.table.to_pylist() if str(victim).endswith(row["shard"]))
    with pytest.raises(UserError, match=f"{victim}: {row['clip']} cannot be read"):
        read_clip(data, row)
    prepare(str(egtea), str(out), SETTINGS)
    assert contents(out) == contents(shards)
    assert f"{victim}: not a whole shard of tune_ego" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["read-only", "below a file"])
def test_an_output_that_cannot_be_written_is_named(egtea: Path, tmp_path: Path, place: str) -> None:
    out = tmp_path / "out" / "shards"
    (tmp_path / "out").mkdir()
    if place == "read-only":
        if os.geteuid() == 0:  # whom permissions do not stop
            out = Path("/proc/tune_ego/shards")
        (tmp_path / "out").chmod(0o555)
    else:
        shutil.copy(__file__, out := tmp_path / "out" / "file")
        out = out / "shards"
    with pytest.raises(UserError, match=f"{out}.*cannot be (written|opened)"):
        prepare(str(egtea), str(out), SETTINGS)
    assert not out.exists()


def test_a_full_disk_leaves_no_half_shard(egtea: Path, tmp_path: Path) -> None:
    annotations = read_annotations(str(egtea))
    task = plan_shards(annotations, find_clips(str(egtea)), find_gaze(str(egtea)))[0]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(UserError, match=rf"{task.shard}: cannot be written \(.*File too large"):
            write_task(task, str(tmp_path), SETTINGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert contents(tmp_path) == {}


def test_what_a_task_cannot_write_ends_the_job(egtea: Path, shards: str, tmp_path: Path) -> None:
    out = Path(shutil.copytree(shards, tmp_path / "out"))
    (out / "dataset.json").unlink()
    victim = sorted(out.rglob("part-*.parquet"))[3]
    shutil.rmtree(victim.parent)
    victim.parent.touch()  # a file where its folder should be
    with pytest.raises(UserError, match=f"{victim}: cannot be written"):
        prepare(str(egtea), str(out), SETTINGS)
    with pytest.raises(UserError, match="no finished data set"):
        open_shards(str(out))


def run_prepare(egtea: Path, out: Path) -> subprocess.Popen[str]:
    arguments = ["prepare", str(egtea), str(out), "--image-size", "320x240", "--jobs", "1"]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
    )


@pytest.mark.slow
def test_kill_9_at_three_moments_and_the_same_bytes(egtea: Path, tmp_path: Path, ray_cluster: None) -> None:
    reference, out = tmp_path / "whole", tmp_path / "killed"
    prepare(str(egtea), str(reference), Settings((320, 240)))
    count = len(list(reference.rglob("part-*.parquet")))
    for moment in (1, count // 2, count - 1):
        job = run_prepare(egtea, out)
        end = time.monotonic() + 90
        while len(list(out.rglob("part-*.parquet"))) < moment and job.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        job.send_signal(signal.SIGKILL)
        printed, _ = job.communicate()
        assert job.returncode == -signal.SIGKILL, printed
        assert moment <= len(list(out.rglob("part-*.parquet"))) < count
        with pytest.raises(UserError, match="no finished data set"):
            open_shards(str(out))
    job = run_prepare(egtea, out)
    printed, _ = job.communicate(timeout=120)
    assert job.returncode == 0, printed
    assert not any(word in printed.lower() for word in ("ray", "raylet", "warning", "traceback"))
    assert contents(out) == contents(reference)


FAKE_GPU = """
import ray, sys
from tune_ego.dataset import flow, prepare
flow.uses_gpu = lambda name: True
ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
assert prepare._gpu_share(prepare.Settings()) == 0.5 and prepare._most_actors(0.5, None) == 2
assert prepare._most_actors(0.5, 1) == 1
prepare.prepare(sys.argv[1], sys.argv[2], prepare.Settings((48, 36)))
"""


@pytest.mark.slow
def test_processes_that_share_a_gpu_write_the_same_shards(egtea: Path, shards: str, tmp_path: Path) -> None:
    """On a GPU that Ray believes in: actors write one shard after another."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("RAY_ADDRESS", None)
    arguments = [sys.executable, "-c", FAKE_GPU, str(egtea), str(tmp_path / "out")]
    subprocess.run(arguments, env=environment, check=True, capture_output=True, timeout=300)
    assert contents(tmp_path / "out") == contents(Path(shards))
