"""The test protocol on a checkpoint, and what is printed of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests import literal
from tests.conftest import tiny_config
from tune_ego import evaluate as evaluate_module
from tune_ego.checkpoint import Origin, write_checkpoint
from tune_ego.checkpoint_files import find_checkpoint
from tune_ego.dataset.shards import open_shards
from tune_ego.errors import UserError
from tune_ego.evaluate import evaluate
from tune_ego.evaluation_tables import PUBLISHED, show
from tune_ego.experiment import collapsed_rate
from tune_ego.feed.windows import WindowReader, centre_window, dense_starts
from tune_ego.launch import check_run, with_found_weights
from tune_ego.train import Trainer

CPU = torch.device("cpu")


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


def test_evaluation_equals_its_protocol(tmp_path: Path, shards: str, capsys: pytest.CaptureFixture[str]) -> None:
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
    for agreement in result["attention"].values():
        assert 0 <= agreement["auc"] <= 1 and 0 <= agreement["auc_judd"] <= 1 and agreement["frames"] > 0

    capsys.readouterr()
    show(result, sweep=True, compare=True)
    printed = capsys.readouterr().out
    assert (
        "this checkpoint, fused" in printed
        and "Weakest classes, fused" in printed
        and "AUC (Judd)    AUC " in printed
        and "window frames" in printed
    )
    assert printed.count("published: ") == len(PUBLISHED) and "60.54 %" in printed and "best" in printed


def test_clips_that_were_trained_on_are_no_test(
    tmp_path: Path, shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path, shards, data__split=2)
    own = evaluate(str(tmp_path / "run"), shards)
    assert (own["split"], own["clips_trained_on"]) == (2, 0)
    other = evaluate(str(tmp_path / "run"), shards, 1)
    assert (other["split"], other["trained_on_split"], other["clips_trained_on"]) == (1, 2, other["clips"])
    capsys.readouterr()
    show(own, compare=True)
    assert "NOT A TEST" not in (printed := capsys.readouterr().out)
    assert "NOT COMPARABLE: 4 classes here" in printed
    show(other)
    assert f"trains on {other['clips']} of these clips" in capsys.readouterr().out


@pytest.mark.parametrize("look_every", [1, 3, 1000])
@pytest.mark.parametrize("part", ["logits.conv3d.bias", "attention_pred.conv3d.weight"])
def test_a_model_that_is_not_finite_is_refused(
    tmp_path: Path, shards: str, monkeypatch: pytest.MonkeyPatch, part: str, look_every: int
) -> None:
    monkeypatch.setattr(evaluate_module, "_LOOK_EVERY", {"cpu": look_every})
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
    config = with_found_weights(tiny_config(init_from__rgb=str(run), init_from__flow=str(final), data__crop=36))
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
    config = with_found_weights(tiny_config(init_from__rgb=run, init_from__flow=run))
    assert config.init_from.flow == f"{run}/iteration-000000/checkpoint.pt"
    check_run(config, shards)
    first.iteration = 9
    write_checkpoint(run, first.checkpoint())
    assert find_checkpoint(run) == f"{run}/iteration-000009/checkpoint.pt"
    assert with_found_weights(tiny_config(init_from__rgb=run, init_from__flow=run), before=config) == config
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
