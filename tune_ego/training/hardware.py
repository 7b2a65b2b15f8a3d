"""Settings of a training process for its hardware: threads, memory, precision, layout, compilation."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor, nn

from tune_ego.config import Config
from tune_ego.console import say
from tune_ego.freed_memory import keep_freed_memory
from tune_ego.model import TwoStream

COMPILE_FROM = 10_000
"""Iterations of a run from which on `train.compile: auto` compiles. Compiling both streams took over 115 s on 16 cores
beside an H200, on which the whole 3,000 iterations of the published recipe take 6 minutes."""


def set_up_torch(config: Config, gpus: float) -> None:
    """Threads, memory and kernels, in a process that computes for this configuration."""
    if not gpus:
        torch.set_num_threads(math.ceil(config.compute.cpus_per_worker))
        keep_freed_memory()
    if config.train.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS starts
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)


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

    On a GPU only, and not with activation checkpointing, whose recomputation the compiler does not take.
    """
    train = config.train
    if train.deterministic or train.activation_checkpointing or device.type != "cuda":
        return False
    return train.compile == "on" or (train.compile == "auto" and train.iterations >= COMPILE_FROM)


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
