from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import literal
from tests.conftest import tiny_config
from tune_ego.config import Config
from tune_ego.config_io import override_config
from tune_ego.console import say_once
from tune_ego.model.two_stream import ParameterRole
from tune_ego.training.optim import Ranger, Schedule, StreamOptimizer, build_optimizer, schedule_factor


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


class Elements(TorchDispatchMode):
    """Count the elements of all tensors that operations take."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        self.count += sum(leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor))
        return func(*args, **(kwargs or {}))


def test_ranger_costs_little_more_than_radam() -> None:
    """After the first steps, which make the state: six steps, in which LookAhead moves once."""
    counts = []
    for kind in (torch.optim.RAdam, Ranger):
        parameters = [torch.nn.Parameter(torch.randn(1000)) for _ in range(3)]
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer: torch.optim.Optimizer = kind(parameters, lr=1e-3)
        for _ in range(6):
            optimizer.step()
        with Elements() as elements:
            for _ in range(6):
                optimizer.step()
        counts.append(elements.count)
    # LookAhead takes the weights and the slow weights twice: 4 x 3,000 elements.
    assert counts[0] > 0 and 0 < counts[1] - counts[0] <= 12_100


def test_ranger_goes_on_from_its_state() -> None:
    """Saved and loaded between two moves of the slow weights, it ends where the formula does without a break."""
    torch.manual_seed(0)
    start, gradients = torch.randn(5, dtype=torch.float64), list(torch.randn(20, 5, dtype=torch.float64))
    p = torch.nn.Parameter(start.clone())
    optimizer = Ranger([p], lr=1e-2)
    for place, gradient in enumerate(gradients):
        if place == 10:
            buffer = io.BytesIO()
            torch.save(optimizer.state_dict(), buffer)
            buffer.seek(0)
            p = torch.nn.Parameter(p.detach().clone())
            optimizer = Ranger([p], lr=1e-2)
            optimizer.load_state_dict(torch.load(buffer, weights_only=True))
        p.grad = gradient
        optimizer.step()
    expected = literal.ranger(start, [*gradients], 1e-2, 6, 0.5)
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)


def test_ranger_s_first_steps_by_hand() -> None:
    """From 1, gradient 2, weight decay 0.5: the first steps of RAdam are not divided by the variance.

    The mean of the gradients is 2 at each step. Decay leaves 1 - 0.1 x 0.5 = 0.95 of a weight. Step 1: 0.95 - 0.2 =
    0.75. Step 2: 0.7125 - 0.2 = 0.5125; then the slow weight moves from 1 by 0.25 of the way to it, and the weight goes
    there: 1 - 0.25 x 0.4875 = 0.878125. Step 3: 0.83421875 - 0.2.
    """
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = Ranger([p], lr=0.1, betas=(0.5, 0.999), weight_decay=0.5, k=2, alpha=0.25)
    weights = []
    for _ in range(3):
        p.grad = torch.full_like(p, 2.0)
        optimizer.step()
        weights.append(p.item())
    assert weights == pytest.approx([0.75, 0.878125, 0.63421875], abs=1e-9)


def test_ranger_s_weight_decay_is_decoupled() -> None:
    """60 steps with decay 0.5: as the formula has it, and not as with decay in the gradient."""
    torch.manual_seed(0)
    start = torch.randn(7, 3, dtype=torch.float64)
    gradients = [torch.randn(7, 3, dtype=torch.float64) for _ in range(60)]
    p = torch.nn.Parameter(start.clone())
    optimizer = Ranger([p], lr=1e-2, weight_decay=0.5)
    for gradient in gradients:
        p.grad = gradient
        optimizer.step()
    expected = literal.ranger(start, list(gradients), 1e-2, 6, 0.5, decay=0.5)
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_run_of_version_0_1_keeps_its_coupled_weight_decay_and_says_so(
    decay: float, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(optimizer__weight_decay=decay)
    p = torch.nn.Parameter(torch.ones(1))
    state = StreamOptimizer(config, [ParameterRole(p)], torch.device("cpu"), scale_loss=False).state_dict()
    say_once.cache_clear()
    resumed = StreamOptimizer(config, [ParameterRole(p)], torch.device("cpu"), scale_loss=False)
    resumed.load_state_dict(copy.deepcopy(state))
    assert not capsys.readouterr().out
    state["optimizer"]["param_groups"][0]["decoupled_weight_decay"] = False
    resumed.load_state_dict(state)
    assert resumed.optimizer.param_groups[0]["decoupled_weight_decay"] is False
    assert ("its weight decay stays part of the gradient" in capsys.readouterr().out) == bool(decay)


def test_ranger_s_step_gives_the_loss_of_its_closure() -> None:
    p = torch.nn.Parameter(torch.full((1,), 3.0))
    optimizer = Ranger([p], lr=0.1)

    def closure() -> float:
        loss = (p * p).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 9.0
    assert p.item() == pytest.approx(3.0 - 0.1 * 6.0)
    assert optimizer.step() is None


def test_sgd_by_hand() -> None:
    """Gradient 1, weight decay 0.1, momentum 0.5. Step 1: 1 + 0.1 x 1 = 1.1, weight 1 - 0.1 x 1.1 = 0.89.

    Step 2: 0.5 x 1.1 + (1 + 0.1 x 0.89) = 1.639, weight 0.89 - 0.1639 = 0.7261.
    """
    settings = {"name": "sgd", "lr": 0.1, "momentum": 0.5, "weight_decay": 0.1}
    config = tiny_config(**{f"optimizer__{key}": value for key, value in settings.items()})
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = build_optimizer(config, [ParameterRole(p)])
    weights = []
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
        weights.append(p.item())
    assert weights == pytest.approx([0.89, 0.7261])


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
    iterations = schedule.pop("iterations", 40)
    changes = {f"schedule.{key}": value for key, value in schedule.items()}
    config = tiny_config(optimizer__name="sgd", optimizer__lr=0.4, train__iterations=iterations)
    return override_config(config, changes, "test")


def rates(config: Config, steps: int = 40) -> list[float]:
    """The learning rate that each step is taken with; the state goes through `state_dict` half-way."""
    optimizer = build_optimizer(config, [ParameterRole(torch.nn.Parameter(torch.zeros(1)))])
    schedule = Schedule(config, optimizer)
    learning_rates = []
    for step in range(steps):
        if step == steps // 2:
            state = copy.deepcopy(schedule.state_dict())
            optimizer = build_optimizer(config, [ParameterRole(torch.nn.Parameter(torch.zeros(1)))])
            schedule = Schedule(config, optimizer)
            schedule.load_state_dict(state)
        learning_rates.append(optimizer.param_groups[0]["lr"])
        schedule.after_step()
    return learning_rates


# (1 + cos(pi x n / 4)) / 2 for n = 0 to 4: 1, 0.853553, 0.5, 0.146447, 0.
@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ({"name": "constant"}, [1, 1, 1, 1, 1, 1]),
        ({"name": "constant", "warmup": 4}, [0.25, 0.5, 0.75, 1, 1, 1]),
        ({"name": "plateau", "warmup": 2}, [0.5, 1, 1, 1, 1, 1]),  # without a validation
        ({"name": "multistep", "milestones": [2, 4], "gamma": 0.5}, [1, 1, 0.5, 0.5, 0.25, 0.25]),
        ({"name": "multistep", "milestones": [3]}, [1, 1, 1, 0.1, 0.1, 0.1]),
        ({"name": "multistep", "milestones": [1, 4], "warmup": 3}, [1 / 3, 2 / 3, 1, 0.1, 0.01, 0.01]),
        ({"name": "cosine", "iterations": 4}, [1, 0.853553, 0.5, 0.146447, 0, 0]),
        ({"name": "cosine", "iterations": 4, "floor": 0.2}, [1, 0.882843, 0.6, 0.317157, 0.2, 0.2]),
        ({"name": "cosine", "iterations": 6, "warmup": 2}, [0.5, 1, 1, 0.853553, 0.5, 0.146447, 0, 0]),
        ({"name": "cosine", "iterations": 2, "horizon": 4}, [1, 0.853553, 0.5, 0.146447, 0, 0]),
        ({"name": "flat_cosine", "iterations": 8, "flat": 0.5}, [1, 1, 1, 1, 1, 0.853553, 0.5, 0.146447, 0]),
        (
            {"name": "flat_cosine", "iterations": 4, "horizon": 5, "flat": 0.2, "floor": 0.2, "warmup": 1},
            [1, 1, 0.882843, 0.6],
        ),
        ({"name": "flat_cosine", "iterations": 6, "flat": 0.1, "warmup": 2}, [0.5, 1, 1, 0.853553, 0.5, 0.146447, 0]),
        ({"name": "flat_cosine", "iterations": 100}, [1] * 73 + [(1 + math.cos(math.pi / 28)) / 2]),
        ({"name": "cosine", "iterations": 3, "horizon": 6, "warmup": 2}, [0.5, 1, 1, 0.853553, 0.5, 0.146447, 0]),
    ],
    ids=str,
)
def test_learning_rates_of_each_schedule(schedule: dict[str, Any], factors: list[float]) -> None:
    assert rates(config_with(**schedule), len(factors)) == pytest.approx([0.4 * f for f in factors], abs=1e-6)


def test_the_default_milestones_are_those_of_lu() -> None:
    config = config_with(name="multistep", iterations=3000)
    factors = {0: 1, 299: 1, 300: 0.1, 999: 0.1, 1000: 0.01, 2999: 0.01}
    for steps, factor in factors.items():
        assert schedule_factor(config.schedule, steps, 3000) == pytest.approx(factor)


def test_a_schedule_sets_the_rate_of_every_group() -> None:
    groups: list[dict[str, Any]] = [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": 3.0}]
    optimizer = torch.optim.SGD(groups, lr=7.0)
    schedule = Schedule(config_with(name="constant", warmup=2), optimizer)
    for factor in (0.5, 1, 1):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([7 * factor, 3 * factor])
        schedule.after_step()


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
        {"name": "sgd", "lr": 0.3, "momentum": 0.7, "weight_decay": 1e-3, "nesterov": True},
        {"name": "adamw", "lr": 0.3, "betas": (0.7, 0.8), "eps": 1e-3, "weight_decay": 0.2},
        {"name": "ranger", "lr": 0.2, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 1e-2, "k": 3, "alpha": 0.7},
    ],
    ids=lambda settings: settings["name"],
)
def test_every_setting_reaches_the_optimizer(settings: dict[str, Any]) -> None:
    config = tiny_config(**{f"optimizer__{key}": value for key, value in settings.items()})
    optimizer = build_optimizer(config, [ParameterRole(torch.nn.Parameter(torch.ones(1)))])
    (group,) = optimizer.param_groups
    kinds = {"sgd": torch.optim.SGD, "ranger": Ranger, "adamw": torch.optim.AdamW}
    assert type(optimizer) is kinds[settings["name"]]
    assert {key: group[key] for key in settings if key != "name"} == {k: v for k, v in settings.items() if k != "name"}


# Validations: the mean class accuracy, and the rate after it. A rise of a ten-thousandth of the best is none.
@pytest.mark.parametrize(
    ("settings", "validations"),
    [
        ({"patience": 1}, [(0.5, 0.4), (0.4, 0.4), (0.6, 0.4), (0.6, 0.4), (0.5, 0.2), (0.5, 0.2), (0.5, 0.1)]),
        ({"patience": 1}, [(0.5, 0.4), (0.50004, 0.4), (0.50004, 0.2), (0.50006, 0.2), (0.5, 0.2), (0.5, 0.1)]),
        ({"patience": 0, "factor": 0.1}, [(0.5, 0.4), (0.6, 0.4), (0.6, 0.04), (0.7, 0.04), (0.1, 0.004)]),
        ({}, [(0.5, 0.4)] * 6 + [(0.5, 0.2)] * 6 + [(0.5, 0.1)]),  # a patience of 5, and a factor of a half
    ],
    ids=str,
)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_plateau_lowers_the_rate(
    settings: dict[str, Any], validations: list[tuple[float, float]], resumed: bool
) -> None:
    """Warm-up is over by then, and steps in between change nothing; resumed, each validation has a new schedule."""
    config = config_with(name="plateau", warmup=3, **settings)
    optimizer = build_optimizer(config, [ParameterRole(torch.nn.Parameter(torch.zeros(1)))])
    schedule = Schedule(config, optimizer)
    for rate in (0.4 / 3, 0.8 / 3, 0.4, 0.4):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        schedule.after_step()
    for accuracy, rate in validations:
        if resumed:
            state = copy.deepcopy(schedule.state_dict())
            optimizer = build_optimizer(config, [ParameterRole(torch.nn.Parameter(torch.zeros(1)))])
            schedule = Schedule(config, optimizer)
            schedule.load_state_dict(state)
        schedule.after_validation(accuracy)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        schedule.after_step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


@pytest.mark.parametrize(("steps", "counts"), [(3, False), (4, True)])
def test_validations_during_the_warm_up_do_not_count(steps: int, counts: bool) -> None:
    """The fourth step of a warm-up of four has the full rate."""
    config = config_with(name="plateau", patience=0, warmup=4)
    optimizer = build_optimizer(config, [ParameterRole(torch.nn.Parameter(torch.zeros(1)))])
    schedule = Schedule(config, optimizer)
    for _ in range(steps):
        schedule.after_step()
    for accuracy in (0.9, 0.8):
        schedule.after_validation(accuracy)
    for _ in range(4):
        schedule.after_step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2 if counts else 0.4)


def test_a_loaded_plateau_sets_the_rate_at_once() -> None:
    config = config_with(name="plateau", patience=0)
    optimizer = build_optimizer(config, [ParameterRole(torch.nn.Parameter(torch.zeros(1)))])
    schedule = Schedule(config, optimizer)
    schedule.after_validation(0.5)
    schedule.after_validation(0.4)
    other = build_optimizer(config, [ParameterRole(torch.nn.Parameter(torch.zeros(1)))])
    Schedule(config, other).load_state_dict(schedule.state_dict())
    assert other.param_groups[0]["lr"] == pytest.approx(0.2)


def test_only_a_plateau_has_a_state_of_its_own() -> None:
    for name in ("constant", "cosine", "multistep"):
        config = config_with(name=name)
        schedule = Schedule(config, build_optimizer(config, [ParameterRole(torch.nn.Parameter(torch.zeros(1)))]))
        schedule.after_step()
        schedule.after_validation(0.5)
        schedule.after_validation(0.1)
        assert schedule.state_dict() == {"steps": 1, "plateau": None}


def test_all_of_a_stream_s_state_is_saved_and_loaded() -> None:
    """An overflow, two steps and two validations: loss scale, steps, plateau, moments and slow weights.

    Loaded into another stream's optimizer, four more steps end where the formula does.
    """
    settings = {"optimizer__lr": 0.01, "schedule__patience": 0, "schedule__factor": 1e-3}
    config = tiny_config(optimizer__name="ranger", schedule__name="plateau", **settings)
    start = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    gradients = list(torch.tensor([[1.0, 2.0, -1.0], [0.5, 1.0, 2.0]], dtype=torch.float64))

    def move(stream: StreamOptimizer, p: torch.nn.Parameter, gradient: Any) -> None:
        stream.scaler.scale((p * gradient).sum()).backward()
        stream.step()

    p = torch.nn.Parameter(start.clone())
    saved = StreamOptimizer(config, [ParameterRole(p)], torch.device("cpu"), scale_loss=True)
    for gradient in (torch.inf, *gradients):
        move(saved, p, gradient)
    for accuracy in (0.5, 0.5):
        saved.schedule.after_validation(accuracy)
    buffer = io.BytesIO()
    torch.save(saved.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert state["scaler"]["scale"] == 32768.0 and state["scaler"]["_growth_tracker"] == 2
    assert state["schedule"]["steps"] == 2
    assert (state["schedule"]["plateau"]["best"], state["schedule"]["plateau"]["num_bad_epochs"]) == (0.5, 0)
    assert torch.equal(state["optimizer"]["state"][0]["slow"], start)
    assert state["optimizer"]["state"][0]["step"] == 2

    q = torch.nn.Parameter(p.detach().clone())
    loaded = StreamOptimizer(config, [ParameterRole(q)], torch.device("cpu"), scale_loss=True)
    assert loaded.scaler.get_scale() == 65536.0
    loaded.load_state_dict(state)
    assert (loaded.scaler.get_scale(), loaded.scaler._get_growth_tracker()) == (32768.0, 2)
    assert loaded.learning_rate == pytest.approx(1e-5)
    assert loaded.state_dict()["schedule"]["steps"] == 2
    for gradient in gradients * 2:
        move(loaded, q, gradient)
    # The first two steps had 1,000 times the rate of the others; the sixth moves the slow weights half-way.
    m, fast = torch.zeros(3, dtype=torch.float64), start.clone()
    for step, gradient in enumerate(gradients * 3, start=1):
        m = 0.95 * m + 0.05 * gradient
        variance = 0.001 * sum(0.999 ** (step - n) * g**2 for n, g in enumerate((gradients * 3)[:step], start=1))
        rho = 1999 - 2 * step * 0.999**step / (1 - 0.999**step)
        rate = 0.01 if step <= 2 else 1e-5
        update = m / (1 - 0.95**step)
        if rho > 5:
            rectified = math.sqrt((rho - 4) * (rho - 2) * 1999 / (1995 * 1997 * rho))
            update = update * rectified * math.sqrt(1 - 0.999**step) / (variance.sqrt() + 1e-5)
        fast = fast - rate * update
    expected = start + 0.5 * (fast - start)
    torch.testing.assert_close(q.detach(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False)])
def test_a_run_may_go_on_with_or_without_a_loss_scale(before: bool, after: bool) -> None:
    """Its precision has changed: without a saved scale it starts with its own."""
    config, p = tiny_config(), torch.nn.Parameter(torch.ones(3))
    saved, loaded = (
        StreamOptimizer(config, [ParameterRole(p)], torch.device("cpu"), scale_loss=scale_loss)
        for scale_loss in (before, after)
    )
    saved.scaler.scale(p.sum()).backward()
    saved.step()
    state = saved.state_dict()
    assert bool(state["scaler"]) == before
    loaded.load_state_dict(state)
    assert loaded.scaler.get_scale() == (65536.0 if after else 1.0)
    assert loaded.state_dict()["schedule"]["steps"] == 1


@pytest.mark.parametrize("name", ["sgd", "ranger"])
def test_an_overflow_moves_nothing_but_the_loss_scale(name: str) -> None:
    config = tiny_config(optimizer__name=name, schedule__name="multistep", schedule__milestones=[6])
    p = torch.nn.Parameter(torch.ones(3))
    moving = StreamOptimizer(config, [ParameterRole(p)], torch.device("cpu"), scale_loss=True)
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


@pytest.mark.parametrize("name", ["sgd", "ranger", "adamw", "muon"])
def test_the_schedule_moves_with_each_step_though_the_loss_scale_changes(name: str) -> None:
    """A scale may grow or be smaller than before for other reasons: what counts is whether the optimizer stepped."""
    config = tiny_config(optimizer__name=name, schedule__name="constant")
    p = torch.nn.Parameter(torch.ones(3, 1))
    moving = StreamOptimizer(config, [ParameterRole(p)], torch.device("cpu"), scale_loss=True)
    moving.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2, growth_factor=4.0)
    for _ in range(4):
        moving.scaler.scale(p.sum()).backward()
        moving.step()
    assert moving.scaler.get_scale() == 128
    assert moving.schedule.state_dict()["steps"] == 4


def test_gradients_that_overflow_at_every_scale_raise() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    moving = StreamOptimizer(tiny_config(), [ParameterRole(p)], torch.device("cpu"), scale_loss=True)
    moving.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-22)
    overflow = torch.full((3,), torch.inf)
    for _ in range(2):
        moving.scaler.scale((p * overflow).sum()).backward()
        moving.step()
    moving.scaler.scale((p * overflow).sum()).backward()
    with pytest.raises(OverflowError, match="at every loss scale"):
        moving.step()
    assert torch.equal(p, torch.ones(3))
