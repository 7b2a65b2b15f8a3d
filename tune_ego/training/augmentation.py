"""Changes of a training batch on the device: colour jitter and mixup.

B batch, C channels, T time, H, W. The feed crops, scales and mirrors (`feed.augmentation`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tune_ego.config import AugmentConfig

_GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luma (ITU-R BT.601)."""


class Mixing(NamedTuple):
    """Weights that mix each window of a batch with the one before it, and the first window with the last one."""

    own_B: Tensor
    """Weight of the window itself, float32, from 0.5 to 1; 1 where it is not mixed."""

    def __call__(self, values: Tensor) -> Tensor:
        """Return the mixture of values whose first dimension is that of the windows."""
        own = self.own_B.reshape(-1, *[1] * (values.dim() - 1))
        return own * values + (1 - own) * values.roll(1, 0)


class Draws(NamedTuple):
    """Random numbers for the windows of a batch; None for changes that are off."""

    colour_B3: Tensor | None
    """Factors on brightness, contrast and saturation, float32."""
    mixing: Mixing | None


def draw(augment: AugmentConfig, windows: int, seed: np.random.SeedSequence, device: torch.device) -> Draws:
    """Draw the random numbers of a batch; they depend on the seed and the number of windows alone."""
    colours, mixtures = (np.random.default_rng(child) for child in seed.spawn(2))
    colour_B3 = mixing = None
    if augment.colour:
        factors = colours.uniform(1 - augment.colour, 1 + augment.colour, (windows, 3))
        colour_B3 = torch.tensor(factors, dtype=torch.float32, device=device)
    if augment.mixup:
        share_B = mixtures.beta(augment.mixup, augment.mixup, windows)
        own_B = np.where(mixtures.random(windows) < augment.mixup_share, np.maximum(share_B, 1 - share_B), 1.0)
        mixing = Mixing(torch.tensor(own_B, dtype=torch.float32, device=device))
    return Draws(colour_B3, mixing)


def augmented(clips: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
    """Return the model's input, stream -> [B, C, T, H, W] in [-1, 1], after the changes that are on."""
    if draws.colour_B3 is not None and "rgb" in clips:
        clips = {**clips, "rgb": jitter_colours(clips["rgb"], draws.colour_B3)}
    if draws.mixing is not None:
        clips = {name: draws.mixing(clip) for name, clip in clips.items()}
    return clips


def jitter_colours(rgb_BCTHW: Tensor, factor_B3: Tensor) -> Tensor:
    """Change brightness, then contrast, then saturation of windows, as torchvision's ColorJitter does.

    Args:
        rgb_BCTHW: Images in [-1, 1], float.
        factor_B3: Factors on brightness, contrast and saturation. Contrast is that to the mean grey of the window.

    Returns:
        Images in [-1, 1], cut to this range after each change.
    """
    x = (rgb_BCTHW + 1) / 2
    brightness, contrast, saturation = (factor_B3[:, place].reshape(-1, 1, 1, 1, 1) for place in range(3))
    x = (x * brightness).clamp(0, 1)
    mean = _grey(x).mean(dim=(1, 2, 3, 4), keepdim=True)
    x = (mean + (x - mean) * contrast).clamp(0, 1)
    grey = _grey(x)
    x = (grey + (x - grey) * saturation).clamp(0, 1)
    return 2 * x - 1


def _grey(x_BCTHW: Tensor) -> Tensor:
    weight_C = torch.tensor(_GREY, device=x_BCTHW.device, dtype=x_BCTHW.dtype)
    return (x_BCTHW * weight_C.reshape(1, 3, 1, 1, 1)).sum(dim=1, keepdim=True)
