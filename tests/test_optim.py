from __future__ import annotations

import copy
import io
import math
import time
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

from tests import literal
from tests.conftest import tiny_config
from tune_ego.config import Config, override_config
from tune_ego.model import build_stream
from tune_ego.optim import Ranger, Schedule, StreamOptimizer, build_optimizer


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("k", "alpha"), [(6, 0.5), (1, 0.3), (4, 1.0)])
def test_ranger_equals_its_formula_with_skipped_steps(k: int, alpha: float, foreach: bool) -> None:
    """The loss scaler skips the steps whose gradients overflowed: they leave nothing, not even a count."""
    torch.manual_seed(0)
    start = torch.randn(7, 3, dtype=torch.float64)
    gradients: list[torch.Tensor | None] = [torch.randn(7, 3, dtype=torch.float64) for _ in range(200)]
    for place in (0, 5, 6, 77, 199):
        gradients[place] = None
    p = torch.nn.Parameter(start.clone())
    optimizer = Ranger([p], lr=1e-2, k=k, alpha=alpha)
    for group in optimizer.param_groups:
        group["foreach"] = foreach
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for gradient in gradients:
        overflow = torch.full_like(p, torch.inf)
        scaler.scale((p * (overflow if gradient is None else gradient)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    expected = literal.ranger(start, gradients, 1e-2, k, alpha)
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-10)


def test_ranger_with_groups_and_parameters_that_join_later() -> None:
    """Each parameter counts its own steps, with its group's settings."""
    torch.manual_seed(0)
    starts = [torch.randn(4, dtype=torch.float64) for _ in range(3)]
    parameters = [torch.nn.Parameter(start.clone()) for start in starts]
    groups: list[dict[str, Any]] = [{"params": [parameters[0]]}, {"params": [parameters[1]], "k": 2, "lr": 3e-2}]
    optimizer = Ranger(groups, lr=1e-2)
    gradients: list[list[torch.Tensor | None]] = [[], [], []]
    for place in range(40):
        if place == 9:
            optimizer.add_param_group({"params": [parameters[2]], "alpha": 0.8})
        for index, p in enumerate(parameters):
            frozen = index == 0 and 20 <= place < 25
            p.grad = None if frozen or (index == 2 and place < 9) else torch.randn(4, dtype=torch.float64)
            gradients[index].append(p.grad)
        optimizer.step()
    settings = [(1e-2, 6, 0.5), (3e-2, 2, 0.5), (1e-2, 6, 0.8)]
    for p, start, drawn, (lr, k, alpha) in zip(parameters, starts, gradients, settings):
        torch.testing.assert_close(p.detach(), literal.ranger(start, drawn, lr, k, alpha), rtol=0, atol=1e-10)


def test_ranger_with_accumulated_gradients() -> None:
    torch.manual_seed(0)
    start = torch.randn(4, dtype=torch.float64)
    p = torch.nn.Parameter(start.clone())
    optimizer = Ranger([p])
    shares = torch.randn(30, 3, 4, dtype=torch.float64)
    for share in shares:
        for part in share:
            (p * part / 3).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(
        p.detach(), literal.ranger(start, list(shares.mean(dim=1)), 1e-3, 6, 0.5), rtol=0, atol=1e-10
    )


def test_ranger_costs_little_more_than_radam() -> None:
    """The 15 M parameters of a stream; both in turn, so that what else the machine does hits both alike."""
    torch.manual_seed(0)
    optimizers: list[torch.optim.Optimizer] = []
    for kind in (torch.optim.RAdam, Ranger):
        parameters = list(build_stream("rgb", 106, tiny_config(model__width=1.0).model).parameters())
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizers.append(kind(parameters, lr=1e-3))
    seconds: list[list[float]] = [[], []]
    for _ in range(6):
        for optimizer, times in zip(optimizers, seconds):
            begin = time.perf_counter()
            for _ in range(6):  # LookAhead moves once in these
                optimizer.step()
            times.append(time.perf_counter() - begin)
    assert min(seconds[1][1:]) <= 1.25 * min(seconds[0][1:])


def test_ranger_goes_on_from_its_state() -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5))
    optimizer = Ranger([p], lr=1e-2)
    gradients = [torch.randn(5) for _ in range(20)]
    for gradient in gradients[:10]:
        p.grad = gradient.clone()
        optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    twin = torch.nn.Parameter(p.detach().clone())
    restored = Ranger([twin], lr=1e-2)
    buffer.seek(0)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    for parameter, chosen in ((p, optimizer), (twin, restored)):
        for gradient in gradients[10:]:
            parameter.grad = gradient.clone()
            chosen.step()
    assert torch.equal(p, twin)


def test_ranger_goes_on_from_radam_s_state() -> None:
    """A plain RAdam's state has neither k nor slow weights: these start where the weights are."""
    torch.manual_seed(0)
    p, twin = (torch.nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(2))
    plain = torch.optim.RAdam([p], lr=1e-2)
    for _ in range(4):
        p.grad = torch.randn(5, dtype=torch.float64)
        plain.step()
    with torch.no_grad():
        twin.copy_(p)
    ranger = Ranger([twin], lr=1e-2)
    ranger.load_state_dict(copy.deepcopy(plain.state_dict()))
    start = twin.detach().clone()
    for _ in range(2):
        gradient = torch.randn(5, dtype=torch.float64)
        for parameter, optimizer in ((p, plain), (twin, ranger)):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(twin.detach(), start + (p.detach() - start) / 2, rtol=1e-12, atol=0)


def test_ranger_s_step_runs_hooks_once() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    torch.optim.RAdam([torch.nn.Parameter(torch.ones(1))])  # torch puts hooks into RAdam's own step here
    optimizer = Ranger([p])
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    p.grad = torch.ones(2)
    optimizer.step()
    assert calls == ["before", "after"]


def config_with(**schedule: Any) -> Config:
    changes = {f"schedule.{key}": value for key, value in schedule.items()}
    return override_config(tiny_config(optimizer__name="sgd", optimizer__lr=0.4, train__iterations=40), changes, "test")


def rates(config: Config, steps: int = 40) -> list[float]:
    """The learning rate that each step is taken with; the state goes through `state_dict` half-way."""
    optimizer = build_optimizer(config, [torch.nn.Parameter(torch.zeros(1))])
    schedule = Schedule(config, optimizer)
    found = []
    for step in range(steps):
        if step == steps // 2:
            state = copy.deepcopy(schedule.state_dict())
            schedule = Schedule(config, optimizer)
            schedule.load_state_dict(state)
        found.append(optimizer.param_groups[0]["lr"])
        schedule.after_step()
    return found


def test_multistep_and_cosine_equal_torch_s() -> None:
    multistep, cosine = config_with(name="multistep", milestones=[3, 25]), config_with(name="cosine")
    for config, kind, arguments in (
        (multistep, MultiStepLR, {"milestones": [3, 25], "gamma": 0.1}),
        (cosine, CosineAnnealingLR, {"T_max": 40}),
    ):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.4)
        scheduler: Any = kind(optimizer, **arguments)
        expected = []
        for _ in range(40):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates(config) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["plateau", "multistep", "cosine", "constant"])
def test_warm_up_rises_linearly_before_anything_else(name: str) -> None:
    found = rates(config_with(name=name, warmup=8))
    assert found[:8] == pytest.approx([0.4 * step / 8 for step in range(1, 9)])
    if name == "cosine":
        assert found[8:] == pytest.approx([0.2 * (1 + math.cos(math.pi * step / 32)) for step in range(32)])
    else:
        assert found[8:] == pytest.approx([0.4] * 32)


def test_cosine_ends_on_its_floor() -> None:
    assert rates(config_with(name="cosine", floor=0.25), 60)[40:] == pytest.approx([0.1] * 20)


def test_a_short_run_follows_the_first_part_of_a_longer_cosine() -> None:
    longer = rates(config_with(name="cosine", warmup=5, horizon=200), 40)
    assert longer == rates(override_config(config_with(name="cosine", warmup=5), {"train.iterations": 200}, "t"), 40)
    assert longer != rates(config_with(name="cosine", warmup=5), 40)
    assert config_with(name="cosine", horizon=200).horizon == 200 and config_with(name="cosine").horizon == 40
    assert config_with(name="plateau").horizon == 40


@pytest.mark.parametrize(
    "group", [{"k": 0}, {"k": -1}, {"k": 2.5}, {"alpha": 0.0}, {"alpha": 1.5}, {"alpha": math.nan}], ids=str
)
def test_ranger_checks_every_group(group: dict[str, Any]) -> None:
    p, q = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="LookAhead needs a whole k"):
        Ranger([p], **group)
    with pytest.raises(ValueError, match="LookAhead needs a whole k"):
        Ranger([{"params": [p], **group}])
    optimizer = Ranger([p])
    with pytest.raises(ValueError, match="LookAhead needs a whole k"):
        optimizer.add_param_group({"params": [q], **group})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "sgd", "lr": 0.3, "momentum": 0.7, "weight_decay": 1e-3},
        {"name": "ranger", "lr": 0.2, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 1e-2, "k": 3, "alpha": 0.7},
    ],
    ids=lambda settings: settings["name"],
)
def test_every_setting_reaches_the_optimizer(settings: dict[str, Any]) -> None:
    config = tiny_config(**{f"optimizer__{key}": value for key, value in settings.items()})
    optimizer = build_optimizer(config, [torch.nn.Parameter(torch.ones(1))])
    (group,) = optimizer.param_groups
    assert type(optimizer) is {"sgd": torch.optim.SGD, "ranger": Ranger}[settings["name"]]
    assert {key: group[key] for key in settings if key != "name"} == {k: v for k, v in settings.items() if k != "name"}


def test_plateau_is_stepped_by_validations_only() -> None:
    config = config_with(name="plateau", patience=1, warmup=4)
    optimizer = build_optimizer(config, [torch.nn.Parameter(torch.zeros(1))])
    schedule = Schedule(config, optimizer)
    for accuracy in (0.9, 0.8, 0.7, 0.6):  # at the rates of the warm-up: nothing to learn from
        schedule.after_validation(accuracy)
    for _ in range(100):
        schedule.after_step()
    assert optimizer.param_groups[0]["lr"] == 0.4
    for accuracy in (0.5, 0.5, 0.4):
        schedule.after_validation(accuracy)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)
    state = copy.deepcopy(schedule.state_dict())
    schedule = Schedule(config, optimizer)
    schedule.load_state_dict(state)
    for accuracy in (0.5, 0.5):
        schedule.after_validation(accuracy)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["sgd", "ranger"])
def test_an_overflow_moves_nothing_but_the_loss_scale(name: str) -> None:
    config = tiny_config(optimizer__name=name, schedule__name="multistep", schedule__milestones=[6])
    p = torch.nn.Parameter(torch.ones(3))
    moving = StreamOptimizer(config, [p], torch.device("cpu"), scale_loss=True)
    for _ in range(5):
        moving.scaler.scale((p * torch.arange(3.0)).sum()).backward()
        moving.step()
    before = copy.deepcopy((p.detach(), moving.state_dict()))
    moving.scaler.scale((p * torch.inf).sum()).backward()
    moving.step()
    after = moving.state_dict()
    assert torch.equal(p, before[0]) and p.grad is None
    assert after["schedule"] == before[1]["schedule"]
    for key, value in before[1]["optimizer"]["state"][0].items():
        assert torch.equal(value, after["optimizer"]["state"][0][key]), key
    assert after["scaler"]["scale"] < before[1]["scaler"]["scale"]
    moving.scaler.scale((p * torch.arange(3.0)).sum()).backward()
    moving.step()
    assert moving.learning_rate == pytest.approx(0.1 * config.optimizer.lr)
    assert not torch.equal(p, before[0])


@pytest.mark.parametrize("name", ["sgd", "ranger"])
def test_the_schedule_moves_with_each_step_though_the_loss_scale_changes(name: str) -> None:
    """A scale may grow or be smaller than before for other reasons: what counts is whether the optimizer stepped."""
    config = tiny_config(optimizer__name=name, schedule__name="constant")
    p = torch.nn.Parameter(torch.ones(3))
    moving = StreamOptimizer(config, [p], torch.device("cpu"), scale_loss=True)
    moving.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2, growth_factor=4.0)
    for _ in range(4):
        moving.scaler.scale(p.sum()).backward()
        moving.step()
    assert moving.scaler.get_scale() == 128
    assert moving.schedule.state_dict()["steps"] == 4


def test_gradients_that_overflow_at_every_scale_raise() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    moving = StreamOptimizer(tiny_config(), [p], torch.device("cpu"), scale_loss=True)
    moving.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-22)
    overflow = torch.full((3,), torch.inf)
    for _ in range(2):
        moving.scaler.scale((p * overflow).sum()).backward()
        moving.step()
    moving.scaler.scale((p * overflow).sum()).backward()
    with pytest.raises(OverflowError, match="at every loss scale"):
        moving.step()
    assert torch.equal(p, torch.ones(3))
