"""Define the arms that a comparison measures. An arm has fields; its name is only printed, never parsed."""

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
    """A model to measure under a plan. The plan has the solver and the number of steps."""

    family: str
    """"full", "unguided", "searched", "searched-NAME" for a variant, "ramp", a peer's name, ..."""
    plan: DepthPlan
    budget: float | None = None
    settings: str = ""
    """Settings that distinguish arms of one family, solver, steps and budget, such as "every2-depth6"."""
    variant: str = ""
    """Name of the variant that made the arm."""
    calibration: int | None = None
    """Number of the calibration that made the plan; None if the arm needs none."""
    plan_file: str = ""
    """Name of the file that holds the plan, if the plan was searched."""
    predicted_fd: float | None = None
    predicted_ms: float | None = None
    """Milliseconds per picture by the table's cost model; None if the arm does not follow its plan."""
    model: DynamicDepth | None = None
    """None: the comparison's own model."""
    peer: PeerSettings | None = None
    decided: Decisions | None = None
    """Depths that the confidence router chose for each picture."""
    swept: bool = False
    """True for an arm of the guidance sweep: its name has the plan's scale, which may not be the comparison's."""

    @property
    def name(self) -> str:
        """Return a label, unique in a comparison: family, solver, steps, budget, settings, calibration."""
        scale = f"scale{self.plan.cfg_scale:g}" if self.swept else ""
        again = f"c{self.calibration}" if self.calibration else ""  # the first has the plain name
        settings = "-".join(part for part in (self.settings, scale, again) if part)
        return arm_name(self.family, self.plan.solver, self.plan.num_steps, self.budget, settings)


class Source(Protocol):
    """A maker of arms. It stores its weights, tables and plans in the comparison's folder and reuses them."""

    def arms(self, context: Context) -> list[Arm]:
        """Return the arms of this source; an empty list if the experiment does not ask for them."""
