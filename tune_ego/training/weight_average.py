"""Exponential moving average of a model."""

from __future__ import annotations

import copy

import torch

from tune_ego.model import TwoStream


class WeightAverage:
    """Exponential moving average of a model's parameters and floating-point buffers.

    The decay after n updates is min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten
    (the `num_updates` of TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, model: TwoStream, decay: float) -> None:
        """Start with a copy of the model, `module`, which is in evaluation mode."""
        self.module = copy.deepcopy(model)
        self.module.eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, model: TwoStream, updates: int) -> None:
        """Move the average towards `model`; `updates` is the number of updates before this one."""
        decay = min(self._decay, (1 + updates) / (10 + updates))
        ours, theirs = self.module.state_dict(), model.state_dict()
        floating = [name for name, value in theirs.items() if value.is_floating_point()]
        torch._foreach_lerp_([ours[name] for name in floating], [theirs[name] for name in floating], 1 - decay)
        for name in theirs.keys() - set(floating):  # the number of batches
            ours[name].copy_(theirs[name])
