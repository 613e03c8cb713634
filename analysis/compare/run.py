"""Run one comparison from backbone to report: `dyndit quickstart` and `dyndit compare`.

distil exits -> measure the shift table -> search plans -> make the peers (all in `sources`) -> sample every arm from
the same fresh seeds -> report. Every stage stores its result on disk. A valid stored result is reused.
"""

import random
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from torch import nn

from dyndit import files, manifest, seals
from dyndit.analysis.compare.arms import Arm
from dyndit.analysis.compare.context import Context, model_with_exits, scaled
from dyndit.analysis.compare.drawn import EVERY, FOLDER, Drawn, Parts
from dyndit.analysis.compare.experiment import Experiment, Inputs, settings_of
from dyndit.analysis.compare.peers import Peer
from dyndit.analysis.compare.peers.confidence import ConfidentDepth
from dyndit.analysis.compare.sources import SOURCES
from dyndit.analysis.metrics.extractors import load_extractor
from dyndit.analysis.metrics.features import Measured
from dyndit.analysis.metrics.macs import count_macs, model_macs
from dyndit.analysis.metrics.quality import score
from dyndit.analysis.metrics.sets import PictureSet
from dyndit.analysis.report.runs import COLUMNS, RUNS, append_run, measured, read_runs
from dyndit.calibration.extractor import first_of
from dyndit.calibration.samplers import ToPictures
from dyndit.errors import InputError
from dyndit.locks import locked
from dyndit.models.dynamic import DynamicDepth
from dyndit.pictures.check import cache_folder
from dyndit.pictures.collection import said_of
from dyndit.progress import progress_bar, tracked
from dyndit.rounds import Reading, Repeats, paired_rounds
from dyndit.runtime import chosen_device, warn_of_emulation
from dyndit.sampling.loop import to_uint8
from dyndit.sampling.sample import Samples, sample
from dyndit.sampling.solvers import kind_of
from dyndit.storage import load as checkpoints
from dyndit.storage.autoencoder import find as find_autoencoder
from dyndit.storage.autoencoder import open_autoencoder
from dyndit.training.autoencoders import decode_latents, latent_space, picture_size
from dyndit.training.data import PACKAGED, Pictures, open_data
from dyndit.training.latents import encode_latents

TIMING = Repeats(20, until=0.02, most=60)
"""Rounds of timing in batches of another size."""
LATENTS = "latents"
"""Folder in a run for the latents of the pictures, if the model makes latents."""


def run(experiment: Experiment, out: Path, inputs: Inputs | None = None, console: Console | None = None) -> Path:
    """Run the comparison in `out`, and return it. Raises InputError: see `prepared`."""
    with prepared(experiment, out, inputs, console) as context:
        compare(context)
    return out


def compare(context: Context) -> None:
    """Make every arm, measure it and write the report."""
    fitted, given = context.experiment, (context.model, context.references, context.out, context.console)
    comparison = Comparison(fitted, *given, context.to_pictures)
    with fitted.autocast(context.model.device.type):
        arms = [arm for source in SOURCES for arm in source.arms(context)]
        comparison.measure(arms)
        comparison.time(arms)
        with progress_bar("writing the report", context.console):
            comparison.report(arms)


@contextmanager
def prepared(
    experiment: Experiment, out: Path, inputs: Inputs | None = None, console: Console | None = None
) -> Iterator[Context]:
    """Load or make the model with its exits in `out/model`, and read the real pictures. Hold the folder meanwhile.

    Raises InputError: `out` holds another run, another process writes there, or an input does not fit.
    """
    inputs, console = inputs or Inputs(), console or Console(stderr=True)
    inputs = replace(inputs, device=chosen_device(inputs.device))
    experiment = inputs.applied(experiment)
    warn_of_emulation(inputs.device, experiment.precision)
    given, process = None, experiment.train.process if experiment.train is not None else None
    if not inputs.from_scratch:
        options = {"process": inputs.process or None, "num_heads": inputs.num_heads, "weights": inputs.weights}
        options["device"] = inputs.device
        given = checkpoints.load(experiment.model, **options)
        process = given.process
    if process is None:
        raise InputError("--from-scratch: this experiment has no recipe for its backbone")
    experiment = experiment.fitted(process, given is None or given.backbone.condition.guided)
    experiment.check_extractors()
    real, decoder = _pictures(experiment, given, inputs)
    for line in said_of(real.account):
        console.print(line, highlight=False)
    weights = {first_of(experiment.extractor): inputs.extractor_weights}
    names = (experiment.extractor, *experiment.more_extractors)
    extractors = [load_extractor(name, weights.get(first_of(name)), inputs.device) for name in names]
    identity = {
        "trunk": "" if given is None else given.identity.backbone,
        "exits": "" if given is None else given.identity.exits,
        "extractor": extractors[0].fingerprint,
        "witnesses": [witness.fingerprint for witness in extractors[1:]],
        "machine": manifest.machine(inputs.device),
    }
    with locked(out):
        settings = settings_of(experiment, inputs, real) | identity
        manifest.claim(out, settings, pictures=real.account)
        data, to_pictures = real, to_uint8
        if decoder is not None:
            folder, _ = find_autoencoder(inputs.vae or experiment.model)
            data, to_pictures = encode_latents(real, folder, out / LATENTS, 16), partial(decode_latents, decoder)
        given_set, cache = PictureSet(experiment.data, real), cache_folder()
        references = tuple(Measured(given_set, one, cache=cache) for one in extractors)
        references = (scaled(references[0]), *references[1:])
        model = _model(experiment, given, data, inputs, out, console)
        more = {"calibration": experiment.number, "to_pictures": to_pictures}
        yield Context(experiment, model, references, data, out, console, given, **more)


def _pictures(experiment: Experiment, given: DynamicDepth | None, inputs: Inputs) -> tuple[Pictures, nn.Module | None]:
    """Open the real pictures, of the size that the model makes, and the decoder of a model of latents.

    Raises InputError: pictures cannot be read, or the autoencoder is missing.
    """
    decoder = None if given is None else open_autoencoder(inputs.vae, given, experiment.model)
    if given is None or experiment.data in PACKAGED:
        pictures = open_data(experiment.data)
    else:
        channels, *size = given.backbone.sample_shape
        if decoder is not None:
            size, channels = picture_size(decoder, tuple(size)), latent_space(decoder).in_channels
        pictures = open_data(experiment.data, tuple(size), channels)
    pictures.check()
    return pictures, None if decoder is None else decoder.to(inputs.device)


def _model(
    experiment: Experiment,
    given: DynamicDepth | None,
    data: Pictures,
    inputs: Inputs,
    out: Path,
    console: Console,
) -> DynamicDepth:
    """Load or make the model with its exits.  given: the user's model; None to train one."""
    model = model_with_exits(experiment, given, data, out, console).to(inputs.device)
    if given is not None and given.exits is not None:  # its table; the reader checks that it belongs to the model
        table, place = (folder / checkpoints.TABLE for folder in (Path(experiment.model), out / "model"))
        if table.is_file() and not place.exists():
            files.copy(table, place)
    return model


@dataclass(frozen=True)
class Comparison:
    """The measuring stages: sample and score every arm, then write the report."""

    experiment: Experiment
    model: DynamicDepth
    references: tuple[Measured, ...]
    """Real pictures as each extractor sees them; plans were calibrated on the first extractor."""
    out: Path
    console: Console
    to_pictures: ToPictures = to_uint8
    """Decoder of a model of latents."""

    def _macs(self, arms: Iterable[Arm]) -> dict[str, tuple[float, float | None]]:
        """Count the denoiser's multiply-accumulates per picture of each arm, and those of its exit heads.

        Peers are counted on a batch, as data may decide; their heads are not told apart.
        """
        num, parts, counted = min(self.experiment.batch_size, self.experiment.num_images), {}, {}
        for arm in tracked(list(arms), "counting arithmetic", unit="arms"):
            model = arm.model or self.model
            if isinstance(model, Peer | ConfidentDepth):
                counted[arm.name] = count_macs(lambda arm=arm: self._drawn(arm, seed=0, num=num)) / num, None
            else:
                mine = parts[id(model)] = parts.get(id(model)) or model_macs(model)
                counted[arm.name] = mine.plan(arm.plan), mine.heads(arm.plan)
        return counted

    def measure(self, arms: list[Arm]) -> None:
        """Sample and score every arm on every seed block.

        Within a block the arms take turns batch by batch, so a machine that slows down slows all arms. After an
        interrupted block, the arms without a row go on after the last batches that were kept (`drawn.Parts`).
        """
        experiment, path = self.experiment, self.out / RUNS
        for real in self.references:
            if experiment.num_images <= (dims := real.features.shape[1]):
                few = f"{experiment.num_images} pictures a block, no more than the {dims} features"
                self.console.print(f"warning: {few} of {real.extractor.name}; distances are then far too large")
        done = measured(path) if path.exists() else set()
        batches, size = -(-experiment.num_images // experiment.batch_size), experiment.batch_size
        blocks, first = range(experiment.num_blocks), experiment.first_seed
        missing = {block: [arm for arm in arms if (arm.name, block) not in done] for block in blocks}
        total = batches * experiment.num_blocks * len(arms)
        count = total - batches * sum(map(len, missing.values()))
        if count < total:
            for arm in tracked([*{(a.family, id(a.model)): a for a in arms}.values()], "warming up", unit="arms"):
                self._draw(arm, seed=0, num=min(size, experiment.num_images))
        macs = self._macs({arm.name: arm for waiting in missing.values() for arm in waiting}.values())
        with progress_bar("sampling and scoring", self.console, unit="batches") as advance:
            advance(count, total)
            for block, waiting in missing.items():
                parts = self._parts(block, waiting)
                known = list(parts.read())
                drawn = {arm.name: [part[arm.name] for part in known] for arm in waiting}
                fresh: dict[str, list[Drawn]] = {arm.name: [] for arm in waiting}
                advance(count := count + len(known) * EVERY * len(waiting), total)
                for batch in range(len(known) * EVERY, batches):
                    num = min(size, experiment.num_images - batch * size)
                    for arm in in_turn(waiting, block, batch):
                        made = self._draw(arm, seed=first + block, num=num, first=batch * size, stats=True)
                        fresh[arm.name].append(Drawn.of(made))
                        count += 1
                        advance(count, total)
                    if (batch + 1) % EVERY == 0 and batch + 1 < batches:
                        parts.write(batch // EVERY, fresh)
                        for arm in waiting:
                            drawn[arm.name] += fresh.pop(arm.name)
                            fresh[arm.name] = []
                for arm in waiting:
                    pictures = drawn.pop(arm.name) + fresh.pop(arm.name)
                    append_run(path, *self._rows(arm, block, pictures, *macs[arm.name]))
                parts.remove()

    def _parts(self, block: int, arms: list[Arm]) -> Parts:
        """Return where the batches of a block are kept until its rows are written."""
        chosen = self.experiment
        depends = [self.model.identity, chosen.first_seed + block, chosen.num_images, chosen.batch_size]
        depends += [(arm.plan.steps, arm.plan.timesteps, arm.plan.cfg_scale) for arm in arms]
        return Parts(self.out / FOLDER / str(block), [arm.name for arm in arms], seals.checksum(str(depends)))

    def time(self, arms: list[Arm]) -> None:
        """Time every arm in batches of `time_batch`, in turns: rows of role "time" with the scored figures.

        Ratios to the first searched plan are medians over the rounds. An interrupted timing begins again.
        """
        size, path = self.experiment.time_batch, self.out / RUNS
        if not size or {arm.name for arm in arms} <= {name for name, _ in measured(path, "time")}:
            return
        baseline = next((arm.name for arm in arms if arm.family == "searched"), arms[0].name)

        def call(arm: Arm) -> list[Reading]:
            return [Reading("", self._draw(arm, seed=0, num=size).seconds)]

        calls = {arm.name: (lambda arm=arm: call(arm)) for arm in arms}
        times = paired_rounds(calls, TIMING, baseline, title=f"timing batches of {size}")
        table = times.pivot(index="round", columns="arm", values="seconds")
        ms = 1e3 * table[baseline].median() / size * table.div(table[baseline], axis=0).median()
        rows = read_runs(path)
        rows = rows[(rows["role"] == "score") & (rows["block"] == rows["block"].min())][list(COLUMNS)]
        rows = rows.assign(role="time", batch_size=size, ms_per_picture=rows["arm"].map(ms))
        rows[["ms_denoiser", "predicted_ms", "peak_memory_mib"]] = None
        append_run(path, *rows.astype(object).to_dict("records"))

    def report(self, arms: list[Arm]) -> None:
        """Draw the figures and write the pages from the files in `out`."""
        from dyndit.analysis.report import figures, plan_figures, style
        from dyndit.analysis.report.write import write_report

        own = (None, self.experiment.number)
        searched = [arm for arm in arms if arm.family == "searched" and arm.calibration in own]
        style.save(plan_figures.plan_figure({arm.name: arm.plan for arm in searched}), self.out / "plan.png")
        rows, first = {}, dict(reversed(self.experiment.dynamic_points))
        for solver, steps in first.items():
            chosen = [arm for arm in arms if (arm.plan.solver, arm.plan.num_steps) == (solver, steps)]
            full = [arm for arm in chosen if arm.family == "full"]
            dynamic = sorted((arm for arm in chosen if arm in searched), key=lambda arm: -arm.budget)
            peers = list({arm.family: arm for arm in reversed(chosen) if arm.peer is not None}.values())
            rows |= {arm.name: self._draw(arm, seed=0, num=10).pictures for arm in full + dynamic + peers}
        of_clips = len(self.model.backbone.sample_shape) == 4
        style.save(figures.samples_figure(rows), self.out / ("frames.png" if of_clips else "samples.png"))
        write_report(self.out, self.out, margin=self.experiment.margin)

    def _draw(self, arm: Arm, *, seed: int, num: int, first: int = 0, stats: bool = False) -> Samples:
        """Draw pictures `first` to `first + num - 1` of an arm, classes in turn. Time includes decoding latents."""
        drawn = self._drawn(arm, seed=seed, num=num, first=first, stats=stats)
        if drawn.latents is None:
            return drawn
        began = time.perf_counter()
        pictures = self.to_pictures(drawn.latents)
        seconds = (*drawn.batch_seconds, time.perf_counter() - began)
        return replace(drawn, pictures=pictures, batch_seconds=seconds)

    def _drawn(self, arm: Arm, *, seed: int, num: int, first: int = 0, stats: bool = False) -> Samples:
        """Draw pictures, or the latents of a model of latents."""
        plan, labels = arm.plan, self.model.backbone.condition.in_turn(num, first)
        options = {"solver": plan.solver, "num_steps": plan.num_steps, "cfg_scale": plan.cfg_scale, "stats": stats}
        options |= {"seed": seed, "first_index": first, "batch_size": self.experiment.batch_size}
        return sample(arm.model or self.model, labels, plan=plan, **options)

    def _rows(
        self, arm: Arm, block: int, drawn: list[Drawn], macs: float, macs_heads: float | None = None
    ) -> list[dict[str, object]]:
        """Score the batches of one arm in one block; return a row of runs.csv for each extractor."""
        experiment, plan, parameter = self.experiment, arm.plan, next(self.model.parameters())
        pictures = torch.cat([part.pictures for part in drawn])
        # A peer that is not a plan runs other blocks than its plan says.
        cond, uncond = plan.mean_depth if arm.peer is None or arm.model is self.model else (None, None)
        share = plan.share_of_blocks if arm.peer is None else arm.peer.share_of_blocks(plan)
        if arm.decided is not None:  # both branches leave together
            cond = arm.decided.mean_depth.mean().item()
            uncond, share = cond * plan.guided, cond / plan.num_blocks
        figures = {
            **{name: getattr(arm, name) for name in ("family", "budget", "variant", "settings", "predicted_ms")},
            **{name: getattr(experiment, name) for name in ("num_images", "batch_size")},
            "run": self.out.name,
            "machine": manifest.machine(parameter.device.type),
            "model": self.model.identity.backbone,
            "arm": arm.name,
            "solver": plan.solver,
            "steps": plan.num_steps,
            "cfg_scale": plan.cfg_scale,
            "block": block,
            "seed": experiment.first_seed + block,
            "share_of_blocks": share,
            "mean_depth_cond": cond,
            "mean_depth_uncond": uncond,
            "ms_per_picture": 1e3 * sum(part.seconds for part in drawn) / experiment.num_images,
            "ms_denoiser": 1e3 * sum(part.network for part in drawn) / experiment.num_images,
            "noise": kind_of(plan.solver),
            "labels": "balanced",
            "resize": "",
            "reference": "pictures",
            "role": "score",
            "plan": "" if arm.variant else arm.plan_file,
            "macs": macs,
            "macs_heads": macs_heads,
            "calibration": "" if arm.calibration is None else str(arm.calibration),
            "compiled": "eager",
            "dtype": "bf16 autocast" if experiment.precision == "bf16" else str(parameter.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }
        rows = []
        for real in self.references:
            row = figures | {"extractor": real.extractor.name, "metric": real.extractor.metric_name}
            row["predicted_fd"] = arm.predicted_fd if real is self.references[0] else None
            scores = score(pictures, real, experiment.metrics, experiment.prc_members)
            rows.append(dict.fromkeys(COLUMNS) | row | {k: v for k, v in scores.items() if k in COLUMNS})
        return rows


OneOf = TypeVar("OneOf")


def in_turn(arms: Iterable[OneOf], block: int, batch: int) -> list[OneOf]:
    """Order the arms for a batch: at random on even batches, then backwards on odd batches.

    Over two batches each arm runs once before and once after every other arm, so a steady drift cancels.
    """
    order = list(arms)
    random.Random(f"{block} {batch // 2}").shuffle(order)
    return order[::-1] if batch % 2 else order
