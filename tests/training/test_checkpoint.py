"""A checkpoint's content, the copies of it, which ones stay, and the mean of several: no Ray, no training."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.conftest import tiny_config
from tune_ego import __version__
from tune_ego.errors import UserError
from tune_ego.model import TwoStream
from tune_ego.results.checkpoint_files import checkpoint_iterations
from tune_ego.training.checkpoint import (
    Origin,
    check_content,
    checkpoint_content,
    last_checkpoint,
    load_model_state,
    mean_weights,
    read_checkpoint,
    rebuild,
    snapshot,
    to_bytes,
    write_checkpoint,
)
from tune_ego.training.trainer import Trainer

CONFIG = tiny_config(streams="rgb")
ORIGIN = Origin(["Cut onion", "Open fridge"], (320, 240), "farneback")


def content(iteration: int, best: int | None = None, **weights: torch.Tensor) -> dict[str, Any]:
    return checkpoint_content(CONFIG, ORIGIN, iteration, {} if best is None else {"iteration": best}, model=weights)


def test_a_checkpoint_says_what_it_is_of() -> None:
    losses = [torch.ones(1, 3)]
    packed = checkpoint_content(CONFIG, ORIGIN, 40, {"iteration": 20}, model={}, losses=losses)
    assert packed == {
        "format": 3,
        "version": __version__,
        "config": CONFIG.model_dump(mode="json"),
        "actions": ["Cut onion", "Open fridge"],
        "image_size": [320, 240],
        "flow_method": "farneback",
        "iteration": 40,
        "best": {"iteration": 20},
        "model": {},
        "losses": losses,
    }


class Pair(NamedTuple):
    first: torch.Tensor
    second: str


def test_a_snapshot_keeps_its_values_while_training_goes_on() -> None:
    """Every tensor, however deep in dicts, lists and tuples; without its gradient, and laid out as it was."""
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    buffer, counter = torch.tensor([3.0]), torch.tensor(7)
    threads = torch.get_num_threads()
    copy = snapshot({"model": {"w": weight}, "list": [buffer, "text"], "tuple": (counter, 5), 3: None})
    with torch.no_grad():
        for value in (weight, buffer, counter):
            value += 100
    assert torch.equal(copy["model"]["w"], torch.tensor([1.0, 2.0])) and not copy["model"]["w"].requires_grad
    assert copy["list"] == [torch.tensor([3.0]), "text"] and isinstance(copy["list"], list)
    assert copy["tuple"] == (torch.tensor(7), 5) and isinstance(copy["tuple"], tuple)
    assert copy[3] is None and list(copy) == ["model", "list", "tuple", 3]
    assert torch.get_num_threads() == threads


def test_the_threads_come_back_where_a_snapshot_fails() -> None:
    torch.set_num_threads(2)
    with pytest.raises(TypeError):
        snapshot(Pair(torch.ones(1), "x"))  # a named tuple takes no iterator
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("best", "keep", "stay"),
    [
        (None, [], [30, 40]),
        (10, [], [10, 30, 40]),
        (40, [], [30, 40]),
        (10, [20], [10, 20, 30, 40]),
        (None, [20, 50], [20, 30, 40]),
    ],
)
def test_the_last_two_the_best_and_those_asked_for_stay(
    tmp_path: Path, best: int | None, keep: list[int], stay: list[int]
) -> None:
    run = str(tmp_path)
    for iteration in (10, 20, 30):
        write_checkpoint(run, content(iteration, best), keep=[10, 20, 30])
    write_checkpoint(run, content(40, best), keep)
    assert checkpoint_iterations(run) == stay
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"iteration-{n:06d}" for n in stay]


def test_a_checkpoint_of_a_later_iteration_goes_when_an_earlier_one_is_written_again(tmp_path: Path) -> None:
    """A run that went back to iteration 20 for damage: 40 is not of its history."""
    for iteration in (10, 20, 40):
        write_checkpoint(str(tmp_path), content(iteration), keep=[10, 20])
    write_checkpoint(str(tmp_path), content(30))
    assert checkpoint_iterations(str(tmp_path)) == [20, 30]


def test_the_last_checkpoint_is_read_back_with_its_uri(tmp_path: Path) -> None:
    assert last_checkpoint(str(tmp_path)) is None
    for iteration in (10, 20):
        write_checkpoint(str(tmp_path), content(iteration, w=torch.tensor([float(iteration)])))
    last = last_checkpoint(str(tmp_path))
    assert last is not None
    assert last[0]["iteration"] == 20 and last[0]["model"]["w"].item() == 20
    file = str(tmp_path / "iteration-000020/checkpoint.pt")
    assert last[1] == file
    for place in (file, str(tmp_path / "iteration-000020")):
        assert read_checkpoint(place)["iteration"] == 20
    with pytest.raises(UserError, match="iteration-000030: there is no checkpoint here"):
        read_checkpoint(str(tmp_path / "iteration-000030"))


def test_the_mean_of_weights_and_the_last_counters(tmp_path: Path) -> None:
    """(1 + 2 + 6) / 3 = 3, (0 + 0 + 3) / 3 = 1; running statistics are averaged as weights are."""
    rows = {10: (1.0, 0.0, 4.0, 10), 20: (2.0, 0.0, 5.0, 20), 30: (6.0, 3.0, 9.0, 30)}
    for iteration, (first, second, mean, count) in rows.items():
        weights = {"w": torch.tensor([first, second]), "bn.running_mean": torch.tensor([mean]).half()}
        counter = {"bn.num_batches_tracked": torch.tensor(count)}
        write_checkpoint(str(tmp_path), content(iteration, None, **weights, **counter), keep=rows)
    averaged = mean_weights(str(tmp_path), [10, 20, 30])
    assert list(averaged) == ["w", "bn.running_mean", "bn.num_batches_tracked"]
    assert torch.equal(averaged["w"], torch.tensor([3.0, 1.0]))
    assert averaged["bn.running_mean"].dtype == torch.float16 and averaged["bn.running_mean"].item() == 6
    assert averaged["bn.num_batches_tracked"].item() == 30
    assert averaged["bn.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(mean_weights(str(tmp_path), [10, 20])["w"], torch.tensor([1.5, 0.0]))


def test_the_mean_is_taken_in_float64(tmp_path: Path) -> None:
    """(2^24 + 1 + 1) / 3 = 5592406 in float64; float32 has no 2^24 + 1 and gives less."""
    for iteration, value in ((10, 2.0**24), (20, 1.0), (30, 1.0)):
        write_checkpoint(str(tmp_path), content(iteration, w=torch.tensor([value])), keep=[10, 20, 30])
    assert mean_weights(str(tmp_path), [10, 20, 30])["w"].item() == 5592406.0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "^c: not a checkpoint of tune_ego$"),
        ({"format": 3}, "^c: not a checkpoint of tune_ego$"),
        ({"model": {}}, "^c: not a checkpoint of tune_ego$"),
        ({"model": {}, "format": 2}, "^c: a checkpoint of format 2; this tune_ego reads format 3$"),
        ({"model": {}, "format": 4}, "^c: a checkpoint of format 4; this tune_ego reads format 3$"),
        ({"model": {}, "format": 3}, "^c: a damaged checkpoint: it has no config$"),
        ({**content(1), "image_size": [320, 0]}, r"its image_size is \[320, 0\], not width and height$"),
        ({**content(1), "image_size": [320, 240, 3]}, r"its image_size is \[320, 240, 3\], not width and height$"),
        ({**content(1), "actions": ["a", 2]}, "its actions are not names$"),
        ({**content(1), "best": None}, "its best is a NoneType, not a dict$"),
    ],
)
def test_what_is_no_checkpoint_of_ours_is_refused(value: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_content(value, "c")


def test_a_checkpoint_to_look_at_needs_no_optimizers_but_one_to_train_from_does() -> None:
    check_content(content(1), "c")
    with pytest.raises(UserError, match="c: a damaged checkpoint: it has no losses"):
        check_content(content(1), "c", CONFIG)
    whole: dict[str, Any] = {"optimizer": {}, "schedule": {}, "scaler": {}}
    check_content({**content(1), "losses": [], "optimizers": {"rgb": whole}}, "c", CONFIG)
    with pytest.raises(UserError, match=r"c: a damaged checkpoint: it has no optimizers\.rgb$"):
        check_content({**content(1), "losses": [], "optimizers": {"flow": whole}}, "c", CONFIG)
    without: dict[str, Any] = {"optimizer": {}, "schedule": {}}
    with pytest.raises(UserError, match=r"c: a damaged checkpoint: it has no optimizers\.rgb\.scaler"):
        check_content({**content(1), "losses": [], "optimizers": {"rgb": without}}, "c", CONFIG)


def test_the_model_s_state_includes_its_running_statistics() -> None:
    """Without one of them, or with one too many, it is the state of another model."""
    model = TwoStream(("rgb",), 2, CONFIG.model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    name = "rgb.Conv3d_1a_7x7.bn.running_mean"
    state[name] = torch.full_like(state[name], 0.25)
    load_model_state(model, state, "c")
    assert torch.equal(model.get_buffer(name), torch.full_like(state[name], 0.25))
    with pytest.raises(
        UserError, match=r"another model: rgb\.Conv3d_1a_7x7\.bn\.running_mean is absent in the checkpoint, \(3,\)"
    ):
        load_model_state(model, {key: value for key, value in state.items() if key != name}, "c")
    with pytest.raises(UserError, match=r"another model: rgb\.more is \(1,\) in the checkpoint, absent in this model"):
        load_model_state(model, {**state, "rgb.more": torch.ones(1)}, "c")


def test_a_checkpoint_rebuilds_its_model_and_refuses_another(tmp_path: Path) -> None:
    config = tiny_config()
    origin = Origin(["a", "b"], (48, 36), "dis")
    model = TwoStream(config.stream_names, 2, config.model)
    content = checkpoint_content(config, origin, 7, {}, model=model.state_dict())
    (tmp_path / "checkpoint.pt").write_bytes(to_bytes(content))
    loaded = read_checkpoint(str(tmp_path))
    again_config, again_origin, again = rebuild(loaded, "c")
    assert (again_config, again_origin) == (config, origin)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    loaded["model"]["rgb.logits.conv3d.bias"] = "text"
    with pytest.raises(
        UserError, match=r"another model: rgb\.logits\.conv3d\.bias is absent in the checkpoint, \(2,\) in"
    ):
        rebuild(loaded, "c")
    loaded["model"] = model.state_dict()
    loaded["config"]["model"]["stam_depth"] = 2
    with pytest.raises(UserError, match=r"another model: flow\.attention_inc_2.*absent"):
        rebuild(loaded, "c")


def remove(content: dict[str, Any], key: str) -> None:
    del content[key]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: remove(content, "actions"), "it has no actions"),
        (lambda content: content.update(actions=[]), "its actions are not names"),
        (lambda content: content.update(actions=[1, 2]), "its actions are not names"),
        (lambda content: content.update(model=[]), "its model is a list, not a dict"),
        (lambda content: content.update(config=None), "its config is a NoneType, not a dict"),
        (lambda content: content.update(config={"seed": "x"}), "seed"),
        (lambda content: content.update(image_size=None), "its image_size is a NoneType, not a list"),
        (lambda content: content.update(image_size=[4]), r"its image_size is \[4\], not width and height"),
        (lambda content: content.update(flow_method=3), "its flow_method is a int, not a str"),
        (lambda content: content.update(iteration="7"), "its iteration is a str, not a int"),
        (lambda content: content["model"].update({3: torch.ones(1)}), "no state dict of a model"),
        (lambda content: content["model"].update({"rgb.logits.conv3d.bias": torch.ones(2).to_sparse()}), "sparse_coo"),
        (lambda content: remove(content, "optimizers"), "it has no optimizers"),
        (lambda content: content.update(losses=[1.0]), "its losses are not tensors"),
        (lambda content: content["optimizers"].update(rgb=None), r"its optimizers\.rgb is a NoneType, not a dict"),
        (lambda content: remove(content["optimizers"]["rgb"], "schedule"), r"it has no optimizers\.rgb\.schedule"),
        (lambda content: remove(content["optimizers"]["rgb"]["schedule"], "steps"), "not a state of the rgb stream's"),
        (lambda content: remove(content["optimizers"]["rgb"]["optimizer"], "state"), "not a state of the rgb stream's"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_malformed_checkpoint_is_refused_by_key(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None], words: str
) -> None:
    trainer = Trainer(tiny_config(streams="rgb"), Origin(["a", "b"], (48, 36), "dis"), torch.device("cpu"))
    content = torch.load(io.BytesIO(to_bytes(trainer.checkpoint())), weights_only=True)
    trainer.load(content, "whole")
    damage(content)
    (tmp_path / "checkpoint.pt").write_bytes(to_bytes(content))
    with pytest.raises(UserError, match=words):
        trainer.load(content, "c")
    if "optimizers" not in words and "losses" not in words and "stream's" not in words:
        with pytest.raises(UserError, match=words):
            rebuild(read_checkpoint(str(tmp_path)), "c")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer__name": "sgd"}, r"c: a checkpoint of a run with optimizer\.name: ranger, not sgd"),
        ({"schedule__name": "cosine"}, r"c: a checkpoint of a run with schedule\.name: plateau, not cosine"),
    ],
)
def test_a_run_goes_on_with_its_own_optimizer_and_schedule_alone(changes: dict[str, Any], words: str) -> None:
    origin = Origin(["a", "b"], (48, 36), "dis")
    content = Trainer(tiny_config(streams="rgb"), origin, torch.device("cpu")).checkpoint()
    config = tiny_config(streams="rgb", **changes)
    check_content(content, "c")
    with pytest.raises(UserError, match=words):
        Trainer(config, origin, torch.device("cpu")).load(content, "c")


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (Origin(["b", "a"], (48, 36), "dis"), "c: its class 0 is 'a', that of the shards is 'b'"),
        (Origin(["a", "b"], (36, 48), "dis"), r"c: trained on \(48, 36\) images, the shards has \(36, 48\)"),
        (Origin(["a", "b"], (48, 36), "raft"), "c: trained on dis flow, the shards has raft"),
    ],
)
def test_a_run_does_not_resume_on_shards_of_another_kind(there: Origin, message: str) -> None:
    """Shards that were made again at the same place."""
    trainers = [
        Trainer(tiny_config(), origin, torch.device("cpu"), 0)
        for origin in (Origin(["a", "b"], (48, 36), "dis"), there)
    ]
    content = trainers[0].checkpoint()
    trainers[0].load(content, "c")
    with pytest.raises(UserError, match=message):
        trainers[1].load(content, "c")
