"""Work in a Ray task with the resources of a training worker: the driver's machine may have no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tune_ego.config import Config
from tune_ego.driver_signals import end_interrupted
from tune_ego.errors import user_error_in
from tune_ego.runs.placement import worker_resources

Result = TypeVar("Result")


def call_on_worker(work: Callable[[], Result], config: Config, gpus: float, resume_command: str) -> Result:
    """Return the result of a call on one worker's CPUs and `gpus` GPUs.

    Args:
        work: Function to call, with Torch set up as in training.
        config: Configuration of a run, for its resources.
        gpus: GPUs of a worker.
        resume_command: Command that is printed where the call was interrupted.

    Raises:
        UserError: The call raised it.
    """
    import ray  # late: seconds to import
    from ray.exceptions import RayError

    from tune_ego.training.hardware import set_up_torch

    def call() -> Result:
        set_up_torch(config, gpus)
        return work()

    resources = worker_resources(config, gpus)
    try:
        task = ray.remote(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))(call)
        result: Result = ray.get(task.remote())
    except KeyboardInterrupt:
        end_interrupted(resume_command)
    except RayError as error:
        raise user_error_in(error) or error from error
    return result
