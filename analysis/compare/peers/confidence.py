"""Route by confidence: at every step each picture leaves at the first exit with a small estimated error.

The router compares the exits' predictions at depths d_0 < d_1 < ... A picture's signal at d_i is the mean squared
change of its prediction since d_(i-1). A picture whose signal is below a threshold leaves at d_i; the rest of the batch
goes on. Under guidance both branches of a picture leave together, by the change of the guided prediction. A decision
depends only on the timestep and the picture, never on its batch mates.

Exits by confidence: DeeBERT (Xin et al. 2020, arXiv:2004.12993). In diffusion, DeeDiff (Tang et al. 2023,
arXiv:2309.17074, later named AdaDiff) trains estimators of the error; here nothing is trained. Thresholds are
calibrated against the true error, as in CALM (Schuster et al. 2022, arXiv:2207.07061): see `threshold`.

The device decides which rows go on, so the host waits once for each of d_1, d_2, ... at every step. The router is
optional: searched plans are the default.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Self

import pandas as pd
import torch
from torch import Tensor

from dyndit import seals
from dyndit.calibration.samplers import CALIBRATION_SEED, batches_of
from dyndit.errors import CheckpointError, InputError
from dyndit.files import read_json, write_json
from dyndit.models.base import Inputs
from dyndit.models.dynamic import DynamicDepth, StepInputs
from dyndit.plans.plan import DepthPlan
from dyndit.progress import tracked
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.loop import advance, batch_in_turn, full_plan, start
from dyndit.sampling.solvers import AnySolver

FORMAT = "dyndit-thresholds"
VERSION = 1
MIN_ROWS, NUM_QUANTILES, QUANTILE_95 = 20, 20, 1.645


@dataclass(frozen=True)
class ConfidenceSettings:
    """targets: mean squared errors allowed to rows that leave, guided prediction against full depth (noise has 1).

    depths: d_0, d_1, ..., with exits; empty: `default_depths`. num_bands: of timesteps, each with its own thresholds.
    """

    targets: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05)
    depths: tuple[int, ...] = ()
    num_pictures: int = 256
    num_bands: int = 5
    batch_size: int = 64
    seed: int = CALIBRATION_SEED


def default_depths(depths: Sequence[int]) -> tuple[int, ...]:
    """Choose the exits nearest to 1/6, 2/6, 3/6 and 4/6 of L, and one exit before them for the first comparison."""
    *exits, full = depths
    if not exits:
        return ()
    chosen = sorted({min(exits, key=lambda depth: abs(depth - full * sixth / 6)) for sixth in range(1, 5)})
    return (*[depth for depth in exits if depth < chosen[0]][-1:], *chosen)


@dataclass(frozen=True)
class Thresholds:
    """The signals below which a picture leaves. Plain data.

    depths: d_0, d_1, ..., d_m, rising, below L; no picture leaves at d_0. edges: bands + 1 timesteps, falling; band b
    covers (edges[b + 1], edges[b]]. values: for each band m thresholds, for d_1 to d_m. cfg_scale, target: calibrated
    for these. backbone, exits: identities of the model; "" fits any model.
    """

    depths: tuple[int, ...]
    edges: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]
    cfg_scale: float = 1.0
    target: float | None = None
    backbone: str = ""
    exits: str = ""

    def at(self, timestep: float) -> tuple[float, ...]:
        """Return the thresholds of d_1 to d_m; a timestep beyond the bands takes the nearest band."""
        return self.values[sum(timestep <= edge for edge in self.edges[1:-1])]

    def save(self, path: Path) -> None:
        """Write JSON, whole or not at all."""
        write_json(Path(path), seals.sealed({"format": FORMAT, "version": VERSION, **asdict(self)}))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read JSON. Raises CheckpointError: the file is missing, damaged, or not a thresholds file of this version."""
        try:
            data = seals.unsealed(Path(path), read_json(Path(path)))
            if (data.pop("format", None), data.pop("version", None)) != (FORMAT, VERSION):
                raise CheckpointError(f"{path}: expected a {FORMAT} file of version {VERSION}")
            values = tuple(map(tuple, data.pop("values")))
            return cls(tuple(data.pop("depths")), tuple(data.pop("edges")), values, **data)
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: no readable thresholds ({error})") from error


def _guided(predictions: Tensor, channels: int, scale: float) -> Tensor:
    """Guide predictions (branches, B, C_out, H, W) -> the noise prediction (B, C, H, W), float32."""
    eps = predictions[:, :, :channels].float()
    return eps[0] if len(eps) == 1 else eps[1] + scale * (eps[0] - eps[1])


def _mean_square(difference: Tensor) -> Tensor:
    """Average squares per picture, (B, C, H, W) -> (B,)."""
    return difference.square().flatten(1).mean(1)


class ConfidentDepth(DynamicDepth):
    """A model whose pictures leave when their signal is small. `sample` takes it in place of the model.

    The router decides at steps that the plan runs at full depth in as many branches as the thresholds: two for guided
    sampling. All other steps run as planned. The memory records, for every step, the depths (B,) that pictures left at.
    """

    def __init__(self, model: DynamicDepth, thresholds: Thresholds) -> None:
        """Share the modules of `model`. Raises InputError: the thresholds are of another model, or of other exits."""
        super().__init__(model.backbone, model.exits, pixel_space=model.pixel_space, process=model.process)
        _check_depths(thresholds.depths, self.depths)
        self.check_identity(thresholds.backbone, thresholds.exits, origin="thresholds")
        self.thresholds = thresholds
        self.eval()

    def predict(self, step: StepInputs, memory: tuple[Tensor, ...] | None) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """See `DynamicDepth`."""
        branches = 1 if self.thresholds.cfg_scale == 1 else 2
        if step.work.depths == (self.num_blocks,) * branches:
            predictions, depths = self._confident(step)
        else:
            predictions, _ = super().predict(step, None)
            depths = torch.full((len(step.x_t),), step.work.depths[0], device=step.x_t.device)
        return predictions, (*(memory or ()), depths)

    def _confident(self, step: StepInputs) -> tuple[list[Tensor], Tensor]:
        """Return the predictions of every branch and the depths (B,) that the pictures left at."""
        joined = Inputs.joined(step.branches)
        state, done, branches = self.backbone.embed(joined.x, joined.t, joined.y), 0, len(step.labels)
        rows = torch.arange(len(step.x_t), device=step.x_t.device)  # the pictures still in the batch
        depths, left, predictions, before = torch.full_like(rows, self.num_blocks), [], [], None
        limits = (None, *self.thresholds.at(step.timesteps[step.k]), None)
        for depth, limit in zip((*self.thresholds.depths, self.num_blocks), limits, strict=True):
            for index in range(done, depth):
                state = self.backbone.block(index, state)
            now, done = self.leave(state, depth).unflatten(0, (branches, len(rows))), depth
            if depth == self.num_blocks:
                left, predictions = [*left, rows], [*predictions, now]
            elif before is not None:
                leaves = _mean_square(self._guided(now) - self._guided(before)) < limit
                gone, kept = leaves.nonzero().flatten(), (~leaves).nonzero().flatten()
                if len(gone):
                    depths[rows[gone]] = depth
                    left, predictions = [*left, rows[gone]], [*predictions, now[:, gone]]
                    state = state.take(torch.cat([kept + branch * len(rows) for branch in range(branches)]))
                    rows, now = rows[kept], now[:, kept]
                if not len(rows):
                    break
            before = now
        whole = torch.cat(predictions, dim=1)[:, torch.cat(left).argsort()]
        return list(whole), depths

    def _guided(self, predictions: Tensor) -> Tensor:
        return _guided(predictions, self.backbone.in_channels, self.thresholds.cfg_scale)


def _check_depths(depths: tuple[int, ...], there: tuple[int, ...]) -> None:
    exits = list(there[:-1])
    if len(depths) < 2 or list(depths) != sorted(set(depths)) or not set(depths) <= set(exits):
        raise InputError(f"confidence depths {list(depths)}: expected two or more of the exits {exits}, rising")


@dataclass(frozen=True, eq=False)
class Signals:
    """Mean squares of the guided prediction at full depth's states, (K, m, N): K steps, depths d_1 to d_m, N pictures.

    signal: of the change since the depth before. error: of the difference from full depth.
    """

    depths: tuple[int, ...]
    timesteps: tuple[float, ...]
    cfg_scale: float
    signal: Tensor
    error: Tensor
    backbone: str = ""
    exits: str = ""

    def thresholds(self, target: float, num_bands: int) -> Thresholds:
        """Choose thresholds for this error, depth by depth, for the rows still there. Raises InputError: below 0."""
        if not target >= 0 or num_bands < 1:
            raise InputError(f"confidence target {target:g} in {num_bands} bands: expected 0 or more, and 1 or more")
        bands = torch.arange(len(self.timesteps)).tensor_split(min(num_bands, len(self.timesteps)))
        values = []
        for band in bands:
            signal, error = (x[band].transpose(0, 1).flatten(1) for x in (self.signal, self.error))
            there, chosen = torch.ones_like(signal[0], dtype=torch.bool), []
            for s, e in zip(signal, error, strict=True):
                chosen.append(threshold(s[there], e[there], target))
                there &= s >= chosen[-1]
            values.append(tuple(chosen))
        edges = (*(float(self.timesteps[band[0]]) for band in bands), 0.0)
        return Thresholds(self.depths, edges, tuple(values), self.cfg_scale, target, self.backbone, self.exits)


def threshold(signal: Tensor, error: Tensor, target: float) -> float:
    """Return the signal below which rows have a mean error of at most `target`; 0 if no row may leave.  Both: (N,).

    Try the twentieths of the signals from the strictest. Stop where the one-sided 95% bound (normal) of the mean error
    exceeds the target. This order makes one test at 5% of all (fixed-sequence testing: Angelopoulos et al. 2021, "Learn
    then Test", arXiv:2110.01052, as in CALM). The level holds for each depth and band, if rows were independent.
    """
    order = signal.argsort()
    signal, error, best = signal[order], error[order].double(), 0.0
    for part in range(1, NUM_QUANTILES + 1):
        num = part * len(signal) // NUM_QUANTILES
        if num < MIN_ROWS:
            continue
        bound = error[:num].mean() + QUANTILE_95 * error[:num].std() / num**0.5
        if bound > target:
            break
        beyond = signal[num] if num < len(signal) else torch.nextafter(signal[-1], signal.new_tensor(torch.inf))
        best = beyond.item()
    return best


class _Recorder(DynamicDepth):
    """Run full depth and record, at each exit, its signal and its error. Memory: per step two tensors (m, B)."""

    def __init__(self, model: DynamicDepth, depths: tuple[int, ...], cfg_scale: float) -> None:
        super().__init__(model.backbone, model.exits, pixel_space=model.pixel_space, process=model.process)
        self.compared, self.cfg_scale = depths, cfg_scale
        self.eval()

    def predict(self, step: StepInputs, memory: tuple | None) -> tuple[list[Tensor], tuple]:
        """See `DynamicDepth`."""
        joined = Inputs.joined(step.branches)
        every = self.every_exit(joined.x, joined.t, joined.y)
        shape = (len(step.labels), len(step.x_t))
        *exits, full = (
            _guided(every[depth].unflatten(0, shape), self.backbone.in_channels, self.cfg_scale)
            for depth in (*self.compared, self.num_blocks)
        )
        signal = torch.stack([_mean_square(now - before) for before, now in pairwise(exits)])
        error = torch.stack([_mean_square(prediction - full) for prediction in exits[1:]])
        return list(every[self.num_blocks].unflatten(0, shape)), (*(memory or ()), (signal.cpu(), error.cpu()))


def record_signals(
    model: DynamicDepth,
    *,
    solver: AnySolver | None = None,
    num_steps: int = 10,
    cfg_scale: float = 1.5,
    settings: ConfidenceSettings | None = None,
) -> Signals:
    """Run trajectories at full depth, classes in turn, and record each exit's signal and error.

    Thresholds from these signals hold for states of full depth; states of a sampling that leaves early drift away.
    Raises InputError: the model has fewer than two exits, or lacks an exit at one of the depths.
    """
    settings, solver = settings or ConfidenceSettings(), solver or model.process.usual_solver
    depths = settings.depths or default_depths(model.depths)
    _check_depths(depths, model.depths)
    plan = full_plan(model, solver, num_steps, cfg_scale)
    recorder = _Recorder(model, depths, cfg_scale)
    found = _memories(recorder, plan, solver, settings.num_pictures, settings.seed, settings.batch_size)
    signal, error = (torch.cat([torch.stack([s[i] for s in steps]) for steps in found], dim=2) for i in range(2))
    return Signals(depths, plan.timesteps, cfg_scale, signal, error, model.identity.backbone, model.identity.exits)


def _memories(
    model: DynamicDepth, plan: DepthPlan, solver: AnySolver, num: int, seed: int, batch_size: int
) -> list[tuple]:
    """Sample `num` pictures, classes in turn; return the memory at the end of every batch."""
    found = []
    for indices in tracked(batches_of(range(num), batch_size), "recording the confidence router", unit="batches"):
        batch = batch_in_turn(model, indices, seed)
        begun = start(model, batch, solver, plan.num_steps)
        found.append(advance(model, batch, begun, plan, Guidance(plan.cfg_scale)).memory)
    return found


@dataclass(frozen=True, eq=False)
class Decisions:
    """The depths chosen in a sampling, (K, N) by step and picture. shaken: chosen with a disturbed x_t."""

    timesteps: tuple[float, ...]
    depths: Tensor
    shaken: Tensor

    @property
    def mean_depth(self) -> Tensor:
        """Return the mean depth by step, (K,)."""
        return self.depths.double().mean(1)

    @property
    def flip_rates(self) -> Tensor:
        """Share of pictures by step, (K,), whose depth changes with the disturbed x_t."""
        return (self.depths != self.shaken).double().mean(1)

    def frame(self) -> pd.DataFrame:
        """Return a row for each step: step, timestep, mean_depth, flip_rate."""
        rows = {"timestep": self.timesteps, "mean_depth": self.mean_depth, "flip_rate": self.flip_rates}
        return pd.DataFrame(rows).rename_axis("step").reset_index()


class _Shaken(ConfidentDepth):
    """Decide every step twice: on x_t, and on a disturbed x_t only to record the depths."""

    def __init__(self, model: ConfidentDepth, noise: float) -> None:
        super().__init__(model, model.thresholds)
        self.noise = noise

    def predict(self, step: StepInputs, memory: tuple | None) -> tuple[list[Tensor], tuple]:
        """See `DynamicDepth`."""
        predictions, (depths,) = super().predict(step, None)
        x = step.x_t
        drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(step.k)).to(x)
        size = x.flatten(1).square().mean(1).sqrt().view(-1, 1, 1, 1)
        shaken_branches = tuple(replace(branch, x=x + self.noise * size * drawn) for branch in step.branches)
        _, (shaken,) = super().predict(replace(step, branches=shaken_branches), None)
        return predictions, (*(memory or ()), torch.stack([depths, shaken]).cpu())


def measure_decisions(
    model: ConfidentDepth,
    plan: DepthPlan,
    *,
    num_pictures: int = 256,
    batch_size: int = 64,
    seed: int = CALIBRATION_SEED + 1,
    noise: float = 0.01,
) -> Decisions:
    """Sample pictures under a plan, and decide each step again with Gaussian noise added to x_t.

    plan: has a named solver. noise: standard deviation of the noise over the root mean square of the picture's x_t.
    The flip rate (our definition) is the share of decisions that the noise changes.
    """
    found = _memories(_Shaken(model, noise), plan, plan.solver, num_pictures, seed, batch_size)
    depths = torch.cat([torch.stack(steps) for steps in found], dim=2)  # (K, 2, N)
    return Decisions(plan.timesteps, depths[:, 0], depths[:, 1])
