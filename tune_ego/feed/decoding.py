"""Decoding the images of a batch on the device, with torchvision: nvJPEG on a GPU, libjpeg-turbo on a CPU.

B batch, T time, H, W, C channels.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from tune_ego.config import WINDOW_FRAMES
from tune_ego.errors import UserError
from tune_ego.feed.augmentation import mirrored_flow_x


def decoded(batch: dict[str, np.ndarray], name: str, device: torch.device) -> Tensor:
    """The images of a stream of a batch of `WindowReader.read_encoded`, cropped and mirrored: what `read_batch` reads.

    uint8, `rgb` [B, T, H, W, 3] or `flow` [B, T, 2, H, W]; on a GPU pixels may differ a little. Raises `UserError` for
    an image that cannot be decoded.
    """
    sizes_BT, places_B4 = batch[f"{name}_bytes"], batch["place"].tolist()
    data = torch.tensor(batch[f"{name}_jpeg"])  # a copy: what comes from the object store is read-only
    files = [file for file in data.split(sizes_BT.flatten().tolist()) if len(file)]
    mode = ImageReadMode.RGB if name == "rgb" else ImageReadMode.GRAY
    images = iter(_decode(files, mode, device) if files else [])
    clips = []
    for sizes_T, (top, left, side, flip) in zip(sizes_BT, places_B4):
        if not sizes_T.any():  # padding
            shape = (WINDOW_FRAMES, 3 if name == "rgb" else 2, side, side)
            clips.append(torch.zeros(shape, dtype=torch.uint8, device=device))
            continue
        frames_TCHW = torch.stack([next(images) for _ in range(WINDOW_FRAMES)])
        if name == "flow":  # its components lie one above the other
            frames_TCHW = frames_TCHW.reshape(WINDOW_FRAMES, 2, -1, frames_TCHW.shape[-1])
        crop = frames_TCHW[..., top : top + side, left : left + side]
        if flip:
            crop = crop.flip(-1)
            if name == "flow":
                crop[:, 0] = mirrored_flow_x(crop[:, 0])
        clips.append(crop)
    images_BTCHW = torch.stack(clips)
    return images_BTCHW.permute(0, 1, 3, 4, 2) if name == "rgb" else images_BTCHW


def _decode(files: list[Tensor], mode: ImageReadMode, device: torch.device) -> list[Tensor]:
    if device.type == "cuda":
        # nvJPEG writes on a stream of its own, into memory that work on this one may still read.
        torch.cuda.current_stream(device).synchronize()
    try:
        with warnings.catch_warnings():  # since 0.29 it points to torchcodec: one more package, for this option alone
            warnings.simplefilter("ignore", DeprecationWarning)
            images: list[Tensor] = decode_jpeg(files, mode=mode, device=device)
            return images
    except RuntimeError as error:
        # What a GPU raises does not say whether it is the image, memory or the GPU: the CPU decodes what is whole.
        if device.type == "cuda":
            _decode(files, mode, torch.device("cpu"))
            raise
        raise UserError(f"an image cannot be decoded ({error}); `data.decode: cpu` says which clip's it is") from error
