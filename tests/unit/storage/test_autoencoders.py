"""Autoencoders of every class that works: found, scaled, recorded, and refused where they do not fit."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import dyndit
from dyndit.analysis.metrics.paired import check_same_seeds
from dyndit.analysis.report.runs import row_of_samples
from dyndit.cli import main
from dyndit.cli.models import _training_data as training_data
from dyndit.errors import InputError
from dyndit.models.dit import ClassConditionalDiT
from dyndit.models.dynamic import DynamicDepth
from dyndit.pictures import write_png
from dyndit.sampling.loop import to_uint8
from dyndit.sampling.sample import sample_into
from dyndit.storage import load as checkpoints
from dyndit.storage import official
from dyndit.storage.autoencoder import differs, find, open_autoencoder
from dyndit.storage.convert import convert
from dyndit.storage.diffusers_folder import to_diffusers
from dyndit.training.autoencoders import (
    KINDS,
    decode_batch,
    decode_latents,
    encode_batch,
    latent_space,
    load_autoencoder,
    picture_size,
    record,
)
from dyndit.training.data import Pictures
from dyndit.training.latents import encode_latents
from support.autoencoders import OPTIONS, make_autoencoder
from support.models import TINY, randomise

MEAN, STD = [0.5, -0.25, 0.0, 1.0], [2.0, 0.5, 1.0, 4.0]
COMMIT = "c" * 40


@pytest.fixture
def latents() -> DynamicDepth:
    """A tiny model of latents of 4 channels."""
    backbone = ClassConditionalDiT(replace(TINY, in_channels=4, num_blocks=2))
    randomise(backbone, 0)
    return DynamicDepth(backbone, pixel_space=False).eval()


def pipeline(model: DynamicDepth, vae: Path, folder: Path) -> Path:
    """A pipeline's folder of diffusers with its own `vae/`."""
    scheduler = diffusers.DDIMScheduler()
    diffusers.DiTPipeline(to_diffusers(model), load_autoencoder(vae), scheduler).save_pretrained(folder)
    return folder


class Noise(Pictures):
    """Ten pictures of noise."""

    def __init__(self, channels: int, size: int) -> None:
        self.pictures = torch.rand((10, channels, size, size), generator=torch.Generator().manual_seed(0)) * 2 - 1
        self.num_classes, self.class_names, self.fingerprint = 2, ("a", "b"), "noise"
        self.channels, self.image_size, self.can_flip = channels, size, False

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pictures[index], index % 2

    def uint8(self, indices: Sequence[int] | None = None) -> Tensor:
        return to_uint8(self.pictures if indices is None else self.pictures[list(indices)])


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_encodes_and_decodes(kind: str, tmp_path: Path) -> None:
    """Against the class' own encode and decode: shapes, the scale of latents, and pictures in [-1, 1]."""
    vae = load_autoencoder(make_autoencoder(tmp_path / "vae", kind=kind))
    space = latent_space(vae)
    size = space.picture_size or 8
    data = Noise(space.in_channels, size)
    cached = encode_latents(data, tmp_path / "vae", tmp_path / "cache", device="cpu", progress=False, use_mode=True)
    z = torch.stack([cached[i][0] for i in range(10)])
    assert z.shape[1:] == (space.channels, size // space.pixels, size // space.pixels)
    assert picture_size(vae, z.shape[2:]) == (size, size)
    with torch.no_grad():
        if kind == "AutoencoderKL":
            expected = (vae.encode(data.pictures).latent_dist.mean - 0.25) * 0.5
            decoded = vae.decode(z / 0.5 + 0.25).sample
        elif kind == "AutoencoderTiny":
            expected, decoded = vae.encode(data.pictures).latents, vae.decode(z).sample
        elif kind == "AutoencoderDC":
            expected, decoded = vae.encode(data.pictures).latent * 0.4, vae.decode(z / 0.4).sample
        else:  # pictures in [0, 1], and latents that it scales itself
            expected, decoded = vae.encode(data.pictures / 2 + 0.5).latent, 2 * vae.decode(z).sample - 1
        torch.testing.assert_close(z, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(decode_batch(vae, z), decoded, atol=1e-5, rtol=1e-5)
    pictures = decode_latents(vae, z, batch_size=4)
    assert (pictures.dtype, pictures.shape) == (torch.uint8, (10, space.out_channels, size, size))
    assert cached[3][0].equal(encode_latents(data, tmp_path / "vae", tmp_path / "cache", progress=False)[3][0]) == (
        kind != "AutoencoderKL"  # the others have no posterior to sample
    )


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_mean_and_deviation_per_channel(kind: str, tmp_path: Path) -> None:
    folder = make_autoencoder(tmp_path / "vae", kind=kind, shift_factor=0.0, scaling_factor=0.5)
    plain = load_autoencoder(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"latents_mean": MEAN, "latents_std": STD}))
    vae, data = load_autoencoder(folder), Noise(1, 8)
    z = torch.stack(
        [encode_latents(data, folder, tmp_path / "cache", progress=False, use_mode=True)[i][0] for i in (0, 5)]
    )
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    with torch.no_grad():
        raw = encode_batch(plain, data.pictures[[0, 5]])[0]
        torch.testing.assert_close(z, (raw - mean) / std * 0.5, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            decode_batch(vae, z), plain.decode(z * std / 0.5 + mean).sample, atol=1e-4, rtol=1e-4
        )
        assert not torch.allclose(decode_batch(vae, z), decode_batch(plain, z), atol=1e-2)
    assert record(vae).hash != record(plain).hash  # the same weights, other latents
    for changes in ({"latents_std": STD[:3]}, {"latents_std": [0.0] * 4}, {"shift_factor": 1.0}):
        (folder / "config.json").write_text(json.dumps(config | {"latents_mean": MEAN, "latents_std": STD} | changes))
        with pytest.raises(InputError, match="expected 4 positive deviations and means, and no shift"):
            load_autoencoder(folder)


def test_the_pipelines_own_autoencoder_is_taken(latents: DynamicDepth, tmp_path: Path, capsys) -> None:
    vae = make_autoencoder(tmp_path / "vae", in_channels=3, out_channels=3)
    pipe = pipeline(latents, vae, tmp_path / "pipe")
    draw = ["--num-images", "2", "--steps", "2", "--cfg-scale", "1", "--dtype", "float32"]
    main(["sample", str(pipe), "--out", str(tmp_path / "own"), *draw])
    main(["sample", str(pipe), "--out", str(tmp_path / "given"), "--vae", str(vae), *draw])
    own, given = (json.loads((tmp_path / out / "manifest.json").read_text()) for out in ("own", "given"))
    assert own["settings"]["autoencoder"] == given["settings"]["autoencoder"] == record(load_autoencoder(vae)).hash
    drawn = [sorted(path.read_bytes() for path in (tmp_path / out).rglob("*.png")) for out in ("own", "given")]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) >= 2
    assert dyndit.DynDiTPipeline.from_model(pipe).vae is not None
    checkpoints.save(dyndit.load(pipe), tmp_path / "bare")
    with pytest.raises(SystemExit):
        main(["sample", str(tmp_path / "bare"), "--out", str(tmp_path / "none"), *draw])
    assert "--vae: missing" in capsys.readouterr().err


def test_training_takes_the_pipelines_own_autoencoder(latents: DynamicDepth, tmp_path: Path) -> None:
    """Latents to distill on: encoded by the model's own autoencoder, or the one given; neither is one line."""
    vae = make_autoencoder(tmp_path / "vae")
    pipe = pipeline(latents, vae, tmp_path / "pipe")
    for index in range(4):
        write_png(tmp_path / "pictures" / f"{index % 2}" / f"{index}.png", Image.new("L", (16, 16), 60 * index))
    shape = latents.backbone.sample_shape
    data, made_by = training_data(str(tmp_path / "pictures"), shape, None, tmp_path / "own", str(pipe))
    given, same = training_data(str(tmp_path / "pictures"), shape, vae, tmp_path / "given")
    assert made_by == same == record(load_autoencoder(vae))
    assert data[3][0].shape == shape
    assert torch.equal(data[3][0], given[3][0])
    with pytest.raises(InputError, match="--vae: missing; latents of 4 channels"):
        training_data(str(tmp_path / "pictures"), shape, None, tmp_path / "none", "digits")


def test_comparisons_tell_autoencoders_apart(latents: DynamicDepth, tmp_path: Path) -> None:
    """Rows of one model under two autoencoders have two names, and their pictures are no pairs."""
    rows = []
    for seed in (0, 1):
        vae = load_autoencoder(make_autoencoder(tmp_path / f"vae-{seed}", seed, in_channels=3, out_channels=3))
        options = {"to_pictures": partial(decode_latents, vae), "autoencoder": record(vae).hash}
        sample_into(tmp_path / f"{seed}", latents, None, 2, num_steps=2, cfg_scale=1, **options)
        rows.append(row_of_samples(tmp_path / f"{seed}", {"extractor": "e", "fd": 1.0, "metric": "fd"}, "run"))
    assert rows[0]["model"] != rows[1]["model"]
    assert all(row["model"].startswith(f"{latents.identity.backbone}/") for row in rows)
    with pytest.raises(InputError, match="autoencoder"):
        check_same_seeds(tmp_path / "0", tmp_path / "1")


def test_an_autoencoder_is_recorded_in_the_model_and_its_identity(latents: DynamicDepth, tmp_path: Path) -> None:
    folder = make_autoencoder(tmp_path / "vae", in_channels=3, out_channels=3)
    pipe = pipeline(latents, folder, tmp_path / "pipe")
    notes = convert(pipe, tmp_path / "native", "native")
    known = record(load_autoencoder(folder))
    assert f"autoencoder: AutoencoderKL of hash {known.hash}, recorded; not copied" in notes
    assert json.loads((tmp_path / "native" / "config.json").read_text())["autoencoder"]["hash"] == known.hash
    model = dyndit.load(tmp_path / "native")
    assert model.autoencoder == known
    assert model.identity.autoencoder == known.hash
    assert model.identity.backbone == dyndit.load(pipe).identity.backbone  # exits and plans fit as before
    official.write(model, tmp_path / "dit.pt")
    assert dyndit.load(tmp_path / "dit.pt").autoencoder == known
    other = load_autoencoder(make_autoencoder(tmp_path / "other", seed=1))
    assert differs(load_autoencoder(folder), model) == ()
    (note,) = differs(other, model)
    assert record(other).hash in note
    assert known.hash in note


def test_a_record_that_is_none_is_refused(latents: DynamicDepth, tmp_path: Path) -> None:
    for found in ("sd-vae", {"kind": "AutoencoderKL"}, {"kind": 1, "hash": "a", "source": ""}):
        official.write(latents, tmp_path / "dit.pt")
        data = torch.load(tmp_path / "dit.pt", weights_only=True)
        data["args"]["autoencoder"] = found
        torch.save(data, tmp_path / "dit.pt")
        with pytest.raises(InputError, match=r"autoencoder is .* expected"):
            dyndit.load(tmp_path / "dit.pt")


@pytest.mark.parametrize("where", ["", "vae"])
@pytest.mark.parametrize("safe", [True, False])
def test_hub_ids(where: str, safe: bool, latents: DynamicDepth, tmp_path: Path, monkeypatch) -> None:
    """An autoencoder's id, or the id of a pipeline with one. Nothing but its own files is fetched."""
    folder, asked = tmp_path / COMMIT, []
    made = make_autoencoder(folder / where)
    if not safe:
        weights = made / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert not any("transformer" in pattern or "*.json" in pattern for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    vae = open_autoencoder("org/name@v1", latents, "here")
    assert set(asked) == {("org/name", "v1")}
    assert latents.autoencoder == record(vae, f"org/name@{COMMIT}")
    checkpoints.save(latents, tmp_path / "native")
    assert dyndit.load(tmp_path / "native").autoencoder.source == f"org/name@{COMMIT}"
    with pytest.raises(InputError, match=f"AutoencoderKL of hash .*org/name@{COMMIT}.*expected the folder or hub id"):
        open_autoencoder(None, dyndit.load(tmp_path / "native"), tmp_path / "native")


def test_what_is_no_autoencoder_is_one_line(latents: DynamicDepth, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    for spec, message in (
        ("org/name", "--vae org/name: holds no autoencoder; expected one of AutoencoderKL"),
        ("nowhere", "--vae nowhere: no such folder, and no hub id"),
        (tmp_path, "found a model 'UNet2DConditionModel', expected one of AutoencoderKL"),
    ):
        with pytest.raises(InputError, match=message):
            open_autoencoder(spec, latents, "here")
    wide = make_autoencoder(tmp_path / "wide", latent_channels=8)
    with pytest.raises(InputError, match="8 latent channels; the transformer's have 4"):
        open_autoencoder(wide, latents, "here")
    with pytest.raises(InputError, match="makes pixels"):
        open_autoencoder(wide, DynamicDepth(ClassConditionalDiT(TINY)), "here")
    pointer = wide / "diffusion_pytorch_model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\nsize 334643276\n")
    with pytest.raises(InputError, match="a Git LFS pointer to 334,643,276 bytes"):
        load_autoencoder(wide)
    rae = make_autoencoder(tmp_path / "rae", kind="AutoencoderRAE")
    square = ClassConditionalDiT(replace(TINY, in_channels=64, num_blocks=1))
    with pytest.raises(InputError, match="makes pictures of 8 px; the model's have 32 x 32"):
        open_autoencoder(rae, DynamicDepth(square, pixel_space=False), "here")
    assert find(tmp_path / "none", optional=True) == (None, "")
    assert set(OPTIONS) == set(KINDS)
