"""The benchmark: what it times, records and says. Nothing here depends on how fast anything is."""

import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from dyndit import rounds
from dyndit.analysis.compare import bench as benchmark
from dyndit.analysis.compare import bench_check
from dyndit.analysis.compare.bench import AGAIN, COLUMNS, FULL, NO_PLUGIN, Bench, measure
from dyndit.analysis.compare.bench_check import Work, self_check
from dyndit.analysis.compare.bench_verdict import lines, verdict
from dyndit.analysis.metrics.energy import Counter, EnergyMeter
from dyndit.analysis.metrics.macs import plan_macs
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.schedules import ramp
from dyndit.process import DDPM
from dyndit.rounds import Repeats
from dyndit.sampling.loop import full_plan
from support.models import tiny

THREE = Repeats(rounds=3)


def plans_of(model, cfg_scale: float = 1.5) -> dict[str, object]:
    full = full_plan(model, "ddim", 3, cfg_scale)
    return {FULL: full, AGAIN: full, "ramp": ramp(full, model.depths, start=2)}


def test_every_size_arm_and_scope_is_timed_and_recorded(model) -> None:
    plans = plans_of(model)
    times = measure(model, plans, Bench((1, 4), THREE), name="tiny")
    assert list(times.columns) == list(COLUMNS)
    assert times.groupby(["batch_size", "scope", "arm"]).size().eq(3).all()
    assert len(times) == 2 * 2 * 3 * 3
    assert set(times["scope"]) == {"noise to uint8", "denoiser"}
    facts = {name: times[name].unique().tolist() for name in ("model", "device", "dtype", "threads", "compiled")}
    assert facts == {
        "model": ["tiny"],
        "device": ["cpu"],
        "dtype": ["float32"],
        "threads": [torch.get_num_threads()],
        "compiled": ["eager"],
    }
    for arm, plan in plans.items():
        mine = times[times["arm"] == arm]
        assert set(mine["macs"]) == {plan_macs(model, plan)}
        assert set(mine["share_of_blocks"]) == {plan.share_of_blocks}
    assert (times["predicted_seconds"] > 0).all()
    assert set(times["energy_source"]) <= {"", "RAPL"}


def test_latents_are_decoded_where_there_is_a_decoder(make_model) -> None:
    model = make_model(in_channels=4)
    model.pixel_space = False
    plans = plans_of(model)
    plain = measure(model, plans, Bench((2,), THREE))
    assert set(plain["scope"]) == {"noise to latents", "denoiser"}
    decoder = benchmark._random_autoencoder(4, widths=(1,), layers_per_block=1)
    table = verdict(measure(model, plans, Bench((2,), THREE, decoder=decoder)))
    assert set(table["scope"]) == {"noise to uint8", "denoiser", "decoder"}
    ms = table[table["arm"] == FULL].set_index("scope")
    assert ms.loc["noise to uint8", "ms"] > ms.loc["decoder", "ms"] > 0
    assert math.isnan(ms.loc["decoder", "predicted_ms"])  # a plan says nothing of it
    assert ms.loc["noise to uint8", "predicted_ms"] > ms.loc["decoder", "ms"]  # but it takes its time


def test_inside_a_pipeline_beside_the_pipeline_as_it_is(make_model) -> None:
    model = make_model(in_channels=4)
    model.pixel_space = False
    times = measure(model, plans_of(model, 1.0), Bench((2,), THREE, in_pipeline=True))
    assert set(times.loc[times["scope"] == "pipeline call", "arm"]) == {NO_PLUGIN, FULL, AGAIN, "ramp"}
    assert set(times.loc[times["scope"] == "denoiser", "arm"]) == {FULL, AGAIN, "ramp"}
    with pytest.raises(InputError, match="1000 classes"):
        measure(model, plans_of(model, 1.5), Bench((2,), THREE, in_pipeline=True))


def test_a_pipeline_of_labels_takes_no_captions() -> None:
    model = DynamicDepth(tiny("mmdit"), process=DDPM()).eval()
    full = full_plan(model, "ddim", 3, 1.0)
    with pytest.raises(InputError, match="this model's family is mmdit"):
        measure(model, {FULL: full}, Bench((2,), THREE, in_pipeline=True))


def test_half_precision_is_computed_in_and_recorded(make_model) -> None:
    model = make_model()
    for part in model.children():
        part.to(torch.bfloat16)
    assert set(measure(model, plans_of(model), Bench((1,), THREE))["dtype"]) == {"bfloat16"}


def made_up(ratios: dict[str, list[float]], *, promised: float = 0.5, batch_size: int = 4) -> pd.DataFrame:
    """A benchmark's table in which the arms took so much of full depth's time, round by round."""
    rows = [
        {
            **dict.fromkeys(COLUMNS, "x"),
            "device": "cpu",
            "cfg_scale": 1.5,
            "batch_size": batch_size,
            "round": k,
            "arm": arm,
            "scope": "noise to uint8",
            "seconds": (1 + k / 10) * ratio,  # the machine slows down
            "joules": 8.0 * ratio,
            "energy_source": "RAPL",
            "predicted_seconds": promised if arm == "ramp" else 1.0,
            "macs": 1000,
            "peak_memory_mib": 7.0,
        }
        for arm, values in ratios.items()
        for k, ratio in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


ONES = [1.0] * 12


def test_what_was_saved_of_what_was_promised_is_not_moved_by_a_slow_round() -> None:
    steady, slow = [0.6] * 12, [0.6] * 11 + [60.0]
    for values in (steady, slow):
        table = verdict(made_up({FULL: ONES, AGAIN: ONES, "ramp": values})).set_index("arm")
        assert table.loc["ramp", "kept"] == pytest.approx(0.8)  # 40% saved, 50% promised
        assert table.loc["ramp", "promised"] == pytest.approx(0.5)
    assert table.loc[[FULL, AGAIN], "kept"].isna().all()  # nothing was promised
    assert table.loc["ramp", "flops"] == 2 * table.loc["ramp", "macs"]
    assert table.loc[FULL, "joules_per_picture"] == pytest.approx(2.0)
    assert table.loc[FULL, "ms_per_picture"] == pytest.approx(table.loc[FULL, "ms"] / 4)


def test_the_null_is_in_every_report_and_says_when_it_fails() -> None:
    good = "\n".join(lines(made_up({FULL: ONES, AGAIN: ONES, "ramp": [0.5] * 12})))
    assert "null (the same twice): 1.000 (1.000 to 1.000): shows nothing" in good
    biased = "\n".join(lines(made_up({FULL: ONES, AGAIN: [1.03] * 12})))
    assert "FAILED" in biased
    assert "FAILED" not in good
    assert "too few rounds" in "\n".join(lines(made_up({FULL: ONES[:3], AGAIN: ONES[:3]})))


def test_an_interval_that_stayed_wide_is_named() -> None:
    rng = np.random.default_rng(0)
    table = made_up({FULL: ONES, AGAIN: ONES, "ramp": list(rng.uniform(0.4, 0.6, 12))})
    wide = [line for line in lines(table, until=0.02) if "was asked for" in line]
    assert len(wide) == 1
    assert "ramp: interval still" in wide[0]
    assert "after 12 rounds; 2.0% was asked for" in wide[0]
    assert not [line for line in lines(table) if "was asked for" in line]


def test_joules_are_said_where_a_meter_is_and_nothing_where_none_is() -> None:
    table = made_up({FULL: ONES, AGAIN: ONES})
    assert "joules a picture, batch of 4 (RAPL): full 2, full again 2" in "\n".join(lines(table))
    table["joules"] = math.nan
    assert "joules" not in "\n".join(lines(table))


def test_a_meter_is_read_around_the_whole_call(model, monkeypatch: pytest.MonkeyPatch) -> None:
    read = iter(range(0, 10**9, 250_000))
    monkeypatch.setattr(benchmark, "energy_meter", lambda device: EnergyMeter("RAPL", (Counter(lambda: next(read)),)))
    times = measure(model, plans_of(model), Bench((1,), THREE))
    whole = times["scope"] == "noise to uint8"
    assert set(times.loc[whole, "joules"]) == {0.25}
    assert times.loc[~whole, "joules"].isna().all()


def fake_work(monkeypatch: pytest.MonkeyPatch, *, one: float, two: float, wait: float, drift: float = 0.0) -> Work:
    clock = {"now": 0.0, "calls": 0}
    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])

    def spend(seconds: float) -> None:
        clock["calls"] += 1
        clock["now"] += seconds * (1 + drift * clock["calls"])

    return Work(lambda: spend(one), lambda: spend(two), lambda: spend(wait), wait_seconds=0.05)


@pytest.mark.parametrize(
    ("costs", "passed"),
    [
        ({"one": 0.01, "two": 0.02, "wait": 0.0505}, [True, True, True]),
        ({"one": 0.01, "two": 0.02, "wait": 0.0515}, [True, False, True]),
        ({"one": 0.01, "two": 0.0205, "wait": 0.05}, [True, True, False]),
        ({"one": 0.01, "two": 0.02, "wait": 0.05, "drift": 1e-5}, [True, True, True]),
    ],
)
def test_the_self_check_knows_right_from_wrong(monkeypatch, costs: dict[str, float], passed: list[bool]) -> None:
    assert [check.passed for check in self_check(fake_work(monkeypatch, **costs), rounds=24)] == passed


def test_the_self_check_sees_a_biased_null(monkeypatch) -> None:
    """A call that is slower the second time it runs in a round."""
    work = fake_work(monkeypatch, one=0.01, two=0.02, wait=0.05)
    monkeypatch.setattr(rounds, "order_of", lambda arms, k: arms)  # no rotation: "again" always follows "one"
    state = {"last": ""}

    def one() -> None:
        work.one()
        if state["last"] == "one":
            work.wait()
        state["last"] = "one"

    def two() -> None:
        work.two()
        state["last"] = "two"

    checks = self_check(Work(one, two, work.wait, work.wait_seconds), rounds=12)
    assert not checks[0].passed


def test_the_command_fails_where_a_check_fails(monkeypatch, capsys) -> None:
    from dyndit.cli import main

    work = fake_work(monkeypatch, one=0.01, two=0.02, wait=0.06)
    monkeypatch.setattr(bench_check, "known_work", lambda device: work)
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--self-check"])
    assert stop.value.code == 1
    text = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in text] == ["pass", "FAIL", "pass"]
    monkeypatch.setattr(bench_check, "known_work", lambda device: fake_work(monkeypatch, one=1.0, two=2.0, wait=0.05))
    main(["bench", "--self-check", "--json"])  # returns: status 0


def test_a_decoder_has_to_fit(make_model) -> None:
    with pytest.raises(InputError, match="makes pixels"):
        benchmark.open_decoder(benchmark.RANDOM_DECODER, make_model())


def test_every_column_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "bench.md").read_text()
    assert len(COLUMNS) > 15
    for name, meaning in COLUMNS.items():
        assert f"| `{name}` | {meaning} |" in page
