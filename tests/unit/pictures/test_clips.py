"""Clips on disk: exact in PNG, moving in GIF and MP4, measured as clips."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dyndit.analysis.metrics.extractors import load_extractor
from dyndit.analysis.metrics.quality import evaluate
from dyndit.analysis.metrics.sets import read_pictures, read_set
from dyndit.analysis.report.figures import samples_figure
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.pictures import as_image, clips, frames_of, grid
from dyndit.pictures.clips import as_png
from dyndit.pictures.collection import PictureFiles, as_array
from dyndit.pictures.resize import Resize
from dyndit.sampling.sample import sample, sample_into
from dyndit.training.data import open_data
from support.models import TINY_VIDEO, randomise

OPTIONS = {"num_steps": 3, "cfg_scale": 1.5, "batch_size": 4}


def noise(num: int = 5, channels: int = 1, seed: int = 0, frames: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, channels, frames, 8, 12), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def model() -> DynamicDepth:
    backbone = replace(TINY_VIDEO, num_blocks=2).build().eval()
    randomise(backbone, seed=0)
    made = DynamicDepth(backbone, Exits(backbone, ExitConfig(head="adaln-linear"))).eval()
    randomise(made.exits, seed=1)
    return made


@pytest.mark.parametrize("channels", [1, 3])
def test_a_clips_png_is_exact(tmp_path: Path, channels: int) -> None:
    wanted = noise(channels=channels)
    wanted[0, :, 1] = wanted[0, :, 0]  # equal frames stay two frames
    for number, each in enumerate(wanted):
        as_png(each, tmp_path / f"{number}.png")
    found = PictureFiles.of(tmp_path)
    assert found.size == (3, 8, 12)
    assert torch.equal(torch.cat(list(found.batches(2))), wanted)
    with Image.open(tmp_path / "0.png") as image:
        assert image.size == (36, 8)


def test_a_strip_that_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    for frames in ("0", "5", "x", "-1"):
        text = PngInfo()
        text.add_text("dyndit-frames", frames)
        Image.new("L", (12, 8)).save(tmp_path / "bad.png", pnginfo=text)
        with pytest.raises(
            InputError, match=r"bad\.png: dyndit-frames .*, expected a number that divides the width, 12"
        ):
            PictureFiles.of(tmp_path).read([0])


def test_frames_and_grids() -> None:
    batch = noise()
    frames = frames_of(batch)
    assert frames.shape == (15, 1, 8, 12)
    assert torch.equal(frames[4], batch[1, :, 1])
    assert frames_of(frames) is frames
    assert grid(batch).tobytes() == grid(frames, columns=3).tobytes()
    assert len(clips.side_by_side(batch)) == 3


def test_a_set_of_clips_is_stored_resumed_and_read(model: DynamicDepth, tmp_path: Path) -> None:
    out = tmp_path / "set"
    stored = sample_into(out, model, None, 6, **OPTIONS)
    assert stored.manifest["complete"] is True
    exact = sample(model, list(range(6)), **OPTIONS).pictures
    assert exact.shape == (6, 1, 3, 8, 12)
    assert torch.equal(read_pictures(out), exact)
    assert torch.equal(read_pictures(out / "samples.npz"), exact)
    assert np.load(out / "samples.npz")["arr_0"].shape == (6, 3, 8, 12, 1)
    names = {path.name for path in out.iterdir()}
    assert {"grid.png", "grid.gif", "000000-class0.png", "000000-class0.gif", "000005-class5.gif"} <= names
    (out / "000002-class2.png").unlink()
    again = sample_into(out, model, None, 6, **OPTIONS)
    assert again.num_drawn == 1
    assert torch.equal(read_pictures(out), exact)
    with Image.open(out / "000001-class1.gif") as gif:
        assert gif.size == (192, 128)
        shown = []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            shown.append(np.asarray(gif.convert("L")))
    expected = exact[1, 0].numpy().repeat(16, 1).repeat(16, 2)
    assert np.abs(np.stack(shown).astype(int) - expected).max() <= 2


@pytest.mark.skipif(importlib.util.find_spec("imageio_ffmpeg") is None, reason="MP4 needs the extra `video`")
def test_mp4_files_play(tmp_path: Path) -> None:
    import imageio.v2 as imageio

    still = torch.zeros(1, 1, 4, 9, 7, dtype=torch.uint8)
    still[0, 0, 2:] = 200
    assert clips.write(tmp_path / "clip", clips.frames(still[0])) == [tmp_path / "clip.gif", tmp_path / "clip.mp4"]
    frames = [frame.mean() for frame in imageio.get_reader(tmp_path / "clip.mp4", "FFMPEG").iter_data()]
    assert len(frames) == 4
    assert max(frames[:2]) < 20 < 180 < min(frames[2:])
    assert len(clips.write(tmp_path / "odd", clips.side_by_side(still[:, :, :, :, :5]))) == 2


def test_without_imageio_there_are_gif_files_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(clips, "find_spec", lambda name: None)
    assert clips.write(tmp_path / "clip", clips.frames(noise()[0])) == [tmp_path / "clip.gif"]
    assert [path.name for path in tmp_path.iterdir()] == ["clip.gif"]


def test_another_shape_is_only_another_setting(model: DynamicDepth, tmp_path: Path) -> None:
    shape = (1, 5, 12, 8)
    drawn = sample(model, [1, 2, 3], shape=shape, strict=True, **OPTIONS)
    assert drawn.pictures.shape == (3, *shape)
    alone = sample(model, [3], shape=shape, strict=True, first_index=2, **OPTIONS)
    assert torch.equal(alone.pictures, drawn.pictures[2:])
    stored = sample_into(tmp_path / "set", model, (1, 2, 3), 3, shape=shape, **OPTIONS)
    assert json.loads((tmp_path / "set" / "manifest.json").read_text())["settings"]["shape"] == list(shape)
    assert (read_pictures(stored.folder).int() - drawn.pictures.int()).abs().max() <= 1
    with pytest.raises(InputError, match="--shape 5 12 10: expected 3 8 12, or another shape that this model takes"):
        sample(model, [1], shape=(1, 5, 12, 10), **OPTIONS)
    with pytest.raises(InputError, match="set: "):
        sample_into(tmp_path / "set", model, (1, 2, 3), 3, **OPTIONS)


def test_clips_are_measured_as_clips() -> None:
    extractor = load_extractor("moving-digits")
    assert extractor.metric_name == "FD-moving-digits"
    a, b = noise(80, seed=1, frames=4), noise(80, seed=2, frames=4)
    figures = evaluate(a, b // 2, extractor, ("fd", "kid", "paired"), full=b // 2)
    assert figures["fd"] > evaluate(a, b, extractor, ("fd",))["fd"]
    assert figures["paired_psnr_median"] < 15
    with pytest.raises(InputError, match="samples: 4x8x12 pixels, expected 2x8x12 as in the reference set"):
        evaluate(a, b[:, :, :2], extractor, ("fd",))
    with pytest.raises(InputError, match="extractor moving-digits: pictures are 8x12, expected clips"):
        extractor.features(frames_of(a))
    with pytest.raises(InputError, match="extractor digits: pictures are 4x8x8, expected 8x8"):
        load_extractor("digits").features(a[..., :8])


def test_reports_show_frames() -> None:
    figure = samples_figure({"full": noise(3), "plan": noise(3, seed=1)}, columns=6)
    (image,) = figure.axes[0].get_images()
    assert image.get_array().shape == (2 * (8 + 2), 6 * (12 + 2), 3)


def test_overviews_are_no_clips(tmp_path: Path) -> None:
    as_png(noise()[0], tmp_path / "0.png")
    grid(noise()).save(tmp_path / "grid.png")
    clips.write(tmp_path / "0", clips.frames(noise()[0]))
    (tmp_path / "manifest.json").write_text("{}")
    found = PictureFiles.of(tmp_path)
    assert len(found) == 1
    assert found.read([0]).shape == (1, 1, 3, 8, 12)


def test_every_frame_is_brought_to_size(tmp_path: Path) -> None:
    """From a PNG, also one that another program gave an alpha channel, and from an array alike."""
    batch = noise()
    for number, clip in enumerate(batch):
        as_png(clip, tmp_path / f"{number}.png")
    with Image.open(tmp_path / "0.png") as image:
        text = PngInfo()
        text.add_text(clips.ENTRY, image.info[clips.ENTRY])
        image.convert("RGBA").save(tmp_path / "0.png", pnginfo=text)
    np.savez(tmp_path / "set.npz", arr_0=batch.movedim(1, -1).numpy())
    resize = Resize(4)
    found = PictureFiles.of(tmp_path, resize)
    assert found.size == (3, 4, 4)
    frames = [as_array(resize(as_image(frame))) for frame in frames_of(batch)]
    expected = torch.from_numpy(np.stack(frames)).unflatten(0, (5, 3)).movedim(-1, 1)
    assert torch.equal(read_set(tmp_path, "", resize).pictures[:, :1], expected)
    assert torch.equal(read_set(tmp_path / "set.npz", "", resize).pictures, expected)


def test_clips_are_no_pictures_to_train_on(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", arr_0=noise().movedim(1, -1).numpy())
    with pytest.raises(InputError, match=r"set\.npz: arr_0\[0\]: a clip, expected a picture"):
        open_data(str(tmp_path / "set.npz"), 8)
    with pytest.raises(InputError, match="the model takes clips; expected 'moving-digits'"):
        open_data(str(tmp_path), (3, 8, 12))
    as_png(noise()[0], tmp_path / "0.png")
    with pytest.raises(InputError, match=r"0\.png: a clip, expected a picture"):
        open_data(str(tmp_path), 8)[0]
