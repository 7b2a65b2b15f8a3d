"""TV-L1 optical flow in PyTorch, batched over frame pairs, on a CPU or a GPU.

Zach, Pock, Bischof: A Duality Based Approach for Realtime TV-L1 Optical Flow (DAGM 2007), with the constants, the
pyramid and the median filter of OpenCV's `DualTVL1OpticalFlow`, which the published recipe used. There are two
differences from OpenCV: convergence is tested at every fifth step only, and images are sampled at multiples of
1 / WARP_STEPS pixel.

N pairs, H, W pixels. An axis of length 2 is x, y. The dual variable [2, 2, N, H, W] has two such axes: first the
direction of the derivative, then the component of the flow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TAU = 0.25
LAMBDA = 0.15
THETA = 0.3
SCALES, SCALE_STEP, SMALLEST_SIDE = 5, 0.8, 16
WARPS = 5
OUTER, INNER = 10, 30
"""Each warp runs OUTER rounds of a median filter and INNER steps; fewer where the pair converges."""
EPSILON = 0.01
"""Pixels. A pair has converged when the root of the mean squared change of its flow in one step is below this value."""
CHECK_EVERY = 5
"""Steps between two tests for convergence."""
MEDIAN_SIDE = 5
"""Side of the median filter, pixels."""
WARP_STEPS = 128
"""Sampling positions in a pixel, in each direction. The steps are fine enough to follow motion of hundredths of a
pixel, as OpenCV 5 does, and coarse enough that rounding errors of still images do not grow at the borders. OpenCV 4 had
32."""


@torch.inference_mode()
def tv_l1(before_NHW: Tensor, after_NHW: Tensor) -> Tensor:
    """Compute the motion from `before` to `after`: [N, H, W, 2] float32, pixels, x then y.

    The frames are grey, with values from 0 to 255. The flow of a pair does not depend on the other pairs of its batch.
    """
    first, second = _pyramid(before_NHW), _pyramid(after_NHW)
    flow_2NHW = first[-1].new_zeros(2, *first[-1].shape)
    for before, after in zip(reversed(first), reversed(second)):
        if flow_2NHW.shape[1:] != before.shape:
            flow_2NHW = F.interpolate(flow_2NHW, size=before.shape[1:], mode="bilinear") / SCALE_STEP
        flow_2NHW = _one_scale(before, after, flow_2NHW)
    return flow_2NHW.permute(1, 2, 3, 0)


def _pyramid(frame_NHW: Tensor) -> list[Tensor]:
    """Return the frames at each scale, finest first."""
    levels = [frame_NHW.float()]
    for _ in range(1, SCALES):
        size = [round(side * SCALE_STEP) for side in levels[-1].shape[1:]]
        if min(size) < SMALLEST_SIDE:
            break
        levels.append(F.interpolate(levels[-1][None], size=size, mode="bilinear")[0])
    return levels


def _one_scale(before_NHW: Tensor, after_NHW: Tensor, flow_2NHW: Tensor) -> Tensor:
    """Refine the flow [2, N, H, W] at one scale."""
    height, width = before_NHW.shape[1:]
    y_HW, x_HW = torch.meshgrid(
        torch.arange(height, device=before_NHW.device), torch.arange(width, device=before_NHW.device), indexing="ij"
    )
    pixel_2NHW = torch.stack([x_HW, y_HW])[:, None]
    half_size = before_NHW.new_tensor([(width - 1) / 2, (height - 1) / 2]).view(2, 1, 1, 1)
    source_N3HW = torch.stack([after_NHW, *_central_differences(after_NHW)], dim=1)
    dual_22NHW = flow_2NHW.new_zeros(2, *flow_2NHW.shape)
    for _ in range(WARPS):
        position_2NHW = ((pixel_2NHW + flow_2NHW) * WARP_STEPS).round_() / WARP_STEPS
        grid_NHW2 = (position_2NHW / half_size - 1).permute(1, 2, 3, 0)
        warped_N3HW = F.grid_sample(source_N3HW, grid_NHW2, mode="bicubic", padding_mode="zeros", align_corners=True)
        warped, gx, gy = (plane.contiguous() for plane in warped_N3HW.unbind(1))
        # Constant term of the brightness residual, which is linear in the flow.
        constant = warped - before_NHW - gx * flow_2NHW[0] - gy * flow_2NHW[1]
        flow_2NHW, dual_22NHW = _solve(flow_2NHW, dual_22NHW, (gx, gy, constant))
    return flow_2NHW


def _central_differences(frame_NHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivatives in x and in y, each [N, H, W]; border pixels are repeated."""
    padded = F.pad(frame_NHW[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    x = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
    y = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
    return x, y


def _solve(flow: Tensor, dual: Tensor, data: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Iterate one warp: flow [2, N, H, W] and dual [2, 2, N, H, W]. A pair that has converged leaves the batch."""
    solved_flow, solved_dual = torch.empty_like(flow), torch.empty_like(dual)
    pairs = torch.arange(flow.shape[1], device=flow.device)
    gx, gy, constant = data
    for _ in range(OUTER):
        flow = median_filter(flow)
        for _ in range(INNER // CHECK_EVERY):
            change = _steps(flow, dual, (gx, gy, constant))
            active = change > EPSILON**2
            if not active.all():
                converged = ~active
                solved_flow[:, pairs[converged]] = flow[:, converged]
                solved_dual[:, :, pairs[converged]] = dual[:, :, converged]
                pairs, flow, dual = pairs[active], flow[:, active], dual[:, :, active]
                gx, gy, constant = gx[active], gy[active], constant[active]
                if not len(pairs):
                    return solved_flow, solved_dual
    solved_flow[:, pairs], solved_dual[:, :, pairs] = flow, dual
    return solved_flow, solved_dual


def _steps(flow: Tensor, dual: Tensor, data: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Run CHECK_EVERY steps in place. Return the mean squared change [N] of each pair's flow in the last step."""
    gx, gy, constant = data
    downhill = -1 / (gx * gx + gy * gy).clamp_min(1e-9)  # where the gradient is zero, this factor has no effect
    gradient = torch.zeros_like(dual)  # forward differences: zero in the last column and row
    along, divergence = torch.empty_like(gx), torch.empty_like(flow)
    previous = flow
    for step in range(CHECK_EVERY):
        if step == CHECK_EVERY - 1:
            previous = flow.clone()
        # Step towards constant brightness, by at most LAMBDA * THETA times the gradient.
        torch.mul(gx, flow[0], out=along)
        along.addcmul_(gy, flow[1]).add_(constant).mul_(downhill).clamp_(-LAMBDA * THETA, LAMBDA * THETA)
        flow[0].addcmul_(along, gx)
        flow[1].addcmul_(along, gy)
        # Step towards smoothness.
        torch.add(dual[0], dual[1], out=divergence)
        divergence[..., 1:] -= dual[0, ..., :-1]
        divergence[..., 1:, :] -= dual[1, ..., :-1, :]
        flow.add_(divergence, alpha=THETA)
        torch.sub(flow[..., 1:], flow[..., :-1], out=gradient[0, ..., :-1])
        torch.sub(flow[..., 1:, :], flow[..., :-1, :], out=gradient[1, ..., :-1, :])
        norm = torch.mul(gradient[0], gradient[0], out=divergence).addcmul_(gradient[1], gradient[1]).sqrt_()
        dual.add_(gradient, alpha=TAU / THETA).div_(norm.mul_(TAU / THETA).add_(1))
    return (flow - previous).square_().sum(0).mean((1, 2))


def median_filter(image: Tensor) -> Tensor:
    """Compute the median of 5 x 5 pixels in the last two axes; border pixels are repeated.

    Uses forgetful selection. Among 14 of the 25 values, neither the smallest nor the largest can be the median. Both
    are dropped, the next value is added, and so on. Each comparison works on whole images, which is much faster than
    sorting at every pixel.
    """
    height, width = image.shape[-2:]
    margin = MEDIAN_SIDE // 2
    padded = F.pad(image, (margin,) * 4, mode="replicate")
    offsets = range(MEDIAN_SIDE)
    remaining = [padded[..., y : y + height, x : x + width] for y in offsets for x in offsets]
    candidates = [remaining.pop() for _ in range(MEDIAN_SIDE**2 // 2 + 2)]
    while True:
        candidates = _without_extremes(candidates)
        if not remaining:
            return candidates[0].contiguous()
        candidates.append(remaining.pop())


def _without_extremes(values: list[Tensor]) -> list[Tensor]:
    """Return the values without their minimum and maximum at each pixel."""
    values = list(values)

    def order(low: int, high: int) -> None:
        pair = values[low], values[high]
        values[low], values[high] = torch.minimum(*pair), torch.maximum(*pair)

    last = len(values) - 1
    for place in range(len(values) // 2):
        order(place, last - place)
    for place in range(1, (last + 2) // 2):
        order(0, place)
    for place in range((last + 1) // 2, last):
        order(place, last)
    return values[1:-1]
