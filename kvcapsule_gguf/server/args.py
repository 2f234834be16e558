"""Command line of kvcapsule-server. What is not ours goes to llama-server as it is."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..chat import capsules
from ..chat.args import IMAGE_ATTENTION, number
from ..runtime.program import Parser

DEFAULT_CTX = 16384
NOT_HERE = ("--api-prefix", "--media-path", "--ui-mcp-proxy", "--webui-mcp-proxy")  # of llama-server: other paths, other ways to files and servers


@dataclass
class Options:
    model: Path | None = None
    hf_repo: str | None = None
    mmproj: Path | None = None
    capsule: str = "auto"  # auto, built-in, off or a file; files.NO_FILE
    n_hot: int = 0
    quality: float | None = None
    ratio: float | None = None
    image_attention: str = IMAGE_ATTENTION[0]
    n_ctx: int | None = None  # None = DEFAULT_CTX or the model's, if that is less
    parallel: int = 4
    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: list[str] = field(default_factory=list)
    max_body_mib: int = 64
    max_image_mib: int = 16
    max_megapixels: float = 50.0
    max_images: int = 64
    remote_images: bool = False
    drain_s: float = 30.0
    verbose: bool = False
    rest: list[str] = field(default_factory=list)  # for llama-server


def parser(environ: Mapping[str, str] = os.environ) -> Parser:
    """What the environment says are the defaults."""
    p = Parser(
        prog="kvcapsule-server",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="An OpenAI-compatible server (llama-server) that keeps pictures compressed.",
        epilog="All other flags are llama-server's: kvcapsule_gguf/lib/bin/llama-server --help",
    )

    def add(*flags: str, help: str, env: str | None = None, also: str = "", **rest: Any) -> None:
        if env:
            help += f" (env: {env})"
            if value := environ.get(env) or environ.get(also):
                rest["default"] = value
        p.add_argument(*flags, help=help, **rest)

    add("positional", nargs="?", type=Path, metavar="MODEL", help="GGUF file of the model")
    add("-m", "--model", type=Path, metavar="FILE", help="the same as MODEL (env: LLAMA_ARG_MODEL)")
    add("-hf", "--hf-repo", metavar="USER/REPO[:QUANT]", help="take model, mmproj and capsule from the Hugging Face Hub (env: LLAMA_ARG_HF_REPO)")
    add("-mm", "--mmproj", type=Path, metavar="FILE", env="LLAMA_ARG_MMPROJ", help="vision projector (default: mmproj*.gguf beside the model)")
    add("--capsule", metavar="FILE|auto|built-in|off", default="auto", env="LLAMA_ARG_CAPSULE", help="as in kvcapsule-chat (default: auto)")
    add("--hot", dest="n_hot", type=number(int, 0), metavar="N", default=0, env="LLAMA_ARG_HOT", also="LLAMA_KVCAPSULE_HOT", help="cells of the uncompressed cache at the start, shared by all slots; it grows when text needs more (default: a picture for each slot + max(2048, context/4))")
    add("--quality", type=number(float, 0, 100, above=True), metavar="Q", env="LLAMA_ARG_QUALITY", also="LLAMA_KVCAPSULE_QUALITY", help="as in kvcapsule-chat (default: the capsule's)")
    add("--ratio", type=number(float, 0, 1, above=True), metavar="R", env="LLAMA_ARG_RATIO", also="LLAMA_KVCAPSULE_RATIO", help="share of a picture's cache to save, in place of --quality")
    add("--image-attention", choices=IMAGE_ATTENTION, metavar="auto|full", default=IMAGE_ATTENTION[0], env="LLAMA_ARG_IMAGE_ATTENTION", also="LLAMA_KVCAPSULE_IMAGE_ATTENTION", help="as in kvcapsule-chat (default: full)")
    add("-c", "--ctx-size", dest="n_ctx", type=int, metavar="N", env="LLAMA_ARG_CTX_SIZE", help=f"context of all slots together (default: {DEFAULT_CTX}, or the model's if that is less)")
    add("-np", "--parallel", type=int, metavar="N", default=4, env="LLAMA_ARG_N_PARALLEL", help="slots (default: 4)")
    add("--host", default="127.0.0.1", metavar="ADDRESS", env="LLAMA_ARG_HOST", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=8080, metavar="N", env="LLAMA_ARG_PORT", help="port, 0 = any free one (default: 8080)")
    add("--api-key", metavar="KEY[,KEY]", default=environ.get("LLAMA_API_KEY"), help="keys that clients must show (env: LLAMA_API_KEY, which other users cannot see)")
    add("--api-key-file", type=Path, metavar="FILE", env="LLAMA_ARG_API_KEY_FILE", help="keys, one per line")
    add("--max-body-mib", type=int, metavar="N", default=64, help="largest request (default: 64)")
    add("--max-image-mib", type=int, metavar="N", default=16, help="largest picture, as a file (default: 16)")
    add("--max-megapixels", type=float, metavar="N", default=50.0, help="largest picture, unpacked; all pictures of a request may have four times as much (default: 50)")
    add("--max-images", type=int, metavar="N", default=64, help="most pictures in a request (default: 64)")
    add("--remote-images", action="store_true", help="fetch http(s) pictures, from public addresses only")
    add("--drain", dest="drain_s", type=float, metavar="SECONDS", default=30.0, help="how long running answers may take after a signal to stop (default: 30)")
    add("-v", "--verbose", action="store_true", help="show llama-server's log")
    return p


def parse(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> Options:
    """Exits with status 2 and one line when the command line is wrong."""
    p, get = parser(environ), environ.get
    given, rest = p.parse_known_args(argv)
    values = vars(given)
    given_keys = values.pop("api_key")
    keys = [key.strip() for key in (given_keys or "").split(",") if key.strip()]
    if given_keys is not None and not keys:
        p.error("the API key is empty: leave --api-key and LLAMA_API_KEY out for a server that everybody may use")
    key_file, positional = values.pop("api_key_file"), values.pop("positional")
    options = Options(**values, rest=rest)
    try:
        if key_file:
            lines = map(str.strip, Path(key_file).read_text().splitlines())
            keys += [line for line in lines if line and not line.startswith("#")]
            if not keys:
                p.error(f"{key_file} has no keys")
    except (OSError, UnicodeDecodeError) as error:
        p.error(f"{key_file}: {getattr(error, 'strerror', None) or error}")
    options.api_keys = keys
    options.mmproj = Path(options.mmproj) if options.mmproj else None
    if positional is not None and options.model is not None:
        p.error("give the model once")
    options.model = positional or options.model
    if options.model is None and options.hf_repo is None:
        options.model = Path(get("LLAMA_ARG_MODEL", "")) if get("LLAMA_ARG_MODEL") else None
        options.hf_repo = get("LLAMA_ARG_HF_REPO") if options.model is None else None
    if (options.model is None) == (options.hf_repo is None):
        p.error("give a model file" if options.model is None else "give a model file or -hf, not both")
    numbers = (options.drain_s, options.max_megapixels)
    limits = (options.parallel, options.max_body_mib, options.max_image_mib, options.max_megapixels, options.max_images)
    if not all(map(math.isfinite, numbers)) or min(numbers) < 0 or min(limits) <= 0 or not 0 <= options.port <= 65535:
        p.error("a limit or size is out of range")
    options.capsule = capsules.from_variables(options.capsule, environ)
    capsules.check_amount(p, options, {name for name, value in vars(parser({}).parse_known_args(argv)[0]).items() if value is not None})
    if any(flag.partition("=")[0] in NOT_HERE for flag in rest):
        p.error(f"{' and '.join(NOT_HERE)} are not for this server")
    return options
