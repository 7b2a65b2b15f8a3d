"""Training samples in which the classes have other shares than the clips."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests import handmade
from tests.conftest import tiny_config
from tune_ego.config import Sampling
from tune_ego.dataset.shards import Clip, open_shards
from tune_ego.feed.feed_plan import FeedPlan
from tune_ego.feed.sampling import class_samples, training_window

LABELS = [2] * 16 + [0] * 4 + [3] + [2] * 4  # class 1 has no clips
CLIPS = [Clip(f"clip {number}", label, 16, "", 0) for number, label in enumerate(LABELS)]


def epoch_clips(seed: int, epoch: int, sampling: Sampling) -> list[int]:
    samples = range(25 * epoch, 25 * (epoch + 1))
    return [training_window(CLIPS, seed, sample, (48, 40), 32, sampling).clip for sample in samples]


def test_samples_of_a_class_by_hand() -> None:
    """4, 0, 20 and 1 clips; square roots 2, 0, 4.4721 and 1, of 25 samples."""
    assert class_samples(LABELS, 4, "uniform").tolist() == [4, 0, 20, 1]
    assert class_samples(LABELS, 4, "class_balanced").tolist() == pytest.approx([25 / 3, 0, 25 / 3, 25 / 3])
    roots = [50 / 7.472136, 0, 25 * 4.472136 / 7.472136, 25 / 7.472136]
    assert class_samples(LABELS, 4, "square_root").tolist() == pytest.approx(roots, rel=1e-6)


@pytest.mark.parametrize("sampling", ["class_balanced", "square_root"])
def test_a_class_has_its_share_of_each_epoch(sampling: Sampling) -> None:
    expected = class_samples(LABELS, 4, sampling)
    for epoch in range(20):
        clips = epoch_clips(3, epoch, sampling)
        counts = Counter(LABELS[clip] for clip in clips)
        assert len(clips) == 25 and all(abs(counts[label] - expected[label]) <= 1 for label in range(4))


def test_all_clips_of_a_class_are_sampled_equally_often() -> None:
    """Over 300 epochs a clip of class 2 is sampled 300 x 25 / 3 / 20 = 125 times, one of class 0 625 times."""
    counts = Counter(clip for epoch in range(300) for clip in epoch_clips(0, epoch, "class_balanced"))
    times = np.array([counts[clip] for clip in range(25)])
    assert times[20] == pytest.approx(2500, abs=15)
    assert times[16:20] == pytest.approx(625, abs=15)
    others = np.concatenate([times[:16], times[21:]])
    assert others.mean() == pytest.approx(125, abs=2) and others == pytest.approx(125, abs=45)


def test_clips_of_a_class_are_sampled_together_in_any_combination() -> None:
    """Two clips of class 2, each due 25 / 60 times, are in one epoch of (25 / 60)^2, about 50 of 300."""
    epochs = [set(epoch_clips(0, epoch, "class_balanced")) for epoch in range(300)]
    assert all(20 < sum({0, other} <= clips for clips in epochs) < 90 for other in (1, 2, 10, 24))


def test_classes_are_mixed_within_an_epoch() -> None:
    labels = [LABELS[clip] for clip in epoch_clips(1, 0, "class_balanced")]
    assert len(set(labels[:10])) == len(set(labels[-10:])) == 3


def test_an_order_depends_on_seed_and_epoch_alone() -> None:
    first = epoch_clips(1, 4, "square_root")
    assert epoch_clips(1, 5, "square_root") != first != epoch_clips(2, 4, "square_root")
    assert epoch_clips(1, 4, "square_root") == first
    window = training_window(CLIPS, 1, 103, (48, 40), 32, "square_root")
    same = training_window(CLIPS, 1, 103, (48, 40), 32)
    assert window.clip == first[3] and window[2:] == same[2:]  # all clips have 16 frames, so the draws are equal


def test_a_plan_samples_as_its_configuration_says(handmade_shards: Path) -> None:
    """The classes of the hand-made data set have one or two training clips; each has a quarter of the samples."""
    config = tiny_config(data__sampling="class_balanced", train__batch_size=1, train__iterations=400, data__crop=32)
    plan = FeedPlan.from_config(str(handmade_shards), config, 1, 0)
    labels = plan.training_labels
    assert labels == [clip.label for clip in open_shards(str(handmade_shards)).train(config.data)]
    counts = Counter[int]()
    for item in range(plan.item_count):
        training, windows = plan.windows(item)
        if training:
            counts.update(labels[window.clip] for window in windows if window is not None)
    shares = np.array([counts[label] for label in range(len(handmade.ACTIONS))]) / counts.total()
    assert shares == pytest.approx(np.full(4, 0.25), abs=0.02)
    assert not np.allclose(shares, np.bincount(labels, minlength=len(handmade.ACTIONS)) / len(labels), atol=0.05)
