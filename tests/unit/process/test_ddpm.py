"""The diffusion process against its definition: every formula is derived a second time, another way."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dyndit.process.ddpm import DDPM, discretised_gaussian_nll, gaussian_kl, variational_bound

PROCESS = DDPM()


def pictures(batch: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """x_0 on the grid of 8-bit pictures, and noise."""
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.randint(0, 256, (batch, 2, 4, 4), generator=generator).to(dtype) / 127.5 - 1
    return x_0, torch.randn(x_0.shape, generator=generator, dtype=dtype)


def test_betas_of_the_paper() -> None:
    assert PROCESS.betas.dtype == torch.float64
    assert len(PROCESS.betas) == 1000
    assert PROCESS.betas[0].item() == pytest.approx(1e-4, rel=1e-12)
    assert PROCESS.betas[-1].item() == pytest.approx(0.02, rel=1e-12)
    torch.testing.assert_close(PROCESS.betas.diff(), torch.full((999,), 0.0199 / 999, dtype=torch.float64))
    product = 1.0
    for t, beta in enumerate(PROCESS.betas.tolist()):
        product *= 1 - beta
        assert PROCESS.alphas_bar[t].item() == pytest.approx(product, rel=1e-9)
    assert product == pytest.approx(4.04e-5, rel=0.01)


def test_log_snr_falls_with_t() -> None:
    log_snr = PROCESS.log_snr(torch.arange(1000))
    assert (log_snr.diff() < 0).all()
    t = torch.tensor([0, 500, 999])
    signal, noise = PROCESS.scales(t, torch.zeros(3, 1, 1, 1, dtype=torch.float64))
    assert signal.shape == (3, 1, 1, 1)
    torch.testing.assert_close(log_snr[t], 2 * torch.log(signal / noise).flatten())
    torch.testing.assert_close(signal**2 + noise**2, torch.ones_like(signal))


def test_path_kl_weights_share_out_the_change_of_log_snr() -> None:
    weights, log_snr = PROCESS.path_kl_weights(), PROCESS.log_snr(torch.arange(1000))
    assert weights.shape == (1000,)
    assert weights.mean().item() == pytest.approx(1)
    slope = (log_snr[:-2] - log_snr[2:]) / 2
    torch.testing.assert_close(weights[1:-1] / weights[500], slope / slope[499])
    assert weights.min() > 0
    assert weights[0] > 10 * weights[500]  # an error at low noise is worth far more


@given(t=st.integers(0, 999), seed=st.integers(0, 5))
def test_noise_round_trip(t: int, seed: int) -> None:
    x_0, eps = pictures(seed=seed)
    times = torch.full((4,), t)
    x_t = PROCESS.noised(x_0, eps, times)
    torch.testing.assert_close(PROCESS.x_0_of(x_t, eps, times), x_0, atol=1e-9, rtol=0)
    bar = PROCESS.alphas_bar[t].item()
    torch.testing.assert_close(x_t, math.sqrt(bar) * x_0 + math.sqrt(1 - bar) * eps)


@given(t=st.integers(1, 999))
def test_posterior_is_bayes(t: int) -> None:
    """q(x_{t-1} | x_t, x_0) as the product of the prior q(x_{t-1} | x_0) and the likelihood q(x_t | x_{t-1})."""
    x_0, eps = pictures()
    times = torch.full((4,), t)
    x_t = PROCESS.noised(x_0, eps, times)
    bar_before, beta = PROCESS.alphas_bar[t - 1].item(), PROCESS.betas[t].item()
    prior_mean, prior_variance = math.sqrt(bar_before) * x_0, 1 - bar_before
    precision = 1 / prior_variance + (1 - beta) / beta
    expected = (prior_mean / prior_variance + math.sqrt(1 - beta) / beta * x_t) / precision
    mean, log_variance = PROCESS.posterior(x_0, x_t, times)
    torch.testing.assert_close(mean, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(log_variance.exp().flatten(), torch.full((4,), 1 / precision, dtype=torch.float64))


def test_posterior_at_the_last_step() -> None:
    """At t = 0 the mean is x_0 and the variance 0; its logarithm is taken from t = 1."""
    x_0, eps = pictures()
    x_t = PROCESS.noised(x_0, eps, torch.zeros(4))
    mean, log_variance = PROCESS.posterior(x_0, x_t, torch.zeros(4))
    torch.testing.assert_close(mean, x_0, atol=1e-12, rtol=0)
    assert torch.equal(log_variance, PROCESS.posterior(x_0, x_t, torch.ones(4))[1])


def test_a_batch_may_mix_timesteps() -> None:
    x_0, eps = pictures()
    t = torch.tensor([0, 1, 500, 999])
    x_t = PROCESS.noised(x_0, eps, t)
    mean, log_variance = PROCESS.posterior(x_0, x_t, t)
    for row, time in enumerate(t):
        one = PROCESS.posterior(x_0[row : row + 1], x_t[row : row + 1], time[None])
        assert torch.equal(mean[row], one[0][0])
        assert torch.equal(log_variance[row], one[1][0])


@pytest.mark.parametrize("t", [1, 30, 999])
def test_learned_variance_lies_between_its_ends(t: int) -> None:
    x_0, _ = pictures()
    times = torch.full((4,), t)
    lower = PROCESS.posterior(x_0, x_0, times)[1]
    upper = PROCESS.betas[t].log()

    def at(v: float) -> Tensor:
        return PROCESS.learned_log_variance(torch.full_like(x_0, v), times, lower)

    torch.testing.assert_close(at(-1), lower.expand_as(x_0))
    torch.testing.assert_close(at(1), upper.expand_as(x_0))
    torch.testing.assert_close(at(0), (lower + upper).expand_as(x_0) / 2)
    assert (lower < upper).all()


@given(means=st.tuples(st.floats(-3, 3), st.floats(-3, 3)), log_vars=st.tuples(st.floats(-6, 3), st.floats(-6, 3)))
def test_kl_is_the_closed_form(means: tuple[float, float], log_vars: tuple[float, float]) -> None:
    mean_a, mean_b = torch.tensor(means, dtype=torch.float64)
    log_a, log_b = torch.tensor(log_vars, dtype=torch.float64)
    found = gaussian_kl(mean_a, log_a, mean_b, log_b)
    expected = kl_divergence(Normal(mean_a, (log_a / 2).exp()), Normal(mean_b, (log_b / 2).exp()))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    assert found >= -1e-12
    assert gaussian_kl(mean_a, log_a, mean_a, log_a) == 0


@given(mean=st.floats(-1.5, 1.5), log_std=st.floats(-4, 1))
def test_discretised_gaussian_sums_to_one(mean: float, log_std: float) -> None:
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mass = torch.exp(-discretised_gaussian_nll(x, torch.tensor(mean).double(), torch.tensor(log_std).double()))
    assert mass.sum().item() == pytest.approx(1, abs=1e-9)
    assert (mass >= 0).all()


def test_discretised_gaussian_by_hand() -> None:
    x = torch.tensor([-1.0, 3 / 255, 1.0], dtype=torch.float64)
    found = discretised_gaussian_nll(x, torch.zeros(3).double(), torch.full((3,), -1.0).double())
    normal = Normal(0.0, math.exp(-1))
    inner = normal.cdf(torch.tensor(4 / 255).double()) - normal.cdf(torch.tensor(2 / 255).double())
    edge = normal.cdf(torch.tensor(-1 + 1 / 255).double())
    torch.testing.assert_close(found, -torch.stack([edge, inner, edge]).log())


def test_variational_bound_reaches_the_variance_alone() -> None:
    x_0, eps = pictures(dtype=torch.float32)
    t = torch.tensor([0, 1, 500, 999])
    x_t = PROCESS.noised(x_0, eps, t)
    prediction = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
    bound = variational_bound(PROCESS, prediction, x_0, x_t, t)
    assert bound.shape == (4,)
    assert (bound > 0).all()
    bound.sum().backward()
    assert torch.equal(prediction.grad[:, :2], torch.zeros(4, 2, 4, 4))
    assert (prediction.grad[:, 2:].abs().amax((1, 2, 3)) > 0).all()
    assert prediction.grad.isfinite().all()


def test_variational_bound_is_the_divergence_in_bits() -> None:
    x_0, eps = pictures()
    t = torch.full((4,), 300)
    x_t = PROCESS.noised(x_0, eps, t)
    v = torch.full_like(x_0, 0.3)
    guess = eps + 0.1
    mean_q, log_q = PROCESS.posterior(x_0, x_t, t)
    mean_p, _ = PROCESS.posterior(PROCESS.x_0_of(x_t, guess, t), x_t, t)
    log_p = 0.65 * PROCESS.betas[300].log() + 0.35 * log_q
    expected = kl_divergence(Normal(mean_q, (log_q / 2).exp().expand_as(x_0)), Normal(mean_p, (log_p / 2).exp()))
    found = variational_bound(PROCESS, torch.cat([guess, v], 1), x_0, x_t, t)
    torch.testing.assert_close(found, expected.mean((1, 2, 3)) / math.log(2))


def test_variational_bound_at_the_last_step_is_the_likelihood_of_the_pixels() -> None:
    x_0, eps = pictures()
    t = torch.zeros(4)
    x_t = PROCESS.noised(x_0, eps, t)
    prediction = torch.cat([eps + 0.1, torch.full_like(eps, 0.3)], 1)
    mean, log_q = PROCESS.posterior(PROCESS.x_0_of(x_t, eps + 0.1, t), x_t, t)
    normal = Normal(mean, ((0.65 * PROCESS.betas[0].log() + 0.35 * log_q) / 2).exp())
    upper = torch.where(x_0 > 0.999, 1.0, normal.cdf(x_0 + 1 / 255))
    lower = torch.where(x_0 < -0.999, 0.0, normal.cdf(x_0 - 1 / 255))
    expected = -(upper - lower).log2().mean((1, 2, 3))
    torch.testing.assert_close(variational_bound(PROCESS, prediction, x_0, x_t, t), expected)
