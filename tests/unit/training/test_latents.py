"""Latents through a tiny random autoencoder: encode, reuse, refuse, train on them, decode."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dyndit.errors import CheckpointError, InputError
from dyndit.training.autoencoders import decode_latents, load_autoencoder
from dyndit.training.config import FitConfig
from dyndit.training.data import Pictures, load_digits
from dyndit.training.fit import Task, fit
from dyndit.training.latents import encode_latents
from support.autoencoders import make_autoencoder


class Few(Pictures):
    """The first `num` digits: a small set that can tell what was read from it."""

    def __init__(self, num: int = 21):
        self.digits, self.num, self.read = load_digits(), num, []
        self.num_classes, self.class_names = 10, self.digits.class_names
        self.channels, self.image_size, self.can_flip = 1, 8, False
        self.fingerprint = f"first {num} digits"

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.append(index)
        return self.digits[index]

    def uint8(self, indices=None) -> Tensor:
        return self.digits.uint8(range(self.num) if indices is None else indices)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_autoencoder(tmp_path_factory.mktemp("vae"))


def encode(pictures: Pictures, autoencoder: Path, out: Path, **options):
    return encode_latents(
        pictures,
        autoencoder,
        out,
        batch_size=5,
        pictures_per_shard=8,
        device="cpu",
        progress=False,
        **options,
    )


def test_latents_are_the_posterior_of_the_autoencoder(autoencoder: Path, tmp_path: Path) -> None:
    pictures = Few()
    latents = encode(pictures, autoencoder, tmp_path)
    mode = encode(pictures, autoencoder, tmp_path, use_mode=True)
    vae = load_autoencoder(autoencoder)
    for i in (0, 7, 8, 20):  # both sides of a shard's border, and the last
        x, label = pictures[i]
        with torch.no_grad():
            posterior = vae.encode(x[None]).latent_dist
        z, found = latents[i]
        assert found == label
        assert z.shape == (4, 4, 4)
        assert torch.allclose(mode[i][0], (posterior.mean[0] - 0.25) * 0.5, atol=1e-5)
        surprise = (z / 0.5 + 0.25 - posterior.mean[0]) / posterior.std[0]
        expected = torch.randn(z.shape, generator=torch.Generator().manual_seed(i))
        assert torch.allclose(surprise, expected, atol=1e-3)
    assert torch.equal(latents[3][0], latents[3][0])
    assert torch.equal(pickle.loads(pickle.dumps(latents))[3][0], latents[3][0])  # for worker processes
    assert (len(latents), latents.channels, latents.image_size) == (21, 4, 4)
    assert latents.fingerprint != mode.fingerprint != pictures.fingerprint
    assert torch.equal(latents.uint8([2]), pictures.uint8([2]))
    with pytest.raises(IndexError):
        latents[21]


@pytest.mark.reliability("A damaged shard of latents is encoded again, and no other")
def test_a_valid_cache_is_reused_and_only_what_is_broken_is_made_again(autoencoder: Path, tmp_path: Path) -> None:
    first = encode(Few(), autoencoder, tmp_path)
    again = Few()
    assert encode(again, autoencoder, tmp_path).fingerprint == first.fingerprint
    assert again.read == []

    shards = sorted(tmp_path.glob("shard-*"))
    assert len(shards) == 3
    damaged = bytearray(shards[1].read_bytes())
    damaged[-1] ^= 1  # one bit, which safetensors would load
    shards[1].write_bytes(damaged)
    shards[2].unlink()
    again = Few()
    assert encode(again, autoencoder, tmp_path).fingerprint == first.fingerprint
    assert again.read == list(range(8, 21))


def test_another_autoencoder_or_other_pictures_are_refused(autoencoder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    encode(Few(), autoencoder, cache)
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    with pytest.raises(InputError, match="vae_sha256"):
        encode(Few(), make_autoencoder(tmp_path / "other", seed=1), cache)
    with pytest.raises(InputError, match="data_fingerprint"):
        encode(Few(20), autoencoder, cache)
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before
    with pytest.raises(InputError, match="other files"):
        encode(Few(), autoencoder, autoencoder)
    (cache / "latents.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"latents\.json"):
        encode(Few(), autoencoder, cache)


def test_pictures_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 channels"):
        encode(Few(), make_autoencoder(tmp_path / "rgb", in_channels=3), tmp_path / "out")
    deep = {"down_block_types": ("DownEncoderBlock2D",) * 5, "up_block_types": ("UpDecoderBlock2D",) * 5}
    with pytest.raises(InputError, match="multiples of 16"):
        encode(Few(), make_autoencoder(tmp_path / "deep", block_out_channels=(4,) * 5, **deep), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_autoencoder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        load_autoencoder(tmp_path / "nowhere")
    folder = make_autoencoder(tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderOobleck"}))
    with pytest.raises(InputError, match="AutoencoderOobleck"):
        load_autoencoder(folder)

    folder = make_autoencoder(tmp_path / "edited")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layers_per_block": 2}))
    with pytest.raises(InputError, match="do not fit"):  # diffusers would make up the missing ones
        load_autoencoder(folder)

    folder = make_autoencoder(tmp_path / "cut")
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_autoencoder(folder)


def test_decoding_undoes_the_scale_and_does_not_depend_on_the_batch(autoencoder: Path, tmp_path: Path) -> None:
    latents = encode(Few(), autoencoder, tmp_path, use_mode=True)
    z = torch.stack([latents[i][0] for i in range(6)])
    pictures = decode_latents(autoencoder, z, batch_size=4)
    assert (pictures.shape, pictures.dtype) == ((6, 1, 8, 8), torch.uint8)
    vae = load_autoencoder(autoencoder)
    with torch.no_grad():
        decoded = vae.decode(vae.encode(Few()[2][0][None]).latent_dist.mean).sample[0]
    expected = ((decoded.clamp(-1, 1) + 1) * 127.5).round()
    assert (pictures[2].float() - expected).abs().max() <= 1
    assert (decode_latents(vae, z, batch_size=1).int() - pictures.int()).abs().max() <= 1
    assert pictures.float().std() > 1  # otherwise the lines above prove nothing


def test_a_model_trains_on_latents(autoencoder: Path, tmp_path: Path) -> None:
    class Denoise(Task):
        trainable = nn.Conv2d(4, 4, 3, padding=1)

        def loss(self, module, x, y, generator):
            return (module(x + torch.randn(x.shape, generator=generator)) - x).square().mean(), {}

        def preview(self, out, step, ema): ...

    latents = encode(Few(), autoencoder, tmp_path / "cache")
    config = FitConfig(steps=30, batch_size=8, learning_rate=1e-2, log_every=30)
    losses = fit(Denoise(), latents, config, tmp_path / "run", progress=False).losses["loss"]
    assert losses[-5:].mean() < 0.8 * losses[:5].mean()
    # The cache's own fingerprint guards the run: the mode of the posterior is other data than its samples.
    mode = encode(Few(), autoencoder, tmp_path / "cache", use_mode=True)
    with pytest.raises(InputError, match="data"):
        fit(Denoise(), mode, replace(config, steps=40), tmp_path / "run", progress=False)
