"""Optimizers and learning-rate schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tune_ego.config import Config, MultiStepConfig, PlateauConfig, SGDConfig


class Ranger(torch.optim.RAdam):
    """RAdam (Liu et al., ICLR 2020) inside LookAhead (Zhang et al., NeurIPS 2019).

    The slow weights start as a copy of the weights before the first step; after every k-th step they move by
    `alpha` towards the weights, which then return to them. They live in the optimizer's state as `slow`.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.95, 0.999),
        eps: float = 1e-5,
        weight_decay: float = 0.0,
        k: int = 6,
        alpha: float = 0.5,
    ) -> None:
        if k < 1 or not 0 < alpha <= 1:
            raise ValueError(f"LookAhead needs k >= 1 and 0 < alpha <= 1, not k={k}, alpha={alpha}")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        for group in self.param_groups:
            group.update(k=k, alpha=alpha)
        self.defaults.update(k=k, alpha=alpha)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        # RAdam sets its state up only where there is none yet: the slow weights join afterwards.
        slow_start = {p: p.detach().clone() for p in moving if "slow" not in self.state.get(p, {})}
        super().step()
        for p, slow in slow_start.items():
            self.state[p]["slow"] = slow
        for group in self.param_groups:
            self._look_ahead(group)
        return loss

    def _look_ahead(self, group: dict[str, Any]) -> None:
        due = [p for p in group["params"] if p.grad is not None and self.state[p]["step"].item() % group["k"] == 0]
        if due:
            slow = [self.state[p]["slow"] for p in due]
            torch._foreach_lerp_(slow, due, group["alpha"])
            torch._foreach_copy_(due, slow)


def build_optimizer(config: Config, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    chosen = config.optimizer
    if isinstance(chosen, SGDConfig):
        return torch.optim.SGD(parameters, chosen.lr, chosen.momentum, weight_decay=chosen.weight_decay)
    return Ranger(parameters, **chosen.model_dump(exclude={"name"}))


class Schedule:
    """The learning rate over a run: told of every iteration and of every validation."""

    def __init__(self, config: Config, optimizer: torch.optim.Optimizer) -> None:
        chosen = config.schedule
        self._plateau: torch.optim.lr_scheduler.ReduceLROnPlateau | None = None
        self._steps: torch.optim.lr_scheduler.MultiStepLR | None = None
        if isinstance(chosen, PlateauConfig):
            self._plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, mode="max", factor=chosen.factor, patience=chosen.patience
            )
        elif isinstance(chosen, MultiStepConfig):
            self._steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(chosen.milestones), chosen.gamma)

    def after_iteration(self) -> None:
        if self._steps is not None:
            self._steps.step()

    def after_validation(self, mean_class_accuracy: float) -> None:
        if self._plateau is not None:
            self._plateau.step(mean_class_accuracy)

    def state_dict(self) -> dict[str, Any]:
        inner = self._plateau or self._steps
        if inner is None:
            return {}
        # Counter-typed milestones follow from the configuration, and plain types load with weights_only=True.
        return {key: value for key, value in inner.state_dict().items() if key != "milestones"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        inner = self._plateau or self._steps
        if inner is not None:
            inner.load_state_dict(state)
