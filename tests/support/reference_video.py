"""A spatial-temporal DiT written plainly from the papers, one clip at a time, for parity tests.

Patches by a strided 3-D convolution, rotations by complex numbers, softmax attention spelled out, and factorised
attention by loops over frames and places. It takes the names of the package's weights.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dyndit.models.video import VideoConfig

Weights = dict[str, Tensor]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def timestep(weights: Weights, t: float) -> Tensor:
    frequencies = torch.tensor([10000 ** (-i / 128) for i in range(128)])
    features = torch.cat([(t * frequencies).cos(), (t * frequencies).sin()])
    return linear(weights, "t_embedder.mlp.2", F.silu(linear(weights, "t_embedder.mlp.0", features)))


def turn(x: Tensor, place: tuple[int, int, int], base: float) -> Tensor:
    """Rotate one head's vector (d,) at a place (frame, row, column) of the grid of patches."""
    half = len(x) // 2
    numbers = torch.complex(x[:half].double(), x[half:].double())
    time = half // 3
    row = (half - time) // 2
    angles = [place[0] * base ** (-i / time) for i in range(time)]
    angles += [place[1] * base ** (-i / row) for i in range(row)]
    column = half - time - row
    angles += [place[2] * base ** (-i / column) for i in range(column)]
    numbers = numbers * torch.polar(torch.ones(half, dtype=torch.double), torch.tensor(angles, dtype=torch.double))
    return torch.cat([numbers.real, numbers.imag]).to(x.dtype)


def attention(weights: Weights, name: str, x: Tensor, places: list[tuple[int, int, int]], c: VideoConfig) -> Tensor:
    """Attend within one sequence.  x: (N, D)."""
    q, k, v = linear(weights, f"{name}.qkv", x).chunk(3, dim=-1)
    heads = []
    for h in range(c.num_heads):
        part = slice(h * c.head_width, (h + 1) * c.head_width)
        queries = torch.stack([turn(row, p, c.rotary_base) for row, p in zip(q[:, part], places, strict=True)])
        keys = torch.stack([turn(row, p, c.rotary_base) for row, p in zip(k[:, part], places, strict=True)])
        scores = torch.softmax(queries @ keys.T / math.sqrt(c.head_width), dim=-1)
        heads.append(scores @ v[:, part])
    return linear(weights, f"{name}.proj", torch.cat(heads, dim=-1))


def forward(weights: Weights, c: VideoConfig, x: Tensor, t: float, label: int) -> Tensor:
    """Predict for one clip.  x: (C, T, H, W) -> (C_out, T, H, W)."""
    frames = x.shape[1]
    while x.shape[1] % c.patch_frames:
        x = torch.cat([x, x[:, frames - 1 : frames]], dim=1)
    sides = (c.patch_frames, c.patch_size, c.patch_size)
    kernel = weights["x_embedder.weight"].view(-1, *sides, c.in_channels).permute(0, 4, 1, 2, 3)
    cut = F.conv3d(x[None], kernel, weights["x_embedder.bias"], stride=sides)[0]
    grid = cut.shape[1:]
    places = [(f, r, s) for f in range(grid[0]) for r in range(grid[1]) for s in range(grid[2])]
    tokens = torch.stack([cut[:, f, r, s] for f, r, s in places])
    cond = timestep(weights, t) + weights["y_embedder.embedding_table.weight"][label]

    def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return norm(x, c.norm_eps) * (1 + scale) + shift

    def each(name: str, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        """Attend among the tokens that agree in these axes of their places."""
        out = torch.empty_like(x)
        for key in {tuple(place[a] for a in axes) for place in places}:
            rows = [i for i, place in enumerate(places) if tuple(place[a] for a in axes) == key]
            out[rows] = attention(weights, name, x[rows], [places[i] for i in rows], c)
        return out

    for index in range(c.num_blocks):
        block = f"blocks.{index}"
        layers = [("attn", (0,)), ("time_attn", (1, 2))] if c.attention == "factorised" else [("attn", ())]
        parts = linear(weights, f"{block}.adaLN_modulation.1", F.silu(cond)).split(c.width)
        for k, (name, axes) in enumerate(layers):
            shift, scale, gate = parts[3 * k : 3 * k + 3]
            tokens = tokens + gate * each(f"{block}.{name}", modulated(tokens, shift, scale), axes)
        shift, scale, gate = parts[-3:]
        hidden = F.gelu(linear(weights, f"{block}.mlp.fc1", modulated(tokens, shift, scale)), approximate="tanh")
        tokens = tokens + gate * linear(weights, f"{block}.mlp.fc2", hidden)
    shift, scale = linear(weights, "final_layer.adaLN_modulation.1", F.silu(cond)).split(c.width)
    patches = linear(weights, "final_layer.linear", modulated(tokens, shift, scale))
    out = x.new_zeros(patches.shape[1] // math.prod(sides), *x.shape[1:])
    for patch, (f, r, s) in zip(patches, places, strict=True):
        piece = patch.view(*sides, -1).permute(3, 0, 1, 2)
        p, n = c.patch_size, c.patch_frames
        out[:, n * f : n * f + n, p * r : p * r + p, p * s : p * s + p] = piece
    return out[:, :frames]
