"""`dyndit info`: figures of every card, and that estimates are what a real call takes."""

import json
import time
from dataclasses import replace

import pytest
import torch

from dyndit.analysis.metrics.describe import describe, outline, products_per_second
from dyndit.analysis.metrics.memory import estimated_memory, peak_memory
from dyndit.cli import main
from dyndit.models.dit import CARDS, DiTConfig
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.plans.cost import CostModel, PartTimes

PAPERS = [card for card in CARDS if card.startswith("DiT-")]


def test_there_are_twelve_cards_at_256_and_at_512_px() -> None:
    assert len(PAPERS) == 24
    for card in PAPERS:
        large = card.endswith("-512")
        assert CARDS[card].image_size == (64 if large else 32)
        assert replace(CARDS[card], image_size=32) == CARDS[card.removesuffix("-512")]
        side = (64 if large else 32) // int(card.removesuffix("-512")[-1])
        assert outline(card).backbone.pos_embed.shape[1] == side * side


@pytest.mark.parametrize("card", ["DiT-S/2-512", "DiT-S/8", "DiT-B/4-512", "DiT-L/8"])
def test_a_card_is_described_at_once(card: str) -> None:
    began = time.perf_counter()
    found = describe(card, outline(card), rate=1e12)
    assert time.perf_counter() - began < 20
    side = CARDS[card].image_size // CARDS[card].patch_size
    assert found.tokens == side * side
    costs = [d.macs for d in found.depths]
    assert costs == sorted(costs)
    assert found.depths[-1].share == 1
    assert found.depths[-1].depth == CARDS[card].num_blocks
    assert all(d.flops == 2 * d.macs for d in found.depths)
    assert found.depths[-1].milliseconds == pytest.approx(1e3 * found.depths[-1].flops / 1e12)
    assert found.depths[-1].parameters == found.parameters
    assert found.weights_bytes == 4 * (found.parameters + found.exit_parameters)


def test_the_largest_at_512_px_costs_what_the_paper_says() -> None:
    """Peebles and Xie 2022, Table 3: 524.6 "Gflops"."""
    found = describe("DiT-XL/2-512", outline("DiT-XL/2-512"), rate=1e12)
    assert found.depths[-1].macs / 1e9 == pytest.approx(524.6, rel=0.01)
    assert found.tokens == 1024


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("conditioning", ["adaln-zero", "cross-attention", "in-context"])
def test_estimated_memory_is_what_a_call_holds(conditioning: str, rows: int) -> None:
    config = DiTConfig(32, 2, 4, width=96, num_blocks=3, num_heads=3, num_classes=10, conditioning=conditioning)
    model = DynamicDepth(config.build()).eval()
    call = model.backbone.example(rows, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(call.x, call.t, call.y)
        measured = peak_memory(lambda: model(call.x, call.t, call.y))
    assert estimated_memory(model, rows) == pytest.approx(measured, rel=0.05)
    with torch.device("meta"):
        nowhere = DynamicDepth(config.build()).eval()
    assert estimated_memory(nowhere, rows) == estimated_memory(model, rows)
    assert estimated_memory(nowhere, rows, torch.bfloat16) < 0.8 * estimated_memory(model, rows)


def test_parameters_at_an_exit_are_those_that_it_reads() -> None:
    config = DiTConfig(8, 4, 1, width=24, num_blocks=4, num_heads=2, num_classes=10)
    backbone = config.build()
    model = DynamicDepth(backbone, Exits(backbone, ExitConfig((2,), "wide")))

    def size(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    first, last = describe("tiny", model, rate=1e9).depths
    outside = [backbone.blocks[2], backbone.blocks[3], backbone.final_layer]
    assert first.parameters == size(backbone) - sum(map(size, outside)) + size(model.exits.heads["2"])
    assert last.parameters == size(backbone)


def test_measured_times_take_the_place_of_the_estimate() -> None:
    parts = PartTimes(embed=0.1, block=1.0, exit=0.2, head=0.3)
    cost = CostModel(batch_size=10, num_blocks=6, one=parts, two=parts, solver=5.0)
    config = DiTConfig(8, 4, 1, width=24, num_blocks=6, num_heads=2, num_classes=10)
    backbone = config.build()
    found = describe("m", DynamicDepth(backbone, Exits(backbone, ExitConfig((2,)))), cost=cost)
    assert [d.milliseconds for d in found.depths] == pytest.approx([230.0, 640.0])
    assert "measured" in found.timed_by


def test_the_rate_is_this_machines() -> None:
    assert 1e8 < products_per_second(384) < 1e15


def test_info_prints_a_card_and_a_model(capsys) -> None:
    main(["info", "DiT-XL/2", "--tflops", "100", "--conditioning", "in-context"])
    text = capsys.readouterr().out
    assert "tokens: 258 of width 1152" in text
    assert "119.4" in text
    main(["info", "digits", "--json"])
    record = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert record["tokens"] == 16
    assert [d["depth"] for d in record["depths"]] == [12]


def test_info_refuses_in_one_line(capsys) -> None:
    for arguments, named in (
        (["DiT-XXL/2"], "DiT-XXL/2"),
        (["DiT-S/2", "--layers", "12"], "exit layers"),
        (["digits", "--conditioning", "adaln"], "--conditioning adaln"),
        (["DiT-S/2", "--tflops", "0"], "--tflops 0"),
        (["DiT-S/2", "--batch-size", "0"], "--batch-size 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["info", *arguments])
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert named in line
