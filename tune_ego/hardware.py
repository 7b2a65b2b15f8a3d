"""What a training process chooses for the hardware it computes on: threads, memory, precision, layout, compilation."""

from __future__ import annotations

import ctypes
import math
import os
import sys

import torch
from torch import Tensor, nn

from tune_ego.config import Config
from tune_ego.console import say
from tune_ego.model import TwoStream

COMPILE_FROM = 1000
"""Iterations of a run from which on `train.compile: auto` compiles, which costs time at each start. Not measured."""
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # of glibc's malloc.h
_KEPT_BYTES, _KEPT_BYTES_OLD = 1 << 30, 32 << 20


def set_up_torch(config: Config, gpus: float) -> None:
    """Threads, memory and kernels, in a process that computes for this configuration."""
    if not gpus:
        torch.set_num_threads(math.ceil(config.compute.cpus_per_worker))
        keep_freed_memory()
    if config.train.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS starts
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)


def keep_freed_memory() -> None:
    """Let glibc reuse what tensors leave on a CPU, instead of giving it back and having the kernel clear it anew.

    A step's tensors are large, and the same at each step: measured, 0.88 of a step's time at 16 x 224 x 224, for up to
    1.4 times its memory. In a thread other than the first it works for tensors under 64 MiB only, but for processes
    that were started with MALLOC_ARENA_MAX=1, as those of `cluster.ray_session` are.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            # Before 2.35 glibc refuses more than 32 MiB; what is refused leaves the threshold at 128 KiB for good.
            if not mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES):
                mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES_OLD)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The 16-bit type of mixed precision, None for float32 (in convolutions on a GPU torch's default, TF32)."""
    if precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def memory_format(device: torch.device, dtype: torch.dtype | None) -> torch.memory_format:
    """Channels last where tensor cores convolve: other layouts are transposed for them, at each convolution."""
    return torch.channels_last_3d if device.type == "cuda" and dtype is not None else torch.contiguous_format


def compiles(config: Config, device: torch.device) -> bool:
    """Whether a run of this configuration is to compile its streams; the same at each start.

    Not with activation checkpointing, whose recomputation the compiler does not take.
    """
    train = config.train
    plain = train.deterministic or train.activation_checkpointing
    return train.compile == "auto" and device.type == "cuda" and train.iterations >= COMPILE_FROM and not plain


def compile_streams(model: TwoStream, clips: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, bool]:
    """Compile each stream for training and evaluation, by trying it on `clips` [B, C, T, H, W], and change no value.

    One that cannot be compiled stays as it is, and a line says why; returns which streams are compiled. Random states
    move: a trainer seeds every pass.
    """
    compiled = {}
    for modality, stream in model.items():
        buffers = {name: buffer.clone() for name, buffer in stream.named_buffers()}
        stream.compile(dynamic=False)
        try:
            _try(stream, clips[modality], dtype)
            compiled[modality] = True
        except Exception as error:  # whatever the compiler raises
            compiled[modality] = False
            stream._compiled_call_impl = None  # what `compile` has set
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            say(f"The {modality} stream is not compiled, and trains as it is: {reason}")
        finally:
            stream.zero_grad(set_to_none=True)
            for name, buffer in stream.named_buffers():
                buffer.copy_(buffers[name])
    return compiled


def _try(stream: nn.Module, clip_BCTHW: Tensor, dtype: torch.dtype | None) -> None:
    for training in (False, True):
        stream.train(training)
        with torch.set_grad_enabled(training), torch.autocast(clip_BCTHW.device.type, dtype, enabled=dtype is not None):
            logits_BK, attention_BTHW = stream(clip_BCTHW)
        if training:
            total = logits_BK.float().sum()
            (total if attention_BTHW is None else total + attention_BTHW.float().sum()).backward()
