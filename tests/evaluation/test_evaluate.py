"""The test protocol on a checkpoint, and what is printed of it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from torch import Tensor

from tests import literal
from tests.conftest import tiny_config
from tune_ego.config import WindowForm
from tune_ego.dataset.gaze import Gaze
from tune_ego.dataset.shards import SCHEMA_VERSION, Clip, closing_files, frame_table, open_shards, write_shard
from tune_ego.errors import UserError
from tune_ego.evaluation import evaluate as evaluate_module
from tune_ego.evaluation.evaluate import evaluate, recall_by_frequency, score_clips, training_clips
from tune_ego.evaluation.tables import show
from tune_ego.feed.reader import WindowReader
from tune_ego.feed.sampling import Window, centre_window, dense_starts, views
from tune_ego.model import StreamOutput, TwoStream
from tune_ego.results.checkpoint_files import find_checkpoint
from tune_ego.results.experiment import collapsed_rate
from tune_ego.runs.launch import check_run, resolve_weights
from tune_ego.training.checkpoint import Origin, check_same_origin, write_checkpoint
from tune_ego.training.trainer import Trainer

CPU = torch.device("cpu")
ACTIONS = ["Take cup", "Take bowl", "Wash cup", "Wash pan"]
VERBS, NOUNS = [0, 0, 1, 1], [0, 1, 0, 2]
# Clips: name, class, frames, the role in each split, the validation fold.
CLIPS = [
    ("c0", 0, 20, ("test", "train", "train"), 0),
    ("c1", 0, 16, ("test", "test", "train"), 0),
    ("c2", 1, 43, ("test", "train", "train"), 1),
    ("c3", 2, 16, ("test", "test", "train"), 1),
    ("c4", 3, 10, ("test", "test", "train"), 1),
    ("c5", 1, 18, ("train", "test", "train"), 0),
    ("c6", 3, 16, ("train", "test", "train"), 1),
    ("c7", 2, 16, ("train", "train", "test"), 1),
]
Image = Callable[[int, tuple[int, ...]], np.ndarray]


def plain(number: int, shape: tuple[int, ...]) -> np.ndarray:
    """Images of one grey, the frame's number; of flow 255 less it."""
    return np.full(shape, number if shape[-1] == 3 else 255 - number, np.uint8)


def noise(number: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, shape, np.uint8)


def write_dataset(root: Path, image: Image) -> str:
    """Shards of 48 x 36 images in one file; even frames have gaze, at x = 3 / 4, y = 1 / 4 of the centre crop of 32."""
    tables, records, number, group = [], [], 0, 0
    for name, action, frames, roles, fold in CLIPS:
        numbers = range(number, number + frames)
        rgb = [simplejpeg.encode_jpeg(image(n, (36, 48, 3)), 100, "RGB", "444") for n in numbers]
        flow = [simplejpeg.encode_jpeg(image(n, (72, 48, 1)), 100, "GRAY") for n in numbers]
        valid = np.arange(frames) % 2 == 0
        x, y = (np.where(valid, value, np.nan).astype(np.float32) for value in (32 / 48, 10 / 36))
        gaze = Gaze(x, y, valid, np.where(valid, "Fixation", ""))
        tables.append(frame_table(name, rgb, flow, gaze))
        records.append(
            {
                "clip": name,
                "session": "s",
                "subject": "p",
                "action": action,
                "verb": VERBS[action],
                "nouns": [NOUNS[action]],
                "split1": roles[0],
                "split2": roles[1],
                "split3": roles[2],
                "stratified_fold": fold,
                "session_fold": fold,
                "frames": frames,
                "gaze_frames": int(valid.sum()),
                "shard": "frames/all.parquet",
                "row_group": group,
            }
        )
        number, group = number + frames, group + math.ceil(frames / 16)
    write_shard(str(root / "frames/all.parquet"), tables, records, [], {})
    for file, data in closing_files(records, []).items():
        (root / file).write_bytes(data)
    info = {
        "schema_version": SCHEMA_VERSION,
        "actions": ACTIONS,
        "verb_of_action": VERBS,
        "noun_of_action": NOUNS,
        "settings": {"image_size": [48, 36], "flow": "dis"},
    }
    (root / "dataset.json").write_text(json.dumps(info))
    return str(root)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("noise"), noise)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("numbered"), plain)


def checkpoint(folder: Path, shards: str, **changes: object) -> Trainer:
    """An untrained model as a run's checkpoint; its attention does not die and its BatchNorm is not the identity."""
    data = open_shards(shards)
    trainer = Trainer(tiny_config(**changes), Origin(data.actions, data.image_size, "dis"), CPU)
    torch.manual_seed(1)
    for name, value in trainer.model.state_dict().items():
        if name.endswith(("bn.bias", "running_mean")):
            value.copy_(torch.randn_like(value) / 5)
        if name.endswith("attention_pred.conv3d.weight"):
            value.abs_()
    write_checkpoint(str(folder / "run"), trainer.checkpoint())
    return trainer


def test_evaluation_equals_its_protocol(tmp_path: Path, shards: str) -> None:
    """Window by window: softmax, mean over a clip's windows, weighted mean over the streams, accuracies by hand."""
    trainer = checkpoint(tmp_path, shards, model__stam_depth=2)
    result = evaluate(str(tmp_path / "run"), shards, 2, fusion_weight=0.3)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text()) == result
    data = open_shards(shards)
    clips = data.test(2)
    reader = WindowReader(clips, ("rgb", "flow"), data.image_size, 32)
    predicted: dict[str, list[int]] = {"rgb": [], "flow": [], "fused": []}
    for index, clip in enumerate(clips):
        scores: dict[str, list[torch.Tensor]] = {"rgb": [], "flow": []}
        for start in dense_starts(clip.frames):
            sample = reader.read_batch([centre_window(index, start, data.image_size, 32)])
            for name, seen in scores.items():
                axes = (0, 4, 1, 2, 3) if name == "rgb" else (0, 2, 1, 3, 4)
                image = torch.from_numpy(sample[name]).permute(axes).float() / 127.5 - 1
                logits, _ = literal.stream(trainer.model[name].state_dict(), image, depth=2)
                seen.append(logits[0].double().softmax(dim=0))
        mean = {name: torch.stack(seen).mean(dim=0) for name, seen in scores.items()}
        mean["fused"] = 0.3 * mean["rgb"] + 0.7 * mean["flow"]
        for name, score in mean.items():
            predicted[name].append(int(score.argmax()))
    true = [clip.label for clip in clips]
    rows = {row["action"]: row for row in data.table.to_pylist()}
    for name, labels in predicted.items():
        found = result[name]
        assert found["micro_accuracy"] == pytest.approx(sum(p == t for p, t in zip(labels, true)) / len(true))
        assert found["mean_class_accuracy"] == pytest.approx(literal.mean_class_accuracy(labels, true))
        verbs = [rows[p]["verb"] == rows[t]["verb"] for p, t in zip(labels, true)]
        nouns = [rows[p]["nouns"][0] == rows[t]["nouns"][0] for p, t in zip(labels, true)]
        assert found["verb_accuracy"] == pytest.approx(sum(verbs) / len(true))
        assert found["noun_accuracy"] == pytest.approx(sum(nouns) / len(true))
        for p, t in zip(labels, true):
            assert found["confusion"][t][p] == sum(pair == (p, t) for pair in zip(labels, true))
    assert [entry["clips"] for entry in result["classes"]] == [true.count(label) for label in range(4)]
    assert result["fusion_sweep"][6]["mean_class_accuracy"] == result["fused"]["mean_class_accuracy"]
    assert {"rgb", "flow", "centre"} == result["attention"].keys()


# The first frames of the test windows of split 1, counted through all clips, and each stream's scores there.
# Clip c0 has windows at 0 and 4, c2 at 0, 8, 16, 24 and 27; c4, of 10 frames, has one.
SCORES: dict[int, tuple[list[float], list[float]]] = {
    0: ([0.7, 0.1, 0.1, 0.1], [0.2, 0.1, 0.6, 0.1]),
    4: ([0.3, 0.5, 0.1, 0.1], [0.2, 0.1, 0.6, 0.1]),
    20: ([0.2, 0.6, 0.1, 0.1], [0.9, 0.05, 0.03, 0.02]),
    36: ([0.05, 0.0001, 0.05, 0.8999], [0.1, 0.2, 0.6, 0.1]),
    44: ([0.05, 0.0001, 0.05, 0.8999], [0.1, 0.2, 0.6, 0.1]),
    52: ([0.1, 0.8, 0.05, 0.05], [0.1, 0.2, 0.6, 0.1]),
    60: ([0.05, 0.85, 0.05, 0.05], [0.1, 0.2, 0.6, 0.1]),
    63: ([0.05, 0.85, 0.05, 0.05], [0.1, 0.2, 0.6, 0.1]),
    79: ([0.1, 0.1, 0.2, 0.6], [0.05, 0.05, 0.85, 0.05]),
    95: ([0.1, 0.1, 0.1, 0.7], [0.1, 0.1, 0.6, 0.2]),
}
# What the clips c0 to c4, of the classes 0 0 1 2 3, are taken for. The mean RGB scores of c2 are 0.5 for class 1 and
# 0.39 for class 3; the mean of their logarithms would favour class 3, as the first window does.
#   RGB                    0 1 1 3 3   3 of 5; recalls 1/2, 1, 0, 1; verbs all right; nouns right of c0, c2, c4
#   flow                   2 0 2 2 2   2 of 5; recalls 1/2, 0, 1, 0; verbs right of c1, c3, c4; nouns of c0, c1, c3
#   0.2 RGB + 0.8 flow     2 0 2 2 2
#   0.6 RGB + 0.4 flow     0 0 1 2 3
RGB = {
    "micro_accuracy": pytest.approx(3 / 5),
    "mean_class_accuracy": pytest.approx(5 / 8),
    "verb_accuracy": pytest.approx(1.0),
    "noun_accuracy": pytest.approx(3 / 5),
    "recall": [0.5, 1.0, 0.0, 1.0],
    "confusion": [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]],
}
FLOW = {
    "micro_accuracy": pytest.approx(2 / 5),
    "mean_class_accuracy": pytest.approx(3 / 8),
    "verb_accuracy": pytest.approx(3 / 5),
    "noun_accuracy": pytest.approx(3 / 5),
    "recall": [0.5, 0.0, 1.0, 0.0],
    "confusion": [[1, 0, 1, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 1, 0]],
}
RIGHT = {
    "micro_accuracy": 1.0,
    "mean_class_accuracy": 1.0,
    "verb_accuracy": 1.0,
    "noun_accuracy": 1.0,
    "recall": [1.0] * 4,
    "confusion": [[2, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
}


def known_scores(model: TwoStream, clips: Mapping[str, Tensor], seeds: Any = None) -> dict[str, StreamOutput]:
    """A forward pass with the scores above; RGB's attention rises to the right, flow's downwards, in four cells."""
    outputs = {}
    for place, name in enumerate(("rgb", "flow")):
        numbers = ((clips[name][:, 0, 0, 0, 0] + 1) * 127.5).round().long().tolist()
        rows = [SCORES.get(n if name == "rgb" else 255 - n, ([0.25] * 4, [0.25] * 4))[place] for n in numbers]
        rising = torch.arange(4.0) / 3
        attention = rising.reshape((1, 1, 1, 4) if name == "rgb" else (1, 1, 4, 1))
        outputs[name] = StreamOutput(torch.tensor(rows).log() + place, attention.repeat(len(rows), 2, 1, 1))
    return outputs


def test_evaluation_by_hand(tmp_path: Path, numbered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    trainer = checkpoint(tmp_path, numbered, fusion_weight=0.2, train__iterations=77)
    trainer.iteration = 30
    write_checkpoint(str(run), trainer.checkpoint())
    monkeypatch.setattr(TwoStream, "forward", known_scores)
    result = evaluate(str(run), numbered)
    assert json.loads((run / "evaluation.json").read_text()) == result
    attention, sweep = result.pop("attention"), result.pop("fusion_sweep")
    counts = [one.pop("training_clips") for one in result["classes"]]
    assert counts == training_clips(open_shards(numbered), 1)
    for name in ("rgb", "flow", "fused"):
        assert result[name].pop("by_frequency") == recall_by_frequency(result[name]["recall"], counts)
    assert result == {
        "split": 1,
        "trained_on_split": 1,
        "crops": 1,
        "flips": False,
        "clips": 5,
        "clips_trained_on": 0,
        "chance": 0.25,
        "iteration": 30,
        "checkpoint": f"{run}/iteration-000030/checkpoint.pt",
        "fusion_weight": 0.2,
        "rgb": RGB,
        "flow": FLOW,
        "fused": FLOW,
        "classes": [{"action": name, "clips": clips} for name, clips in zip(ACTIONS, (2, 1, 1, 1))],
    }
    for place, (weight, micro, mean_class) in {0: (0, 2 / 5, 3 / 8), 12: (0.6, 1, 1), 20: (1, 3 / 5, 5 / 8)}.items():
        assert sweep[place] == pytest.approx(
            {"rgb_weight": weight, "micro_accuracy": micro, "mean_class_accuracy": mean_class}
        )
    assert len(sweep) == 21 and attention.keys() == {"rgb", "flow", "centre"}

    (run / "evaluation.json").unlink()
    other = evaluate(str(run), numbered, fusion_weight=0.6, out=str(tmp_path / "elsewhere.json"))
    assert json.loads((tmp_path / "elsewhere.json").read_text()) == other
    for name in ("rgb", "flow", "fused"):
        del other[name]["by_frequency"]
    assert (other["fusion_weight"], other["fused"], other["rgb"], other["flow"]) == (0.6, RIGHT, RGB, FLOW)
    assert not (run / "evaluation.json").exists()


def test_attention_is_compared_with_the_gaze_of_its_window(numbered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaze at x = 3 / 4, y = 1 / 4 on every other frame: of 64 x 64 cells row 16, column 48.

    RGB's map rises up to column 48 and is even from there on: 48 columns are lower, 16 x 64 - 1 cells equal. Flow's
    rises downwards up to row 48: 16 rows are lower, 63 cells equal, 47 rows higher. Each of the ten windows has 8
    frames with gaze but that of c4: the first five of its ten frames that count, for the last one is repeated.
    """
    monkeypatch.setattr(TwoStream, "forward", known_scores)
    data = open_shards(numbered)
    config = tiny_config(loss__gaze_sigma=1.7 / 4)
    model = TwoStream(("rgb", "flow"), 4, config.model)
    _, attention = score_clips(model, config, data.test(1), data)
    rising = torch.arange(4.0) / 3
    middle = torch.tensor([[math.exp(-((i - 2) ** 2 + 0.5**2) / (2 * 1.7**2))] for i in range(4)])
    for name, small, auc, judd in (
        ("rgb", rising[None], (48 * 64 + 1023 / 2) / 4095, 1 - 1023 / 4095 / 2),
        ("flow", rising[:, None], (16 * 64 + 63 / 2) / 4095, 1 - (48 * 64 - 1) / 4095 / 2),
        ("centre", middle, None, None),
    ):
        result = attention[name]
        assert result is not None
        assert (result["maps"], result["frames"]) == (20, 9 * 8 + 5)
        if auc is not None:
            assert (result["auc"], result["auc_judd"]) == pytest.approx((auc, judd), rel=1e-6)
        assert result["nss"] == pytest.approx(literal.nss(literal.enlarged(small, 64), [(16, 48)]), rel=1e-3)


@pytest.mark.parametrize(
    ("trained_on", "split", "clips", "trained_clips"),
    [
        (1, None, "c0 c1 c2 c3 c4", 0),
        (2, None, "c1 c3 c4 c5 c6", 0),
        (1, 2, "c1 c3 c4 c5 c6", 2),
        (2, 1, "c0 c1 c2 c3 c4", 2),
    ],
)
def test_the_test_clips_are_those_of_the_split(
    tmp_path: Path,
    numbered: str,
    monkeypatch: pytest.MonkeyPatch,
    trained_on: int,
    split: int | None,
    clips: str,
    trained_clips: int,
) -> None:
    """Split 1 trains on c5, c6 and c7, split 2 on c0, c2 and c7."""
    scored: list[str] = []

    def note(model: Any, config: Any, clips: list[Clip], *rest: Any) -> Any:
        scored.extend(clip.name for clip in clips)
        return score_clips(model, config, clips, *rest)

    monkeypatch.setattr(TwoStream, "forward", known_scores)
    monkeypatch.setattr(evaluate_module, "score_clips", note)
    checkpoint(tmp_path, numbered, data__split=trained_on)
    result = evaluate(str(tmp_path / "run"), numbered, split)
    assert scored == clips.split()
    assert (result["split"], result["trained_on_split"]) == (split or trained_on, trained_on)
    assert (result["clips"], result["clips_trained_on"]) == (5, trained_clips)


@pytest.mark.parametrize(
    ("streams", "changes", "message"),
    [
        ("both", {}, None),
        ("both", {"actions": ACTIONS[:3]}, "trained on 4 classes, not the 3 of /there"),
        (
            "both",
            {"actions": [*ACTIONS[:2], "Juggle", "Wash pan"]},
            "its class 2 is 'Wash cup', that of /there is 'Juggle'",
        ),
        ("rgb", {"image_size": (36, 48)}, r"trained on \(48, 36\) images, /there has \(36, 48\)"),
        ("both", {"flow": "tvl1"}, "trained on dis flow, /there has tvl1"),
        ("flow", {"flow": "tvl1"}, "trained on dis flow, /there has tvl1"),
        ("rgb", {"flow": "tvl1"}, None),  # no flow stream
    ],
    ids=str,
)
def test_a_checkpoint_belongs_to_shards_of_its_kind(streams: str, changes: dict[str, Any], message: str | None) -> None:
    there = Origin(changes.get("actions", ACTIONS), changes.get("image_size", (48, 36)), changes.get("flow", "dis"))
    arguments = (Origin(ACTIONS, (48, 36), "dis"), there, tiny_config(streams=streams), "a checkpoint", "/there")
    if message is None:
        check_same_origin(*arguments)
        return
    with pytest.raises(UserError, match=f"^a checkpoint: {message}$"):
        check_same_origin(*arguments)


def corner_scores(model: Any, clips: Mapping[str, Tensor], seeds: Any = None) -> dict[str, StreamOutput]:
    """Scores that depend on what is at the corners of the flow: other crops have others."""
    x = clips["flow"]
    parts = [x[:, 0, :, 0, 0], x[:, 0, :, 0, -1], x[:, 1, :, -1, 0], x[:, 1, :, -1, -1]]
    return {"flow": StreamOutput(5 * torch.stack([part.mean(dim=1) for part in parts], dim=1), None)}


def test_crops_and_flips_are_averaged(tmp_path: Path, shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Centre, left and right end, each also mirrored: the mean of the softmax scores over windows and crops."""
    trainer = checkpoint(tmp_path, shards, streams="flow", model__stam_depth=0)
    monkeypatch.setattr(TwoStream, "forward", corner_scores)
    data = open_shards(shards)
    clips = data.test(1)
    result = evaluate(str(tmp_path / "run"), shards, crops=3, flips=True)
    assert (result["crops"], result["flips"]) == (3, True)
    reader = WindowReader(clips, ("flow",), data.image_size, 32)
    expected = []
    for index, clip in enumerate(clips):
        windows: list[Window | None] = [
            Window(index, start, 2, left, flip)
            for start in dense_starts(clip.frames)
            for left in (0, 8, 16)
            for flip in (False, True)
        ]
        image = torch.from_numpy(reader.read_batch(windows)["flow"]).permute(0, 2, 1, 3, 4).float() / 127.5 - 1
        logits = trainer.model({"flow": image})["flow"].logits_BK
        expected.append(logits.double().softmax(dim=1).mean(dim=0))
    scores, _ = score_clips(trainer.model, trainer.config, clips, data, views(data.image_size, 32, 3, flips=True))
    torch.testing.assert_close(scores.reduce(0.5)["flow"], torch.stack(expected), atol=1e-6, rtol=0)
    plain = score_clips(trainer.model, trainer.config, clips, data)[0].reduce(0.5)["flow"]
    assert (plain - torch.stack(expected)).abs().max() > 1e-3
    predicted = torch.stack(expected).argmax(dim=1).tolist()
    true = [clip.label for clip in clips]
    assert result["flow"]["micro_accuracy"] == pytest.approx(sum(map(int.__eq__, predicted, true)) / len(true))
    with pytest.raises(UserError, match="--crops 2: 1 or 3"):
        evaluate(str(tmp_path / "run"), shards, crops=2)


def test_attention_is_that_of_the_centre_crops_alone(tmp_path: Path, shards: str) -> None:
    """Whatever further crops are scored, also where a batch holds none of the centre."""
    trainer = checkpoint(tmp_path, shards)
    data = open_shards(shards)
    clips = data.test(1)[:2]
    windows = sum(len(dense_starts(clip.frames)) for clip in clips)
    assert 6 * windows % 8 in (2, 4)  # the last batch has the last views of a window
    plain, all_views = (
        score_clips(trainer.model, trainer.config, clips, data, views(data.image_size, 32, crops, flips=crops == 3))[1]
        for crops in (1, 3)
    )
    for name in ("rgb", "flow", "centre"):
        assert plain[name] is not None and all_views[name] == pytest.approx(plain[name], rel=1e-4)


def test_recall_of_frequent_and_rare_classes_by_hand() -> None:
    """Seven classes, of which one has no test clips. The others have 90, 50; 50, 20; 7, 0 training clips."""
    recalls = [0.5, 1.0, None, 0.2, 0.4, 0.0, 0.9]
    training = [50, 7, 60, 0, 90, 20, 50]
    assert recall_by_frequency(recalls, training) == {
        "many": {"classes": 2, "training_clips": [50, 90], "recall": pytest.approx((0.4 + 0.5) / 2)},
        "medium": {"classes": 2, "training_clips": [20, 50], "recall": pytest.approx((0.9 + 0.0) / 2)},
        "few": {"classes": 2, "training_clips": [0, 7], "recall": pytest.approx((1.0 + 0.2) / 2)},
    }
    assert list(recall_by_frequency([0.5, None], [3, 4])) == ["many"]


def test_training_clips_are_those_of_the_split(shards: str) -> None:
    data = open_shards(shards)
    for split in (1, 2):
        rows = [row["action"] for row in data.table.to_pylist() if row[f"split{split}"] == "train"]
        assert training_clips(data, split) == [rows.count(label) for label in range(len(data.actions))]
        assert sum(training_clips(data, split)) > 0


def test_batches_hold_all_dense_windows_in_order_and_clips_are_counted_once_they_are_done() -> None:
    """Starts of the clips of 20, 16, 43, 16 and 10 frames; eight windows are read at a time."""

    class Reader:
        form = WindowForm()
        clips = tuple(Clip(name, 0, frames, "", 0) for name, _, frames, _, _ in CLIPS[:5])

        def read_batch(self, windows: list[Any]) -> dict[str, np.ndarray]:
            assert all((window.top, window.left, window.flip) == (2, 8, False) for window in windows)
            return {name: np.array([getattr(window, name) for window in windows]) for name in ("clip", "start")}

    done: list[int] = []
    reader: Any = Reader()
    batches = list(evaluate_module._batches(reader, views((48, 36), 32), CPU, done.append))
    assert [batch["clip"].tolist() for batch in batches] == [[0, 0, 1, 2, 2, 2, 2, 2], [3, 4]]
    assert [batch["start"].tolist() for batch in batches] == [[0, 4, 0, 0, 8, 16, 24, 27], [0, 0]]
    assert done == [3, 2]


@pytest.mark.parametrize("look_every", [1, 1000])
@pytest.mark.parametrize("part", ["logits.conv3d.bias", "attention_pred.conv3d.weight"])
def test_a_model_that_is_not_finite_is_refused(
    tmp_path: Path, shards: str, monkeypatch: pytest.MonkeyPatch, part: str, look_every: int
) -> None:
    monkeypatch.setattr(evaluate_module, "_CHECK_EVERY", {"cpu": look_every})
    trainer = checkpoint(tmp_path, shards)
    name = next(name for name in trainer.model.state_dict() if name.startswith("rgb.") and name.endswith(part))
    trainer.model.state_dict()[name].view(-1)[0] = torch.nan
    write_checkpoint(str(tmp_path / "run"), trainer.checkpoint())
    first = open_shards(shards).test(1)[0].name  # all are spoilt
    with pytest.raises(UserError, match=rf"the rgb stream's (scores|attention) are not finite, first in {first}:"):
        evaluate(str(tmp_path / "run"), shards)
    assert not (tmp_path / "run/evaluation.json").exists()


def test_what_does_not_fit_a_checkpoint_is_refused(tmp_path: Path, shards: str) -> None:
    checkpoint(tmp_path, shards, streams="rgb")
    run = str(tmp_path / "run")
    for weight in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="goes from 0 to 1"):
            evaluate(run, shards, fusion_weight=weight)
    with pytest.raises(UserError, match="has the rgb stream only"):
        evaluate(run, shards, fusion_weight=0.5)
    shutil.copytree(shards, tmp_path / "renamed")
    path = tmp_path / "renamed" / "dataset.json"
    info = json.loads(path.read_text())
    info["actions"][2] = "Juggle knives"
    path.write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"its class 2 is '.*', that of .* is 'Juggle knives'"):
        evaluate(run, str(tmp_path / "renamed"))
    info = json.loads((Path(shards) / "dataset.json").read_text())
    info["settings"]["flow"] = "tvl1"
    path.write_text(json.dumps(info))
    open_shards.cache_clear()
    assert evaluate(run, str(tmp_path / "renamed"))["clips"]  # it has no flow stream


def test_where_a_checkpoint_is_looked_for_and_its_evaluation_goes(tmp_path: Path, shards: str) -> None:
    checkpoint(tmp_path, shards, streams="rgb")
    run = tmp_path / "run"
    (run / "iteration-1000000").mkdir()  # broken off
    assert find_checkpoint(str(run)) == f"{run}/iteration-000000/checkpoint.pt"
    (tmp_path / "apart").mkdir()
    shutil.copy(run / "iteration-000000/checkpoint.pt", tmp_path / "apart")
    evaluate(str(tmp_path / "apart"), shards)
    assert (tmp_path / "apart/evaluation.json").exists()
    with pytest.raises(UserError, match="no whole checkpoint in this folder; give a run"):
        evaluate(str(tmp_path), shards)


def test_a_run_that_has_ended_is_tested_by_its_final_weights(tmp_path: Path, shards: str) -> None:
    """Given as the run or as the file; the configuration is that of its last whole checkpoint."""
    trainer = checkpoint(tmp_path, shards, data__crop=36)  # maps of more than one cell
    run, final = tmp_path / "run", tmp_path / "run/final/model.pt"
    before = evaluate(str(run), shards)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(torch.randn_like(p) / 50)
    final.parent.mkdir()
    torch.save(trainer.model.state_dict(), final)
    result = evaluate(str(run), shards)
    assert result["checkpoint"] == str(final) and result["iteration"] == trainer.config.train.iterations
    assert result["attention"]["rgb"] != before["attention"]["rgb"]
    assert result["attention"]["rgb"]["auc"] != result["attention"]["rgb"]["auc_judd"]
    (run / "evaluation.json").unlink()
    assert evaluate(str(final), shards) == result
    assert json.loads((run / "evaluation.json").read_text()) == result
    assert evaluate(str(run / "iteration-000000"), shards) == before
    config = resolve_weights(tiny_config(init_from__rgb=str(run), init_from__flow=str(final), data__crop=36))
    assert config.init_from.rgb == config.init_from.flow == str(final)
    check_run(config, shards)
    torch.save([1], final)
    with pytest.raises(UserError, match=r"model\.pt: holds no state dict of a model"):
        evaluate(str(final), shards)
    shutil.rmtree(run / "iteration-000000")
    with pytest.raises(UserError, match=r"model\.pt: its run has no whole checkpoint"):
        evaluate(str(final), shards)


def test_one_stream_without_attention(tmp_path: Path, shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path, shards, model__stam_depth=0, streams="rgb")
    result = evaluate(str(tmp_path / "run"), shards, 2)
    assert result["attention"] == {} and "fusion_sweep" not in result and "fused" not in result
    show(result, sweep=True)
    assert "No fusion to sweep" in capsys.readouterr().out


def test_from_a_stage_without_attention_to_one_with_it(tmp_path: Path, shards: str) -> None:
    """Lu's "-o" and "-a": the next stage starts from the run's folder, with fresh attention."""
    first = checkpoint(tmp_path, shards, model__stam_depth=0)
    run = str(tmp_path / "run")
    config = resolve_weights(tiny_config(init_from__rgb=run, init_from__flow=run))
    assert config.init_from.flow == f"{run}/iteration-000000/checkpoint.pt"
    check_run(config, shards)
    first.iteration = 9
    write_checkpoint(run, first.checkpoint())
    assert find_checkpoint(run) == f"{run}/iteration-000009/checkpoint.pt"
    assert resolve_weights(tiny_config(init_from__rgb=run, init_from__flow=run), before=config) == config
    second = Trainer(config, first.origin, CPU)
    state = first.model.state_dict()
    for name, value in second.model.state_dict().items():
        assert "attention_" in name or torch.equal(value, state[name]), name


def test_a_collapsed_learning_rate_is_told() -> None:
    config = tiny_config(optimizer__lr=1e-3, train__iterations=3000)

    def line(iteration: int, flow: float) -> dict[str, float]:
        return {"iteration": iteration, "learning_rate_rgb": 1e-3, "learning_rate_flow": flow}

    told = collapsed_rate(config, [line(60, 1e-3), line(120, 3e-8), line(130, 1e-8)])
    assert told == "the learning rate of the flow stream fell from 0.001 to 3e-08 by iteration 120 of 3000"
    assert not collapsed_rate(config, [line(120, 1.1e-6), line(1500, 3e-8)])
    warming = tiny_config(optimizer__lr=1e-3, train__iterations=3000, schedule__warmup=1200)
    assert not collapsed_rate(warming, [line(1, 1e-3 / 1200)])
    cosine = {"schedule__name": "cosine", "train__iterations": 100, "optimizer__lr": 1e-3}
    assert not collapsed_rate(tiny_config(**cosine), [line(60, 1e-8)])
    assert collapsed_rate(tiny_config(**cosine, schedule__horizon=3000), [line(60, 1e-8)])  # half is 1,500 here
