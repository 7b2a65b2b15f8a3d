"""Files of weights and checkpoints: what is loaded of them, and what is refused in which words."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import tiny_config
from tune_ego.config import ModelConfig
from tune_ego.errors import UserError
from tune_ego.model import Stream, TwoStream, build_stream, load_weights
from tune_ego.model.weights import load_tensors
from tune_ego.training.checkpoint import (
    DamagedCheckpoint,
    Origin,
    checkpoint_content,
    write_checkpoint,
)


def small(modality: str = "rgb", classes: int = 5, depth: int = 1) -> Stream:
    return build_stream(modality, classes, ModelConfig(width=0.05, stam_depth=depth))


def test_published_weights_without_attention_and_with_other_classes(tmp_path: Path) -> None:
    published = small(classes=9, depth=0)
    torch.save({f"module.{name}": value for name, value in published.state_dict().items()}, tmp_path / "w.pt")
    stream = small()
    report = load_weights(stream, tmp_path / "w.pt")
    assert sorted(report.left_out) == ["logits.conv3d.bias", "logits.conv3d.weight"]
    assert report.modules_left_out == ["logits"]
    assert report.fresh_modules == ["attention_inc", "attention_pred", "logits"]
    name = "Mixed_4b.b1b.conv3d.weight"
    assert name in report.loaded
    assert torch.equal(stream.state_dict()[name], published.state_dict()[name])


def test_attention_is_left_out_only_where_the_stream_has_none(tmp_path: Path) -> None:
    torch.save(small(depth=2).state_dict(), tmp_path / "deep.pt")
    report = load_weights(small(depth=0), tmp_path / "deep.pt")
    assert report.modules_left_out == ["attention_inc", "attention_inc_2", "attention_pred"] and not report.fresh
    with pytest.raises(UserError, match=r"unknown \(first attention_inc_2\."):
        load_weights(small(depth=1), tmp_path / "deep.pt")
    torch.save(small(depth=1).state_dict(), tmp_path / "shallow.pt")
    report = load_weights(small(depth=2), tmp_path / "shallow.pt")
    assert report.fresh_modules == ["attention_inc_2"] and not report.left_out


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module."])
@pytest.mark.parametrize("key", [None, "model", "state_dict", "model_state_dict"])
def test_weights_lie_at_the_top_or_under_model_or_state_dict(tmp_path: Path, key: str | None, prefix: str) -> None:
    """Files in the forms of published trainers, with other things beside; counters of batches may be absent."""
    theirs = small().state_dict()
    state = {prefix + name: value for name, value in theirs.items() if not name.endswith("num_batches_tracked")}
    torch.save(state if key is None else {"epoch": 3, key: state, "best": 0.5}, tmp_path / "w.pt")
    stream = small()
    report = load_weights(stream, tmp_path / "w.pt")
    assert report.loaded == sorted(name.removeprefix(prefix) for name in state)
    assert (report.left_out, report.fresh, report.flow_method) == ([], [], None)
    assert all(torch.equal(value, theirs[name]) for name, value in stream.state_dict().items())


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"depth": 18, "name": "i3d"}, "state_dict": "weights"},
        {"model": {}, "model_state_dict": {"model": "weights"}},
        {"state_dict": {"epoch": 3, "model": "weights"}},
    ],
    ids=["a configuration beside", "an empty one beside", "nested"],
)
def test_a_container_without_tensors_is_passed_over(tmp_path: Path, content: dict[str, Any]) -> None:
    theirs = small().state_dict()

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items()}
        return theirs if value == "weights" else value

    torch.save(filled(content), tmp_path / "w.pt")
    stream = small()
    load_weights(stream, tmp_path / "w.pt")
    assert all(torch.equal(value, theirs[name]) for name, value in stream.state_dict().items())


def test_the_counter_of_averaged_weights_and_prefixes_within_streams(tmp_path: Path) -> None:
    """`torch.optim.swa_utils.AveragedModel`, and streams each in DistributedDataParallel."""
    model = TwoStream(("rgb", "flow"), 5, ModelConfig(width=0.05))
    torch.save(torch.optim.swa_utils.AveragedModel(model["flow"]).state_dict(), tmp_path / "averaged.pt")
    inside = {
        f"{modality}.module.{name}": value
        for modality in ("rgb", "flow")
        for name, value in model[modality].state_dict().items()
    }
    torch.save(inside, tmp_path / "inside.pt")
    for file in ("averaged.pt", "inside.pt"):
        stream = small("flow")
        load_weights(stream, tmp_path / file)
        assert all(torch.equal(value, model["flow"].state_dict()[name]) for name, value in stream.state_dict().items())


def test_arrays_of_numpy_are_weights_and_scalars_become_those_of_python(tmp_path: Path) -> None:
    theirs = small().state_dict()
    arrays = {name: value.numpy().astype(">f4") if value.ndim else value.numpy() for name, value in theirs.items()}
    (tmp_path / "w.pt").write_bytes(saved({"best": np.float64(0.5), "state_dict": arrays}, zipped=True))
    stream = small()
    load_weights(stream, tmp_path / "w.pt")
    assert all(torch.equal(value, theirs[name]) for name, value in stream.state_dict().items())
    best = load_tensors(tmp_path / "w.pt")["best"]
    assert type(best) is float and best == 0.5


@pytest.mark.parametrize("modality", ["rgb", "flow"])
def test_a_stream_takes_its_own_part_of_a_checkpoint_of_two(tmp_path: Path, modality: str) -> None:
    config = tiny_config()
    model = TwoStream(("rgb", "flow"), 2, config.model)
    content = checkpoint_content(config, Origin(["a", "b"], (48, 36), "tvl1"), 7, {}, model=model.state_dict())
    torch.save(content, tmp_path / "both.pt")
    stream = build_stream(modality, 2, config.model)
    report = load_weights(stream, tmp_path / "both.pt")
    assert not report.left_out and not report.fresh and report.flow_method == "tvl1"
    theirs = model[modality].state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in stream.state_dict().items())
    other = "flow" if modality == "rgb" else "rgb"
    alone = {name: value for name, value in model.state_dict().items() if name.startswith(f"{other}.")}
    torch.save({**content, "model": alone}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=f"other.pt: holds no {modality} stream$"):
        load_weights(stream, tmp_path / "other.pt")


def test_counters_of_batches_are_loaded_where_they_are(tmp_path: Path) -> None:
    state = small().state_dict()
    state["Conv3d_1a_7x7.bn.num_batches_tracked"] = torch.tensor(41)
    torch.save(state, tmp_path / "w.pt")
    stream = small()
    load_weights(stream, tmp_path / "w.pt")
    assert stream.get_buffer("Conv3d_1a_7x7.bn.num_batches_tracked").item() == 41


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["logits.conv3d.bias", "Mixed_5c.b0.bn.running_var", "Conv3d_1a_7x7.conv3d.weight"])
def test_one_value_that_is_not_finite_is_refused(tmp_path: Path, name: str, value: float) -> None:
    state = small().state_dict()
    state[name].view(-1)[-1] = value
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=rf"w\.pt: {re.escape(name)} holds values that are not finite"):
        load_weights(small(), tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("attention_pred.conv3d.weight", r"1 absent \(first attention_pred\.conv3d\.weight"),
        ("attention_inc.b0.bn.weight", r"1 absent \(first attention_inc\.b0\.bn\.weight"),
        ("logits.conv3d.bias", r"1 absent \(first logits\.conv3d\.bias"),
    ],
)
def test_weights_with_a_hole_are_refused(tmp_path: Path, change: str, reason: str) -> None:
    state = small().state_dict()
    del state[change]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=reason):
        load_weights(small(), tmp_path / "w.pt")


@pytest.mark.parametrize("shape", [(9, 7, 1, 1, 1), (9, 50, 3, 1, 1), (8, 50, 1, 1, 1), (9, 50)])
def test_a_classifier_of_another_shape_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    state = small().state_dict()
    assert state["logits.conv3d.weight"].shape == (5, 50, 1, 1, 1)
    state.update({"logits.conv3d.weight": torch.zeros(shape), "logits.conv3d.bias": torch.zeros(9)})
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"logits\.conv3d\.(weight|bias) is \("):
        load_weights(small(), tmp_path / "w.pt")


def test_weights_of_the_other_modality_are_refused(tmp_path: Path) -> None:
    torch.save(small("flow").state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"Conv3d_1a_7x7\.conv3d\.weight.*\(3, 2, 7, 7, 7\).*\(3, 3, 7, 7, 7\)"):
        load_weights(small("rgb"), tmp_path / "w.pt")


def test_copy_init_copies_the_first_block_unless_a_file_has_the_others(tmp_path: Path) -> None:
    model = ModelConfig(width=0.05, stam_depth=3, copy_init=True)

    def blocks(stream: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
        return [
            {key.partition(".")[2]: value for key, value in stream.state_dict().items() if key.startswith(f"{name}.")}
            for name in ("attention_inc", "attention_inc_2", "attention_inc_3")
        ]

    def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(value, other[key]) for key, value in one.items())

    first, second, third = blocks(build_stream("rgb", 5, model))
    assert same(first, second) and same(first, third)
    first, second, _ = blocks(build_stream("rgb", 5, model.model_copy(update={"copy_init": False})))
    assert not same(first, second)
    torch.save(small(depth=2).state_dict(), tmp_path / "two.pt")
    stream = build_stream("rgb", 5, model)
    load_weights(stream, tmp_path / "two.pt")
    loaded = load_tensors(tmp_path / "two.pt")
    first, second, third = blocks(stream)
    assert torch.equal(first["b0.conv3d.weight"], loaded["attention_inc.b0.conv3d.weight"])
    assert torch.equal(second["b0.conv3d.weight"], loaded["attention_inc_2.b0.conv3d.weight"])
    assert same(first, third) and not same(first, second)


class Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('this ran')",))  # Ray replaces print


class RunsInShell:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("echo this ran",))


def saved(content: object, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def scripted() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(lambda x: x + 1, torch.ones(1)), buffer)
    return buffer.getvalue()


def another_archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "no weights")
    return buffer.getvalue()


def with_a_flipped_bit(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "beside",
    [
        np.float64(0.5),
        np.float32(0.5),
        np.int64(3),
        np.bool_(True),
        np.str_("a"),
        np.arange(3),
        np.ones((2, 2), np.float16),
        np.array(["a", "bc"]),
        {"nested": [np.float64(1), (np.int32(2),)]},
    ],
    ids=str,
)
def test_numbers_and_arrays_of_numpy_beside_the_weights_are_no_code(
    tmp_path: Path, beside: object, zipped: bool
) -> None:
    theirs = small().state_dict()
    (tmp_path / "w.pt").write_bytes(saved({"best": beside, "state_dict": theirs}, zipped=zipped))
    stream = small()
    load_weights(stream, tmp_path / "w.pt")
    assert all(torch.equal(value, theirs[name]) for name, value in stream.state_dict().items())


def test_the_names_of_numpy_before_its_second_version_are_known(tmp_path: Path) -> None:
    data = saved({"best": np.float64(0.5), "state_dict": small().state_dict()}, zipped=False)
    renamed = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert renamed != data or np.__version__.startswith("1.")
    (tmp_path / "w.pt").write_bytes(renamed)
    load_weights(small(), tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:'torch.load' received")
@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: saved({"a": RunsInShell()}), "it holds code (posix.system), not only tensors: refused"),
        (lambda: saved({"a": RunsInShell()}, zipped=False), "it holds code (posix.system), not only tensors: refused"),
        (lambda: saved({"a": Runs()}), "it holds code (exec), not only tensors: refused"),
        (lambda: saved(torch.nn.Linear(1, 1)), "it holds code (torch.nn.modules.linear.Linear), not only tensors"),
        (lambda: saved({"a": np.array([Runs()], dtype=object)}), "it holds"),
        (lambda: saved({"a": np.array([{}], dtype=object)}), "it holds more than tensors"),
        (scripted, "it holds code (TorchScript), not only tensors: refused"),
        (lambda: saved({"a": torch.ones(5000)})[:5000], "a truncated or damaged archive"),
        (lambda: saved({"a": torch.ones(5000)}, zipped=False)[:5000], "a truncated or damaged archive"),
        (lambda: with_a_flipped_bit(saved({"a": torch.ones(5000)})), "a damaged archive: archive/data/0 is not what"),
        (another_archive, "not a torch file, but another zip archive"),
        (lambda: b"hello", "not a torch file"),
        (lambda: b"", "not a torch file"),
        (lambda: pickle.dumps([1]), "not a torch file"),
    ],
)
def test_files_that_are_no_weights_are_refused_with_the_reason(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], made: Callable[[], bytes], words: str
) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(made())
    with pytest.raises(UserError) as caught:
        load_weights(small(), path)
    text = str(caught.value)
    assert text.startswith(f"{path}: {words}") and len(text) < len(str(path)) + 120
    assert text.isprintable() and "weights_only" not in text and "safe_globals" not in text
    assert caught.value.__cause__ is None
    assert "this ran" not in capfd.readouterr().out


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.pt: cannot be read"):
        load_weights(small(), tmp_path / "absent.pt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value.to_sparse(), "of layout sparse_coo, not dense"),
        (lambda value: value.to("meta"), "a tensor without values (on the meta device)"),
        (lambda value: value.to(torch.complex64), "of type complex64, not of real numbers"),
        (lambda value: value.to(torch.int32), "of type int32, not floating point"),
        (lambda value: torch.full_like(value, torch.nan), "holds values that are not finite"),
        (lambda value: value.double() + 1e300, "holds values that are not finite"),  # in the model's float32
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tensor_that_cannot_be_loaded_changes_nothing(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], words: str
) -> None:
    name = "logits.conv3d.bias"  # the last one: all others would be loaded before it
    torch.save({**small().state_dict(), name: change(torch.ones(5))}, tmp_path / "w.pt")
    stream = small()
    before = {key: value.clone() for key, value in stream.state_dict().items()}
    with pytest.raises(UserError, match=rf"w\.pt: {re.escape(name)} (is )?{re.escape(words)}"):
        load_weights(stream, tmp_path / "w.pt")
    assert all(torch.equal(value, before[key]) for key, value in stream.state_dict().items())


def test_only_blocks_after_the_file_s_last_one_start_fresh(tmp_path: Path) -> None:
    state = small(depth=3).state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith("attention_inc_2.")}, tmp_path / "hole.pt")
    torch.save({k: v for k, v in state.items() if not k.startswith("attention_inc")}, tmp_path / "no_block.pt")
    torch.save({k: v for k, v in state.items() if not k.startswith("attention_inc_3.")}, tmp_path / "two.pt")
    with pytest.raises(UserError, match=r"absent \(first attention_inc_2\.b0"):
        load_weights(small(depth=3), tmp_path / "hole.pt")
    with pytest.raises(UserError, match=r"absent \(first attention_inc\.b0"):
        load_weights(small(depth=3), tmp_path / "no_block.pt")
    assert load_weights(small(depth=4), tmp_path / "two.pt").fresh_modules == ["attention_inc_3", "attention_inc_4"]


def test_attention_of_other_blocks_names_stam_block(tmp_path: Path) -> None:
    streams = {
        block: build_stream("rgb", 5, ModelConfig.model_validate({"width": 0.05, "stam_block": block}))
        for block in ("inception", "attention")
    }
    for theirs, ours in (("inception", "attention"), ("attention", "inception")):
        torch.save(streams[theirs].state_dict(), tmp_path / "w.pt")
        with pytest.raises(UserError, match=rf"attention_.*, its attention has model\.stam_block: {theirs}$"):
            load_weights(streams[ours], tmp_path / "w.pt")


def test_the_other_modality_is_guessed_by_the_channels_alone(tmp_path: Path) -> None:
    torch.save(build_stream("rgb", 5, ModelConfig(width=0.1)).state_dict(), tmp_path / "wide.pt")
    for path, modality, guessed in ((tmp_path / "wide.pt", "rgb", False), (tmp_path / "flow.pt", "rgb", True)):
        torch.save(small("flow").state_dict(), tmp_path / "flow.pt")
        with pytest.raises(UserError, match=r"Conv3d_1a_7x7\.conv3d\.weight is \(") as caught:
            load_weights(small(modality), path)
        assert str(caught.value).endswith("(weights of the other modality?)") == guessed


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda state: {"epoch": 3, "net": state}, r"not a state dict of tensors.* its keys: epoch, net$"),
        (lambda state: [state], r"not a state dict of tensors but a list"),
        (lambda state: {}, r"its keys: none"),
        (lambda state: dict.fromkeys("abcdefg", 1), r"its keys: a, b, c, d, e, \.\.\.$"),
        (lambda state: {"a\x1b[1m": 1}, r"its keys: 'a\\x1b\[1m'$"),
        (
            lambda state: {**state, "module.logits.conv3d.bias": state["logits.conv3d.bias"]},
            r"holds logits\.conv3d\.bias twice, once as module\.logits",
        ),
    ],
)
def test_files_of_another_make_are_refused(tmp_path: Path, wrap: Callable[[Any], object], words: str) -> None:
    torch.save(wrap(small().state_dict()), tmp_path / "w.pt")
    with pytest.raises(UserError, match=words):
        load_weights(small(), tmp_path / "w.pt")


def test_a_checkpoint_is_held_against_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(streams="rgb")
    model = TwoStream(("rgb",), 2, config.model)
    write_checkpoint(
        str(tmp_path), checkpoint_content(config, Origin(["a", "b"], (48, 36), "dis"), 7, {}, model=model.state_dict())
    )
    file = tmp_path / "iteration-000007/checkpoint.pt"
    stream = build_stream("rgb", 2, config.model)
    load_weights(stream, file)
    monkeypatch.chdir(file.parent)
    load_weights(stream, "checkpoint.pt")
    assert torch.equal(stream.state_dict()["logits.conv3d.weight"], model.state_dict()["rgb.logits.conv3d.weight"])
    content = torch.load(file, weights_only=True)
    content["model"]["rgb.logits.conv3d.bias"] += 1
    torch.save(content, file)  # a whole file, but not the one that was written
    for path in (file, "checkpoint.pt"):
        with pytest.raises(DamagedCheckpoint, match="damaged, its content does not match its checksum"):
            load_weights(stream, path)
    torch.save(content, file.with_name("other.pt"))  # the checksum is not this file's
    load_weights(stream, file.with_name("other.pt"))
