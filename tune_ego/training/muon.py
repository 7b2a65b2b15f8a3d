"""Muon for the weights of hidden layers, AdamW for all other parameters, as one optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) and AdamW with one step and one state.

    `torch.optim.Muon` takes matrices only. So each weight, [outputs, inputs, T, H, W], has a copy of the form
    [outputs, inputs x T x H x W] that Muon updates, and that is then copied back. This form does not depend on the
    memory format of the weights, so a state can be loaded on another kind of device.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        momentum: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """Build both optimizers.

        Args:
            matrices: Parameter groups for Muon, with `lr` and `weight_decay`: weights of two or more dimensions.
            others: Parameter groups for AdamW, with `lr` and `weight_decay`.
            momentum: Momentum of Muon, in Nesterov's form.
            betas: Betas of AdamW.
            eps: Epsilon of AdamW.
        """
        super().__init__([*matrices, *others], {})
        flat = [{**group, "params": [_matrix(p) for p in group["params"]]} for group in matrices]
        self._muon = torch.optim.Muon(flat, momentum=momentum, adjust_lr_fn="match_rms_adamw") if flat else None
        self._adamw = torch.optim.AdamW(others, betas=betas, eps=eps) if others else None

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update all parameters with a gradient, with the learning rates of `param_groups`."""
        groups = iter(self.param_groups)
        for optimizer in self._parts():
            for inner, group in zip(optimizer.param_groups, groups):
                inner["lr"] = group["lr"]
        if self._muon is not None:
            self._step_muon(self._muon)
        if self._adamw is not None:
            self._adamw.step()

    def _step_muon(self, muon: torch.optim.Optimizer) -> None:
        pairs = [
            (p, matrix)
            for group, inner in zip(self.param_groups, muon.param_groups)
            for p, matrix in zip(group["params"], inner["params"])
            if p.grad is not None
        ]
        for p, matrix in pairs:
            matrix.copy_(p.flatten(1))
            matrix.grad = p.grad.flatten(1)
        muon.step()
        for p, matrix in pairs:
            p.copy_(matrix.view(p.shape))
            matrix.grad = None

    def _parts(self) -> list[torch.optim.Optimizer]:
        return [part for part in (self._muon, self._adamw) if part is not None]

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both optimizers, under `parts`."""
        return {"parts": [part.state_dict() for part in self._parts()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned. Raises `ValueError` where it is of other parameters."""
        if len(state_dict["parts"]) != len(self._parts()):
            raise ValueError(f"a state of {len(state_dict['parts'])} optimizers, not {len(self._parts())}")
        for part, state in zip(self._parts(), state_dict["parts"]):
            part.load_state_dict(state)


def _matrix(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().flatten(1).clone(memory_format=torch.contiguous_format))
