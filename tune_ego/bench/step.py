"""`bench step`: forward, backward and optimizer on data in memory, beside the rate of the machine's matrix products.

Each variant runs in a process of its own, so that none has the memory or the kernels of another.
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
from tune_ego.config import WINDOW_FRAMES, Config, ModelConfig, build_config
from tune_ego.console import say
from tune_ego.feed.batches import ClipBatch, blank_batch
from tune_ego.freed_memory import keep_freed_memory
from tune_ego.model import build_stream
from tune_ego.model.two_stream import CHANNELS
from tune_ego.training.checkpoint import Origin
from tune_ego.training.hardware import compile_streams
from tune_ego.training.trainer import Trainer

CLASSES = 106  # of EGTEA Gaze+
_PRODUCT = {"cpu": 3072, "cuda": 8192}
"""Side of the square matrices whose product is the yardstick."""
STEPS_A_REPEAT = {"cpu": 1, "cuda": 10}
"""Steps that are timed together."""
_LARGEST_BATCH = 1024


@dataclass(frozen=True)
class Variant:
    """One way of computing the step."""

    streams: str = "both"
    batch: int = 2
    side: int = 224
    precision: str = "fp32"
    """fp32, tf32 (what `train.precision: off` is on a GPU), bf16 or fp16."""
    channels_last: bool = False
    compiled: bool = False
    recomputes: bool = False
    plain: bool = False
    """The straightforward version of `bench.plain`."""
    width: float = 1.0
    threads: int = 0
    """On a CPU; 0: one for each core."""

    @property
    def name(self) -> str:
        parts = [f"{self.streams}, {self.precision}, batch {self.batch}"]
        parts += ["channels last"] if self.channels_last else []
        parts += ["compiled"] if self.compiled else []
        parts += ["activation checkpointing"] if self.recomputes else []
        parts += ["straightforward"] if self.plain else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Measured:
    seconds: list[float]
    """Of a step, in each repeat."""
    rates: list[float]
    """FLOP/s of the machine's matrix product in the same precision, in turn with the steps."""
    peak: int
    """Bytes: of the GPU's memory, else of the whole process."""
    outputs: dict[str, np.ndarray]
    """What the model said of the batch before the first step."""
    compiled: bool


def bench_step(
    side: int = 224,
    batch: int | None = None,
    repeats: int = 5,
    width: float = 1.0,
    keep: Callable[[Benchmark], object] = lambda benchmark: None,
) -> Benchmark:
    """Measure the variants that make sense on this machine: a GPU where there is one, else the CPU.

    `keep` gets what is known after each of them. On a CPU none is compiled: that takes longer than it could save, and
    no run does it.
    """
    on_gpu = torch.cuda.is_available()
    first = Variant("rgb", batch or (24 if on_gpu else 2), side, width=width)
    flops = {name: flops_per_clip(name, side, width) for name in ("rgb", "flow", "both")}
    benchmark = Benchmark("step", {"windows": f"{WINDOW_FRAMES} x {side} x {side}", "width": width})
    benchmark.about |= {f"GFLOP a clip, {name}": round(value / 1e9, 1) for name, value in flops.items()}
    straightforward, whole = replace(first, plain=True), replace(first, streams="both", precision="tf32")
    fast = replace(whole, precision="bf16", channels_last=True)
    speeds: dict[Variant, Figure] = {}
    outputs: dict[Variant, dict[str, np.ndarray]] = {}

    def add(variant: Variant) -> None:
        measured = _measured(variant, repeats)
        speeds[variant] = _note(benchmark, variant, measured, flops[variant.streams])
        outputs[variant] = measured.outputs
        if variant.precision == "fp32" and variant.streams == first.streams and variant != straightforward:
            benchmark.compare(f"clips/s, {variant.name} / straightforward", speeds[variant], speeds[straightforward])
            difference = largest_difference(measured.outputs, outputs[straightforward])
            benchmark.add(f"outputs, {variant.name}, from the straightforward", "largest difference", [difference])
        if whole in speeds and variant != whole and variant.streams == whole.streams:
            benchmark.compare(f"clips/s, {variant.name} / {whole.precision}", speeds[variant], speeds[whole])
        keep(benchmark)

    for variant in (straightforward, *(_on_gpu(first) if on_gpu else _on_cpu(first))):
        add(variant)
    if on_gpu:
        for recomputes in (False, True):
            largest = in_a_process(_largest_batch, replace(fast, recomputes=recomputes))
            told = "with activation checkpointing" if recomputes else "kept activations"
            benchmark.add(f"largest batch, both, bf16, {told}", "clips", [float(largest)])
            keep(benchmark)
        add(replace(fast, compiled=True))  # it takes longest
    return benchmark


def _on_cpu(first: Variant) -> list[Variant]:
    return [
        first,
        replace(first, channels_last=True),
        replace(first, recomputes=True),
        replace(first, streams="flow"),
        replace(first, streams="both"),
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
        replace(fast, recomputes=True),
        replace(fast, streams="rgb"),
        replace(fast, streams="flow"),
    ]


def _note(benchmark: Benchmark, variant: Variant, measured: Measured, flops: float) -> Figure:
    if variant.compiled and not measured.compiled:
        benchmark.about[f"not compiled: {variant.name}"] = "the compiler failed, and it ran as it is"
    speed = benchmark.add(variant.name, "clips/s", [variant.batch / seconds for seconds in measured.seconds])
    done = Figure("", "", [variant.batch * flops / seconds for seconds in measured.seconds])
    product = benchmark.add(f"matrix product beside {variant.name}", "GFLOP/s", [r / 1e9 for r in measured.rates])
    benchmark.compare(f"FLOP/s, {variant.name} / matrix product", done, replace(product, values=measured.rates))
    benchmark.add(f"peak memory, {variant.name}", "GB", [measured.peak / 1e9])
    return speed


def largest_difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs)


def flops_per_clip(streams: str, side: int, width: float = 1.0) -> float:
    """Floating-point operations of forward and backward for one clip, counted without computing any."""
    names = list(CHANNELS) if streams == "both" else [streams]
    total = 0
    with torch.device("meta"):
        for name in names:
            stream = build_stream(name, CLASSES, ModelConfig(width=width))
            clip = torch.zeros(2, CHANNELS[name], WINDOW_FRAMES, side, side)
            with FlopCounterMode(display=False) as counter:
                logits_BK, attention_BTHW = stream(clip)
                (logits_BK.sum() + attention_BTHW.sum()).backward()
            total += counter.get_total_flops()
    return total / 2


def _measured(variant: Variant, repeats: int) -> Measured:
    say(f"measuring: {variant.name}")
    found: Measured = in_a_process(measure, variant, repeats)
    return found


def in_a_process(body: Callable[..., Any], *arguments: Any) -> Any:
    """Its result in a process of its own, a fork of one that has imported what is needed and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(1) as pool:
        return pool.apply(body, arguments)


def config_of(variant: Variant) -> Config:
    precision = variant.precision if variant.precision in ("bf16", "fp16") else "off"
    train = {"batch_size": variant.batch, "precision": precision, "compile": "off"}
    train["activation_checkpointing"] = variant.recomputes
    tree = {"streams": variant.streams, "data": {"crop": variant.side}, "model": {"width": variant.width}}
    return build_config({**tree, "train": train}, "bench")


def made_up_batch(config: Config, device: torch.device) -> ClipBatch:
    """Noise with gaze in half of its frames."""
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
    """(a trainer that computes as the variant says, a batch, whether it is compiled); a `config` is left as it is."""
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
        return trainer, made_up_batch(config, device), any(trainer.compiled.values())
    config = config_of(variant)
    trainer = Trainer(config, origin, device)
    layout = torch.channels_last_3d if variant.channels_last else torch.contiguous_format
    trainer.model.to(memory_format=layout)
    if variant.plain:
        make_plain(trainer.model)
    batch = made_up_batch(config, device)
    compiled = False
    if variant.compiled:
        compiled = all(compile_streams(trainer.model, batch.clips(), trainer.dtype).values())
    return trainer, batch, compiled


def measure(variant: Variant, repeats: int, config: Config | None = None) -> Measured:
    """Run a variant in this process, matrix products in turn with it; the first of each do not count.

    With a `config` its step, with the variant's threads and yardstick.
    """
    trainer, batch, compiled = set_up(variant, config)
    outputs = _outputs(trainer, batch)
    device, steps = trainer.device, STEPS_A_REPEAT[trainer.device.type]
    multiply, flops = _product(device, variant.precision)
    seconds: list[float] = []
    rates: list[float] = []
    for _ in range(1 + repeats):
        rates.append(flops * steps / _timed(multiply, steps, device))
        seconds.append(_timed(lambda: trainer.step(iter([batch] * trainer.config.passes)), steps, device) / steps)
    return Measured(seconds[1:], rates[1:], peak_memory(device), outputs, compiled)


def _outputs(trainer: Trainer, batch: ClipBatch) -> dict[str, np.ndarray]:
    trainer.model.train()
    with torch.no_grad():
        said = trainer.model(batch.clips(), dict.fromkeys(CHANNELS, 0))
    parts = {}
    for name, output in said.items():
        parts[f"{name} scores"] = output.logits_BK.float().cpu().numpy()
        if output.attention_BTHW is not None:
            parts[f"{name} attention"] = output.attention_BTHW.float().cpu().numpy()
    return parts


def _product(device: torch.device, precision: str) -> tuple[Callable[[], Any], float]:
    """(a matrix product in a precision, its floating-point operations)."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    side = _PRODUCT[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return lambda: left @ right, 2.0 * side**3


def _timed(body: Callable[[], Any], times: int, device: torch.device) -> float:
    """Seconds of so many calls."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        body()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_memory(device: torch.device) -> int:
    """Bytes at most so far: of the GPU's memory, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _largest_batch(variant: Variant) -> int:
    """The largest power of two, or one and a half, of clips whose step fits into the GPU's memory."""
    best = 0
    for batch in sorted({size for power in range(1, 11) for size in (2**power, 3 * 2 ** (power - 1))}):
        if batch > _LARGEST_BATCH:
            break
        try:
            trainer, data, _ = set_up(replace(variant, batch=batch))
            for _ in range(2):  # at the second one there is the optimizer's state as well
                trainer.step(iter([data]))
            torch.cuda.synchronize()
        except RuntimeError:  # out of memory, or more elements than a kernel can count
            break
        best = batch
        del trainer, data
        torch.cuda.empty_cache()
    return best
