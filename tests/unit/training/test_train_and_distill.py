"""Training a backbone and distilling its exits, on digits: short runs of a tiny model."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from dyndit.errors import InputError
from dyndit.models.base import Backbone, Inputs
from dyndit.models.conditions import ClassLabels
from dyndit.models.dit import ClassConditionalDiT, DiTConfig
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import HEADS, ExitConfig, Exits
from dyndit.models.layers import position_features
from dyndit.process import DDPM
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.loop import Batch, advance, full_plan, start
from dyndit.storage import load as checkpoints
from dyndit.training.borrowed import borrowed
from dyndit.training.config import FitConfig
from dyndit.training.data import Pictures, load_digits
from dyndit.training.distill import Distill, _Distillation
from dyndit.training.exit_errors import exit_error_table
from dyndit.training.fit import Task, fit
from dyndit.training.latents import LatentPictures
from dyndit.training.lora import trainable_copy, with_adapters
from dyndit.training.losses import exit_errors
from dyndit.training.recorded import RecordedCalls, recorded_sampling
from dyndit.training.train import Train
from support.models import balanced_labels

DIGITS = load_digits()
BACKBONE = DiTConfig(8, 4, 1, width=48, num_blocks=4, num_heads=2, num_classes=10)
FIT = FitConfig(steps=80, batch_size=32, learning_rate=2e-3, warmup_steps=5, ema_decay=0.9, seed=1)
TRAIN = Train(BACKBONE, FIT, data="digits")
DISTILL = Distill(ExitConfig(head="adaln-linear"), replace(FIT, steps=150, learning_rate=3e-3), data="digits")


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[DynamicDepth, pd.DataFrame]:
    model, result = TRAIN.run(DIGITS, tmp_path_factory.mktemp("train"))
    return model, result.losses


@pytest.fixture
def backbone(make_model) -> DynamicDepth:
    """A random backbone without exits; its layers differ far more than those of a briefly trained one."""
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
    assert torch.equal(model.backbone.pos_embed[0], position_features(2, 2, BACKBONE.width))  # fixed, not trained


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
        ({"image_size": 16}, "pictures of 1 x 8 x 8, but the model takes 1 x 16 x 16"),
        ({"in_channels": 3}, "pictures of 1 x 8 x 8, but the model takes 3 x 8 x 8"),
        ({"num_classes": 9}, "10 classes, but the model has 9"),
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


def test_training_goes_on_from_given_weights(trained: tuple[DynamicDepth, pd.DataFrame], tmp_path: Path) -> None:
    given = weights(trained[0].backbone)
    on = replace(TRAIN, fit=replace(FIT, steps=20, ema_decay=0.0, warmup_steps=0))
    model, result = on.run(DIGITS, tmp_path / "on", start=trained[0])
    assert result.losses["loss"][0] < 0.7 * trained[1]["loss"][0]  # not from scratch
    assert not same(weights(model.backbone), given)
    assert same(weights(trained[0].backbone), given)  # what was given stays
    fresh = on.run(DIGITS, tmp_path / "fresh")[0]
    with pytest.raises(InputError, match="identity"):
        on.run(DIGITS, tmp_path / "on", start=fresh)  # a run goes on from its own weights only


@pytest.mark.parametrize("changes", [{"num_heads": 3}, {"width": 12}])
def test_training_refuses_weights_of_another_shape(
    changes: dict, trained: tuple[DynamicDepth, pd.DataFrame], tmp_path: Path
) -> None:
    other = replace(TRAIN, backbone=replace(BACKBONE, **changes))
    (name,) = changes
    with pytest.raises(InputError, match=f"--model: ClassConditionalDiT with .*{name}"):
        other.run(DIGITS, tmp_path / "out", start=trained[0])
    assert not (tmp_path / "out").exists()


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
def test_distillation_halves_the_error_and_leaves_the_trunk(head: str, backbone: DynamicDepth, tmp_path: Path) -> None:
    before, hashed = weights(backbone.backbone), backbone.identity.backbone
    recipe = replace(DISTILL, exits=ExitConfig((1, 2, 3), head))
    model, result = recipe.run(backbone, DIGITS, tmp_path)
    assert same(weights(model.backbone), before)
    assert model.identity.backbone == hashed
    assert all(p.grad is None for p in model.backbone.parameters())
    assert same({f"exits.{name}": tensor for name, tensor in weights(model.exits).items()}, result.ema)
    assert not model.training
    assert {"loss", "noise", "variance"} <= set(result.losses.columns)

    fresh = DynamicDepth(backbone.backbone, Exits(backbone.backbone, recipe.exits))
    tables = [exit_error_table(m, DIGITS, num_pictures=128, num_bands=4) for m in (fresh, model)]
    fresh_error, error = (table.groupby("depth")[["noise_error", "variance_error"]].mean() for table in tables)
    assert list(error.index) == [1, 2, 3]
    assert (fresh_error > 0).all().all()
    assert (error["noise_error"] < 0.5 * fresh_error["noise_error"]).all()
    assert (error["variance_error"] < fresh_error["variance_error"]).all()


def test_guides_learn_the_unconditional_prediction(backbone: DynamicDepth, tmp_path: Path) -> None:
    """From states of the branch with labels; exits that are no guides learn what they learn without guides."""
    recipe = replace(DISTILL, exits=ExitConfig((1, 2, 3)), null_share=0.0)
    model, _ = replace(recipe, guides=(2,)).run(backbone, DIGITS, tmp_path / "guides")
    plain, _ = recipe.run(backbone, DIGITS, tmp_path / "plain")
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 1, 8, 8, generator=generator), torch.arange(64) % 10
    t = torch.randint(1000, (64,), generator=generator)
    with torch.no_grad():
        full, null = model(x, t, y)[:, :1], model(x, t, torch.full_like(y, 10))[:, :1]
        errors = {
            (name, target): (each(x, t, y, depth=2)[:, :1] - wanted).square().mean().item()
            for name, each in {"guide": model, "plain": plain}.items()
            for target, wanted in {"full": full, "null": null}.items()
        }
    assert errors["guide", "null"] < errors["plain", "null"]
    assert errors["plain", "full"] < errors["guide", "full"]
    kept = [name for name, tensor in weights(plain.exits).items() if not name.startswith("heads.2.")]
    assert kept
    for name in kept:
        torch.testing.assert_close(weights(model.exits)[name], weights(plain.exits)[name], atol=0.02, rtol=0)


def test_distillation_depends_on_its_seed_alone(backbone: DynamicDepth, tmp_path: Path) -> None:
    """Also what a hidden layer starts with."""
    recipe = Distill(ExitConfig((2,), "wide"), replace(FIT, steps=2))
    runs = []
    for name in "ab":
        torch.rand(7)  # moves the global generator
        runs.append(recipe.run(backbone, DIGITS, tmp_path / name)[0])
    assert same(weights(runs[0].exits), weights(runs[1].exits))
    other, _ = replace(recipe, fit=replace(recipe.fit, seed=2)).run(backbone, DIGITS, tmp_path / "c")
    assert not same(weights(runs[0].exits), weights(other.exits))


def test_distillation_resumes_on_its_own_trunk_only(backbone: DynamicDepth, make_model, tmp_path: Path) -> None:
    recipe = replace(DISTILL, fit=replace(DISTILL.fit, steps=2))
    first, _ = recipe.run(backbone, DIGITS, tmp_path)
    again, _ = recipe.run(backbone, DIGITS, tmp_path)
    assert same(weights(again.exits), weights(first.exits))
    other = DynamicDepth(make_model(width=48, num_blocks=4, seed=5).backbone)
    for changed, model in ((recipe, other), (replace(recipe, null_share=0.5), backbone)):
        with pytest.raises(InputError, match="identity"):
            changed.run(model, DIGITS, tmp_path)


def test_distillation_shows_the_exits_both_branches(backbone: DynamicDepth, tmp_path: Path) -> None:
    labels: list[Tensor] = []
    backbone.backbone.y_embedder.register_forward_pre_hook(lambda _, inputs: labels.append(inputs[0]))
    replace(DISTILL, fit=replace(FIT, steps=20)).run(backbone, DIGITS, tmp_path)
    null = (torch.cat(labels) == backbone.backbone.condition.null_label).float().mean().item()
    assert len(torch.cat(labels)) == 20 * 32
    assert null == pytest.approx(DISTILL.null_share, abs=0.08)  # 4.4 standard deviations


def test_distillation_refuses_other_data(make_model, tmp_path: Path) -> None:
    for changes, named in (
        ({"image_size": 16}, "pictures of 1 x 8 x 8, but the model takes 1 x 16 x 16"),
        ({"in_channels": 3}, "pictures of 1 x 8 x 8, but the model takes 3 x 8 x 8"),
        ({"num_classes": 7}, "10 classes, but the model has 7"),
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
    process = DDPM()
    for band in range(5):
        assert bands["log_snr_high"][band] == pytest.approx(process.log_snr(torch.tensor(200 * band)).item())
        assert bands["log_snr_low"][band] == pytest.approx(process.log_snr(torch.tensor(200 * band + 199)).item())
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


def test_training_with_exits_averages_both_and_lowers_both_losses(tmp_path: Path) -> None:
    seen = []
    recipe = replace(TRAIN, exits=ExitConfig((1, 3)), fit=replace(FIT, steps=60, sample_every=60))
    model, result = recipe.run(DIGITS, tmp_path, preview=lambda model, *_: seen.append(weights(model)))
    assert model.depths == (1, 3, 4)
    assert same({f"dynamic.{name}": tensor for name, tensor in weights(model).items()}, result.ema)
    assert same(seen[0], weights(model))
    for name in ("mse", "exits"):
        assert result.losses[name][-10:].mean() < 0.85 * result.losses[name][:10].mean()
    with pytest.raises(InputError, match="identity"):  # the backbone alone is another run
        replace(TRAIN, fit=recipe.fit).run(DIGITS, tmp_path)
    with pytest.raises(InputError, match=r"expected depths in 1\.\.3"):
        replace(recipe, exits=ExitConfig((4,))).run(DIGITS, tmp_path / "other")


class Before(Task):
    """Distillation on a frozen backbone as it was when nothing else could train, loss and all."""

    def __init__(self, dynamic: DynamicDepth) -> None:
        self.dynamic, self.trainable = dynamic, torch.nn.ModuleDict({"exits": dynamic.exits})

    def loss(self, module, x, y, generator):
        t = torch.randint(1000, (len(x),), generator=generator)
        eps = torch.randn(x.shape, generator=generator)
        y = torch.where(torch.rand(len(y), generator=generator) < 0.3, self.dynamic.backbone.condition.null_label, y)
        errors = torch.stack(list(exit_errors(self.dynamic, DDPM().noised(x, eps, t), t, y).values()))
        return (errors * errors.new_tensor([1.0, 0.1])).sum(dim=(0, 2)).mean(), {}

    def preview(self, *_) -> None:
        """None."""


def test_a_frozen_trunk_is_distilled_as_ever(backbone: DynamicDepth, tmp_path: Path) -> None:
    recipe = replace(DISTILL, fit=replace(FIT, steps=5))
    model, result = recipe.run(backbone, DIGITS, tmp_path / "now")
    with borrowed(backbone.backbone):
        exits = Exits(backbone.backbone, recipe.exits).requires_grad_(True)
        before = fit(Before(DynamicDepth(backbone.backbone, exits)), DIGITS, recipe.fit, tmp_path / "before")
    assert same(result.weights, before.weights)
    assert same(result.ema, before.ema)
    assert list(result.losses["loss"]) == list(before.losses["loss"])
    assert model.backbone is backbone.backbone


@pytest.mark.parametrize("kind", ["lora", "whole"])
def test_a_trunk_that_trains_is_a_plain_copy(kind: str, backbone: DynamicDepth, make_inputs, tmp_path: Path) -> None:
    before, hashed = weights(backbone.backbone), backbone.identity.backbone
    flags = [p.requires_grad for p in backbone.backbone.parameters()]
    recipe = replace(DISTILL, backbone=kind, fit=replace(FIT, steps=12, checkpoint_every=6))
    model, result = recipe.run(backbone, DIGITS, tmp_path / "run")
    assert same(weights(backbone.backbone), before)
    assert [p.requires_grad for p in backbone.backbone.parameters()] == flags
    assert not model.training
    assert model.identity.backbone != hashed
    assert model.backbone.state_dict().keys() == before.keys()
    assert not [m for m in model.modules() if "peft" in type(m).__module__]
    moved = {name for name, tensor in weights(model.backbone).items() if not torch.equal(tensor, before[name])}
    maps = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    adapted = {f"blocks.{i}.{name}.weight" for i in range(4) for name in maps}
    assert moved == {"lora": adapted, "whole": before.keys() - {"pos_embed"}}[kind]
    assert result.losses["full"][0] < 1e-12  # it starts as its teacher
    assert result.losses["full"].iloc[-1] > 0

    checkpoints.save(model, tmp_path / "saved")
    loaded, inputs = checkpoints.load(tmp_path / "saved"), make_inputs(model.backbone)
    assert loaded.identity.backbone == model.identity.backbone
    for depth in model.depths:
        assert torch.equal(loaded(*inputs, depth=depth), model(*inputs, depth=depth))

    # Stopped half way and gone on with: the same bits.
    for steps in (6, 12):
        again, _ = replace(recipe, fit=replace(recipe.fit, steps=steps)).run(backbone, DIGITS, tmp_path / "again")
        assert same(weights(again), weights(model)) == (steps == 12)
    with pytest.raises(InputError, match="identity"):
        replace(recipe, hold=1.0).run(backbone, DIGITS, tmp_path / "run")


def test_holding_keeps_full_depth_what_it_was(backbone: DynamicDepth, tmp_path: Path, make_inputs) -> None:
    x, t, y = make_inputs(backbone.backbone, batch=64)
    recipe = replace(DISTILL, backbone="whole", backbone_rate=1.0, fit=replace(FIT, steps=25))
    moved = []
    for hold in (0.0, 10.0, 100.0):
        model, _ = replace(recipe, hold=hold).run(backbone, DIGITS, tmp_path / str(hold))
        moved.append((model(x, t, y) - backbone(x, t, y)).square().mean().item())
    assert 0 < moved[2] < moved[1] < 0.5 * moved[0]


def test_a_slower_trunk_moves_less(backbone: DynamicDepth, tmp_path: Path) -> None:
    def moved(rate: float) -> float:
        recipe = replace(DISTILL, backbone="whole", backbone_rate=rate, fit=replace(FIT, steps=1))
        model, _ = recipe.run(backbone, DIGITS, tmp_path / str(rate))
        return (model.backbone.blocks[0].mlp.fc1.weight - backbone.backbone.blocks[0].mlp.fc1.weight).abs().max().item()

    assert moved(0.1) == pytest.approx(0.1 * moved(1.0), rel=1e-2)  # Adam's first step is the rate itself


def test_adapters_start_as_nothing_and_merge_into_the_weights(make_backbone, make_inputs) -> None:
    original = make_backbone()
    inputs, backbone = make_inputs(original), trainable_copy(original)
    assert same(weights(backbone), weights(original))
    adapters = with_adapters(backbone, 4)
    assert torch.equal(backbone(*inputs), original(*inputs))
    trained = [p for p in backbone.parameters() if p.requires_grad]
    assert {min(p.shape) for p in trained} == {4}
    assert len(trained) == 6 * 4 * 2
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    apart = backbone(*inputs)
    adapters.merge_and_unload()
    torch.testing.assert_close(backbone(*inputs), apart, atol=1e-5, rtol=1e-4)
    assert (apart - original(*inputs)).abs().max() > 0.01
    assert type(backbone) is ClassConditionalDiT
    assert backbone.state_dict().keys() == original.state_dict().keys()


def test_states_of_the_sampler_are_the_samplers(
    backbone: DynamicDepth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(DISTILL, states="sampler", num_trajectories=13, num_steps=3, solver="unipc", cfg_scale=2.0)
    recipe = replace(recipe, fit=replace(FIT, steps=2))
    recipe.run(backbone, DIGITS, tmp_path)
    (folder,) = tmp_path.glob("states-*")
    calls, labels, seed = RecordedCalls(folder), torch.tensor(balanced_labels(13, 10)), 2_000_003 + FIT.seed
    assert len(calls) == 13 * 3 * 2
    batch, plan = Batch(labels, tuple(range(13)), seed), full_plan(backbone, "unipc", 3, 2.0)
    trajectory = start(backbone, batch, "unipc", 3)
    states = [trajectory.x.clone()]
    advance(backbone, batch, trajectory, plan, Guidance(2.0), on_step_end=lambda k, t, x: states.append(x.clone()))
    found = [calls[i] for i in range(len(calls))]
    wanted = torch.cat([x for x_t in states[:3] for x in (x_t, x_t)])
    assert torch.equal(torch.stack([x for x, _ in found]), wanted)
    assert [int(rows["t"]) for _, rows in found] == [t for t in plan.timesteps for _ in range(26)]
    null = torch.full_like(labels, 10)
    assert torch.equal(torch.stack([rows["y"] for _, rows in found]), torch.cat([labels, null] * 3))

    monkeypatch.setattr("dyndit.training.recorded.record_sampling", None)  # drawn once
    assert recorded_sampling(backbone, [], folder).fingerprint == calls.fingerprint
    with pytest.raises(InputError, match=r"recorded calls .* are states; expected pictures"):
        recipe.run(backbone, calls, tmp_path / "calls")
    with pytest.raises(InputError, match="--solver other"):
        replace(recipe, solver="other").run(backbone, DIGITS, tmp_path / "other")


class Ones(torch.nn.Module):
    """Two exits and full depth, all of error 1."""

    exits = Exits(ClassConditionalDiT(BACKBONE), ExitConfig((1, 2)))

    def forward(self, x, t, y):
        return torch.ones(3, len(x), 2)


def test_impossible_guides_are_refused(make_model, tmp_path: Path) -> None:
    model = make_model()
    for changes, named in (
        ({"guides": (2, 7)}, r"guides \[7\]: no exits there; expected some of 1, 2, 3, 4, 5"),
        ({"guides": (2,), "backbone": "whole"}, "guides: backbone 'whole'; expected 'frozen'"),
    ):
        with pytest.raises(InputError, match=named):
            Distill(fit=FIT, **changes).run(model, DIGITS, tmp_path)
    with pytest.raises(InputError, match="without a null condition"):
        Distill(fit=FIT, guides=(2,)).run(make_model(label_dropout=0.0), DIGITS, tmp_path)


def test_path_kl_weights_errors_by_their_timestep() -> None:
    t = torch.tensor([0, 1, 400, 999])
    inputs, weight = Inputs(torch.zeros(4, 1, 8, 8), t, t), DDPM().path_kl_weights()[t].mean().item()
    for weighting, expected in (("even", 1.0), ("path-kl", weight)):
        task = _Distillation(Ones(), replace(DISTILL, weighting=weighting, hold=5.0), DDPM(), lambda *_: inputs)
        loss, figures = task.loss(task.trainable, *task.draw(inputs.x, t, torch.Generator()), torch.Generator())
        assert loss.item() == pytest.approx(expected * (2 + 5) * 1.1)
        assert {name: figure.item() for name, figure in figures.items()} == {"noise": 1, "variance": 1, "full": 1}
    assert abs(weight - 1) > 0.1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"backbone": "half"}, "backbone 'half': expected one of frozen, lora, whole"),
        ({"states": "x"}, "states 'x': expected one of noised, sampler"),
        ({"weighting": "x"}, "weighting 'x': expected one of even, path-kl"),
        ({"lora_rank": 0}, "lora_rank 0: expected at least 1"),
        ({"num_trajectories": 0}, "num_trajectories 0: expected at least 1"),
        ({"hold": -1.0}, "hold -1"),
        ({"backbone_rate": 0.0}, "backbone_rate 0"),
    ],
)
def test_distillation_refuses_choices_it_does_not_know(changes: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        replace(DISTILL, **changes)


class Foreign(Backbone):
    """A backbone whose modules another library holds."""

    foreign = True
    num_blocks, sample_shape, condition = 4, (1, 8, 8), ClassLabels(10)


@pytest.mark.parametrize(
    "changes",
    [{"backbone": "lora"}, {"backbone": "whole"}, {"states": "sampler"}, {"weighting": "path-kl"}],
)
def test_what_needs_our_own_trunk_says_so(changes: dict) -> None:
    DISTILL.check(DynamicDepth(Foreign()), DIGITS)
    with pytest.raises(InputError, match=r"needs a (native backbone|ClassConditionalDiT), found Foreign"):
        replace(DISTILL, **changes).check(DynamicDepth(Foreign()), DIGITS)
