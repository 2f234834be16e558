"""What tells the architectures of the tiny models apart: kinds of layers, extra keys and tensors (llama.cpp: src/models/*.cpp, load_arch_*)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WINDOW = 32  # of sliding-window layers, in tokens: less than an image
FULL, SLIDING, RECURRENT, REUSED = "fsru"  # kinds of layers; "u" has full attention on the cells of an earlier layer


@dataclass(frozen=True)
class Arch:
    rope: str = "norm"
    layers: str = "ff"  # kinds of the layers of a tiny model, repeated if it has more
    bias: bool = False  # of Q, K and V
    qk_norm: bool = False
    fused: bool = False  # one tensor for Q, K and V, one for gate and up
    post_norm: bool = False  # after attention and FFN
    gate: bool = False  # Q has twice the width: a gate on the output
    tied: bool = False  # the embeddings are the output matrix
    scaled: bool = False  # embeddings are multiplied by sqrt(n_embd)
    experts: int = 0
    kv_heads: tuple[int, ...] = ()  # per layer, instead of TinyModel.n_head_kv
    n_rot: float = 1.0  # share of the head that is rotated
    swa_head: float = 1.0  # head size of sliding-window layers, relative
    causal: bool = True  # images
    no_rope: tuple[int, ...] = ()  # layers whose keys are not rotated
    names: dict[str, str] = field(default_factory=dict)  # of tensors that are called otherwise
    keys: dict[str, Any] = field(default_factory=dict)


SWA = {"attention.sliding_window": WINDOW}
SSM = {"ssm.conv_kernel": 4, "ssm.state_size": 32}
MOE = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 64}

ARCHS: dict[str, Arch] = {
    "llama": Arch(),
    "mistral3": Arch(keys={"attention.temperature_scale": 0.1, "rope.scaling.original_context_length": 64}),
    "internlm2": Arch(),
    "granite": Arch(keys={"logit_scale": 2.0, "residual_scale": 0.7, "attention.scale": 0.15}),
    "deci": Arch(layers="fff", kv_heads=(2, 4, 1)),
    "smollm3": Arch(layers="ffff", no_rope=(3,)),
    "llama4": Arch(layers="sssf", no_rope=(3,),
                   keys={"expert_count": 2, "expert_used_count": 1, "expert_feed_forward_length": 64, "interleave_moe_layer_step": 100}),
    "qwen2": Arch("neox", bias=True),
    "qwen3": Arch("neox", qk_norm=True),
    "qwen3moe": Arch("neox", qk_norm=True, experts=4, keys=MOE),
    "phi3": Arch("neox", fused=True, n_rot=0.75, keys={"rope.scaling.attn_factor": 1.2}),
    "gemma": Arch("neox", tied=True, scaled=True),
    "gemma2": Arch("neox", layers="sf", tied=True, scaled=True, post_norm=True, keys=SWA),
    "gemma3": Arch("neox", layers="sfsf", qk_norm=True, tied=True, scaled=True, post_norm=True, causal=False,
                   keys=SWA | {"attention.sliding_window_pattern": 2, "rope.freq_base_swa": 500.0}),
    "gemma4": Arch("neox", layers="sfsf", qk_norm=True, tied=True, scaled=True, post_norm=True, causal=False, swa_head=0.5,
                   keys=SWA | {"rope.freq_base_swa": 500.0, "embedding_length_per_layer_input": 0, "final_logit_softcapping": 30.0}),
    "qwen2vl": Arch("mrope", bias=True),
    "paddleocr": Arch("mrope"),
    "qwen3vl": Arch("imrope", qk_norm=True, keys={"n_deepstack_layers": 1}),
    "qwen3vlmoe": Arch("imrope", qk_norm=True, experts=4, keys=MOE | {"n_deepstack_layers": 1}),
    "qwen35": Arch("imrope", layers="rfrf", qk_norm=True, gate=True, n_rot=0.5, names={"ffn_norm": "post_attention_norm"},
                   keys=SSM | {"ssm.inner_size": 128, "ssm.time_step_rank": 4, "ssm.group_count": 2, "full_attention_interval": 2}),
    "lfm2": Arch("neox", layers="rfrf", qk_norm=True, names={"output_norm": "token_embd_norm"}, keys={"shortconv.l_cache": 3}),
    "granitehybrid": Arch(layers="rfrf", no_rope=(1, 3), keys=SSM | {"ssm.time_step_rank": 8, "ssm.group_count": 1, "logit_scale": 2.0,
                                                                     "rope.scaling.finetuned": False}),
}

# the layers of gemma4 E2B and E4B: the last ones have no cache, and every layer gets an embedding of its own
ARCHS["gemma4-e"] = Arch(**{**ARCHS["gemma4"].__dict__, "layers": "sfsu", "causal": True,
                            "keys": ARCHS["gemma4"].keys | {"attention.shared_kv_layers": 2, "embedding_length_per_layer_input": 16}})

# not supported, each for a reason of its own
REFUSED: dict[str, Arch] = {
    "xverse": Arch(),
    "refact": Arch("none"),  # ALiBi
    "lfm2-swa": Arch(**{**ARCHS["lfm2"].__dict__, "layers": "rsrs", "keys": ARCHS["lfm2"].keys | SWA}),
}

Matrix = Callable[..., np.ndarray]


def recurrent(arch: str, n_embd: int, keys: dict[str, Any], matrix: Matrix, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The tensors of a recurrent layer, without its norms before attention and FFN."""
    conv, state = keys.get("ssm.conv_kernel", 0), keys.get("ssm.state_size", 0)
    heads, groups = keys.get("ssm.time_step_rank", 0), keys.get("ssm.group_count", 0)
    decay = -np.exp(rng.uniform(-3, 0, (heads, 1))).astype(np.float32)
    if arch == "lfm2":
        n = keys["shortconv.l_cache"]
        return {"shortconv.conv.weight": matrix(n_embd, n), "shortconv.in_proj.weight": matrix(3 * n_embd, n_embd),
                "shortconv.out_proj.weight": matrix(n_embd, n_embd)}
    if arch == "granitehybrid":
        inner, mixed = 2 * n_embd, 2 * n_embd + 2 * groups * state
        return {"ssm_in.weight": matrix(inner + mixed + heads, n_embd), "ssm_conv1d.weight": matrix(mixed, conv),
                "ssm_conv1d.bias": np.zeros(mixed, np.float32), "ssm_dt.bias": rng.standard_normal(heads).astype(np.float32), "ssm_a": decay, "ssm_d": matrix(heads, 1),
                "ssm_norm.weight": np.ones((groups, inner // groups), np.float32), "ssm_out.weight": matrix(n_embd, inner)}
    value, mixed = heads * state, heads * state + 2 * groups * state
    return {"attn_qkv.weight": matrix(mixed, n_embd), "attn_gate.weight": matrix(value, n_embd), "ssm_conv1d.weight": matrix(mixed, conv),
            "ssm_dt.bias": rng.standard_normal(heads).astype(np.float32), "ssm_a": decay[:, 0], "ssm_beta.weight": matrix(heads, n_embd),
            "ssm_alpha.weight": matrix(heads, n_embd), "ssm_norm.weight": np.ones(state, np.float32), "ssm_out.weight": matrix(n_embd, value)}


def experts(n: int, n_embd: int, n_ff: int, matrix: Matrix) -> dict[str, np.ndarray]:
    """The FFN of a mixture of experts."""
    return {"ffn_gate_inp.weight": matrix(n, n_embd), "ffn_gate_exps.weight": np.stack([matrix(n_ff, n_embd) for _ in range(n)]),
            "ffn_up_exps.weight": np.stack([matrix(n_ff, n_embd) for _ in range(n)]),
            "ffn_down_exps.weight": np.stack([matrix(n_embd, n_ff) for _ in range(n)])}


def per_layer_embeddings(width: int, n_embd: int, n_layer: int, n_vocab: int, matrix: Matrix) -> dict[str, np.ndarray]:
    out = {"per_layer_token_embd.weight": matrix(n_vocab, width * n_layer), "per_layer_model_proj.weight": matrix(width * n_layer, n_embd),
           "per_layer_proj_norm.weight": np.ones(width, np.float32)}
    for i in range(n_layer):
        out |= {f"blk.{i}.inp_gate.weight": matrix(width, n_embd), f"blk.{i}.proj.weight": matrix(n_embd, width),
                f"blk.{i}.post_norm.weight": np.ones(n_embd, np.float32)}
    return out
