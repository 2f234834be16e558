"""The C API binds a capsule to its model, by every door, and says in one line why not."""

from __future__ import annotations

import pytest
from test_native import with_model

CONTEXT = """
P = L.llama_context_default_params(); P.n_ctx = 1024
capsule = native.Capsule.builtin(model) if sys.argv[2] == "built-in" else native.Capsule.load(model, sys.argv[2])
def said(ctx):
    print("attached" if ctx and native.is_attached(ctx) else "plain" if ctx else f"refused: {native.last_error()}")
"""


@pytest.fixture(params=["file", "built-in"])
def capsule(request, models, capsules):
    return capsules(models()) if request.param == "file" else request.param


def lines(models, capsule, code: str, *more) -> list[str]:
    result = with_model(CONTEXT + code, models(), capsule, *more)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("other", [{"n_head": 8, "n_head_kv": 8}, {"arch": "qwen2"}, {"seed": 7}, {"n_layer": 3}])
def test_the_capsule_of_another_model(models, capsule, other):
    """Not by heads alone: one of the same shape with other weights is another model."""
    code = """
other = L.llama_model_load_from_file(sys.argv[3].encode(), L.llama_model_default_params())
said(native.init_context(other, P, native.Attachment(capsule)))
said(native.init_context(other, P, native.Attachment(None)))
said(native.init_context(model, P, native.Attachment(capsule)))
"""
    refused, plain, attached = lines(models, capsule, code, models(**other))
    assert refused.startswith("refused: can not attach the capsule: ") and "another model" in refused
    assert (plain, attached) == ("plain", "attached")


def test_a_context_that_fails_leaves_nothing_behind(models, capsule):
    code = """
bad = L.llama_context_default_params(); bad.n_batch = bad.n_ubatch = 0
said(native.init_context(model, bad, native.Attachment(capsule)))
said(L.llama_init_from_model(model, P))
"""
    refused, plain = lines(models, capsule, code)
    assert refused == "refused: the context can not be created, the log says why" and plain == "plain"


def test_parameters_of_another_version(models, capsule):
    code = """
raw = L.llama_capsule_context_default_params()
raw.size, raw.capsule = 24, capsule.handle
said(L.llama_capsule_init_from_model(model, P, raw))
for wanted in ({"ratio": float("nan")}, {"quality": float("nan")}, {"quality": -0.5}, {"quality": 0.5, "ratio": 0.5}):
    said(native.init_context(model, P, native.Attachment(capsule, **wanted)))
"""
    size, ratio, *qualities, both = lines(models, capsule, code)
    assert size.startswith("refused: llama_capsule_context_params has ") and "24 in the program" in size
    assert ratio == "refused: the ratio is not a number of at most 1"
    assert qualities == ["refused: the quality is not a positive number"] * 2
    assert both == "refused: a quality and a ratio are given: a ratio is one tier for everything, so give one of them"


@pytest.mark.parametrize("hot", [0xFFFFFFFF, 0xFFFFFF01, 1 << 31, 1025])
def test_more_hot_cells_than_there_are(models, capsule, hot):
    code = f"""
ctx = native.init_context(model, P, native.Attachment(capsule, n_hot={hot}))
print(native.stats(ctx).n_hot)
"""
    assert lines(models, capsule, code) == ["1024"]


def test_a_capsule_may_be_closed_before_its_context(models, capsule):
    code = """
ctx = native.init_context(model, P, native.Attachment(capsule))
capsule.close()
tokens = (L.llama_token * 5)(1, 2, 3, 4, 5)
print(L.llama_decode(ctx, L.llama_batch_get_one(tokens, 5)), native.stats(ctx).n_hot_used)
"""
    assert lines(models, capsule, code) == ["0 5"]


def test_contexts_of_llama_cpp_python(models, capsule):
    """llama_cpp.Llama creates its context by itself: the next one of this thread gets the capsule, inside the block, and no other."""
    code = """
import threading
from contextlib import ExitStack
from types import SimpleNamespace
native.llama_cpp()
import llama_cpp
from llama_cpp._internals import LlamaContext
P = llama_cpp.llama_context_default_params(); P.n_ctx = 1024
def create():
    said(LlamaContext(model=SimpleNamespace(model=model, _exit_stack=ExitStack()), params=P, verbose=False).ctx)
with native.attached(lambda: native.Attachment(capsule)):
    other = threading.Thread(target=create); other.start(); other.join()
    create()
    create()
with native.attached(lambda: native.Attachment(capsule)):
    pass
create()
"""
    assert lines(models, capsule, code) == ["plain", "attached", "plain", "plain"]
