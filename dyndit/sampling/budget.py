"""Search the plan of a sampling on a model's stored shift table."""

from dataclasses import replace
from pathlib import Path

from dyndit import bounds
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.plan import DepthPlan
from dyndit.plans.search import search
from dyndit.plans.table import FILE, ShiftTable
from dyndit.sampling.loop import full_plan
from dyndit.sampling.solvers import AnySolver
from dyndit.sampling.timing import measure_cost
from dyndit.stats import Moments


def table_for(model: DynamicDepth, table: ShiftTable, solver: AnySolver | None = None) -> ShiftTable:
    """Return the table with the times of the model's device. Measure them if the table has another device's times.

    Raises InputError: the table belongs to another model.
    """
    model.check_identity(table.backbone, table.exits, origin="shift table")
    if table.cost.device == next(model.parameters()).device.type:
        return table
    cost = measure_cost(model, batch_size=table.cost.batch_size, solver=solver, cfg_scale=table.cfg_scale)
    return replace(table, cost=cost)  # shifts hold on any device, times do not


@bounds.checked
def plan_on_table(
    model: DynamicDepth,
    table: ShiftTable,
    *,
    budget: float,
    solver: AnySolver,
    num_steps: int,
    base: Moments | None = None,
) -> DepthPlan:
    """Search a plan on a stored table. The model runs only to time it on a device new to the table.

    base: moments of full depth measured at these steps, see `search`.

    Raises InputError: the budget is out of range, or the table belongs to another model.
    """
    full = full_plan(model, solver, num_steps, table.cfg_scale)
    return search(table_for(model, table, solver), full, budget, base=base)


def plan_within(
    model: DynamicDepth, budget: float, table: ShiftTable | str | Path | None, solver: AnySolver, num_steps: int
) -> DepthPlan:
    """Search a plan on a table, its file or its folder. None: the folder that the model was loaded from.

    Raises InputError: see `plan_on_table`; or there is no table.
    """
    if not isinstance(table, ShiftTable):
        table = _stored(model.folder if table is None else table, budget)
    return plan_on_table(model, table, budget=budget, solver=solver, num_steps=num_steps)


def _stored(place: str | Path | None, budget: float) -> ShiftTable:
    path = None if place is None else Path(place)
    path = path / FILE if path is not None and path.is_dir() else path
    if path is None or not path.is_file():
        where = "this model was loaded from no folder" if path is None else f"{path}: no such file"
        raise InputError(f"budget {budget:g}: {where}; expected table=, or the table that `dyndit calibrate` writes")
    return ShiftTable.load(path)
