"""Decoding of a batch's images on the device, with torchvision: nvJPEG on a GPU, libjpeg-turbo on a CPU.

B batch, T time, H, W, C channels.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from tune_ego.errors import UserError
from tune_ego.feed.augmentation import mirrored_flow_x, scaled_flow


def decode_images(batch: dict[str, np.ndarray], stream: str, device: torch.device) -> Tensor:
    """Decode, crop and mirror the images of a stream of a batch from `WindowReader.read_encoded`.

    Crop and mirroring are those of `WindowReader.read_batch`. Pixels may differ a little: the decoder is another.

    Args:
        batch: Batch of `read_encoded`.
        stream: `rgb` or `flow`.
        device: Device on which the images are decoded.

    Returns:
        uint8, `rgb` [B, T, H, W, 3] or `flow` [B, T, 2, H, W].

    Raises:
        UserError: An image cannot be decoded.
    """
    mode, channels = _read_mode(stream)
    sizes_BT = batch[f"{stream}_bytes"]
    data = torch.tensor(batch[f"{stream}_jpeg"])  # a copy: arrays from the object store are read-only
    files = [file for file in data.split(sizes_BT.flatten().tolist()) if len(file)]  # padding has empty files
    images = iter(_decode(files, mode, device) if files else [])  # each [3, H, W] or [1, 2H, W]
    clips = []
    for sizes_T, (top, left, width, height, side, flip) in zip(sizes_BT, batch["place"].tolist()):
        if not sizes_T.any():  # padding
            clips.append(torch.zeros((len(sizes_T), channels, side, side), dtype=torch.uint8, device=device))
            continue
        frames_TCHW = torch.stack([next(images) for _ in sizes_T])
        if stream == "flow":  # [T, 1, 2H, W], x above y -> [T, 2, H, W]
            frames_TCHW = frames_TCHW.reshape(len(sizes_T), 2, -1, frames_TCHW.shape[-1])
        crop = frames_TCHW[..., top : top + height, left : left + width]
        if (width, height) != (side, side):
            crop = F.interpolate(crop.float(), (side, side), mode="bilinear", antialias=True)
            if stream == "flow":
                crop = torch.stack([scaled_flow(crop[:, 0], side / width), scaled_flow(crop[:, 1], side / height)], 1)
            crop = crop.round().clamp(0, 255).to(torch.uint8)
        if flip:
            crop = crop.flip(-1)
            if stream == "flow":
                crop[:, 0] = mirrored_flow_x(crop[:, 0])
        clips.append(crop)
    images_BTCHW = torch.stack(clips)
    return images_BTCHW.permute(0, 1, 3, 4, 2) if stream == "rgb" else images_BTCHW


def _read_mode(stream: str) -> tuple[ImageReadMode, int]:
    """Return (torchvision's mode of decoding, channels after the split of flow into x and y) of a stream."""
    match stream:
        case "rgb":
            return ImageReadMode.RGB, 3
        case "flow":
            return ImageReadMode.GRAY, 2
        case _:
            raise ValueError(f"no stream {stream!r}")


def _decode(files: list[Tensor], mode: ImageReadMode, device: torch.device) -> list[Tensor]:
    """Decode JPEG files, uint8 [bytes] each, to images uint8 [C, H, W] on the device."""
    if device.type == "cuda":
        # nvJPEG writes on a CUDA stream of its own, into memory that kernels on the current stream may still read.
        torch.cuda.current_stream(device).synchronize()
    try:
        # Since 0.29 torchvision recommends torchcodec, which would be a further package for this option alone.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            images: list[Tensor] = decode_jpeg(files, mode=mode, device=device)
            return images
    except RuntimeError as error:
        # nvJPEG raises the same error for a damaged image and for a lack of memory. Decoding the same files on the CPU
        # raises `UserError` for a damaged image; else the error of the GPU is passed on.
        if device.type == "cuda":
            _decode(files, mode, torch.device("cpu"))
            raise
        raise UserError(f"an image cannot be decoded ({error}); `data.decode: cpu` names the clip") from error
