"""Video backbones of torchvision as the trunk of a stream. I3D is in `model.i3d`.

B batch, C channels, T time, H, W; T', H', W' those of the feature map.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Triple = tuple[float, float, float]


class Facts(NamedTuple):
    """Properties of a backbone of torchvision."""

    channels: int
    """Channels of the feature map."""
    frames_per_slice: int
    """Frames of the clip for each time step of the feature map."""
    non_negative: bool
    """Whether the feature map is never below zero."""
    mean: Triple
    """Mean of red, green and blue in [0, 1], that the published weights expect to be subtracted."""
    std: Triple
    """Divisors after that."""
    head: tuple[str, ...]
    """Modules of torchvision's model that are no part of the trunk."""


_R2PLUS1D = ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FACTS = {
    "s3d": Facts(1024, 8, True, *_R2PLUS1D, head=("avgpool", "classifier")),
    "r2plus1d_18": Facts(512, 8, True, *_R2PLUS1D, head=("avgpool", "fc")),
    "mvit_v2_s": Facts(768, 2, False, (0.45,) * 3, (0.225,) * 3, head=("head",)),
    "swin3d_t": Facts(768, 2, False, *_IMAGENET, head=("avgpool", "head")),
}
"""Facts of each backbone. Means and divisors are those of torchvision's transforms of the Kinetics-400 weights."""


class TorchvisionTrunk(nn.Module):
    """A model of torchvision without its head. Parameter names are torchvision's.

    - `s3d`: Xie et al., ECCV 2018.
    - `r2plus1d_18`: Tran et al., CVPR 2018.
    - `mvit_v2_s`: Li et al., CVPR 2022. For clips other than 16 x 224 x 224 its tables of relative positions are
      interpolated in each pass.
    - `swin3d_t`: Liu et al., CVPR 2022.
    """

    def __init__(self, name: str, inputs: int, bn_momentum: float) -> None:
        """Build the trunk with fresh weights.

        Args:
            name: A key of `FACTS`.
            inputs: Channels of the clips: 3 (RGB) or 2 (flow).
            bn_momentum: Weight of a new batch in the running statistics, where there are any.
        """
        super().__init__()
        self.name, self.facts = name, FACTS[name]
        for child, module in _torchvision_model(name).named_children():
            if child not in self.facts.head:
                self.add_module(child, module)
        if inputs != 3:
            replace_first_convolution(self, inputs)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = bn_momentum
        mean, std = torch.tensor(self.facts.mean), torch.tensor(self.facts.std)
        if inputs != 3:  # flow in [-1, 1] has mean 0 where nothing moves
            mean, std = torch.full((inputs,), 0.5), std.mean().expand(inputs)
        self.register_buffer("_shift", (2 * mean - 1).reshape(1, -1, 1, 1, 1), persistent=False)
        self.register_buffer("_scale", (2 * std).reshape(1, -1, 1, 1, 1), persistent=False)

    def forward(self, clip_BCTHW: Tensor) -> Tensor:
        """Compute the feature map [B, C, T', H', W'] of clips, floats in [-1, 1]."""
        modules: Any = self
        x: Tensor = (clip_BCTHW - modules._shift) / modules._scale
        match self.name:
            case "s3d":
                features: Tensor = modules.features(x)
                return features
            case "r2plus1d_18":
                for layer in (modules.stem, modules.layer1, modules.layer2, modules.layer3, modules.layer4):
                    x = layer(x)
                return x
            case "mvit_v2_s":
                x = modules.conv_proj(x)
                size = tuple(x.shape[2:])
                x = modules.pos_encoding(x.flatten(2).transpose(1, 2))  # [B, 1 + T H W, C], a class token first
                for block in modules.blocks:
                    x, size = block(x, size)
                tokens: Tensor = modules.norm(x)[:, 1:]
                return tokens.transpose(1, 2).unflatten(2, size)
            case "swin3d_t":
                x = modules.norm(modules.features(modules.pos_drop(modules.patch_embed(x))))  # [B, T', H', W', C]
                return x.permute(0, 4, 1, 2, 3)
            case unknown:
                raise ValueError(f"no backbone {unknown!r}")


def _torchvision_model(name: str) -> nn.Module:
    from torchvision.models import video  # takes a second to import

    model: nn.Module = getattr(video, name)(weights=None)
    return model


def first_convolution(trunk: nn.Module) -> str:
    """Return the name of the convolution that takes the clip."""
    return next(name for name, module in trunk.named_modules() if isinstance(module, nn.Conv3d))


def replace_first_convolution(trunk: nn.Module, inputs: int) -> None:
    """Replace the convolution that takes the clip by one for `inputs` channels, with fresh weights."""
    parent, _, name = first_convolution(trunk).rpartition(".")
    old = getattr(trunk.get_submodule(parent), name)
    new = nn.Conv3d(inputs, old.out_channels, old.kernel_size, old.stride, old.padding, bias=old.bias is not None)
    setattr(trunk.get_submodule(parent), name, new)
