"""Settings of a training process for its hardware: threads, memory, precision, layout, compilation."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor, nn

from tune_ego.config import Config
from tune_ego.console import say
from tune_ego.errors import UserError
from tune_ego.freed_memory import keep_freed_memory
from tune_ego.model import TwoStream

COMPILE_FROM = 10_000
"""Iterations of a run from which on `train.compile: auto` compiles. Compiling both streams took over 115 s on 16 cores
beside an H200, on which 3,000 iterations of 12 samples take 4 minutes (165 clips/s)."""


def set_up_torch(config: Config, gpus: float) -> None:
    """Set threads, memory and kernels of this process for a run of this configuration."""
    if not gpus:
        torch.set_num_threads(math.ceil(config.compute.cpus_per_worker))
        keep_freed_memory()
    torch.backends.cudnn.benchmark = bool(gpus) and not config.train.deterministic  # all steps have one shape
    if config.train.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the 16-bit type of mixed precision, None for float32 (torch's default, TF32, in convolutions on a GPU)."""
    match precision:
        case "auto" if device.type != "cuda":
            return None
        case "auto":
            # A T4 or V100 emulates bf16, slowly.
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if native else torch.float16
        case "off":
            return None
        case "fp16":
            return torch.float16
        case "bf16":
            return torch.bfloat16
        case _:
            raise ValueError(f"no precision {precision!r}")


def memory_format(device: torch.device, dtype: torch.dtype | None) -> torch.memory_format:
    """Return channels last for tensor cores, as every convolution would transpose other layouts; else contiguous."""
    return torch.channels_last_3d if device.type == "cuda" and dtype is not None else torch.contiguous_format


def compiles(config: Config, device: torch.device, *, final: bool) -> bool:
    """Tell whether a run of this configuration compiles its streams; each start of a run decides the same.

    Never on a CPU, and never with activation checkpointing, whose recomputation the compiler does not support. With
    `auto` never in trials, most of which end at their first rung.
    """
    train = config.train
    if train.deterministic or train.activation_checkpointing or device.type != "cuda":
        return False
    match train.compile:
        case "on":
            return True
        case "auto":
            return final and train.iterations >= COMPILE_FROM
        case "off":
            return False
        case unknown:
            raise ValueError(f"no rule for train.compile {unknown!r}")


def compile_streams(model: TwoStream, clips: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, bool]:
    """Compile each stream by running it on `clips`, [B, C, T, H, W], for training and for evaluation.

    Returns which streams are compiled. A stream that cannot be compiled trains uncompiled, and a printed line says why.
    Weights, buffers and gradients are as before; random states are not, but a trainer seeds every pass.
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
            say(f"The {modality} stream trains uncompiled: {reason}")
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


def set_batch_norms(model: TwoStream, config: Config, device: torch.device, share: float) -> None:
    """Set BatchNorm up for a worker that computes one in `share` of an iteration's passes.

    Its running statistics move as far in an iteration as those of one worker that computes all passes: momentum m
    becomes 1 - (1 - m)^share. Raises `UserError` for `model.sync_bn` on a CPU, where torch does not have it.
    """
    if config.model.sync_bn and device.type != "cuda":
        raise UserError("model.sync_bn: BatchNorm over all workers needs GPUs")
    for modality, stream in model.items():
        if config.model.sync_bn:
            model[modality] = nn.SyncBatchNorm.convert_sync_batchnorm(stream)
    for module in model.modules() if share != 1 else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None:
            module.momentum = 1 - (1 - module.momentum) ** share
