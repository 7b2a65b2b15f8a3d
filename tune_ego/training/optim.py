"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tune_ego.config import Config
from tune_ego.config_optimizers import (
    AdamWConfig,
    ConstantConfig,
    CosineConfig,
    FlatCosineConfig,
    MultiStepConfig,
    MuonConfig,
    OptimizerConfig,
    PlateauConfig,
    RangerConfig,
    ScheduleConfig,
    SGDConfig,
)
from tune_ego.console import say_once
from tune_ego.errors import UserError
from tune_ego.model.two_stream import ParameterRole
from tune_ego.training.muon import MuonWithAdamW


class Ranger(torch.optim.RAdam):
    """RAdam (Liu et al., ICLR 2020) inside LookAhead (Zhang et al., NeurIPS 2019).

    The slow weights start as a copy of the weights before the first step. After every k-th step they move by `alpha`
    towards the fast weights, which are then set to them. The optimizer's state holds them as `slow`. Weight decay is
    decoupled, as in the optimizer that the paper's authors used: each step subtracts lr x weight_decay x weight.
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
        self._look_ahead_defaults = {"k": k, "alpha": alpha}
        _check_look_ahead(self._look_ahead_defaults)
        super().__init__(params, lr, betas, eps, weight_decay, decoupled_weight_decay=True)
        self.defaults.update(self._look_ahead_defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; `k` and `alpha` default to the optimizer's. torch calls it for the first groups."""
        param_group = {**self._look_ahead_defaults, **param_group}
        _check_look_ahead(param_group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        # RAdam initialises the state of a parameter only while that is empty, so the slow weights are added afterwards.
        slow_start = {p: p.detach().clone() for p in moving if "slow" not in self.state.get(p, {})}
        _radam_step(self)
        for p, slow in slow_start.items():
            self.state[p]["slow"] = slow
        for group in self.param_groups:
            self._look_ahead(group)
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for group in self.param_groups:  # the state of a plain RAdam has neither key
            for key in ("k", "alpha"):
                group.setdefault(key, self.defaults[key])
            _check_look_ahead(group)

    def _look_ahead(self, group: dict[str, Any]) -> None:
        due = [p for p in group["params"] if p.grad is not None and int(self.state[p]["step"]) % group["k"] == 0]
        if due:
            slow = [self.state[p]["slow"] for p in due]
            torch._foreach_lerp_(slow, due, group["alpha"])
            torch._foreach_copy_(due, slow)


def _check_look_ahead(group: dict[str, Any]) -> None:
    k, alpha = group["k"], group["alpha"]
    if not isinstance(k, int) or k < 1 or not 0 < alpha <= 1:
        raise ValueError(f"LookAhead needs a whole k >= 1 and 0 < alpha <= 1, not k={k}, alpha={alpha}")


def _radam_step(optimizer: Ranger) -> None:
    """Run RAdam's step without its hooks, which torch adds to the class once a plain RAdam exists."""
    step: Any = torch.optim.RAdam.step
    (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer)


def check_optimizer(optimizer: OptimizerConfig) -> None:
    """Raise `UserError` where this torch does not have the optimizer."""
    if isinstance(optimizer, MuonConfig) and not hasattr(torch.optim, "Muon"):
        raise UserError(f"optimizer.name: muon needs torch 2.9 or newer; this is torch {torch.__version__}")


def build_optimizer(config: Config, roles: Sequence[ParameterRole]) -> torch.optim.Optimizer:
    """Build the optimizer that the configuration names. Raises `ValueError` for one that is not known here."""
    match config.optimizer:
        case SGDConfig() as sgd:
            return torch.optim.SGD(_groups(sgd, roles), sgd.lr, sgd.momentum, nesterov=sgd.nesterov)
        case RangerConfig() as ranger:
            settings = {"betas": ranger.betas, "eps": ranger.eps, "k": ranger.k, "alpha": ranger.alpha}
            return Ranger(_groups(ranger, roles), ranger.lr, **settings)  # type: ignore[arg-type]
        case AdamWConfig() as adamw:
            return torch.optim.AdamW(_groups(adamw, roles), adamw.lr, adamw.betas, adamw.eps)
        case MuonConfig() as muon:
            matrices = [role for role in roles if role.weight and role.hidden]
            others = [role for role in roles if not (role.weight and role.hidden)]
            groups = (_groups(muon, matrices), _groups(muon, others))
            return MuonWithAdamW(*groups, muon.momentum, muon.betas, muon.eps)
        case unknown:
            raise ValueError(f"no optimizer for {unknown!r}")


def _groups(optimizer: OptimizerConfig, roles: Sequence[ParameterRole]) -> list[dict[str, Any]]:
    """Return a parameter group for each learning rate and weight decay that occur together."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for role in roles:
        lr = optimizer.trunk_lr if role.trunk and optimizer.trunk_lr is not None else optimizer.lr
        decay = optimizer.weight_decay if role.weight or optimizer.decay_all else 0.0
        groups.setdefault((lr, decay), []).append(role.parameter)
    return [{"params": group, "lr": lr, "weight_decay": decay} for (lr, decay), group in groups.items()]


def schedule_factor(schedule: ScheduleConfig, steps: int, horizon: int) -> float:
    """Return the factor on `optimizer.lr` of the step after `steps` steps; `horizon` is `Config.horizon`.

    `plateau` has its warm-up alone here: `Schedule` applies its reductions. Raises `ValueError` for an unknown
    schedule.
    """
    warming_up = steps < schedule.warmup
    match schedule:
        case MultiStepConfig() | CosineConfig() | FlatCosineConfig() | PlateauConfig() | ConstantConfig() if warming_up:
            return (steps + 1) / schedule.warmup
        case MultiStepConfig():
            return schedule.gamma ** sum(milestone <= steps for milestone in schedule.milestones)
        case CosineConfig():
            return _half_cosine(steps, schedule.warmup, horizon, schedule.floor)
        case FlatCosineConfig():
            start = max(schedule.warmup, round(schedule.flat * horizon))
            return 1.0 if steps < start else _half_cosine(steps, start, horizon, schedule.floor)
        case PlateauConfig() | ConstantConfig():
            return 1.0
        case unknown:
            raise ValueError(f"no learning-rate schedule for {unknown!r}")


def _half_cosine(steps: int, start: int, end: int, floor: float) -> float:
    """Return the factor that falls from 1 at `start` to `floor` at `end`."""
    progress = min(1.0, (steps - start) / max(1, end - start))
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


class Schedule:
    """Learning rate of one optimizer over a run. Call `after_step` and `after_validation` as the run proceeds."""

    def __init__(self, config: Config, optimizer: torch.optim.Optimizer) -> None:
        self._config, self._optimizer, self.steps = config, optimizer, 0
        self._rates = [group["lr"] for group in optimizer.param_groups]
        """Rate of each group at factor 1; the groups hold the current rates."""
        self.learning_rate = config.optimizer.lr
        """Current rate of STAM and the classifier."""
        self._plateau: torch.optim.lr_scheduler.ReduceLROnPlateau | None = None
        if isinstance(config.schedule, PlateauConfig):
            # torch's scheduler changes an optimizer's rate. This one starts at 1, so its rate is the factor.
            stand_in = torch.optim.SGD([torch.zeros(1)], lr=1.0)
            self._plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                stand_in, mode="max", factor=config.schedule.factor, patience=config.schedule.patience
            )
        self._apply()

    def _apply(self) -> None:
        factor = schedule_factor(self._config.schedule, self.steps, self._config.horizon)
        reduction = 1.0 if self._plateau is None else self._plateau.optimizer.param_groups[0]["lr"]
        self.learning_rate = self._config.optimizer.lr * factor * reduction
        for group, rate in zip(self._optimizer.param_groups, self._rates):
            group["lr"] = rate * factor * reduction

    def after_step(self) -> None:
        self.steps += 1
        self._apply()

    def after_validation(self, mean_class_accuracy: float) -> None:
        if self._plateau is not None and self.steps >= self._config.schedule.warmup:
            self._plateau.step(mean_class_accuracy)
            self._apply()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "plateau": self._plateau.state_dict() if self._plateau else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        if self._plateau is not None:
            self._plateau.load_state_dict(state["plateau"])
            self._plateau.optimizer.param_groups[0]["lr"] = self._plateau.get_last_lr()[0]
        self._apply()


_SMALLEST_SCALE = 2.0**-24
"""Smallest loss scale: float16's smallest number."""


class StreamOptimizer:
    """Optimizer, learning-rate schedule and loss scaler of one stream.

    Each stream has its own, so that a plateau or an overflow in one stream does not affect the other.
    """

    def __init__(
        self, config: Config, roles: Sequence[ParameterRole], device: torch.device, *, scale_loss: bool
    ) -> None:
        self.optimizer = build_optimizer(config, roles)
        self.schedule = Schedule(config, self.optimizer)
        self.scaler = torch.amp.GradScaler(device.type, enabled=scale_loss)
        self.gradient_norm: Tensor | None = None
        """Norm of the last gradient that was applied, before it was clipped; None without `train.clip_norm`."""
        self._train = config.train
        self._parameters = [role.parameter for role in roles]
        self._trunk = [role.parameter for role in roles if role.trunk]
        self._stepped = False
        self.optimizer.register_step_post_hook(self._note_step)

    def _note_step(self, *_: Any) -> None:
        self._stepped = True

    @property
    def learning_rate(self) -> float:
        """Current learning rate of STAM and the classifier."""
        return self.schedule.learning_rate

    def step(self) -> None:
        """Apply the accumulated gradients and reset them; after an overflow change the loss scale only.

        Raises `OverflowError` where they overflow even at a loss scale below `_SMALLEST_SCALE`.
        """
        self._stepped = False
        if self.schedule.steps < self._train.freeze_trunk_for:
            for parameter in self._trunk:
                parameter.grad = None
        norm = None
        if self._train.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self._parameters, self._train.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self._stepped:
            self.gradient_norm = norm
            self.schedule.after_step()
        elif self.scaler.get_scale() < _SMALLEST_SCALE:
            raise OverflowError("the gradients overflow at every loss scale")

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            if group["weight_decay"] and not group.get("decoupled_weight_decay", True):
                say_once(
                    "This run was started by version 0.1: its weight decay stays part of the gradient. Runs of this "
                    "version decay the weights themselves"
                )
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler.is_enabled() and state["scaler"]:  # empty if the run was started without fp16
            self.scaler.load_state_dict(state["scaler"])
