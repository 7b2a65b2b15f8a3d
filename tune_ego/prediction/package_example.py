"""Scores of each window of a video, without tune_ego. Needs: pip install torch opencv-python. Run: example.py VIDEO"""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import torch

folder = Path(__file__).parent
config = json.loads((folder / "config.json").read_text())
model = torch.export.load(folder / "model.pt2").module()
(width, height), side = config["image_size"], config["crop"]
spacing = config["frame_step"]  # frames between two frames of a window
span = (config["window_frames"] - 1) * spacing + 1
top, left = (height - side) // 2, (width - side) // 2
video = cv2.VideoCapture(sys.argv[1])
step = (video.get(cv2.CAP_PROP_FPS) or 24) / config["frames_per_second"]  # video frames for each frame of the model
frames = []
while (image := video.read()[1]) is not None:
    frames.append(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA))
assert frames, f"{sys.argv[1]}: no frame can be read"
frames = [frames[round(index * step)] for index in range(int((len(frames) - 1) / step) + 1)]
frames += frames[-1:] * (span - len(frames))  # a short video repeats its last frame
assert config["flow_method"] == "dis" or "flow" not in config["inputs"], "compute flow by the method of the training"
greys = [cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) for image in frames]
dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
flow = [dis.calc(before, after, None) for before, after in zip(greys, [*greys[1:], greys[-1]])]
levels = (np.clip(flow, -config["flow_pixels"], config["flow_pixels"]) / config["flow_pixels"] + 1) * 127.5
rows, columns = slice(top, top + side), slice(left, left + side)
rgb = torch.from_numpy(np.stack(frames)[:, rows, columns, ::-1].copy())
motion = torch.from_numpy(np.rint(levels).astype(np.uint8)[:, rows, columns].transpose(0, 3, 1, 2).copy())
for start in range(0, len(frames) - span + 1, 8):
    windows = {name: images[None, start : start + span : spacing] for name, images in (("rgb", rgb), ("flow", motion))}
    scores = model(*(windows[name] for name in config["inputs"]))[0][0]
    best = int(scores.argmax())
    print(f"{start / 24:6.2f} s  {config['classes'][best]}  {100 * float(scores[best]):.1f} %")
