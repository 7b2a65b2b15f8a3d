"""The choices for the hardware, with a GPU stood in for where one is needed."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tests.conftest import tiny_config
from tune_ego import hardware
from tune_ego.hardware import autocast_dtype, compile_streams, compiles, memory_format, set_up_torch
from tune_ego.model import StreamOutput, TwoStream
from tune_ego.model.two_stream import Stream

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("precision", "device", "has_bf16", "dtype"),
    [
        ("auto", CPU, True, None),
        ("auto", GPU, True, torch.bfloat16),
        ("auto", GPU, False, torch.float16),
        ("off", GPU, True, None),
        ("fp16", GPU, True, torch.float16),
        ("bf16", CPU, False, torch.bfloat16),
    ],
)
def test_the_type_of_mixed_precision(
    monkeypatch: pytest.MonkeyPatch, precision: str, device: torch.device, has_bf16: bool, dtype: torch.dtype | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bf16)
    assert autocast_dtype(precision, device) == dtype


@pytest.mark.parametrize(
    ("device", "dtype", "layout"),
    [
        (GPU, torch.float16, torch.channels_last_3d),
        (GPU, None, torch.contiguous_format),
        (CPU, torch.bfloat16, torch.contiguous_format),
    ],
)
def test_the_layout_in_memory(device: torch.device, dtype: torch.dtype | None, layout: torch.memory_format) -> None:
    assert memory_format(device, dtype) == layout


@pytest.mark.parametrize(
    ("device", "changes", "expected"),
    [
        (GPU, {"iterations": 1000}, True),
        (GPU, {"iterations": 999}, False),
        (CPU, {"iterations": 1000}, False),
        (GPU, {"iterations": 1000, "compile": "off"}, False),
        (GPU, {"iterations": 1000, "deterministic": True}, False),
        (GPU, {"iterations": 1000, "activation_checkpointing": True}, False),
    ],
)
def test_which_runs_are_compiled(device: torch.device, changes: dict[str, Any], expected: bool) -> None:
    assert compiles(tiny_config(**{f"train__{key}": value for key, value in changes.items()}), device) is expected


@pytest.mark.parametrize(("gpus", "threads"), [(0, [3]), (1, []), (0.5, [])])
def test_a_process_without_a_gpu_has_the_threads_of_its_cpus(
    monkeypatch: pytest.MonkeyPatch, gpus: float, threads: list[int]
) -> None:
    """Rounded up; and freed memory is kept then."""
    calls: list[Any] = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    monkeypatch.setattr(hardware, "keep_freed_memory", lambda: calls.append("memory"))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: calls.append(mode))
    set_up_torch(tiny_config(compute__cpus_per_worker=2.5), gpus)
    assert calls == [*threads, *(["memory"] if threads else [])]


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
    assert capsys.readouterr().out == "The flow stream is not compiled, and trains as it is: no compiler\n"
