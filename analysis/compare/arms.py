"""Arms: what a comparison measures. An arm has fields; its name is only printed, never parsed."""

from dataclasses import dataclass
from typing import Protocol

from dyndit.analysis.compare.context import Context
from dyndit.analysis.compare.peers import PeerSettings
from dyndit.analysis.compare.peers.confidence import Decisions
from dyndit.analysis.report.runs import arm_name
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.plan import DepthPlan


@dataclass(frozen=True)
class Arm:
    """One thing that is measured: a model under a plan. The plan has the solver and the number of steps."""

    family: str
    """"full", "unguided", "searched", "searched-NAME" of a variant, "ramp", a peer's name, ..."""
    plan: DepthPlan
    budget: float | None = None
    settings: str = ""
    """What tells it from other arms of the same family, solver, steps and budget, such as "every2-depth6"."""
    variant: str = ""
    """Name of the variant that it belongs to."""
    plan_file: str = ""
    """Name of the file that holds the plan, if the plan was searched."""
    predicted_fd: float | None = None
    predicted_ms: float | None = None
    """Per picture, by the table's cost model; None if the arm does not follow its plan."""
    model: DynamicDepth | None = None
    """None: the comparison's own."""
    peer: PeerSettings | None = None
    decided: Decisions | None = None
    """Depths that the pictures decided by themselves."""

    @property
    def name(self) -> str:
        """A label, unique in a comparison: family, solver, steps, budget and settings."""
        return arm_name(self.family, self.plan.solver, self.plan.num_steps, self.budget, self.settings)


class Source(Protocol):
    """Makes arms. What it trains, measures or searches lies in the comparison's folder, and is found there again."""

    def arms(self, context: Context) -> list[Arm]:
        """The arms of this source; none if the experiment does not ask for them."""
