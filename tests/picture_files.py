"""Files of one picture in many kinds, written without the code that is tested; where Pillow cannot write a kind, byte by byte."""

from __future__ import annotations

import base64
import io
import struct
import urllib.parse
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

# EXIF's definition: where the pixel of row r and column c of the file is shown, in a picture of h x w shown pixels
SHOWN_AT: dict[int, Callable[[np.ndarray, np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]] = {
    1: lambda r, c, h, w: (r, c),
    2: lambda r, c, h, w: (r, w - 1 - c),
    3: lambda r, c, h, w: (h - 1 - r, w - 1 - c),
    4: lambda r, c, h, w: (h - 1 - r, c),
    5: lambda r, c, h, w: (c, r),
    6: lambda r, c, h, w: (c, w - 1 - r),
    7: lambda r, c, h, w: (h - 1 - c, w - 1 - r),
    8: lambda r, c, h, w: (h - 1 - c, r),
}


def sample(width: int = 40, height: int = 24) -> np.ndarray:
    """uint8 [height, width, 3]: steps of at most 200 colours, another one in each corner, no symmetry, and a white place in the middle."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = x * 15 // (width - 1) * 17, y * 11 // (height - 1) * 23
    shown = np.stack([red, green, (red + 2 * green) // 3], axis=-1).astype(np.uint8)
    shown[height // 3 : height // 2, width // 4 : width // 2] = 255
    return shown


def with_palette(shown: np.ndarray) -> Image.Image:
    """In mode P, without loss."""
    colours, index = np.unique(shown.reshape(-1, 3), axis=0, return_inverse=True)
    image = Image.fromarray(index.reshape(shown.shape[:2]).astype(np.uint8), "P")
    image.putpalette(colours.astype(np.uint8).tobytes())
    return image


def stored(shown: np.ndarray, orientation: int) -> np.ndarray:
    """What a file holds that is shown as `shown` with this orientation."""
    h, w = shown.shape[:2]
    rows, columns = (h, w) if orientation < 5 else (w, h)
    r, c = np.mgrid[0:rows, 0:columns]
    return np.ascontiguousarray(shown[SHOWN_AT[orientation](r, c, h, w)])


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", orientation: int = 1, **options: object) -> bytes:
    out = io.BytesIO()
    if orientation != 1:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def png(rows: np.ndarray, depth: int, colour: int, transparent: tuple[int, ...] = ()) -> bytes:
    """rows: [height, width] or [height, width, channels] of whole numbers; colour: PNG's type, 0 grey, 2 RGB, 6 RGBA; transparent: its one clear colour."""
    rows = rows.reshape(rows.shape[0], rows.shape[1], -1)
    height, width, _ = rows.shape
    if depth == 16:
        lines = [line.astype(">u2").tobytes() for line in rows]
    elif depth == 8:
        lines = [line.astype(np.uint8).tobytes() for line in rows]
    else:
        bits = (rows.reshape(height, width, 1) >> np.arange(depth - 1, -1, -1)) & 1
        lines = [np.packbits(line.reshape(-1).astype(np.uint8)).tobytes() for line in bits]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))]
    if transparent:
        chunks.append((b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)))
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks)


def tiff(values: np.ndarray, photometric: int = 1, tile: tuple[int, int] | None = None) -> bytes:
    """[height, width] of uint16, int32, uint32 or float32, uncompressed, or uint8 [height, width, 2], grey multiplied with its alpha; photometric 0: white is zero; tile: (width, length) that the header claims, deflated."""
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    data = values.astype(values.dtype.newbyteorder("<")).tobytes()
    height, width = values.shape[:2]
    tags = {256: width, 257: height, 258: values.dtype.itemsize * 8, 259: 1, 262: photometric, 277: 1, 339: kind}
    if values.ndim == 3:
        tags |= {258: 8 | 8 << 16, 277: 2, 338: 1, 339: 1}
    if tile is None:
        tags |= {273: 8, 278: height, 279: len(data)}
    else:
        data = zlib.compress(bytes(tile[0] * tile[1] * values.dtype.itemsize), 9)
        tags |= {259: 8, 322: tile[0], 323: tile[1], 324: 8, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, *((3, 2) if value >> 16 and tag == 258 else (4, 1)), value) for tag, value in sorted(tags.items()))
    data += b"\0" * (len(data) % 2)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def lossless(shown: np.ndarray) -> dict[str, bytes]:
    """Files that must give exactly these pixels; `shown` may have 256 colours at most."""
    image = Image.fromarray(shown)
    palette = with_palette(shown)
    clear = image.convert("RGBA")
    # a frame of another picture, and what is fully transparent holds it too
    hidden = np.concatenate([shown[::-1], np.zeros_like(shown[..., :1])], axis=-1)
    white = (shown == 255).all(-1)
    hidden[~white] = np.concatenate([shown, np.full_like(shown[..., :1], 255)], axis=-1)[~white]
    files = {
        "png": encoded(image), "bmp": encoded(image, "BMP"), "ppm": encoded(image, "PPM"), "gif": encoded(palette, "GIF"), "webp": encoded(image, "WEBP", lossless=True),
        "tiff": encoded(image, "TIFF"), "tiff lzw": encoded(image, "TIFF", compression="tiff_lzw"), "tiff deflate": encoded(image, "TIFF", compression="tiff_adobe_deflate"),
        "png palette": encoded(palette), "png rgba": encoded(clear), "webp rgba": encoded(clear, "WEBP", lossless=True, exact=True), "tiff rgba": encoded(clear, "TIFF"),
        "png hidden": encoded(hidden), "webp hidden": encoded(hidden, "WEBP", lossless=True, exact=True), "png 16": png(shown.astype(np.uint16) * 257, 16, 2),
        "png rgba 16": png(np.asarray(clear).astype(np.uint16) * 257, 16, 6),
        "apng": encoded(image, save_all=True, append_images=[Image.fromarray(shown[::-1])]), "webp frames": encoded(image, "WEBP", lossless=True, save_all=True, append_images=[Image.fromarray(shown[::-1])]),
        "tiff pages": encoded(image, "TIFF", save_all=True, append_images=[Image.fromarray(shown[::-1])]),
    }  # fmt: skip
    for orientation in range(1, 9):
        turned = stored(shown, orientation)
        files |= {f"{kind} {orientation}": encoded(turned, kind, orientation, **options) for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}))}
    return files


def lossy(shown: np.ndarray) -> dict[str, bytes]:
    """Files that give nearly these pixels."""
    files: dict[str, bytes] = {"jpeg progressive": encoded(shown, "JPEG", quality=95, subsampling=0, progressive=True), "webp": encoded(shown, "WEBP", quality=95), "avif": encoded(shown, "AVIF", quality=95)}
    for orientation in range(1, 9):
        files[f"jpeg {orientation}"] = encoded(stored(shown, orientation), "JPEG", orientation, quality=95, subsampling=0)
        files[f"avif {orientation}"] = encoded(stored(shown, orientation), "AVIF", orientation, quality=95)
    return files


def base64_forms(data: bytes) -> dict[str, str]:
    plain = base64.b64encode(data).decode()
    return {
        "plain": f"data:image/png;base64,{plain}", "lines": "data:image/png;base64," + base64.encodebytes(data).decode(), "newline": f"data:image/png;base64,{plain}\n",
        "crlf": "data:image/png;base64," + plain[:40] + "\r\n" + plain[40:], "no padding": "data:image/png;base64," + plain.rstrip("="), "url-safe": "data:image/png;base64," + base64.urlsafe_b64encode(data).decode(),
        "upper": f"DATA:IMAGE/PNG;BASE64,{plain}", "no type": f"data:;base64,{plain}", "octets": f"data:application/octet-stream;base64,{plain}",
        "parameters": f"data:image/png;name=a.png;base64,{plain}", "other type": f"data:image/jpeg;base64,{plain}", "percent": "data:image/png;base64," + urllib.parse.quote(plain, safe=""),
        "no base64": "data:image/png," + urllib.parse.quote_from_bytes(data),
    }  # fmt: skip
