"""What every adapter is: a `Backbone` over a transformer of diffusers that somebody else owns."""

import inspect
from typing import ClassVar, Literal

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from dyndit.backbones.base import Backbone, Condition, Conditioning, Inputs
from dyndit.backbones.class_conditional import DiTBlock
from dyndit.errors import InputError


class Adapter(Backbone):
    """A transformer of diffusers, cut into embed, blocks and head. Its modules and weights stay what they are.

    A family defines `embed`, `block`, `head`, `new_exit_head` and `unpatchify`, and says below how its pipelines
    call the transformer. `embed` gets what `read` took from such a call.
    """

    serves: ClassVar[str]
    """Name of the diffusers class."""
    row_arguments: ClassVar[tuple[str, ...]] = ()
    """Arguments of its forward that have the batch first, besides `hidden_states` and `timestep`."""
    shared_arguments: ClassVar[tuple[str, ...]] = ()
    """Arguments of its forward that serve the whole batch."""
    guidance: ClassVar[Literal["cond first", "uncond first", "calls"]] = "uncond first"
    """Where a guided call of the family's pipelines has its unconditional rows: in the second half of the batch, in
    the first, or in a second call on the same latents."""
    timestep_scale: ClassVar[float] = 1.0
    """The scheduler's timestep, as a multiple of what the forward gets."""

    num_classes = 0
    null_class = None

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer
        self._signature = inspect.signature(type(transformer).forward)

    def read(self, *args: object, **kwargs: object) -> Inputs:
        """What a call of the transformer's forward passes, as the adapter takes it.

        Raises:
            InputError: the call uses an argument that this adapter knows nothing of (a ControlNet's residuals, say).
        """
        call = self._signature.bind(self.transformer, *args, **kwargs).arguments
        known = ("self", "hidden_states", "timestep", "return_dict", *self.row_arguments, *self.shared_arguments)
        for name, value in call.items():
            default = self._signature.parameters[name].default
            if name not in known and not (value is None or value is default or value == {}):
                raise InputError(f"{self.serves}: called with {name}, which cannot be combined with exits")
        x = call["hidden_states"]
        t = torch.as_tensor(call["timestep"], device=x.device).reshape(-1).expand(len(x))
        return Inputs(x, t, self._condition(call))

    def _condition(self, call: dict[str, object]) -> Condition:
        """The conditioning of a bound call."""
        rows = {name: call[name] for name in self.row_arguments if call.get(name) is not None}
        return Conditioning(rows, {name: call[name] for name in self.shared_arguments if call.get(name) is not None})

    def output(self, prediction: Tensor, return_dict: bool) -> Transformer2DModelOutput | tuple[Tensor]:
        """A prediction in the shape in which the transformer's forward returns it."""
        return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)

    def tensors(self) -> dict[str, Tensor]:
        """The transformer's own."""
        return self.transformer.state_dict()

    def unseen(self) -> dict[str, object]:
        """The transformer's whole configuration."""
        return {"class": self.serves} | {
            name: value
            for name, value in sorted(self.transformer.config.items())
            if not name.startswith("_") and isinstance(value, bool | int | float | str | tuple | list)
        }

    def new_exit_block(self) -> nn.Module:
        """A light block (MLP ratio 1) on the tokens alone, which starts as the identity."""
        block = DiTBlock(self.width, self.transformer.config.num_attention_heads, 1.0, 1e-6)
        block.reset()
        return block
