"""Peers whose code is diffusers' or cache-dit's, on the digits: off they are the model, on they skip, nothing leaks."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from diffusers.hooks import (
    MagCacheConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
    apply_mag_cache,
    apply_sea_cache,
    apply_taylorseer_cache,
    apply_text_kv_cache,
)
from diffusers.models import CacheMixin
from torch import Tensor, nn

import dyndit
from dyndit.analysis.compare.peers import peers
from dyndit.analysis.compare.peers.db_cache import DBCache
from dyndit.analysis.compare.peers.diffusers_full import DiffusersFull
from dyndit.analysis.compare.peers.faster_cache import FasterCache
from dyndit.analysis.compare.peers.first_block_cache import FirstBlockCache
from dyndit.analysis.compare.peers.foreign import NOT_APPLICABLE, DiffusersCache, DiffusersPeer, TransformerPeer
from dyndit.analysis.compare.peers.layer_skip import LayerSkip
from dyndit.analysis.compare.peers.mag_cache import GUIDANCE, PICTURES, SEED, MagCache, magnitude_ratios
from dyndit.analysis.compare.peers.pyramid_attention import PyramidAttention
from dyndit.analysis.compare.peers.taylorseer import TaylorSeer
from dyndit.errors import InputError
from dyndit.models.dynamic import DynamicDepth
from dyndit.plans.plan import DepthPlan
from dyndit.plans.step import Step
from dyndit.process import RectifiedFlow
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.loop import Batch, Trajectory, advance, full_plan, start
from dyndit.sampling.sample import sample
from dyndit.storage.diffusers_folder import to_diffusers
from support.models import MakeModel, balanced_labels

STEPS, GUIDED = 10, 1.5
NEEDS_CACHE_DIT = pytest.mark.skipif(find_spec("cache_dit") is None, reason="needs the package cache-dit")


def marked(cls: type[DiffusersCache]) -> object:
    return pytest.param(cls, marks=NEEDS_CACHE_DIT if cls is DBCache else ())


CACHES = (DBCache, FasterCache, FirstBlockCache, LayerSkip, MagCache, PyramidAttention, TaylorSeer)
every_cache = pytest.mark.parametrize("cache", [marked(cls) for cls in CACHES])
every_peer = pytest.mark.parametrize("cache", [marked(cls) for cls in (*CACHES, DiffusersFull)])


@pytest.fixture(scope="module")
def digits() -> DynamicDepth:
    return dyndit.load("digits")


def draw(model: DynamicDepth, *, num: int = 4, steps: int = STEPS, cfg_scale: float = GUIDED, **others: Any) -> Tensor:
    labels = balanced_labels(num, 10)
    return sample(model, labels, num_steps=steps, cfg_scale=cfg_scale, batch_size=num, **others).pictures


@dataclass
class Work:
    """Rows that went through attention and MLPs, and through whole blocks, since the last reset."""

    parts: int = 0
    blocks: int = 0


def count_work(peer: TransformerPeer) -> Work:
    """Count inside what the caches replace: a skipped module's own hooks would fire all the same."""
    work = Work()

    def part(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        work.parts += len(output)

    def block(module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        work.blocks += len(output[0])

    for module in peer.transformer.transformer_blocks:
        module.attn1.to_q.register_forward_hook(part)
        module.ff.net[0].register_forward_hook(part)
        module.norm1.register_forward_hook(block)
    return work


def trajectory(model: DynamicDepth, seed: int = 0) -> tuple[Batch, Trajectory, DepthPlan]:
    batch = Batch(torch.tensor([3, 7]), (0, 1), seed)
    return batch, start(model, batch, "ddim", STEPS), full_plan(model, "ddim", STEPS, GUIDED)


def test_every_foreign_peer_is_found_and_tested_here() -> None:
    found = {cls for cls in peers().values() if issubclass(cls, DiffusersCache)}
    assert found == {*CACHES, DiffusersFull}


@every_peer
def test_off_is_the_full_model_bit_for_bit(cache: type[DiffusersCache], digits: DynamicDepth) -> None:
    off = cache.off().model(digits)
    assert isinstance(off, TransformerPeer)
    work = count_work(off)
    assert torch.equal(draw(off), draw(digits))
    assert work.blocks == 12 * STEPS * 2 * 4
    assert work.parts == 2 * work.blocks


@every_peer
def test_off_is_bit_equal_in_every_prediction(cache: type[DiffusersCache], digits: DynamicDepth) -> None:
    """Pictures are rounded; what the network says is not. Under the solver's own states, from noise to the last."""
    off, (batch, path, plan) = cache.off().model(digits), trajectory(digits)
    _, other, _ = trajectory(digits)
    for k in range(STEPS):
        advance(digits, batch, path, plan, Guidance(GUIDED), first=k, stop=k + 1)
        advance(off, batch, other, plan, Guidance(GUIDED), first=k, stop=k + 1)
        assert torch.equal(path.x, other.x)


@every_cache
def test_on_it_changes_pictures_and_skips_work(cache: type[DiffusersCache], digits: DynamicDepth) -> None:
    full, shares = draw(digits), []
    for settings in cache.chosen():
        peer = settings.model(digits)
        draw(peer)  # some calibrate at first sight
        work = count_work(peer)
        assert not torch.equal(draw(peer), full)
        shares.append(work.parts / (2 * 12 * STEPS * 2 * 4))
        known = settings.share_of_blocks(full_plan(digits, "ddim", STEPS, GUIDED))
        assert known is None or work.blocks / (12 * STEPS * 2 * 4) == pytest.approx(known)
    assert all(0.3 < share < 0.97 for share in shares), shares
    assert len({round(share, 3) for share in shares}) > 1


@every_cache
def test_pictures_do_not_depend_on_what_was_sampled_before(cache: type[DiffusersCache], digits: DynamicDepth) -> None:
    settings = cache.chosen()[-1]
    peer = settings.model(digits)
    first = draw(peer)
    others = draw(peer, num=3, seed=5, steps=7)
    assert others.shape != first.shape
    assert torch.equal(draw(peer), first)
    assert torch.equal(draw(settings.model(digits)), first)


@every_cache
def test_samplings_may_take_turns(cache: type[DiffusersCache], digits: DynamicDepth) -> None:
    peer, done = cache.chosen()[-1].model(digits), []
    for seed in (0, 1):
        batch, path, plan = trajectory(peer, seed)
        done.append(advance(peer, batch, path, plan, Guidance(GUIDED)).x)
    started = [trajectory(peer, seed) for seed in (0, 1)]
    for k in range(STEPS):
        for batch, path, plan in started:
            advance(peer, batch, path, plan, Guidance(GUIDED), first=k, stop=k + 1)
    assert all(torch.equal(path.x, x) for (_, path, _), x in zip(started, done, strict=True))
    assert not torch.equal(*done)


@every_cache
def test_a_fork_goes_on_by_itself(cache: type[DiffusersCache], digits: DynamicDepth) -> None:
    peer = cache.chosen()[-1].model(digits)
    batch, path, plan = trajectory(peer)
    whole = advance(peer, batch, trajectory(peer)[1], plan, Guidance(GUIDED)).x
    advance(peer, batch, path, plan, Guidance(GUIDED), stop=5)
    fork, other = path.fork(), path.fork()
    other.x = torch.zeros_like(other.x)
    for each in (path, other, fork):
        advance(peer, batch, each, plan, Guidance(GUIDED), first=5)
    assert torch.equal(path.x, whole)
    assert torch.equal(fork.x, whole)
    assert not torch.equal(other.x, whole)


@pytest.mark.parametrize("cache", [marked(cls) for cls in CACHES if cls is not LayerSkip])
def test_what_a_fork_copies_is_what_counts(cache: type[DiffusersCache], digits: DynamicDepth) -> None:
    """Where a step reuses anything, one without memory comes out otherwise; else the test above proves nothing."""
    peer = cache.chosen()[-1].model(digits)
    (batch, path, plan), differ = trajectory(peer), 0
    for k in range(STEPS):
        bare = path.fork()
        bare.memory = None
        for each in (path, bare):
            advance(peer, batch, each, plan, Guidance(GUIDED), first=k, stop=k + 1)
        differ += not torch.equal(path.x, bare.x)
    assert 2 <= differ < STEPS  # some steps run in full


@pytest.mark.parametrize("cache", [marked(cls) for cls in CACHES if cls is not FasterCache])
def test_unguided_sampling(cache: type[DiffusersCache], digits: DynamicDepth) -> None:
    full = draw(digits, cfg_scale=1.0)
    assert torch.equal(draw(cache.off().model(digits), cfg_scale=1.0), full)
    assert not torch.equal(draw(cache.chosen()[-1].model(digits), cfg_scale=1.0), full)


@pytest.fixture(scope="module")
def flow(make_model: MakeModel) -> DynamicDepth:
    return DynamicDepth(make_model(num_blocks=12, learn_variance=False).backbone, process=RectifiedFlow())


@every_cache
def test_caches_run_under_rectified_flow(cache: type[DiffusersCache], flow: DynamicDepth) -> None:
    """And by its usual solver, where none is named: also in what a cache measures for itself."""
    full, peer = draw(flow), cache.chosen()[-1].model(flow)
    assert torch.equal(draw(cache.off().model(flow)), full)
    found = draw(peer)
    assert found.shape == full.shape
    assert torch.equal(draw(peer, solver="flow-euler"), found)


def test_arms_of_one_process_do_not_share_a_transformer(digits: DynamicDepth) -> None:
    before, tight, wide = draw(digits), FirstBlockCache(0.05).model(digits), FirstBlockCache(0.3).model(digits)
    alone = draw(tight)
    assert not torch.equal(draw(wide), alone)
    assert torch.equal(draw(tight), alone)
    assert torch.equal(draw(digits), before)
    assert tight.backbone is wide.backbone is digits.backbone


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: FirstBlockCache(-0.1), "threshold -0.1"),
        (lambda: FirstBlockCache(float("nan")), "threshold nan"),
        (lambda: MagCache(-1.0), "threshold -1"),
        (lambda: MagCache(skips=-1), "skips -1"),
        (lambda: MagCache(retention=2.0), "retention 2"),
        (lambda: DBCache(-1.0), "threshold -1"),
        (lambda: DBCache(first=0), "first 0"),
        (lambda: FasterCache(uncond=0), "uncond 0"),
        (lambda: TaylorSeer(0), "interval 0"),
        (lambda: TaylorSeer(what="blocks"), "what 'blocks'"),
        (lambda: PyramidAttention(0), "every 0"),
        (lambda: PyramidAttention(above=800, below=100), "above 800 and below 100"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        wrong()
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)


def test_blocks_that_are_not_there_are_refused(digits: DynamicDepth) -> None:
    with pytest.raises(InputError, match="block 12 skipped, expected 0 to 11"):
        LayerSkip((3, 12)).model(digits)
    with pytest.raises(InputError, match="8 first and 5 last blocks, expected 12 at most"):
        DBCache(first=8, last=5).model(digits)


def test_guidance_may_not_stop_half_way(digits: DynamicDepth) -> None:
    half = DepthPlan.full(full_plan(digits, "ddim", STEPS, GUIDED).timesteps, 12, "ddim", GUIDED)
    half = half.with_steps([Step.equal(12, guided=True)] * 5 + [Step(12)] * 5)
    with pytest.raises(InputError, match="1 branches at step 5, 2 before"):
        draw(FirstBlockCache().model(digits), plan=half)
    with pytest.raises(InputError, match="no guidance at step 0"):
        draw(FasterCache().model(digits), plan=half.with_steps([Step(12)] * 10))


def test_a_missing_package_is_named(digits: DynamicDepth, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    with pytest.raises(InputError, match="needs the package cache-dit") as caught:
        DBCache().model(digits)
    assert "\n" not in str(caught.value)


@NEEDS_CACHE_DIT
def test_the_package_is_quiet(digits: DynamicDepth, capfd: pytest.CaptureFixture[str]) -> None:
    draw(DBCache().model(digits))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@NEEDS_CACHE_DIT
def test_forecast_and_last_blocks_of_db_cache_count(digits: DynamicDepth) -> None:
    pictures = [draw(DBCache(0.4, order, last=last).model(digits)) for order, last in ((0, 0), (1, 0), (0, 2))]
    assert not any(torch.equal(a, b) for a, b in zip(pictures, pictures[1:] + pictures[:1], strict=True))


def test_magnitudes_are_those_that_diffusers_calibrates(
    digits: DynamicDepth, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own calibration prints them at the end of a sampling, and keeps them nowhere."""
    peer = DiffusersFull().model(digits)
    apply_mag_cache(peer.transformer, MagCacheConfig(calibrate=True, num_inference_steps=6))
    peer.find_states()
    sample(peer, balanced_labels(PICTURES, 10), num_steps=6, cfg_scale=GUIDANCE, seed=SEED, batch_size=PICTURES)
    printed = re.search(r"\[([\d., e+-]+)\]\s*$", capsys.readouterr().out)
    theirs = [float(number) for number in printed.group(1).split(",")]
    assert magnitude_ratios(digits, 6, guided=True) == pytest.approx(theirs, rel=1e-6)
    assert len(set(theirs)) == 6


def test_mag_cache_follows_the_number_of_steps(digits: DynamicDepth) -> None:
    peer = MagCache(0.5).model(digits)
    ten = draw(peer)
    six = draw(peer, steps=6)
    assert torch.equal(six, draw(MagCache(0.5).model(digits), steps=6))
    assert torch.equal(draw(peer), ten)
    assert peer.ratios(10, True) != peer.ratios(6, True)


def hooked(transformer: nn.Module) -> list[str]:
    """Names of the modules that hooks stand on."""
    registries = {name: vars(module).get("_diffusers_hook") for name, module in transformer.named_modules()}
    return [name for name, registry in registries.items() if registry is not None and registry.hooks]


def test_taylorseer_by_its_own_patterns_would_hook_nothing(digits: DynamicDepth) -> None:
    transformer = to_diffusers(digits)
    apply_taylorseer_cache(transformer, TaylorSeerCacheConfig())
    assert hooked(transformer) == []
    assert len(hooked(TaylorSeer().model(digits).transformer)) == 24


class _SeaPeer(DiffusersPeer):
    """SeaCache with all that a pipeline can tell it, reusing whatever it may."""

    def call(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        where = {"step_index": self.k, "num_inference_steps": STEPS, "sigma": 1 - self.k / STEPS}
        with CacheMixin.cache_context(self.transformer, "both", **where):
            return TransformerPeer.call(self, x, t, y)

    def ready(self, step: Any) -> None:
        self.k = step.k


class _Sea(DiffusersFull):
    runs = _SeaPeer

    def attach(self, transformer: nn.Module, timestep: object) -> None:
        apply_sea_cache(transformer, SeaCacheConfig(threshold=1e9))


def test_what_does_not_apply_to_a_dit_does_nothing_there(digits: DynamicDepth) -> None:
    assert set(NOT_APPLICABLE) == {"sea_cache", "text_kv_cache"}
    peer = _Sea().model(digits)
    work = count_work(peer)
    assert torch.equal(draw(peer), draw(digits))
    assert work.blocks == 12 * STEPS * 2 * 4
    transformer = to_diffusers(digits)
    apply_text_kv_cache(transformer, TextKVCacheConfig())
    assert hooked(transformer) == [""]  # the root alone: no block of its kind


def test_labels_tell_settings_apart() -> None:
    for cache in (*CACHES, DiffusersFull):
        labels = [settings.label for settings in cache.chosen()]
        assert len(set(labels)) == len(labels)
        assert all(labels)
        assert all(field.name in labels[0] for field in fields(cache))
