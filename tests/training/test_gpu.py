"""A GPU gives the numbers of the CPU. Every test here is skipped where there is no GPU."""

from __future__ import annotations

import itertools
import math
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests import handmade
from tests.conftest import tiny_config
from tests.feed.test_batches import encoded
from tests.training.test_step import ORIGIN, TwoValidations, batch
from tune_ego.dataset import flow
from tune_ego.dataset.shards import open_shards
from tune_ego.dataset.tv_l1 import tv_l1
from tune_ego.errors import UserError
from tune_ego.evaluation.evaluate import score_clips
from tune_ego.feed.batches import ClipBatch, batches_to_device, to_device
from tune_ego.feed.feed_plan import FeedPlan, read_items
from tune_ego.feed.packing import Batch
from tune_ego.model import TwoStream
from tune_ego.results.experiment import GPU_BYTES
from tune_ego.training.checkpoint import Origin
from tune_ego.training.hardware import set_up_torch
from tune_ego.training.loop import train
from tune_ego.training.trainer import NonFiniteLoss, Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GENTLE = {"optimizer__lr": 1e-6, "model__width": 0.2, "model__dropout": 0.0}
"""Small steps: differences of rounding do not grow. The two devices draw different numbers for dropout."""


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    """Without TF32, whose rounding is a thousand times coarser."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


def on(device: torch.device, clips: ClipBatch) -> ClipBatch:
    return clips._replace(**{name: tensor.to(device) for name, tensor in clips._asdict().items() if tensor is not None})


def trainer_on(device: torch.device, **keys: Any) -> Trainer:
    """In float32 unless `keys` say otherwise."""
    return Trainer(tiny_config(**{"train__precision": "off", **GENTLE, **keys}), ORIGIN, device)


def losses_of(trainer: Trainer, iterations: int = 8) -> torch.Tensor:
    """Losses of iterations on made-up clips, [iterations, streams, (total, action, gaze)], on the CPU."""
    clips = (on(trainer.device, batch(number, clips=4)) for number in range(iterations))
    found = torch.stack([trainer.step(iter([clip])) for clip in clips]).cpu()
    trainer.flush_status()
    return found


def gradients_in_float64(device: torch.device) -> dict[str, torch.Tensor]:
    """Of all weights in the first step, on the CPU."""
    trainer, found = trainer_on(device), {}
    trainer.model.double()

    def note(*_: Any) -> None:
        named = trainer.model.named_parameters()
        found.update({name: value.grad.cpu() for name, value in named if value.grad is not None})

    for moving in trainer.optimizers.values():
        moving.optimizer.register_step_pre_hook(note)
    losses_of(trainer, 1)
    return found


def test_gradients_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All in float64, but for the cross-entropy: the net turns differences of rounding into large ones."""

    def clips(batch: ClipBatch) -> dict[str, torch.Tensor]:
        assert batch.rgb_BTHWC is not None and batch.flow_BT2HW is not None
        images = {"rgb": batch.rgb_BTHWC.permute(0, 4, 1, 2, 3), "flow": batch.flow_BT2HW.permute(0, 2, 1, 3, 4)}
        return {name: image.double() / 127.5 - 1 for name, image in images.items()}

    monkeypatch.setattr(ClipBatch, "model_input", clips)
    expected, found = gradients_in_float64(CPU), gradients_in_float64(GPU)
    assert set(found) == set(expected) and len(found) > 200
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-9, name


def test_float32_follows_the_cpu() -> None:
    on_cpu, on_gpu = trainer_on(CPU), trainer_on(GPU)
    torch.testing.assert_close(losses_of(on_gpu), losses_of(on_cpu), rtol=1e-4, atol=1e-6)
    state = on_gpu.model.state_dict()
    for name, value in on_cpu.model.state_dict().items():
        difference = (state[name].cpu().double() - value.double()).abs().max().item()
        assert difference <= 1e-3 * value.abs().max().item() + 1e-4, name


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.03), ("fp16", 0.005)])
def test_16_bits_start_near_float32(precision: str, tolerance: float) -> None:
    """The first loss; later ones part, for the net is small and its BatchNorm sees few values."""
    keys = {"model__attention_scale": "subtract_min"}
    exact, rounded = trainer_on(GPU, **keys), trainer_on(GPU, train__precision=precision, **keys)
    weight = rounded.model.get_parameter("rgb.Conv3d_2c_3x3.conv3d.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last_3d) and weight.dtype == torch.float32
    expected, found = losses_of(exact, 1), losses_of(rounded, 1)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found[..., 0], expected[..., 0], rtol=tolerance, atol=0)


def test_200_iterations_in_16_bits_end_near_float32(handmade_shards: str) -> None:
    """Near: within a tenth of the loss that they start with."""
    curves = {}
    for precision in ("off", "bf16", "fp16"):
        keys = {"optimizer__name": "sgd", "optimizer__lr": 1e-3, "model__width": 0.25, "train__batch_size": 8}
        config = tiny_config(**keys, streams="rgb", model__dropout=0.0, train__precision=precision)
        trainer = Trainer(config, Origin(handmade.ACTIONS, (48, 40), "dis"), GPU)
        plan = FeedPlan.from_config(handmade_shards, config, 1, 0)
        clips = itertools.cycle([*batches_to_device(read_items(plan, range(plan.first_item(2))), GPU)])
        curves[precision] = torch.stack([trainer.step(clips)[:, 0].sum() for _ in range(200)]).cpu()
    start, end = curves["off"][0].item(), curves["off"][-20:].mean().item()
    assert end < 0.7 * start
    for precision in ("bf16", "fp16"):
        assert curves[precision][-20:].mean().item() == pytest.approx(end, abs=0.1 * start), precision


def test_auto_precision_is_16_bits() -> None:
    assert trainer_on(GPU, train__precision="auto").dtype == (
        torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    )


def test_activation_checkpointing_follows() -> None:
    kept, again = trainer_on(GPU), trainer_on(GPU, train__activation_checkpointing=True)
    torch.testing.assert_close(losses_of(again), losses_of(kept), rtol=1e-4, atol=1e-6)


def _deterministic_run(iterations: int, resumed_after: int | None) -> tuple[list[float], list[np.ndarray]]:
    """(losses, weights) in bf16; another trainer goes on from the checkpoint of iteration `resumed_after`."""
    config = tiny_config(train__precision="bf16", train__deterministic=True, model__width=0.2)
    set_up_torch(config, gpus=1)
    trainer, losses = Trainer(config, ORIGIN, GPU), []
    for number in range(iterations):
        if number == resumed_after:
            trainer.flush_status()
            content = trainer.checkpoint()
            trainer = Trainer(config, ORIGIN, GPU)
            trainer.load(content, "checkpoint")
        losses.append(trainer.step(iter([on(GPU, batch(number, clips=4))])).sum().item())
    return losses, [value.detach().cpu().numpy() for value in trainer.model.parameters()]


def _deterministic_runs() -> list[tuple[list[float], list[np.ndarray]]]:
    return [_deterministic_run(6, None), _deterministic_run(6, None), _deterministic_run(6, 3)]


def test_a_deterministic_run_and_its_resumption_are_equal_to_the_bit() -> None:
    """In a process of its own: cuBLAS reads its settings once, when it starts."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (losses, weights), *others = pool.apply(_deterministic_runs)
    assert len(set(losses)) == 6
    for again, theirs in others:
        assert again == losses
        assert all(np.array_equal(one, other) for one, other in zip(weights, theirs))


def test_batches_are_whole_while_the_gpu_computes() -> None:
    """Copies run beside the computation, and the memory of a batch is used again once it is done with."""
    drawn = np.random.default_rng(0)

    def read() -> Iterator[Batch]:
        for number in range(24):
            images = drawn.integers(0, 256, (4, 16, 112, 112, 3), dtype=np.uint8)
            images.flags.writeable = False
            sources.append(images)
            yield {
                "rgb": images,
                "gaze": np.zeros((4, 16, 2), np.float32),
                "gaze_valid": np.zeros((4, 16), bool),
                "label": np.full(4, number),
                "clip": np.arange(4),
                "present": np.ones(4, bool),
            }

    sources: list[np.ndarray] = []
    busy = torch.randn(4096, 4096, device=GPU)
    sums, labels = [], []
    for one in batches_to_device(read(), GPU):
        assert one.rgb_BTHWC is not None and one.rgb_BTHWC.device.type == "cuda"
        busy = F.normalize(busy @ busy)  # the host is far ahead of the GPU
        weight_W = torch.arange(1, 113, device=GPU)
        sums.append((one.rgb_BTHWC.long() * weight_W[:, None]).sum())
        labels.append(one.label_B[0])
        del one
    assert [int(label) for label in labels] == [*range(24)]
    for found, images in zip(sums, sources):
        assert int(found) == int((images.astype(np.int64) * np.arange(1, 113)[:, None]).sum())


def test_images_decoded_on_the_gpu_are_those_of_the_cpu(handmade_shards: str) -> None:
    """nvJPEG rounds in other places: by a level or two."""
    ours, theirs = (to_device(encoded(handmade_shards), device) for device in (GPU, CPU))
    for name in ("rgb_BTHWC", "flow_BT2HW"):
        found, expected = getattr(ours, name), getattr(theirs, name)
        assert found.device.type == "cuda" and found.dtype == torch.uint8 and found.shape == expected.shape
        assert (found.cpu().int() - expected.int()).abs().max() <= 3


def test_an_image_that_the_gpu_cannot_decode_is_a_users_error(handmade_shards: str) -> None:
    spoilt = encoded(handmade_shards, streams=("flow",))
    spoilt["flow_jpeg"] = np.zeros_like(spoilt["flow_jpeg"])
    with pytest.raises(UserError, match="an image cannot be decoded"):
        to_device(spoilt, GPU)


def test_a_loss_that_is_not_finite_is_heard_before_anything_is_written() -> None:
    trainer = trainer_on(GPU, train__iterations=2, train__validate_every=2, streams="rgb")
    with torch.no_grad():
        trainer.model.get_parameter("rgb.logits.conv3d.bias").fill_(math.nan)
    reported: list[Any] = []
    plan: Any = TwoValidations([])
    with pytest.raises(NonFiniteLoss, match="iteration 1: action loss of the rgb stream is nan"):
        train(trainer, plan, iter([on(GPU, batch(1)), on(GPU, batch(2))]), lambda *line: reported.append(line))
    assert not reported


def test_fp16_gives_up_a_step_that_overflows() -> None:
    trainer = trainer_on(GPU, train__precision="fp16")
    for modality, scale in (("rgb", 2.0**120), ("flow", 1.0)):
        trainer.optimizers[modality].scaler = torch.amp.GradScaler("cuda", init_scale=scale)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.step(iter([on(GPU, batch(1, clips=4))]))
    moved = [name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])]
    assert moved and all(name.startswith("flow.") for name in moved)


def test_the_memory_of_the_gpu_is_told() -> None:
    trainer = trainer_on(GPU)
    losses_of(trainer, 1)
    weights = sum(value.numel() * value.element_size() for value in trainer.model.parameters())
    assert weights < trainer.memory()[GPU_BYTES] < 2e9


def test_scores_of_clips_are_those_of_the_cpu(handmade_shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, config = open_shards(handmade_shards), tiny_config(train__precision="off", model__width=0.2)
    clips = [shards.clip(row) for row in shards.table.to_pylist()]
    model = TwoStream(config.stream_names, len(shards.actions), config.model, {"rgb": 1, "flow": 2})
    found, found_gaze = score_clips(model, config, clips, shards)
    assert next(model.parameters()).device.type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected, expected_gaze = score_clips(model, config, clips, shards)
    assert next(model.parameters()).device.type == "cpu"
    ours, theirs = found.reduce(0.5), expected.reduce(0.5)
    assert set(ours) == set(theirs) == {"rgb", "flow", "fused"}
    for name in ours:
        torch.testing.assert_close(ours[name].cpu(), theirs[name], rtol=1e-4, atol=1e-5)
    assert expected_gaze["rgb"] and found_gaze["rgb"]
    for key, value in expected_gaze["rgb"].items():
        assert found_gaze["rgb"][key] == pytest.approx(value, rel=1e-3, abs=1e-6)


def moving_frames(count: int, height: int = 128, width: int = 160) -> np.ndarray:
    """Grey frames of waves that move by 2 pixels to the right and 1 down, uint8 [count, H, W]."""
    y, x = np.mgrid[:height, :width].astype(float)
    frames = [128 + 60 * np.sin((x - 2 * t) / 7) + 50 * np.cos((y - t) / 5 + (x - 2 * t) / 11) for t in range(count)]
    return np.stack(frames).astype(np.uint8)


def test_tv_l1_is_that_of_the_cpu() -> None:
    frames = torch.from_numpy(moving_frames(4))
    expected = tv_l1(frames[:-1], frames[1:])
    found = tv_l1(frames[:-1].to(GPU), frames[1:].to(GPU)).cpu()
    for field_NHW2 in (expected, found):
        assert field_NHW2.flatten(0, 2).median(dim=0).values.tolist() == pytest.approx([2, 1], abs=0.1)
    level = 2 * flow.BOUND / 255
    assert (found - expected).abs().mean() < level / 8  # when a pair has converged depends on rounding


def test_raft_is_that_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights drawn by chance."""
    from torchvision.models.optical_flow import raft_small

    torch.manual_seed(0)
    torch.save(raft_small(weights=None).state_dict(), tmp_path / "raft.pt")
    frames = np.stack([moving_frames(3)] * 3, axis=-1)
    fields = []
    for available in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        flow.flow_method.cache_clear()
        method = flow.flow_method("raft", str(tmp_path / "raft.pt"))
        assert method.batch == (8 if available else 1)
        fields.append(method.fields([*itertools.islice(frames, 3)]))
    flow.flow_method.cache_clear()
    np.testing.assert_allclose(fields[0], fields[1], rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_a_compiled_stream_follows() -> None:
    keys = {"streams": "rgb", "train__precision": "bf16", "train__iterations": 6}
    plain = trainer_on(GPU, **keys, train__compile="off")
    compiled = trainer_on(GPU, **keys, train__compile="on")
    assert plain.compiled == {} and compiled.compiled == {"rgb": True}
    expected, found = losses_of(plain, 4), losses_of(compiled, 4)
    torch.testing.assert_close(found[..., 0], expected[..., 0], rtol=0.05, atol=0)
