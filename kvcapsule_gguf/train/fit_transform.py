"""Fits what takes the place of the DCT of whole tiles (codec/transform.py): a learned matrix, or kept tokens, gates in closed form and a small key MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..codec.channels import LANES, gather
from ..codec.head import Head
from ..codec.transform import N, Retain
from ..format.tile_transform import whole_of
from .pattern import kept_tokens, most_used_first, neighbours
from .source import TrainError

WIDTH = 8  # tokens of a line
KEPT_BITS = 4  # of the kept rows that gates and MLPs are fitted to
MLP_TILES = 256  # at most so many train the MLP
DECAY = 3.0  # of its weights: without, it learns the few pictures by heart


@dataclass(frozen=True)
class RetainOptions:
    kept: int = 25  # of 64 tokens; odd, so that no block has rows of both kinds
    neighbours: int = 4  # that a dropped token is predicted from
    mlp: int = 0  # hidden units of the key MLP
    ridge: float = 1e-3
    steps: int = 400
    seed: int = 0
    device: str = "auto"


def fit_learned(x: np.ndarray) -> np.ndarray:
    """x f32 [T, H, 64, d] without the mean -> f16 [64, 64]: principal rows over the tokens, the loudest first."""
    y = x.transpose(2, 0, 1, 3).reshape(x.shape[2], -1)
    rows = np.linalg.eigh((y @ y.T).astype(np.float64))[1].T[::-1]
    # the sign is free: the largest entry is positive, so that the same data give the same file
    return (rows * np.sign(np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1))).astype(np.float16)


def fit_retain(x: np.ndarray, groups: Sequence[np.ndarray], options: RetainOptions) -> dict[str, np.ndarray]:
    """x f32 [T, H, 64, d] keys without RoPE and mean -> the tensors of the layer, by their names in a file. Raises TrainError."""
    heads, d = x.shape[1], x.shape[3]
    kept = kept_tokens(N, options.kept, WIDTH)
    dropped, near = neighbours(N, kept, options.neighbours, WIDTH)
    kept, near = most_used_first(kept, near)
    order = np.concatenate([kept, dropped])
    rows = x[:, :, order].copy()
    y = rows[:, :, len(kept) :].copy()
    rows[:, :, len(kept) :] = 0
    coder = Head(np.zeros(d, np.float32), list(groups), np.full((33, len(groups)), KEPT_BITS, np.uint8))
    z = coder.load(coder.store(rows, WIDTH, WIDTH), WIDTH, WIDTH)[:, :, : len(kept)]
    gate = fit_gates(_lanes(z, groups), _lanes(y, groups), near, options.ridge).astype(np.float16)
    out: dict[str, np.ndarray] = {"k_order": order.astype(np.uint8), "k_near": near.astype(np.uint8), "k_gate": gate}

    def left() -> np.ndarray:
        coders = [whole_of(out, "k", h, groups) for h in range(heads)]
        return np.stack([y[:, h] - coder.predict(z[:, h]) for h, coder in enumerate(coders) if isinstance(coder, Retain)], 1)

    rest = left()
    if options.mlp:
        some = slice(None, None, -(-len(x) // MLP_TILES))
        inputs = z[some][:, :, near]
        out |= fit_mlp(inputs.reshape(*inputs.shape[:3], -1), rest[some], options)
        rest = left()
    worst = np.argsort(-np.square(rest).sum((0, 1, 3)), kind="stable")  # those most worth bits of their own come first
    return out | {"k_order": np.concatenate([kept, dropped[worst]]).astype(np.uint8), "k_near": out["k_near"][worst], "k_gate": gate[:, worst]}


def _lanes(x: np.ndarray, groups: Sequence[np.ndarray]) -> np.ndarray:
    """f32 [T, H, n, d] -> [H, 16 G, n, 2 T]: both channels of a lane are data of one gate."""
    out = np.zeros((*x.shape[:3], 2, LANES * len(groups)), np.float32)
    for i, group in enumerate(groups):
        out[..., LANES * i : LANES * i + group.shape[1]] = gather(x, group)
    return np.moveaxis(out, (1, 4, 2), (0, 1, 2)).reshape(x.shape[1], out.shape[-1], x.shape[2], -1)


def fit_gates(x: np.ndarray, y: np.ndarray, near: np.ndarray, ridge: float) -> np.ndarray:
    """x f32 [H, lanes, m, data] kept rows, y f32 [H, lanes, J, data] dropped tokens, near int [J, K] -> f64 [H, J, K, lanes].

    Ridge regression towards the mean of the neighbours, one for each head, dropped token and lane.
    """
    k = near.shape[1]
    gram = np.matmul(x, x.swapaxes(2, 3)).astype(np.float64)[:, :, near[:, :, None], near[:, None, :]]  # [H, lanes, J, K, K]
    right = np.take_along_axis(np.matmul(y, x.swapaxes(2, 3)).astype(np.float64), np.broadcast_to(near, (*y.shape[:2], *near.shape)), 3)
    strength = ridge * np.trace(gram, axis1=-2, axis2=-1)[..., None] / k + 1e-9
    gates = np.linalg.solve(gram + strength[..., None] * np.eye(k), (right + strength / k)[..., None])[..., 0]
    return np.moveaxis(gates, 1, 3)


def fit_mlp(x: np.ndarray, y: np.ndarray, options: RetainOptions) -> dict[str, np.ndarray]:
    """x f32 [T, H, J, K * d], y f32 [T, H, J, d]: y ~ down max(up x + bias, 0), a network for each head. Raises TrainError."""
    try:
        import torch
    except ImportError:
        raise TrainError("the key MLP needs torch: pip install 'kvcapsule-gguf[mlp]', or leave --mlp out") from None
    if options.device == "cuda" and not torch.cuda.is_available():
        raise TrainError("--device cuda: torch has no CUDA device")
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(options.seed)  # always on the CPU: the same numbers for every device
    heads, inputs, d, h = x.shape[1], x.shape[-1], y.shape[-1], options.mlp
    # inputs and outputs of unit size; folded into the weights at the end
    x_mean, x_scale = x.mean((0, 2)), x.std((0, 2)) + 1e-6
    y_scale = float(np.sqrt(np.square(y).mean())) + 1e-12
    flat_x = torch.from_numpy(((x - x_mean[:, None]) / x_scale[:, None]).swapaxes(0, 1).reshape(heads, -1, inputs).astype(np.float32)).to(device)
    flat_y = torch.from_numpy((y / y_scale).swapaxes(0, 1).reshape(heads, -1, d).astype(np.float32)).to(device)
    up = (torch.randn(heads, inputs, h, generator=generator) / inputs**0.5).to(device).requires_grad_()
    bias = torch.zeros(heads, 1, h, device=device, requires_grad=True)
    down = torch.zeros(heads, h, d, device=device, requires_grad=True)
    adam = torch.optim.AdamW([up, bias, down], lr=4e-3, weight_decay=DECAY)
    for step in range(options.steps):
        adam.param_groups[0]["lr"] = 4e-3 * (1 - step / options.steps) ** 0.5
        at = torch.randint(0, flat_x.shape[1], (min(512, flat_x.shape[1]),), generator=generator).to(device)
        loss = (torch.relu(flat_x[:, at] @ up + bias) @ down - flat_y[:, at]).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    up_np = up.detach().cpu().numpy() / x_scale[:, :, None]
    bias_np = bias.detach().cpu().numpy()[:, 0] - (x_mean[:, None] @ up_np)[:, 0]
    down_np = (down.detach().cpu().numpy() * y_scale).swapaxes(1, 2)
    return {"k_mlp_up": up_np.swapaxes(1, 2).astype(np.float16), "k_mlp_bias": bias_np.astype(np.float32), "k_mlp_down": down_np.astype(np.float16)}
