"""The configuration of one run: one typed tree, one YAML file.

A `Config` is immutable and complete: every value a run depends on is in it, with a default from
Lu, Liao, Li (ICCV Workshops 2019; "Lu") or Straminsky, Jacobo, Buemi ("the paper").
Keys are written with dots: `--set optimizer.lr=1e-3`, `optimizer.lr:` in a search space.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple, Union

from pydantic import Field, model_validator

from tune_ego.config_optimizers import (
    ConfigNode,
    CosineConfig,
    FlatCosineConfig,
    Fraction,
    OptimizerConfig,
    PlateauConfig,
    Positive,
    RangerConfig,
    ScheduleConfig,
    SGDConfig,
)

WINDOW_FRAMES = 16
"""Frames of a window (Lu)."""
MAP_SLICES = 2
"""Time steps of the attention map of a window: I3D reduces 16 frames to 2 there."""


class WindowForm(NamedTuple):
    """Frames of a clip that a window holds."""

    frames: int = WINDOW_FRAMES
    """Number of frames, T."""
    step: int = 1
    """Distance of two of them, in frames of the clip."""

    @property
    def span(self) -> int:
        """Frames of the clip from the first one to the last, both included."""
        return (self.frames - 1) * self.step + 1


LU_WINDOW = WindowForm()
"""Window of 16 consecutive frames (Lu)."""

LU_MAP_SIDE = 7
"""Rows and columns of the attention map for a crop of 224 pixels (Lu)."""

StreamName = Literal["rgb", "flow"]
Sampling = Literal["uniform", "square_root", "class_balanced"]
Workers = Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], Field(strict=False)]
"""Strict types would refuse the lists that YAML gives where a field is a tuple."""
Range = Annotated[tuple[Positive, Positive], Field(strict=False)]


class DataConfig(ConfigNode):
    """Clips, windows and the place where images are decoded."""

    split: Literal[1, 2, 3] = 1
    """Official EGTEA split."""
    validation: Literal["stratified", "by_session"] = "stratified"
    """Choice of validation clips from the training split: at random per class (like the official splits, whose
    train and test clips share sessions), or by whole sessions (which measures generalisation to new recordings)."""
    fold: int = Field(0, ge=0, le=9)
    """Tenth of the training clips that is used for validation."""
    crop: int = Field(224, ge=32)
    """Side of the square crop, pixels (Lu)."""
    window_frames: Literal[16, 32] = 16
    """Frames of a window (Lu: 16)."""
    frame_step: int = Field(1, ge=1, le=8)
    """Distance of two frames of a window: 2 takes every second frame, so a window lasts twice as long. A frame's flow
    is the one to the next frame of the clip."""
    sampling: Sampling = "uniform"
    """Share of a class in the training samples: `uniform`: proportional to its clips, each clip once an epoch (Lu);
    `square_root`: to the square root of their number; `class_balanced`: the same for all classes."""
    decode: Literal["auto", "cpu", "gpu"] = "cpu"
    """Device that decodes JPEG images in training and validation. `cpu`: in the readers. `gpu`: nvJPEG, for machines
    with few CPUs for each GPU; its pixels differ a little. `auto`: on the GPU where a run has one. `evaluate` always
    decodes on the CPU."""
    cache_dir: Union[Annotated[str, Field(pattern="^/")], None] = None
    """Folder (an absolute path) on each machine, in which shards of an object store are cached."""
    cache_gb: Positive = 50.0
    """Largest size of the cache, GB; the least recently used shards are removed. All of EGTEA is about 20 GB."""

    @property
    def window(self) -> WindowForm:
        """Frames of a clip that a window holds."""
        return WindowForm(self.window_frames, self.frame_step)


class AugmentConfig(ConfigNode):
    """Random changes of training windows, beyond Lu's crop and mirroring."""

    scale: Range = (1.0, 1.0)
    """Side of the region that is scaled to the crop, as a fraction of `data.crop`: uniform between two numbers, for
    each window; at most the image. Below 1 objects become larger. Gaze and flow are scaled as the images are."""
    aspect: float = Field(1.0, ge=1)
    """Largest ratio of the region's sides, log-uniform, wider or higher."""
    colour: float = Field(0.0, ge=0, lt=1)
    """Change of RGB: factors on brightness, contrast and saturation, each uniform between 1 - colour and 1 + colour;
    the same for all frames of a window."""
    mixup: float = Field(0.0, ge=0)
    """Alpha of mixup (Zhang et al., ICLR 2018), which averages two windows and their losses; 0: none. The weights are
    drawn from Beta(alpha, alpha), the larger one for the window itself. The gaze loss leaves mixed windows out."""
    mixup_share: Fraction = 0.5
    """Share of the windows that are mixed. The others train the attention."""

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> AugmentConfig:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale = {list(self.scale)}: expected [least, most]")
        return self


class ModelConfig(ConfigNode):
    """Architecture of each stream: a backbone with the attention module STAM."""

    backbone: Literal["i3d", "s3d", "r2plus1d_18", "mvit_v2_s", "swin3d_t"] = "i3d"
    """Network that computes the feature map: I3D (Lu), or one of torchvision's. `width`, `activation_scope: all`,
    `train.activation_checkpointing` and `train.deterministic` are for I3D alone."""
    stam_depth: int = Field(1, ge=0, le=8)
    """Blocks in the attention module: 0 is no attention (Lu's "-o"), 1 is Lu's "-a", 3 the paper's experiment 3."""
    stam_block: Literal["inception", "attention"] = "inception"
    """Kind of STAM's blocks: Lu's inception block, or multi-head self-attention over the map's positions with relative
    position terms (not in the papers)."""
    copy_init: bool = False
    """Initialise STAM's second and later blocks as copies of the first, where a weights file lacks them."""
    activation: Literal["relu", "swish", "mish", "gelu", "leaky_relu", "elu"] = "relu"
    """Activation function of the modules named by `activation_scope` (the paper's third axis)."""
    activation_scope: Literal["stam", "all"] = "stam"
    """`stam`: the attention module's blocks only; `all`: the I3D trunk too."""
    attention_scale: Literal["min_max", "subtract_min"] = "min_max"
    """Scaling of each clip's attention map: `min_max` as in Lu's text, `subtract_min` as in the released code."""
    width: float = Field(1.0, gt=0, le=1)
    """Factor on every channel count of I3D, rounded to whole channels. CPUs can train 0.25."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout rate before the classifier (Lu)."""
    sync_bn: bool = False
    """Normalise over the samples of all workers, on GPUs: with several workers each one has few samples."""
    bn_momentum: float = Field(0.01, gt=0, le=1)
    """Weight of a new batch in BatchNorm's running statistics, of every backbone (I3D's); runs of a few hundred
    iterations need 0.1."""
    freeze_trunk_norms: bool = False
    """Normalise in the trunk with the running statistics of the starting weights, and leave these as they are. For
    batches too small for statistics of their own."""


class LossConfig(ConfigNode):
    """Loss of a stream: cross-entropy plus the weighted gaze loss (Lu, equation 3)."""

    gaze_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the gaze loss in the total loss (Lu); with 0 gaze is not used (Lu's "-v")."""
    gaze_sigma: Annotated[float, Field(gt=0, lt=1)] = 3 / LU_MAP_SIDE
    """Standard deviation of the gaze target, as a fraction of the attention map's side (Lu: 3 cells of 7). With 1 the
    target would be almost flat."""
    logit_adjustment: Annotated[float, Field(ge=0)] = 0.0
    """Factor (tau) on the logarithms of the classes' shares of the training samples, which training adds to the logits
    (Menon et al., ICLR 2021, equation 10). 1 aims at the mean class accuracy, 0 at the micro accuracy."""
    class_weights: Literal["none", "inverse", "effective"] = "none"
    """Weight of a class in the cross-entropy: one over its number of samples, or over its effective number (Cui et al.,
    CVPR 2019). The mean weight of a sample is 1."""
    effective_beta: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Beta of the effective number, (1 - beta^n) / (1 - beta); values near 1 approach `inverse`."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that is spread evenly over all classes in the target of the cross-entropy."""


class TrainConfig(ConfigNode):
    """Length, batches, precision and validation of a run."""

    iterations: int = Field(3000, ge=1)
    """Optimizer steps of the run (the paper)."""
    batch_size: int = Field(12, ge=1)
    """Samples per iteration, over all workers and accumulation steps. Lu's code accumulates 4 forward passes of 12
    samples: `batch_size: 48, accumulate: 4`."""
    accumulate: int = Field(1, ge=1)
    """Forward-backward passes per iteration and worker: the parts into which a worker's share of a batch is cut."""
    clip_norm: Union[Positive, None] = None
    """Largest norm of a stream's gradient; a larger one is scaled to it. The log has the norm before scaling, as
    `gradient_norm_rgb` and `gradient_norm_flow`."""
    freeze_trunk_for: int = Field(0, ge=0)
    """Number of first optimizer steps in which the trunk's parameters stay, while STAM and the classifier train."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of an exponential moving average of weights and running statistics, per iteration; 0: none. Validation,
    checkpoints and the final weights have the average. After n iterations the decay is at most (1 + n) / (10 + n)."""
    deterministic: bool = False
    """Use kernels that give the same bits at each run on the same machine. On GPUs they are slower; on CPUs all
    kernels are deterministic."""
    precision: Literal["auto", "off", "fp16", "bf16"] = "auto"
    """Mixed precision. auto: bf16 where the GPU supports it, else fp16 with loss scaling; off on a CPU, where 16-bit
    arithmetic is slow."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile, on GPUs only, as it costs minutes at each start. auto: for final runs of 10,000 iterations and
    more. Never with `deterministic` or `activation_checkpointing`."""
    activation_checkpointing: bool = False
    """Recompute activations inside layers during the backward pass. The results are the same. Measured: 1.4 times the
    time on a CPU; on an H200 1.7 times the time and half of the memory."""
    validate_every: int = Field(100, ge=1)
    """Iterations between validations (and checkpoints); a validation follows the last iteration, too."""
    average_checkpoints: int = Field(1, ge=1)
    """Number of last validations whose weights are averaged into a final run's weights."""
    validation_windows: int = Field(1, ge=1)
    """Windows per validation clip, evenly spaced."""
    log_every: int = Field(10, ge=1)
    """Iterations between lines of metrics.jsonl."""


class ComputeConfig(ConfigNode):
    """Resources of a run on the Ray cluster."""

    workers: Union[Annotated[int, Field(ge=1)], Workers] = 1
    """Training processes (DDP). [least, most]: elastic, as many as the cluster has room for at the time; the batch and
    its micro-batches stay those of `most`. Elastic workers are for final runs only."""
    gpus_per_worker: Union[Literal["auto"], Annotated[float, Field(ge=0)]] = "auto"
    """GPUs of a training process: 1, 0, or a fraction of one that trials share (with one worker). auto: one where the
    cluster has GPUs, else none."""
    cpus_per_worker: Positive = 1.0
    """CPUs that Ray reserves for a training process. Without GPUs this is also its number of threads, rounded up."""
    readers: Union[Literal["auto"], Annotated[int, Field(ge=1)]] = "auto"
    """Concurrent reader tasks per worker; a quarter of a CPU is reserved for each. auto: one, and more on nodes with
    CPUs to spare for each worker, up to 8; a quarter of a CPU is reserved for all of them."""
    max_failures: int = Field(3, ge=-1)
    """Restarts from the last checkpoint after a worker failed; -1: unlimited. Preemptions are not counted."""

    @property
    def reserved_readers(self) -> int:
        """Number of reader tasks for which CPUs are reserved."""
        return 1 if self.readers == "auto" else self.readers

    @property
    def least_workers(self) -> int:
        """Number of workers that the run needs to start."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """Number of workers that the batch is divided for."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class InitConfig(ConfigNode):
    """Starting weights of each stream."""

    rgb: str | None = None
    """Initial weights of the RGB stream: a published weights file, or a run, a checkpoint or a `model.pt`."""
    flow: str | None = None


class Config(ConfigNode):
    """All settings of a run."""

    label: str = ""
    """Name of this configuration in tables."""
    seed: int = Field(0, ge=0)
    streams: Literal["rgb", "flow", "both"] = "both"
    fusion_weight: Fraction = 0.5
    """Weight of RGB's softmax scores in the fused scores; flow has the rest (Lu: their mean)."""
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = RangerConfig()
    schedule: ScheduleConfig = PlateauConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    compute: ComputeConfig = ComputeConfig()
    init_from: InitConfig = InitConfig()

    @property
    def stream_names(self) -> tuple[StreamName, ...]:
        """Names of the streams that are trained, RGB first."""
        match self.streams:
            case "both":
                return ("rgb", "flow")
            case "rgb" | "flow":
                return (self.streams,)
            case unknown:
                raise ValueError(f"no streams {unknown!r}")

    @property
    def passes(self) -> int:
        """Forward passes of an iteration, over all workers."""
        return self.compute.most_workers * self.train.accumulate

    @property
    def micro_batch(self) -> int:
        """Samples of one forward pass."""
        return self.train.batch_size // self.passes

    @property
    def horizon(self) -> int:
        """Iteration at which the learning-rate schedule ends."""
        horizon = self.schedule.horizon if isinstance(self.schedule, (CosineConfig, FlatCosineConfig)) else None
        return self.train.iterations if horizon is None else horizon

    @model_validator(mode="after")
    def _batch_divides(self) -> Config:
        if self.compute.least_workers > self.compute.most_workers:
            raise ValueError(f"compute.workers = {list(self.compute.workers)}: expected [least, most]")  # type: ignore[arg-type]
        if self.train.batch_size % self.passes:
            raise ValueError(
                f"train.batch_size = {self.train.batch_size} is not a multiple of compute.workers x "
                f"train.accumulate = {self.passes}"
            )
        return self

    @model_validator(mode="after")
    def _workers_have_one_gpu_each(self) -> Config:
        gpus = self.compute.gpus_per_worker
        if gpus == "auto" or gpus in (0, 1) or (gpus < 1 and self.compute.most_workers == 1):
            return self
        more = "a worker computes on one GPU; for more GPUs raise compute.workers"
        shared = "workers of one run cannot share a GPU (NCCL refuses it); give each one GPU"
        raise ValueError(f"compute.gpus_per_worker = {gpus:g}: {more if gpus > 1 else shared}")

    @model_validator(mode="after")
    def _backbone_has_its_keys(self) -> Config:
        model = self.model
        if model.backbone == "i3d":
            return self
        for key, fits in (
            ("model.width", model.width == 1),
            ("model.activation_scope", model.activation_scope == "stam"),
            ("train.activation_checkpointing", not self.train.activation_checkpointing),
            ("train.deterministic", not self.train.deterministic),  # torch has no such kernels for some of them on GPUs
        ):
            if not fits:
                raise ValueError(f"{key}: only model.backbone i3d has it, not {model.backbone}")
        return self

    @model_validator(mode="after")
    def _mixup_has_a_partner(self) -> Config:
        if self.augment.mixup and self.micro_batch < 2:
            raise ValueError("augment.mixup: a forward pass needs two samples; raise train.batch_size")
        return self

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Config:
        if isinstance(self.optimizer, SGDConfig) and self.optimizer.nesterov and not self.optimizer.momentum:
            raise ValueError("optimizer.nesterov: Nesterov's momentum needs optimizer.momentum above 0")
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> Config:
        if self.schedule.warmup >= self.train.iterations:
            raise ValueError(
                f"schedule.warmup = {self.schedule.warmup} does not end within train.iterations = "
                f"{self.train.iterations}"
            )
        return self

    @model_validator(mode="after")
    def _horizon_is_not_before_the_end(self) -> Config:
        if self.horizon < self.train.iterations:
            raise ValueError(
                f"schedule.horizon = {self.horizon} is before the end of the run, train.iterations = "
                f"{self.train.iterations}"
            )
        return self
