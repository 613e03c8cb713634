"""Time saved over time promised, inside the own pipeline of every family, on its tiny instance of random weights.

    python tests/benchmarks/families.py --out docs/results/families/times.csv
    python tests/benchmarks/families.py --out docs/results/families/times.csv --table    # the table of docs/interop.md

For each family and batch size a calibration promises the seconds of full depth and of a ramp. Then both run in turn, in
one process; the time of a run is from its first call of the transformer to its last. Promise and runs are repeated one
after the other, because a machine does not stay equally fast. A row holds medians over the repeats, and the ratio of
the saving that was measured to the saving that was promised, with a 95% interval over the repeats.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from dyndit import manifest
from dyndit.clock import Clock
from dyndit.files import write_text
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.plan import DepthPlan
from dyndit.plans.schedules import ramp
from dyndit.plugin.adapters import adapt, adapters
from dyndit.plugin.apply import HOOK, DynDiTHandle, apply_dyndit
from dyndit.plugin.calibrate import PipelineSampler
from dyndit.plugin.hooks import watching
from dyndit.rounds import Reading, Repeats, paired_rounds
from dyndit.stats import median_interval
from support.models import randomise
from support.tiny_pipelines import TinyPipeline, tiny_pipeline

STEPS = 10
GOAL = 0.95, 1.05
SCALE = 4.0


def rows_of(family: str, batch_sizes: Sequence[int], rounds: int, repeats: int) -> Iterator[dict[str, object]]:
    """Yield a row per batch size."""
    tiny = tiny_pipeline(family)
    adapter = adapt(tiny.transformer)
    exits = Exits(adapter, ExitConfig(head="adaln-linear")).eval()
    randomise(exits, seed=3)
    handle = apply_dyndit(tiny.pipe, exits, check_identity=False)
    guided = is_guided(tiny)
    for size in batch_sizes:
        sampler = PipelineSampler(
            tiny.pipe, handle, call_of(tiny, guided), cfg_scale=SCALE if guided else 1.0, batch_size=size, rounds=rounds
        )
        full = sampler.full
        plan = ramp(full, handle.model.depths, 1)
        run, found = partial(loop_seconds, tiny, handle, guided, size), []
        for _ in range(repeats):
            cost = sampler.cost(size)
            timed = paired_rounds({"full": partial(run, full), "ramp": partial(run, plan)}, Repeats(rounds=rounds))
            seconds = timed.pivot(index="round", columns="arm", values="seconds").median()
            found.append((seconds["full"], seconds["ramp"], cost.plan_seconds(full) - cost.plan_seconds(plan)))
        each = pd.DataFrame(found, columns=["full", "ramp", "promised"])
        saved = median_interval((each["full"] - each["ramp"]) / each["promised"])
        yield {
            "family": family,
            "batch_size": size,
            "guided": guided,
            "steps": len(full.timesteps),
            "share_of_blocks": plan.share_of_blocks,
            **{f"{name}_ms": 1e3 * value for name, value in each.median().items()},
            "saved_over_promised": saved.mean,
            "low": saved.low,
            "high": saved.high,
            "rounds": rounds,
            "repeats": repeats,
        }
    handle.remove()


def is_guided(tiny: TinyPipeline) -> bool:
    """Tell if the family's pipeline runs a second branch when it is asked to be guided."""
    return tiny.guided(1) != tiny.unguided(1)


def call_of(tiny: TinyPipeline, guided: bool) -> Callable[[Sequence[int]], Tensor]:
    """Run the pipeline; its pictures are of no interest here."""

    def call(indices: Sequence[int]) -> Tensor:
        tiny.run(guided=guided, count=len(indices), num_inference_steps=STEPS)
        return torch.zeros((len(indices), 3, 1, 1), dtype=torch.uint8)

    return call


def loop_seconds(tiny: TinyPipeline, handle: DynDiTHandle, guided: bool, size: int, plan: DepthPlan) -> list[Reading]:
    """Return the seconds from the first call of the transformer to the end of the last."""
    handle.plan = plan
    clock, marks = Clock(torch.device("cpu")), []
    with watching(tiny.transformer, HOOK, lambda *_, **__: marks.append(clock()), lambda: marks.append(clock())):
        tiny.run(guided=guided, count=size, num_inference_steps=STEPS)
    return [Reading("loop", marks[-1] - marks[0])]


def table(rows: pd.DataFrame) -> str:
    """Write the rows as a table, a line per family. Ratios outside of `GOAL` are in italics."""
    sizes = sorted(rows["batch_size"].unique())
    lines = ["| family | " + " | ".join(f"batch {size}" for size in sizes) + " |", "|---|" + "---:|" * len(sizes)]
    for family, several in rows.groupby("family"):
        cells = []
        for size in sizes:
            row = several[several["batch_size"] == size].iloc[0]
            text = f"{row['saved_over_promised']:.2f}"
            text = text if GOAL[0] <= float(text) <= GOAL[1] else f"*{text}*"
            cells.append(f"{text} [{row['low']:.2f}, {row['high']:.2f}]")
        lines.append(f"| `{family}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--family", nargs="*", default=sorted(adapters()))
    parser.add_argument("--batch-size", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--table", action="store_true", help="only print the rows of --out as a table")
    asked = parser.parse_args()
    if asked.table:
        print(table(pd.read_csv(asked.out)), end="")
        return
    rows = []
    facts = {
        "machine": manifest.machine("cpu"),
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
    }
    for family in asked.family:
        for row in rows_of(family, asked.batch_size, asked.rounds, asked.repeats):
            rows.append(row | facts)
            print(f"{family:32} batch {row['batch_size']}: {row['saved_over_promised']:.3f}", flush=True)
            write_text(asked.out, pd.DataFrame(rows).to_csv(index=False, float_format="%.5g"))


if __name__ == "__main__":
    main()
