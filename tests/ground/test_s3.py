"""The whole path against an S3-compatible server on loopback, with nothing of it on the local disk."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from tests.conftest import COMMAND
from tests.search.test_search import wait_for, write_space
from tune_ego import storage
from tune_ego.dataset.shards import open_shards
from tune_ego.model.weights import load_tensors
from tune_ego.results.checkpoint_files import checkpoint_iterations
from tune_ego.results.reading import read_experiment

pytest.importorskip("moto.server")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URI of an empty bucket; pyarrow finds its server through AWS's own environment variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = "from moto.server import main; import sys; main(sys.argv[1:])"
    server = subprocess.Popen(
        [sys.executable, "-c", script, "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for key, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    try:
        for _ in range(200):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        pafs.FileSystem.from_uri("s3://bucket?allow_bucket_creation=true")[0].create_dir("bucket")
        yield "s3://bucket"
    finally:
        server.kill()
        server.wait()


def upload(folder: Path, uri: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            storage.write_bytes(storage.join(uri, str(path.relative_to(folder))), path.read_bytes())


@pytest.mark.slow
def test_the_whole_path_on_an_object_store(
    bucket: str, egtea: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """prepare, tune, kill -9, resume, export, train; the working directory and the home folder stay empty."""
    upload(egtea, f"{bucket}/egtea")
    space = write_space(tmp_path, grace=60, **{"train.iterations": 60, "train.validate_every": 20})
    for name in ("home", "empty"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    data, results = f"{bucket}/shards", f"{bucket}/results"

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=tmp_path / "empty",
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )

    def run(*arguments: str) -> str:
        process = start(*arguments)
        output = process.communicate()[0].decode()
        assert process.returncode == 0, output
        return output

    run("prepare", f"{bucket}/egtea", data, "--image-size", "48x36")
    assert len(open_shards(data).table) == 40
    assert "OP01" in run("inspect", data)
    process = start("tune", space, "--data", data, "--storage", results, "--name", "search", "--concurrent", "1")

    def second_trial_has_a_checkpoint() -> bool:
        if not storage.exists(f"{results}/search/trials.json"):
            return False
        trials = read_experiment(f"{results}/search").trials
        return len(trials) == 2 and trials[1].state == "running" and bool(checkpoint_iterations(trials[1].run))

    wait_for(second_trial_has_a_checkpoint, 240, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert "resumes from iteration " in run("resume", f"{results}/search")
    assert [trial.state for trial in read_experiment(f"{results}/search").trials] == ["finished", "finished"]
    run("export", f"{results}/search", "--out", f"{bucket}/best.yaml")
    final = ["--data", data, "--storage", results, "--name", "final", "--iterations", "60"]
    run("train", f"{bucket}/best.yaml", *final)
    weights = load_tensors(f"{results}/final/final/model.pt")
    assert weights["flow.logits.conv3d.bias"].shape == (4,)
    assert "fused" in run("evaluate", f"{results}/final", "--data", data)
    assert not list((tmp_path / "empty").iterdir())
    left = {str(path.relative_to(tmp_path / "home")) for path in (tmp_path / "home").rglob("*") if path.is_file()}
    assert left <= {".ray/auth_token"}, left  # Ray's own, of its local clusters
