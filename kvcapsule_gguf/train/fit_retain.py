"""Fits how dropped keys are predicted from kept ones: gates in closed form, then a small MLP for what they leave."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..codec.retain import Retain
from ..codec.rope import pair_index
from ..codec.rows import round_trip
from .pattern import kept_tokens, most_used_first, neighbours
from .source import TrainError

MLP_BLOCKS = 512  # at most so many blocks train the MLP
DECAY = 3.0  # of its weights: without, it learns the few pictures by heart


@dataclass(frozen=True)
class RetainOptions:
    kept: int  # m
    neighbours: int = 4
    mlp_width: int = 16
    width: int = 0  # of the image in tokens, 0 unknown
    ridge: float = 1e-3
    steps: int = 400
    seed: int = 0
    device: str = "auto"


def frequency_groups(rope_type: str, d: int, n_rot: int) -> np.ndarray:
    """int [d]: the number of the frequency pair of each channel; channels that are not rotated are alone."""
    group = np.arange(d)
    if rope_type not in ("", "none"):
        pairs = pair_index(rope_type, min(n_rot, d))
        group[pairs[:, 1]] = pairs[:, 0]
    return np.unique(group, return_inverse=True)[1]


def fit_gates(x: np.ndarray, y: np.ndarray, groups: np.ndarray, ridge: float) -> np.ndarray:
    """x f32 [B, H, J, K, d] kept neighbours, y f32 [B, H, J, d] dropped keys -> f32 [H, J, K, d], equal within a group of channels.

    Ridge regression towards the mean of the neighbours, one for each head, dropped token and group.
    """
    heads, dropped, k, d = x.shape[1:]
    one_hot = np.eye(groups.max() + 1, dtype=np.float32)[groups]  # [d, G]
    gram = np.zeros((heads, dropped, k, k, one_hot.shape[1]))
    right = np.zeros((heads, dropped, k, one_hot.shape[1]))
    for b in range(len(x)):
        gram += np.einsum("hjkd,hjmd->hjkmd", x[b], x[b]) @ one_hot
        right += np.einsum("hjkd,hjd->hjkd", x[b], y[b]) @ one_hot
    gram = np.moveaxis(gram, -1, 2)  # [H, J, G, K, K]
    right = np.moveaxis(right, -1, 2)
    strength = ridge * np.trace(gram, axis1=-2, axis2=-1)[..., None] / k + 1e-9
    gram = gram + strength[..., None] * np.eye(k)
    gates = np.linalg.solve(gram, (right + strength / k)[..., None])[..., 0]  # [H, J, G, K]
    return np.moveaxis(gates, -1, 2)[..., groups].astype(np.float32)


def fit_retain(
    blocks: np.ndarray, weight: np.ndarray, rope_type: str, n_rot: int, options: RetainOptions, kept_rows: tuple[int, ...]
) -> tuple[Retain, np.ndarray]:
    """blocks f32 [B, H, N, d] un-centred keys without RoPE, weight [H, d]; kept_rows: the types of the kept rows, whose loss the fit sees.

    -> what a layer stores, and the mean weighted energy f64 [N] of its rows: of kept keys, and of the residuals of dropped ones.
    """
    n, d = blocks.shape[2:]
    heads = blocks.shape[1]
    kept = kept_tokens(n, options.kept, options.width)
    dropped, near = neighbours(n, kept, options.neighbours, options.width)
    kept, near = most_used_first(kept, near)
    decoded = round_trip(blocks[:, :, kept], kept_rows)
    x, y = decoded[:, :, near], blocks[:, :, dropped]
    gate = fit_gates(x, y, frequency_groups(rope_type, d, n_rot), options.ridge).astype(np.float16)
    rest = y - (x * gate.astype(np.float32)).sum(3)
    h = options.mlp_width
    up, bias, down = np.zeros((heads, 0, options.neighbours * d)), np.zeros((heads, 0)), np.zeros((heads, d, 0))
    if h:
        some = slice(None, None, -(-len(x) // MLP_BLOCKS))
        up, bias, down = fit_mlp(x[some].reshape(-1, *x.shape[1:3], x.shape[3] * d), rest[some], weight, h, options)
    retain = Retain(kept, len(kept), near, gate, up.astype(np.float16), bias.astype(np.float32), down.astype(np.float16))
    scale = np.sqrt(weight)[:, None]
    left = np.square((retain.predict(decoded) - y) * scale).sum((1, 3)).mean(0)
    worst_first = np.argsort(-left, kind="stable")
    stored = Retain(
        np.concatenate([kept, dropped[worst_first]]), len(kept), near[worst_first], gate[:, worst_first],
        retain.mlp_up, retain.mlp_up_bias, retain.mlp_down,
    )  # fmt: skip
    energy = np.square(blocks[:, :, kept] * scale).sum((1, 3)).mean(0)
    return stored, np.concatenate([energy, left[worst_first]]).astype(np.float64)


def fit_mlp(x: np.ndarray, y: np.ndarray, weight: np.ndarray, h: int, options: RetainOptions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x f32 [B, H, J, K*d], y f32 [B, H, J, d]: y ~ down gelu(up x + bias), a network for each head -> (up [H, h, K*d], bias [H, h], down [H, d, h])."""
    try:
        import torch
    except ImportError:
        raise TrainError("the key MLP needs torch: pip install 'kvcapsule-gguf[mlp]', or leave --mlp out") from None
    if options.device == "cuda" and not torch.cuda.is_available():
        raise TrainError("--device cuda: torch has no CUDA device")
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(options.seed)  # always on the CPU: the same numbers for every device
    steps = options.steps
    heads, inputs, d = x.shape[1], x.shape[-1], y.shape[-1]
    # inputs and outputs of unit size; folded into the weights at the end
    x_mean, x_scale = x.mean((0, 2)), x.std((0, 2)) + 1e-6
    y_scale = float(np.sqrt(np.square(y).mean())) + 1e-12
    flat_x = torch.from_numpy(((x - x_mean[:, None]) / x_scale[:, None]).swapaxes(0, 1).reshape(heads, -1, inputs).astype(np.float32)).to(device)
    flat_y = torch.from_numpy((y / y_scale).swapaxes(0, 1).reshape(heads, -1, d).astype(np.float32)).to(device)
    w = torch.from_numpy(np.ascontiguousarray(weight, np.float32)).to(device)[:, None]
    up = (torch.randn(heads, inputs, h, generator=generator) / inputs**0.5).to(device).requires_grad_()
    bias = torch.zeros(heads, 1, h, device=device, requires_grad=True)
    down = torch.zeros(heads, h, d, device=device, requires_grad=True)
    adam = torch.optim.AdamW([up, bias, down], lr=4e-3, weight_decay=DECAY)
    batch = min(512, flat_x.shape[1])
    for step in range(steps):
        adam.param_groups[0]["lr"] = 4e-3 * (1 - step / steps) ** 0.5
        at = torch.randint(0, flat_x.shape[1], (batch,), generator=generator).to(device)
        out = torch.nn.functional.gelu(flat_x[:, at] @ up + bias) @ down
        loss = ((out - flat_y[:, at]).square() * w).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    up_np = up.detach().cpu().numpy() / x_scale[:, :, None]
    bias_np = bias.detach().cpu().numpy()[:, 0] - (x_mean[:, None] @ up_np)[:, 0]
    return up_np.swapaxes(1, 2), bias_np, (down.detach().cpu().numpy() * y_scale).swapaxes(1, 2)
