"""Moving digits: clips that depend on their number alone, of real scans, in batches of one shape."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dyndit.errors import InputError
from dyndit.models.dit import DiTConfig
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.models.video import VideoConfig
from dyndit.training.batches import StepBatches
from dyndit.training.config import FitConfig
from dyndit.training.data import Pictures, check_fit, load_digits, load_moving_digits, open_data
from dyndit.training.exit_errors import exit_error_table
from dyndit.training.moving import SHAPES, bounced, clip
from dyndit.training.train import Train

CONFIG = VideoConfig(
    num_frames=8, image_size=16, patch_size=8, in_channels=1, width=24, num_blocks=2, num_heads=2, num_classes=10
)


@pytest.fixture(scope="module")
def data() -> Pictures:
    return load_moving_digits()


def test_a_clip_is_a_function_of_its_number(data: Pictures) -> None:
    again = load_moving_digits()
    assert again.fingerprint == data.fingerprint != load_digits().fingerprint
    for number in (0, 41, 4_799):
        (x, label), (same, _) = data[number], again[number]
        assert torch.equal(x, same)
        assert label == number % 10
        assert x.dtype == torch.float32
        assert -1 == x.min() < x.max() <= 1
    assert not torch.equal(data[0][0], data[10][0])


def test_frames_hold_whole_scans_of_the_class(data: Pictures) -> None:
    """Every window where a lone scan lies is a scan of the clip's class, in every frame."""
    digits = load_digits()
    scans = {label: set() for label in range(10)}
    for x, label in (digits[i] for i in range(len(digits))):
        scans[label].add(((x + 1) * 8).round().byte().numpy().tobytes())
    lone = 0
    for number in range(20):
        frames = ((data[number][0][0] + 1) * 8).round().byte().numpy()
        first = _windows(frames[0]) & scans[number % 10]
        if first and all(_windows(frame) & first for frame in frames):
            lone += 1
    assert lone >= 8  # of about ten; two scans that overlap hide each other


def _windows(frame: np.ndarray) -> set[bytes]:
    views = np.lib.stride_tricks.sliding_window_view(frame, (8, 8)).reshape(-1, 8, 8)
    return {view.tobytes() for view in views}


@given(st.floats(0, 1), st.floats(-3, 3), st.integers(0, 12), st.integers(1, 30))
def test_bounces_stay_in_the_room_and_never_jump(start: float, speed: float, room: int, num: int) -> None:
    path = bounced(start, speed, room, num)
    assert path.shape == (num,)
    assert 0 <= path.min() <= path.max() <= room
    assert (np.abs(np.diff(path)) <= abs(speed) + 1).all()


def test_a_fast_point_bounces_off_both_ends() -> None:
    assert bounced(0.5, 2.0, 4, 7).tolist() == [2, 4, 2, 0, 2, 4, 2]


def test_groups_have_one_shape_each_and_all_classes(data: Pictures) -> None:
    assert sorted(i for group in data.groups for i in group) == list(range(len(data)))
    assert data.shape == data.shapes[0] == (1, *SHAPES[0])
    assert len(data.groups[0]) == len(data) // 2
    for group, shape in zip(data.groups, data.shapes, strict=True):
        assert {tuple(data[i][0].shape) for i in group[::97]} == {shape}
        assert np.bincount([data.labels[i] for i in group]).tolist() == [len(group) // 10] * 10


def test_a_reference_set_has_the_usual_shape(data: Pictures) -> None:
    few = data.uint8([0, 41, 79])
    assert few.shape == (3, 1, 8, 16, 16)
    assert few.dtype == torch.uint8
    assert torch.equal(few[0], ((data[0][0] + 1) * 127.5).round().to(torch.uint8))
    assert data.groups[4][0] // 10 % 8 == 7


def test_batches_are_of_one_group_and_an_epoch_has_all(data: Pictures) -> None:
    batches = StepBatches(len(data), 64, seed=5, groups=data.groups)
    per_epoch = sum(-(-len(group) // 64) for group in data.groups)
    sets = [set(group) for group in data.groups]
    epoch = [batches.batch(step) for step in range(per_epoch)]
    assert all(sum(set(batch.tolist()) <= group for group in sets) == 1 for batch in epoch)
    assert set(np.concatenate(epoch).tolist()) == set(range(len(data)))
    order = [next(k for k, group in enumerate(sets) if batch[0] in group) for batch in epoch]
    assert order != sorted(order)
    later = StepBatches(len(data), 64, seed=5, groups=data.groups)
    assert later.batch(per_epoch + 3).tolist() == batches.batch(per_epoch + 3).tolist()
    assert later.batch(per_epoch).tolist() != epoch[0].tolist()
    assert StepBatches(len(data), 64, seed=6, groups=data.groups).batch(0).tolist() != epoch[0].tolist()


def test_a_group_smaller_than_a_batch_is_repeated() -> None:
    batches = StepBatches(7, 4, seed=0, groups=((0, 1, 2, 3, 4), (5, 6)))
    epoch = [sorted(batches.batch(step).tolist()) for step in range(3)]
    assert [5, 5, 6, 6] in epoch
    assert {i for batch in epoch for i in batch} == set(range(7))


def test_one_model_trains_on_every_shape_and_resumes(
    data: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at step 8 and resumed, it ends with the same bits."""
    seen, kind = [], type(data)
    item = kind.__getitem__

    def watched(self: Pictures, index: int):
        x, label = item(self, index)
        seen.append(tuple(x.shape))
        return x, label

    monkeypatch.setattr(kind, "__getitem__", watched)
    recipe = Train(CONFIG, FitConfig(steps=16, batch_size=8, learning_rate=3e-3, checkpoint_every=8, log_every=4))
    whole, _ = recipe.run(data, tmp_path / "whole")
    assert set(seen) == set(data.shapes)
    num_read = len(seen)
    seen.clear()
    kept = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    shutil.copytree(kept[0], tmp_path / "broken" / "checkpoints" / kept[0].name)
    again, _ = recipe.run(data, tmp_path / "broken")
    assert 8 * 8 <= len(seen) < num_read - 7 * 8  # eight steps of eight clips, not sixteen
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_exit_errors_are_of_the_usual_shape(data: Pictures) -> None:
    backbone = CONFIG.build().eval()
    model = DynamicDepth(backbone, Exits(backbone, ExitConfig(head="adaln-linear"))).eval()
    errors = exit_error_table(model, data, num_pictures=8, num_bands=2)
    assert list(errors["depth"]) == [1, 1]


def test_what_does_not_fit_is_refused(data: Pictures, tmp_path: Path) -> None:
    check_fit(data, CONFIG.build(), exactly=True)
    with pytest.raises(InputError, match=r"pictures of 1 x 8 x 16 x 16, but the model takes 1 x 8 x 8 \(channels, h"):
        check_fit(data, DiTConfig(8, 4, 1, width=24, num_blocks=1, num_heads=2, num_classes=10).build())
    with pytest.raises(InputError, match=r"pictures of 1 x 8 x 16 x 24, .* takes 1 x 8 x 16 x 16 \(channels, frames"):
        check_fit(data, replace(CONFIG, patch_size=16).build())
    with pytest.raises(InputError, match="data moving-digits: asked for size 8, channels 1"):
        open_data("moving-digits", 8, 1)
    (tmp_path / "class").mkdir()
    with pytest.raises(InputError, match="a folder of pictures, but the model takes clips; expected 'moving-digits'"):
        open_data(str(tmp_path), (8, 16, 16), 1)


def test_clips_of_any_shape_are_drawn(data: Pictures) -> None:
    scans = np.full((1, 8, 8), 16, np.uint8)
    for shape in ((1, 8, 8), (3, 9, 30), (20, 16, 8)):
        drawn = clip(scans, [0], 7, shape)
        assert drawn.shape == shape
        assert (drawn.reshape(shape[0], -1) == 16).sum(1).min() >= 64
