"""The files that make finished shards a data set: `clips.parquet`, `problems.parquet` and, last, `dataset.json`."""

from __future__ import annotations

from typing import Any

from tune_ego import __version__, storage
from tune_ego.config import WINDOW_FRAMES
from tune_ego.console import print_table
from tune_ego.dataset import shards
from tune_ego.dataset.annotations import Annotations
from tune_ego.dataset.sources import check_threshold
from tune_ego.errors import UserError

_SHOWN = 20


def reopen(out: str) -> None:
    """Before shards are made anew: what is closed would point into those that are gone."""
    storage.remove(storage.join(out, shards.DATASET_FILE))
    shards.open_shards.cache_clear()


def close(
    annotations: Annotations,
    records: list[dict[str, Any]],
    problems: list[shards.Problem],
    settings: dict[str, Any],
    out: str,
    allow_missing: bool,
) -> dict[str, Any]:
    """Write what is not there yet, print a summary, and return what `dataset.json` holds.

    `records` are the clips' rows of `clips.parquet`. Raises `UserError` where too many clips were lost; they are in
    `problems.parquet` then, and the data set stays unfinished.
    """
    records = sorted(records, key=lambda record: record["clip"])
    problems = sorted(problems)
    left_out = [problem for problem in problems if not problem.kept]
    files = shards.closing_files(records, problems)
    try:
        if not allow_missing:
            check_threshold(left_out, len(annotations.clips), out)
        if not records:
            raise UserError(f"{out}: not one clip could be read")
    except UserError as error:
        if not storage.exists(storage.join(out, shards.DATASET_FILE)):  # else it was finished with --allow-missing
            storage.write_bytes(storage.join(out, shards.PROBLEMS_FILE), files[shards.PROBLEMS_FILE])
        print_table(f"Cannot be used ({len(left_out):,})", ["", ""], _table_of(left_out))
        raise UserError(f"{error}; all of them: {storage.join(out, shards.PROBLEMS_FILE)}") from error
    info = {
        "schema_version": shards.SCHEMA_VERSION,
        "written_by": f"tune_ego {__version__}",
        "settings": settings,
        "actions": annotations.actions,
        "verbs": annotations.verbs,
        "nouns": annotations.nouns,
        **_parts_of_actions(annotations),
        "clips": len(records),
        "frames": sum(record["frames"] for record in records),
        "clips_left_out": len(left_out),
        "clips_without_gaze": sum(record["gaze_frames"] == 0 for record in records),
        "clips_shorter_than_a_window": sum(record["frames"] < WINDOW_FRAMES for record in records),
        "clips_of_another_length": sum(problem.stage == "length" for problem in problems),
        "flow_fields_repeated": len(records),
        "problems": [problem._asdict() for problem in problems],
        "sha256": {name: shards.checksum(data) for name, data in files.items()},
    }
    if not _is_closed(info, out):
        reopen(out)
        for name, data in files.items():
            storage.write_bytes(storage.join(out, name), data)
        storage.write_json(storage.join(out, shards.DATASET_FILE), info)
    storage.remove_partial(out)
    _summarise(info, left_out, out)
    return info


def _is_closed(info: dict[str, Any], out: str) -> bool:
    try:
        return bool(storage.read_json(storage.join(out, shards.DATASET_FILE)) == info) and all(
            shards.checksum(storage.read_bytes(storage.join(out, name))) == expected
            for name, expected in info["sha256"].items()
        )
    except (OSError, UserError):  # one of them is not there, or damaged
        return False


def _parts_of_actions(annotations: Annotations) -> dict[str, list[int]]:
    """The verb and the first noun of each action, from 0, as its clips have them; -1 for one without clips."""
    verbs, nouns = ([-1] * len(annotations.actions) for _ in range(2))
    for clip in annotations.clips:
        verbs[clip.action - 1], nouns[clip.action - 1] = clip.verb - 1, clip.nouns[0] - 1
    return {"verb_of_action": verbs, "noun_of_action": nouns}


def _table_of(left_out: list[shards.Problem]) -> list[tuple[str, str]]:
    rows = [(f"  {problem.clip}", problem.reason) for problem in left_out[:_SHOWN]]
    return [*rows, ("  ...", f"all of them: {shards.PROBLEMS_FILE}")] if len(left_out) > _SHOWN else rows


def _summarise(info: dict[str, Any], left_out: list[shards.Problem], out: str) -> None:
    rows = [
        ("clips kept", f"{info['clips']:,} ({info['frames']:,} frames)"),
        ("of these without gaze", f"{info['clips_without_gaze']:,}"),
        (f"of these under {WINDOW_FRAMES} frames (padded)", f"{info['clips_shorter_than_a_window']:,}"),
        ("of these not as long as named", f"{info['clips_of_another_length']:,}"),
        ("left out", f"{info['clips_left_out']:,}"),
    ]
    print_table(f"Shards in {out}", ["", ""], [*rows, *_table_of(left_out)])
