"""States on disk: containers, the bounded directory, keys. No model needed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from kvcapsule_gguf.reuse import container
from kvcapsule_gguf.reuse.binding import binding
from kvcapsule_gguf.reuse.container import Damaged
from kvcapsule_gguf.reuse.digest import file_digest, model_digest
from kvcapsule_gguf.reuse.parts import ImagePart, cells, common, from_json, positions, prefix_keys, to_json
from kvcapsule_gguf.reuse.store import Store
from kvcapsule_gguf.runtime.digest import bytes_digest

A, B = ImagePart("a" * 64, 4, 16), ImagePart("b" * 64, 4, 16)
KEYS = [f"{i:064x}" for i in range(20)]


# --- prompts -----------------------------------------------------------------------------------------------------------------------------------


def test_pictures_are_told_apart_by_their_contents() -> None:
    assert common([1, 2, A, 3], [1, 2, A, 4]) == 3
    assert common([1, 2, A, 3], [1, 2, B, 3]) == 2
    assert common([1], [1, 2]) == 1 and common([], [1]) == 0
    assert (positions([1, A, 2]), cells([1, A, 2])) == (6, 18)


def test_a_key_is_of_the_whole_prefix() -> None:
    def keys(*items, bound: bytes = b"x") -> list[tuple[int, str]]:
        return list(prefix_keys(bound, items))

    assert [n for n, _ in keys(1, A, 2, B, 3)] == [2, 4]
    assert keys(1, A, 2)[0] == keys(1, A, 3, B)[0]
    different = [keys(1, A), keys(2, A), keys(1, 2, A), keys(12, A), keys(1, B), keys(A), keys(B, A)[1:], keys(1, A, bound=b"y"), keys(1, ImagePart(A.digest, 2, 16))]
    assert len({key for found in different for _, key in found}) == len(different)


def test_items_survive_json() -> None:
    assert from_json(to_json([1, A, 2])) == [1, A, 2]
    for bad in (None, [["a", 1]], [["a", 0, 1]], ["x"], [True], [[1, 1, 1]]):
        with pytest.raises(ValueError):
            from_json(bad)


# --- identity ----------------------------------------------------------------------------------------------------------------------------------


def test_file_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcapsule_gguf.reuse import digest

    path = tmp_path / "f"
    path.write_bytes(data := random.Random(1).randbytes(1 << 18))
    whole = file_digest(path)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert file_digest(path) != whole
    # a large file is sampled, at its end too; a change that no sample sees changes the time
    monkeypatch.setattr(digest, "WHOLE", 1000)
    monkeypatch.setattr(digest, "SAMPLES", 4)
    monkeypatch.setattr(digest, "SAMPLE", 64)
    sampled = file_digest(path)
    path.write_bytes(data)
    os.utime(path, ns=(0, 0))
    first = file_digest(path)
    assert first != sampled
    path.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    assert file_digest(path) != first


def test_a_split_model_is_all_its_parts(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-{i:05}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        part.write_bytes(part.name.encode())
    before = model_digest(parts[0])
    parts[1].write_bytes(b"other")
    assert model_digest(parts[0]) != before


def test_a_binding_changes_with_everything_in_it(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("model", "mmproj", "capsule")}
    for name, path in files.items():
        path.write_text(name)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "libllama.so").write_text("other")

    def bound(settings: dict = {"ratio": 0.8}, lib: str = "one", **changed: Path | None) -> str:  # noqa: B006
        paths = {**files, **changed}
        return binding(paths["model"], paths["mmproj"], paths["capsule"], settings, tmp_path / lib)

    same = bound()
    others = [bound({"ratio": 0.6}), bound(lib="two"), bound(capsule=None), bound(model=files["mmproj"]), bound(mmproj=files["model"]), bound(capsule=files["model"])]
    files["model"].write_text("mod3l")
    others.append(bound())
    assert len({same, *others}) == 8
    assert bytes_digest(b"ab", b"c") != bytes_digest(b"a", b"bc")


# --- files -------------------------------------------------------------------------------------------------------------------------------------


def test_a_container_comes_back_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "x"
    container.write(path, {"name": "é"}, [b"one", b"", bytearray(b"two")])
    header, blobs = container.read(path)
    assert header == {"name": "é"} and [bytes(blob) for blob in blobs] == [b"one", b"", b"two"]
    assert os.name == "nt" or path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == container.size_of({"name": "é"}, [b"one", b"", b"two"])
    assert list(tmp_path.iterdir()) == [path]


def test_every_cut_and_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    container.write(path, {"a": 1}, [b"state"])
    whole = path.read_bytes()
    damaged = [whole[:n] for n in range(len(whole))] + [whole + b"x"]
    damaged += [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(len(whole))]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(Damaged):
            container.read(path)


@pytest.mark.parametrize("header", ['{"blobs":[-1,6]}', '{"blobs":[99]}', "{}", "[]", '{"blobs":null}', '{"blobs":["x"]}', "nonsense"])
def test_a_header_that_lies_with_a_checksum_that_fits(tmp_path: Path, header: str) -> None:
    import hashlib

    data = container.PREFIX.pack(container.MAGIC, container.VERSION, len(header)) + header.encode() + b"state"
    (tmp_path / "x").write_bytes(data + hashlib.blake2b(data, digest_size=32).digest())
    with pytest.raises(Damaged):
        container.read(tmp_path / "x")


# --- the directory -----------------------------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    blob = bytes(1000)
    size = container.size_of({}, [blob])
    store = Store(tmp_path / "cache", 3 * size)
    for i, key in enumerate(KEYS[:3]):
        assert store.put(key, {}, [blob])
        os.utime(tmp_path / "cache" / f"{key}.kvstate", (i, i))
    assert store.get(KEYS[0]) is not None  # used again
    store.put(KEYS[3], {}, [blob])
    assert [store.get(key) is not None for key in KEYS[:4]] == [True, False, True, True]
    assert store.n_bytes() == 3 * size
    assert not store.put(KEYS[4], {}, [bytes(3 * size)])
    assert store.n_bytes() == 3 * size


def test_a_damaged_entry_is_a_miss_and_goes(tmp_path: Path) -> None:
    store = Store(tmp_path, 1 << 20)
    store.put(KEYS[0], {}, [b"x"])
    path = tmp_path / f"{KEYS[0]}.kvstate"
    path.write_bytes(path.read_bytes()[:-1])
    assert store.get(KEYS[0]) is None and not path.exists()
    path.mkdir()
    assert store.get(KEYS[0]) is None


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    for name in ("photo.jpg", "a.kvstate", ".secret.tmp"):
        (tmp_path / name).write_bytes(bytes(5000))
    store = Store(tmp_path, 2000)
    assert store.put(KEYS[0], {}, [bytes(1000)]) and store.put(KEYS[1], {}, [bytes(1000)])
    assert {path.name for path in tmp_path.iterdir()} == {"photo.jpg", "a.kvstate", ".secret.tmp", f"{KEYS[1]}.kvstate"}


WRITER = """
import sys
from pathlib import Path
from kvcapsule_gguf.reuse.store import Store
store = Store(Path(sys.argv[1]), 1 << 30)
print("ready", flush=True)
for n in range(10**9):
    store.put(f"{n % 20:064x}", {"n": n}, [bytes([n % 251]) * (1 << 20)])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_kill_9_during_writes_leaves_a_clean_start(tmp_path: Path) -> None:
    """Killed at random moments: every entry is whole, and the next start removes what was half written."""
    rng = random.Random(5)
    for _ in range(6):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
            process.stdout.readline()
            time.sleep(rng.uniform(0.02, 0.3))
            process.send_signal(signal.SIGKILL)
        store = Store(tmp_path, 1 << 30)
        assert not list(tmp_path.glob(".*.tmp"))
        found = [(key, store.get(key)) for key in KEYS if (tmp_path / f"{key}.kvstate").exists()]
        assert found
        for key, entry in found:
            header, (blob,) = entry
            assert header["n"] % 20 == int(key, 16) and bytes(blob) == bytes([header["n"] % 251]) * (1 << 20)
