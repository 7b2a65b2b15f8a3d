"""Each fast way of computing gives the numbers of the straightforward one."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import cloudpickle
from torch.nn import functional as F

from tests.conftest import tiny_config
from tests.training.test_step import CPU, ORIGIN, TwoValidations, batch
from tune_ego.bench.plain import make_plain
from tune_ego.bench.step import Variant, flops_per_clip, largest_difference, measure
from tune_ego.feed.batches import ClipBatch
from tune_ego.feed.feed_plan import FeedPlan, read_packed
from tune_ego.model.i3d import widened
from tune_ego.training.hardware import compile_streams
from tune_ego.training.loop import train
from tune_ego.training.trainer import NonFiniteLoss, Signal, Trainer

_ITERATIONS = 8  # LookAhead's slow weights move at the sixth
GENTLE = {"optimizer__lr": 1e-6, "model__width": 0.2}
"""In float32, with few values in each BatchNorm, larger steps make differences of rounding grow tenfold every few
iterations."""
Change = Callable[[Trainer], object]


def losses_of(change: Change = lambda _: None, **keys: Any) -> tuple[torch.Tensor, Trainer]:
    """(losses of 8 iterations, [iterations, streams, 3], the trainer)."""
    trainer = Trainer(tiny_config(train__iterations=_ITERATIONS, train__precision="off", **keys), ORIGIN, CPU)
    change(trainer)
    return torch.stack([trainer.step(iter([batch(n, clips=4)])) for n in range(_ITERATIONS)]), trainer


def follows_in_single(change: Change = lambda _: None, **keys: Any) -> None:
    """The loss over 8 iterations with small steps."""
    keys = {**GENTLE, **keys}
    plain, ours = losses_of(lambda trainer: make_plain(trainer.model), **keys), losses_of(change, **keys)
    torch.testing.assert_close(ours[0][0, :, 0], plain[0][0, :, 0], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[0][..., 0], plain[0][..., 0], rtol=1e-4, atol=0)
    assert set(ours[1].checkpoint()["model"]) == set(plain[1].checkpoint()["model"])


def follows_in_double(monkeypatch: pytest.MonkeyPatch, change: Change = lambda _: None) -> None:
    """The loss over 8 iterations with usual steps."""
    clips = ClipBatch.model_input
    monkeypatch.setattr(ClipBatch, "model_input", lambda batch: {name: x.double() for name, x in clips(batch).items()})

    def in_double(change: Change) -> torch.Tensor:
        return losses_of(lambda trainer: (trainer.model.double(), change(trainer)))[0]

    found, expected = in_double(change), in_double(lambda trainer: make_plain(trainer.model))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_the_step_follows_the_straightforward_one(monkeypatch: pytest.MonkeyPatch) -> None:
    follows_in_single()
    follows_in_double(monkeypatch)


def test_channels_last_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    def lay_out(trainer: Trainer) -> None:
        trainer.model.to(memory_format=torch.channels_last_3d)
        weight = trainer.model.get_parameter("rgb.Conv3d_2c_3x3.conv3d.weight")
        assert weight.is_contiguous(memory_format=torch.channels_last_3d) and not weight.is_contiguous()

    follows_in_single(lay_out)
    follows_in_double(monkeypatch, lay_out)


def test_channels_of_zeros_change_nothing() -> None:
    """What a GPU convolves frames with in 16 bits: the result, and the weight's gradient."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 4, 6, 6).double(), torch.randn(5, 3, 3, 3, 3).double().requires_grad_()
    assert widened(x).shape == (2, 4, 4, 6, 6) and widened(weight).shape == (5, 4, 3, 3, 3)
    expected, found = F.conv3d(x, weight), F.conv3d(widened(x), widened(weight))
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(result.square().sum(), weight)[0] for result in (expected, found)]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_activation_checkpointing_changes_no_bit() -> None:
    """Not BatchNorm's running statistics either, though each layer runs twice."""
    kept, once = losses_of()
    found, twice = losses_of(train__activation_checkpointing=True)
    assert torch.equal(found, kept)
    theirs = once.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in twice.model.state_dict().items())


def test_activation_checkpointing_keeps_less() -> None:
    def kept_bytes(recomputes: bool) -> int:
        trainer = Trainer(tiny_config(train__activation_checkpointing=recomputes), ORIGIN, CPU)
        trainer.model.train()
        kept = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trainer.model(batch(0, clips=4).model_input())
        return kept

    assert kept_bytes(True) < 0.35 * kept_bytes(False)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler's C++ needs g++")
def test_compiled_streams_follow() -> None:
    def compile_all(trainer: Trainer) -> None:
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        clips = batch(0, clips=4).model_input()
        assert compile_streams(trainer.model, clips, None) == {"rgb": True}
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())

    follows_in_single(compile_all, streams="rgb")


def test_what_cannot_be_compiled_trains_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A compiler that is not there: a line says so, and no bit changes."""
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/g++",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    torch._dynamo.reset()
    clips = batch(0, clips=4).model_input()
    found, trainer = losses_of(
        lambda trainer: trainer.compiled.update(compile_streams(trainer.model, clips, None)), streams="rgb"
    )
    assert trainer.compiled == {"rgb": False}
    assert "The rgb stream trains uncompiled: " in capsys.readouterr().out
    assert torch.equal(found, losses_of(streams="rgb")[0])
    assert trainer.training_metrics(found[0])["compiled_rgb"] == 0


def test_a_verdict_that_comes_late_changes_no_number() -> None:
    def wait(trainer: Trainer) -> None:
        trainer.lag = 1

    at_once, late = losses_of(), losses_of(wait)
    assert torch.equal(at_once[0], late[0])
    late[1].flush_status()
    theirs = at_once[1].model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in late[1].model.state_dict().items())


def test_late_verdicts_are_heard_before_anything_is_written() -> None:
    """The loss of the first iteration is NaN, as after a validation: nothing is reported, and it is named."""
    config = tiny_config(train__precision="off", train__iterations=2, train__validate_every=2, streams="rgb")
    trainer = Trainer(config, ORIGIN, CPU)
    trainer.lag = 1
    with torch.no_grad():
        trainer.model.get_parameter("rgb.logits.conv3d.bias").fill_(math.nan)
    reported: list[Any] = []
    plan: Any = TwoValidations([])
    with pytest.raises(NonFiniteLoss, match="iteration 1: action loss of the rgb stream is nan"):
        train(trainer, plan, iter([batch(1), batch(2)]), lambda *line: reported.append(line))
    assert not reported


def test_a_signal_is_read_one_iteration_later_on_a_gpu() -> None:
    trainer = Trainer(tiny_config(streams="rgb"), ORIGIN, CPU)
    trainer.lag = 1
    trainer.step(iter([batch(1)]), Signal.STOP)
    assert trainer.signal == Signal.NONE
    trainer.step(iter([batch(2)]))
    assert trainer.signal == Signal.STOP
    trainer.step(iter([batch(3)]), Signal.SAVE)
    assert trainer.signal == Signal.NONE
    trainer.flush_status()
    assert trainer.signal == Signal.SAVE


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc's malloc")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    """After 300 MB are freed, the process has them still; without it they are gone."""
    script = """
import resource, sys
import numpy as np
from tune_ego.freed_memory import keep_freed_memory
if sys.argv[1] == "keep": keep_freed_memory()
def resident(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before = resident()
x = np.ones(75_000_000, np.float32); del x
print(resident() - before)
"""
    root = Path(__file__).parents[2]
    kept, gone = (
        int(subprocess.run([sys.executable, "-c", script, word], cwd=root, check=True, capture_output=True).stdout)
        for word in ("keep", "not")
    )
    assert gone < 50e6 and kept > 250e6


def test_the_work_of_a_clip_is_counted() -> None:
    """Three forward passes' worth, but for the gradient of the frames, which nobody needs."""
    stem = 2 * 64 * 3 * 7**3 * 8 * 112**2
    assert round((flops_per_clip("rgb", 224) + stem) / 1e9, 1) == 168.4
    assert flops_per_clip("both", 64) == flops_per_clip("rgb", 64) + flops_per_clip("flow", 64)


def test_a_variant_is_measured_beside_the_matrix_product() -> None:
    threads = torch.get_num_threads()
    ours, plain = (measure(Variant("both", 2, 32, width=0.05, plain=plain), 2) for plain in (False, True))
    torch.set_num_threads(threads)
    assert len(ours.seconds) == len(ours.rates) == 2 and min(ours.seconds) > 0 and min(ours.rates) > 1e9
    assert set(ours.outputs) == {"rgb scores", "rgb attention", "flow scores", "flow attention"}
    assert largest_difference(ours.outputs, plain.outputs) < 1e-5
    other = {name: value + 1 for name, value in plain.outputs.items()}
    assert 0.99 < largest_difference(ours.outputs, other) < 1.01


def test_what_only_watches_a_run_imports_no_torch() -> None:
    """A trial's own process and its controller: torch is 300 MB and two seconds in each."""
    program = """
import sys
import tune_ego.search.tune, tune_ego.search.watcher, tune_ego.runs.launch, tune_ego.feed.pace, tune_ego.freed_memory
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_reading_imports_no_torch(shards: str, tmp_path: Path) -> None:
    """A process that unpickles and runs what Ray sends to a reader."""
    plan = FeedPlan.from_config(shards, tiny_config(), 1, 0)
    (tmp_path / "read").write_bytes(cloudpickle.dumps(partial(read_packed, plan=plan, items_per_block=2)))
    program = """
import pickle, sys
import pyarrow as pa
blocks = [*pickle.load(open(sys.argv[1], "rb"))(pa.table({"item": [0, 1, 2]}))]
assert [block.num_rows for block in blocks] == [2, 1]
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "read")], check=True)
