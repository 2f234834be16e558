"""kvcapsule-chat from end to end, on tiny models that answer nonsense."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_model import PATCH, TEMPLATE, TOKENS, write_mmproj, write_model, write_picture
from conftest import ROOT, library

FIELDS = {
    "answer", "finish_reason", "prompt_tokens", "vision_tokens", "generated_tokens", "kv_bytes_f16_equivalent", "kv_bytes", "kv_bytes_allocated", "kv_ratio",
    "tokens_evaluated", "tokens_reused", "images_encoded", "images_from_disk", "slots", "prefill_s", "compress_s", "decode_tokens_per_s", "capsule", "images",
}  # fmt: skip
F16_TOKEN = 2 * 2 * 2 * 64 * 2  # K and V, layers, heads, head size, bytes
Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its projector, one for each arch, and pictures."""
    root = tmp_path_factory.mktemp("chat")
    for arch in ("llama", "qwen2vl"):
        (root / arch).mkdir()
        write_model(root / arch / "tiny.gguf", arch=arch)
        write_mmproj(root / arch / "mmproj-tiny.gguf", arch=arch)
    write_picture(root / "a.png")
    write_picture(root / "b.jpg", seed=4, size=(4 * 2 * PATCH, 4 * 2 * PATCH))  # 16 tokens of Qwen2-VL
    return root


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "kvcapsule_gguf.chat.cli", *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA_", "KVCAPSULE_LIB"))}
    return {**kept, "PYTHONPATH": str(ROOT), "KVCAPSULE_LIB": str(library("patched")), **changes}


@pytest.fixture(scope="session")
def chat() -> Run:
    def run(*arguments: str | Path, stdin: str | bytes = b"", env: dict[str, str] = {}) -> subprocess.CompletedProcess:  # noqa: B006
        data = stdin.encode() if isinstance(stdin, str) else stdin
        result = subprocess.run(command(*arguments, "--temp", "0", "-t", "1"), input=data, env=environment(**env), capture_output=True, timeout=120)
        result.stdout, result.stderr = result.stdout.decode(), result.stderr.decode()
        return result

    return run


def refused(result: subprocess.CompletedProcess, *words: str, status: int = 1) -> None:
    """One line on stderr, nothing on stdout."""
    assert result.returncode == status, result.stderr
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("kvcapsule-chat: error: "), result.stderr
    for word in words:
        assert word in lines[0]


# --- answers ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "qwen2vl"])
def test_stdout_is_the_answer_and_nothing_else(chat: Run, folder: Path, arch: str) -> None:
    arguments = (folder / arch / "tiny.gguf", "--image", folder / "a.png", "-p", "what is this?", "-n", "12", "--capsule", "off")
    result = chat(*arguments)
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.endswith("\n") and len(result.stdout.strip()) == 12
    assert chat(*arguments).stdout == result.stdout
    assert chat(*arguments[:2], folder / "b.jpg", *arguments[3:]).stdout != result.stdout


def test_penalties_and_a_projector_that_is_not_wanted(chat: Run, folder: Path) -> None:
    """With a large penalty no letter of an answer comes again; the usual answer has some twice."""
    arguments = folder / "llama" / "tiny.gguf", "--no-mmproj", "-p", "hello", "-n", "16"
    usual, apart = (chat(*arguments, *more).stdout.strip() for more in ((), ("--repeat-penalty", "50")))
    assert len(set(usual)) < len(usual) == 16 == len(apart) == len(set(apart))
    refused(chat(*arguments, "--image", folder / "a.png"), "pictures need a vision projector")


def test_a_chat_template_of_ones_own(chat: Run, folder: Path, tmp_path: Path) -> None:
    """It is used: one that is the model's own changes nothing, another one does."""
    (tmp_path / "same").write_text(TEMPLATE)
    arguments = folder / "llama" / "tiny.gguf", "-p", "hello", "-n", "12"
    own, same, other = (chat(*arguments, *more).stdout for more in ((), ("--chat-template-file", tmp_path / "same"), ("--chat-template", "{{ messages[0]['content'] }}:")))
    assert own == same != other
    refused(chat(*arguments, "--chat-template", "{% for %}"), "cannot be read")


def test_text_without_a_projector(chat: Run, tmp_path: Path) -> None:
    result = chat(write_model(tmp_path / "tiny.gguf"), "-p", "hello", "-n", "5")
    assert result.returncode == 0 and len(result.stdout.strip()) == 5


def test_json_has_its_fields(chat: Run, folder: Path) -> None:
    result = chat(folder / "llama" / "tiny.gguf", "--image", f"{folder / 'a.png'},{folder / 'b.jpg'}", "-p", "what?", "-n", "6", "--json", "--capsule", "off")
    report = json.loads(result.stdout)
    assert report.keys() == FIELDS and result.stdout.count("\n") == 1
    assert (report["vision_tokens"], report["generated_tokens"], report["finish_reason"], report["capsule"]) == (2 * TOKENS, 6, "length", False)
    assert report["kv_bytes"] == report["kv_bytes_f16_equivalent"] == 2 * TOKENS * F16_TOKEN
    assert report["kv_ratio"] == 0 and report["slots"] == {}
    assert report["prompt_tokens"] > report["vision_tokens"] and report["decode_tokens_per_s"] > 0
    assert [image["tokens"] for image in report["images"]] == [TOKENS] * 2
    assert sum(image["kv_bytes"] for image in report["images"]) == report["kv_bytes"]


def test_a_quantized_cache_is_counted_as_such(chat: Run, folder: Path) -> None:
    result = chat(folder / "llama" / "tiny.gguf", "--image", folder / "a.png", "-p", "x", "-n", "1", "--json", "--capsule", "off", "-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on")
    report = json.loads(result.stdout)
    assert report["kv_bytes"] == TOKENS * F16_TOKEN * 8.5 / 16 and report["kv_ratio"] == round(1 - 8.5 / 16, 4)


@pytest.mark.parametrize("text", ["<__media__> hello", "<<__media__>> hello", "<<<__media__>__media__>>"])
def test_a_marker_in_the_users_words_is_text(chat: Run, folder: Path, text: str) -> None:
    """As many tokens as another text of its length: the model has a token for each byte."""
    for options in ((), ("--image", folder / "a.png")):
        reports = [json.loads(chat(folder / "llama" / "tiny.gguf", *options, "-p", words, "-n", "2", "--json").stdout) for words in (text, re.sub(r"\S", "x", text))]
        assert reports[0]["prompt_tokens"] == reports[1]["prompt_tokens"]


def test_the_picture_from_stdin_and_the_model_from_the_environment(chat: Run, folder: Path) -> None:
    by_path = chat(folder / "llama" / "tiny.gguf", "--image", folder / "a.png", "-p", "x", "-n", "6", "--capsule", "off")
    env = {"LLAMA_ARG_MODEL": str(folder / "llama" / "tiny.gguf"), "LLAMA_ARG_CAPSULE": "off", "LLAMA_ARG_N_PREDICT": "6"}
    assert chat("--image", "-", "-p", "x", stdin=(folder / "a.png").read_bytes(), env=env).stdout == by_path.stdout


def test_sampling_follows_the_seed(folder: Path) -> None:
    def run(seed: int) -> str:
        arguments = (folder / "llama" / "tiny.gguf", "-p", "x", "-n", "16", "--temp", "2", "--seed", str(seed), "-t", "1", "--capsule", "off")
        return subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True, timeout=120, check=True).stdout

    assert run(1) == run(1) != run(2)


def test_verbose_shows_the_log_on_stderr(chat: Run, folder: Path) -> None:
    result = chat(folder / "llama" / "tiny.gguf", "-p", "x", "-n", "2", "--capsule", "off", "-v")
    assert "llama_model_loader" in result.stderr and len(result.stdout.strip()) == 2


def test_a_local_folder_as_repository(chat: Run, folder: Path) -> None:
    result = chat("-hf", folder / "llama", "--image", folder / "a.png", "-p", "x", "-n", "3", "--capsule", "off")
    assert result.returncode == 0 and len(result.stdout.strip()) == 3


# --- a session -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "qwen2vl"])
def test_a_session_driven_by_stdin(chat: Run, folder: Path, arch: str) -> None:
    lines = [f"/image {folder / 'a.png'}", "what is this?", "and this?", "/stats", "/nonsense", "/image /no/such.png", "/help", "/clear", "alone", "/exit", "never asked"]
    result = chat(folder / arch / "tiny.gguf", "-n", "6", "--capsule", "off", stdin="\n".join(lines) + "\n")
    assert result.returncode == 1  # of the commands that failed
    assert [len(answer) for answer in result.stdout.splitlines()] == [6, 6, 6]
    for text in ("MiB before", "total", "unknown command /nonsense", "No such file", "/clear  ", "forgotten"):
        assert text in result.stderr


@pytest.mark.parametrize("arch", ["llama", "qwen2vl"])
def test_what_is_in_the_cache_is_not_evaluated_again(chat: Run, folder: Path, arch: str) -> None:
    """The second turn costs its own tokens only, and its answer is that of the whole conversation evaluated at once."""
    lines = f"/image {folder / 'b.jpg'}\nwhat is this?\nand?\n"
    result = chat(folder / arch / "tiny.gguf", "-n", "6", "--capsule", "off", "--json", stdin=lines)
    first, second = map(json.loads, result.stdout.splitlines())
    assert (first["vision_tokens"], second["vision_tokens"]) == (16, 0)
    # <|im_end|> <|im_start|> <|im_end|> <|im_start|>, and a token per byte of the rest
    assert second["prompt_tokens"] == 4 + len("\n" "user\nand?" "\n" "assistant\n")

    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from kvcapsule_gguf.chat import args
from kvcapsule_gguf.runtime.pictures import load
from kvcapsule_gguf.chat.engine import Engine, say
from kvcapsule_gguf.chat.session import Session
from kvcapsule_gguf.runtime.marker import MARKER
options = args.parse(sys.argv[1:], {{}})
with Engine(options, say) as engine:
    session = Session(engine, options)
    asked = MARKER + "what is this?"
    messages = [dict(role="user", content=asked), dict(role="assistant", content={first["answer"]!r}), dict(role="user", content="and?")]
    turn = session._fill(session.template.render(messages, True), [load({str(folder / "b.jpg")!r})])
    session._generate(turn, lambda text: None, False)
    print(turn.answer, turn.prompt_tokens)
"""
    arguments = [str(folder / arch / "tiny.gguf"), "-n", "6", "--capsule", "off", "--temp", "0", "-t", "1"]
    whole = subprocess.run([sys.executable, "-c", code, *arguments], env=environment(), capture_output=True, text=True, timeout=120)
    answer, n_tokens = whole.stdout.split()
    assert answer == second["answer"], whole.stderr
    assert int(n_tokens) == first["prompt_tokens"] + first["generated_tokens"] + second["prompt_tokens"]


def test_a_template_that_rewrites_the_past_still_answers(chat: Run, folder: Path, tmp_path: Path) -> None:
    last_two = TEMPLATE.replace("in messages", "in messages[-3:]")
    model = write_model(tmp_path / "tiny.gguf", template=last_two.replace("message['role'] }}", "message['role'] }}{{ loop.length }}"))
    write_mmproj(tmp_path / "mmproj-tiny.gguf")
    result = chat(model, "-n", "4", "--capsule", "off", "--json", stdin=f"/image {folder / 'a.png'}\none\ntwo\n")
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert [report["vision_tokens"] for report in reports] == [TOKENS, TOKENS], result.stderr
    assert len(reports[-1]["images"]) == 1


def test_an_error_in_a_session_does_not_end_it(chat: Run, folder: Path) -> None:
    """The context is 256 cells: the long question does not fit, the next one does."""
    result = chat(folder / "llama" / "tiny.gguf", "-c", "256", "-n", "4", "--capsule", "off", stdin="hello\n" + "x" * 300 + "\nagain\n")
    assert result.returncode == 1 and len(result.stdout.splitlines()) == 2
    assert result.stderr.count("error: the context is full") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("prompt", [True, False])
def test_ctrl_c_is_130(folder: Path, prompt: bool) -> None:
    arguments = command(folder / "llama" / "tiny.gguf", "-c", "4096", "--capsule", "off", "-t", "1", *(["-p", "talk"] if prompt else []))
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        if prompt:
            process.stdout.read(1)
        else:
            process.stderr.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err, err


# --- refusals --------------------------------------------------------------------------------------------------------------------------------


def test_bad_models_and_projectors(chat: Run, folder: Path, tmp_path: Path, models) -> None:
    model, picture = folder / "llama" / "tiny.gguf", folder / "a.png"
    refused(chat(tmp_path / "no.gguf", "-p", "x"), "no.gguf does not exist")
    (tmp_path / "text.gguf").write_text("hello")
    refused(chat(tmp_path / "text.gguf", "-p", "x"), "not a GGUF file")
    (tmp_path / "cut.gguf").write_bytes(model.read_bytes()[:200_000])
    refused(chat(tmp_path / "cut.gguf", "-p", "x"), "cut.gguf cannot be loaded")
    refused(chat(models(), "-p", "x"), "no vocabulary")
    refused(chat(tmp_path / "cut.gguf", "--image", picture, "-p", "x"), "vision projector")
    refused(chat(model, "--mmproj", tmp_path / "text.gguf", "-p", "x"), "text.gguf cannot be used with tiny.gguf")
    other = write_mmproj(tmp_path / "mmproj-wide.gguf", n_embd=128)
    refused(chat(model, "--mmproj", other, "--image", picture, "-p", "x"), "mmproj-wide.gguf cannot be used with tiny.gguf")
    refused(chat("-hf", "no such repo", "-p", "x"), "expected user/repo")
    refused(chat(model, "-p", "x", "-ctv", "q8_0", "-fa", "off", "--capsule", "off"), "the context cannot be created", "flash_attn")


def test_bad_pictures(chat: Run, folder: Path, tmp_path: Path) -> None:
    model = folder / "llama" / "tiny.gguf"
    (tmp_path / "text.png").write_text("hello")
    refused(chat(model, "--image", tmp_path / "text.png", "-p", "x"), "text.png: not a picture")
    refused(chat(model, "--image", tmp_path / "no.png", "-p", "x"), "no.png: No such file")
    refused(chat(model, "--image", "-"), "-p")


def test_a_capsule_needs_a_projector(chat: Run, tmp_path: Path) -> None:
    refused(chat(write_model(tmp_path / "tiny.gguf"), "--capsule", tmp_path / "kvcapsule-tiny.gguf", "-p", "x"), "a capsule needs a vision projector")


def test_a_missing_capsule(chat: Run, folder: Path, tmp_path: Path) -> None:
    result = chat(folder / "llama" / "tiny.gguf", "--capsule", tmp_path / "no.gguf", "-p", "x")
    refused(result, "no.gguf does not exist" if "no.gguf" in result.stderr else "scripts/setup")


def test_a_full_context(chat: Run, folder: Path) -> None:
    model = folder / "llama" / "tiny.gguf"
    refused(chat(model, "-c", "256", "-p", "x" * 300, "--capsule", "off"), "the context is full", "of 256 tokens", "-c")
    result = chat(model, "-c", "256", "-p", "x" * 200, "--capsule", "off", "--json")
    report = json.loads(result.stdout)
    assert report["finish_reason"] == "context" and report["prompt_tokens"] + report["generated_tokens"] == 256
    assert result.returncode == 0 and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_a_context_that_no_memory_holds(folder: Path) -> None:
    """The line says what it would take and which size makes sense. A limit stands for the memory that is not there."""
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (6 << 30,) * 2); from kvcapsule_gguf.chat import cli; sys.exit(cli.main())"
    n = 50_000_000
    for size, words in ((str(n), (f"{n} tokens take {n * F16_TOKEN / 2**30:.1f} GiB", "trained with 4096", "insufficient memory")), ("4000000000", ("-c/--ctx-size: 4000000000 is not between 0 and 2147483647",))):
        arguments = [str(folder / "llama" / "tiny.gguf"), "-c", size, "-p", "x", "--capsule", "off"]
        refused(subprocess.run([sys.executable, "-c", code, *arguments], env=environment(), capture_output=True, text=True, timeout=120), *words, status=1 if size == str(n) else 2)


def test_libraries_that_are_not_built(chat: Run, folder: Path, tmp_path: Path) -> None:
    refused(chat(folder / "llama" / "tiny.gguf", "-p", "x", env={"KVCAPSULE_LIB": str(tmp_path)}), "run scripts/setup")
