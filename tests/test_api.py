"""The Python API against llama-cpp-python's own handler, on tiny models that answer nonsense, but the same nonsense every time."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from chat_model import TEMPLATE, TOKENS, write_folder, write_model
from conftest import library
from make_capsule import random_capsule
from test_native import require_capsules

from kvcapsule_gguf import native

ARCHS = ("llama", "qwen2vl")
# the handler that is compared with only knows templates that take the parts of a message
TYPED = TEMPLATE.replace("message['content'] }}", "message['content'] if message['content'] is string else message['content'] | map(attribute='text') | join }}")
TOOL = {"type": "function", "function": {"name": "pick", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_capsules()
    native.load(library("patched"))
    root = write_folder(tmp_path_factory.mktemp("api"), ARCHS, TYPED)
    for arch in ARCHS:
        random_capsule(root / arch / "tiny.gguf", root / arch / "lossless.gguf")
    return root


def url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def user(text: str, *pictures: Path | str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url(p) if isinstance(p, Path) else p}} for p in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


# On an f16 cache stock rounds queries and weights to f16 and the capsule's kernels do not: log-probabilities move by 1e-3, and an answer may turn. Nothing is rounded here.
SAME = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0}


def ours(folder: Path, arch: str = "llama", **options: Any):
    from kvcapsule_gguf import KVCapsuleLlama

    return KVCapsuleLlama(folder / arch / "tiny.gguf", **{**SAME, **options})


def theirs(folder: Path, arch: str = "llama", **options: Any):
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import MTMDChatHandler

    handler = MTMDChatHandler(str(folder / arch / "mmproj-tiny.gguf"), verbose=False)
    return Llama(str(folder / arch / "tiny.gguf"), chat_handler=handler, verbose=False, **{**SAME, **options})


def content(reply: Any) -> str:
    return reply["choices"][0]["message"]["content"]


def conversation(llm: Any, folder: Path) -> tuple[list[str], list[tuple[int, int]]]:
    """Ten questions about three pictures; their answers, and (pictures encoded, tokens evaluated) for each."""
    messages: list[dict[str, Any]] = []
    answers, work = [], []
    for i in range(10):
        messages.append(user(f"and {i}?", *[folder / f"{'abc'[i]}.png"] if i < 3 else []))
        answers.append(content(llm.create_chat_completion(messages, temperature=0, max_tokens=8)))
        messages.append(said(answers[-1]))
        if hasattr(llm, "prompt_stats"):
            work.append((llm.prompt_stats().images_encoded, llm.prompt_stats().tokens_evaluated))
    return answers, work


# --- the same answers, for less ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_ten_questions_about_three_pictures(folder: Path, arch: str) -> None:
    expected, _ = conversation(theirs(folder, arch), folder)
    for capsule in ("off", folder / arch / "lossless.gguf"):
        with ours(folder, arch, capsule=capsule) as llm:
            answers, work = conversation(llm, folder)
        assert answers == expected
        assert [encoded for encoded, _ in work] == [1] * 3 + [0] * 7
        assert all(evaluated < 40 for _, evaluated in work[3:])


def test_the_same_request_in_all_its_forms(folder: Path) -> None:
    """Streaming, grammar, JSON, a forced tool, logprobs, stop, usage."""
    from llama_cpp.llama_grammar import LlamaGrammar

    other = theirs(folder, logits_all=True)
    with ours(folder, capsule=folder / "llama" / "lossless.gguf", logits_all=True) as llm:
        messages = [user("what?", folder / "a.png", folder / "b.png")]
        forms: list[dict[str, Any]] = [
            {},
            {"stop": ["q"]},
            {"grammar": LlamaGrammar.from_string('root ::= ("yes" | "no") "."', verbose=False)},
            {"response_format": {"type": "json_object", "schema": {"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"]}}},
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "pick"}}},
            {"functions": [TOOL["function"]], "function_call": {"name": "pick"}},
            {"logprobs": True, "top_logprobs": 2},
        ]
        for form in forms:
            options = {"messages": messages, "temperature": 0, "max_tokens": 12, **form}
            a, b = other.create_chat_completion(**options), llm.create_chat_completion(**options)
            for reply in (a, b):
                # identity and time of the request
                reply.pop("id"), reply.pop("created")
                for call in reply["choices"][0]["message"].get("tool_calls") or []:
                    call.pop("id")
            probs = [[t.pop("logprob") for t in (r["choices"][0].get("logprobs") or {}).get("content", [])] for r in (a, b)]
            tops = [r["choices"][0].get("logprobs", None) for r in (a, b)]
            for top in tops:
                for token in (top or {}).get("content", []):
                    token["top_logprobs"] = [t["token"] for t in token["top_logprobs"]]
            assert probs[0] == pytest.approx(probs[1], abs=1e-4)
            assert a == b
        assert llm.prompt_stats().images_encoded == 0

        chunks = list(llm.create_chat_completion(messages, temperature=0, max_tokens=12, stream=True))
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        assert text == content(other.create_chat_completion(messages, temperature=0, max_tokens=12))
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("arch", ARCHS)
def test_a_changed_message_keeps_what_is_before_it(folder: Path, arch: str) -> None:
    with ours(folder, arch) as llm:
        first = [user("what?", folder / "a.png"), said("red"), user("this?", folder / "b.png")]
        llm.create_chat_completion(first, max_tokens=4)
        changed = [*first[:2], user("that?", folder / "c.png")]
        reused = content(llm.create_chat_completion(changed, temperature=0, max_tokens=8))
        assert (llm.prompt_stats().images_encoded, len(llm.image_stats())) == (1, 2)
        # and back to something else altogether
        llm.create_chat_completion([user("hello")], max_tokens=4)
        assert llm.image_stats() == []
    with ours(folder, arch) as llm:
        assert content(llm.create_chat_completion(changed, temperature=0, max_tokens=8)) == reused


def test_pictures_of_the_same_size_are_not_mixed_up(folder: Path) -> None:
    with ours(folder) as llm:
        answers = [content(llm.create_chat_completion([user("?", folder / name)], temperature=0, max_tokens=8)) for name in ("a.png", "b.png", "a.png", "b.png")]
    assert answers[0] == answers[2] != answers[1] == answers[3]


def test_other_uses_of_the_same_llama(folder: Path) -> None:
    """Plain completions, a reset and a state that was loaded change what the cache holds."""
    with ours(folder) as llm:
        ask = lambda name: content(llm.create_chat_completion([user("?", folder / name)], temperature=0, max_tokens=8))  # noqa: E731
        expected = {name: ask(name) for name in ("a.png", "b.png")}
        llm("hello there", max_tokens=3)
        assert ask("a.png") == expected["a.png"] and llm.prompt_stats().images_encoded == 1
        llm.reset()
        assert ask("a.png") == expected["a.png"] and llm.prompt_stats().images_encoded == 1
        state = llm.save_state()
        assert ask("b.png") == expected["b.png"]
        llm.load_state(state)
        assert ask("b.png") == expected["b.png"] and llm.prompt_stats().images_encoded == 1
        stream = llm.create_chat_completion([user("?", folder / "a.png")], stream=True, max_tokens=8)
        next(stream), next(stream)
        stream.close()
        assert ask("a.png") == expected["a.png"] and llm.prompt_stats().images_encoded == 0


def test_a_stream_that_another_request_overtook(folder: Path) -> None:
    with ours(folder) as llm:
        stream = llm.create_chat_completion([user("?", folder / "a.png")], stream=True, max_tokens=8)
        next(stream)
        llm.create_chat_completion([user("?", folder / "b.png")], max_tokens=2)
        with pytest.raises(RuntimeError, match="another request"):
            list(stream)


# --- capsule, statistics, image cache ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_statistics_per_picture(folder: Path, arch: str) -> None:
    with ours(folder, arch) as llm:
        assert llm.capsule_path == folder / arch / "kvcapsule-tiny.gguf"
        llm.create_chat_completion([user("?", folder / "a.png", folder / "b.png")], max_tokens=2)
        images = llm.image_stats()
        stats = native.stats(llm.ctx)
    assert [(image.name, image.tokens, image.moved, sum(image.slots.values())) for image in images] == [(f"image {i}", TOKENS, TOKENS, 1) for i in (1, 2)]
    assert all(0 < image.bytes_now < image.bytes_f16 for image in images) and stats.n_cold == 2 * TOKENS


def test_the_handler_on_a_plain_llama(folder: Path) -> None:
    """The capsule comes from the environment there, or there is none."""
    from llama_cpp import Llama

    from kvcapsule_gguf import KVCapsuleChatHandler

    handler = KVCapsuleChatHandler(clip_model_path=str(folder / "llama" / "mmproj-tiny.gguf"))
    llm = Llama(str(folder / "llama" / "tiny.gguf"), chat_handler=handler, n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False)
    answers, _ = conversation(llm, folder)
    assert answers == conversation(theirs(folder), folder)[0]
    assert handler.stats.images_encoded == 0 and len(handler.stats.images) == 3
    llm.close()


def test_the_environment_is_for_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With LLAMA_KVCAPSULE a plain Llama has the capsule; ours has what its arguments say."""
    from llama_cpp import Llama

    from kvcapsule_gguf import KVCapsuleChatHandler

    monkeypatch.setenv("LLAMA_KVCAPSULE", str(folder / "llama" / "lossless.gguf"))
    monkeypatch.setenv("LLAMA_KVCAPSULE_HOT", "512")
    handler = KVCapsuleChatHandler(clip_model_path=str(folder / "llama" / "mmproj-tiny.gguf"))
    llm = Llama(str(folder / "llama" / "tiny.gguf"), chat_handler=handler, n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False)
    llm.create_chat_completion([user("?", folder / "a.png")], max_tokens=2)
    assert sum(handler.stats.images[0].slots.values()) == 1 and native.stats(llm.ctx).n_hot == 512
    llm.close()
    with ours(folder, capsule="off") as llm:
        assert not native.is_attached(llm.ctx)
    with ours(folder) as llm:
        assert llm.capsule_path == folder / "llama" / "lossless.gguf" and native.is_attached(llm.ctx)
    assert "LLAMA_KVCAPSULE" in os.environ


@pytest.mark.parametrize("arch", ARCHS)
def test_the_image_cache_serves_the_next_process(folder: Path, tmp_path: Path, arch: str) -> None:
    messages = [user("what?", folder / "a.png", folder / "b.png")]
    answers = []
    for expected in ((2, 0), (0, 2)):
        with ours(folder, arch, image_cache=tmp_path / "cache") as llm:
            answers.append(content(llm.create_chat_completion(messages, temperature=0, max_tokens=8)))
            assert (llm.prompt_stats().images_encoded, llm.prompt_stats().images_loaded) == expected
            answers.append(content(llm.create_chat_completion([*messages, said(answers[0]), user("and?")], temperature=0, max_tokens=8)))
    assert answers[:2] == answers[2:]


# --- refusals ----------------------------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_or_does_not_fit_is_a_value_error(folder: Path, tmp_path: Path) -> None:
    from kvcapsule_gguf import KVCapsuleLlama

    (tmp_path / "broken.png").write_bytes(b"hello")
    with pytest.raises(ValueError, match="does not exist"):
        KVCapsuleLlama(tmp_path / "no.gguf")
    with pytest.raises(ValueError, match="needs a vision projector"):
        KVCapsuleLlama(write_model(tmp_path / "tiny.gguf"), capsule=tmp_path / "c.gguf")
    for wrong, words in (({"ratio": 2.0}, "ratio: 2.0 is not a number above 0 and up to 1"), ({"quality": 0}, "quality: 0 is not a number above 0"), ({"quality": 1.0, "capsule": "off"}, "leave one of them out"), ({"ratio": float("nan")}, "ratio: nan"), ({"hot": -1}, "hot: -1 is below 0")):
        with pytest.raises(ValueError, match=words):
            ours(folder, **wrong)
    (tmp_path / "damaged.gguf").write_bytes((folder / "llama" / "lossless.gguf").read_bytes()[:5000])
    with pytest.raises(native.CapsuleError, match="damaged"):
        ours(folder, capsule=tmp_path / "damaged.gguf")
    with ours(folder, n_ctx=256) as llm:
        good = content(llm.create_chat_completion([user("?", folder / "a.png")], temperature=0, max_tokens=8))
        for bad, words in ((tmp_path / "broken.png", "not a picture"), ("data:image/png;base64,!!", "base64"), ("file:///etc/passwd", "data: or http"), ("/etc/passwd", "data: or http")):
            with pytest.raises(ValueError, match=words):
                llm.create_chat_completion([user("?", bad)])
        with pytest.raises(ValueError, match=r"Requested tokens \(\d+\) exceed context window of 256"):
            llm.create_chat_completion([user("x" * 300)])
        with pytest.raises(ValueError, match="not found in tools"):
            llm.create_chat_completion([user("?")], tools=[TOOL], tool_choice={"type": "function", "function": {"name": "no"}})
        assert content(llm.create_chat_completion([user("?", folder / "a.png")], temperature=0, max_tokens=8)) == good
        full = llm.create_chat_completion([user("?", folder / "a.png")])
        assert full["choices"][0]["finish_reason"] == "length"


def test_kinds_of_pictures_that_llama_cpp_does_not_read(folder: Path) -> None:
    from PIL import Image

    data = io.BytesIO()
    Image.open(folder / "a.png").save(data, "WEBP", lossless=True)
    webp = "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
    with ours(folder) as llm:
        answers = [content(llm.create_chat_completion([user("?", picture)], temperature=0, max_tokens=8)) for picture in (folder / "a.png", webp)]
    assert answers[0] == answers[1]


# --- from_pretrained ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A repository user/repo with the tiny model; what was fetched."""
    import huggingface_hub

    files = {"tiny-Q8_0.gguf": "tiny.gguf", "mmproj-tiny-Q8_0.gguf": "mmproj-tiny.gguf", "kvcapsule-tiny.gguf": "kvcapsule-tiny.gguf"}
    fetched: list[str] = []

    def download(repo: str, name: str, **where: str) -> str:
        assert repo == "user/repo"
        fetched.append(name)
        target = Path(where.get("local_dir", tmp_path / "hub")) / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((folder / "llama" / files[name]).read_bytes() if name in files else b"{}")
        return str(target)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo, **_: [*files, "tiny-F16.gguf", "config.json"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return fetched


def test_from_pretrained_brings_projector_and_capsule(folder: Path, tmp_path: Path, hub: list[str]) -> None:
    from kvcapsule_gguf import KVCapsuleLlama

    for options in ({}, {"local_dir": tmp_path / "here", "additional_files": ["config.json"]}):
        hub.clear()
        with KVCapsuleLlama.from_pretrained(repo_id="user/repo", filename="*Q8_0.gguf", n_ctx=512, n_threads=1, n_threads_batch=1, **options) as llm:
            llm.create_chat_completion([user("?", folder / "a.png")], max_tokens=2)
            assert sum(llm.image_stats()[0].slots.values()) == 1
        assert set(hub) == {"tiny-Q8_0.gguf", "mmproj-tiny-Q8_0.gguf", "kvcapsule-tiny.gguf", *options.get("additional_files", [])}
    assert (tmp_path / "here" / "tiny-Q8_0.gguf").is_file()
    for pattern, words in (("*.gguf", "Multiple files"), ("*Q2_K.gguf", "No file")):
        with pytest.raises(ValueError, match=words):
            KVCapsuleLlama.from_pretrained("user/repo", pattern)


def test_from_pretrained_of_a_folder(folder: Path) -> None:
    from kvcapsule_gguf import KVCapsuleLlama

    with KVCapsuleLlama.from_pretrained(str(folder / "llama"), "tiny.gguf", capsule="off", n_ctx=512, n_threads_batch=1) as llm:
        assert llm.mmproj == folder / "llama" / "mmproj-tiny.gguf"
        assert json.dumps(content(llm.create_chat_completion([user("?", folder / "a.png")], max_tokens=3)))


def test_the_package_is_typed_and_light() -> None:
    import kvcapsule_gguf

    assert (Path(kvcapsule_gguf.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError):
        _ = kvcapsule_gguf.nothing


def test_a_template_that_only_knows_text(folder: Path, tmp_path: Path) -> None:
    """It is given text, where the other handler would print a list into the prompt."""
    from kvcapsule_gguf import KVCapsuleLlama

    model = write_model(tmp_path / "tiny.gguf")
    with ours(folder, capsule="off") as a, KVCapsuleLlama(model, mmproj=folder / "llama" / "mmproj-tiny.gguf", n_ctx=1024, n_threads=1, n_threads_batch=1) as b:
        answers = [content(llm.create_chat_completion([user("?", folder / "a.png")], temperature=0, max_tokens=8)) for llm in (a, b)]
        assert answers[0] == answers[1] and a.prompt_stats().tokens_evaluated == b.prompt_stats().tokens_evaluated
