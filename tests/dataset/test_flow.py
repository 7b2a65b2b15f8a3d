from __future__ import annotations

from contextlib import suppress
from itertools import islice
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

from tune_ego.dataset import flow
from tune_ego.dataset.prepare import Settings
from tune_ego.dataset.tv_l1 import median_filter, tv_l1
from tune_ego.errors import UserError


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A grey image [H, W] uint8 that is smooth enough to follow and has no two places alike."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (height // 6, width // 6)).astype(np.float32)
    return np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)


def moving(shifts: list[tuple[int, int]], size: tuple[int, int] = (128, 160)) -> list[np.ndarray]:
    """BGR frames of one texture, moved by (x, y) pixels from frame to frame."""
    scene = texture(size[0] + 64, size[1] + 64)
    frames, x, y = [], 32, 32
    for dx, dy in [(0, 0), *shifts]:
        x, y = x - dx, y - dy
        frames.append(np.repeat(scene[y : y + size[0], x : x + size[1], None], 3, axis=2))
    return frames


@pytest.mark.parametrize("name", ["dis", "farneback", "tvl1"])
def test_a_method_finds_the_motion_to_the_next_frame(name: flow.FlowName) -> None:
    shifts = [(3, 1), (-2, 4), (0, -3)]
    method = flow.flow_method(name)
    fields = method.fields([method.preprocess(frame) for frame in moving(shifts)])
    assert fields.shape == (3, 128, 160, 2)
    assert fields.dtype == np.float32
    for field, shift in zip(fields, shifts):
        assert np.abs(field[16:-16, 16:-16] - shift).mean() < 0.15


@pytest.mark.parametrize("name", ["dis", "farneback", "tvl1"])
def test_a_pair_does_not_depend_on_the_others(name: flow.FlowName) -> None:
    method = flow.flow_method(name)
    size = (48, 64) if name == "tvl1" else (128, 160)
    frames = [method.preprocess(frame) for frame in moving([(3, 1), (-2, 4), (0, 0)], size)]
    together = method.fields(frames)
    for index, field in enumerate(together):
        np.testing.assert_array_equal(method.fields(frames[index : index + 2])[0], field)


def test_tv_l1_of_still_and_of_empty_frames_is_zero() -> None:
    still = torch.from_numpy(texture(60, 80))[None]
    assert tv_l1(still, still).abs().max() < 1e-3
    assert tv_l1(torch.zeros(1, 60, 80), torch.zeros(1, 60, 80)).abs().max() == 0


def test_the_median_filter_is_the_median() -> None:
    image = torch.randn(2, 3, 21, 17)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2), mode="replicate")
    windows = padded.unfold(2, 5, 1).unfold(3, 5, 1).flatten(-2)
    torch.testing.assert_close(median_filter(image), windows.median(-1).values, rtol=0, atol=0)


def residual(before: np.ndarray, after: np.ndarray, field: np.ndarray) -> float:
    """Mean absolute difference in brightness when `after` is fetched back along the flow."""
    y, x = np.mgrid[: before.shape[0], : before.shape[1]].astype(np.float32)
    fetched = cv2.remap(
        after.astype(np.float32),
        x + field[..., 0],
        y + field[..., 1],
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return float(np.abs(fetched - before).mean())


def moved_texture(dx: float, dy: float, square: int) -> torch.Tensor:
    """Waves that have moved by (dx, dy) pixels, and a bright square of 8 pixels from column `square` on."""
    y_HW, x_HW = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    x_HW, y_HW = x_HW - dx, y_HW - dy
    image = 127 + 50 * torch.sin(x_HW / 5) * torch.cos(y_HW / 7) + 30 * torch.sin(x_HW / 3 + y_HW / 4)
    image[20:28, square : square + 8] = 230
    return image[None]


def test_tv_l1_of_a_made_up_pair_is_as_it_was() -> None:
    """Waves move by (1.5, -0.75) pixels and the square by (3, 0). The figures were made when the flow agreed with
    OpenCV's on real frames; each constant of the method changes one of them by 0.01 or more."""
    field_HW2 = tv_l1(moved_texture(0, 0, 20), moved_texture(1.5, -0.75, 23))[0]
    expected = {
        (8, 8): (1.513, -0.792),
        (8, 50): (1.499, -0.795),
        (40, 30): (1.493, -0.794),
        (18, 20): (1.536, -0.740),
        (24, 24): (2.152, -0.683),  # in the square
        (24, 27): (2.516, -0.662),
        (30, 26): (1.516, -0.774),
    }
    for (row, column), flow_xy in expected.items():
        assert field_HW2[row, column].tolist() == pytest.approx(flow_xy, abs=0.005), (row, column)


def test_tv_l1_agrees_with_opencv(shared: Path) -> None:
    reference = np.load(shared / "flow_reference" / "tvl1_opencv.npz")
    names = {key.split(".")[0] for key in reference}
    assert len(names) == 4
    for name in names:
        before, after = (reference[f"{name}.frame{index}"] for index in (0, 1))
        expected = reference[f"{name}.tvl1"].astype(np.float32)
        field = tv_l1(torch.from_numpy(before)[None], torch.from_numpy(after)[None])[0].numpy()
        difference = np.linalg.norm(field - expected, axis=-1).mean()
        assert difference < (0.3 if name == "bikes_040" else 0.05)
        assert residual(before, after, field) < 1.02 * residual(before, after, expected)


@pytest.mark.parametrize(("first", "opencv"), [(89, 0.4103), (90, 0.2983), (117, 0.3235)])
def test_tv_l1_follows_what_hardly_moves(shared: Path, first: int, opencv: float) -> None:
    """Two consecutive frames that differ by hundredths of a pixel.

    `opencv` is the residual of `cv2.optflow.DualTVL1OpticalFlow_create()`, opencv-contrib 5.0.0, on the same pair.
    """
    with av.open(str(shared / "video" / "bigbuckbunny.mp4")) as container:
        images = [frame.to_ndarray(format="bgr24") for frame in islice(container.decode(video=0), first, first + 2)]
    small = [cv2.resize(image, (320, 240), interpolation=cv2.INTER_AREA) for image in images]
    before, after = (cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) for image in small)
    field = tv_l1(torch.from_numpy(before)[None], torch.from_numpy(after)[None])[0].numpy()
    assert residual(before, after, field) < 1.03 * opencv


@pytest.fixture(scope="module")
def raft_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of RAFT as nobody trained them: what they find is nonsense, but it has to be the model's nonsense."""
    from torchvision.models.optical_flow import raft_small

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("raft") / "raft.pt"
    torch.save(raft_small(weights=None).state_dict(), path)
    return str(path)


def test_raft_is_torchvisions(raft_file: str) -> None:
    from torchvision.models.optical_flow import raft_small

    frames = [frame // [3, 2, 1] for frame in moving([(3, 1)], (132, 164))]  # no multiples of 8; blue, green, red
    method = flow.flow_method("raft", raft_file)
    found = method.fields([method.preprocess(frame.astype(np.uint8)) for frame in frames])
    model = raft_small(weights=None).eval()
    model.load_state_dict(torch.load(raft_file, weights_only=True))
    images = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).flip(1) / 127.5 - 1
    images = torch.nn.functional.pad(images, (0, 4, 0, 4), mode="replicate")
    with torch.inference_mode():
        expected = model(images[:1], images[1:])[-1][0, :, :132, :164].permute(1, 2, 0)
    torch.testing.assert_close(torch.from_numpy(found[0]), expected)


def test_raft_refuses_what_are_not_its_weights(tmp_path: Path, raft_file: str) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match=r"other\.pt: not a state dict of torchvision's raft"):
        flow.load_raft(str(tmp_path / "other.pt"))
    for name in ("text.pt", "absent.pt"):
        with pytest.raises(UserError, match=f"{name}: cannot be read as weights"):
            flow.load_raft(str(tmp_path / name))
    with pytest.raises(UserError, match="--flow raft needs --flow-weights"):
        Settings(flow="raft").check()
    with pytest.raises(UserError, match="only raft takes them"):
        Settings(flow_weights=raft_file).check()
    with pytest.raises(UserError, match="with --flow raft both sides go from 128"):
        Settings((96, 72), "raft", raft_file).check()
    record = Settings(flow="raft", flow_weights=raft_file).record()
    assert record["flow_weights"] != Settings().record().get("flow_weights")


def test_levels_of_the_stored_flow() -> None:
    """(p + 20) 255 / 40, cut off at 20 pixels, to the nearest level (of two, the even one); x above y."""
    x = [-30, -20, -19.9, -1, -0.05, 0, 0.05, 1, 19.9, 20, 30]
    levels = [0, 0, 1, 121, 127, 128, 128, 134, 254, 255, 255]
    y = [2.0] * 11
    field = np.stack([np.array([x, x[::-1]]), np.array([y, y])], axis=-1).astype(np.float32)  # [2, 11, 2]
    stored = flow.quantise(field)
    assert stored.dtype == np.uint8
    assert stored.tolist() == [levels, levels[::-1], [140] * 11, [140] * 11]
    assert flow.split_components(stored).tolist() == [[levels, levels[::-1]], [[140] * 11] * 2]


def test_pixels_of_the_stored_levels() -> None:
    levels = np.array([[0, 51, 102, 128, 255]], np.uint8)
    pixels = flow.dequantise(levels)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, [[-20, -12, -4, 20 / 255, 20]], atol=1e-5)


def test_torch_methods_take_a_gpu() -> None:
    assert {name: flow.uses_gpu(name) for name in ("dis", "farneback", "tvl1", "raft")} == {
        "dis": False,
        "farneback": False,
        "tvl1": True,
        "raft": True,
    }


def test_one_thread_is_of_its_block_only() -> None:
    cv2.setNumThreads(3)
    torch.set_num_threads(2)
    inside: list[tuple[int, int]] = []
    with suppress(KeyError), flow.one_thread():
        inside.append((cv2.getNumThreads(), torch.get_num_threads()))
        raise KeyError
    assert inside == [(1, 1)]
    assert (cv2.getNumThreads(), torch.get_num_threads()) == (3, 2)
