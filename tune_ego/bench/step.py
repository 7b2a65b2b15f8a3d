"""`bench step`: forward, backward and optimizer on data in memory, beside the machine's rate of matrix products.

Each variant runs in a new process, so that memory and compiled kernels of one variant do not affect the next.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from tune_ego.bench.plain import make_plain
from tune_ego.bench.record import Benchmark, Figure, cores
from tune_ego.config import WINDOW_FRAMES, Config, ModelConfig
from tune_ego.config_io import build_config
from tune_ego.console import say
from tune_ego.feed.batches import ClipBatch, blank_batch
from tune_ego.freed_memory import keep_freed_memory
from tune_ego.model import build_stream
from tune_ego.model.backbones import FACTS
from tune_ego.model.two_stream import CHANNELS
from tune_ego.training.checkpoint import Origin
from tune_ego.training.hardware import compile_streams
from tune_ego.training.trainer import Trainer

CLASSES = 106
"""Action classes of EGTEA Gaze+."""
_PRODUCT = {"cpu": 3072, "cuda": 8192}
"""Device type -> side of the square matrices whose product is the reference."""
STEPS_PER_REPEAT = {"cpu": 1, "cuda": 10}
"""Device type -> steps that are timed together."""
_LARGEST_BATCH = 1024
"""Largest batch that is tried."""


@dataclass(frozen=True)
class Variant:
    """Way of computing the training step: streams, batch, precision, layout and compilation."""

    streams: str = "both"
    """rgb, flow or both."""
    batch: int = 2
    side: int = 224
    """Width and height of the crop, pixels."""
    precision: str = "fp32"
    """fp32, tf32 (the meaning of `train.precision: off` on a GPU), bf16 or fp16."""
    channels_last: bool = False
    compiled: bool = False
    activation_checkpointing: bool = False
    plain: bool = False
    """Whether the model is the straightforward version of `bench.plain`."""
    width: float = 1.0
    """Factor of the number of channels, `model.width`."""
    backbone: str = "i3d"
    threads: int = 0
    """Threads on a CPU; 0: one for each core."""

    @property
    def name(self) -> str:
        parts = [f"{self.streams}, {self.precision}, batch {self.batch}"]
        parts += [self.backbone] if self.backbone != "i3d" else []
        parts += ["channels last"] if self.channels_last else []
        parts += ["compiled"] if self.compiled else []
        parts += ["activation checkpointing"] if self.activation_checkpointing else []
        parts += ["straightforward"] if self.plain else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Measurement:
    """Measured values of one variant."""

    seconds: list[float]
    """Seconds of a step, in each repeat."""
    rates: list[float]
    """FLOP/s of a matrix product in the same precision, measured in alternation with the steps."""
    peak_bytes: int
    """Peak memory, bytes: of the GPU, or of the whole process without a GPU."""
    outputs: dict[str, np.ndarray]
    """Outputs of the model for the batch before the first step: class scores and attention maps, by name."""
    compiled: bool
    """Whether the compilation succeeded."""


def bench_step(
    side: int = 224,
    batch: int | None = None,
    repeats: int = 5,
    width: float = 1.0,
    save: Callable[[Benchmark], object] = lambda benchmark: None,
) -> Benchmark:
    """Measure the variants for this machine's GPU, or for its CPU where there is no GPU.

    No variant is compiled on a CPU, as in runs: compilation takes longer than it saves.

    Args:
        side: Width and height of the crop, pixels.
        batch: Clips in a batch; None: 24 on a GPU, 2 on a CPU.
        repeats: Timed repeats of each variant.
        width: Factor of the number of channels.
        save: Called with the benchmark after each variant, so that an interrupted benchmark has a record.
    """
    on_gpu = torch.cuda.is_available()
    first = Variant("rgb", batch or (24 if on_gpu else 2), side, width=width)
    flops = {(name, "i3d"): flops_per_clip(name, side, width) for name in ("rgb", "flow", "both")}
    flops |= {("rgb", name): flops_per_clip("rgb", side, 1.0, name) for name in FACTS}
    benchmark = Benchmark("step", {"windows": f"{WINDOW_FRAMES} x {side} x {side}", "width": width})
    benchmark.facts |= {f"GFLOP a clip, {', '.join(key)}": round(value / 1e9, 1) for key, value in flops.items()}
    plain, both_tf32 = replace(first, plain=True), replace(first, streams="both", precision="tf32")
    fast = replace(both_tf32, precision="bf16", channels_last=True)
    speeds: dict[Variant, Figure] = {}
    outputs: dict[Variant, dict[str, np.ndarray]] = {}

    def add(variant: Variant) -> None:
        measurement = _measure_in_process(variant, repeats)
        speeds[variant] = _add_figures(benchmark, variant, measurement, flops[variant.streams, variant.backbone])
        outputs[variant] = measurement.outputs
        key = (variant.precision, variant.streams, variant.backbone)
        if key == ("fp32", first.streams, first.backbone) and variant != plain:
            benchmark.compare(f"clips/s, {variant.name} / straightforward", speeds[variant], speeds[plain])
            difference = largest_difference(measurement.outputs, outputs[plain])
            benchmark.add(f"outputs, {variant.name}, from the straightforward", "largest difference", [difference])
        if both_tf32 in speeds and variant != both_tf32 and variant.streams == both_tf32.streams:
            benchmark.compare(f"clips/s, {variant.name} / tf32", speeds[variant], speeds[both_tf32])
        save(benchmark)

    for variant in (plain, *(_on_gpu(first) if on_gpu else _on_cpu(first))):
        add(variant)
    if on_gpu:
        for checkpointing in (False, True):
            largest = run_in_process(_largest_batch, replace(fast, activation_checkpointing=checkpointing))
            activations = "with activation checkpointing" if checkpointing else "kept activations"
            benchmark.add(f"largest batch, both, bf16, {activations}", "clips", [float(largest)])
            save(benchmark)
        add(replace(fast, compiled=True))  # last: compilation takes longest
    return benchmark


def _on_cpu(first: Variant) -> list[Variant]:
    return [
        first,
        replace(first, channels_last=True),
        replace(first, activation_checkpointing=True),
        replace(first, streams="flow"),
        replace(first, streams="both"),
        *(replace(first, backbone=name, width=1.0) for name in FACTS),
    ]


def _on_gpu(first: Variant) -> list[Variant]:
    both = replace(first, streams="both")
    fast = replace(both, precision="bf16", channels_last=True)
    return [
        first,
        replace(both, precision="tf32"),
        replace(both, precision="bf16"),
        fast,
        replace(fast, precision="fp16"),
        replace(fast, activation_checkpointing=True),
        replace(fast, streams="rgb"),
        replace(fast, streams="flow"),
        *(replace(fast, streams="rgb", backbone=name, width=1.0) for name in FACTS),
    ]


def _add_figures(benchmark: Benchmark, variant: Variant, measurement: Measurement, flops: float) -> Figure:
    """Add the figures of a variant to the benchmark; return its speed.

    Args:
        benchmark: Benchmark to add to.
        variant: The variant.
        measurement: Its measured values.
        flops: Floating-point operations of a step for one clip.
    """
    if variant.compiled and not measurement.compiled:
        benchmark.facts[f"not compiled: {variant.name}"] = "the compiler failed; the variant ran without compilation"
    speed = benchmark.add(variant.name, "clips/s", [variant.batch / seconds for seconds in measurement.seconds])
    rate = Figure("", "", [variant.batch * flops / seconds for seconds in measurement.seconds])
    product_rates = measurement.rates
    product = benchmark.add(f"matrix product beside {variant.name}", "GFLOP/s", [r / 1e9 for r in product_rates])
    benchmark.compare(f"FLOP/s, {variant.name} / matrix product", rate, replace(product, values=product_rates))
    benchmark.add(f"peak memory, {variant.name}", "GB", [measurement.peak_bytes / 1e9])
    return speed


def largest_difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Return the largest absolute difference over all outputs."""
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs)


def flops_per_clip(streams: str, side: int, width: float = 1.0, backbone: str = "i3d") -> float:
    """Return the floating-point operations of forward and backward for one clip, counted on the meta device.

    Args:
        streams: rgb, flow or both.
        side: Width and height of the crop, pixels.
        width: Factor of the number of channels.
        backbone: `model.backbone`.
    """
    match streams:
        case "both":
            names = list(CHANNELS)
        case "rgb" | "flow":
            names = [streams]
        case _:
            raise ValueError(f"unknown streams {streams!r}: choose rgb, flow or both")
    total = 0
    with torch.device("meta"):
        for name in names:
            stream = build_stream(name, CLASSES, ModelConfig.model_validate({"width": width, "backbone": backbone}))
            clip = torch.zeros(2, CHANNELS[name], WINDOW_FRAMES, side, side)  # [B, C, T, H, W]
            with FlopCounterMode(display=False) as counter:
                logits_BK, attention_BTHW = stream(clip)
                (logits_BK.sum() + attention_BTHW.sum()).backward()
            total += counter.get_total_flops()
    return total / 2


def _measure_in_process(variant: Variant, repeats: int) -> Measurement:
    say(f"measuring: {variant.name}")
    measurement: Measurement = run_in_process(measure, variant, repeats)
    return measurement


def run_in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process and return its result.

    The process is a fork of a server that has imported this module, and so starts fast without sharing any state.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def variant_config(variant: Variant) -> Config:
    """Return the configuration of a run that computes as the variant does."""
    precision: str
    match variant.precision:
        case "bf16" | "fp16":
            precision = variant.precision
        case "fp32" | "tf32":
            precision = "off"
        case _:
            raise ValueError(f"unknown precision {variant.precision!r}: choose fp32, tf32, bf16 or fp16")
    train = {"batch_size": variant.batch, "precision": precision, "compile": "off"}
    train["activation_checkpointing"] = variant.activation_checkpointing
    model = {"backbone": variant.backbone, "width": variant.width}
    tree = {"streams": variant.streams, "data": {"crop": variant.side}, "model": model}
    return build_config({**tree, "train": train}, "bench")


def random_batch(config: Config, device: torch.device) -> ClipBatch:
    """Return a micro-batch of uniform noise, with gaze in about half of its frames."""
    torch.manual_seed(0)
    blank = blank_batch(config.micro_batch, config.data.crop, config.stream_names, device)
    for image in (blank.rgb_BTHWC, blank.flow_BT2HW):
        if image is not None:
            image.random_(0, 256)
    return blank._replace(
        gaze_BT2=torch.rand(blank.gaze_BT2.shape, device=device),
        gaze_valid_BT=torch.rand(blank.gaze_valid_BT.shape, device=device) < 0.5,
        label_B=torch.randint(0, CLASSES, blank.label_B.shape, device=device),
    )


def set_up(variant: Variant, config: Config | None = None) -> tuple[Trainer, ClipBatch, bool]:
    """Build the trainer of a variant.

    Args:
        variant: The variant; sets the number of threads and TF32 for the whole process.
        config: Configuration of the trainer; None: that of the variant. With a configuration, layout, compilation and
            the straightforward version are not taken from the variant.

    Returns:
        Trainer, random micro-batch, and whether the model is compiled.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(variant.threads or cores())
        if not variant.plain:
            keep_freed_memory()
    tensor_cores = variant.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tensor_cores
    origin = Origin([str(number) for number in range(CLASSES)], (320, 240), "dis")
    if config is not None:
        trainer = Trainer(config, origin, device)
        return trainer, random_batch(config, device), any(trainer.compiled.values())
    config = variant_config(variant)
    trainer = Trainer(config, origin, device)
    layout = torch.channels_last_3d if variant.channels_last else torch.contiguous_format
    trainer.model.to(memory_format=layout)
    if variant.plain:
        make_plain(trainer.model)
    batch = random_batch(config, device)
    compiled = False
    if variant.compiled:
        compiled = all(compile_streams(trainer.model, batch.model_input(), trainer.dtype).values())
    return trainer, batch, compiled


def measure(variant: Variant, repeats: int, config: Config | None = None) -> Measurement:
    """Time steps of a variant in this process, in alternation with matrix products, after one warm-up of both.

    Args:
        variant: The variant.
        repeats: Timed repeats.
        config: Configuration to measure; see `set_up`.
    """
    trainer, batch, compiled = set_up(variant, config)
    outputs = _outputs(trainer, batch)
    device, steps = trainer.device, STEPS_PER_REPEAT[trainer.device.type]
    multiply, flops = _product(device, variant.precision)
    seconds: list[float] = []
    rates: list[float] = []
    for _ in range(1 + repeats):
        rates.append(flops * steps / _time_calls(multiply, steps, device))
        seconds.append(_time_calls(lambda: trainer.step(iter([batch] * trainer.config.passes)), steps, device) / steps)
    return Measurement(seconds[1:], rates[1:], peak_memory(device), outputs, compiled)


def _outputs(trainer: Trainer, batch: ClipBatch) -> dict[str, np.ndarray]:
    """Return class scores [B, K] and attention maps [B, T', H', W'] of each stream, in training mode."""
    trainer.model.train()
    with torch.no_grad():
        outputs = trainer.model(batch.model_input(), dict.fromkeys(CHANNELS, 0))
    parts = {}
    for name, output in outputs.items():
        parts[f"{name} scores"] = output.logits_BK.float().cpu().numpy()
        if output.attention_BTHW is not None:
            parts[f"{name} attention"] = output.attention_BTHW.float().cpu().numpy()
    return parts


def _product(device: torch.device, precision: str) -> tuple[Callable[[], Any], float]:
    """Return a function that computes a matrix product in a precision, and the product's floating-point operations."""
    match precision:
        case "bf16":
            dtype = torch.bfloat16
        case "fp16":
            dtype = torch.float16
        case "fp32" | "tf32":
            dtype = torch.float32
        case _:
            raise ValueError(f"unknown precision {precision!r}: choose fp32, tf32, bf16 or fp16")
    side = _PRODUCT[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return lambda: left @ right, 2.0 * side**3


def _time_calls(function: Callable[[], Any], times: int, device: torch.device) -> float:
    """Return the seconds of `times` calls of a function, the work on the GPU included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far, bytes: of the GPU, or of this process without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _largest_batch(variant: Variant) -> int:
    """Return the largest batch, 2^n or 1.5 * 2^n up to `_LARGEST_BATCH` clips, whose step fits into GPU memory."""
    best = 0
    for batch in sorted({size for power in range(1, 11) for size in (2**power, 3 * 2 ** (power - 1))}):
        if batch > _LARGEST_BATCH:
            break
        try:
            trainer, data, _ = set_up(replace(variant, batch=batch))
            for _ in range(2):  # the second step has the optimizer's state in memory as well
                trainer.step(iter([data]))
            torch.cuda.synchronize()
        except RuntimeError:  # out of memory, or more elements than a kernel can index
            break
        best = batch
        del trainer, data
        torch.cuda.empty_cache()
    return best
