"""Make arms of evolved schedules of cached parts (`evolution`), on the calibration seeds."""

from dataclasses import asdict

from dyndit import files, seals
from dyndit.analysis.compare.arms import Arm
from dyndit.analysis.compare.context import Context
from dyndit.analysis.compare.evolution import Measurements, evolve
from dyndit.analysis.compare.peers.ecad import Ecad, Genome, PartShares, part_shares, periodic
from dyndit.progress import progress_bar


class Evolved:
    """Schedules of cached parts, evolved at every point and budget. Measurements and genomes are kept in `out/ecad`."""

    def arms(self, context: Context) -> list[Arm]:
        """See `Source`."""
        experiment, arms = context.experiment, []
        if experiment.evolution is None:
            return arms
        shares = self._shares(context)
        for solver, steps in experiment.dynamic_points:
            for budget in sorted(set(experiment.budgets)):
                arms.append(self._arm(context, solver, steps, budget, shares))
        return arms

    def _shares(self, context: Context) -> PartShares:
        """Return the parts' shares of a block's time: stored, so that a resumed evolution has the same limits."""
        place = context.out / "ecad" / "parts.json"
        if not place.exists():
            shares = part_shares(context.model, context.experiment.batch_size)
            files.write_json(place, seals.sealed(asdict(shares)))
        return PartShares(**seals.unsealed(place, files.read_json(place)))

    def _arm(self, context: Context, solver: str, steps: int, budget: float, shares: PartShares) -> Arm:
        experiment, full, cost = context.experiment, context.full(solver, steps), context.table.cost

        def seconds(genome: Genome) -> float:
            return shares.seconds(cost, genome, Ecad(genome=genome).plan(full, context.model.depths))

        def measure(genome: Genome) -> float:
            peer = Ecad(genome=genome)
            return context.distance(peer.plan(full, context.model.depths), peer.model(context.model))

        chosen, place = experiment.calibration, context.out / "ecad" / f"{solver}-{steps}-b{budget:g}.json"
        key = f"{context.model.identity.backbone} {context.extractor.weights_fingerprint} {solver} {steps} "
        key += f"{experiment.cfg_scale} {experiment.precision} {chosen.seed} {chosen.num_pictures}"
        measured = Measurements.open(place, key)
        limit = budget * cost.plan_seconds(full)
        with progress_bar(f"evolving a schedule, {solver} {steps}, {budget:g}", context.console) as advance:
            first = periodic(steps, full.num_blocks)
            best = evolve(first, measure, seconds, limit, experiment.evolution, measured, advance)
        peer = Ecad(genome=best)
        plan, predicted = peer.plan(full, context.model.depths), 1e3 * seconds(best) / cost.batch_size
        model = peer.model(context.model)
        made = {"model": model, "peer": peer, "predicted_ms": predicted, "calibration": context.calibration}
        return Arm(peer.name, plan, budget, "evolved", **made)
