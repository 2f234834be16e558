"""Muon for matrices, AdamW for the rest; learning-rate schedule by progress in time."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def orthogonalise(g: Tensor, steps: int = 4) -> Tensor:
    """Nearest semi-orthogonal matrix of g [m, n] by Newton-Schulz, in float32 (bfloat16 is slow on many CPUs).

    Iterates on the Gram matrix, the smaller side squared, and applies the product once at the end.
    """
    x = g if g.shape[0] <= g.shape[1] else g.T
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T
    product = None
    for step in range(steps):
        factor = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        factor.diagonal().add_(3.4445)
        product = factor if product is None else factor @ product
        if step < steps - 1:
            gram = factor @ (factor @ gram)
    x = product @ x
    return x if g.shape[0] <= g.shape[1] else x.T


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz, scaled to the step size AdamW would take."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                m = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                g = p.grad.lerp(m, group["momentum"])
                update = orthogonalise(g.reshape(g.shape[0], -1)).reshape(p.shape)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * max(g.shape[0], g.numel() // g.shape[0]) ** 0.5)


class Optimisers:
    """Muon on hidden matrices, AdamW on embeddings, heads, norms and biases, stepped together."""

    def __init__(self, named_parameters, lr: float, matrix_lr: float | None = None, weight_decay: float = 0.01):
        matrices, rest = [], []
        for name, p in named_parameters:
            if not p.requires_grad:
                continue
            is_matrix = p.ndim == 2 and name.endswith("weight") and not any(
                s in name for s in ("embed", "output", "position", "heads"))
            (matrices if is_matrix else rest).append(p)
        self.rates = matrix_lr or lr, lr
        self.all = [Muon(matrices, self.rates[0], weight_decay=weight_decay),
                    torch.optim.AdamW(rest, lr, betas=(0.9, 0.97), weight_decay=0.0)]

    def step(self, scale: float, parameters) -> None:
        """Clip, step at `scale` times the base rate, and clear the gradients."""
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser, rate in zip(self.all, self.rates):
            for group in optimiser.param_groups:
                group["lr"] = rate * scale
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)


def schedule(progress: float, warmup: float = 0.03, floor: float = 0.03) -> float:
    """Linear warm-up, flat, then linear decay over the last 60 %."""
    if progress < warmup:
        return max(0.05, progress / warmup)
    return max(floor, min(1.0, (1 - progress) / 0.6 + floor))
