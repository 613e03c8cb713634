"""The losses: zero where they should be, and the sum they say they are."""

import torch
from torch import Tensor, nn

from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.process.ddpm import DDPM, variational_bound
from dyndit.training.losses import deep_supervision_loss, denoising_loss, depth_errors, exit_errors

PROCESS = DDPM()


class Oracle(nn.Module):
    """Predicts the noise it was told, off by `error`, and the variance half v."""

    def __init__(self, eps: Tensor, v: float | None = None, error: float = 0.0) -> None:
        super().__init__()
        self.eps, self.v, self.error = eps, v, error

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        halves = [self.eps + self.error]
        return torch.cat(halves + ([torch.full_like(self.eps, self.v)] if self.v is not None else []), dim=1)


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.rand(4, 1, 8, 8, generator=generator) * 2 - 1
    eps = torch.randn(4, 1, 8, 8, generator=generator)
    return x_0, torch.tensor([1, 40, 500, 999]), eps, torch.zeros(4, dtype=torch.long)


def test_a_perfect_prediction_of_the_noise_costs_nothing() -> None:
    x_0, t, eps, y = batch()
    loss, figures = denoising_loss(Oracle(eps), PROCESS, x_0, t, eps, y)
    assert loss == 0
    assert figures.keys() == {"mse"}
    loss, figures = denoising_loss(Oracle(eps, v=-1.0), PROCESS, x_0, t, eps, y)
    assert figures["mse"] == 0
    assert abs(figures["vb"]) < 1e-6  # v = -1 is the posterior's variance: the divergence is 0
    assert denoising_loss(Oracle(eps, v=1.0), PROCESS, x_0, t, eps, y)[1]["vb"] > 1e-3


def test_the_loss_is_the_sum_of_its_figures() -> None:
    x_0, t, eps, y = batch()
    oracle = Oracle(eps, v=0.5, error=0.5)
    loss, figures = denoising_loss(oracle, PROCESS, x_0, t, eps, y)
    torch.testing.assert_close(figures["mse"], torch.tensor(0.25))
    x_t = PROCESS.noised(x_0, eps, t)
    bound = variational_bound(PROCESS, oracle(x_t, t, y), x_0, x_t, t).mean()
    torch.testing.assert_close(figures["vb"], bound)
    torch.testing.assert_close(loss, 0.25 + bound)


def test_the_model_sees_the_noisy_picture() -> None:
    x_0, t, eps, y = batch()
    seen = []
    oracle = Oracle(eps)
    oracle.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
    denoising_loss(oracle, PROCESS, x_0, t, eps, y)
    assert torch.equal(seen[0], PROCESS.noised(x_0, eps, t))
    assert seen[1] is t
    assert seen[2] is y


def test_exits_that_equal_the_full_model_have_no_error(make_backbone, make_inputs) -> None:
    """Blocks gated by zero are the identity, so every exit that copies the final layer is the full model."""
    backbone = make_backbone()
    for block in backbone.blocks:
        block.reset()
    model = DynamicDepth(backbone, Exits(backbone, ExitConfig(head="adaln-linear")))
    inputs = make_inputs(backbone)
    assert model(*inputs).std() > 0.1
    errors = exit_errors(model, *inputs)
    assert tuple(errors) == model.exits.layers
    assert all(torch.equal(error, torch.zeros(3, 2)) for error in errors.values())


def test_exit_errors_are_mean_squares_of_both_halves(model: DynamicDepth, make_inputs) -> None:
    x, t, y = make_inputs(model.backbone)
    errors = exit_errors(model, x, t, y)
    for depth, error in errors.items():
        square = (model(x, t, y, depth=depth) - model(x, t, y)) ** 2
        torch.testing.assert_close(error[:, 0], square[:, :1].mean((1, 2, 3)))
        torch.testing.assert_close(error[:, 1], square[:, 1:].mean((1, 2, 3)))
        assert (error > 0).all()


def test_guides_are_compared_with_the_unconditional_prediction(model: DynamicDepth, make_inputs) -> None:
    x, t, y = make_inputs(model.backbone)
    errors, without = exit_errors(model, x, t, y, guides=(2, 5)), exit_errors(model, x, t, y)
    null = model(x, t, model.backbone.condition.null(y))
    for depth in model.exits.layers:
        if depth in (2, 5):
            square = (model(x, t, y, depth=depth) - null) ** 2  # of the branch with its labels
            torch.testing.assert_close(errors[depth][:, 0], square[:, :1].mean((1, 2, 3)))
            assert not torch.equal(errors[depth], without[depth])
        else:
            assert torch.equal(errors[depth], without[depth])
    torch.stack(list(errors.values())).sum().backward()
    assert all(p.grad is None for p in model.backbone.final_layer.parameters())


def test_exit_errors_without_a_variance_half(make_model, make_inputs) -> None:
    model = make_model(learn_variance=False)
    for error in exit_errors(model, *make_inputs(model.backbone)).values():
        assert (error[:, 0] > 0).all()
        assert torch.equal(error[:, 1], torch.zeros(3))


def test_the_full_model_is_a_target_without_gradient(model: DynamicDepth, make_inputs) -> None:
    errors = exit_errors(model, *make_inputs(model.backbone))
    torch.stack(list(errors.values())).sum().backward()
    assert all(p.grad is None for p in model.backbone.final_layer.parameters())
    assert all(p.grad is not None for p in model.exits.parameters())


def test_deep_supervision_is_full_depths_loss_and_the_mean_of_the_exits() -> None:
    x_0, t, eps, y = batch()
    oracles = [Oracle(eps, v=0.5, error=error) for error in (0.4, 0.2, 0.1)]
    alone = [denoising_loss(oracle, PROCESS, x_0, t, eps, y) for oracle in oracles]

    def every(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(oracle(*inputs) for oracle in oracles)

    loss, figures = deep_supervision_loss(every, PROCESS, x_0, t, eps, y, 0.3)
    shallow = (alone[0][0] + alone[1][0]) / 2
    torch.testing.assert_close(loss, alone[2][0] + 0.3 * shallow)
    torch.testing.assert_close(figures, alone[2][1] | {"exits": shallow})


def test_depth_errors_are_against_the_given_target(model: DynamicDepth, make_inputs) -> None:
    inputs = make_inputs(model.backbone)
    own = depth_errors(model, model(*inputs), *inputs)
    assert list(own) == list(model.depths)
    assert torch.equal(own.pop(model.num_blocks), torch.zeros(3, 2))
    for depth, error in exit_errors(model, *inputs).items():
        assert torch.equal(own[depth], error)
    other = depth_errors(model, model(*inputs) + 1, *inputs)
    torch.testing.assert_close(other[model.num_blocks], torch.ones(3, 2))
