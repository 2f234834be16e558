"""Weights of a model in training, on disk."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn


def save_weights(model: nn.Module, path: Path) -> None:
    """All weights as f32, training heads included; whole or not at all."""
    part = path.with_suffix(".tmp")
    save_file({k: v.detach().float().cpu().contiguous() for k, v in model.state_dict().items()}, part)
    part.replace(path)


def load_weights(path: Path, model: nn.Module) -> None:
    """Read what save_weights wrote."""
    model.load_state_dict(load_file(path))
