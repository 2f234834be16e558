"""Models and contexts that a capsule does not attach to: one line that says why, and without a capsule they work as ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from llama_runner import Case, image, load_capsule, read_kv, stats, text
from tiny_archs import ARCHS, MOE, REFUSED, Arch
from tiny_gguf import TinyModel, rewrite, write

Weights = dict[str, np.ndarray]
RANK, ROT, NOPE, VALUE = 48, 16, 24, 32  # of the tiny MLA model

REFUSED |= {
    "deepseek2": Arch(kv_heads=(1,), n_rot=ROT / 64, keys=MOE | {
        "leading_dense_block_count": 2, "expert_shared_count": 1, "attention.q_lora_rank": 32, "attention.kv_lora_rank": RANK,
        "attention.value_length": RANK, "attention.key_length_mla": NOPE + ROT, "attention.value_length_mla": VALUE}),
    "mamba": Arch("none", keys={"ssm.conv_kernel": 4, "ssm.inner_size": 512, "ssm.state_size": 16, "ssm.time_step_rank": 16}),
}


def matrix(*shape: int) -> np.ndarray:
    return (np.random.default_rng(3).standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def of_each_layer(drop: tuple[str, ...], make: Callable[[], Weights]) -> Callable[[Weights], None]:
    def edit(weights: Weights) -> None:
        for i in (0, 1):
            for name in [n for n in weights if n.startswith(f"blk.{i}.") and n.split(".")[2].startswith(drop)]:
                del weights[name]
            weights |= {f"blk.{i}.{name}": data for name, data in make().items()}

    return edit


def mla() -> Weights:
    return {
        "attn_norm.weight": np.ones(256, np.float32), "attn_q_a.weight": matrix(32, 256), "attn_q_a_norm.weight": np.ones(32, np.float32),
        "attn_q_b.weight": matrix(4 * (NOPE + ROT), 32), "attn_kv_a_mqa.weight": matrix(RANK + ROT, 256),
        "attn_kv_a_norm.weight": np.ones(RANK, np.float32), "attn_k_b.weight": matrix(4, RANK, NOPE), "attn_v_b.weight": matrix(4, VALUE, RANK),
        "attn_output.weight": matrix(256, 4 * VALUE),
    }


def mamba() -> Weights:
    return {
        "attn_norm.weight": np.ones(256, np.float32), "ssm_in.weight": matrix(1024, 256), "ssm_conv1d.weight": matrix(512, 4),
        "ssm_conv1d.bias": np.zeros(512, np.float32), "ssm_x.weight": matrix(48, 512), "ssm_dt.weight": matrix(512, 16),
        "ssm_dt.bias": np.zeros(512, np.float32), "ssm_a": -np.ones((512, 16), np.float32), "ssm_d": np.ones(512, np.float32),
        "ssm_out.weight": matrix(256, 512),
    }


EDITS = {"deepseek2": of_each_layer(("attn",), mla), "mamba": of_each_layer(("attn", "ffn"), mamba)}
REASONS = {
    "deepseek2": "MLA is not supported",
    "mamba": "a recurrent model has no KV cache",
    "refact": "ALiBi is not supported",
    "lfm2-swa": "every layer has a sliding window, there is nothing to compress",
    "xverse": "the architecture 'xverse' is not supported",
}


@pytest.fixture(scope="module")
def refused(patched, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    paths = {arch: write(TinyModel(arch), folder / f"{arch}.gguf", EDITS.get(arch)) for arch in REASONS}
    return patched([Case(arch, path, [text(5), image(8), text(3), read_kv(1)]) for arch, path in paths.items()])


@pytest.mark.parametrize("arch", REASONS)
def test_models(refused, arch):
    result = refused[arch]
    assert not result.error
    step = result.steps[-1]
    assert step.rc < 0 and step.values["last_error"] == REASONS[arch]


def test_a_fourth_section(models, patched, tmp_path: Path):
    path = rewrite(models(arch="qwen2vl"), tmp_path / "m.gguf", kv={"qwen2vl.rope.dimension_sections": ([8, 8, 8, 8], gguf.GGUFValueType.INT32)})
    step = patched([Case("a", path, [text(5), read_kv(0)])])["a"].steps[-1]
    assert step.values["last_error"] == "M-RoPE with a fourth section is not supported, the KV cache does not keep its position"


def test_streams(models, capsules, patched):
    model = models(arch="llama")
    capsule = capsules(model)
    runs = patched([Case("two", model, [stats()], capsule=capsule, n_seq_max=2, kv_unified=False),
                    Case("one", model, [stats()], capsule=capsule, n_seq_max=1, kv_unified=False)])
    assert "can not attach the capsule: several streams are not supported, use a unified KV cache (--kv-unified)" in runs["two"].error
    assert runs["one"].values("attached") == [True]


@pytest.mark.parametrize("arch", ["llama", "smollm3", "granitehybrid"])
def test_the_rope_flag_is_checked(models, capsules, patched, tmp_path: Path, arch: str):
    """layer_rope of the file must be what the model does, layer by layer."""
    good = capsules(models(arch=arch))
    flags = [bool(x) for x in gguf.GGUFReader(good).fields["kvcapsule.layer_rope"].contents()]
    last = TinyModel(arch).covered[-1]
    assert flags == [i not in ARCHS[arch].no_rope for i in TinyModel(arch).covered]
    bad = rewrite(good, tmp_path / "bad.gguf", kv={"kvcapsule.layer_rope": ([*flags[:-1], not flags[-1]], gguf.GGUFValueType.BOOL)})
    ok, refused = patched([Case("a", models(arch=arch), [load_capsule(good), load_capsule(bad)])])["a"].steps
    assert ok.values["loaded"] and not refused.values["loaded"]
    assert refused.values["last_error"].endswith(f"layer {last} is {'with' if flags[-1] else 'without'} RoPE")
