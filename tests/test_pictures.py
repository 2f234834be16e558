"""Pictures from everywhere, and the ones that cannot be read."""

from __future__ import annotations

import base64
import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from kvcapsule_gguf.runtime.pictures import sources
from kvcapsule_gguf.runtime.pictures import Budget, Limits, Picture, PictureError, PictureTooLarge, load

RED, GREEN = (255, 0, 0), (0, 255, 0)


def two_colours(width: int = 4, height: int = 2) -> Image.Image:
    """Left half red, right half green."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (width // 2, 0, width, height))
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(picture: Picture) -> np.ndarray:
    return picture.rgb


@pytest.fixture
def png(tmp_path: Path) -> Path:
    path = tmp_path / "two.png"
    path.write_bytes(encoded(two_colours()))
    return path


def test_path(png: Path) -> None:
    picture = load(str(png))
    assert (picture.width, picture.height, picture.name) == (4, 2, str(png))
    assert pixels(picture)[0].tolist() == [list(RED)] * 2 + [list(GREEN)] * 2


def test_home(png: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(png.parent))
    monkeypatch.setenv("USERPROFILE", str(png.parent))
    assert load("~/two.png").width == 4


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "WEBP", "PPM"])
def test_formats(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(encoded(two_colours(), kind))
    assert load(str(path)).width == 4


def test_orientation_of_a_camera(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees to view
    path = tmp_path / "turned.png"
    path.write_bytes(encoded(two_colours(), exif=exif))
    picture = load(str(path))
    assert (picture.width, picture.height) == (2, 4)
    assert pixels(picture)[0, 0].tolist() == list(RED) and pixels(picture)[3, 0].tolist() == list(GREEN)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_white(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "clear.png"
    image = Image.new("RGBA", (2, 2), (10, 20, 30, 0)).convert(mode if mode != "PA" else "P")
    path.write_bytes(encoded(image, transparency=0) if mode == "PA" else encoded(image))
    assert pixels(load(str(path)))[0, 0].tolist() == [255, 255, 255]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    path.write_bytes(encoded(Image.fromarray(np.array([[0, 0x4000, 0xFFFF]], np.uint16))))
    assert pixels(load(str(path)))[0, :, 0].tolist() == [0, 0x40, 0xFF]


def test_data_url(png: Path) -> None:
    text = base64.b64encode(png.read_bytes()).decode()
    picture = load(f"data:image/png;base64,{text}")
    assert picture.width == 4 and len(picture.name) <= 80


def test_stdin(png: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.sys, "stdin", SimpleNamespace(buffer=io.BytesIO(png.read_bytes())))
    assert load("-").width == 4


@pytest.fixture
def server(png: Path) -> Iterator[str]:
    data = png.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/two.png" else 404)
            self.end_headers()
            self.wfile.write(data if self.path == "/two.png" else b"no")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_http(server: str) -> None:
    assert load(f"{server}/two.png").width == 4
    with pytest.raises(PictureError, match="HTTP 404"):
        load(f"{server}/other.png")


def test_what_cannot_be_read_is_one_line(tmp_path: Path, png: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture\n")
    (tmp_path / "empty.png").touch()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    (tmp_path / "cut.png").write_bytes(encoded(noise)[:2000])
    cases = {
        str(tmp_path / "missing.png"): "No such file",
        str(tmp_path): "is a folder",
        str(tmp_path / "empty.png"): "empty",
        str(tmp_path / "text.png"): "not a picture that can be read",
        str(tmp_path / "cut.png"): "damaged picture",
        "data:image/png;base64,%%%": "broken base64",
        "data:image/png": "without data",
        "http://127.0.0.1:1/x.png": "refused",
        "a\0b": "null byte",
    }
    for source, message in cases.items():
        with pytest.raises(PictureError, match=message) as error:
            load(source)
        assert "\n" not in str(error.value)
    with pytest.raises(PictureTooLarge, match="larger than"):
        load(str(png), Budget(Limits(file_bytes=10)))


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(encoded(two_colours(40, 40)))
    with pytest.raises(PictureTooLarge, match="40 x 40 pixels"):
        load(str(tmp_path / "bomb.png"), Budget(Limits(pixels=1599)))
