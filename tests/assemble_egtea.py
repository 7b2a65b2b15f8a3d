"""Assemble an EGTEA folder from real annotations, real gaze and stand-in videos.

    python tests/assemble_egtea.py SHARED OUT [--every N]

SHARED holds `egtea/` (all annotation files, gaze of five sessions) and `video/` (any mp4 files). OUT gets the clips of
those five sessions: annotations cut down to them, their gaze, and a clip of the right name and length for each, its
frames taken from the videos in turn. `--every N` keeps each N-th clip only.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import av
import numpy as np

from tune_ego.dataset.annotations import SPLITS, find_gaze, parse_clip_name, read_annotations

SIZE = (160, 120)


def frames(folder: Path) -> Iterator[np.ndarray]:
    """Endless RGB frames of the videos, one video after the other; each is decoded once."""
    images = []
    for path in sorted(folder.glob("*.mp4")):
        with av.open(str(path)) as container:
            images += [frame.reformat(*SIZE, format="rgb24").to_ndarray() for frame in container.decode(video=0)]
    return cycle(images)


def write_clip(path: Path, images: Iterator[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"preset": "ultrafast", "crf": "28"})
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def assemble(shared: Path, out: Path, every: int = 1) -> list[str]:
    """Write the folder and return the names of its clips."""
    sessions = find_gaze(shared / "egtea")
    clips = [clip.name for clip in read_annotations(shared / "egtea").clips if clip.name.session in sessions][::every]
    kept = {clip.name for clip in clips}
    annotations = out / "action_annotation"
    annotations.mkdir(parents=True)
    source = shared / "egtea" / "action_annotation"
    for kind in ("action", "verb", "noun"):
        shutil.copy(source / f"{kind}_idx.txt", annotations)
    for name in [f"{role}_split{split}.txt" for split in SPLITS for role in ("train", "test")]:
        lines = [line for line in (source / name).read_text().splitlines() if line.split()[0] in kept]
        (annotations / name).write_text("\n".join(lines) + "\n")
    (out / "gaze_data" / "gaze_data").mkdir(parents=True)
    for file in sessions.values():
        shutil.copy(file.uri, out / "gaze_data" / "gaze_data")
    images = frames(shared / "video")
    for clip in clips:
        count = clip.last_frame - clip.first_frame
        write_clip(out / "cropped_clips" / clip.session / f"{clip.name}.mp4", islice(images, count))
    return [parse_clip_name(name).name for name in sorted(kept)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--every", type=int, default=1)
    arguments = parser.parse_args()
    print(f"{len(assemble(arguments.shared, arguments.out, arguments.every))} clips in {arguments.out}")
