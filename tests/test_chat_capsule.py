"""kvcapsule-chat with capsules: random ones on tiny models for the plumbing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from chat_model import TOKENS, write_mmproj, write_model, write_picture
from make_capsule import old_capsule, random_capsule
from test_chat import F16_TOKEN, Run, chat, refused  # noqa: F401  (chat is a fixture)
from test_native import require_capsules


@pytest.fixture(scope="session", autouse=True)
def patched_library() -> None:
    require_capsules()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("capsules")
    for arch in ("llama", "qwen2vl"):
        (root / arch).mkdir()
        model = write_model(root / arch / "tiny.gguf", arch=arch)
        write_mmproj(root / arch / "mmproj-tiny.gguf", arch=arch)
        random_capsule(model, root / arch / "kvcapsule-tiny.gguf", tiers=(4, 8))  # a picture is one tile
        random_capsule(model, root / arch / "lossless.gguf")
    write_picture(root / "a.png", size=(112, 112))
    write_picture(root / "b.png", size=(112, 112), seed=4)
    return root


@pytest.mark.parametrize("arch", ["llama", "qwen2vl"])
def test_the_capsule_beside_the_model_is_used(chat: Run, folder: Path, arch: str) -> None:
    result = chat(folder / arch / "tiny.gguf", "--image", folder / "a.png", "-p", "what?", "-n", "6", "--json")
    assert result.returncode == 0 and result.stderr == ""
    report = json.loads(result.stdout)
    assert report["capsule"] and report["vision_tokens"] == TOKENS
    assert sum(report["slots"].values()) == 1
    assert report["kv_bytes_f16_equivalent"] == TOKENS * F16_TOKEN
    assert 0 < report["kv_bytes"] < report["kv_bytes_f16_equivalent"] <= report["kv_bytes_allocated"]
    assert report["kv_ratio"] == round(1 - report["kv_bytes"] / report["kv_bytes_f16_equivalent"], 4)
    (image,) = report["images"]
    assert image["tokens"] == image["tokens_compressed"] == TOKENS
    assert image["kv_bytes"] == report["kv_bytes"] and image["slots"] == report["slots"]


@pytest.mark.parametrize("arch", ["llama", "qwen2vl"])
def test_a_lossless_capsule_gives_the_uncompressed_answers(chat: Run, folder: Path, arch: str) -> None:
    lines = f"/image {folder / 'a.png'}\nwhat?\nand?\n/image {folder / 'b.png'}\nthis?\nboth?\n"
    model = folder / arch / "tiny.gguf"
    plain = chat(model, "-n", "8", "--capsule", "off", "-fa", "off", stdin=lines)
    ours = chat(model, "-n", "8", "--capsule", folder / arch / "lossless.gguf", "-fa", "off", stdin=lines)
    assert ours.returncode == 0 and ours.stdout == plain.stdout and len(plain.stdout.split()) == 4, ours.stderr


def test_capsule_off_is_what_it_says(chat: Run, folder: Path) -> None:
    env = {"LLAMA_KVCAPSULE": str(folder / "llama" / "kvcapsule-tiny.gguf")}
    result = chat(folder / "llama" / "tiny.gguf", "--image", folder / "a.png", "-p", "x", "-n", "2", "--capsule", "off", "--json", env=env)
    assert not json.loads(result.stdout)["capsule"]


def test_a_capsule_inside_the_mmproj(chat: Run, folder: Path, tmp_path: Path) -> None:
    import gguf
    from tiny_gguf import rewrite

    capsule = gguf.GGUFReader(folder / "llama" / "kvcapsule-tiny.gguf")
    model = shutil.copy(folder / "llama" / "tiny.gguf", tmp_path)
    kv = {}
    for key, field in capsule.fields.items():
        if key.startswith("kvcapsule."):
            kv[key] = (field.contents(), field.types[-1])
    rewrite(folder / "llama" / "mmproj-tiny.gguf", tmp_path / "mmproj-tiny.gguf", kv=kv, add=[(t.name, t.data) for t in capsule.tensors])
    report = json.loads(chat(model, "--image", folder / "a.png", "-p", "x", "-n", "2", "--json").stdout)
    assert report["capsule"] and sum(report["slots"].values()) == 1


def test_stats_of_a_session(chat: Run, folder: Path) -> None:
    lines = f"/image {folder / 'a.png'}\nwhat?\n/image {folder / 'b.png'}\nthis?\n/stats\n/clear\n/stats\n"
    result = chat(folder / "llama" / "tiny.gguf", "-n", "3", stdin=lines)
    first, second = result.stderr.split("MiB now\n")[1:]
    rows = {line.split()[0]: line.split()[1:] for line in first.splitlines()[:3]}
    assert rows["total"][0] == str(2 * TOKENS)
    assert sum(map(int, rows["total"][1:-2])) == 2
    assert "memory breaks even at" in first and "breaks even" not in second


def test_stats_after_undo(chat: Run, folder: Path) -> None:
    """The cache keeps what was taken back until the next question: that is said, and then it is gone, or used again."""
    a, b = (f"/image {folder / name}\n" for name in ("a.png", "b.png"))
    lines = f"{a}what?\n{b}this?\n/undo\n/stats\n{b}this?\n/stats\n/undo\nand?\n/stats\n/undo\n/undo\n/stats\n"
    result = chat(folder / "llama" / "tiny.gguf", "-n", "3", "--json", stdin=lines)
    tables = result.stderr.split("MiB now\n")[1:]
    rows = [["taken back" in line for line in table.split("total ")[0].splitlines()] for table in tables]
    assert rows == [[False, True], [False, False], [False], [True]]
    assert ["took back" in table for table in tables] == [True, False, False, True]
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert [r["images_encoded"] for r in reports] == [1, 1, 0, 0] and [len(r["images"]) for r in reports] == [1, 2, 2, 1]


def test_many_pictures_go_through_a_hot_cache_that_holds_one(chat: Run, folder: Path) -> None:
    """All 24 questions about pictures of 16 tokens are answered: the hot cells hold their text and a few pictures, not all of them."""
    lines = "".join(f"/image {folder / 'a.png'}\n?\n" for _ in range(24))
    result = chat(folder / "llama" / "tiny.gguf", "-n", "1", "-c", "2048", "--hot", "640", "--json", stdin=lines)
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert (result.returncode, len(reports), [len(r["images"]) for r in reports]) == (0, 24, list(range(1, 25)))
    last = reports[-1]
    tokens = last["tokens_reused"] + last["tokens_evaluated"] + last["generated_tokens"]
    assert tokens - 24 * TOKENS <= 640 < tokens
    assert all(sum(r["slots"].values()) == len(r["images"]) for r in reports)
    assert all(image["tokens_compressed"] == TOKENS for image in last["images"])


def test_wrong_truncated_and_unfitting_capsules(chat: Run, folder: Path, tmp_path: Path) -> None:
    model, picture = folder / "llama" / "tiny.gguf", folder / "a.png"
    ask = ("--image", picture, "-p", "x")
    other = random_capsule(write_model(tmp_path / "other.gguf", seed=9), tmp_path / "kvcapsule-other.gguf")
    refused(chat(model, "--capsule", other, *ask), "kvcapsule-other.gguf")
    whole = (folder / "llama" / "kvcapsule-tiny.gguf").read_bytes()
    for size in (3, 100, 2000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        refused(chat(model, "--capsule", tmp_path / "cut.gguf", *ask), "cut.gguf")
    refused(chat(model, "--capsule", model, *ask), "tiny.gguf")
    refused(chat(model, "--capsule", old_capsule(tmp_path / "old.gguf"), *ask), "old.gguf", "of format v1: train it anew with kvcapsule-train")


def test_a_damaged_sibling_is_not_passed_over(chat: Run, folder: Path, tmp_path: Path) -> None:
    for name in ("tiny.gguf", "mmproj-tiny.gguf"):
        shutil.copy(folder / "llama" / name, tmp_path)
    (tmp_path / "kvcapsule-tiny.gguf").write_bytes((folder / "llama" / "kvcapsule-tiny.gguf").read_bytes()[:300])
    refused(chat(tmp_path / "tiny.gguf", "--image", folder / "a.png", "-p", "x"), "kvcapsule-tiny.gguf")


def test_a_sibling_for_another_model_is_passed_over(chat: Run, folder: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny.gguf", seed=9)
    for name in ("mmproj-tiny.gguf", "kvcapsule-tiny.gguf"):
        shutil.copy(folder / "llama" / name, tmp_path)
    result = chat(model, "--image", folder / "a.png", "-p", "x", "-n", "2", "--json")
    assert json.loads(result.stdout)["slots"].keys() >= {"4.00x"}, "the built-in capsule"


def test_a_picture_larger_than_the_hot_cache(chat: Run, folder: Path, tmp_path: Path) -> None:
    """The cache grows for it, and it is answered as without a flag."""
    picture = write_picture(tmp_path / "large.png", size=(20 * 28, 20 * 28))
    ask = ("--image", picture, "-p", "x", "-n", "4", "-c", "2048", "--json")
    small, default = (json.loads(chat(folder / "qwen2vl" / "tiny.gguf", *ask, *flags).stdout) for flags in (("--hot", "256"), ()))
    assert small["answer"] == default["answer"] and small["slots"] == default["slots"] and small["vision_tokens"] == 400


def test_a_session_goes_on_after_a_picture_that_does_not_fit(chat: Run, folder: Path, tmp_path: Path) -> None:
    """Before it a picture is in the cache, and stays there."""
    large = write_picture(tmp_path / "large.png", size=(20 * 28, 20 * 28))
    lines = f"/image {folder / 'a.png'}\nwhat?\n/image {large}\nthis?\n/drop\nand?\n"
    result = chat(folder / "qwen2vl" / "tiny.gguf", "-n", "3", "-c", "256", "--json", stdin=lines)
    first, second = map(json.loads, result.stdout.splitlines())
    assert "error: the context is full" in result.stderr
    assert second["vision_tokens"] == 0 and len(second["images"]) == 1 and second["slots"] == first["slots"]


def test_ratio_picks_a_tier(chat: Run, folder: Path, tmp_path: Path) -> None:
    result = chat(folder / "llama" / "tiny.gguf", "--image", folder / "a.png", "-p", "x", "-n", "2", "--json", "--ratio", "0.7")
    assert result.returncode == 0 and list(json.loads(result.stdout)["slots"].values()) == [1, 0]


def test_undo_save_and_load_in_a_session(chat: Run, folder: Path, tmp_path: Path) -> None:
    """--json tells what each answer took; a conversation goes on in the next process."""
    model, cache = folder / "llama" / "tiny.gguf", ("--image-cache", tmp_path / "cache", "-n", "4", "--json")
    lines = f"/image {folder / 'a.png'}\nwhat?\nand?\n/undo\nor?\n/save {tmp_path / 'talk'}\n/save\n/load {tmp_path / 'no'}\n/undo\n/undo\n/undo\n"
    first = chat(model, *cache, stdin=lines)
    reports = [json.loads(line) for line in first.stdout.splitlines()]
    assert [(r["images_encoded"], r["images_from_disk"], r["vision_tokens"]) for r in reports] == [(1, 0, TOKENS), (0, 0, 0), (0, 0, 0)], first.stderr
    assert reports[1]["tokens_evaluated"] < 30 and reports[1]["tokens_reused"] == reports[0]["tokens_evaluated"] + 4
    for text in ("taken back: and?", "talk: ", "/save needs a file", "no: No such file", "taken back: what?", "nothing to take back"):
        assert text in first.stderr

    second = chat(model, *cache, stdin=f"/load {tmp_path / 'talk'}\nand?\n/clear\n/image {folder / 'a.png'}\nwhat?\n")
    went_on, again = map(json.loads, second.stdout.splitlines())
    assert "2 questions and 1 picture, ready" in second.stderr
    assert (went_on["images_encoded"], len(went_on["images"])) == (0, 1)
    assert (again["images_encoded"], again["images_from_disk"], again["answer"]) == (0, 1, reports[0]["answer"])


def test_a_name_that_no_file_can_have_ends_no_session(chat: Run, folder: Path, tmp_path: Path) -> None:
    """The conversation goes on, with what the cache holds."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    names = ("~nobody-has-this-name/talk", tmp_path / "loop", tmp_path / ("x" * 300))
    lines = "what?\n" + "".join(f"/save {name}\n/load {name}\n" for name in names) + "and?\n"
    result = chat(folder / "llama" / "tiny.gguf", "-n", "4", "--json", stdin=lines)
    assert result.returncode == 1 and result.stderr.count("error: ") == 2 * len(names) and "Traceback" not in result.stderr, result.stderr
    assert json.loads(result.stdout.splitlines()[1])["tokens_reused"] > 0


# --- long text ---------------------------------------------------------------------------------------------------------------------------------


def test_text_that_does_not_fit(chat: Run, folder: Path) -> None:
    """Nothing is lost: the conversation and the picture are there for the next question."""
    lines = f"/image {folder / 'a.png'}\nwhat?\n/image {folder / 'b.png'}\n{'x' * 3000}\nshort\n"
    result = chat(folder / "llama" / "tiny.gguf", "-n", "4", "-c", "2048", "--hot", "256", "--json", stdin=lines)
    first, second = map(json.loads, result.stdout.splitlines())
    assert len(first["images"]) == 1 and len(second["images"]) == 2
    assert result.returncode == 1 and result.stderr.count("error: the context is full: ") == 1 and "kept for the next question" in result.stderr


def test_text_alone_may_use_the_whole_context(chat: Run, folder: Path) -> None:
    result = chat(folder / "llama" / "tiny.gguf", "-n", "4", "-c", "16384", "-p", "x" * 12000, "--json")
    assert result.returncode == 0 and json.loads(result.stdout)["prompt_tokens"] > 12000, result.stderr


@pytest.mark.parametrize("arch", ["llama", "qwen2vl"])
def test_a_long_question_with_pictures_needs_no_flag(chat: Run, folder: Path, arch: str) -> None:
    """It is answered as without a capsule, and what was allocated for it is counted."""
    ask = ("-n", "8", "-c", "16384", "--image", f"{folder / 'a.png'},{folder / 'b.png'}", "-p", "x" * 10000, "--json")
    ours, plain = (json.loads(chat(folder / arch / "tiny.gguf", *ask, *flags).stdout) for flags in ((), ("--capsule", "off")))
    assert ours["prompt_tokens"] == plain["prompt_tokens"] > 10000
    assert len(ours["images"]) == 2 and sum(ours["slots"].values()) > 0
    assert ours["answer"] == plain["answer"] and ours["generated_tokens"] == plain["generated_tokens"] == 8
    cell = ours["kv_bytes_f16_equivalent"] // ours["vision_tokens"]
    assert ours["kv_bytes_allocated"] >= ours["prompt_tokens"] * cell


def test_a_picture_that_cannot_be_read_in_a_pipe(chat: Run, folder: Path) -> None:
    """Its question is not asked without it, and the exit status tells."""
    result = chat(folder / "llama" / "tiny.gguf", "-n", "4", stdin="/image /no/such.png\nwhat is this?\nhello\n")
    assert result.returncode == 1 and len(result.stdout.splitlines()) == 1
    assert "No such file" in result.stderr and "not asked" in result.stderr
