"""The plans that a comparison searches: measured descent, in its own pictures, stored once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dyndit.analysis.compare import context as contexts
from dyndit.analysis.compare import descents
from dyndit.analysis.compare.context import DESCENT, SEARCHES, Context
from dyndit.analysis.compare.descents import Rounds
from dyndit.analysis.compare.experiment import Experiment, Inputs, Variant
from dyndit.analysis.compare.run import prepared, run
from dyndit.analysis.compare.sources import Variants
from dyndit.analysis.metrics.extractors import load_extractor
from dyndit.analysis.metrics.features import Measured
from dyndit.analysis.metrics.sets import PictureSet
from dyndit.analysis.report.runs import RUNS, read_runs
from dyndit.calibration.calibrate import measure_around, measure_moments
from dyndit.calibration.measure import NUM_COMPONENTS, CalibrationSettings
from dyndit.errors import InputError
from dyndit.plans.cost import CostModel, PartTimes
from dyndit.plans.descent import Descent
from dyndit.plans.plan import DepthPlan
from dyndit.plans.predictor import Predictor
from dyndit.plans.search import SearchSettings
from dyndit.plans.step import steps
from dyndit.plans.table import FILE, ShiftTable
from dyndit.stats import Moments, frechet_distance
from dyndit.storage import load as checkpoints
from dyndit.training.config import FitConfig
from dyndit.training.data import load_digits
from dyndit.training.distill import Distill

CHOICES = ("6|3", "3|3", "3|e2", "3", "2")


@pytest.fixture(scope="module")
def context(make_model, tmp_path_factory: pytest.TempPathFactory) -> Context:
    experiment = Experiment(
        *("", "digits", "digits", Distill(fit=FitConfig(steps=2, batch_size=8))),
        calibration=CalibrationSettings(num_pictures=70, num_bands=2, batch_size=70, choices=CHOICES),
        calibration_steps=4,
        batch_size=40,
        descent=Descent(rounds=2, width=3, num_pictures=75),
    )
    data, out = load_digits(), tmp_path_factory.mktemp("run")
    references = (Measured(PictureSet("digits", data.uint8()), load_extractor("digits")),)
    found = Context(experiment, make_model(), references, data, out, Console(quiet=True))
    one = PartTimes(embed=0.01, block=0.1, exit=0.02, head=0.03)
    object.__setattr__(found, "table", replace(found.table, cost=CostModel(40, 6, one, one, solver=0.01)))
    return found


def test_a_descent_draws_its_own_pictures(context: Context) -> None:
    ((_, plan, name),) = context.searched("unipc", 4, (0.6,))
    assert plan.router == "descended"
    assert context.read_plan(name).figures == plan.figures
    drawn = {"num_pictures": 75, "seed": context.experiment.calibration.seed + DESCENT, "batch_size": 40}
    found = measure_moments(context.model, context.extractor, plan, **drawn)
    assert frechet_distance(found, context.table.reference) == pytest.approx(plan.figures["descended_fd"])
    assert plan.figures["descended_fd"] <= plan.figures["descended_fd_from"]
    assert DESCENT not in (0, 1)  # the table's pictures, and those that measure a plan on fresh seeds
    predictor = Predictor(context.table, plan.timesteps, context.base("unipc", 4))
    figures = {name: plan.figures[name] for name in ("predicted_fd", "predicted_fd_full")}
    assert figures == {
        "predicted_fd": pytest.approx(predictor.predict(plan)),
        "predicted_fd_full": pytest.approx(predictor.predict(context.full("unipc", 4))),
    }
    assert context.table.cost.share_of_time(plan) <= 0.6 * (1 + 1e-9)


def test_the_best_of_several_searches_is_the_start(context: Context, tmp_path: Path, monkeypatch) -> None:
    """Each has a seed of its own; what is drawn on the descent's pictures decides."""
    searched, drawn = contexts.search, {}
    others = {SEARCHES: "2 2 3|3 3|3", 2 * SEARCHES: "3|3 3 2 3|3"}

    def noted(*given: object, settings: SearchSettings, **options: object) -> DepthPlan:
        plan = searched(*given, settings=settings, **options)
        if settings.seed in others:
            plan = plan.with_steps(steps(*others[settings.seed].split()))
        return drawn.setdefault(settings.seed, plan)

    monkeypatch.setattr(contexts, "search", noted)
    descent = Descent(rounds=0, num_pictures=75, searches=3)
    own = replace(context, experiment=replace(context.experiment, descent=descent), out=tmp_path)
    object.__setattr__(own, "table", context.table)
    ((_, plan, _),) = own.searched("unipc", 4, (0.6,))
    assert set(drawn) == {0, *others}
    pictures = {"num_pictures": 75, "seed": context.experiment.calibration.seed + DESCENT, "batch_size": 40}
    found = [measure_moments(context.model, context.extractor, one, **pictures) for one in drawn.values()]
    distances = [frechet_distance(one, context.table.reference) for one in found]
    assert plan.steps == list(drawn.values())[distances.index(min(distances))].steps
    assert plan.figures["descended_fd"] == pytest.approx(min(distances))


def test_a_comparison_is_calibrated_by_two_extractors_at_once(
    make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Table, plans, rivals and rows see the same scaled features, in a resumed run too."""
    checkpoints.save(make_model(), tmp_path / "model")
    experiment = Experiment(
        *("", "digits", "digits+digits-lenet", Distill(fit=FitConfig(steps=2, batch_size=8))),
        calibration=CalibrationSettings(num_pictures=70, num_bands=2, batch_size=70, choices=CHOICES),
        calibration_steps=4,
        points=(("ddim", 4),),
        full_points=(("ddim", 4),),
        budgets=(0.8,),
        more_extractors=("digits",),
        num_blocks=1,
        num_images=70,
        batch_size=35,
    )
    inputs, quiet = Inputs(model=str(tmp_path / "model")), Console(quiet=True)
    run(experiment, tmp_path / "run", inputs, quiet)
    rows = read_runs(tmp_path / "run" / RUNS)
    assert set(rows["extractor"]) == {"digits+digits-lenet-pca64", "digits"}
    monkeypatch.setattr(Context, "_measured_table", lambda _: pytest.fail("measured again"))
    with prepared(experiment, tmp_path / "run", inputs, quiet) as context:
        assert context.table.projection is not None
        plan = context.full("ddim", 4)
        assert context.distance(plan) == pytest.approx(frechet_distance(context.moments(plan), context.table.reference))


def test_a_variant_is_calibrated_by_extractors_of_the_comparison(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one extractor it is the comparison's own plan; of two, a plan of its own table."""
    second = Measured(context.references[0].given, load_extractor("digits-lenet"))
    variants = (Variant("one", extractor="digits"), Variant("two", extractor="digits+digits-lenet"))
    experiment = replace(context.experiment, points=(("unipc", 4),), budgets=(0.6,), descent=None, variants=variants)
    own = replace(context, experiment=experiment, references=(context.references[0], second), out=tmp_path)
    object.__setattr__(own, "table", context.table)
    one, two = Variants().arms(own)
    assert one.plan.solver == two.plan.solver == "unipc"
    assert (one.predicted_fd, two.predicted_fd) == (None, None)
    tables = [ShiftTable.load(tmp_path / "variants" / name / "model" / FILE) for name in ("one", "two")]
    assert torch.equal(tables[0].mean, context.table.mean)
    assert tables[1].mean.shape[-1] == NUM_COMPONENTS
    lacking = replace(experiment, extractor="digits", variants=(Variant("x", extractor="digits+inception"),))
    with pytest.raises(InputError, match="variant x: extractor 'inception'"):
        lacking.check_extractors()
    monkeypatch.setattr(Context, "_measured_table", lambda _: pytest.fail("measured again"))
    again = replace(experiment, variants=(variants[1], replace(variants[1], name="three")))
    resumed = replace(own, experiment=again)
    object.__setattr__(resumed, "table", context.table)
    first, second = Variants().arms(resumed)
    assert first.plan == second.plan == two.plan


def test_a_descent_that_was_killed_goes_on(context: Context, tmp_path: Path, monkeypatch) -> None:
    """What its rounds measured is read, and their seconds count."""
    own = replace(context, out=tmp_path)
    object.__setattr__(own, "table", context.table)
    calls, spent = [], []

    def killed(*given: object, **options: object) -> list[Moments]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure_around(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(contexts, "measure_around", killed)
        with pytest.raises(KeyboardInterrupt):
            own.searched("unipc", 4, (0.6,))
    (kept,) = (tmp_path / "descent").glob("*.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(contexts, "measure_around", lambda *a, **b: (calls.append(1), measure_around(*a, **b))[1])
        patch.setattr(descents.time, "monotonic", lambda: 0.0)
        ((_, plan, _),) = own.searched("unipc", 4, (0.6,), spent.append)
    assert len(calls) == 2 + 2  # of three rounds the first is read
    ((_, whole, _),) = context.searched("unipc", 4, (0.6,))
    assert plan == whole
    assert len(spent) == 1
    kept.write_bytes(kept.read_bytes()[:-9])
    assert Rounds(tmp_path / "descent", "", lambda *_: [])._read(kept, 1) is None


def test_weights_are_of_the_first_extractor_wherever_it_is_named(inputs: Inputs, tmp_path: Path) -> None:
    """Calibrated by two, scored by each of them and by a third, of which one alone needs a file."""
    two = "resnet20-cifar10+vgg-cifar10"
    alone = ("resnet20-cifar10", "vgg-cifar10")
    experiment = Experiment("", "", two, Distill(fit=FitConfig(steps=1, batch_size=8)), more_extractors=alone)
    with prepared(experiment, tmp_path, inputs, Console(quiet=True)) as context:
        names = [real.extractor.name for real in context.references]
        assert names == [f"{two}-pca64", *alone]
        parts = [real.extractor.network.state_dict() for real in context.references]
        for number, part in enumerate(parts[1:]):
            assert all(torch.equal(tensor, parts[0][f"networks.{number}.{name}"]) for name, tensor in part.items())
