"""Training a trunk and distilling its exits, on digits: short runs of a tiny model."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from dyndit.backbones import DiTConfig
from dyndit.backbones.class_conditional import position_features
from dyndit.data import Pictures, load_digits
from dyndit.dynamic import DynamicDepth
from dyndit.errors import InputError
from dyndit.exits import HEADS, ExitConfig, Exits
from dyndit.latents import LatentPictures
from dyndit.objectives import Schedule
from dyndit.tasks import Distill, Train, exit_error_table
from dyndit.training import FitConfig

DIGITS = load_digits()
BACKBONE = DiTConfig(8, 4, 1, width=48, num_blocks=4, num_heads=2, num_classes=10)
FIT = FitConfig(steps=80, batch_size=32, learning_rate=2e-3, warmup_steps=5, ema_decay=0.9, seed=1)
TRAIN = Train(BACKBONE, FIT, data="digits")
DISTILL = Distill(ExitConfig(), replace(FIT, steps=150, learning_rate=3e-3), data="digits")


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[DynamicDepth, pd.DataFrame]:
    model, result = TRAIN.run(DIGITS, tmp_path_factory.mktemp("train"))
    return model, result.losses


@pytest.fixture
def trunk(make_model) -> DynamicDepth:
    """A random trunk without exits; its layers differ far more than those of a briefly trained one."""
    return DynamicDepth(make_model(width=48, num_blocks=4).backbone)


def test_training_lowers_the_loss(trained: tuple[DynamicDepth, pd.DataFrame]) -> None:
    model, losses = trained
    assert {"step", "loss", "mse", "vb"} <= set(losses.columns)
    assert len(losses) == FIT.steps
    assert losses["loss"][-20:].mean() < 0.7 * losses["loss"][:20].mean()
    assert losses["mse"][0] == pytest.approx(1, abs=0.15)  # a fresh model predicts 0
    assert (model.exits, model.training, model.pixel_space) == (None, False, True)


def test_training_returns_the_averaged_weights(tmp_path: Path) -> None:
    model, result = replace(TRAIN, fit=replace(FIT, steps=5)).run(DIGITS, tmp_path)
    assert same(weights(model.backbone), result.ema)
    assert not same(result.ema, result.weights)
    assert torch.equal(model.backbone.pos_embed[0], position_features(2, BACKBONE.width))  # fixed, not trained


def test_training_depends_on_its_seed_alone(tmp_path: Path) -> None:
    short = replace(FIT, steps=3)

    def run(name: str, fit: FitConfig) -> dict[str, Tensor]:
        torch.rand(7)  # moves the global generator
        return weights(replace(TRAIN, fit=fit).run(DIGITS, tmp_path / name)[0])

    state = torch.get_rng_state()
    first = run("a", short)
    torch.set_rng_state(state)
    torch.rand(7)
    after = torch.rand(3)
    torch.set_rng_state(state)
    assert same(first, run("b", short))
    assert torch.equal(torch.rand(3), after)  # and gives the global generator back
    assert not same(first, run("c", replace(short, seed=2)))


def test_gradient_checkpointing_trains_the_same(tmp_path: Path) -> None:
    short = replace(FIT, steps=3)
    plain, _ = replace(TRAIN, fit=short).run(DIGITS, tmp_path / "a")
    saving, _ = replace(TRAIN, fit=replace(short, gradient_checkpointing=True)).run(DIGITS, tmp_path / "b")
    assert saving.backbone.gradient_checkpointing
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(saving.state_dict()[name], tensor, atol=1e-5, rtol=1e-4)


def test_previews_get_the_averaged_model(tmp_path: Path) -> None:
    seen = []
    recipe = replace(TRAIN, fit=replace(FIT, steps=4, sample_every=2))
    recipe.run(DIGITS, tmp_path, preview=lambda model, out, step: seen.append((step, out, weights(model.backbone))))
    assert [(step, out) for step, out, _ in seen] == [(2, tmp_path), (4, tmp_path)]
    assert not same(seen[0][2], seen[1][2])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image_size": 16}, "picture size 8, but the recipe's backbone expects 16"),
        ({"in_channels": 3}, "channels 1, but the recipe's backbone expects 3"),
        ({"num_classes": 9}, "classes 10, but the recipe's backbone expects 9"),
    ],
)
def test_training_refuses_other_data(changes: dict, named: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=named):
        replace(TRAIN, backbone=replace(BACKBONE, **changes)).run(DIGITS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"num_heads": 3}, {"norm_eps": 1e-5}])
def test_training_resumes_the_same_architecture_only(changes: dict, tmp_path: Path) -> None:
    """Also where no tensor shows the difference."""
    short = replace(TRAIN, fit=replace(FIT, steps=2))
    short.run(DIGITS, tmp_path)
    with pytest.raises(InputError, match="identity"):
        replace(short, backbone=replace(BACKBONE, **changes)).run(DIGITS, tmp_path)


class Latents(LatentPictures):
    """Digits that say they are latents."""

    def __init__(self) -> None:
        self.num_classes, self.channels, self.image_size = 10, 1, 8
        self.can_flip, self.fingerprint = False, "0" * 64

    def __len__(self) -> int:
        return len(DIGITS)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return DIGITS[index]


def test_a_model_of_latents_says_so(tmp_path: Path) -> None:
    """Else its predictions would be clamped to [-1, 1]."""
    seen = []
    recipe = replace(TRAIN, fit=replace(FIT, steps=1, sample_every=1))
    model, _ = recipe.run(Latents(), tmp_path, preview=lambda model, *_: seen.append(model.pixel_space))
    assert (model.pixel_space, seen) == (False, [False])


@pytest.mark.parametrize("head", HEADS)
def test_distillation_halves_the_error_and_leaves_the_trunk(head: str, trunk: DynamicDepth, tmp_path: Path) -> None:
    before, hashed = weights(trunk.backbone), trunk.trunk_hash()
    recipe = replace(DISTILL, exits=ExitConfig((1, 2, 3), head))
    model, result = recipe.run(trunk, DIGITS, tmp_path)
    assert same(weights(model.backbone), before)
    assert model.trunk_hash() == hashed
    assert all(p.grad is None for p in model.backbone.parameters())
    assert same({f"exits.{name}": tensor for name, tensor in weights(model.exits).items()}, result.ema)
    assert not model.training
    assert {"loss", "noise", "variance"} <= set(result.losses.columns)

    fresh = DynamicDepth(trunk.backbone, Exits(trunk.backbone, recipe.exits))
    tables = [exit_error_table(m, DIGITS, num_pictures=128, num_bands=4) for m in (fresh, model)]
    fresh_error, error = (table.groupby("depth")[["noise_error", "variance_error"]].mean() for table in tables)
    assert list(error.index) == [1, 2, 3]
    assert (fresh_error > 0).all().all()
    assert (error["noise_error"] < 0.5 * fresh_error["noise_error"]).all()
    assert (error["variance_error"] < fresh_error["variance_error"]).all()


def test_distillation_depends_on_its_seed_alone(trunk: DynamicDepth, tmp_path: Path) -> None:
    """Also what a light block starts with."""
    recipe = Distill(ExitConfig((2,), "block"), replace(FIT, steps=2))
    runs = []
    for name in "ab":
        torch.rand(7)  # moves the global generator
        runs.append(recipe.run(trunk, DIGITS, tmp_path / name)[0])
    assert same(weights(runs[0].exits), weights(runs[1].exits))
    other, _ = replace(recipe, fit=replace(recipe.fit, seed=2)).run(trunk, DIGITS, tmp_path / "c")
    assert not same(weights(runs[0].exits), weights(other.exits))


def test_distillation_resumes_on_its_own_trunk_only(trunk: DynamicDepth, make_model, tmp_path: Path) -> None:
    recipe = replace(DISTILL, fit=replace(DISTILL.fit, steps=2))
    first, _ = recipe.run(trunk, DIGITS, tmp_path)
    again, _ = recipe.run(trunk, DIGITS, tmp_path)
    assert same(weights(again.exits), weights(first.exits))
    other = DynamicDepth(make_model(width=48, num_blocks=4, seed=5).backbone)
    for changed, model in ((recipe, other), (replace(recipe, null_share=0.5), trunk)):
        with pytest.raises(InputError, match="identity"):
            changed.run(model, DIGITS, tmp_path)


def test_distillation_shows_the_exits_both_branches(trunk: DynamicDepth, tmp_path: Path) -> None:
    labels: list[Tensor] = []
    trunk.backbone.y_embedder.register_forward_pre_hook(lambda _, inputs: labels.append(inputs[0]))
    replace(DISTILL, fit=replace(FIT, steps=20)).run(trunk, DIGITS, tmp_path)
    null = (torch.cat(labels) == trunk.backbone.null_class).float().mean().item()
    assert len(torch.cat(labels)) == 20 * 32
    assert null == pytest.approx(DISTILL.null_share, abs=0.08)  # 4.4 standard deviations


def test_distillation_refuses_other_data(make_model, tmp_path: Path) -> None:
    for changes, named in (
        ({"image_size": 16}, "pictures of 1 x 8 px, but the model takes 1 x 16 px"),
        ({"in_channels": 3}, "pictures of 1 x 8 px, but the model takes 3 x 8 px"),
        ({"num_classes": 7}, "classes 10, but the model has 7"),
    ):
        with pytest.raises(InputError, match=named):
            DISTILL.run(DynamicDepth(make_model(**changes).backbone), DIGITS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_error_table(make_model) -> None:
    model = make_model((2, 4))
    table = exit_error_table(model, DIGITS, num_pictures=32, num_bands=5)
    columns = ["depth", "band", "log_snr_low", "log_snr_high", "noise_error", "variance_error"]
    assert list(table.columns) == columns
    assert sorted(map(tuple, table[["depth", "band"]].to_numpy())) == [(d, b) for d in (2, 4) for b in range(5)]
    assert (table["log_snr_low"] < table["log_snr_high"]).all()
    bands = table[table["depth"] == 2].set_index("band")
    schedule = Schedule()
    for band in range(5):
        assert bands["log_snr_high"][band] == pytest.approx(schedule.log_snr(torch.tensor(200 * band)).item())
        assert bands["log_snr_low"][band] == pytest.approx(schedule.log_snr(torch.tensor(200 * band + 199)).item())
    assert (table[["noise_error", "variance_error"]] > 0).all().all()
    pd.testing.assert_frame_equal(table, exit_error_table(model, DIGITS, num_pictures=32, num_bands=5))


def test_error_table_of_few_pictures(make_model) -> None:
    few = Few()
    assert len(exit_error_table(make_model((2,)), few, num_bands=2)) == 2


class Few(Pictures):
    """The first three digits."""

    num_classes, channels, image_size, can_flip, fingerprint = 10, 1, 8, False, "f"
    class_names = tuple("0123456789")

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return DIGITS[index]

    def uint8(self, indices=None) -> Tensor:
        return DIGITS.uint8(indices)
