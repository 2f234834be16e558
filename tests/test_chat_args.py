"""The command line of kvcapsule-chat and its environment twins."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcapsule_gguf.chat.args import parse


def test_defaults_and_model_positional_or_flag() -> None:
    for argv in (["m.gguf"], ["-m", "m.gguf"], ["--model", "m.gguf"]):
        options = parse(argv, {})
        assert options.model == Path("m.gguf")
        assert (options.capsule, options.n_predict, options.n_ctx, options.n_hot, options.ratio, options.json) == ("auto", -1, None, 0, None, False)


def test_every_flag() -> None:
    options = parse(
        ["m.gguf", "-mm", "p.gguf", "--capsule", "c.gguf", "--image", "a.png,b.png", "--image", "c.png", "-p", "why?", "-sys", "be brief", "-n", "7", "-c", "0", "--hot", "256"]
        + ["-ngl", "99", "-t", "3", "-b", "64", "-ub", "32", "-fa", "off", "-ctk", "q8_0", "-ctv", "q4_0", "--temp", "0", "--top-k", "1", "--top-p", "0.5", "-s", "42"]
        + ["--ratio", "0.6", "--json", "-v"],
        {},
    )
    assert options.images == ["a.png", "b.png", "c.png"]
    assert (options.mmproj, options.capsule, options.prompt, options.system) == (Path("p.gguf"), "c.gguf", "why?", "be brief")
    assert (options.n_predict, options.n_ctx, options.n_hot, options.n_gpu_layers, options.threads, options.n_batch, options.n_ubatch) == (7, 0, 256, 99, 3, 64, 32)
    assert (options.flash_attn, options.cache_type_k, options.cache_type_v, options.temp, options.top_k, options.top_p, options.seed) == ("off", "q8_0", "q4_0", 0, 1, 0.5, 42)
    assert (options.ratio, options.json, options.verbose) == (0.6, True, True)


def test_devices() -> None:
    options = parse(["m", "-dev", "Vulkan0", "--rpc", "host:1,host:2", "-nkvo"], {})
    assert (options.device, options.rpc, options.kv_offload) == ("Vulkan0", "host:1,host:2", False)
    assert (parse(["m"], {}).device, parse(["m"], {}).rpc, parse(["m"], {}).kv_offload) == (None, None, True)
    assert parse(["m"], {"LLAMA_ARG_DEVICE": "none", "LLAMA_ARG_RPC": "h:1"}).device == "none"
    assert parse(["--list-devices"], {}).list_devices, "without a model"


def test_texts_come_from_files(tmp_path: Path) -> None:
    """As llama-cli reads them: without the last end of line."""
    for name, text in (("ask", "why?\n"), ("be", "brief\n\n"), ("t", "{{ x }}")):
        (tmp_path / name).write_text(text)
    options = parse(["m", "-f", str(tmp_path / "ask"), "-sysf", str(tmp_path / "be"), "--chat-template-file", str(tmp_path / "t")], {})
    assert (options.prompt, options.system, options.chat_template) == ("why?", "brief\n", "{{ x }}")


def test_flags_of_llama_cli() -> None:
    options = parse(["-hf", "u/r", "--offline", "-hft", "secret", "--no-mmproj", "-tb", "3", "-lm", "mlock", "--min-p", "0.1", "--repeat-penalty", "1.1", "--repeat-last-n", "9"], {})
    assert (options.offline, options.hf_token, options.use_mmproj, options.threads_batch, options.load_mode) == (True, "secret", False, 3, "mlock")
    assert (options.min_p, options.repeat_penalty, options.repeat_last_n) == (0.1, 1.1, 9)


def test_without_a_model_a_line_says_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    """With a model that is there, so that it works as it stands."""
    with pytest.raises(SystemExit):
        parse([], {})
    command = capsys.readouterr().err.partition("such as: kvcapsule-chat ")[2].split(" (see")[0]
    assert parse([command], {}).model == Path(command) and Path(command).is_file()


def test_a_data_url_keeps_its_comma() -> None:
    assert parse(["m", "--image", "data:image/png;base64,AA=="], {}).images == ["data:image/png;base64,AA=="]


def test_the_environment_gives_defaults_and_flags_win() -> None:
    environ = {"LLAMA_ARG_MODEL": "e.gguf", "LLAMA_ARG_CTX_SIZE": "512", "LLAMA_ARG_HOT": "256", "LLAMA_ARG_CAPSULE": "off", "LLAMA_ARG_FLASH_ATTN": "on", "LLAMA_ARG_TOP_K": ""}
    options = parse(["-c", "1024"], environ)
    assert (options.model, options.n_ctx, options.n_hot, options.capsule, options.flash_attn, options.top_k) == (Path("e.gguf"), 1024, 256, "off", "on", 40)
    assert parse(["other.gguf"], environ).model == Path("other.gguf")
    assert parse(["-hf", "u/r"], environ).model is None
    assert parse(["-m", "other.gguf"], {"LLAMA_ARG_HF_REPO": "u/r"}).hf_repo is None


def test_the_variables_for_unmodified_programs_mean_the_same() -> None:
    environ = {"LLAMA_KVCAPSULE": "c.gguf", "LLAMA_KVCAPSULE_HOT": "512"}
    assert (parse(["m"], environ).capsule, parse(["m"], environ).n_hot) == ("c.gguf", 512)
    assert (parse(["m", "--capsule", "off", "--hot", "256"], environ).capsule, parse(["m", "--hot", "256"], environ).n_hot) == ("off", 256)


@pytest.mark.parametrize(
    "argv",
    [[], ["m", "-hf", "a/b"], ["m", "-c", "-5"], ["m", "-n", "many"], ["m", "--ratio", "1.5"], ["m", "-fa", "maybe"], ["m", "-ctk", "q9"], ["m", "--nope"], ["m", "--temp", "-1"], ["m", "-st", "7"], ["m", "--see", "7"], ["m", "-t4"], ["m", "--image", ""], ["m", "-f", "/no/such/file"], ["m", "--repeat-penalty", "0"], ["m", "-lm", "fast"]],
)
def test_mistakes_are_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(argv, {})
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("kvcapsule-chat: error: ")


def test_a_mistake_in_the_environment_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["m"], {"LLAMA_ARG_CTX_SIZE": "big"})
    assert "ctx-size" in capsys.readouterr().err


def test_help_names_flags_and_variables(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], {})
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for text in ("--capsule", "--hot", "--ratio", "LLAMA_ARG_CAPSULE", "LLAMA_ARG_MMPROJ", "--image", "-ngl"):
        assert text in out
