"""The shift table: the effect of each choice on the distribution of pictures, measured band by band."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from dyndit import bounds, seals
from dyndit.errors import CheckpointError, first_line
from dyndit.files import read_safetensors, write_safetensors
from dyndit.plans.cost import CostModel
from dyndit.plans.plan import full_step
from dyndit.plans.step import Step
from dyndit.stats import Moments

FORMAT = "dyndit-shift-table"
VERSION = 2
FILE = "shift-table.safetensors"
"""Name of the table in a model's folder."""


@dataclass(frozen=True, repr=False)
class ShiftTable:
    """Measured distribution shifts of a model, and the settings of their measurement.

    edges: bands + 1 timesteps, falling; band b covers (edges[b + 1], edges[b]]. choices: P steps, without the full
    step, whose shift is zero. mean: (bands, P, F), second: (bands, P, F, F), float64, of F features. base: moments of
    pictures at full depth. reference: moments of real pictures.
    """

    edges: tuple[float, ...]
    choices: tuple[Step, ...]
    mean: Tensor
    second: Tensor
    base: Moments
    reference: Moments
    cost: CostModel
    num_blocks: int
    solver: str
    num_steps: int
    cfg_scale: float
    seed: int
    num_pictures: int
    extractor: str
    extractor_fingerprint: str
    backbone: str = ""
    exits: str = ""
    projection: Tensor | None = None
    """Directions that the extractor's features were reduced to; None if they were not reduced."""
    ages: tuple[int, ...] = ()
    """`ages[i]`: steps since full depth for choice i; 0 if it does not forecast. Empty if no choice forecasts."""
    bases: Mapping[tuple[str, int], Moments] = field(default_factory=dict, compare=False)
    """Moments of full depth measured at other (solver, steps) than `base`, on the same seeds."""

    def __repr__(self) -> str:
        size = f"{self.num_bands} bands, {len(self.choices)} choices, {self.num_pictures} pictures"
        point = f"{self.solver}, {self.num_steps} steps, guidance {self.cfg_scale:g}"
        return f"ShiftTable({size}, {self.extractor}, {point}, times of {self.cost.device})"

    @property
    def full_step(self) -> Step:
        """Return the step of the original model."""
        return full_step(self.num_blocks, self.cfg_scale)

    @property
    def extractor_name(self) -> str:
        """Return the extractor's own name, without the suffix of reduced features."""
        return self.extractor if self.projection is None else self.extractor.rsplit("-pca", 1)[0]

    @property
    def num_bands(self) -> int:
        """Return the number of bands."""
        return len(self.edges) - 1

    @property
    def least_share(self) -> float:
        """Return the cheapest plan's predicted share of full depth's time. No budget can be smaller."""
        seconds = [self.cost.step_seconds(choice) for choice in (*self.choices, self.full_step)]
        return min(seconds) / seconds[-1]

    def base_at(self, solver: str, num_steps: int) -> Moments | None:
        """Return the moments of full depth measured at these steps, or None."""
        own = (solver, num_steps) == (self.solver, self.num_steps)
        return self.base if own else self.bases.get((solver, num_steps))

    def step_counts(self, solver: str) -> tuple[int, ...]:
        """Return the step counts of a solver at which full depth was measured, fewest first."""
        measured = {(self.solver, self.num_steps), *self.bases}
        return tuple(sorted(steps for name, steps in measured if name == solver))

    def part(self, choices: Sequence[Step], ages: Sequence[int] = ()) -> Self | None:
        """Return the table of these choices alone, each at its age; None if this table lacks one of them.

        The result equals a measurement of these choices bit for bit, because entries do not depend on each other.
        """
        where = {key: i for i, key in enumerate(zip(self.choices, self.ages or (0,) * len(self.choices), strict=True))}
        picks = [where.get(key) for key in zip(choices, ages or (0,) * len(choices), strict=True)]
        if None in picks:
            return None
        shifts = {"mean": self.mean[:, picks], "second": self.second[:, picks]}
        return replace(self, choices=tuple(choices), ages=tuple(ages), **shifts)

    def weights(self, timesteps: Sequence[float]) -> Tensor:
        """Return the share of each band that every step covers, (K, bands).

        Step k covers the timesteps from its own down to the next step's; the last step covers down to 0. With these
        weights one table serves other step counts and solvers.
        """
        tops = torch.tensor([float(t) for t in timesteps], dtype=torch.float64)
        bottoms = torch.cat([tops[1:], tops.new_zeros(1)])
        edges = torch.tensor(self.edges, dtype=torch.float64)
        high, low = edges[:-1], edges[1:]
        overlap = torch.minimum(tops[:, None], high) - torch.maximum(bottoms[:, None], low)
        # An empty band (a last step at t = 0) belongs whole to the step at its edge.
        own = (tops[:, None] == high).double()
        return torch.where(high > low, overlap.clamp(min=0) / (high - low).clamp(min=1e-9), own)

    def save(self, path: Path) -> None:
        """Write safetensors: shifts in float32, moments in float64, the rest as JSON in the metadata, and a checksum.

        Raises InputError: a number is not finite. Nothing is written then.
        """
        tensors = {"mean": self.mean.float(), "second": self.second.float()}
        kept = {f"base.{solver}.{steps}": of for (solver, steps), of in self.bases.items()}
        for name, of in (kept | {"base": self.base, "reference": self.reference}).items():
            tensors |= {f"{name}.mean": of.mean.double(), f"{name}.second": of.second.double()}
        plain = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("mean", "second", "base", "reference", "cost", "projection", "bases")
        }
        plain |= {"choices": list(map(str, self.choices)), "cost": self.cost.describe()}
        plain["nums"] = [self.base.num, self.reference.num]
        metadata = {"format": FORMAT, "version": str(VERSION), "table": json.dumps(plain)}
        if self.projection is not None:
            tensors["projection"] = self.projection.double()
        if self.bases:
            metadata["bases"] = json.dumps([[*key, of.num] for key, of in self.bases.items()])
        if odd := seals.first_not_finite(tensors):
            raise CheckpointError(
                f"{path}: not written; {odd} of the shift table is not finite, expected finite numbers"
            )
        write_safetensors(path, tensors, metadata | {seals.SEAL: seals.tensors_checksum(tensors, metadata)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a table.

        Raises:
            CheckpointError: the file is missing, damaged or edited, or is not a shift table of this version.
        """
        stored, metadata = read_safetensors(path)
        if (metadata.get("format"), metadata.get("version")) != (FORMAT, str(VERSION)):
            raise CheckpointError(f"{path}: expected a {FORMAT} file of version {VERSION}")
        t = {name: tensor.double() for name, tensor in stored.items()}
        try:
            plain = json.loads(metadata["table"])
            nums, cost = plain.pop("nums"), CostModel.from_description(plain.pop("cost"))
            plain |= {"choices": tuple(map(Step.parse, plain["choices"]))}
            plain |= {name: tuple(plain[name]) for name in ("edges", "ages")}

            def kept(name: str, num: int) -> Moments:
                return Moments(t[f"{name}.mean"], t[f"{name}.second"], num)

            moments = {"base": kept("base", nums[0]), "reference": kept("reference", nums[1])}
            other = json.loads(metadata.get("bases", "[]"))
            bases = {(solver, steps): kept(f"base.{solver}.{steps}", num) for solver, steps, num in other}
            shifts = {"mean": t["mean"], "second": t["second"], "projection": t.get("projection")}
            found = cls(cost=cost, bases=bases, **moments, **shifts, **plain)
            found._check()
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, IndexError) as error:
            raise CheckpointError(f"{path}: no readable shift table ({first_line(error)})") from error
        seals.check_tensors(path, stored, metadata)
        return found

    def _check(self) -> None:
        """Refuse shapes and numbers that do not belong together. Raises ValueError, which names them."""
        num, size = len(self.choices), len(self.base.mean)
        shapes = {
            "mean": (self.mean, (self.num_bands, num, size)),
            "second": (self.second, (self.num_bands, num, size, size)),
        }
        for name, of in {"base": self.base, "reference": self.reference, **self.bases}.items():
            shapes |= {f"{name} mean": (of.mean, (size,)), f"{name} second": (of.second, (size, size))}
            bounds.check(num_pictures=of.num)
        for name, (tensor, expected) in shapes.items():
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")
        if self.ages and len(self.ages) != num:
            raise ValueError(f"{len(self.ages)} ages for {num} choices")
        falls = all(bounds.is_number(edge) for edge in self.edges) and all(
            high >= low for high, low in zip(self.edges, self.edges[1:], strict=False)
        )
        if self.num_bands < 1 or not falls:
            raise ValueError(f"edges {self.edges!r:.60}, expected falling timesteps")
        bounds.check(num_pictures=self.num_pictures, cfg_scale=self.cfg_scale, seed=self.seed, num_steps=self.num_steps)

    def save_pretrained(self, save_directory: str | Path, **ignored: object) -> None:
        """Write the table under its usual name into the folder of a pipeline's component."""
        self.save(Path(save_directory) / FILE)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **ignored: object) -> Self:
        """Read the table in the folder of a pipeline's component or of a model, as `load`."""
        return cls.load(Path(folder) / FILE)
