"""Precision, layout, compilation and threads for each device, as tables: no GPU here."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import tiny_config
from tune_ego.errors import UserError
from tune_ego.model import StreamOutput, TwoStream
from tune_ego.model.two_stream import Stream
from tune_ego.training import hardware
from tune_ego.training.hardware import (
    autocast_dtype,
    compile_streams,
    compiles,
    memory_format,
    set_batch_norms,
    set_up_torch,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("precision", "device", "gpu_has_bf16", "dtype"),
    [
        ("auto", CPU, True, None),
        ("auto", GPU, True, BF16),
        ("auto", GPU, False, FP16),
        ("off", CPU, True, None),
        ("off", GPU, True, None),
        ("bf16", CPU, False, BF16),
        ("bf16", GPU, False, BF16),
        ("fp16", CPU, True, FP16),
        ("fp16", GPU, True, FP16),
    ],
)
def test_the_type_of_mixed_precision(
    precision: str,
    device: torch.device,
    gpu_has_bf16: bool,
    dtype: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu_has_bf16)
    assert autocast_dtype(precision, device) == dtype


@pytest.mark.parametrize(
    ("device", "dtype", "last"),
    [(GPU, BF16, True), (GPU, FP16, True), (GPU, None, False), (CPU, BF16, False), (CPU, None, False)],
)
def test_channels_come_last_for_16_bits_on_a_gpu_alone(
    device: torch.device, dtype: torch.dtype | None, last: bool
) -> None:
    assert memory_format(device, dtype) == (torch.channels_last_3d if last else torch.contiguous_format)


@pytest.mark.parametrize(
    ("device", "changes", "expected"),
    [
        (GPU, {"train__iterations": 10_000}, True),
        (GPU, {"train__iterations": 30_000}, True),
        (GPU, {"train__iterations": 9999}, False),
        (GPU, {"train__iterations": 6, "train__compile": "on"}, True),
        (CPU, {"train__iterations": 10_000}, False),
        (CPU, {"train__iterations": 6, "train__compile": "on"}, False),
        (GPU, {"train__iterations": 10_000, "train__compile": "off"}, False),
        (GPU, {"train__iterations": 10_000, "train__deterministic": True}, False),
        (GPU, {"train__compile": "on", "train__deterministic": True}, False),
        (GPU, {"train__iterations": 10_000, "train__activation_checkpointing": True}, False),
        (GPU, {"train__compile": "on", "train__activation_checkpointing": True}, False),
    ],
)
def test_long_runs_on_a_gpu_compile(device: torch.device, changes: dict[str, Any], expected: bool) -> None:
    """By configuration and device alone, so that a resumed run computes as it did before."""
    assert compiles(tiny_config(**changes), device, final=True) == expected
    trial = expected and changes.get("train__compile") == "on"  # most trials end at their first rung
    assert compiles(tiny_config(**changes), device, final=False) == trial


@pytest.mark.parametrize(("capability", "dtype"), [((7, 0), FP16), ((7, 5), FP16), ((8, 0), BF16), ((9, 0), BF16)])
def test_a_gpu_that_emulates_bf16_computes_in_fp16(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A V100 (7.0) and a T4 (7.5); torch alone says that all of them support bf16."""
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert autocast_dtype("auto", GPU) == dtype


@pytest.mark.parametrize(("gpus", "deterministic", "tries"), [(1, False, True), (1, True, False), (0, False, False)])
def test_cudnn_tries_its_kernels_on_gpus(
    gpus: float, deterministic: bool, tries: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not tries)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "before")
    set_up_torch(tiny_config(train__deterministic=deterministic), gpus)
    assert torch.backends.cudnn.benchmark == tries


@pytest.mark.parametrize("share", [1, 2, 4])
def test_momentum_of_a_worker_s_own_passes_moves_the_statistics_as_far(share: int) -> None:
    """One update instead of `share` updates by the same value: what is left of the start is (1 - 0.1)^share."""
    model = TwoStream(("flow",), 2, tiny_config().model)
    before = [norm.momentum for norm in model.modules() if isinstance(norm, torch.nn.BatchNorm3d)]
    set_batch_norms(model, tiny_config(), CPU, share)
    after = [norm.momentum for norm in model.modules() if isinstance(norm, torch.nn.BatchNorm3d)]
    assert before == [0.1] * len(before) and after == pytest.approx([1 - 0.9**share] * len(before))
    assert share > 1 or before == after  # to the bit


def test_batch_norm_over_all_workers_needs_gpus() -> None:
    config = tiny_config(model__sync_bn=True)
    with pytest.raises(UserError, match=r"model\.sync_bn: BatchNorm over all workers needs GPUs"):
        set_batch_norms(TwoStream(("flow",), 2, config.model), config, CPU, 2)
    model = TwoStream(("flow",), 2, config.model)
    names = list(model.state_dict())
    set_batch_norms(model, config, GPU, 2)
    norms = [norm for norm in model.modules() if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms)
    assert list(model.state_dict()) == names
    assert [norm.momentum for norm in norms] == pytest.approx([0.19] * len(norms))


@pytest.mark.parametrize(
    ("cpus", "gpus", "deterministic", "calls"),
    [
        (2.0, 0.0, False, [("threads", 2), ("keep",)]),
        (2.25, 0.0, False, [("threads", 3), ("keep",)]),
        (0.5, 0.0, True, [("threads", 1), ("keep",), ("deterministic", True)]),
        (2.0, 0.5, False, []),
        (2.0, 1.0, True, [("deterministic", True)]),
    ],
)
def test_a_worker_without_a_gpu_has_a_thread_for_each_cpu_and_keeps_memory(
    cpus: float, gpus: float, deterministic: bool, calls: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[object, ...]] = []
    monkeypatch.setattr(torch, "set_num_threads", lambda count: made.append(("threads", count)))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: made.append(("deterministic", on)))
    monkeypatch.setattr(hardware, "keep_freed_memory", lambda: made.append(("keep",)))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "before")
    set_up_torch(tiny_config(compute__cpus_per_worker=cpus, train__deterministic=deterministic), gpus)
    assert made == calls
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == (":4096:8" if deterministic else "before")


def test_a_deterministic_run_sets_torch_so(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", modes.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    set_up_torch(tiny_config(train__deterministic=True), 1)
    assert modes == [True] and torch.backends.cudnn.benchmark is False
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_trying_the_compiled_streams_changes_no_value(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The compiler is stood in for: the RGB stream runs as it is, in evaluation and in training, and flow's fails."""
    model = TwoStream(("rgb", "flow"), 3, tiny_config().model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options: list[Any] = []

    def compile_stream(stream: Any, **kwargs: Any) -> None:
        options.append(kwargs)
        stream._compiled_call_impl = stream._call_impl if stream.modality == "rgb" else fail

    def fail(*_: Any) -> None:
        raise RuntimeError("\n  no compiler  \nat all")

    modes: list[tuple[bool, bool]] = []
    forward = Stream.forward

    def note(stream: Stream, clip: torch.Tensor) -> StreamOutput:
        modes.append((stream.training, torch.is_grad_enabled()))
        return forward(stream, clip)

    monkeypatch.setattr(Stream, "compile", compile_stream)
    monkeypatch.setattr(Stream, "forward", note)
    clips = {"rgb": torch.zeros(2, 3, 16, 36, 36), "flow": torch.zeros(2, 2, 16, 36, 36)}
    assert compile_streams(model, clips, None) == {"rgb": True, "flow": False}
    assert modes == [(False, False), (True, True)] and options == [{"dynamic": False}] * 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model["flow"]._compiled_call_impl is None and model["rgb"]._compiled_call_impl is not None
    assert capsys.readouterr().out == "The flow stream trains uncompiled: no compiler\n"
