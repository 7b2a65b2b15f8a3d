"""A training process of a run under Ray Train, the same for trials and final runs."""

from __future__ import annotations

import sys
import traceback

import torch

from tune_ego import storage
from tune_ego.dataset.shards import Shards, open_shards
from tune_ego.errors import StorageError, user_error_in
from tune_ego.feed.batches import batches_to_device, prefetch_first, ray_batches
from tune_ego.feed.feed_plan import FeedPlan
from tune_ego.feed.sampling import class_samples
from tune_ego.ray_private import throttling_callback
from tune_ego.results import checkpoint_files, experiment
from tune_ego.results.driver import is_taken_over
from tune_ego.runs.job import Job
from tune_ego.runs.placement import decodes_on_gpu, read_ahead_bytes, reader_count, this_node
from tune_ego.runs.preemption import watch_signals
from tune_ego.runs.reporter import Reporter
from tune_ego.runs.run_log import recording
from tune_ego.training.checkpoint import Origin, last_checkpoint, mean_weights, to_bytes
from tune_ego.training.hardware import set_up_torch
from tune_ego.training.loop import train
from tune_ego.training.trainer import NonFiniteLoss, Trainer


def work(job: Job) -> None:
    """Train one run in this process, from its last whole checkpoint or from scratch."""
    import ray.train

    context = ray.train.get_context()
    with storage.patience(), recording(job.run, context.get_world_rank()):
        _work(job, context.get_world_rank(), context.get_world_size())


def _work(job: Job, rank: int, workers: int) -> None:
    # Ray Data's executor is a thread of this process: with Python's default interval of 5 ms training waits for it.
    sys.setswitchinterval(1e-3)
    set_up_torch(job.config, job.gpus)
    if experiment.read_failure(job.run) is not None:
        return  # another worker has recorded a failure that a restart would repeat
    if is_taken_over(job.root, job.claim):
        return
    shards = open_shards(job.data)
    plan = FeedPlan.from_config(job.data, job.config, workers, rank, encoded=decodes_on_gpu(job.config, job.gpus))
    reporter = Reporter(job, rank, plan)
    try:
        saved = last_checkpoint(job.run)
        done = saved[0]["iteration"] if saved is not None else 0
        if done < plan.iterations:
            first = plan.first_item(done)
            node, batch_bytes = this_node(), _batch_bytes(plan)
            readers = reader_count(job.config, job.gpus, node, batch_bytes)
            ahead = read_ahead_bytes(job.config, job.gpus, node)
            batches = prefetch_first(ray_batches(plan, first, readers, batch_bytes, throttling_callback, ahead))
        trainer = _trainer(job, plan, shards, _device(job, workers), rank, resume=saved is not None)
        if saved is not None:
            trainer.load(*saved)
        reporter.begin(done)
        if done < plan.iterations:
            with watch_signals(job, rank) as read_signal:
                reporter.trainer = trainer
                train(trainer, plan, batches_to_device(batches, trainer.device), reporter, read_signal)
                reporter.wait()
    except Exception as error:
        reporter.end()
        mistake = user_error_in(error)
        has_reason = mistake is not None or isinstance(error, (NonFiniteLoss, torch.OutOfMemoryError))
        if isinstance(mistake, StorageError) or not has_reason:
            raise  # Ray restarts the workers
        # A restart would fail in the same way. The driver reads the reason from the run's folder.
        reason, final = describe_failure(mistake or error, job.config.model.backbone), isinstance(error, NonFiniteLoss)
        if reason:
            experiment.write_failure(job.run, experiment.Failure(reason, final))
        if not isinstance(error, NonFiniteLoss) and workers > 1:
            raise  # the other workers may be waiting for this one in a collective operation
        traceback.print_exc()
        return
    if job.final and rank == 0 and trainer.iteration == plan.iterations:
        weights = _final_weights(job, plan, trainer)
        storage.write_bytes(storage.join(job.run, checkpoint_files.MODEL_FILE), to_bytes(weights))


def _trainer(job: Job, plan: FeedPlan, shards: Shards, device: torch.device, rank: int, *, resume: bool) -> Trainer:
    config = job.config
    samples_K = class_samples(plan.training_labels, len(shards.actions), config.data.sampling)
    origin = _origin(shards)
    return Trainer(config, origin, device, rank, class_samples=samples_K.tolist(), resume=resume, final=job.final)


def _final_weights(job: Job, plan: FeedPlan, trainer: Trainer) -> dict[str, torch.Tensor]:
    averaged = job.averaged_iterations(plan)
    return mean_weights(job.run, averaged) if averaged else trainer.averaged_model.state_dict()


def describe_failure(error: Exception, backbone: str = "i3d") -> str:
    """Return the reason of a failure; for a lack of GPU memory with the settings that need less."""
    if not isinstance(error, torch.OutOfMemoryError):
        return str(error)
    need_less = "raise train.accumulate, lower train.batch_size"
    if backbone == "i3d":
        need_less += ", or set train.activation_checkpointing: true"
    return f"the GPU's memory is not enough ({str(error).partition('. ')[0]}); {need_less}"


def _device(job: Job, workers: int) -> torch.device:
    if workers > 1:
        from ray.train.torch import get_device

        return get_device()
    return torch.device("cuda" if job.gpus else "cpu")  # Ray shows a process its own GPUs only


def _origin(shards: Shards) -> Origin:
    return Origin(shards.actions, shards.image_size, shards.info["settings"]["flow"])


def _batch_bytes(plan: FeedPlan) -> int:
    if plan.encoded:
        return plan.micro_batch * plan.data.window_frames << 16  # measured, 0.72 MB for 16 frames of 320 x 240 pixels
    channels = sum({"rgb": 3, "flow": 2}[name] for name in plan.streams)
    return plan.micro_batch * plan.data.window_frames * plan.data.crop**2 * channels
