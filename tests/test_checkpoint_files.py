"""Which file a folder means, and what of it is whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import tiny_config
from tune_ego.checkpoint import Origin, pack, write_checkpoint
from tune_ego.checkpoint_files import find_checkpoint, run_of
from tune_ego.errors import UserError
from tune_ego.model import TwoStream, load_weights

CONFIG = tiny_config()


def save(run: Path, iteration: int) -> Path:
    model = TwoStream(("rgb", "flow"), 2, CONFIG.model)
    origin = Origin(["a", "b"], (48, 36), "farneback")
    write_checkpoint(str(run), pack(CONFIG, origin, iteration, {}, model=model.state_dict()), keep=[10])
    return run / f"iteration-{iteration:06d}" / "checkpoint.pt"


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_folder_means_its_last_whole_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    first, second, third = (save(run, iteration) for iteration in (10, 20, 30))
    assert find_checkpoint(str(run)) == str(third)
    assert not capsys.readouterr().out
    damage(third)
    assert find_checkpoint(str(run)) == str(second)
    assert f"{third}: damaged, it is not what was written; going back to the one before" in capsys.readouterr().out
    assert find_checkpoint(str(second.parent)) == find_checkpoint(str(second)) == str(second)
    assert find_checkpoint(str(tmp_path / "absent.pt")) == str(tmp_path / "absent.pt")
    for file in (first, second):
        damage(file)
    with pytest.raises(UserError, match="no whole checkpoint in this folder; give a run"):
        find_checkpoint(str(run))


def test_a_run_that_has_ended_means_its_final_weights(tmp_path: Path) -> None:
    run = tmp_path / "run"
    saved, final = save(run, 6), run / "final" / "model.pt"
    final.parent.mkdir()
    content = torch.load(saved, weights_only=True)
    torch.save(content["model"], final)
    assert find_checkpoint(str(run)) == str(final)
    assert run_of(str(final)) == run_of(str(saved)) == str(run)
    assert run_of(str(tmp_path / "apart/checkpoint.pt")) == str(tmp_path / "apart")
    stream = TwoStream(("flow",), 2, CONFIG.model)["flow"]
    report = load_weights(stream, final)  # type: ignore[arg-type]
    assert not report.fresh and report.flow_method == "farneback"  # the run's checkpoints say so
    damage(final)
    with pytest.raises(UserError, match=r"model\.pt: a damaged archive"):
        load_weights(stream, final)  # type: ignore[arg-type]
