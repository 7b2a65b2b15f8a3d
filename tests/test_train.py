"""The training loop without Ray."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY, tiny_config
from tune_ego.checkpoint import Origin, read_checkpoint, to_bytes
from tune_ego.config import Config, override_config
from tune_ego.dataset.shards import open_shards
from tune_ego.errors import UserError
from tune_ego.experiment import METRIC, TIMES
from tune_ego.feed.batches import on_device
from tune_ego.feed.plan import FeedPlan, read_items
from tune_ego.hardware import autocast_dtype
from tune_ego.search_space import load_space
from tune_ego.train import NonFiniteLoss, Notice, Trainer, train

CPU = torch.device("cpu")


def origin(shards: str) -> Origin:
    data = open_shards(shards)
    return Origin(data.actions, data.image_size, "dis")


def run(
    config: Config, shards: str, content: dict[str, Any] | None = None, notice: Notice = Notice.NONE
) -> tuple[Trainer, list[dict[str, Any]], list[Any]]:
    """(trainer at the end, metrics, checkpoints as they were when reported)."""
    trainer = Trainer(config, origin(shards), CPU)
    if content is not None:
        trainer.load(content, "test")
    plan = FeedPlan.of(shards, config, 1, 0)
    lines, checkpoints = [], []

    def report(metrics: dict[str, Any] | None, checkpoint: dict[str, Any] | None) -> None:
        if metrics is not None:
            lines.append({key: value for key, value in metrics.items() if key not in TIMES})
        if checkpoint is not None:
            checkpoints.append(to_bytes(checkpoint))

    items = range(plan.first_item(trainer.iteration), plan.items)
    train(trainer, plan, on_device(read_items(plan, items), CPU), report, lambda: notice)
    return trainer, lines, checkpoints


def test_a_run_that_was_stopped_between_two_validations_ends_as_one_that_was_not(shards: str) -> None:
    """After every iteration, also between two lines of the log: a stop, a checkpoint, and another process goes on."""
    config = tiny_config(train__iterations=9, train__validate_every=6, train__log_every=4, train__accumulate=2)
    whole, lines, _ = run(config, shards)
    assert [line["iteration"] for line in lines] == [4, 6, 8, 9]
    content, stopped = None, []
    for iteration in range(1, 10):
        trainer, more, checkpoints = run(config, shards, content, Notice.STOP)
        assert trainer.iteration == iteration and len(checkpoints) == 1
        content = torch.load(io.BytesIO(checkpoints[0]), weights_only=True)
        stopped += more
    assert stopped == lines
    state = whole.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in trainer.model.state_dict().items())
    _, _, checkpoints = run(config, shards, None, Notice.SAVE)
    assert len(checkpoints) == 9


@pytest.mark.parametrize("schedule", ["plateau", "multistep"])
@pytest.mark.parametrize("optimizer", ["ranger", "sgd"])
def test_a_resumed_run_equals_one_that_was_not(
    shards: str, optimizer: str, schedule: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = tiny_config(optimizer__name=optimizer, schedule__name=schedule, train__accumulate=2)
    if schedule == "multistep":
        config = config.model_copy(update={"schedule": config.schedule.model_copy(update={"milestones": (3, 5)})})
    whole, lines, checkpoints = run(config, shards)
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["iteration"] for line in lines if METRIC in line] == [2, 4, 6]
    for place, content in enumerate(checkpoints):
        folder = tmp_path_factory.mktemp("checkpoint")
        (folder / "checkpoint.pt").write_bytes(content)
        resumed, more, _ = run(config, shards, read_checkpoint(str(folder)))
        assert more == lines[2 * (place + 1) :]
        state = resumed.model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in whole.model.state_dict().items())


@pytest.mark.parametrize("optimizer", ["ranger", "sgd"])
def test_one_batch_is_learnt_by_heart(shards: str, optimizer: str) -> None:
    config = tiny_config(
        train__batch_size=8, model__width=0.15, model__dropout=0.0, optimizer__name=optimizer, optimizer__lr=0.01
    )
    trainer = Trainer(config, origin(shards), CPU)
    plan = FeedPlan.of(shards, config, 1, 0)
    batches = itertools.repeat(next(on_device(read_items(plan, [0]), CPU)))
    losses = [trainer.step(batches)[:, 0].sum().item() for _ in range(90)]
    assert losses[-1] < 0.6 * losses[0]


def test_the_best_validation_is_kept(shards: str) -> None:
    trainer, lines, _ = run(tiny_config(), shards)
    assert trainer.best[METRIC] == max(line[METRIC] for line in lines if METRIC in line)


@pytest.mark.parametrize("optimizer", ["ranger", "sgd"])
def test_two_streams_at_once_equal_two_runs_to_the_bit(shards: str, optimizer: str) -> None:
    """Weights, what dropout drew, BatchNorm, learning rates, losses and accuracies."""
    changes = {
        "optimizer__name": optimizer,
        "schedule__name": "plateau",
        "schedule__patience": 0,
        "train__accumulate": 2,
        # Of a map of two cells min_max makes 0 and 1, whatever STAM's weights are: they would not move.
        "model__attention_scale": "subtract_min",
    }
    both, lines, _ = run(tiny_config(**changes), shards)
    first = Trainer(tiny_config(**changes), origin(shards), CPU).model.state_dict()
    assert sum(torch.equal(value, first[name]) for name, value in both.model.state_dict().items()) < 20
    for modality in ("rgb", "flow"):
        alone, own_lines, _ = run(tiny_config(**changes, streams=modality), shards)
        state = both.model[modality].state_dict()
        for name, value in alone.model[modality].state_dict().items():
            assert torch.equal(value, state[name]), name
        for line, own in zip(lines, own_lines):
            keys = [key for key in own if key.endswith(modality)]
            assert len(keys) == (4 if METRIC in own else 3)
            assert [line[key] for key in keys] == [own[key] for key in keys]


def test_streams_draw_different_weights_and_masks(shards: str) -> None:
    trainer = Trainer(tiny_config(), origin(shards), CPU)
    state = trainer.model.state_dict()
    name = "Mixed_4b.b1b.conv3d.weight"
    assert not torch.equal(state[f"rgb.{name}"], state[f"flow.{name}"])
    seeds = [trainer._seeds(1, iteration, 0, 0)[modality] for iteration in range(5) for modality in ("rgb", "flow")]
    assert len(set(seeds)) == 10


def test_a_loss_that_is_not_finite_stops_before_the_step(shards: str) -> None:
    config = tiny_config()
    trainer = Trainer(config, origin(shards), CPU)
    with torch.no_grad():
        trainer.model["flow"].logits.conv3d.bias.fill_(torch.nan)  # type: ignore[union-attr,operator]
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    plan = FeedPlan.of(shards, config, 1, 0)
    with pytest.raises(NonFiniteLoss, match=r"iteration 1: action loss of the flow stream is nan"):
        trainer.step(on_device(read_items(plan, range(plan.items)), CPU))
    assert all(
        torch.equal(value, before[name]) or value.isnan().any() for name, value in trainer.model.named_parameters()
    )


def test_mixed_precision_follows_float32(shards: str) -> None:
    """The same start and samples: rounding parts the losses of so small a net, but not by much."""
    losses = {}
    for precision in ("off", "bf16", "fp16"):
        # The other scaling makes zeros and ones of a map of two cells: rounding would turn them about.
        changes = {"optimizer__lr": 1e-3, "train__batch_size": 8, "model__attention_scale": "subtract_min"}
        config = tiny_config(train__precision=precision, **changes)
        trainer = Trainer(config, origin(shards), CPU)
        assert trainer.dtype == {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        for moving in trainer.optimizers.values():
            assert moving.scaler.is_enabled() == (precision == "fp16")
            moving.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=precision == "fp16")
        plan = FeedPlan.of(shards, config, 1, 0)
        batches = itertools.cycle(on_device(read_items(plan, range(plan.first_item(2))), CPU))
        losses[precision] = [trainer.step(batches).sum().item() for _ in range(12)]
        steps = [moving.schedule.state_dict()["steps"] for moving in trainer.optimizers.values()]
        assert steps == [12, 12]  # none was skipped
    for precision, at_first in (("bf16", 0.03), ("fp16", 0.005)):
        assert losses[precision] != losses["off"]
        assert losses[precision][0] == pytest.approx(losses["off"][0], rel=at_first)
        assert sum(losses[precision]) == pytest.approx(sum(losses["off"]), rel=0.06)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_200_iterations_in_16_bits_end_near_float32(shards: str) -> None:
    losses = {}
    for precision in ("off", "bf16", "fp16"):
        changes = {"optimizer__name": "sgd", "optimizer__lr": 1e-3, "model__width": 0.25, "model__dropout": 0.0}
        config = tiny_config(train__precision=precision, train__batch_size=8, **changes)
        device = torch.device("cuda")
        trainer = Trainer(config, origin(shards), device)
        plan = FeedPlan.of(shards, config, 1, 0)
        batches = itertools.cycle(list(on_device(read_items(plan, range(plan.first_item(2))), device)))
        losses[precision] = [trainer.step(batches)[:, 0].sum().item() for _ in range(200)]
    for precision in ("bf16", "fp16"):
        assert sum(losses[precision][-20:]) == pytest.approx(sum(losses["off"][-20:]), rel=0.02)


def test_an_overflow_of_one_stream_skips_that_one_alone(shards: str) -> None:
    config = tiny_config(train__precision="fp16", schedule__name="multistep", schedule__milestones=[1])
    trainer = Trainer(config, origin(shards), CPU)
    for modality, scale in (("rgb", 1.0), ("flow", 2.0**120)):
        trainer.optimizers[modality].scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    plan = FeedPlan.of(shards, config, 1, 0)
    trainer.step(on_device(read_items(plan, range(plan.items)), CPU))
    moved = [name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])]
    assert moved and all(name.startswith("rgb.") for name in moved)
    rate = config.optimizer.lr
    assert trainer.optimizers["flow"].learning_rate == rate
    assert trainer.optimizers["rgb"].learning_rate == pytest.approx(rate / 10)


def test_a_stream_whose_gradients_always_overflow_ends_the_run(shards: str) -> None:
    trainer = Trainer(tiny_config(train__precision="fp16"), origin(shards), CPU)
    plan = FeedPlan.of(shards, trainer.config, 1, 0)
    batches = itertools.cycle(on_device(read_items(plan, range(1)), CPU))
    trainer.optimizers["flow"].scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-24)
    weight = trainer.model.get_parameter("flow.logits.conv3d.weight")
    weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(NonFiniteLoss, match=r"the flow stream: .*every loss scale"):
        trainer.step(batches)


def test_the_first_weights_are_not_needed_to_go_on(shards: str, tmp_path: Path) -> None:
    config = tiny_config(init_from__rgb=str(tmp_path / "gone.pt"))
    with pytest.raises(UserError, match=r"gone\.pt"):
        Trainer(config, origin(shards), CPU)
    assert Trainer(config, origin(shards), CPU, go_on=True).iteration == 0


def test_auto_precision_is_off_on_a_cpu() -> None:
    assert autocast_dtype("auto", CPU) is None


SPACES = sorted((Path(__file__).parents[1] / "search_spaces").glob("*.yaml"))


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_model_of_the_search_spaces_builds_and_trains(shards: str, path: Path) -> None:
    """Each different model that a search space can give, narrow and on small crops."""
    space = load_space(str(path))
    configs = [space.config(sampled) for sampled in space.draws()]
    small = {key: value for key, value in TINY.items() if key.startswith(("data.", "model.width", "train."))}
    models = {}
    for config in configs:
        config = override_config(config, {**small, "train.precision": "off", "compute.workers": 1}, str(path))
        models[repr((config.model, config.streams, config.loss.gaze_weight == 0))] = config
    assert models
    for config in models.values():
        trainer = Trainer(config, origin(shards), CPU)
        plan = FeedPlan.of(shards, config, 1, 0)
        losses = trainer.step(on_device(read_items(plan, range(plan.items)), CPU))
        assert losses.isfinite().all() and trainer.iteration == 1
