"""The formulas of the model and its recipes, as literally as possible: slow, and nothing of the package in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "swish": lambda x: x / (1 + torch.exp(-x)),
    "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "elu": lambda x: torch.where(x > 0, x, torch.exp(x) - 1),
}


def padded(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """TensorFlow's SAME padding with zeros: ceil(n / s) outputs, what is odd goes to the end."""
    amounts: list[int] = []
    for n, k, s in zip(x.shape[2:], kernel, stride):
        total = max((math.ceil(n / s) - 1) * s + k - n, 0)
        amounts = [total // 2, total - total // 2, *amounts]
    return F.pad(x, amounts)


def max_pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    x = padded(x, kernel, stride)
    sizes = [(n - k) // s + 1 for n, k, s in zip(x.shape[2:], kernel, stride)]
    out = x.new_empty(*x.shape[:2], *sizes)
    for t in range(sizes[0]):
        for i in range(sizes[1]):
            for j in range(sizes[2]):
                window = x
                for dimension, (place, k, s) in enumerate(zip((t, i, j), kernel, stride), start=2):
                    window = window.narrow(dimension, place * s, k)
                out[:, :, t, i, j] = window.flatten(2).amax(dim=2)
    return out


def unit(
    state: dict[str, Tensor],
    name: str,
    x: Tensor,
    kernel: int,
    stride: int = 1,
    activation: str = "relu",
    training: bool = False,
) -> Tensor:
    """Convolution with SAME padding, BatchNorm and activation."""
    weight = state[f"{name}.conv3d.weight"]
    x = F.conv3d(padded(x, (kernel,) * 3, (stride,) * 3), weight, stride=stride)
    shape = (1, -1, 1, 1, 1)
    if training:
        mean = x.mean(dim=(0, 2, 3, 4))
        variance = x.var(dim=(0, 2, 3, 4), correction=0)
    else:
        mean, variance = state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"]
    x = (x - mean.reshape(shape)) / torch.sqrt(variance.reshape(shape) + 1e-3)
    x = x * state[f"{name}.bn.weight"].reshape(shape) + state[f"{name}.bn.bias"].reshape(shape)
    return ACTIVATIONS[activation](x)


def inception(state: dict[str, Tensor], name: str, x: Tensor, activation: str, training: bool) -> Tensor:
    def u(branch: str, x: Tensor, kernel: int) -> Tensor:
        return unit(state, f"{name}.{branch}", x, kernel, activation=activation, training=training)

    pooled = max_pool(x, (3, 3, 3), (1, 1, 1))
    return torch.cat([u("b0", x, 1), u("b1b", u("b1a", x, 1), 3), u("b2b", u("b2a", x, 1), 3), u("b3b", pooled, 1)], 1)


def scale(a: Tensor, how: str) -> Tensor:
    out = torch.zeros_like(a)
    for b in range(a.shape[0]):
        low, high = a[b].min(), a[b].max()
        if how == "subtract_min":
            out[b] = a[b] - low
        elif high > low:
            out[b] = (a[b] - low) / (high - low)
    return out


def stream(
    state: dict[str, Tensor],
    clip: Tensor,
    depth: int,
    how: str = "min_max",
    activation: str = "relu",
    scope: str = "stam",
    training: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(logits, attention) of I3D + STAM, dropout aside, from a state dict with the published names."""
    trunk = activation if scope == "all" else "relu"
    x = unit(state, "Conv3d_1a_7x7", clip, 7, 2, activation=trunk, training=training)
    x = max_pool(x, (1, 3, 3), (1, 2, 2))
    x = unit(state, "Conv3d_2b_1x1", x, 1, activation=trunk, training=training)
    x = unit(state, "Conv3d_2c_3x3", x, 3, activation=trunk, training=training)
    x = max_pool(x, (1, 3, 3), (1, 2, 2))
    for name in ("3b", "3c", "pool3", "4b", "4c", "4d", "4e", "4f", "pool2", "5b", "5c"):
        if name.startswith("pool"):
            x = max_pool(x, (int(name[-1]),) * 3, (2, 2, 2))
        else:
            x = inception(state, f"Mixed_{name}", x, trunk, training)
    attention = None
    if depth:
        a = x
        for number in range(1, depth + 1):
            a = inception(state, "attention_inc" if number == 1 else f"attention_inc_{number}", a, activation, training)
        attention = scale(unit(state, "attention_pred", a, 1, training=training)[:, 0], how)
        x = attention[:, None] * x
    pooled = x.mean(dim=(2, 3, 4))
    weight = state["logits.conv3d.weight"].flatten(1)
    return pooled @ weight.T + state["logits.conv3d.bias"], attention


def gaze_target(
    gaze: Tensor, valid: Tensor, sizes: tuple[int, int, int], sigma: float
) -> list[list[list[list[float]] | None]]:
    """[clip][slice] -> rows of the map, None for a slice without gaze."""
    slices, height, width = sizes
    cells = sigma * height
    share = gaze.shape[1] // slices
    maps: list[list[list[list[float]] | None]] = []
    for b in range(gaze.shape[0]):
        maps.append([])
        for t in range(slices):
            frames = [f for f in range(share * t, share * (t + 1)) if valid[b, f]]
            if not frames:
                maps[b].append(None)
                continue
            x = sum(gaze[b, f, 0].item() for f in frames) / len(frames)
            y = sum(gaze[b, f, 1].item() for f in frames) / len(frames)
            maps[b].append(
                [
                    [math.exp(-((j - x * width) ** 2 + (i - y * height) ** 2) / (2 * cells**2)) for j in range(width)]
                    for i in range(height)
                ]
            )
    return maps


def gaze_loss(attention: Tensor, gaze: Tensor, valid: Tensor, sigma: float) -> Tensor:
    """Mean squared error over the cells of all slices that have gaze."""
    _, slices, height, width = attention.shape
    errors = []
    for b, maps in enumerate(gaze_target(gaze, valid, (slices, height, width), sigma)):
        for t, target in enumerate(maps):
            for i in range(height):
                for j in range(width):
                    if target is not None:
                        errors.append((attention[b, t, i, j] - target[i][j]) ** 2)
    return torch.stack(errors).mean() if errors else 0 * attention.sum()


def cross_entropy(logits: Tensor, labels: list[int]) -> Tensor:
    """Minus the mean logarithm of the softmax score of each row's class."""
    rows = [-torch.log(torch.exp(row[k]) / torch.exp(row).sum()) for row, k in zip(logits, labels)]
    return torch.stack(rows).mean()


def ranger(
    start: Tensor, gradients: list[Tensor | None], lr: float, k: int, alpha: float, decay: float = 0.0
) -> Tensor:
    """RAdam + LookAhead, element by element in float64; a gradient of None is a step that is skipped.

    Weight decay is decoupled (Loshchilov & Hutter, ICLR 2019).
    """
    b1, b2, eps = 0.95, 0.999, 1e-5
    w, slow = start.clone(), start.clone()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    rho_inf = 2 / (1 - b2) - 1
    t = 0
    for g in gradients:
        if g is None:
            continue
        t += 1
        w = w - lr * decay * w
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


def mean_class_accuracy(predicted: list[int], true: list[int]) -> float:
    """Mean of the recall of each class that has clips."""
    recalls = []
    for label in sorted(set(true)):
        hits = [p == t for p, t in zip(predicted, true) if t == label]
        recalls.append(sum(hits) / len(hits))
    return sum(recalls) / len(recalls)


def auc(map_HW: Tensor, cells: list[tuple[int, int]]) -> float:
    """The share of pairs of a gaze cell and another cell in which the map is higher at the gaze; ties are halves."""
    looked_at = sorted(set(cells))
    won = []
    for i, j in looked_at:
        for k in range(map_HW.shape[0]):
            for m in range(map_HW.shape[1]):
                if (k, m) not in looked_at:
                    here, there = map_HW[i, j].item(), map_HW[k, m].item()
                    won.append(1.0 if here > there else 0.5 if here == there else 0.0)
    return sum(won) / len(won)


def auc_judd(map_HW: Tensor, cells: list[tuple[int, int]]) -> float:
    """The MIT benchmark's: a point of the curve for each threshold, the map's value at a gaze cell; trapezoids."""
    looked_at = sorted(set(cells))
    values = map_HW.flatten().tolist()
    at_gaze = [map_HW[i, j].item() for i, j in looked_at]
    points = [(0.0, 0.0)]
    for threshold in sorted(at_gaze, reverse=True):
        hits = sum(value >= threshold for value in at_gaze)
        above = sum(value >= threshold for value in values)
        points.append(((above - hits) / (len(values) - len(at_gaze)), hits / len(at_gaze)))
    points.append((1.0, 1.0))
    return sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in pairwise(points))


def nss(map_HW: Tensor, cells: list[tuple[int, int]]) -> float:
    """The mean over the gaze cells of the map's value there, in standard deviations of the map from its mean."""
    values = map_HW.flatten().tolist()
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    return sum((map_HW[i, j].item() - mean) / deviation for i, j in cells) / len(cells)


def enlarged(map_HW: Tensor, side: int) -> Tensor:
    """[side, side]: bilinear between the cells, of which number j of W lies at x = j / W; beyond the last one even."""
    height, width = map_HW.shape
    out = torch.empty(side, side, dtype=torch.float64)
    for i in range(side):
        for j in range(side):
            row, column = (min((place + 0.5) / side * n, n - 1) for place, n in ((i, height), (j, width)))
            out[i, j] = sum(
                (1 - abs(row - y)) * (1 - abs(column - x)) * map_HW[y, x].item()
                for y in range(height)
                for x in range(width)
                if abs(row - y) < 1 and abs(column - x) < 1
            )
    return out


class BestF1(NamedTuple):
    f1: float
    precision: float
    recall: float
    threshold: float


def best_f1(maps: list[Tensor], points: list[list[tuple[float, float]]], radius: float, steps: int) -> BestF1:
    """The best, over thresholds 0, 1 / steps, ..., of the harmonic mean of precision and recall; both are means over
    all gaze points, of the cells where a map [R, R], scaled to [0, 1], is above the threshold against the disc around
    the point (x, y in [0, 1])."""
    best = BestF1(0.0, 0.0, 0.0, 0.0)
    for step in range(steps):
        precisions, recalls = [], []
        for map_RR, of_map in zip(maps, points):
            scaled = (map_RR - map_RR.min()) / (map_RR.max() - map_RR.min())
            side = map_RR.shape[0]
            above = scaled > step / steps
            centre = (torch.arange(side) + 0.5).double()
            for x, y in of_map:
                disc = (centre[None, :] - x * side) ** 2 + (centre[:, None] - y * side) ** 2 <= radius**2
                hits = (above & disc).sum().item()
                precisions.append(hits / above.sum().item() if above.any() else 0.0)
                recalls.append(hits / disc.sum().item())
        precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
        if precision + recall and 2 * precision * recall / (precision + recall) > best.f1:
            best = BestF1(2 * precision * recall / (precision + recall), precision, recall, step / steps)
    return best
