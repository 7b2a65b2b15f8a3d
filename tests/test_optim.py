from __future__ import annotations

import copy
import io
import math

import pytest
import torch

from tests.conftest import tiny_config
from tune_ego.optim import Ranger, Schedule, build_optimizer


def literal_ranger(start: torch.Tensor, gradients: list[torch.Tensor], lr: float, k: int, alpha: float) -> torch.Tensor:
    """RAdam and LookAhead as published, element by element in float64."""
    b1, b2, eps = 0.95, 0.999, 1e-5
    w, slow = start.clone(), start.clone()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    rho_inf = 2 / (1 - b2) - 1
    for t, g in enumerate(gradients, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
        if rho > 5:
            r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
            w = w - lr * r * (m / (1 - b1**t)) / ((v.sqrt() + eps) / math.sqrt(1 - b2**t))
        else:
            w = w - lr * m / (1 - b1**t)
        if t % k == 0:
            slow = slow + alpha * (w - slow)
            w = slow.clone()
    return w


@pytest.mark.parametrize(("k", "alpha"), [(6, 0.5), (1, 0.3), (4, 1.0)])
def test_ranger_equals_its_formula(k: int, alpha: float) -> None:
    torch.manual_seed(0)
    start = torch.randn(7, 3, dtype=torch.float64)
    gradients = [torch.randn(7, 3, dtype=torch.float64) for _ in range(200)]
    p = torch.nn.Parameter(start.clone())
    optimizer = Ranger([p], lr=1e-2, k=k, alpha=alpha)
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    assert torch.allclose(p, literal_ranger(start, gradients, 1e-2, k, alpha), rtol=0, atol=1e-10)


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


def test_plateau_is_stepped_by_validations_only() -> None:
    config = tiny_config(schedule__name="plateau", schedule__patience=1, optimizer__lr=0.1)
    optimizer = build_optimizer(config, [torch.nn.Parameter(torch.zeros(1))])
    schedule = Schedule(config, optimizer)
    for _ in range(100):
        schedule.after_iteration()
    assert optimizer.param_groups[0]["lr"] == 0.1
    for accuracy in (0.5, 0.5, 0.4):
        schedule.after_validation(accuracy)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_multistep_counts_iterations_and_resumes() -> None:
    config = tiny_config(
        schedule__name="multistep", schedule__milestones=[2, 4], optimizer__name="sgd", optimizer__lr=1.0
    )
    optimizer = build_optimizer(config, [torch.nn.Parameter(torch.zeros(1))])
    schedule = Schedule(config, optimizer)
    optimizer.step()
    rates = []
    for place in range(5):
        if place == 3:
            state = copy.deepcopy(schedule.state_dict())
            schedule = Schedule(config, optimizer)
            schedule.load_state_dict(state)
        schedule.after_iteration()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])
