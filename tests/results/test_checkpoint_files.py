"""Checkpoints of a run: which are whole, which stay, and which one a path means."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import tiny_config
from tune_ego import storage
from tune_ego.errors import UserError
from tune_ego.model import TwoStream, load_weights
from tune_ego.results.checkpoint_files import (
    DamagedCheckpoint,
    checkpoint_iterations,
    checkpoint_name,
    checkpoint_uri,
    checksum,
    find_checkpoint,
    is_checkpoint_name,
    is_final,
    last_whole_iteration,
    read_last_whole_checkpoint,
    read_verified,
    remove_checkpoints,
    run_of,
)
from tune_ego.training.checkpoint import Origin, checkpoint_content, write_checkpoint

CONFIG = tiny_config()


def content(iteration: int) -> bytes:
    return f"weights after iteration {iteration}".encode()


def save(run: Path, iteration: int) -> Path:
    """A whole checkpoint, as the file formats say: the content, and its size and SHA-256 beside it."""
    folder, data = run / f"iteration-{iteration:06d}", content(iteration)
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").write_bytes(data)
    record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "checkpoint.json").write_text(json.dumps(record))
    return folder / "checkpoint.pt"


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def names(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())


def test_names_of_checkpoints_and_their_files() -> None:
    assert checkpoint_name(100) == "iteration-000100" and checkpoint_name(1234567) == "iteration-1234567"
    assert checkpoint_uri("s3://bucket/run", 7) == "s3://bucket/run/iteration-000007/checkpoint.pt"
    assert checkpoint_uri("/run", 7, "checkpoint.json") == "/run/iteration-000007/checkpoint.json"
    assert [is_checkpoint_name(name) for name in ("iteration-000100", "iteration-1", "iteration-")] == [
        True,
        True,
        False,
    ]
    assert not any(map(is_checkpoint_name, ("iteration-x", "iteration--1", "iteration-1.partial", "000100", "final")))


def test_a_checksum_is_the_size_and_the_sha_256() -> None:
    assert checksum(b"abc") == {
        "bytes": 3,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",  # FIPS 180-2, appendix B.1
    }


def test_half_a_checkpoint_is_none_and_iterations_ascend_as_numbers(tmp_path: Path) -> None:
    assert checkpoint_iterations(str(tmp_path)) == [] and checkpoint_iterations(str(tmp_path / "absent")) == []
    for iteration in (20, 100, 10000000, 2000000, 3):
        save(tmp_path, iteration)
    save(tmp_path, 40).unlink()
    save(tmp_path, 50).with_name("checkpoint.json").unlink()
    for other in ("iteration-x", "final", "iteration-7.partial"):
        (tmp_path / other).mkdir()
    assert checkpoint_iterations(str(tmp_path)) == [3, 20, 100, 2000000, 10000000]


def test_all_checkpoints_are_removed_but_those_to_keep_broken_ones_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for iteration in (10, 20, 30, 40):
        save(tmp_path, iteration)
    save(tmp_path, 25).with_name("checkpoint.json").unlink()
    for name in ("iteration-000010/more/file", "final/model.pt", "config.yaml", "iteration-x"):
        storage.write_text(tmp_path / name, "")
    order = []

    def recorded(remove: Callable[[str], None]) -> Callable[[str], None]:
        def remove_and_record(uri: str) -> None:
            order.append(uri)
            remove(uri)

        return remove_and_record

    for name in ("remove", "remove_folder"):
        monkeypatch.setattr(storage, name, recorded(getattr(storage, name)))
    remove_checkpoints(str(tmp_path), keep={20, 40, 50})
    assert names(tmp_path) == [
        *("config.yaml", "final/model.pt"),
        *("iteration-000020/checkpoint.json", "iteration-000020/checkpoint.pt"),
        *("iteration-000040/checkpoint.json", "iteration-000040/checkpoint.pt"),
        "iteration-x",
    ]
    # The checksum goes first: a process that dies in between leaves half a checkpoint, which counts for none.
    assert order == [
        f"{tmp_path}/iteration-0000{path}" for path in ("10/checkpoint.json", "10", "25/checkpoint.json", "25")
    ] + [f"{tmp_path}/iteration-000030/checkpoint.json", f"{tmp_path}/iteration-000030"]
    remove_checkpoints(str(tmp_path))
    assert names(tmp_path) == ["config.yaml", "final/model.pt", "iteration-x"]
    remove_checkpoints(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("written", "best", "keep", "stay"),
    [
        ([10, 20, 30, 40], {10: 10, 20: 20, 30: 20, 40: 20}, [], [20, 30, 40]),  # the best and the last two
        ([10, 20, 30], {10: 10, 20: 20, 30: 30}, [], [20, 30]),
        ([10, 20, 30, 40, 50], dict.fromkeys((10, 20, 30, 40, 50), 40), [], [40, 50]),
        ([10, 20, 30, 40, 50], dict.fromkeys((10, 20, 30, 40, 50), 10), [20, 25], [10, 20, 40, 50]),
        ([10, 20, 30], {}, [], [20, 30]),  # never validated
        ([10, 20, 30, 20], {}, [], [20]),  # a run that went back: what it wrote later than 20 is void
    ],
)
def test_the_best_the_last_two_and_those_to_keep_stay(
    tmp_path: Path, written: list[int], best: dict[int, int], keep: list[int], stay: list[int]
) -> None:
    for iteration in written:
        validated = {"iteration": best[iteration]} if iteration in best else {}
        write_checkpoint(str(tmp_path), {"iteration": iteration, "best": validated}, keep)
    assert checkpoint_iterations(str(tmp_path)) == stay and last_whole_iteration(str(tmp_path)) == stay[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"iteration-{n:06d}" for n in stay]


def test_a_written_checkpoint_has_its_checksum_beside_it(tmp_path: Path) -> None:
    damaged = save(tmp_path, 10)
    flip_a_bit(damaged)
    write_checkpoint(str(tmp_path), {"iteration": 10, "best": {}})
    data = damaged.read_bytes()
    record = json.loads(damaged.with_name("checkpoint.json").read_text())
    assert record == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert torch.load(damaged, weights_only=True) == {"iteration": 10, "best": {}}


def test_the_checksum_of_a_damaged_checkpoint_goes_before_it_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is written after the content: a process that dies in between leaves half a checkpoint."""
    file = save(tmp_path, 10)
    there: list[tuple[str, list[str]]] = []
    write = storage.write_bytes

    def watched(uri: str | Path, data: bytes) -> None:
        there.append((str(uri).rpartition("/")[2], names(file.parent)))
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", watched)
    write_checkpoint(str(tmp_path), {"iteration": 10, "best": {}})
    assert there == [("checkpoint.pt", ["checkpoint.pt"]), ("checkpoint.json", ["checkpoint.pt"])]


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    file = save(tmp_path, 10)
    assert read_verified(str(file)) == content(10)
    flip_a_bit(file)
    with pytest.raises(DamagedCheckpoint) as caught:
        read_verified(str(file))
    assert str(caught.value) == f"{file}: damaged, its content does not match its checksum"
    file.write_bytes(content(10))
    beside = file.with_name("checkpoint.json")
    record = json.loads(beside.read_text())
    wrong_records: list[Any] = [
        {**record, "bytes": record["bytes"] + 1},
        {**record, "sha256": hashlib.sha256(b"").hexdigest()},
        {"bytes": record["bytes"]},
        [],
    ]
    for wrong in wrong_records:
        beside.write_text(json.dumps(wrong))
        with pytest.raises(DamagedCheckpoint):
            read_verified(str(file))
    beside.write_text('{"bytes": ')
    with pytest.raises(DamagedCheckpoint, match="damaged, its content does not match its checksum"):
        read_verified(str(file))
    beside.unlink()
    assert read_verified(str(file)) == content(10)  # one that was copied out of its folder
    other = save(tmp_path, 20).with_name("model.pt")
    other.write_bytes(b"other")
    assert read_verified(str(other)) == b"other"  # the checksum is that of checkpoint.pt


@pytest.mark.parametrize("damage", [flip_a_bit, cut_off, Path.unlink])
def test_the_last_whole_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any) -> None:
    assert read_last_whole_checkpoint(str(tmp_path)) is None and last_whole_iteration(str(tmp_path)) is None
    first, second, third = (save(tmp_path, iteration) for iteration in (9, 10, 100))
    assert (
        read_last_whole_checkpoint(str(tmp_path)) == (100, content(100)) and last_whole_iteration(str(tmp_path)) == 100
    )
    assert capsys.readouterr().out == ""
    line = "{}: damaged, its content does not match its checksum; using the checkpoint before it\n"
    for file, before in ((third, 10), (second, 9)):
        damage(file)
        assert last_whole_iteration(str(tmp_path)) == before
        damaged = [path for path in (third, second) if path.exists() and damage is not Path.unlink]
        expected = damaged if file is second else damaged[:1]
        assert capsys.readouterr().out == "".join(line.format(path) for path in expected)
    assert read_last_whole_checkpoint(str(tmp_path)) == (9, content(9))
    damage(first)
    assert read_last_whole_checkpoint(str(tmp_path)) is None and last_whole_iteration(str(tmp_path)) is None


def test_the_file_that_a_path_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    first, second = save(run, 10), save(run, 20)
    assert find_checkpoint(str(run)) == str(second)
    assert find_checkpoint(str(first.parent)) == find_checkpoint(str(first)) == str(first)
    assert find_checkpoint(str(tmp_path / "absent.pt")) == str(tmp_path / "absent.pt")
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("run") == str(second) and find_checkpoint("absent.pt") == str(tmp_path / "absent.pt")
    (run / "final").mkdir()
    assert find_checkpoint(str(run)) == str(second)  # the final weights are not written yet
    (run / "final" / "model.pt").write_bytes(b"final")
    assert find_checkpoint(str(run)) == str(run / "final" / "model.pt")
    assert find_checkpoint(str(second.parent)) == str(second)


def test_a_folder_without_a_whole_checkpoint_means_nothing(tmp_path: Path) -> None:
    flip_a_bit(save(tmp_path / "run", 10))
    for folder in (tmp_path, tmp_path / "run"):
        with pytest.raises(UserError) as caught:
            find_checkpoint(str(folder))
        hint = "give a run (in a search, a folder in runs/)"
        assert str(caught.value) == f"{folder}: no whole checkpoint in this folder; {hint}"


@pytest.mark.parametrize(
    ("file", "run", "final"),
    [
        ("/x/run/final/model.pt", "/x/run", True),
        ("/x/run/iteration-000010/checkpoint.pt", "/x/run", False),
        ("s3://x/run/iteration-10/checkpoint.pt", "s3://x/run", False),
        ("/x/apart/checkpoint.pt", "/x/apart", False),
        ("/x/final/weights.pt", "/x/final", False),
        ("/x/run/semifinal/model.pt", "/x/run/semifinal", False),
        ("/x/iteration-x/checkpoint.pt", "/x/iteration-x", False),
    ],
)
def test_the_run_of_a_file(file: str, run: str, final: bool) -> None:
    assert (run_of(file), is_final(file)) == (run, final)


def test_final_weights_have_the_flow_method_of_their_run(tmp_path: Path) -> None:
    model = TwoStream(("rgb", "flow"), 2, CONFIG.model)
    origin = Origin(["a", "b"], (48, 36), "farneback")
    write_checkpoint(str(tmp_path), checkpoint_content(CONFIG, origin, 6, {}, model=model.state_dict()))
    final = tmp_path / "final" / "model.pt"
    final.parent.mkdir()
    torch.save(model.state_dict(), final)
    stream = TwoStream(("flow",), 2, CONFIG.model)["flow"]
    report = load_weights(stream, final)  # type: ignore[arg-type]
    assert not report.fresh and report.flow_method == "farneback"  # the run's checkpoints say so
    flip_a_bit(final)
    with pytest.raises(UserError, match=r"model\.pt: a damaged archive"):
        load_weights(stream, final)  # type: ignore[arg-type]
