"""The description of one run that travels from the driver to its workers. No torch here, nor Ray."""

from __future__ import annotations

from dataclasses import dataclass

from tune_ego.config import Config
from tune_ego.feed.feed_plan import FeedPlan


@dataclass(frozen=True)
class Job:
    """Description of one run."""

    config: Config
    data: str
    """Folder or URI of the shards."""
    run: str
    """Folder or URI of the run."""
    gpus: float
    """GPUs of each worker."""
    stop: str
    """URI of the stop file. While it exists, workers write a checkpoint and end."""
    final: bool
    """Whether this is a final run, which writes `final/model.pt` at its end, and no trial."""
    claim: str = ""
    """Id of the driver that started the run (`results.driver`); "" if it claims no folder."""

    @property
    def root(self) -> str:
        """Folder or URI that the driver of the run drives: of its search, or of the run itself."""
        return self.stop.rpartition("/")[0]

    def averaged_iterations(self, plan: FeedPlan) -> list[int]:
        """Return the iterations whose checkpoints are averaged into the final weights; empty where none are."""
        last = plan.validation_iterations[-self.config.train.average_checkpoints :] if self.final else []
        return last if len(last) > 1 else []
