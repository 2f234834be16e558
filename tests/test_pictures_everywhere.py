"""One picture in many files, through every program: what reaches the projector is looked at, pixel by pixel."""

from __future__ import annotations

import base64
import ctypes
import io
import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import test_server as test_server_module
from chat_model import write_folder
from conftest import library, require_server
from picture_files import base64_forms, encoded, lossless, lossy, sample, tiff
from test_native import require_capsules

from kvcapsule_gguf import native
from kvcapsule_gguf.runtime.pictures import decode

SHOWN = sample(56, 42)
NEAR = 6  # mean difference of lossy files; a wrong turn has more than 60
CUT = encoded(SHOWN, "JPEG", quality=95, subsampling=0)[:-2]
FILES = {
    **lossless(SHOWN), **{f"lossy {kind}": data for kind, data in lossy(SHOWN).items()}, "cut jpeg": CUT,
    "float tiff": tiff((SHOWN[..., 0] / 255).astype(np.float32)), "int tiff": tiff(SHOWN[..., 0].astype(np.int32)),
}  # fmt: skip
REFUSED = {"cut progressive": encoded(SHOWN, "JPEG", progressive=True)[:-300], "cut png": encoded(SHOWN)[:-200], "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"}


def right(kind: str, found: np.ndarray) -> bool:
    if "tiff" in kind and kind.split()[0] in ("float", "int"):
        return np.array_equal(found, np.repeat(SHOWN[..., :1], 3, axis=2))
    if kind in ("cut jpeg",) or kind.startswith("lossy"):
        return found.shape == SHOWN.shape and np.abs(found.astype(int) - SHOWN).mean() < NEAR and np.array_equal(found, decode(FILES[kind]).rgb)
    return np.array_equal(found, SHOWN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_capsules()
    native.load(library("patched"))
    root = write_folder(tmp_path_factory.mktemp("everywhere"), ("llama",))
    (root / "files").mkdir()
    for i, data in enumerate(FILES.values()):
        (root / "files" / f"{i:03}.png").write_bytes(data)  # the contents decide, not the name
    return root


@pytest.fixture
def bitmaps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[np.ndarray]]:
    """What mtmd is given, as uint8 [height, width, 3]; a file given to mtmd's own reader fails the test."""
    seen: list[np.ndarray] = []
    mtmd = native.load(library("patched")).mtmd
    import llama_cpp.mtmd_cpp

    init = mtmd.mtmd_bitmap_init

    def watch(width: int, height: int, data: ctypes.Array) -> int:
        seen.append(np.frombuffer(ctypes.string_at(data, width * height * 3), np.uint8).reshape(height, width, 3))
        return init(width, height, data)

    def file(*_: object) -> None:
        raise AssertionError("a file reached mtmd")

    monkeypatch.setattr(mtmd, "mtmd_bitmap_init", watch)
    for name in ("mtmd_helper_bitmap_init_from_buf", "mtmd_helper_bitmap_init_from_file"):
        assert not hasattr(mtmd, name)
        monkeypatch.setattr(llama_cpp.mtmd_cpp, name, file)
    yield seen


def check(seen: list[np.ndarray]) -> None:
    assert len(seen) == len(FILES)
    assert [kind for kind, found in zip(FILES, seen) if not right(kind, found)] == []


def test_chat(folder: Path, bitmaps: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from kvcapsule_gguf.chat import cli

    for i, data in enumerate(REFUSED.values()):
        (folder / f"refused {i}.jpg").write_bytes(data)
    lines = [line for i in range(len(FILES)) for line in (f"/image {folder}/files/{i:03}.png", "x", "/clear")]
    forms = [url for url in base64_forms(FILES["PNG 6"]).values() if "\n" not in url]
    lines += [line for url in forms for line in (f"/image {url}", "x", "/clear")]
    lines += [f"/image '{folder}/refused {i}.jpg'" for i in range(len(REFUSED))]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    in_lines = base64_forms(FILES["PNG 6"])["lines"]
    cli.main([str(folder / "llama" / "tiny.gguf"), "-n", "1", "-t", "1", "--capsule", "off"])
    cli.main([str(folder / "llama" / "tiny.gguf"), "-n", "1", "-t", "1", "--capsule", "off", "--image", in_lines, "-p", "x"])
    check(bitmaps[: len(FILES)])
    assert len(bitmaps) == len(FILES) + len(forms) + 1 and all(np.array_equal(found, SHOWN) for found in bitmaps[len(FILES) :])
    errors = capfd.readouterr().err
    assert errors.count("its file is cut short") == 1 and errors.count("are taken as 0 to 255") == 1
    assert errors.count("error: ") == errors.count("damaged picture") + errors.count("not a picture that can be read") == len(REFUSED)


def test_chat_takes_paths_as_they_are_pasted(folder: Path, bitmaps: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from kvcapsule_gguf.chat import cli

    paths = [folder / "a, b.png", folder / "it's [1].png"]
    for n, path in enumerate(paths):
        path.write_bytes(encoded(SHOWN + np.uint8(n)))
    comma, quote = paths
    quoted, escaped = "'" + str(quote).replace("'", "'\\''") + "'", str(quote).replace("'", "\\'").replace(" ", "\\ ").replace("[", "\\[").replace("]", "\\]")
    lines = [f'/image "{comma}"', f"/image\t{escaped}", f"what is in {quoted} here?", "/clear", f"file://{urllib.parse.quote(str(quote))} and?", "/clear", f"/image '{comma}' {quoted}", "x", "/clear", f"{escaped} ", "x"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    cli.main([str(folder / "llama" / "tiny.gguf"), "-n", "1", "-t", "1", "--capsule", "off", "--image", f"{comma},{quote}"])
    seen = [int(found[0, 0, 0]) - int(SHOWN[0, 0, 0]) for found in bitmaps]
    assert seen == [0, 1, 0, 1, 1] + [1] + [0, 1] + [1] and "error" not in capfd.readouterr().err


def test_api(folder: Path, bitmaps: list[np.ndarray]) -> None:
    from kvcapsule_gguf import KVCapsuleLlama

    def ask(data: bytes, url: str = "") -> None:
        part = {"type": "image_url", "image_url": {"url": url or "data:image/jpeg;base64," + base64.b64encode(data).decode()}}
        llm.create_chat_completion([{"role": "user", "content": [part, {"type": "text", "text": "x"}]}], max_tokens=1)

    with KVCapsuleLlama(folder / "llama" / "tiny.gguf", n_ctx=512, n_threads=1, n_threads_batch=1) as llm:
        for data in FILES.values():
            ask(data)
        check(bitmaps)
        for data in REFUSED.values():
            with pytest.raises(ValueError, match="picture"):
                ask(data)
        del bitmaps[:]
        forms = base64_forms(FILES["PNG 6"])
        for url in forms.values():
            ask(b"", url)
        assert len(bitmaps) == len(forms) and all(np.array_equal(found, SHOWN) for found in bitmaps)


def test_training(folder: Path, bitmaps: list[np.ndarray]) -> None:
    from kvcapsule_gguf.eval.pictures import UnreadablePicture, from_folder
    from kvcapsule_gguf.train.collect import LlamaSource

    pictures = from_folder(folder / "files", len(FILES), 0)
    with LlamaSource(folder / "llama" / "tiny.gguf", folder / "llama" / "mmproj-tiny.gguf", pictures, n_ctx=512, threads=1) as source:
        for i in sorted(range(len(FILES)), key=pictures.files.__getitem__):
            source.vlm.read(source.prompts.before(), source.pictures[i].image).free()
    check(bitmaps)
    (folder / "refused").mkdir()
    for i, data in enumerate(REFUSED.values()):
        (folder / "refused" / f"{i}.jpg").write_bytes(data)
    for i in range(len(REFUSED)):
        with pytest.raises(UnreadablePicture):
            from_folder(folder / "refused", len(REFUSED), 0)[i]


def test_server(folder: Path) -> None:
    """llama-server knows a picture that it has seen by what it was given: were one bit of it another, its tokens would not be found in the cache."""
    require_server()
    kinds = [kind for kind in lossless(SHOWN) if kind not in ("png", "bmp", "ppm")]
    first, last = SHOWN.copy(), SHOWN.copy()
    first[0, 0, 1] += 1
    last[-1, -1, 1] -= 1

    def cached(path: str, data: bytes, url: str = "") -> int:
        text = base64.b64encode(data).decode()
        url = url or f"data:image/jpeg;base64,{text}"
        bodies: dict[str, dict[str, object]] = {
            "/v1/chat/completions": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "x"}]}]},
            "/v1/messages": {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": text}}, {"type": "text", "text": "x"}]}]},
            "/v1/responses": {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "x"}]}]},
        }
        limit = "max_output_tokens" if "responses" in path else "max_tokens"
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps({**bodies[path], limit: 1, "temperature": 0}).encode(), {"Authorization": "Bearer sk-x", "Content-Type": "application/json"})
        usage = json.load(urllib.request.urlopen(request, timeout=60))["usage"]
        return int(usage["cache_read_input_tokens"] if "messages" in path else usage.get("prompt_tokens_details", usage.get("input_tokens_details"))["cached_tokens"])

    with test_server_module.serve(folder / "llama", "--capsule", "off", "-np", "1") as (_, port, log):
        assert cached("/v1/chat/completions", encoded(first)) == 0
        paths = ("/v1/chat/completions", "/v1/messages", "/v1/responses")
        text_only, whole = (cached(paths[0], encoded(SHOWN)) for _ in range(2))
        assert whole - text_only > 10
        assert {(path, kind): n for path in paths for kind in kinds if (n := cached(path, FILES[kind])) != whole} == {}
        assert {form: n for form, url in base64_forms(FILES["PNG 6"]).items() if (n := cached(paths[0], b"", url)) != whole} == {}
        assert cached(paths[0], encoded(last)) == text_only
        for data in REFUSED.values():
            with pytest.raises(urllib.error.HTTPError, match="400"):
                cached(paths[0], data)
        cached(paths[0], CUT)
        assert log.read_text().count("its file is cut short") == 1
