"""Model, training step and validation of a run, the same for trials and final runs. No Ray here."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Union

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tune_ego.config import Config
from tune_ego.errors import UserError
from tune_ego.feed.batches import ClipBatch, blank_batch
from tune_ego.feed.feed_plan import FeedPlan, worker_passes
from tune_ego.model import StreamOutput, TwoStream, load_weights
from tune_ego.model.two_stream import CHANNELS, frames_per_slice
from tune_ego.results.experiment import GPU_BYTES, METRIC
from tune_ego.training.augmentation import Draws, augmented, draw
from tune_ego.training.checkpoint import Origin, check_content, check_same_origin, checkpoint_content, load_model_state
from tune_ego.training.hardware import autocast_dtype, compile_streams, compiles, memory_format, set_batch_norms
from tune_ego.training.losses import ActionLoss, slices_with_gaze, stream_losses
from tune_ego.training.metrics import ClipScores, accuracies, cross_entropy
from tune_ego.training.optim import StreamOptimizer
from tune_ego.training.weight_average import WeightAverage

_WEIGHTS, _DROPOUT = 0, 1  # independent random streams of each stream's seed
_AUGMENTATION = 2  # an independent random stream of the run's seed
Report = Callable[[Union[dict[str, Any], None], Union[dict[str, Any], None]], None]
"""Called with metrics, and after a validation with a checkpoint's content too; with a checkpoint alone where a signal
asked for one. Every worker calls it equally often."""


class Signal(enum.IntEnum):
    """Request to a worker between two iterations; of several the highest counts."""

    NONE = 0
    SAVE = 1
    """Write a checkpoint and continue: a machine is about to be preempted."""
    STOP = 2
    """Write a checkpoint and end."""


class NonFiniteLoss(RuntimeError):
    """A loss or score is not finite. Training on, or a restart from the checkpoint, would not help."""


class _StepStatus(NamedTuple):
    """Outcome of one iteration over all workers. On a GPU it is read one iteration later."""

    iteration: int
    losses: Tensor
    """This worker's mean losses, [streams, (total, action, gaze)]."""
    flags: Tensor
    """[1 if a loss is not finite, highest signal], on the CPU once `ready`."""
    ready: torch.cuda.Event | None


def _saved_buffers(model: nn.Module) -> list[Tensor]:
    """Return the buffers that a state dict holds: no constants."""
    saved = model.state_dict()
    return [buffer for name, buffer in model.named_buffers() if name in saved]


class Trainer:
    """Model of a run with the optimizer of each stream; training steps and validations.

    The streams share nothing: trained together they equal two streams trained apart, on a CPU to the bit.
    """

    def __init__(
        self,
        config: Config,
        origin: Origin,
        device: torch.device,
        rank: int = 0,
        *,
        class_samples: Sequence[float] = (),
        resume: bool = False,
        final: bool = True,
    ) -> None:
        """Build model and optimizers.

        Args:
            config: Configuration of the run.
            origin: Data set that the model is trained on.
            device: Device of this worker.
            rank: Number of this worker.
            class_samples: Mean number of training samples of each class in an epoch, for losses that weigh the classes.
            resume: The caller loads a checkpoint next, and `init_from` is not read.
            final: This is a final run and no trial of a search.
        """
        self.config, self.origin, self.device, self.rank = config, origin, device, rank
        self.action_loss = ActionLoss(config.loss, class_samples, device)
        self.dtype = autocast_dtype(config.train.precision, device)
        self.model = self._build_model(resume=resume)
        self.average = WeightAverage(self.model, config.train.ema) if config.train.ema else None
        self.compiled = self._compile() if compiles(config, device, final=final) else {}
        """Stream -> True if it is compiled; empty if compilation was not requested."""
        self.parallel: nn.Module = self.model
        self.distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.workers = dist.get_world_size() if self.distributed else 1
        self.own_passes = worker_passes(config.passes, rank, self.workers)
        if self.distributed:
            set_batch_norms(self.model, config, device, config.passes / len(self.own_passes))
            self.parallel = nn.parallel.DistributedDataParallel(
                self.model, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.optimizers = {
            modality: StreamOptimizer(config, roles, device, scale_loss=self.dtype == torch.float16)
            for modality, roles in self.model.parameter_roles().items()
        }
        self.iteration = 0
        self.best: dict[str, Any] = {}
        self.signal = 0
        """Highest signal of all workers whose status the last `step` or `flush_status` has read."""
        self.lag = 1 if device.type == "cuda" else 0
        """Iterations whose status may be read later: 1 on a GPU, so that the host does not wait for it at each step.
        (In fp16 the loss scaler waits at each step.)"""
        self._statuses: list[_StepStatus] = []
        self.seen: tuple[ClipBatch, dict[str, StreamOutput]] | None = None
        """First batch of the last validation with the model's outputs, for pictures."""
        self._statistics_differ = False
        """Whether the workers' running statistics may differ."""
        self._losses: list[Tensor] = []
        self._means: list[Tensor] = []

    def _build_model(self, *, resume: bool) -> TwoStream:
        """Return the model on its device, with the starting weights of `init_from` unless the run resumes."""
        config = self.config
        model = TwoStream(config.stream_names, len(self.origin.actions), config.model, self._seeds(_WEIGHTS))
        for modality in config.stream_names:
            source = getattr(config.init_from, modality)
            if source is not None and not resume:
                load_weights(model[modality], source)  # type: ignore[arg-type]
        model.to(self.device).to(memory_format=memory_format(self.device, self.dtype))
        model.recompute(config.train.activation_checkpointing)
        return model

    @property
    def averaged_model(self) -> TwoStream:
        """Model that is validated and exported: the average of `train.ema`, else the one that is trained."""
        return self.model if self.average is None else self.average.module

    def load(self, content: dict[str, Any], source: str) -> None:
        """Load the state in a checkpoint's content. Raises `UserError` where it does not fit this run."""
        check_content(content, source, self.config)
        saved = Origin(content["actions"], tuple(content["image_size"]), content["flow_method"])
        check_same_origin(saved, self.origin, self.config, source, "the shards")
        load_model_state(self.averaged_model, content["model"], source)
        if self.average is not None:
            load_model_state(self.model, content.get("training_weights"), source)
        for modality, optimizer in self.optimizers.items():
            try:
                optimizer.load_state_dict(content["optimizers"][modality])
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise UserError(f"{source}: not a state of the {modality} stream's optimizer ({error!r})") from error
        self.iteration, self.best = content["iteration"], content["best"]
        self._means = [losses.to(self.device) for losses in content["losses"]]

    def checkpoint(self) -> dict[str, Any]:
        assert not self._statuses  # `flush_status` comes first
        self._share_statistics()
        content = checkpoint_content(
            *(self.config, self.origin, self.iteration, self.best),
            losses=self.reduce_losses(),
            model=self.averaged_model.state_dict(),
            optimizers={modality: optimizer.state_dict() for modality, optimizer in self.optimizers.items()},
        )
        return content if self.average is None else {**content, "training_weights": self.model.state_dict()}

    def forward(
        self, model: nn.Module, clips: dict[str, Tensor], seeds: dict[str, int] | None
    ) -> dict[str, StreamOutput]:
        """Run `model` in the run's precision on `ClipBatch.model_input`; `seeds`: a seed of dropout for each stream."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            return model(clips, seeds)

    def _compile(self) -> dict[str, bool]:
        data = self.config.data
        streams = self.config.stream_names
        batch = blank_batch(self.config.micro_batch, data.crop, streams, self.device, data.window_frames)
        return compile_streams(self.model, batch.model_input(), self.dtype)

    def step(self, batches: Iterator[ClipBatch], signal: int = 0) -> Tensor:
        """Train one iteration; return this worker's mean losses, [streams, (total, action, gaze)].

        `batches` yields the batches of this worker's passes (`FeedPlan.own_passes`). Afterwards `self.signal` is the
        highest `signal` of all workers. Raises `NonFiniteLoss`.
        """
        self.parallel.train()
        batches_of_step = [self._draw(next(batches), number) for number in self.own_passes]
        slices = self._gaze_slices([batch for batch, _ in batches_of_step])
        passes_per_worker = self.config.passes / self.workers  # on average: DDP averages gradients over workers
        mean_losses_S3 = torch.zeros(len(self.model), 3, device=self.device)
        for number, (batch, draws) in zip(self.own_passes, batches_of_step):
            if isinstance(self.parallel, nn.parallel.DistributedDataParallel):
                self.parallel.require_backward_grad_sync = number == self.own_passes[-1]
            losses_S3 = self._losses_of_pass(batch, draws, number, slices) / passes_per_worker
            self._backward(losses_S3[:, 0])
            mean_losses_S3 += losses_S3.detach()
        self._statuses.append(self._status(mean_losses_S3, signal))
        self.signal = self._read_status(self.lag)
        for modality, optimizer in self.optimizers.items():
            try:
                optimizer.step()
            except OverflowError as error:
                raise NonFiniteLoss(f"the {modality} stream: {error}") from error
        if self.average is not None:
            self.average.update(self.model, self.iteration)
        self.iteration += 1
        self._statistics_differ = self.distributed
        self._losses.append(mean_losses_S3)
        return mean_losses_S3

    def _draw(self, batch: ClipBatch, number: int) -> tuple[ClipBatch, Draws]:
        """Return the batch of a pass, with gaze only where windows are not mixed, and its random numbers."""
        seed = np.random.SeedSequence(self.config.seed, spawn_key=(_AUGMENTATION, self.iteration, number))
        draws = draw(self.config.augment, len(batch.label_B), seed, self.device)
        if draws.mixing is None:
            return batch, draws
        whole_B1 = draws.mixing.own_B[:, None] == 1
        return batch._replace(gaze_valid_BT=batch.gaze_valid_BT & whole_B1), draws

    def _gaze_slices(self, batches: list[ClipBatch]) -> Tensor:
        """Return the mean number of slices with gaze in a pass, over the passes of all workers.

        With it the gaze loss is a mean over the iteration's slices, however they are divided into passes.
        """
        slices = batches[0].gaze_BT2.shape[1] // frames_per_slice(self.config.model.backbone)
        counts = [slices_with_gaze(batch.gaze_BT2, batch.gaze_valid_BT, slices).sum() for batch in batches]
        count = torch.stack(counts).sum()
        if self.distributed:
            dist.all_reduce(count)
        return count / self.config.passes

    def _losses_of_pass(self, batch: ClipBatch, draws: Draws, number: int, slices: Tensor) -> Tensor:
        """Run one forward pass; return the losses, [streams, (total, action, gaze)]."""
        clips = augmented(batch.model_input(), draws)
        outputs = self.forward(self.parallel, clips, self._seeds(_DROPOUT, self.iteration, number))
        action_loss = partial(self.action_loss, mixing=draws.mixing)
        loss = self.config.loss
        gaze = (batch.gaze_BT2, batch.gaze_valid_BT, loss.gaze_weight, loss.gaze_sigma, slices)
        losses = [torch.stack(stream_losses(output, batch.label_B, *gaze, action_loss)) for output in outputs.values()]
        return torch.stack(losses)

    def _backward(self, total_S: Tensor) -> None:
        """Add the gradients of each stream's total loss, times the stream's loss scale."""
        scaled = [optimizer.scaler.scale(total) for optimizer, total in zip(self.optimizers.values(), total_S)]
        torch.stack(scaled).sum().backward()

    def flush_status(self) -> None:
        """Read the status of all finished iterations. Raises `NonFiniteLoss` where a loss was not finite."""
        self.signal = max(self.signal, self._read_status(0))

    def _status(self, losses: Tensor, signal: int) -> _StepStatus:
        not_finite = (~torch.isfinite(losses).all()).float()
        flags = torch.stack([not_finite, torch.full_like(not_finite, float(signal))])
        if self.distributed:  # all workers stop together
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        flags = flags.to("cpu", non_blocking=True)
        ready = torch.cuda.Event() if self.device.type == "cuda" else None
        if ready is not None:
            ready.record()
        return _StepStatus(self.iteration + 1, losses, flags, ready)

    def _read_status(self, lag: int) -> int:
        """Read all pending statuses but the last `lag`; return the highest signal among them."""
        highest = 0
        while len(self._statuses) > lag:
            status = self._statuses.pop(0)
            if status.ready is not None:
                status.ready.synchronize()
            not_finite, signal = status.flags.tolist()
            if not_finite:
                raise NonFiniteLoss(self._describe_failure(status))
            highest = max(highest, int(signal))
        return highest

    def reduce_losses(self) -> list[Tensor]:
        """Average the losses of each iteration since `clear_losses` over the workers, keep and return them.

        All workers must call this.
        """
        if self._losses:
            mean = torch.stack(self._losses)
            if self.distributed:
                dist.all_reduce(mean, dist.ReduceOp.SUM)
                mean /= self.workers
            self._means += list(mean)
            self._losses = []
        return self._means

    def clear_losses(self) -> None:
        """Drop the losses that have been logged."""
        self._means = []

    def _seeds(self, *place: int) -> dict[str, int]:
        """Return a seed for each stream, which depends on the run's seed, the stream and `place` alone.

        So a resumed run draws the same numbers, and a stream the same ones whether it trains alone or not.
        """
        return {
            modality: int(np.random.SeedSequence(self.config.seed, spawn_key=(index, *place)).generate_state(1)[0])
            for index, modality in enumerate(CHANNELS)
        }

    def _describe_failure(self, status: _StepStatus) -> str:
        faults = [
            f"{kind} loss of the {modality} stream is {values[index].item()}"
            for modality, values in zip(self.model, status.losses)
            for index, kind in ((1, "action"), (2, "gaze"))
            if not torch.isfinite(values[index])
        ]
        if not faults:
            return ""  # the loss of another worker
        return f"iteration {status.iteration}: {', '.join(faults)}; a lower optimizer.lr may help"

    @torch.no_grad()
    def validate(self, batches: Iterator[ClipBatch], plan: FeedPlan) -> dict[str, float]:
        """Measure the model on the validation clips of all workers; update the schedules and `best`.

        Returns the metrics of a validation, accuracies as fractions. Raises `NonFiniteLoss`, on all workers, where a
        stream's scores are not finite.
        """
        label_N = torch.tensor(plan.validation_labels, device=self.device)
        scores = self._validation_scores(batches, plan)  # stream or `fused` -> [clips, classes]
        results = accuracies(scores, label_N)
        main = results.get("fused", results[self.config.stream_names[0]])
        metrics = {METRIC: main["mean_class_accuracy"], "val_micro_accuracy": main["micro_accuracy"]}
        metrics |= {f"{METRIC}_{name}": values["mean_class_accuracy"] for name, values in results.items()}
        metrics["val_loss"] = sum(cross_entropy(scores[name], label_N) for name in self.config.stream_names)
        if main["mean_class_accuracy"] > self.best.get(METRIC, -math.inf):
            self.best = {"iteration": self.iteration, METRIC: main["mean_class_accuracy"]}
        for modality, optimizer in self.optimizers.items():
            optimizer.schedule.after_validation(results[modality]["mean_class_accuracy"])
        return metrics

    @torch.no_grad()
    def _validation_scores(self, batches: Iterator[ClipBatch], plan: FeedPlan) -> dict[str, Tensor]:
        """Run the model on a validation's batches; return mean scores [clips, classes] per stream, and `fused`."""
        self.model.eval()
        self.seen = None
        self._share_statistics()
        clips, classes = len(plan.validation_labels), len(self.origin.actions)
        sums = ClipScores(self.config.stream_names, clips, classes, self.device)
        for _ in range(plan.validation_items):
            batch = next(batches)
            outputs = self.forward(self.averaged_model, batch.model_input(), None)
            self.seen = self.seen or (batch, outputs)
            sums.add(batch.clip_B, {name: output.logits_BK for name, output in outputs.items()}, batch.present_B)
        scores = sums.reduce(self.config.fusion_weight)
        self._check_scores(scores)
        return scores

    def _share_statistics(self) -> None:
        """Replace BatchNorm's running statistics by their mean over the workers, which have seen different samples."""
        if not self._statistics_differ:
            return
        models = [self.model] if self.average is None else [self.model, self.average.module]
        for buffer in [buffer for model in models for buffer in _saved_buffers(model)]:
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= self.workers
            else:  # the number of batches: that of rank 0
                dist.broadcast(buffer, 0)
        self._statistics_differ = False

    def memory(self) -> dict[str, int]:
        """Return this worker's peak GPU memory, bytes; empty on a CPU."""
        return {GPU_BYTES: torch.cuda.max_memory_allocated(self.device)} if self.device.type == "cuda" else {}

    def _check_scores(self, scores: dict[str, Tensor]) -> None:
        not_finite = [modality for modality in self.model if not scores[modality].isfinite().all()]
        if not_finite:
            streams = f"the validation scores of the {' and the '.join(not_finite)} stream are not finite"
            raise NonFiniteLoss(f"iteration {self.iteration}: {streams}; a lower optimizer.lr may help")

    def training_metrics(self, losses: Tensor) -> dict[str, float]:
        """Return metrics of the log from mean losses, [streams, (total, action, gaze)]: per stream, and their sums."""
        metrics: dict[str, float] = {}
        for modality, (_, action, gaze) in zip(self.model, losses.tolist()):
            metrics |= {f"action_loss_{modality}": action, f"gaze_loss_{modality}": gaze}
            metrics[f"learning_rate_{modality}"] = self.optimizers[modality].learning_rate
            gradient_norm = self.optimizers[modality].gradient_norm
            if gradient_norm is not None and gradient_norm.isfinite():
                metrics[f"gradient_norm_{modality}"] = gradient_norm.item()
            if modality in self.compiled:
                metrics[f"compiled_{modality}"] = float(self.compiled[modality])
        total, action, gaze = losses.sum(dim=0).tolist()
        lowest = min(optimizer.learning_rate for optimizer in self.optimizers.values())
        sums = {"train_loss": total, "action_loss": action, "gaze_loss": gaze, "learning_rate": lowest}
        return {**sums, **metrics}
