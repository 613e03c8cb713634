"""Parity with other implementations: of the model, of diffusers' class, of the samplers, each written a second time.

Tolerances are a little above the worst error found, which stands beside each.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

import dyndit
from dyndit.models.base import Backbone, State
from dyndit.models.conditions import ClassLabels
from dyndit.models.dit import ClassConditionalDiT, DiTConfig
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import HEADS, ExitConfig, Exits
from dyndit.plans.step import Step, Unconditional
from dyndit.process import DDPM
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.loop import Batch, Trajectory, advance, full_plan, picture_generator
from dyndit.sampling.solvers import make_scheduler, timesteps_of
from dyndit.storage.names import frequency_shift_of, from_native, match_frequencies, to_native
from support.models import randomise
from support.reference_dit import Architecture, Weights, positions, random_weights, reference_dit

pytestmark = pytest.mark.usefixtures("_no_grad")


@pytest.fixture
def _no_grad():
    with torch.no_grad():
        yield


# The model against the reference written from the paper.

ARCHITECTURES = {
    "latents": Architecture(16, 2, 4, width=48, num_blocks=3, num_heads=4, num_classes=7),
    "colour": Architecture(12, 4, 3, width=60, num_blocks=6, num_heads=3, num_classes=10),
    "grey": Architecture(
        8, 4, 1, width=32, num_blocks=2, num_heads=1, num_classes=2, learn_variance=False, mlp_ratio=2
    ),
    "one patch": Architecture(8, 8, 1, width=24, num_blocks=2, num_heads=2, num_classes=3),
}

# Found here: 7.2e-7 with both sides in float32; 2.0e-8 in float64, as the model takes cosines of timesteps in float32.
# Over 56 further random architectures of widths 8 to 64: 6.6e-7 and 3.3e-8. Outputs are scaled to a largest value of 1.
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-7}


@dataclass(frozen=True)
class Case:
    """Weights whose prediction of (x, t, y) is at most 1 in size."""

    arch: Architecture
    weights: Weights
    x: Tensor
    t: Tensor
    y: Tensor

    def reference(self, dtype: torch.dtype, **options: object) -> Tensor:
        return reference_dit(cast(self.weights, dtype), self.x, self.t, self.y, self.arch.num_heads, **options)


def make_case(arch: Architecture, seed: int = 0) -> Case:
    """The batch holds the first and the last timestep, the first class and the null label."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, arch.in_channels, arch.image_size, arch.image_size, generator=generator)
    t, y = torch.tensor([0, 999, 500, 37]), torch.tensor([0, 1, arch.num_classes, arch.num_classes - 1])
    case = Case(arch, random_weights(arch, seed), x, t, y)
    scale = case.reference(torch.float64).abs().max().item()
    return replace(case, weights=shrunk(case.weights, "final_layer.linear", scale))


def shrunk(weights: Weights, linear: str, scale: float) -> Weights:
    """The weights with one linear map divided by `scale`."""
    return {name: w / scale if name.startswith(f"{linear}.") else w for name, w in weights.items()}


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    return {name: w.to(dtype) for name, w in weights.items()}


def raw(weights: Weights) -> dict[str, object]:
    return weights


def training_checkpoint(weights: Weights) -> dict[str, object]:
    """What the published training script writes; the average is what counts."""
    other = {name: w.flip(0) for name, w in weights.items()}
    return {"model": other, "ema": weights, "opt": {"state": {}}, "args": argparse.Namespace(model="DiT-XS/2")}


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return module.double() if dtype is torch.float64 else module


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal to `tolerance`, and with values of order 1, for which that says something."""
    assert 0.1 < expected.std() < 2
    torch.testing.assert_close(found, expected.to(found.dtype), atol=tolerance, rtol=0)


def far(found: Tensor, other: Tensor, least: float) -> None:
    assert (found - other).abs().max() > least


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("wrap", [raw, training_checkpoint])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_published_checkpoint_predicts_as_the_paper(
    name: str, wrap: Callable[[Weights], dict], dtype: torch.dtype, tmp_path: Path
) -> None:
    case = make_case(ARCHITECTURES[name], seed=5)
    torch.save(wrap(case.weights), tmp_path / "dit.pt")
    model = in_dtype(dyndit.load(tmp_path / "dit.pt", num_heads=case.arch.num_heads), dtype)
    found = model(case.x.to(dtype), case.t, case.y)
    assert found.shape == (4, case.arch.out_channels, case.arch.image_size, case.arch.image_size)
    close(found, case.reference(dtype), TOLERANCES[dtype])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_of_the_reference_matters(name: str) -> None:
    """Otherwise parity would not tell a tensor put in another's place."""
    case = make_case(ARCHITECTURES[name], seed=5)
    expected = case.reference(torch.float64)
    for tensor, w in case.weights.items():
        shuffled = case.weights | {tensor: w.flip(0 if len(w) > 1 else -1)}
        far(replace(case, weights=shuffled).reference(torch.float64), expected, 1e-2)
    for heads in {1, 2, 4} - {case.arch.num_heads} if case.arch.side > 1 else ():  # one token attends to itself
        far(replace(case, arch=replace(case.arch, num_heads=heads)).reference(torch.float64), expected, 1e-2)
    for i in range(4):  # and every row has a prediction of its own
        far(expected[i], expected[(i + 1) % 4], 0.1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_new_model_has_the_positions_of_the_paper(name: str) -> None:
    arch = ARCHITECTURES[name]
    stored = native(arch).pos_embed[0]
    torch.testing.assert_close(stored.double(), positions(arch.side, arch.width), atol=6e-8, rtol=0)  # float32's own
    if arch.side > 1:
        far(stored[1], stored[arch.side], 0.1)  # one to the right is not one down


def native(arch: Architecture, weights: Weights | None = None, **changes: object) -> ClassConditionalDiT:
    """The native class, with the weights where there are any."""
    config = DiTConfig(
        image_size=arch.image_size,
        patch_size=arch.patch_size,
        in_channels=arch.in_channels,
        width=arch.width,
        num_blocks=arch.num_blocks,
        num_heads=arch.num_heads,
        mlp_ratio=arch.mlp_ratio,
        num_classes=arch.num_classes,
        learn_variance=arch.learn_variance,
    )
    backbone = ClassConditionalDiT(replace(config, **changes)).eval()
    if weights is not None:
        backbone.load_state_dict(weights)
    return backbone


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_depth_predicts_as_the_reference_cut_there(
    name: str, head: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    case = make_case(ARCHITECTURES[name], seed=6)
    torch.save(case.weights, tmp_path / "dit.pt")
    trunk = dyndit.load(tmp_path / "dit.pt", num_heads=case.arch.num_heads).backbone
    exits = Exits(trunk, ExitConfig(head=head))
    randomise(exits, seed=1)
    largest = max(
        case.reference(torch.float64, depth=depth, exit_weights=cast(own_weights(exits, depth), torch.float64))
        .abs()
        .max()
        for depth in exits.layers
    )
    for depth in exits.layers:
        exits.load_state_dict(shrunk(exits.state_dict(), f"heads.{depth}.final.linear", largest.item()))
    heads = {depth: own_weights(exits, depth) for depth in exits.layers}
    model = in_dtype(DynamicDepth(trunk, exits).eval(), dtype)

    assert model.depths == tuple(range(1, case.arch.num_blocks + 1))
    predictions = []
    for depth in model.depths:
        own = {"depth": depth, "exit_weights": cast(heads[depth], dtype)} if depth in heads else {}
        predictions.append(model(case.x.to(dtype), case.t, case.y, depth=depth))
        close(predictions[-1], case.reference(dtype, **own), TOLERANCES[dtype])
        if own:  # the exit's own head and its own hidden layer tell: the trunk's final layer here is another prediction
            far(predictions[-1], case.reference(dtype, depth=depth), 0.1)
    assert torch.pdist(torch.stack(predictions).flatten(1)).min() > 0.1


def own_weights(exits: Exits, depth: int) -> Weights:
    """A copy of an exit's weights."""
    return {name: w.clone() for name, w in exits.heads[str(depth)].state_dict().items()}


# The native class against diffusers'.

FOREIGN = [
    Architecture(16, 2, 4, width=48, num_blocks=3, num_heads=4, num_classes=7),
    Architecture(12, 4, 3, width=60, num_blocks=5, num_heads=3, num_classes=10, learn_variance=False),
]


def foreign(arch: Architecture, **options: object) -> DiTTransformer2DModel:
    """diffusers' class, of another's or its own random weights."""
    return DiTTransformer2DModel(
        num_attention_heads=arch.num_heads,
        attention_head_dim=arch.width // arch.num_heads,
        in_channels=arch.in_channels,
        out_channels=arch.out_channels,
        num_layers=arch.num_blocks,
        sample_size=arch.image_size,
        patch_size=arch.patch_size,
        num_embeds_ada_norm=arch.num_classes,
        **options,
    ).eval()


@pytest.mark.parametrize("arch", FOREIGN)
def test_native_is_diffusers_with_matched_frequencies(arch: Architecture) -> None:
    case = make_case(arch, seed=7)
    ours, theirs = native(arch, case.weights), foreign(arch, norm_eps=1e-6)
    theirs.load_state_dict(from_native(case.weights))
    call = (case.x, case.t, case.y)
    expected = ours(*call)
    assert frequency_shift_of(theirs) == 1
    unmatched = theirs(*call).sample
    match_frequencies(theirs, 0)
    close(theirs(*call).sample, expected, 1e-5)  # found: equal to the bit
    far(unmatched, expected, 1e-1)  # found: 0.23 and 0.31, of a largest value of 1
    # Where the features agree whatever the spacing, at t = 0, the models do.
    torch.testing.assert_close(unmatched[:1], expected[:1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch", FOREIGN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_plain_diffusers_model_read_natively(arch: Architecture, dtype: torch.dtype) -> None:
    """As diffusers builds it: frequency shift 1, and an epsilon of 1e-5 before the MLPs alone."""
    case = make_case(arch, seed=8)
    theirs = in_dtype(foreign(arch), dtype)
    assert (frequency_shift_of(theirs), theirs.config.norm_eps) == (1, 1e-5)
    theirs.load_state_dict(from_native(case.weights))
    weights = to_native(theirs.state_dict(), arch.side)
    call = (case.x.to(dtype), case.t, case.y)
    expected = theirs(*call).sample

    def read(**changes: object) -> Tensor:
        return in_dtype(native(arch, weights, **changes), dtype)(*call)

    close(read(frequency_shift=1, mlp_norm_eps=1e-5), expected, 1e-5 if dtype is torch.float32 else 1e-12)
    far(read(mlp_norm_eps=1e-5), expected, 1e-2)
    # The epsilon moves predictions by 1e-6 to 3e-6 where activations are near 1: only float64 tells.
    if dtype is torch.float64:
        far(read(frequency_shift=1), expected, 1e-7)
        far(read(frequency_shift=1, mlp_norm_eps=1e-5, norm_eps=1e-5), expected, 1e-7)


# The sampling loop against the formulas.


@dataclass(frozen=True)
class Process:
    """A diffusion process on `times`, a rising part of 0..999, in float64.

    DDPM (Ho et al., arXiv:2006.11239), Section 4: betas from 1e-4 to 0.02 in 1,000 equal steps, respaced as in iDDPM
    (Nichol and Dhariwal, arXiv:2102.09672), Section 4 and Equation 19: betas that keep alpha_bar at the times kept.
    """

    times: tuple[int, ...]

    @property
    def bars(self) -> np.ndarray:
        """alpha_bar at the times."""
        return np.cumprod(1 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64))[list(self.times)]

    @property
    def bars_before(self) -> np.ndarray:
        """alpha_bar at the times before; 1 before the first."""
        return np.concatenate([[1.0], self.bars[:-1]])

    @property
    def betas(self) -> np.ndarray:
        """iDDPM, Equation 19."""
        return 1 - self.bars / self.bars_before

    def mean(self, i: int, x_t: Tensor, eps: Tensor) -> Tensor:
        """DDPM, Equation 7, at the x_0 that Equation 4 gives for the predicted noise."""
        beta, bar, before = self.betas[i], self.bars[i], self.bars_before[i]
        x_0 = self.x_0(i, x_t, eps)
        return beta * before**0.5 / (1 - bar) * x_0 + (1 - before) * (1 - beta) ** 0.5 / (1 - bar) * x_t

    def x_0(self, i: int, x_t: Tensor, eps: Tensor) -> Tensor:
        """DDPM, Equation 4, solved for x_0."""
        return (x_t - (1 - self.bars[i]) ** 0.5 * eps) / self.bars[i] ** 0.5

    def variance(self, i: int, v: Tensor) -> Tensor:
        """iDDPM, Equation 15: between beta and the posterior's variance (DDPM, Equation 7); 0 at the last step."""
        if i == 0:
            return torch.zeros_like(v)
        posterior = self.betas[i] * (1 - self.bars_before[i]) / (1 - self.bars[i])
        share = (v + 1) / 2  # the network's output is in [-1, 1], the equation's v in [0, 1]
        return torch.exp(share * np.log(self.betas[i]) + (1 - share) * np.log(posterior))

    def ddim(self, i: int, x_t: Tensor, eps: Tensor) -> Tensor:
        """DDIM (Song et al., arXiv:2010.02502), Equation 12, with sigma 0."""
        before = self.bars_before[i]
        return before**0.5 * self.x_0(i, x_t, eps) + (1 - before) ** 0.5 * eps

    def noisy(self, i: int, x_0: Tensor, eps: Tensor) -> Tensor:
        """DDPM, Equation 4: what the loop meets at this step."""
        return self.bars[i] ** 0.5 * x_0 + (1 - self.bars[i]) ** 0.5 * eps


def spaced(num_steps: int) -> Process:
    """iDDPM, Section 4: K evenly spaced real numbers from the first time to the last, rounded."""
    return Process(tuple(round(999 * i / (num_steps - 1)) for i in range(num_steps)))


WHOLE = Process(tuple(range(1000)))


class Told(Backbone):
    """A trunk whose prediction is what it was told, and which keeps the timesteps it was asked at."""

    family, foreign = "told", True  # foreign: no dry call when a model is made of it
    num_blocks, width, condition = 1, 1, ClassLabels(10)

    def __init__(self, channels: int, learn_variance: bool) -> None:
        super().__init__()
        self.sample_shape, self.out_channels = (channels, 8, 8), channels * (1 + learn_variance)
        self.prediction = torch.zeros(0)
        self.unused = nn.Parameter(torch.zeros(1))  # by a trunk's parameters the loop sees what it computes in
        self.asked: list[int] = []

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> State:
        self.asked.extend(t.unique().tolist())
        return State(self.prediction, t)

    def block(self, index: int, state: State) -> State:
        return state

    def head(self, state: State) -> Tensor:
        return state.tokens


class Steps:
    """Single steps of the sampling loop, on latents, with predictions given."""

    def __init__(self, solver: str, num_steps: int) -> None:
        self.told = Told(channels=4, learn_variance=solver == "ddpm")
        self.model = DynamicDepth(self.told, pixel_space=False)
        self.batch = Batch(torch.tensor([3, 1]), (0, 1), seed=11)
        self.plan = full_plan(self.model, solver, num_steps, 1.0)
        self.scheduler = make_scheduler(solver, num_steps)

    def step(self, k: int, x_t: Tensor, prediction: Tensor) -> Tensor:
        """x after step k."""
        self.told.prediction = prediction
        trajectory = Trajectory(x_t, self.scheduler)
        return advance(self.model, self.batch, trajectory, self.plan, Guidance(1.0), first=k, stop=k + 1).x


def drawn_noise(batch: Batch, k: int, shape: tuple[int, ...]) -> Tensor:
    """The noise of step k, (B, *shape): a function of (seed, index, k)."""
    return torch.stack([torch.randn(shape, generator=picture_generator(batch.seed, i, k + 1)) for i in batch.indices])


def random_pictures(count: int, generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(2, 4, 8, 8, generator=generator) for _ in range(count)]


def test_the_spaced_process_keeps_alpha_bar() -> None:
    process = spaced(250)
    assert (process.times[0], process.times[-1], len(set(process.times))) == (0, 999, 250)
    np.testing.assert_allclose(np.cumprod(1 - process.betas), DDPM().alphas_bar.numpy()[list(process.times)], rtol=1e-9)
    np.testing.assert_allclose(WHOLE.betas, DDPM().betas.numpy(), rtol=1e-9)


@dataclass(frozen=True)
class Errors:
    """The worst of each step, in the order of sampling: of the mean relative to its largest value, of the variance
    relative to itself (none of the last step, which has none)."""

    mean: np.ndarray
    variance: np.ndarray


def ddpm_errors(steps: Steps, process: Process) -> Errors:
    """Means and variances of every step of the loop, for random predictions, against the formulas in float64."""
    generator = torch.Generator().manual_seed(0)
    last = len(process.times) - 1
    means, variances = [], []
    for k in range(last + 1):
        i = last - k
        x_0, noise, eps = random_pictures(3, generator)  # the prediction is not the noise in x_t: both have to count
        x_t = process.noisy(i, x_0, noise).float()
        v = torch.rand(x_t.shape, generator=generator) * 2 - 1
        v[0, 0, 0, :2] = torch.tensor([-1.0, 1.0])  # the posterior's variance, and beta
        # From zero, with zero predicted, the mean is zero: what is left is the noise, with no digit lost.
        pushed = steps.step(k, torch.zeros_like(x_t), torch.cat([torch.zeros_like(eps), v], dim=1)).double()
        found = steps.step(k, x_t, torch.cat([eps, v], dim=1)).double() - pushed
        mean = process.mean(i, x_t.double(), eps.double())
        means.append(((found - mean).abs().max() / mean.abs().max()).item())
        if i == 0:
            assert torch.equal(pushed, torch.zeros_like(pushed))
            continue
        found = (pushed / drawn_noise(steps.batch, k, x_t.shape[1:]).double()).square()
        variances.append((found / process.variance(i, v.double()) - 1).abs().max().item())
    return Errors(np.array(means), np.array(variances))


def test_250_step_ddpm_has_the_means_and_variances_of_the_papers() -> None:
    """The scheduler keeps alpha_bar in float32: 1 - alpha_bar_t / alpha_bar_s loses digits where beta is small."""
    process, steps = spaced(250), Steps("ddpm", 250)
    assert timesteps_of("ddpm", 250) == process.times[::-1]
    errors = ddpm_errors(steps, process)
    assert steps.told.asked == [t for t in timesteps_of("ddpm", 250) for _ in range(2)]
    assert (len(errors.mean), len(errors.variance)) == (250, 249)
    assert errors.mean.max() < 1.2e-5  # found: 1.04e-5, at the fourth step from the end
    assert errors.mean[:200].max() < 3e-7  # found: 2.6e-7
    assert errors.variance.max() < 1.6e-4  # found: 1.47e-4, at the last step that has a variance
    assert errors.variance[:200].max() < 1e-5  # found: 4.5e-6


def test_what_ddpm_is_off_by_is_the_rounding_of_a_table() -> None:
    """With alpha_bar in float64 in the same scheduler, single precision is all that is left."""
    steps = Steps("ddpm", 250)
    steps.scheduler.alphas_cumprod = torch.from_numpy(WHOLE.bars)
    errors = ddpm_errors(steps, spaced(250))
    assert errors.mean.max() < 2e-7  # found: 1.3e-7
    assert errors.variance.max() < 2e-6  # found: 1.3e-6


@pytest.mark.parametrize("num_steps", [1, 7, 20, 50])
def test_ddim_is_ddim(num_steps: int) -> None:
    """Every step from a state of its own, and all of them in a row."""
    steps, chain = Steps("ddim", num_steps), Steps("ddim", num_steps)
    process = Process(timesteps_of("ddim", num_steps)[::-1])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    along = x.double()
    for k in range(num_steps):
        i = num_steps - 1 - k
        x_0, noise, eps = random_pictures(3, generator)
        x_t = process.noisy(i, x_0, noise).float()
        expected = process.ddim(i, x_t.double(), eps.double())
        # Relative to the largest value, as x_0 may be of any size; found: 8.4e-7.
        assert (steps.step(k, x_t, eps) - expected).abs().max() < 1e-6 * expected.abs().max()
        far(expected, x_t, 1e-2)
        x, along = chain.step(k, x, eps), process.ddim(i, along, eps.double())
    assert (x - along).abs().max() < 1e-6 * along.abs().max()  # found: 4.9e-7
    assert steps.told.asked == list(timesteps_of("ddim", num_steps))


@pytest.mark.parametrize("uncond_depth", [3, 1])
@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize(("solver", "num_steps"), [("ddpm", 250), ("ddim", 20)])
def test_guided_steps_of_a_model(solver: str, num_steps: int, channels: int | None, uncond_depth: int) -> None:
    """Model, guidance and solver at once, none of them the package's own on the other side.

    Guidance (Ho and Salimans, arXiv:2207.12598, Equation 6, with their 1 + w as the scale): eps_u + s (eps_c - eps_u),
    on all channels, or on the first three as the published code does, with the variance of the conditional branch.
    """
    case, scale = make_case(ARCHITECTURES["latents"], seed=9), 4.0
    trunk = native(case.arch, case.weights)
    exits = Exits(trunk, ExitConfig((1,)))
    randomise(exits, seed=2)
    model = DynamicDepth(trunk, exits, pixel_space=False).eval()
    plan = full_plan(model, solver, num_steps, scale)
    plan = plan.with_steps([Step(3, Unconditional(uncond_depth))] * num_steps)
    batch = Batch(torch.tensor([5, 0]), (0, 1), seed=11)
    null = torch.full_like(batch.condition, case.arch.num_classes)
    process = Process(plan.timesteps[::-1])
    generator = torch.Generator().manual_seed(3)
    scheduler = make_scheduler(solver, num_steps)
    for k in range(num_steps):  # in order, as some schedulers count; checked at some
        i = num_steps - 1 - k
        x_0, noise = (torch.randn(2, 4, 16, 16, generator=generator) for _ in range(2))
        x_t = process.noisy(i, x_0, noise).float()
        if k not in (0, num_steps // 2, num_steps - 1) and solver == "ddpm":
            continue
        found = advance(
            model, batch, Trajectory(x_t, scheduler), plan, Guidance(scale, channels), first=k, stop=k + 1
        ).x
        here = replace(case, x=x_t.double(), t=torch.full((2,), process.times[i]))
        cond = replace(here, y=batch.condition).reference(torch.float64)
        own = cast(exits.heads["1"].state_dict(), torch.float64) if uncond_depth == 1 else None
        uncond = replace(here, y=null).reference(torch.float64, depth=uncond_depth, exit_weights=own)

        eps = cond[:, :4].clone()
        for channel in range(4 if channels is None else channels):
            eps[:, channel] = uncond[:, channel] + scale * (cond[:, channel] - uncond[:, channel])
        far(eps, cond[:, :4], 0.1)
        if solver == "ddim":
            expected = process.ddim(i, here.x, eps)
        else:
            z = drawn_noise(batch, k, x_t.shape[1:]).double()
            expected = process.mean(i, here.x, eps) + process.variance(i, cond[:, 4:]).sqrt() * z
        assert (found - expected).abs().max() < 5e-6 * expected.abs().max()  # found: 3.7e-6
