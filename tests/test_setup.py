"""The steps of scripts/setup that do not need a network or a compiler."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from setup_steps import cli, common, environment, native, patching, pins, source  # noqa: E402
from setup_steps.common import SetupError  # noqa: E402
from setup_steps.patching import Series  # noqa: E402

A = "int a;\nint b;\nint c;\n"
ADD_B = "--- a/src/a.cpp\n+++ b/src/a.cpp\n@@ -1,3 +1,4 @@\n int a;\n int b;\n+int hook; // [TAG_CAPSULE]\n int c;\n"
AFTER_B = "--- a/src/a.cpp\n+++ b/src/a.cpp\n@@ -2,3 +2,4 @@\n int b;\n int hook; // [TAG_CAPSULE]\n+int second;\n int c;\n"
NEW = "--- /dev/null\n+++ b/src/new.cpp\n@@ -0,0 +1 @@\n+int fresh;\n"
GONE = "--- a/src/old.cpp\n+++ /dev/null\n@@ -1 +0,0 @@\n-int old;\n"


@pytest.fixture
def pristine(tmp_path: Path) -> Path:
    tree = tmp_path / "stock" / "source"
    (tree / "src").mkdir(parents=True)
    (tree / "src" / "a.cpp").write_text(A)
    (tree / "src" / "old.cpp").write_text("int old;\n")
    (tree / "README").write_text("untouched\n")
    for path in tree.rglob("*"):
        os.utime(path, (1_600_000_000, 1_600_000_000))
    return tree


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    folder = tmp_path / "patches"
    (folder / "files" / "include").mkdir(parents=True)
    (folder / "files" / "include" / "llama-capsule.h").write_text("// new\n")
    (folder / "README.md").write_text("not a patch\n")
    return folder


def sync(patches: Path, pristine: Path, tree: Path) -> bool:
    return patching.sync(Series.read(patches), pristine, tree)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return tmp_path / "patched" / "source"


def test_no_patches_is_the_pristine_tree_and_the_new_files(pristine: Path, patches: Path, tree: Path) -> None:
    assert sync(patches, pristine, tree)
    assert (tree / "src" / "a.cpp").read_text() == A
    assert (tree / "include" / "llama-capsule.h").read_text() == "// new\n"
    assert not sync(patches, pristine, tree)


def test_patches_apply_in_order_and_make_and_remove_files(pristine: Path, patches: Path, tree: Path) -> None:
    (patches / "0002-second.patch").write_text(AFTER_B)
    (patches / "0001-first.patch").write_text("Subject: why\n\n" + ADD_B + NEW + GONE)
    sync(patches, pristine, tree)
    assert (tree / "src" / "a.cpp").read_text() == "int a;\nint b;\nint hook; // [TAG_CAPSULE]\nint second;\nint c;\n"
    assert (tree / "src" / "new.cpp").read_text() == "int fresh;\n"
    assert not (tree / "src" / "old.cpp").exists()
    assert (pristine / "src" / "a.cpp").read_text() == A


def test_a_changed_series_writes_only_what_changes(pristine: Path, patches: Path, tree: Path) -> None:
    (patches / "0001-first.patch").write_text(ADD_B + NEW + GONE)
    sync(patches, pristine, tree)
    before = {path: path.stat().st_mtime_ns for path in tree.rglob("*.*") if path.is_file()}
    time.sleep(0.01)
    (patches / "0002-second.patch").write_text(AFTER_B)
    assert sync(patches, pristine, tree)
    changed = {path.name for path, mtime in before.items() if path.stat().st_mtime_ns != mtime}
    assert changed == {"a.cpp", patching.STAMP}
    assert (tree / "README").stat().st_mtime == 1_600_000_000


def test_a_patch_taken_away_restores_what_it_touched(pristine: Path, patches: Path, tree: Path) -> None:
    (patches / "0001-first.patch").write_text(ADD_B + NEW + GONE)
    sync(patches, pristine, tree)
    (patches / "0001-first.patch").unlink()
    (patches / "files" / "include" / "llama-capsule.h").unlink()
    sync(patches, pristine, tree)
    assert (tree / "src" / "a.cpp").read_text() == A
    assert (tree / "src" / "old.cpp").read_text() == "int old;\n"
    assert not (tree / "src" / "new.cpp").exists()
    assert not (tree / "include" / "llama-capsule.h").exists()


def test_an_interrupted_run_is_finished_by_the_next(pristine: Path, patches: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync(patches, pristine, tree)
    (patches / "0001-first.patch").write_text(ADD_B + NEW + GONE)
    put, left = patching._put, [1]

    def stop(path: Path, data: bytes | None) -> bool:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return put(path, data)

    monkeypatch.setattr(patching, "_put", stop)
    with pytest.raises(KeyboardInterrupt):
        sync(patches, pristine, tree)
    monkeypatch.undo()
    assert sync(patches, pristine, tree)
    assert "hook" in (tree / "src" / "a.cpp").read_text()
    assert not (tree / "src" / "old.cpp").exists()


def test_a_patch_that_does_not_fit_is_refused_and_changes_nothing(pristine: Path, patches: Path, tree: Path) -> None:
    sync(patches, pristine, tree)
    (patches / "0001-first.patch").write_text(ADD_B.replace(" int a;", " int z;"))
    with pytest.raises(SetupError, match="0001-first.patch does not apply"):
        sync(patches, pristine, tree)
    assert (tree / "src" / "a.cpp").read_text() == A


def test_trees_that_are_not_ours_are_refused(pristine: Path, patches: Path, tree: Path) -> None:
    tree.mkdir(parents=True)
    with pytest.raises(SetupError, match="not made by scripts/setup"):
        sync(patches, pristine, tree)


def test_edits_by_hand_are_not_overwritten(pristine: Path, patches: Path, tree: Path) -> None:
    (patches / "0001-first.patch").write_text(ADD_B)
    sync(patches, pristine, tree)
    (tree / "src" / "a.cpp").write_text("int mine;\n")
    with pytest.raises(SetupError, match="a.cpp was edited by hand"):
        sync(patches, pristine, tree)
    assert (tree / "src" / "a.cpp").read_text() == "int mine;\n"


def test_new_files_never_replace_files_of_llama_cpp(pristine: Path, patches: Path, tree: Path) -> None:
    (patches / "files" / "src").mkdir()
    (patches / "files" / "src" / "a.cpp").write_text("int other;\n")
    with pytest.raises(SetupError, match="would replace a file of llama.cpp"):
        sync(patches, pristine, tree)


def test_touched_is_not_fooled_by_text_that_looks_like_a_header(tmp_path: Path) -> None:
    patch = tmp_path / "0001-x.patch"
    patch.write_text("--- a/src/a.cpp\n+++ b/src/a.cpp\n@@ -1,2 +1,2 @@\n--- a comment\n+++ another\n int b;\n")
    assert patching.touched(patch) == {"src/a.cpp"}


def test_the_series_of_this_repository_is_well_formed() -> None:
    series = Series.read(ROOT / "patches")
    assert "include/llama-capsule.h" in series.files
    numbers = [path.name[:4] for path in series.patches]
    assert numbers == [f"{i + 1:04}" for i in range(len(numbers))]
    for patch in series.patches:
        assert patching.touched(patch), patch.name


def test_the_series_of_this_repository_applies_exactly() -> None:
    if not source.ORIGIN.is_file():
        pytest.skip("no llama.cpp in .cache/: run scripts/setup")
    source.check_identity(source.PRISTINE)
    patching.render(Series.read(ROOT / "patches"), source.PRISTINE)


def make_sdist(folder: Path) -> Path:
    archive = folder / "llama_cpp_python-9.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in {"vendor/llama.cpp/include/llama.h": "x", "vendor/llama.cpp/.git": "gitdir: ../..", "vendor/llama.cpp/docs/a.md": "x", "other": "x"}.items():
            info = tarfile.TarInfo(f"llama_cpp_python-9/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return archive


def test_unpacking_takes_only_llama_cpp_without_its_stray_git_file(tmp_path: Path) -> None:
    source._unpack(make_sdist(tmp_path), tmp_path / "out")
    assert [path.relative_to(tmp_path / "out").as_posix() for path in sorted((tmp_path / "out").rglob("*")) if path.is_file()] == ["include/llama.h"]


def test_a_wrong_source_distribution_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "CACHE", tmp_path)
    (tmp_path / pins.SDIST_NAME).write_bytes(b"something else")
    with pytest.raises(SetupError, match="not the pinned"):
        source.sdist()


@pytest.mark.parametrize("case, message", [("empty", "not a llama.cpp source tree"), ("patched", "patched already"), ("other", "include/llama.h differs")])
def test_foreign_checkouts_are_refused(tmp_path: Path, case: str, message: str) -> None:
    if case != "empty":
        (tmp_path / "include").mkdir()
        (tmp_path / "include" / "llama.h").write_text("// another commit\n")
    if case == "patched":
        (tmp_path / "include" / "llama-capsule.h").write_text("//\n")
    with pytest.raises(SetupError, match=message):
        source.check_identity(tmp_path)


def test_equal_files_are_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    assert common.write_if_changed(path, b"1")
    os.utime(path, (1, 1))
    assert not common.write_if_changed(path, b"1")
    assert path.stat().st_mtime == 1
    assert common.write_if_changed(path, b"2")


def test_a_missing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SetupError, match="CMake and a C\\+\\+ compiler and Ninja or make not found, please install"):
        native._require_tools()


def test_libraries_are_copied_with_their_links(tmp_path: Path) -> None:
    built, lib = tmp_path / "bin", tmp_path / "lib"
    built.mkdir()
    (built / "libllama.so.0.5.0").write_bytes(b"elf")
    (built / "libllama.so.0").symlink_to("libllama.so.0.5.0")
    (built / "libllama.so").symlink_to("libllama.so.0")
    (built / "llama-bench").write_bytes(b"elf")
    native.install(built, lib, [])
    assert (lib / "libllama.so").read_bytes() == b"elf" and (lib / "libllama.so").is_symlink()
    assert not (lib / "bin").exists()
    inode = (lib / "libllama.so.0.5.0").stat().st_ino
    native.install(built, lib, ["llama-bench"])
    assert (lib / "libllama.so.0.5.0").stat().st_ino == inode
    assert (lib / "bin" / "llama-bench").is_file()


def test_command_line() -> None:
    args = cli.parse(["--stock", "-DGGML_CUDA=ON", "-D", "CMAKE_CUDA_ARCHITECTURES:STRING=90", "-j", "3"])
    assert args.stock and args.jobs == 3 and not args.train
    assert args.defines == {"GGML_CUDA": "ON", "CMAKE_CUDA_ARCHITECTURES": "90"}
    with pytest.raises(SystemExit):
        cli.parse(["-DGGML_CUDA"])


def test_backends_are_options_of_cmake() -> None:
    args = cli.parse(["--backend", "vulkan", "--backend", "rpc", "-DGGML_VULKAN=OFF"])
    assert args.defines == {"GGML_VULKAN": "OFF", "GGML_RPC": "ON"}, "what -D says wins"
    assert cli.parse([]).defines == {}
    with pytest.raises(SystemExit):
        cli.parse(["--backend", "abacus"])


def test_the_pins_agree() -> None:
    from kvcapsule_gguf.native import library

    assert library.LLAMA_CPP_PYTHON == pins.LLAMA_CPP_PYTHON
    assert f"llama-cpp-python=={pins.LLAMA_CPP_PYTHON}" in (ROOT / "pyproject.toml").read_text()


def test_scripts_explain_themselves() -> None:
    text = subprocess.run([sys.executable, ROOT / "scripts" / "setup", "--help"], capture_output=True, text=True, check=True).stdout
    for flag in ("--train", "--tools", "--stock", "--backend", "--source", "--jobs", "-D"):
        assert flag in text


def test_packages_of_the_server_are_for_tests_and_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    ran, broken = [], ["server"]

    def pip(what: str, *arguments: object, **_: object) -> None:
        ran.append(what)
        if what in broken:
            raise SetupError(f"pip {what} failed")

    monkeypatch.setattr(environment, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(environment, "pip", pip)

    def installed(**flags: bool) -> list[str]:
        ran.clear()
        environment.install(tmp_path, flags.get("train", False), flags.get("stock", False))
        return list(ran)

    assert installed() == ["install", "llama-cpp-python", "project"]
    assert installed(stock=True) == ["server"] and "will be skipped" in capsys.readouterr().err
    broken.clear()
    assert installed(stock=True) == ["server"]
    assert installed(stock=True) == installed() == []


def test_nothing_is_kept_that_no_user_needs() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a clone")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for path in (ROOT / name for name in names if name and (ROOT / name).is_file()):
        with path.open("rb") as file:
            assert file.read(4) != b"\x7fELF", f"{path} is a program, or the memory of one"
        assert path.stat().st_size < 16 * 2**20, f"{path} is large"
