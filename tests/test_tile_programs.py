"""Capsules in the programs: files, the capsule that needs none, and what --quality and --ratio choose."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from chat_model import TOKENS, write_mmproj, write_model, write_picture
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


@pytest.mark.parametrize("arch", ["llama", "qwen2vl"])
def test_no_file_is_needed(chat: Run, folder: Path, arch: str) -> None:
    seen = report(chat, folder, "--capsule", "built-in", arch=arch)
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


def test_the_python_api(folder: Path) -> None:
    from test_api import user

    from kvcapsule_gguf import KVCapsuleLlama

    options = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1}
    with KVCapsuleLlama(folder / "llama" / "tiny.gguf", capsule="built-in", quality=100, **options) as llm:
        llm.create_chat_completion([user("?", folder / "a.png")], max_tokens=2)
        (image,) = llm.image_stats()
        assert llm.capsule_path is None and image.moved == TOKENS and list(image.slots.values()) == [1, *[0] * 6]
    with pytest.raises(ValueError, match="not both"):
        KVCapsuleLlama(folder / "llama" / "tiny.gguf", quality=0.7, ratio=0.8, **options)
