"""Train the heads of learned forecasts (`dyndit.models.recall`) on what guided full-depth trajectories leave."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyndit.models.base import State
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import Exits
from dyndit.models.forecasts import basis
from dyndit.models.recall import Left
from dyndit.progress import tracked
from dyndit.sampling.guidance import Guidance
from dyndit.sampling.loop import advance, batch_in_turn, full_plan, start
from dyndit.training.config import FitConfig
from dyndit.training.fit import FitResult, Task, fit
from dyndit.training.losses import halves

OLDEST = 8
"""Steps from the full-depth step to the forecast, at most."""
RECALLING = FitConfig(
    steps=1_000, batch_size=256, learning_rate=2e-3, warmup_steps=50, schedule="cosine", ema_decay=0.99, flip=False
)


@dataclass(eq=False)
class Trajectories:
    """The tokens of R sampled pictures at K steps of full depth, conditional branch. An item is a picture's number.

    tokens: (R, K, N, D) by depth, the last L. cond: (R, K, ...), see `State`. timesteps: of the steps, falling.
    """

    tokens: Mapping[int, Tensor]
    cond: Tensor
    timesteps: tuple[float, ...]
    fingerprint: str
    can_flip: bool = False

    def __len__(self) -> int:
        return len(self.cond)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor(index), 0


def trajectories(
    model: DynamicDepth, depths: Sequence[int], num: int, *, seed: int, precision: str, batch_size: int, **how: Any
) -> Trajectories:
    """Sample `num` pictures at full depth, classes in turn, and keep what recall heads see, in bfloat16 on the CPU.

    how: solver, num_steps, cfg_scale.
    """
    full, device = full_plan(model, **how), next(model.parameters()).device
    parts: list[list[Tensor]] = []
    kept = (*depths, model.num_blocks)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for low in tracked(range(0, num, batch_size), "sampling what forecasts learn from", unit="batches"):
            batch = batch_in_turn(model, range(low, min(num, low + batch_size)), seed)
            trajectory = start(model, batch, how["solver"], how["num_steps"])
            steps: list[list[Tensor]] = []
            for k in range(how["num_steps"]):
                x, guidance = trajectory.x, Guidance(how["cfg_scale"])
                advance(model, batch, trajectory, full, guidance, first=k, stop=k + 1, also_keep=depths)
                left: Left = trajectory.memory.left
                times = torch.full((len(x),), left.timestep, device=device)
                with torch.inference_mode():
                    cond = model.backbone.embed(x, times, batch.condition).for_head()[1]  # it does not depend on x
                steps.append([value.to("cpu", torch.bfloat16) for value in (*(left.tokens[d] for d in kept), cond)])
            parts.append([torch.stack(values, dim=1) for values in zip(*steps, strict=True)])
    *tokens, cond = (torch.cat(values).clone() for values in zip(*parts, strict=True))
    fingerprint = f"trajectories {num} of seed {seed}, {sorted(how.items())}"
    return Trajectories(dict(zip(kept, tokens, strict=True)), cond, tuple(map(float, full.timesteps)), fingerprint)


class Recalling(Task):
    """Task: predict full depth at a random step from what a random earlier step left."""

    def __init__(self, model: DynamicDepth, exits: Exits, data: Trajectories, variance_weight: float) -> None:
        self.data, self.variance_weight = data, variance_weight
        self.trainable: Any = _Heads(model, exits)
        self.along = torch.stack(
            [torch.stack([basis(now, then, model.process) for then in data.timesteps]) for now in data.timesteps]
        ).float()

    def draw(self, x: Tensor, y: Any, generator: torch.Generator) -> tuple[Tensor, Any]:
        """Draw a step for each picture and the step that it builds on.  x: (B,) numbers -> x, both (B,)."""
        last = len(self.data.timesteps) - 1
        now = torch.randint(1, last + 1, (len(x),), generator=generator)
        age = torch.minimum(torch.randint(1, OLDEST + 1, (len(x),), generator=generator), now)
        return x, {"now": now.to(x.device), "then": (now - age).to(x.device)}

    def loss(self, module: nn.Module, x: Tensor, y: Any, _: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the squared error on noise and variance outputs over depths.  x: (B,)."""
        rows, now, then = x.cpu(), y["now"].cpu(), y["then"].cpu()

        def there(values: Tensor, steps: Tensor) -> Tensor:
            return values[rows, steps].to(x.device, torch.float32)

        tokens, cond, when = self.data.tokens, there(self.data.cond, now), self.along[now, then].to(x.device)
        pairs = {depth: (there(values, now), there(values, then)) for depth, values in tokens.items()}
        errors = module(pairs, cond, when)  # (E, B, 2)
        noise, variance = errors.mean(dim=(0, 1)).detach()
        parts = errors.new_tensor([1.0, self.variance_weight])
        return (errors * parts).sum(dim=(0, 2)).mean(), {"noise": noise, "variance": variance}


class _Heads(nn.Module):
    """Register the recall heads as parameters. The backbone's final layer, a copy, makes their targets."""

    def __init__(self, model: DynamicDepth, exits: Exits) -> None:
        super().__init__()
        self.recalls = exits.recalls
        self.model, self.final = [model], [model.backbone.new_exit_head().requires_grad_(False)]  # no submodules

    def forward(self, tokens: Mapping[int, tuple[Tensor, Tensor]], cond: Tensor, when: Tensor) -> Tensor:
        """Return squared errors, (E, B, 2) of E heads.  tokens: (now, then) by depth, each (B, N, D)."""
        backbone, final, last = self.model[0].backbone, self.final[0], max(tokens)
        state = State(tokens[last][0], cond)
        target = backbone.unpatchify(final.to(cond.device)(tokens[last][0], cond), state)
        left = {depth: then for depth, (_, then) in tokens.items()}
        errors: list[Tensor] = []
        for name, head in self.recalls.items():
            depth = int(name)
            patches = head(tokens[depth][0], cond, left[depth], left[last], when)
            errors.append(halves(backbone.unpatchify(patches, state) - target, backbone.in_channels))
        return torch.stack(errors)


def train_recall(
    model: DynamicDepth, data: Trajectories, config: FitConfig, variance_weight: float, out: Path
) -> FitResult:
    """Train the recall heads of a model in place -> the loop's record. A stopped run resumes in `out`."""
    assert model.exits is not None
    exits = model.exits
    for parameter in exits.recalls.parameters():
        parameter.requires_grad_(True)
    task = Recalling(model, exits, data, variance_weight)
    identity = f"recall {model.backbone.identity(process=model.process)} {exits.config} {variance_weight}"
    result = fit(task, data, config, out, identity=identity)
    task.trainable.load_state_dict(result.ema)
    exits.eval()
    return result
