"""Evolve a schedule of cached parts: ECAD (arXiv:2506.15682) with one objective under a time limit.

The paper keeps a Pareto front of quality and arithmetic by NSGA-II. A comparison at equal time asks for one point of
that front, so here a genome over the limit is repaired, and the Fréchet distance alone decides. The limit is of
predicted seconds, not of arithmetic. Fitness is measured on the calibration seeds.

Every random number is a function of (seed, generation), and every measured fitness is kept in a file. So a stopped
evolution runs again from its start, reads what it measured, and goes on as if it had never stopped.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dyndit import files, seals
from dyndit.analysis.compare.peers.ecad import ALONE, BOTH, HOLD, Genome
from dyndit.errors import CheckpointError, InputError

Fitness = Callable[[Genome], float]
Seconds = Callable[[Genome], float]


@dataclass(frozen=True)
class Evolution:
    """The effort of an evolution. It ends after `generations`, or with the genome at which `minutes` are used up.

    minutes: of measuring fitness; 0: no limit. flips: mean number of parts that a child changes, and of its steps'
    guidance a quarter of that.
    """

    generations: int = 20
    population: int = 24
    minutes: float = 0.0
    seed: int = 0
    flips: float = 4.0

    def __post_init__(self) -> None:
        for name, least in (("generations", 1), ("population", 2), ("minutes", 0), ("flips", 0), ("seed", 0)):
            if not (value := getattr(self, name)) >= least:
                raise InputError(f"evolution: {name} {value:g}, expected at least {least}")


@dataclass
class Measurements:
    """Fitness and seconds of measuring by genome, kept in a file.  key: what they depend on."""

    path: Path
    key: str
    known: dict[str, tuple[float, float]]

    @classmethod
    def open(cls, path: Path, key: str) -> "Measurements":
        """Read the file; begin anew if it is missing, damaged or of another evolution."""
        try:
            data = seals.unsealed(path, files.read_json(path), CheckpointError)
        except CheckpointError:
            data = {}
        known = data.get("known", {}) if data.get("key") == key else {}
        return cls(path, key, {genome: tuple(found) for genome, found in known.items()})

    def fitness(self, genome: Genome, measure: Fitness) -> float:
        """Return the genome's fitness: known, or measured now and written to the file."""
        text = " ".join(genome)
        if text not in self.known:
            began = time.perf_counter()
            value = measure(genome)
            self.known[text] = (value, time.perf_counter() - began)
            files.write_json(self.path, seals.sealed({"key": self.key, "known": self.known}))
        return self.known[text][0]

    def minutes(self, genomes: Sequence[Genome]) -> float:
        """Return the minutes that measuring these genomes took."""
        return sum(self.known[" ".join(genome)][1] for genome in genomes) / 60


def evolve(
    first: Sequence[Genome],
    measure: Fitness,
    seconds: Seconds,
    limit: float,
    settings: Evolution,
    measured: Measurements,
    on_generation: Callable[[int, int], None] | None = None,
) -> Genome:
    """Return the genome of least fitness that was found within `limit` seconds.

    first: genomes to begin with; those over the limit are repaired. A generation has as many children as the
    population; parents win tournaments of two, steps are crossed between them, and the best of old and new survive.

    Raises InputError: no genome is within the limit.
    """
    drawn = random.Random(f"{settings.seed} 0")
    asked: dict[Genome, float] = {}

    def add(genome: Genome | None) -> None:
        if genome is not None and genome not in asked:
            asked[genome] = measured.fitness(genome, measure)

    for genome in first:
        add(repaired(genome, seconds, limit, drawn))
    for _ in range(settings.population * 4):  # more of the same kind, until there are enough
        if asked and len(asked) < settings.population:
            add(repaired(mutated(drawn.choice(list(asked)), 4 * settings.flips, drawn), seconds, limit, drawn))
    if not asked:
        raise InputError(f"evolution: no schedule within {limit:.3g} seconds; expected a larger budget")
    for generation in range(1, settings.generations + 1):
        if on_generation is not None:
            on_generation(generation, settings.generations)
        drawn = random.Random(f"{settings.seed} {generation}")
        parents = sorted(asked, key=lambda genome: (asked[genome], genome))[: settings.population]
        for _ in range(settings.population):
            if settings.minutes and measured.minutes(list(asked)) >= settings.minutes:
                break
            one, other = (min(drawn.choices(range(len(parents)), k=2)) for _ in range(2))
            child = mutated(crossed(parents[one], parents[other], drawn), settings.flips, drawn)
            add(repaired(child, seconds, limit, drawn))
    return min(asked, key=lambda genome: (asked[genome], genome))


def crossed(one: Genome, other: Genome, drawn: random.Random) -> Genome:
    """Take a run of steps from one genome and the others from the other."""
    low, high = sorted(drawn.randrange(len(one) + 1) for _ in range(2))
    return (*other[:low], *one[low:high], *other[high:])


def mutated(genome: Genome, flips: float, drawn: random.Random) -> Genome:
    """Flip each part with a chance that makes `flips` of them on average; redraw a step's guidance likewise."""
    num_parts = sum(len(text) - 1 for text in genome)
    chance, guides = flips / max(1, num_parts), flips / 4 / len(genome)
    steps = []
    for text in genome:
        letter = drawn.choice((BOTH, HOLD, ALONE)) if drawn.random() < guides else text[0]
        steps.append(letter + "".join("10"[int(part)] if drawn.random() < chance else part for part in text[1:]))
    return tuple(steps)


def repaired(genome: Genome, seconds: Seconds, limit: float, drawn: random.Random) -> Genome | None:
    """Cache random parts, and drop second branches where none is left to cache, until the time is within the limit.

    The first step stays as it is: it has nothing to take parts from. Return None if no such change is enough.
    """
    steps = list(genome)
    while seconds(tuple(steps)) > limit:
        parts = [(k, i) for k, text in enumerate(steps) if k for i, part in enumerate(text) if part == "1"]
        second = [(k, 0) for k, text in enumerate(steps) if text[0] == BOTH]
        if not parts and not second:
            return None
        # A second branch costs as much as half of the step's parts, so it is dropped about as often as they are.
        take = second if not parts or (second and drawn.random() < len(second) / (len(second) + len(parts))) else parts
        k, i = drawn.choice(take)
        steps[k] = HOLD + steps[k][1:] if i == 0 else steps[k][:i] + "0" + steps[k][i + 1 :]
    return tuple(steps)
