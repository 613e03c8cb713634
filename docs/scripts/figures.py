"""Draw the figures of the README and of docs/method.md from the digits of a finished quickstart.

    dyndit quickstart
    python docs/scripts/figures.py runs/quickstart

Pictures are of seed 0. Every figure is written to docs/figures and follows from the run's model, table and plans alone.
"""

import sys
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure

import dyndit
from dyndit import sealed_csv
from dyndit.analysis.report.figures import error_figure
from dyndit.analysis.report.style import COLOURS, FAINT, INK, STYLE, panels, save
from dyndit.models.dynamic import DynamicDepth
from dyndit.pictures import read_picture
from dyndit.plans.plan import DepthPlan
from dyndit.plans.predictor import Predictor
from dyndit.plans.step import Step
from dyndit.plans.table import FILE, ShiftTable
from dyndit.sampling.loop import full_plan

FIGURES = Path(__file__).resolve().parents[1] / "figures"
COLUMNS = 10
SHALLOW = 1
"""Depth of the replaced steps in the figure of bands."""


def pictures(model: DynamicDepth, plan: DepthPlan, num: int = COLUMNS) -> torch.Tensor:
    """Draw `num` pictures of seed 0, classes in turn, under a plan.  -> (num, 1, 8, 8) uint8."""
    labels = model.backbone.condition.in_turn(num)
    settings = {"solver": plan.solver, "num_steps": plan.num_steps, "cfg_scale": plan.cfg_scale}
    return dyndit.sample(model, labels, plan=plan, seed=0, **settings).pictures


def strip(axis: Axes, rows: dict[str, torch.Tensor]) -> None:
    """Show rows of grey pictures, dark on white, with their labels at the left."""
    lines = [torch.cat(list(torch.nn.functional.pad(row[:, 0], (1, 1, 1, 1))), dim=1) for row in rows.values()]
    axis.imshow(255 - torch.cat(lines).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="equal")
    axis.set_yticks([lines[0].shape[0] * (k + 0.5) - 0.5 for k in range(len(lines))], list(rows))
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)


def branches(axis: Axes, plan: DepthPlan) -> None:
    """Draw a bar per step and branch: blocks run, in front of full depth's."""
    at = np.arange(plan.num_steps)
    for side, depths, colour, name in (
        (-0.2, plan.depths, COLOURS[1], "with the class"),
        (0.2, plan.uncond_depths, COLOURS[0], "without it (guidance)"),
    ):
        axis.bar(at + side, plan.num_blocks, 0.36, color="none", edgecolor=FAINT, linewidth=0.8)
        axis.bar(at + side, depths, 0.36, color=colour, label=name)
    axis.set_xticks(at, [f"{k + 1}\nt {t}" for k, t in enumerate(plan.timesteps)])
    axis.set(ylabel="blocks run", ylim=(0, plan.num_blocks * 1.02), xlim=(-0.6, plan.num_steps - 0.4))
    axis.set_xlabel("sampling step and its timestep, from noise to picture")
    axis.set_yticks(range(0, plan.num_blocks + 1, 4))
    axis.grid(visible=False)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def same_seeds(model: DynamicDepth, plan: DepthPlan) -> Figure:
    """Draw full depth above the plan, from the same seeds, and the plan under both."""
    rows = {
        f"full depth\n{plan.num_blocks} blocks a pass": pictures(model, plain(model, plan)),
        f"dynamic\n{plan.share_of_blocks:.0%} of the blocks": pictures(model, plan),
    }
    with matplotlib.rc_context(STYLE):
        figure, (top, below) = panels(2, 1, 8, 1.9, height_ratios=(1, 1.3))
        strip(top, rows)
        branches(below, plan)
    return figure


def plain(model: DynamicDepth, plan: DepthPlan) -> DepthPlan:
    """Return full depth at the plan's solver, steps and guidance."""
    return full_plan(model, plan.solver, plan.num_steps, plan.cfg_scale)


def by_band(model: DynamicDepth, full: DepthPlan) -> Figure:
    """Draw the same seeds with three steps at `SHALLOW` blocks: at high, middle and low noise."""
    rows = {"full depth": pictures(model, full, 16)}
    for name, first in (("1 to 3", 0), ("4 to 6", 3), ("8 to 10", 7)):
        steps = [Step.equal(SHALLOW, True) if first <= k < first + 3 else step for k, step in enumerate(full.steps)]
        rows[f"{SHALLOW} block at steps {name}"] = pictures(model, full.with_steps(steps, router=name), 16)
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = panels(1, 1, 8, 1.8)
        strip(axis, rows)
    return figure


def shifts(table: ShiftTable, full: DepthPlan) -> Figure:
    """Map the predicted change of the distance if one band of steps runs at another depth."""
    predictor = Predictor(table, full.timesteps)
    depths = sorted({choice.depth for choice in table.choices if choice == Step.equal(choice.depth, True)})
    moved = np.empty((len(depths), table.num_bands))
    for band in range(table.num_bands):
        inside = predictor.weights[:, band] > 0
        for row, depth in enumerate(depths):
            steps = [Step.equal(depth, True) if on else step for on, step in zip(inside, full.steps, strict=True)]
            moved[row, band] = predictor.predict(full.with_steps(steps)) - predictor.predict(full)
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = panels(1, 1, 6.5, 3.4)
        image = axis.pcolormesh(moved, norm=SymLogNorm(0.1, vmin=-30, vmax=30), cmap="RdBu_r")
        for (row, band), value in np.ndenumerate(moved):
            colour = "white" if abs(value) > 3 else INK
            axis.text(band + 0.5, row + 0.5, f"{value:+.2f}", ha="center", va="center", fontsize=8, color=colour)
        edges = [f"{high:.0f} to {low:.0f}" for high, low in pairwise(table.edges)]
        axis.set_xticks(np.arange(table.num_bands) + 0.5, edges)
        axis.set_yticks(np.arange(len(depths)) + 0.5, depths)
        axis.set(xlabel="timesteps of the band, noise to picture", ylabel="depth of both branches there")
        axis.grid(visible=False)
        axis.tick_params(length=0)
        figure.colorbar(image, ax=axis, label="predicted change of FD-digits", ticks=[-10, -1, 0, 1, 10])
    return figure


def exit_errors(path: Path) -> Figure:
    """Draw each exit's error on the noise over the log-SNR, as the run measured it."""
    errors = sealed_csv.read(path, ("depth", "log_snr_low", "noise_error"))
    bands = errors.sort_values("log_snr_low")
    frame = bands.pivot(index="depth", columns="log_snr_low", values="noise_error")
    return error_figure(frame, "squared error against full depth", "log-SNR from which on, noise to picture")


def main(run: Path) -> None:
    """Write every figure of a quickstart's folder."""
    model, table = dyndit.load(run / "model"), ShiftTable.load(run / "model" / FILE)
    plan = DepthPlan.load(run / "plan-ddim-10-b0.5.json")
    full = plain(model, plan)
    FIGURES.mkdir(exist_ok=True)
    save(same_seeds(model, plan), FIGURES / "same-seeds.png")
    save(by_band(model, full), FIGURES / "bands.png")
    save(shifts(table, full), FIGURES / "shifts.png")
    save(exit_errors(run / "exit-errors.csv"), FIGURES / "exit-errors.png")
    for path in sorted(FIGURES.glob("*.png")):
        print(f"{path.name}: {path.stat().st_size // 1024} KiB, {read_picture(path).shape[1]} pixels wide")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
