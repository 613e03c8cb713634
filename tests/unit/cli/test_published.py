"""The published DiT's own commands: its flags, its defaults, and one line where its weights are missing."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dyndit
from dyndit.cli import main, verbs
from dyndit.cli.flags import READING
from dyndit.models.dit import CARDS, DiTConfig
from dyndit.storage import published
from support.autoencoders import make_autoencoder
from support.models import randomise

CARD, CLASSES = "DiT-T/8", ["207", "360", "387", "974", "88", "979", "417", "279"]
LINE = ["--model", CARD, "--image-size", "256", "--num-sampling-steps", "250", "--seed", "42"]
HIGH = {"block_out_channels": (4,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4, "norm_num_groups": 2}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, an empty cache of the hub, and a tiny card."""
    tiny = DiTConfig(32, 8, 4, width=24, num_blocks=2, num_heads=2)
    monkeypatch.setitem(CARDS, CARD, tiny)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def weights(path: Path, **changes: object) -> Path:
    backbone = DiTConfig(**(vars(CARDS[CARD]) | changes)).build()
    randomise(backbone, seed=0)
    path.parent.mkdir(exist_ok=True)
    torch.save(backbone.state_dict(), path)
    return path


def autoencoder(path: Path) -> Path:
    blocks = {**HIGH, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return make_autoencoder(path, in_channels=3, out_channels=3, **blocks)


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_the_published_command_draws_as_the_published_script(place: Path) -> None:
    ckpt, vae = weights(place / "dit.pt"), autoencoder(place / "vae")
    main(["sample", *LINE, "--class-labels", *CLASSES, "--ckpt", str(ckpt), "--vae", str(vae)])
    out = place / "samples" / "DiT-T-8-dit-size-256-vae-vae-cfg-4.0-seed-42"
    settings = json.loads((out / "manifest.json").read_text())["settings"]
    wanted = {"solver": "ddpm", "steps": 250, "cfg_scale": 4.0, "guided_channels": 3, "num_images": 8, "seed": 42}
    assert settings == settings | wanted
    assert settings["labels"] == [int(label) for label in CLASSES]
    pictures = sorted(out.glob("0*.png"))
    assert [path.stem.partition("class")[2] for path in pictures] == CLASSES
    assert Image.open(pictures[0]).size == (256, 256)
    options = ["--solver", "ddpm", "--steps", "250", "--cfg-scale", "4", "--guided-channels", "3", "--num-images", "8"]
    own = [
        "--num-heads",
        "2",
        "--seed",
        "42",
        "--class-labels",
        *CLASSES,
        "--vae",
        str(vae),
        "--out",
        str(place / "own"),
    ]
    main(["sample", str(ckpt), *options, *own])
    for path in pictures:
        assert path.read_bytes() == (place / "own" / path.name).read_bytes()


@pytest.mark.parametrize(("asked", "labels"), [("random", "random"), ("balanced", "in turn")])
def test_a_card_takes_classes_by_word(place: Path, asked: str, labels: str) -> None:
    files = ["--ckpt", str(weights(place / "dit.pt")), "--vae", str(autoencoder(place / "vae"))]
    main(["sample", "--model", CARD, "--steps", "2", "--class-labels", asked, *files, "--out", "drawn"])
    settings = json.loads((place / "drawn" / "manifest.json").read_text())["settings"]
    assert (settings["labels"], settings["num_images"]) == (labels, len(CLASSES))


def test_weights_and_autoencoder_are_found_where_the_published_code_keeps_them(place: Path, monkeypatch) -> None:
    monkeypatch.setitem(published.WEIGHTS, CARD, ("DiT-T-8-256x256.pt", "https://example.org"))
    weights(place / "pretrained_models" / "DiT-T-8-256x256.pt")
    autoencoder(place / "pretrained_models" / "sd-vae-ft-ema")
    few = ["--num-sampling-steps", "2", "--num-fid-samples", "3", "--per-proc-batch-size", "2", "--global-seed", "1"]
    main(["sample", "--model", CARD, *few, "--vae", "ema", "--sample-dir", "many", "--no-tf32"])
    (out,) = (place / "many").iterdir()
    assert out.name == "DiT-T-8-pretrained-size-256-vae-ema-cfg-1.5-seed-1"
    assert np.load(out / "samples.npz")["arr_0"].shape == (3, 256, 256, 3)
    assert json.loads((out / "manifest.json").read_text())["settings"]["labels"] == "in turn"


def test_what_is_missing_is_named_with_its_place(place: Path, capsys) -> None:
    line = refused(capsys, "sample", "--model", "DiT-XL/2", "--image-size", 512, "--class-labels", 207)
    assert line.startswith("dyndit: pretrained_models/DiT-XL-2-512x512.pt: no such file; expected")
    assert "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-512x512.pt" in line
    assert "no weights of DiT-B/4 are published" in refused(capsys, "sample", "--model", "DiT-B/4")
    line = refused(capsys, "sample", *LINE, "--ckpt", weights(place / "dit.pt"))
    assert line.startswith("dyndit: pretrained_models/sd-vae-ft-mse: no such folder; expected the autoencoder")
    assert "no such file or folder" in refused(capsys, "sample", *LINE, "--ckpt", "nowhere.pt")
    assert not (place / "samples").exists()


def test_weights_of_another_card_are_refused(place: Path, capsys) -> None:
    ckpt = weights(place / "dit.pt", num_blocks=3)
    assert f"dit.pt: num_blocks 3; expected 2, as {CARD} has" in refused(capsys, "sample", *LINE, "--ckpt", ckpt)
    ckpt = weights(place / "few.pt", num_classes=10)
    line = refused(capsys, "sample", *LINE, "--ckpt", ckpt)
    assert "num_classes 10; expected 1000" in line


def test_weights_of_a_card_are_chosen_and_told_as_any_checkpoints(place: Path) -> None:
    """A table of ten rows is taken for ten classes without a null class, unless the caller tells nine."""
    own, average = (torch.load(weights(place / f"{n}.pt", num_classes=9, width=24 + 24 * n)) for n in range(2))
    torch.save({"model": own, "ema": average}, place / "both.pt")
    found = published.inspect(CARD, place / "both.pt", 9, weights="model").model.backbone
    assert found.config() == vars(CARDS[CARD]) | {"num_classes": 9}
    assert all(torch.equal(tensor, own[name]) for name, tensor in found.state_dict().items())
    with pytest.raises(dyndit.InputError, match="width 48; expected 24"):
        published.inspect(CARD, place / "both.pt", 9)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["digits", "--model", CARD], "expected one of them"),
        ([], "expected one of them"),
        (["digits"], "--out: missing"),
        (["digits", "--ckpt", "dit.pt"], "--ckpt dit.pt: belongs to a card"),
        (["--model", "DiT-XXL/2"], "--model DiT-XXL/2: no such card"),
        (["--model", CARD, "--image-size", "300"], "--image-size 300: expected 256 or 512"),
        (["--model", CARD, "--image-size", "512"], "no such card"),
        (["digits", "--out", "x", "--tf32", "--no-tf32"], "--tf32 and --no-tf32"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(arguments: list[str], named: str, capsys) -> None:
    assert named in refused(capsys, "sample", *arguments)


def taken(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, object]:
    """What a verb is called with."""
    found: dict[str, object] = {}
    noting = {
        name: functools.wraps(verb)(lambda *positional, **named: found.update(named, positional=positional))
        for name, verb in verbs([]).items()
    }
    with monkeypatch.context() as patch:
        patch.setattr("dyndit.cli.verbs", lambda _: noting)
        main(list(arguments))
    return found


def test_every_flag_of_the_published_scripts_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """sample.py, sample_ddp.py and train.py, with every flag that they have."""
    line = "--model DiT-B/4 --vae ema --image-size 512 --num-classes 10 --cfg-scale 2 --num-sampling-steps 9 --seed 3"
    found = taken(monkeypatch, "sample", *line.split(), "--ckpt", "a.pt")
    assert (found["cfg_scale"], found["steps"], found["seed"], found["vae"]) == (2, 9, 3, Path("ema"))
    card = found["published"]
    assert (card.model, card.image_size, card.num_classes, card.ckpt) == ("DiT-B/4", 512, 10, Path("a.pt"))
    assert card.card == "DiT-B/4-512"
    line = "--sample-dir s --per-proc-batch-size 4 --num-fid-samples 50 --global-seed 5 --tf32 --model DiT-S/2"
    found = taken(monkeypatch, "sample", *line.split())
    assert (found["batch_size"], found["num_images"], found["seed"]) == (4, 50, 5)
    assert (found["published"].sample_dir, found["published"].tf32) == (Path("s"), True)
    line = (
        "--data-path d --results-dir r --model DiT-L/8 --image-size 256 --num-classes 7 --epochs 2 "
        "--global-batch-size 8 --global-seed 1 --vae mse --num-workers 0 --log-every 5 --ckpt-every 6"
    )
    found = taken(monkeypatch, "train", *line.split())
    assert found.pop("positional") in ((), ("published",))
    assert found.pop("reading") == READING
    given = {name: value for name, value in found.items() if value not in (None, "")}
    assert given == {
        "data": "d", "out": Path("r"), "model": "DiT-L/8", "image_size": 256, "num_classes": 7, "epochs": 2,
        "batch_size": 8, "seed": 1, "vae": Path("mse"), "num_workers": 0, "log_every": 5, "checkpoint_every": 6,
        "device": "auto", "dtype": "own", "tracker": "tensorboard", "extend": False,
    }  # fmt: skip


def test_a_card_is_trained_with_the_published_flags(place: Path, capsys) -> None:
    for k in range(4):
        folder = place / "pictures" / str(k % 2)
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(k).integers(0, 256, (256, 256, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{k}.png")
    shape = ["--model", CARD, "--image-size", "256", "--num-classes", "2", "--vae", str(autoencoder(place / "vae"))]
    loop = ["--epochs", "2", "--global-batch-size", "2", "--num-workers", "0", "--log-every", "1", "--ckpt-every", "2"]
    main(["train", *shape, *loop, "--data-path", "pictures", "--results-dir", "run", "--global-seed", "1"])
    model = dyndit.load("run")
    assert model.backbone.config() == vars(CARDS[CARD]) | {"num_classes": 2}
    assert len((place / "run" / "losses.csv").read_text().splitlines()) == 1 + 4  # 2 epochs of 4 pictures by 2
    few = ["--num-sampling-steps", "2", "--class-labels", "0", "1", "--ckpt", "run"]
    main(["sample", *shape, *few, "--out", "drawn"])
    assert len(list((place / "drawn").glob("0*.png"))) == 2
    assert "expected one of them" in refused(capsys, "train", *shape, "--steps", 1, "--epochs", 1, "--out", "x")
    assert "belongs to a card" in refused(capsys, "train", "digits", "--image-size", 256, "--out", "x")
