"""I3D: Inception-v1 inflated to three dimensions (Carreira & Zisserman, CVPR 2017).

Module names are those of the published PyTorch weights. B batch, C channels, T time, H, W.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Triple = tuple[int, int, int]
Widths = tuple[int, int, int, int, int, int]
"""Channels of an inception block's units b0, b1a, b1b, b2a, b2b, b3b."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "swish": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
}

FEWEST_CHANNELS = 4
"""For fewer in 16 bits cuDNN leaves the tensor cores unused: the first convolution of 24 windows took 22.1 ms on an
H200 with 3 channels and 8.7 ms with 4 (8.3 ms with 8, but its weight's gradient 6.9 ms instead of 4.4)."""

MIXED_WIDTHS: dict[str, Widths] = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


def scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def same_padding(size: tuple[int, ...], kernel: Triple, stride: Triple) -> list[tuple[int, int]]:
    """Return TensorFlow's SAME padding, (front, back) per dimension, for an input of `size` (T, H, W)."""
    padding = []
    for n, k, s in zip(size, kernel, stride):
        total = max(k - (n % s or s), 0)
        padding.append((total // 2, total - total // 2))
    return padding


def _pad(x: Tensor, padding: list[tuple[int, int]]) -> Tensor:
    return F.pad(x, [amount for pair in reversed(padding) for amount in pair])


def _kernel_pads(x: Tensor, padding: list[tuple[int, int]], stride: Triple) -> bool:
    """Return whether the convolution can pad by itself, which saves a copy of the input.

    Not on a CPU in 16 bits or with strides: measured with torch 2.14.1 (AVX-512), weight gradients of a 7 x 7 x 7
    kernel with `padding=` are wrong in bfloat16 and may end the process ("double free"), and in float32 with stride 2
    they are wrong on 7 frames. After `F.pad` they are right.
    """
    if any(front != back for front, back in padding):
        return False
    return x.device.type != "cpu" or (stride == (1, 1, 1) and not _in_16_bits(x))


def widened(x: Tensor) -> Tensor:
    """Add channels of zeros to images or a weight, up to `FEWEST_CHANNELS`; the convolution's result is the same."""
    return F.pad(x, (0, 0, 0, 0, 0, 0, 0, FEWEST_CHANNELS - x.shape[1]))


def _in_16_bits(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type) or x.dtype in (torch.bfloat16, torch.float16)


class Unit3D(nn.Module):
    """Convolution with SAME padding, then optional BatchNorm and activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: Triple = (1, 1, 1),
        stride: Triple = (1, 1, 1),
        *,
        activation: str | None = "relu",
        batch_norm: bool = True,
        bn_momentum: float = 0.01,
    ) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv3d = nn.Conv3d(inputs, outputs, kernel, stride, bias=not batch_norm)
        self.bn = nn.BatchNorm3d(outputs, eps=1e-3, momentum=bn_momentum) if batch_norm else None
        self.activation = ACTIVATIONS[activation] if activation else None

    def forward(self, x: Tensor) -> Tensor:
        padding = same_padding(x.shape[2:], self.kernel, self.stride)
        weight, bias, stride = self.conv3d.weight, self.conv3d.bias, self.conv3d.stride
        if x.is_cuda and _in_16_bits(x) and x.shape[1] < FEWEST_CHANNELS:
            x, weight = widened(x), widened(weight)
        if _kernel_pads(x, padding, self.stride):
            x = F.conv3d(x, weight, bias, stride, [front for front, _ in padding])
        else:
            x = F.conv3d(_pad(x, padding), weight, bias, stride)
        if self.bn is not None:
            x = self.bn(x)
        return self.activation(x) if self.activation else x


class MaxPool3dSame(nn.Module):
    """Max pool with SAME padding by zeros, as the published weights were trained with; kernels of 2 and 3.

    No padded copy is made. The kernel pads the front with -inf, and `ceil_mode` lets the last window reach over the
    end. Outputs whose window overlaps the padding are then raised to at least zero.
    """

    def __init__(self, kernel: Triple, stride: Triple, *, non_negative: bool) -> None:
        """Build the pool. `non_negative` promises that no input is below zero: then padding by -inf equals zeros."""
        super().__init__()
        if max(kernel) > 3:
            raise ValueError(f"a max pool of kernel {kernel}: sizes over 3 may need padding that no kernel offers")
        self.kernel, self.stride, self.non_negative = kernel, stride, non_negative

    def forward(self, x: Tensor) -> Tensor:
        padding = same_padding(x.shape[2:], self.kernel, self.stride)
        if x.is_cuda and torch.are_deterministic_algorithms_enabled():
            return max_pool3d_deterministic(_pad(x, padding), self.kernel, self.stride)
        if (
            x.device.type == "cpu"
            and not torch.is_grad_enabled()
            and (*self.kernel, *self.stride) == (3, 3, 3, 1, 1, 1)
        ):
            pooled = max_pool3d_by_dimensions(x)
        else:
            front = [front for front, _ in padding]
            pooled = F.max_pool3d(x, self.kernel, self.stride, front, ceil_mode=True)
        if not self.non_negative:
            for dimension, (before, after) in enumerate(padding, start=2):
                # Windows of up to 3 overlap one padded place at each end at most.
                if before:
                    pooled.narrow(dimension, 0, 1).clamp_(min=0)
                if after:
                    pooled.narrow(dimension, -1, 1).clamp_(min=0)
        return pooled


def max_pool3d_by_dimensions(x: Tensor) -> Tensor:
    """Compute `F.max_pool3d(x, 3, 1, 1)` without a gradient, on CPUs up to 20 times as fast.

    torch's kernel also finds the index of each maximum, with one branch for each value that is hard to predict.
    """
    for dimension in (2, 3, 4):
        size = x.shape[dimension] - 1
        pooled = x.clone()
        for target, source in ((0, 1), (1, 0)):
            part = pooled.narrow(dimension, target, size)
            torch.maximum(part, x.narrow(dimension, source, size), out=part)
        x = pooled
    return x


def max_pool3d_deterministic(x: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    """Compute `F.max_pool3d` with a deterministic gradient on CUDA, where torch's kernel adds in any order.

    One dimension after another; of equal values the first has the gradient, as in the kernel.
    """
    for dimension in (4, 3, 2):
        k, s = kernel[dimension - 2], stride[dimension - 2]
        outputs = (x.shape[dimension] - k) // s + 1
        if k == 1 and s == 1:
            continue
        steps = [x.narrow(dimension, i, (outputs - 1) * s + 1) for i in range(k)]
        steps = [step[(slice(None),) * dimension + (slice(None, None, s),)] for step in steps]
        x = steps[0]
        for step in steps[1:]:
            x = torch.where((step > x) | step.isnan(), step, x)
    return x


class InceptionBlock(nn.Module):
    """Four parallel branches, concatenated along the channels."""

    def __init__(self, inputs: int, widths: Widths, *, activation: str, non_negative: bool, bn_momentum: float) -> None:
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = widths

        def unit(inputs: int, outputs: int, size: int) -> Unit3D:
            return Unit3D(inputs, outputs, (size, size, size), activation=activation, bn_momentum=bn_momentum)

        self.b0 = unit(inputs, b0, 1)
        self.b1a = unit(inputs, b1a, 1)
        self.b1b = unit(b1a, b1b, 3)
        self.b2a = unit(inputs, b2a, 1)
        self.b2b = unit(b2a, b2b, 3)
        self.b3a = MaxPool3dSame((3, 3, 3), (1, 1, 1), non_negative=non_negative)
        self.b3b = unit(inputs, b3b, 1)
        self.outputs = b0 + b1b + b2b + b3b

    def forward(self, x: Tensor) -> Tensor:
        branches = (self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x)))
        return torch.cat(branches, dim=1)


def trunk(inputs: int, width: float, activation: str, bn_momentum: float) -> tuple[OrderedDict[str, nn.Module], int]:
    """Build the modules from the input to `Mixed_5c`, in order; return them and the number of output channels."""
    non_negative = activation == "relu"
    stem = scaled(64, width)
    layers: OrderedDict[str, nn.Module] = OrderedDict()

    def unit(name: str, inputs: int, outputs: int, kernel: Triple, stride: Triple = (1, 1, 1)) -> None:
        layers[name] = Unit3D(inputs, outputs, kernel, stride, activation=activation, bn_momentum=bn_momentum)

    def pool(name: str, kernel: Triple, stride: Triple) -> None:
        layers[name] = MaxPool3dSame(kernel, stride, non_negative=non_negative)

    unit("Conv3d_1a_7x7", inputs, stem, (7, 7, 7), (2, 2, 2))
    pool("MaxPool3d_2a_3x3", (1, 3, 3), (1, 2, 2))
    unit("Conv3d_2b_1x1", stem, stem, (1, 1, 1))
    channels = scaled(192, width)
    unit("Conv3d_2c_3x3", stem, channels, (3, 3, 3))
    pool("MaxPool3d_3a_3x3", (1, 3, 3), (1, 2, 2))
    for name, widths in MIXED_WIDTHS.items():
        if name == "Mixed_4b":
            pool("MaxPool3d_4a_3x3", (3, 3, 3), (2, 2, 2))
        elif name == "Mixed_5b":
            pool("MaxPool3d_5a_2x2", (2, 2, 2), (2, 2, 2))
        block = inception(channels, widths, width, activation, non_negative, bn_momentum)
        layers[name], channels = block, block.outputs
    return layers, channels


def inception(
    inputs: int, widths: Widths, width: float, activation: str, non_negative: bool, bn_momentum: float
) -> InceptionBlock:
    b0, b1a, b1b, b2a, b2b, b3b = (scaled(channels, width) for channels in widths)
    return InceptionBlock(
        inputs, (b0, b1a, b1b, b2a, b2b, b3b), activation=activation, non_negative=non_negative, bn_momentum=bn_momentum
    )
