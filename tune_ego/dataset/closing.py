"""Completion of a data set: `clips.parquet`, `problems.parquet` and, last of all, `dataset.json`."""

from __future__ import annotations

from typing import Any

from tune_ego import __version__, storage
from tune_ego.config import WINDOW_FRAMES
from tune_ego.console import print_table
from tune_ego.dataset import shards
from tune_ego.dataset.annotations import Annotations, action_parts
from tune_ego.dataset.sources import check_missing_limit, describe_lengths
from tune_ego.errors import UserError

_SHOWN = 20
"""Most clips that are listed in the printed tables."""


def mark_unfinished(out: str) -> None:
    """Remove `dataset.json`, before shards are written again: it would describe shards that no longer exist."""
    storage.remove(storage.join(out, shards.DATASET_FILE))
    shards.open_shards.cache_clear()


def write_dataset(
    annotations: Annotations,
    records: list[dict[str, Any]],
    problems: list[shards.Problem],
    settings: dict[str, Any],
    out: str,
    allow_missing: bool,
) -> dict[str, Any]:
    """Write the missing or outdated files of a data set whose shards are complete, and print a summary.

    Args:
        annotations: All annotated clips, also clips that were left out.
        records: The clips' rows of `clips.parquet`, in any order.
        problems: The rows of `problems.parquet`, in any order.
        settings: The settings of `prepare`, as `dataset.json` records them.
        out: Path or URI of the data set.
        allow_missing: Accept any number of clips that were left out or are of another length.

    Returns:
        The content of `dataset.json`.

    Raises:
        UserError: Too many clips were left out, or most are not as long as their names say. The clips are listed in
            `problems.parquet`, and the data set stays unfinished.
    """
    records = sorted(records, key=lambda record: record["clip"])
    problems = sorted(problems)
    left_out = [problem for problem in problems if not problem.kept]
    files = shards.closing_files(records, problems)
    try:
        if not allow_missing:
            check_missing_limit(left_out, len(annotations.clips), out)
            lengths = describe_lengths(annotations.clips, {record["clip"]: record["frames"] for record in records})
            if lengths:
                raise UserError(f"{out}: {lengths}")
        if not records:
            raise UserError(f"{out}: not one clip could be read")
    except UserError as error:
        # A data set that was finished with --allow-missing keeps its files.
        if not storage.exists(storage.join(out, shards.DATASET_FILE)):
            storage.write_bytes(storage.join(out, shards.PROBLEMS_FILE), files[shards.PROBLEMS_FILE])
        if left_out:
            print_table(f"Cannot be used ({len(left_out):,})", ["", ""], _rows_of_clips(left_out))
        raise UserError(f"{error}; full list: {storage.join(out, shards.PROBLEMS_FILE)}") from error
    info = _describe(annotations, records, problems, settings, files)
    if not _is_up_to_date(info, out):
        mark_unfinished(out)
        for name, data in files.items():
            storage.write_bytes(storage.join(out, name), data)
        storage.write_json(storage.join(out, shards.DATASET_FILE), info)
    storage.remove_partial(out)
    _print_summary(info, left_out, out)
    return info


def _describe(
    annotations: Annotations,
    records: list[dict[str, Any]],
    problems: list[shards.Problem],
    settings: dict[str, Any],
    files: dict[str, bytes],
) -> dict[str, Any]:
    """Return the content of `dataset.json`."""
    parts = action_parts(annotations)
    return {
        "schema_version": shards.SCHEMA_VERSION,
        "written_by": f"tune_ego {__version__}",
        "settings": settings,
        "actions": annotations.actions,
        "verbs": annotations.verbs,
        "nouns": annotations.nouns,
        "verb_of_action": parts.verbs,
        "noun_of_action": parts.nouns,
        "clips": len(records),
        "frames": sum(record["frames"] for record in records),
        "clips_left_out": sum(not problem.kept for problem in problems),
        "clips_without_gaze": sum(record["gaze_frames"] == 0 for record in records),
        "clips_shorter_than_a_window": sum(record["frames"] < WINDOW_FRAMES for record in records),
        "clips_of_another_length": sum(problem.stage == "length" for problem in problems),
        "clips_placed_by_time": sum(problem.stage == "time" for problem in problems),
        "clips_turned": sum(problem.stage == "rotation" for problem in problems),
        "clips_kept_damaged": sum(problem.stage == "damage" for problem in problems),
        "flow_fields_repeated": len(records),
        "problems": [problem._asdict() for problem in problems],
        "sha256": {name: shards.checksum(data) for name, data in files.items()},
    }


def _is_up_to_date(info: dict[str, Any], out: str) -> bool:
    """Return whether `dataset.json` holds `info`, and the files that it names have their checksums."""
    try:
        return bool(storage.read_json(storage.join(out, shards.DATASET_FILE)) == info) and all(
            shards.checksum(storage.read_bytes(storage.join(out, name))) == expected
            for name, expected in info["sha256"].items()
        )
    except (OSError, UserError):  # a file is absent or damaged
        return False


def _rows_of_clips(left_out: list[shards.Problem]) -> list[tuple[str, str]]:
    rows = [(f"  {problem.clip}", problem.reason) for problem in left_out[:_SHOWN]]
    return [*rows, ("  ...", f"full list: {shards.PROBLEMS_FILE}")] if len(left_out) > _SHOWN else rows


def _print_summary(info: dict[str, Any], left_out: list[shards.Problem], out: str) -> None:
    rows = [
        ("clips kept", f"{info['clips']:,} ({info['frames']:,} frames)"),
        ("of these without gaze", f"{info['clips_without_gaze']:,}"),
        (f"of these under {WINDOW_FRAMES} frames (padded)", f"{info['clips_shorter_than_a_window']:,}"),
        ("of these not as long as named", f"{info['clips_of_another_length']:,}"),
        ("of these placed by their times", f"{info['clips_placed_by_time']:,}"),
        ("of these turned upright", f"{info['clips_turned']:,}"),
        ("of these damaged", f"{info['clips_kept_damaged']:,}"),
        ("left out", f"{info['clips_left_out']:,}"),
    ]
    print_table(f"Shards in {out}", ["", ""], [*rows, *_rows_of_clips(left_out)])
