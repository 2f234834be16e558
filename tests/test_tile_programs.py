"""Capsules in the programs: files, the capsule that needs none, and what --quality and --ratio choose."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from chat_model import TOKENS, write_mmproj, write_model, write_picture
from conftest import ROOT
from make_capsule import LOSSLESS, random_capsule
from test_chat import F16_TOKEN, Run, chat, refused  # noqa: F401  (chat is a fixture)
from test_native import require_capsules


@pytest.fixture(scope="session", autouse=True)
def patched_library() -> None:
    require_capsules()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models without a capsule beside them; a picture is a tile of 4 x 4 tokens."""
    root = tmp_path_factory.mktemp("tiles")
    for arch in ("llama", "qwen2vl"):
        (root / arch).mkdir()
        model = write_model(root / arch / "tiny.gguf", arch=arch)
        write_mmproj(root / arch / "mmproj-tiny.gguf", arch=arch)
        random_capsule(model, root / arch / "lossless.gguf", tiers=LOSSLESS)
        random_capsule(model, root / arch / "tiers.gguf", tiers=[1, 2, 3, 4, 8])
    (root / "other").mkdir()
    write_model(root / "other" / "tiny.gguf", arch="xverse")
    write_mmproj(root / "other" / "mmproj-tiny.gguf")
    write_picture(root / "a.png", size=(112, 112))
    write_picture(root / "b.png", size=(112, 112), seed=4)
    return root


def report(chat: Run, folder: Path, *arguments: object, arch: str = "llama") -> dict:
    result = chat(folder / arch / "tiny.gguf", "--image", folder / "a.png", "-p", "what?", "-n", "4", "--json", *arguments)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return json.loads(result.stdout)


def sizes(slots: dict[str, int]) -> list[float]:
    assert all(re.fullmatch(r"\d+\.\d\dx", name) for name in slots)
    return [float(name[:-1]) for name in slots]


def test_auto_says_what_is_used_and_what_was_saved(chat: Run, folder: Path) -> None:
    """Without a file, without a flag: the figures of the line are those of --json."""
    ask = folder / "llama" / "tiny.gguf", "--image", folder / "a.png", "-p", "what?", "-n", "4", "--quality", "100"
    result = chat(*ask)
    (image,) = json.loads(chat(*ask, "--json").stdout)["images"]
    before, now = image["kv_bytes_f16_equivalent"], image["kv_bytes"]
    used, saved = result.stderr.splitlines()
    assert result.returncode == 0 and used == "capsule: built in, quality 100; one from kvcapsule-train saves more"
    assert saved.startswith(f"a.png: {TOKENS} tokens, {before / 2**20:.2f} -> {now / 2**20:.2f} MiB ({before / now:.1f}x), ") and before > 4 * now
    usual = chat(*ask[:-2]).stderr.splitlines()
    assert usual[0] == "capsule: built in, quality 1; one from kvcapsule-train saves more" and usual[1].startswith(f"a.png: {TOKENS} tokens, ")


def test_a_model_that_is_not_supported_goes_without_a_capsule(chat: Run, folder: Path) -> None:
    reason = "the architecture 'xverse' is not supported"
    ask = folder / "other" / "tiny.gguf", "--image", folder / "a.png", "-p", "what?", "-n", "4"
    plain, ours = chat(*ask, "--capsule", "off"), chat(*ask)
    assert (ours.returncode, ours.stdout) == (0, plain.stdout) and ours.stdout.strip()
    assert ours.stderr == f"kvcapsule-chat: no capsule, pictures stay uncompressed: {reason}\n"
    assert chat(*ask, env={"LLAMA_KVCAPSULE": "auto"}).stderr == ours.stderr
    refused(chat(*ask, "--capsule", "built-in"), reason)


def test_the_variables_for_other_programs_mean_the_same_here(chat: Run, folder: Path) -> None:
    """LLAMA_KVCAPSULE=auto is the built-in capsule, also where there is a file."""
    model = shutil.copytree(folder / "llama", folder / "with-file", dirs_exist_ok=True) / "tiny.gguf"
    shutil.copy(model.with_name("tiers.gguf"), model.with_name("kvcapsule-tiny.gguf"))
    ask = model, "--image", folder / "a.png", "-p", "what?", "-n", "2"

    def seen(*flags: object, **env: str) -> tuple[str, list[int]]:
        return chat(*ask, *flags, env=env).stderr.splitlines()[0], list(json.loads(chat(*ask, *flags, "--json", env=env).stdout)["slots"].values())

    assert seen()[0] == "capsule: kvcapsule-tiny.gguf, quality 1"
    assert seen(LLAMA_KVCAPSULE="auto", LLAMA_KVCAPSULE_QUALITY="100") == ("capsule: built in, quality 100; one from kvcapsule-train saves more", [1, *[0] * 6])
    assert seen(LLAMA_KVCAPSULE="auto", LLAMA_KVCAPSULE_RATIO="0.75") == ("capsule: built in, ratio 0.75; one from kvcapsule-train saves more", [0, 0, 0, 1, 0, 0, 0])
    assert seen("--quality", "100", LLAMA_KVCAPSULE="auto", LLAMA_KVCAPSULE_RATIO="0.75")[1] == [1, *[0] * 6], "the command line wins"
    assert not json.loads(chat(*ask, "--capsule", "off", "--json", env={"LLAMA_KVCAPSULE": "auto"}).stdout)["capsule"]


@pytest.mark.parametrize("flags, words", [
    (("--quality", "0"), "argument --quality: 0 is not a number above 0"), (("--ratio", "0"), "argument --ratio: 0 is not a number above 0"),
    (("--quality", "nan"), "--quality"), (("--ratio", "7"), "up to 1"), (("--quality", "0.5", "--capsule", "off"), "leave one of them out"),
    (("--ratio", "0.5", "--quality", "1"), "not both"),
])  # fmt: skip
def test_amounts_that_mean_nothing_are_refused(chat: Run, folder: Path, flags: tuple[str, ...], words: str) -> None:
    refused(chat(folder / "llama" / "tiny.gguf", "-p", "x", *flags), words, status=2)


def test_more_than_the_largest_ratio_is_refused(chat: Run, folder: Path) -> None:
    ask = folder / "llama" / "tiny.gguf", "--image", folder / "a.png", "-p", "x", "-n", "1", "--json"
    refused(chat(*ask, "--ratio", "0.9"), "the ratio 0.900 is above the largest of this capsule, 0.840 (6.26 times smaller)")
    assert list(json.loads(chat(*ask, "--ratio", "0.84").stdout)["slots"].values()) == [1, *[0] * 6]


@pytest.mark.parametrize("arch", ["llama", "qwen2vl"])
def test_no_file_is_needed(chat: Run, folder: Path, arch: str) -> None:
    seen = report(chat, folder, "--capsule", "built-in", arch=arch)
    assert seen["slots"] == report(chat, folder, arch=arch)["slots"]
    assert seen["capsule"] and sizes(seen["slots"]) == pytest.approx([6.25, 5.5, 4.75, 4, 3.25, 2.5, 1.95], rel=0.025)
    assert sum(seen["slots"].values()) == 1 and seen["kv_bytes_f16_equivalent"] == TOKENS * F16_TOKEN
    (image,) = seen["images"]
    assert image["tokens"] == image["tokens_compressed"] == TOKENS
    assert 0 < image["kv_bytes"] < image["kv_bytes_f16_equivalent"] and image["slots"] == seen["slots"]


def test_a_quality_takes_the_smallest_tier_that_holds_it(chat: Run, folder: Path) -> None:
    bits = [list(report(chat, folder, "--capsule", "built-in", "--quality", q)["slots"].values()) for q in (1e-6, 0.3, 3, 100)]
    assert bits[0] == [0] * 7, "no tier is that good: the picture stays as it is"
    assert bits[3] == [1, *[0] * 6]
    assert all(sum(x) == 1 for x in bits[1:]) and bits[1].index(1) > bits[2].index(1)


def test_a_ratio_is_one_tier(chat: Run, folder: Path) -> None:
    names = sizes(report(chat, folder, "--capsule", folder / "llama" / "tiers.gguf", "--ratio", "0.9")["slots"])
    for n, smaller in enumerate(names):
        seen = report(chat, folder, "--capsule", folder / "llama" / "tiers.gguf", "--ratio", 1 - 1 / smaller)
        assert list(seen["slots"].values()) == [int(i == n) for i in range(len(names))]
    wrong = chat(folder / "llama" / "tiny.gguf", "-p", "x", "--ratio", "0.8", "--quality", "0.7")
    assert wrong.returncode == 2 and "not both" in wrong.stderr.splitlines()[-1]


def test_two_adjacent_pictures_of_the_demo_model_are_two_grids(chat: Run, tmp_path: Path) -> None:
    """Nine tiles each, and the first one is stored as it is alone."""
    demo = ROOT / "kvcapsule_gguf" / "demo"
    ask = demo / "kvdemo-8M-v1-F16.gguf", "--capsule", "built-in", "-p", "What is at the top right?", "-n", "2", "--json"
    (alone,) = json.loads(chat(*ask, "--image", demo / "scene-1.jpg").stdout)["images"]
    first, second = json.loads(chat(*ask, "--image", demo / "scene-1.jpg", "--image", demo / "scene-2.jpg").stdout)["images"]
    assert first == alone and sum(first["slots"].values()) == sum(second["slots"].values()) == 9


def test_inspect_shows_the_built_in_capsule(chat: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its tiers are those that the library tells of, and a file that is no model is refused as before."""
    from kvcapsule_gguf.inspect.cli import main

    for arch in ("llama", "qwen2vl"):
        model = folder / arch / "tiny.gguf"
        assert main([str(model), "--json"]) == 0
        tiers = json.loads(capsys.readouterr().out)["tiers"]
        assert [f"{t['times_smaller']:.2f}x" for t in tiers] == list(report(chat, folder, arch=arch)["slots"])
        assert all(t["ratio"] == pytest.approx(1 - t["bytes_per_token"] / F16_TOKEN, abs=1e-3) for t in tiers)
        assert main([str(model)]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"the built-in capsule of {model}\n") and out.count("x ") >= 7
    assert main([str(folder / "llama" / "mmproj-tiny.gguf")]) == 1
    assert "not a capsule" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["llama", "qwen2vl"])
def test_a_lossless_file_gives_the_uncompressed_answers(chat: Run, folder: Path, arch: str) -> None:
    lines = f"/image {folder / 'a.png'}\nwhat?\nand?\n/image {folder / 'b.png'}\nthis?\nboth?\n"
    answers = [chat(folder / arch / "tiny.gguf", "--capsule", name, "-n", "8", "--temp", "0", stdin=lines).stdout for name in ("off", folder / arch / "lossless.gguf")]
    assert answers[0] == answers[1] and answers[0].strip()


def test_statistics_name_the_tiers(chat: Run, folder: Path) -> None:
    lines = f"/image {folder / 'a.png'}\nwhat?\n/image {folder / 'b.png'}\nthis?\n/stats\n"
    result = chat(folder / "llama" / "tiny.gguf", "--capsule", "built-in", "--quality", "100", "-n", "3", stdin=lines)
    head, *rows = result.stderr[result.stderr.index("picture"):].splitlines()[:4]
    assert re.fullmatch(r"picture +tokens +6\.\d\dx +MiB before +MiB now", head)
    assert [row.split()[1:3] for row in rows] == [[str(TOKENS), "1"], [str(TOKENS), "1"], [str(2 * TOKENS), "2"]]


def test_the_python_api(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from test_api import user

    from kvcapsule_gguf import KVCapsuleLlama, native

    options = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1}
    with KVCapsuleLlama(folder / "llama" / "tiny.gguf", capsule="built-in", quality=100, **options) as llm:
        llm.create_chat_completion([user("?", folder / "a.png")], max_tokens=2)
        (image,) = llm.image_stats()
        assert llm.capsule_path is None and image.moved == TOKENS and list(image.slots.values()) == [1, *[0] * 6]
    with KVCapsuleLlama(folder / "llama" / "tiny.gguf", **options) as llm:
        llm.create_chat_completion([user("?", folder / "a.png")], max_tokens=2)
        assert sum(llm.image_stats()[0].slots.values()) == 1 and len(llm.image_stats()[0].slots) == 7, "the default is the same capsule"
    with KVCapsuleLlama(folder / "other" / "tiny.gguf", **options) as llm:
        llm.create_chat_completion([user("?", folder / "a.png")], max_tokens=2)
        assert not native.is_attached(llm.ctx) and llm.image_stats()[0].slots == {}
    assert "no capsule, pictures stay uncompressed: the architecture 'xverse' is not supported" in caplog.text
    with pytest.raises(native.CapsuleError, match="xverse"):
        KVCapsuleLlama(folder / "other" / "tiny.gguf", capsule="built-in", **options)
    with pytest.raises(ValueError, match="not both"):
        KVCapsuleLlama(folder / "llama" / "tiny.gguf", quality=0.7, ratio=0.8, **options)
