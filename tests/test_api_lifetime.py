"""The Python API as a part of somebody's program: what it prints, threads, closing, garbage collection, the end of the process."""

from __future__ import annotations

import base64
import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, library
from test_native import require_capsules

DEMO = ROOT / "kvcapsule_gguf" / "demo"
MODEL = DEMO / "kvdemo-8M-v1-F16.gguf"

# ask(llm, n) -> the word that is written in scene n
HEAD = f"""
import base64, gc, os, sys, threading
from pathlib import Path
from kvcapsule_gguf import KVCapsuleChatHandler, KVCapsuleLlama
DEMO = Path({str(DEMO)!r})
MODEL = DEMO / {MODEL.name!r}

def messages(n, text="What is at the top right?"):
    url = "data:image/jpeg;base64," + base64.b64encode((DEMO / f"scene-{{n}}.jpg").read_bytes()).decode()
    return [dict(role="user", content=[dict(type="image_url", image_url=dict(url=url)), dict(type="text", text=text)])]

def ask(llm, n=1):
    return llm.create_chat_completion(messages(n), temperature=0, max_tokens=8)["choices"][0]["message"]["content"].strip()

def new(**options):
    return KVCapsuleLlama(MODEL, n_threads=1, n_threads_batch=1, **options)
"""


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    require_capsules()
    from kvcapsule_gguf import native

    native.load(library("patched"))


def run(code: str, head: str = HEAD, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "KVCAPSULE_LIB": str(library("patched")), **environment}
    return subprocess.run([sys.executable, "-c", head + code], env=env, capture_output=True, text=True, timeout=300)


# --- what is printed ---------------------------------------------------------------------------------------------------------------------------

ENDS = {
    "closed": "with new() as llm: print(ask(llm))",
    "left open": "llm = new(); print(ask(llm))",
    "in a cycle": "llm = new(); llm.me = llm; print(ask(llm)); del llm",
    "in a module": "import json; json.llm = new(); print(ask(json.llm))",
    "after a module": "from llama_cpp import mtmd_cpp; llm = new(); print(ask(llm)); mtmd_cpp.mtmd_free = None",
    "a stream that has begun": "llm = new(); print(ask(llm)); stream = llm.create_chat_completion(messages(1), stream=True); next(stream)",
    "a stream that has not": "llm = new(); print(ask(llm)); stream = llm.create_chat_completion(messages(1), stream=True); del llm",
    "a plain Llama": "from llama_cpp import Llama\nllm = Llama(str(MODEL), chat_handler=KVCapsuleChatHandler(str(DEMO / 'mmproj-kvdemo-8M-v1-F16.gguf')), n_ctx=1024, verbose=False)\nprint(ask(llm))",
    "sys.exit": "llm = new(); print(ask(llm)); sys.exit(0)",
    "another thread": "thread = threading.Thread(target=lambda: print(ask(new()))); thread.start()",
    "a thread that is left behind": "llm = new(); print(ask(llm)); threading.Thread(target=lambda: [ask(llm) for _ in range(9999)], daemon=True).start()",
}


@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_printed_not_even_at_the_end(end: str) -> None:
    result = run(ENDS[end])
    assert (result.returncode, result.stdout, result.stderr) == (0, "yellow star\n", "")


def test_a_constructor_that_fails_leaves_no_noise(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes([3, 0, 0, 0]) + bytes(40))
    result = run(f"""
for arguments, options in (((), {{}}), ((MODEL,), dict(nonsense=1, n_ctx="x")), (({str(tmp_path / "x.gguf")!r},), {{}}), ((MODEL,), dict(chat_format="chatml"))):
    try:
        KVCapsuleLlama(*arguments, **options)
    except (TypeError, ValueError) as error:
        print(type(error).__name__)
""")
    assert (result.returncode, result.stdout.split(), result.stderr) == (0, ["TypeError", "TypeError", "ValueError", "ValueError"], "")


def test_without_a_file_the_built_in_capsule_is_used_and_one_line_says_so(tmp_path: Path) -> None:
    """It can be silenced."""
    for name in (MODEL.name, "mmproj-kvdemo-8M-v1-F16.gguf"):
        shutil.copy(DEMO / name, tmp_path)  # a link would lead back to its capsule
    code = f"print(ask(KVCapsuleLlama(Path({str(tmp_path)!r}) / MODEL.name, n_threads=1, n_threads_batch=1, **OPTIONS)))"
    line = "capsule: built in, quality 1; one from kvcapsule-train saves more\n"
    for options, expected in (("{}", line), ("{'quality': 0.6}", line.replace("quality 1", "quality 0.6")), ("{'capsule': 'off'}", ""), ("{'capsule': 'built-in'}", ""), ("{}; import logging; logging.getLogger('kvcapsule_gguf').setLevel('ERROR')", "")):
        result = run(f"OPTIONS = {options}\n{code}")
        assert (result.returncode, result.stdout, result.stderr) == (0, "yellow star\n", expected)


def test_verbose_shows_the_log() -> None:
    result = run("with new(verbose=True) as llm: print(ask(llm))")
    assert result.stdout == "yellow star\n" and "clip" in result.stderr and "llama_context" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_is_never_lost() -> None:
    """Nearly all of the time goes into pictures, in native code: no callback of Python is there to raise KeyboardInterrupt in."""
    code = """
with new() as llm:
    ask(llm, 1), print("ready", flush=True)
    left, n = 6, 1
    while left:
        try:
            n = n % 4 + 1
            ask(llm, n)
        except KeyboardInterrupt:
            left -= 1
            print("caught", flush=True)
    print(ask(llm, 1))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "KVCAPSULE_LIB": str(library("patched"))}
    with subprocess.Popen([sys.executable, "-c", HEAD + code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        end = threading.Timer(200, process.kill)  # a signal that is lost is waited for until then
        end.start()
        lines = [process.stdout.readline()]
        for delay in (0.1, 0.35, 0.2, 0.5, 0.05, 0.3):
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            lines.append(process.stdout.readline())
        out, err = process.communicate()
        end.cancel()
    assert ("".join(lines) + out, err) == ("ready\n" + "caught\n" * 6 + "yellow star\n", "")


# --- threads -----------------------------------------------------------------------------------------------------------------------------------


def test_several_objects_in_threads() -> None:
    """Each loads, answers rightly and closes, again and again; all the while stdout and stderr are what they were."""
    result = run("""
answers = [None, "yellow star", "blue square", None, None]
before = [os.fstat(fd) for fd in (1, 2)], sys.stdout, sys.stderr
wrong = []
expected = {}
with new() as llm:
    expected = {n: ask(llm, n) for n in (1, 2, 3, 4)}

def work(k):
    for turn in range(4):
        n = 1 + (k + turn) % 4
        with new(capsule="auto" if turn % 2 else "off") as llm:
            if ([os.fstat(fd) for fd in (1, 2)], sys.stdout, sys.stderr) != before or ask(llm, n) != expected[n]:
                wrong.append((k, turn))

threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
os.write(1, b"out\\n"), os.write(2, b"err\\n"), print(wrong, len(set(expected.values())) > 1)
""")
    assert (result.returncode, result.stdout, result.stderr) == (0, "out\n[] True\n", "err\n")


@pytest.mark.parametrize("made_in", ["thread", "main"])
def test_ctrl_c_in_the_main_thread_spoils_no_answer_of_another(made_in: str) -> None:
    """The flag that stops native code is one for the process. A thread may get an error where the main one has made its Llama, never another answer."""
    from kvcapsule_gguf.runtime import interrupts

    answers: list[str] = []

    def work(llm: Any) -> None:
        llm = llm or new()
        interrupts._stop[0] = b"\1"
        try:
            answers.append(ask(llm))
        except (RuntimeError, ValueError) as error:
            answers.append(type(error).__name__)
        finally:
            interrupts._stop[0] = b"\0"

    llm = new() if made_in == "main" else None
    if llm is not None:
        assert ask(llm, 2)
    thread = threading.Thread(target=work, args=(llm,))
    thread.start(), thread.join()
    assert answers == ["yellow star"] if made_in == "thread" else answers in (["yellow star"], ["RuntimeError"], ["ValueError"])


def test_the_environment_is_hidden_until_the_last_thread_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcapsule_gguf.api.llama import _environment, _without_environment

    monkeypatch.setenv("LLAMA_KVCAPSULE", "c.gguf")
    first, second = _without_environment(), _without_environment()
    first.__enter__(), second.__enter__()
    assert "LLAMA_KVCAPSULE" not in os.environ and _environment() == {"LLAMA_KVCAPSULE": "c.gguf"}
    first.__exit__(None, None, None)
    assert "LLAMA_KVCAPSULE" not in os.environ
    second.__exit__(None, None, None)
    assert os.environ["LLAMA_KVCAPSULE"] == "c.gguf"


# --- one object, used in all ways --------------------------------------------------------------------------------------------------------------


def new(**options: Any) -> Any:
    from kvcapsule_gguf import KVCapsuleLlama

    return KVCapsuleLlama(MODEL, n_threads=1, n_threads_batch=1, **options)


def messages(n: int) -> list[dict[str, Any]]:
    url = "data:image/jpeg;base64," + base64.b64encode((DEMO / f"scene-{n}.jpg").read_bytes()).decode()
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is at the top right?"}]}]


def ask(llm: Any, n: int = 1) -> str:
    return llm.create_chat_completion(messages(n), temperature=0, max_tokens=8)["choices"][0]["message"]["content"].strip()


def test_a_closed_llama_says_so() -> None:
    llm = new()
    stream, late = (llm.create_chat_completion(messages(1), stream=True) for _ in range(2))
    llm.close(), llm.close()
    with pytest.raises(ValueError, match="this Llama is closed"):
        ask(llm)
    for chunks in (stream, late):
        with pytest.raises(RuntimeError, match="closed"):
            list(chunks)


def test_a_stream_that_has_not_begun_is_overtaken_too() -> None:
    with new() as llm:
        stream = llm.create_chat_completion(messages(1), stream=True)
        assert ask(llm, 2)
        with pytest.raises(RuntimeError, match="another request"):
            next(stream)


@pytest.mark.parametrize("stream", [False, True])
def test_another_thread_in_the_middle_of_an_answer_is_refused(stream: bool) -> None:
    with new() as llm:
        inside, go_on, answers = threading.Event(), threading.Event(), []
        evaluate = llm.eval

        def slow(tokens: Any) -> None:
            inside.set()
            go_on.wait(60)
            evaluate(tokens)

        def first() -> None:
            answer = llm.create_chat_completion(messages(1), temperature=0, max_tokens=8, stream=stream)
            parts = [chunk["choices"][0]["delta"].get("content") or "" for chunk in answer] if stream else [answer["choices"][0]["message"]["content"]]
            answers.append("".join(parts).strip())

        llm.eval = slow
        thread = threading.Thread(target=first)
        thread.start()
        try:
            assert inside.wait(60)
            llm.eval = evaluate
            with pytest.raises(RuntimeError, match="answering another thread"):
                ask(llm, 2)
        finally:
            go_on.set()
            thread.join()
        assert answers == ["yellow star"] and ask(llm) == "yellow star"


USES = {
    "__call__": lambda llm: llm("hello", max_tokens=1), "create_completion": lambda llm: llm.create_completion("hello", max_tokens=1), "create_chat_completion": lambda llm: ask(llm, 2),
    "create_embedding": lambda llm: llm.create_embedding("hello"), "embed": lambda llm: llm.embed("hello"), "eval": lambda llm: llm.eval([1]), "sample": lambda llm: llm.sample(),
    "generate": lambda llm: next(llm.generate([1, 2])), "reset": lambda llm: llm.reset(), "save_state": lambda llm: llm.save_state(), "load_state": lambda llm: llm.load_state(STATE[0]),
}  # fmt: skip
STATE: list[Any] = []


def in_a_thread(work: Any) -> Any:
    """What it returns, or the exception."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start(), thread.join()
    return found[0]


def refuses_all(llm: Any, closes: bool = True) -> None:
    """In a thread of its own."""
    for name, use in (*USES.items(), *([("close", lambda llm: llm.close())] if closes else [])):
        answer = in_a_thread(partial(use, llm))
        assert isinstance(answer, RuntimeError) and "another thread" in str(answer), (name, answer)


def test_whatever_uses_the_context_is_refused_in_the_middle_of_an_answer() -> None:
    """The thread that is being answered may do all of it, as callbacks do."""
    with new() as llm:
        assert ask(llm) == "yellow star"
        STATE[:] = [llm.save_state()]

        def look(ids: Any, logits: Any) -> Any:
            refuses_all(llm)
            assert in_a_thread(lambda: llm.tokenize(b"hello"))  # which needs the vocabulary only
            assert llm.save_state().n_tokens
            return logits

        answer = llm.create_chat_completion(messages(1), temperature=0, max_tokens=2, logits_processor=[look])
        assert answer["usage"]["completion_tokens"] == 2
        for use in USES.values():
            assert "another thread" not in str(in_a_thread(partial(use, llm)))  # one after the other
        assert ask(llm) == "yellow star"


STREAMS = {
    "a chat": lambda llm: llm.create_chat_completion(messages(1), temperature=0, max_tokens=8, stream=True),
    "a completion": lambda llm: llm("hello", max_tokens=8, stream=True),
    "tokens": lambda llm: llm.generate([1, 2, 3]),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_counts_until_it_ends_or_is_closed(kind: str) -> None:
    with new() as llm:
        assert ask(llm) == "yellow star"
        STATE[:] = [llm.save_state()]
        for begun in (False, True):
            for end in ("closed", "dropped", "failed", "overtaken"):
                stream = STREAMS[kind](llm)
                if begun:
                    next(stream)
                llm.save_state()  # the same thread may, and the stream goes on
                refuses_all(llm, closes=False)
                if end == "closed":
                    stream.close()
                elif end == "dropped":
                    del stream
                elif end == "failed":
                    with pytest.raises(ZeroDivisionError):
                        stream.throw(ZeroDivisionError())
                else:
                    llm.reset()
                    with pytest.raises(RuntimeError, match="another request"):
                        next(stream)
                assert in_a_thread(lambda: ask(llm)) == "yellow star", (begun, end)
        # web servers read each part in the next free thread
        stream, parts = STREAMS[kind](llm), 0
        while not isinstance(in_a_thread(lambda: next(stream, None)), (Exception, type(None))) and parts < 2:
            parts += 1
        assert parts == 2
        assert isinstance(in_a_thread(llm.close), type(None))  # a stream that nobody is reading ends with its Llama
        with pytest.raises(RuntimeError, match="closed"):
            next(stream)


def test_threads_that_do_not_care_get_right_answers_or_a_refusal() -> None:
    """Without the guard this ends in a crash or a wrong answer."""
    with new() as llm:
        expected = {n: ask(llm, n) for n in (1, 2)}
        wrong: list[Any] = []

        def work(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(25):
                n, kind = rng.choice((1, 2)), rng.randrange(4)
                try:
                    if kind == 0 and ask(llm, n) != expected[n]:
                        wrong.append(n)
                    if kind == 1:
                        parts = llm.create_chat_completion(messages(n), temperature=0, max_tokens=8, stream=True)
                        if "".join(part["choices"][0]["delta"].get("content") or "" for part in parts).strip() != expected[n]:
                            wrong.append(-n)
                    if kind == 2:
                        llm.reset()
                    if kind == 3:
                        llm("hello", max_tokens=2)
                except RuntimeError as error:
                    if "another thread" not in str(error):
                        wrong.append(error)
                time.sleep(rng.random() / 100)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong and ask(llm) == expected[1]


def test_what_is_said_of_one_model_is_not_told_of_another(tmp_path: Path) -> None:
    """llama.cpp has one log for the process: here a model cannot be loaded, and another one, in the same thread or in another, goes on."""
    from llama_cpp import llama_cpp

    from kvcapsule_gguf.api.quiet import reasons

    def fail(name: str) -> None:
        assert not llama_cpp.llama_model_load_from_file(str(tmp_path / name).encode(), llama_cpp.llama_model_default_params())

    with new() as llm:
        assert ask(llm) == "yellow star"
        with reasons() as outer:
            fail("first.gguf")
            with reasons() as inner:
                fail("second.gguf")
                in_a_thread(lambda: ask(llm))  # which listens for itself, and stops
                assert "first" not in (said := inner.take()) and "second" in said
            fail("third.gguf")
            assert "first" in outer.take() and not inner.take()
        assert llm.chat_handler._contents.engine.log.take() == ""
        with reasons() as later:
            assert later.take() == ""


def test_a_handler_is_for_one_llama() -> None:
    with new() as llm:
        assert ask(llm) == "yellow star"
        with new(chat_handler=llm.chat_handler) as other, pytest.raises(ValueError, match="is for one Llama"):
            ask(other)
        assert ask(llm) == "yellow star"


def test_it_is_freed_with_its_last_reference() -> None:
    """A model may have many GB: that must not wait for the collector of cycles."""
    gc.collect()
    gc.disable()
    try:
        llm = new()
        assert ask(llm) == "yellow star"
        gone = weakref.ref(llm)
        del llm
        assert gone() is None
    finally:
        gc.enable()


def test_an_exception_in_the_middle_leaves_a_llama_that_answers() -> None:
    """In the user's own code while an answer is generated, in the projector, in the decoder, in the middle of a stream."""
    class Stop(Exception):
        pass

    def fail(*arguments: Any, **options: Any) -> Any:
        raise Stop

    with new() as llm:
        expected = {n: ask(llm, n) for n in (1, 2)}
        mtmd = llm.chat_handler._contents.engine.native.mtmd
        for owner, name in ((mtmd, "mtmd_helper_eval_chunk_single"), (llm, "eval"), (llm, "sample")):
            with pytest.MonkeyPatch.context() as context:
                context.setattr(owner, name, fail)
                with pytest.raises(Stop):
                    ask(llm, 1)
            assert {n: ask(llm, n) for n in (1, 2)} == expected
        for _ in llm.create_chat_completion(messages(1), stream=True):
            break
        assert ask(llm, 2) == expected[2]
        with pytest.raises(Stop):
            for _ in llm.create_chat_completion(messages(1), stream=True):
                fail()
        assert ask(llm, 1) == expected[1]


def test_text_needs_no_projector(tmp_path: Path) -> None:
    from kvcapsule_gguf import KVCapsuleLlama

    shutil.copy(MODEL, tmp_path)
    with KVCapsuleLlama(tmp_path / MODEL.name, n_threads=1, n_threads_batch=1) as llm, new() as other:
        question = [{"role": "user", "content": "hello"}]
        replies = [each.create_chat_completion(question, temperature=0, max_tokens=8) for each in (llm, other)]
        assert replies[0]["choices"][0]["message"] == replies[1]["choices"][0]["message"] and replies[0]["usage"] == replies[1]["usage"]
        with pytest.raises(ValueError, match="pictures need a vision projector"):
            ask(llm)


@pytest.mark.parametrize("model", ["kvdemo-8M-v1-F16.gguf", "mrope/kvdemo-mrope-8M-v1-F16.gguf"])
def test_whatever_came_before_an_answer_is_that_of_a_fresh_llama(model: str, tmp_path: Path) -> None:
    """Forty uses in random order: questions, streams left early, exceptions, forms, plain completions, states, resets, another Llama that comes and goes."""
    from kvcapsule_gguf import KVCapsuleLlama

    class Stop(Exception):
        pass

    def fail(*arguments: Any, **options: Any) -> Any:
        raise Stop

    scenes = sorted((DEMO / model).parent.glob("scene-*.jpg"))
    parts = [{"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()}} for path in scenes]
    questions = [[{"role": "user", "content": [part, {"type": "text", "text": text}]}] for part in parts[:2] for text in ("What is at the top right?", "What does the word say?")]
    questions += [[*questions[0], {"role": "assistant", "content": "red"}, *questions[2]], [{"role": "user", "content": "hello"}]]

    def make(**options: Any) -> Any:
        return KVCapsuleLlama(DEMO / model, n_threads=1, n_threads_batch=1, **options)

    def answer(llm: Any, question: list[Any], **options: Any) -> str:
        return llm.create_chat_completion(question, temperature=0, max_tokens=8, **options)["choices"][0]["message"]["content"]

    expected = []
    for question in questions:
        with make() as fresh:
            expected.append(answer(fresh, question))
    assert len(set(expected)) > 3

    rng = random.Random(5)
    states: list[Any] = []
    with make(image_cache=tmp_path / "cache") as llm:

        def leave_early(question: list[Any]) -> None:
            stream = llm.create_chat_completion(question, temperature=0, max_tokens=8, stream=True)
            for _ in range(rng.randrange(4)):
                next(stream)
            if rng.random() < 0.5:
                stream.close()

        def interrupt(question: list[Any]) -> None:
            name = rng.choice(["eval", "sample", "create_completion"])
            with pytest.MonkeyPatch.context() as context:
                context.setattr(llm, name, fail)
                with pytest.raises(Stop):
                    answer(llm, question)

        def come_and_go(question: list[Any]) -> None:
            with make(capsule="off") as other:
                assert answer(other, [{"role": "user", "content": "hello"}])

        def save_and_load(question: list[Any]) -> None:
            states.append(llm.save_state())
            llm.load_state(rng.choice(states))

        uses = [
            leave_early, leave_early, interrupt, interrupt, come_and_go, save_and_load,
            lambda question: answer(llm, question, response_format={"type": "json_object"}),
            lambda question: answer(llm, question, logprobs=None, stop=["e"]),
            lambda question: llm("hello there", max_tokens=3),
            lambda question: llm.reset(),
            lambda question: gc.collect(),
        ]  # fmt: skip
        for turn in range(40):
            use = rng.choice(uses)
            use(rng.choice(questions))
            n = rng.randrange(len(questions))
            assert answer(llm, questions[n]) == expected[n], f"turn {turn}"
