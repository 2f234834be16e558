"""What a capsule depends on in llama.cpp is checked when a context is made: no pictures are lost in silence."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from llama_runner import Case, image, text
from native_code import shared_library
from test_binding import CONTEXT
from test_native import with_model


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs LD_PRELOAD")
@pytest.mark.parametrize("arch", ["llama", "gemma2"])  # the two forms of attention that are hooked
def test_a_layer_that_passes_by_the_store(models, capsules, patched, tmp_path, arch):
    """The context is refused, by both doors. Without a capsule it works."""
    model = models(arch=arch)
    capsule = capsules(model)
    cases = [Case("given", model, capsule=capsule), Case("by the environment", model, env={"LLAMA_KVCAPSULE": str(capsule)}), Case("none", model, [text(3), image(16)])]
    seen = patched(cases, env={"LD_PRELOAD": str(shared_library("missed_layer", tmp_path))})
    line = "can not attach the capsule: attention of layer 1 does not pass through the capsule"
    for name in ("given", "by the environment"):
        assert line in seen[name].error
        assert len([x for x in seen[name].log if line in x]) == 1
    assert not seen["none"].error
    assert not any(r.error for r in patched(cases).values())


def draft(path: Path, n_embd: int, head: int) -> Path:
    """A tiny Gemma 4 assistant: it has queries, and reads the keys and values of the last two layers of its target, a TinyModel("gemma4")."""
    arch, wide, n_vocab, n_ff = "gemma4-assistant", 128, 160, 64
    rng = np.random.default_rng(3)
    w = gguf.GGUFWriter(path, arch)
    w.add_name("draft")
    for key, value in {
        "block_count": 2, "nextn_predict_layers": 2, "context_length": 8192, "embedding_length": wide, "embedding_length_out": n_embd, "feed_forward_length": n_ff,
        "attention.head_count": 2, "attention.head_count_kv": 2, "attention.key_length": head, "attention.value_length": head, "attention.key_length_swa": head // 2,
        "attention.value_length_swa": head // 2, "rope.dimension_count": head, "rope.dimension_count_swa": head // 2, "attention.sliding_window": 32, "vocab_size": n_vocab,
    }.items():
        w.add_uint32(f"{arch}.{key}", value)
    w.add_array(f"{arch}.attention.sliding_window_pattern", [True, False])
    w.add_layer_norm_rms_eps(1e-5)
    w.add_tokenizer_model("no_vocab")
    shapes = {"token_embd": (n_vocab, wide), "output_norm": (wide,), "nextn.post_projection": (n_embd, wide), "nextn.pre_projection": (wide, 2 * n_embd), "rope_freqs": (head // 2,)}
    for i, d in enumerate((head // 2, head)):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in {
            "attn_q": (2 * d, wide), "attn_output": (wide, 2 * d), "attn_q_norm": (d,), "layer_output_scale": (1,), "ffn_gate": (n_ff, wide), "ffn_up": (n_ff, wide),
            "ffn_down": (wide, n_ff), "attn_norm": (wide,), "post_attention_norm": (wide,), "ffn_norm": (wide,), "post_ffw_norm": (wide,)}.items()}
    for name, shape in shapes.items():
        data = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape) / np.sqrt(shape[-1])
        w.add_tensor(f"{name}.weight", data.astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def test_a_draft_that_shares_the_cells_of_its_target(models, capsules, tmp_path):
    """It does not see what is in slots: one line says so, and only if there is a capsule."""
    target = models(arch="gemma4")
    code = CONTEXT + """
heard = []
L.llama_log_set(keep := L.ggml_log_callback(lambda level, message, data: heard.append(message.decode())), ctypes.c_void_p(0))
draft = L.llama_model_load_from_file(sys.argv[3].encode(), L.llama_model_default_params())
assert draft, "".join(heard)
for wanted in (None, capsule):
    heard.clear()
    target = native.init_context(model, P, native.Attachment(wanted))
    D = L.llama_context_default_params(); D.n_ctx = 1024; D.ctx_other = target
    said(L.llama_init_from_model(draft, D))
    print("".join(heard).count("fewer drafts are accepted"))
"""
    done = with_model(code, target, capsules(target), draft(tmp_path / "draft.gguf", 256, 64))
    assert done.stdout.split() == ["plain", "0", "plain", "1"], done.stdout + done.stderr[-3000:]
