"""Command line of kvcapsule-chat. Names and environment twins are llama.cpp's; the environment is read first, so flags win."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..reuse.prefixes import DEFAULT_MIB
from ..runtime.errors import KVCapsuleError
from ..runtime.pictures import split_listed
from ..runtime.program import Parser
from . import capsules, files

CACHE_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "iq4_nl": 20}  # enum ggml_type
IMAGE_ATTENTION = ("full", "auto")
FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}  # enum llama_flash_attn_type

LOAD_MODES = {"auto": -1, "none": 0, "mmap": 1, "mlock": 2, "mmap+mlock": 3, "dio": 4}  # enum llama_load_mode

DEFAULT_CTX = 8192


@dataclass
class Options:
    """Everything the command line says. 0 or None where nothing was said, unless noted."""

    model: Path | None = None
    hf_repo: str | None = None
    hf_token: str | None = None
    offline: bool = False
    mmproj: Path | None = None
    use_mmproj: bool = True
    capsule: str = "auto"  # auto, built-in, off or a file; files.NO_FILE
    images: list[str] = field(default_factory=list)
    prompt: str | None = None
    system: str | None = None
    chat_template: str | None = None  # None = the model's own
    n_predict: int = -1  # -1 = until the model stops
    n_ctx: int | None = None  # 0 = the model's own
    n_hot: int = 0
    n_gpu_layers: int | None = None
    device: str | None = None  # None = all of them
    rpc: str | None = None
    kv_offload: bool = True
    list_devices: bool = False
    load_mode: str | None = None
    threads: int = 0
    threads_batch: int = 0  # 0 = as threads
    n_batch: int = 2048
    n_ubatch: int = 512
    flash_attn: str = "auto"
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    image_min_tokens: int = -1  # -1 = the projector's own
    image_max_tokens: int = -1
    temp: float = 0.2
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int = -1  # -1 = random
    quality: float | None = None
    ratio: float | None = None
    image_attention: str = IMAGE_ATTENTION[0]
    image_cache: Path | None = None
    image_cache_mib: int = DEFAULT_MIB
    json: bool = False
    verbose: bool = False


def parse(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> Options:
    """Exits with status 2 and one line when the command line is wrong."""
    parser, twins = _parser()
    typed = vars(parser.parse_args(argv))
    if typed.keys() & {"model", "model_positional", "hf_repo"}:
        # another model than the environment's, wherever that comes from
        twins = {name: flag for name, flag in twins.items() if name not in ("LLAMA_ARG_MODEL", "LLAMA_ARG_HF_REPO")}
    from_environment = [part for name, flag in twins.items() if environ.get(name) for part in (flag, environ[name])]
    options = Options()
    parser.parse_args([*from_environment, *argv], namespace=options)
    given = vars(options)
    positional = given.pop("model_positional", None)
    if positional is not None:
        options.model = Path(positional)
    options.capsule = capsules.from_variables(options.capsule, environ)
    capsules.check_amount(parser, options, typed.keys())
    if not options.list_devices and (options.model is None) == (options.hf_repo is None):
        parser.error(f"give a model file{_to_try()}" if options.model is None else "give a model file or -hf, not both")
    return options


def number(kind: type, low: float, high: float | None = None, above: bool = False):
    """Of a flag. Numbers become C's, so a whole one without a limit of its own ends at that of an int. above: `low` itself is refused."""
    most = high if high is not None else 0x7FFFFFFF if kind is int else float("inf")

    def convert(text: str):
        value = kind(text)
        if above and not low < value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not a number above {low} and up to {most}")
        if not low <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is below {low}" if high is None and value < low else f"{text} is not between {low} and {most}")
        return value

    convert.__name__ = {"int": "number", "float": "number"}[kind.__name__]
    return convert


def _to_try() -> str:
    """What to type, where nothing is set up yet."""
    with contextlib.suppress(KVCapsuleError, OSError):
        return f", such as: kvcapsule-chat {shlex.quote(str(files.model_in(files.demo_folder())))}"
    return ", such as: kvcapsule-chat model.gguf --image photo.jpg"


def _text(path: str) -> str:
    """What a file holds, without the last end of line, as llama.cpp takes it."""
    try:
        return Path(path).read_text("utf-8").removesuffix("\n")
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {getattr(error, 'strerror', None) or 'is not text'}") from None


class _Images(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if not (sources := split_listed(values)):
            parser.error(f"argument {option_string}: no picture is named")
        images = namespace.images = getattr(namespace, "images", [])
        images.extend(sources)


def _parser() -> tuple[Parser, dict[str, str]]:
    """The parser and, per environment variable, the flag it stands for."""
    parser = Parser(
        prog="kvcapsule-chat",
        description="Chat about pictures; what the model keeps of a picture is stored compressed.",
        epilog="Without -p an interactive session starts, /help lists its commands.",
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # the variables for programs that know nothing of capsules mean the same here; those of flags are read after them
    twins = {"LLAMA_KVCAPSULE_HOT": "--hot", "LLAMA_KVCAPSULE_QUALITY": "--quality", "LLAMA_KVCAPSULE_RATIO": "--ratio",
             "LLAMA_KVCAPSULE_IMAGE_ATTENTION": "--image-attention"}

    def add(*flags: str, env: str | None = None, help: str, **rest) -> None:
        if env:
            twins[env] = flags[-1]
            help += f" (env: {env})"
        parser.add_argument(*flags, help=help, **rest)

    defaults = Options()
    parser.add_argument("model_positional", nargs="?", metavar="MODEL", help="GGUF file of the model")
    add("-m", "--model", type=Path, metavar="FILE", env="LLAMA_ARG_MODEL", help="the same as MODEL")
    add("-hf", "--hf-repo", metavar="USER/REPO[:QUANT]", env="LLAMA_ARG_HF_REPO", help="take model, mmproj and capsule from the Hugging Face Hub")
    add("-hft", "--hf-token", metavar="TOKEN", env="HF_TOKEN", help="access token for the Hub")
    add("--offline", action="store_true", help="take -hf from the local cache, and ask nobody")
    add("-mm", "--mmproj", type=Path, metavar="FILE", env="LLAMA_ARG_MMPROJ", help="vision projector (default: mmproj*.gguf beside the model)")
    add("--no-mmproj", dest="use_mmproj", action="store_false", help="text only, also where there is a projector")
    add("--capsule", metavar="FILE|auto|built-in|off", env="LLAMA_ARG_CAPSULE", help="capsule (default: auto = inside the mmproj, or the kvcapsule-*.gguf beside the model that fits, or else built-in, which needs no file); off: pictures stay uncompressed")
    add("--quality", type=number(float, 0, 100, above=True), metavar="Q", env="LLAMA_ARG_QUALITY", help="error that a tile of a picture may have, in units of q4_0's: the smallest tier that holds it is taken (default: 1)")
    add("--ratio", type=number(float, 0, 1, above=True), metavar="R", env="LLAMA_ARG_RATIO", help="share of a picture's cache to save, in place of --quality; the nearest tier of the capsule is used for everything")
    add("--image-attention", choices=IMAGE_ATTENTION, metavar="auto|full", env="LLAMA_ARG_IMAGE_ATTENTION", help="auto: while a picture is read, heads that the capsule file names see the text before it and the picture itself, but no other picture (default: full)")
    add("--hot", dest="n_hot", type=number(int, 0), metavar="N", env="LLAMA_ARG_HOT", help="cells of the uncompressed cache at the start; it grows when text needs more (default: room for text and one picture)")
    add("--image", action=_Images, metavar="FILE[,FILE]", help="picture for the (first) question: path, http(s) or data URL, - = stdin; can be repeated")
    add("-p", "--prompt", metavar="TEXT", help="one question, answer and exit")
    add("-f", "--file", dest="prompt", type=_text, metavar="FILE", help="the same from a file")
    add("-sys", "--system-prompt", dest="system", metavar="TEXT", help="system prompt")
    add("-sysf", "--system-prompt-file", dest="system", type=_text, metavar="FILE", help="the same from a file")
    add("--chat-template", metavar="JINJA", env="LLAMA_ARG_CHAT_TEMPLATE", help="chat template (default: the model's own)")
    add("--chat-template-file", dest="chat_template", type=_text, metavar="FILE", env="LLAMA_ARG_CHAT_TEMPLATE_FILE", help="the same from a file")
    add("-n", "--predict", "--n-predict", dest="n_predict", type=number(int, -1), metavar="N", env="LLAMA_ARG_N_PREDICT", help="longest answer in tokens, -1 = no limit (default: -1)")
    add("-c", "--ctx-size", dest="n_ctx", type=number(int, 0), metavar="N", env="LLAMA_ARG_CTX_SIZE", help=f"context in tokens, 0 = the model's (default: {DEFAULT_CTX} or the model's, if that is less)")
    add("-ngl", "--gpu-layers", "--n-gpu-layers", dest="n_gpu_layers", type=number(int, -1), metavar="N", env="LLAMA_ARG_N_GPU_LAYERS", help="layers on the GPU (default: all that fit)")
    add("-dev", "--device", metavar="NAME[,NAME]", env="LLAMA_ARG_DEVICE", help="devices for these layers, none = the CPU alone (default: all)")
    add("--list-devices", action="store_true", help="print the devices and exit")
    add("--rpc", metavar="HOST:PORT[,HOST:PORT]", env="LLAMA_ARG_RPC", help="use the devices of these RPC servers (only in a trusted network: the protocol has no password and no encryption)")
    add("-nkvo", "--no-kv-offload", dest="kv_offload", action="store_false", help="keep the cache in the memory of the CPU")
    add("-t", "--threads", type=number(int, 1), metavar="N", env="LLAMA_ARG_THREADS", help="CPU threads (default: by the number of cores)")
    add("-tb", "--threads-batch", type=number(int, 1), metavar="N", env="LLAMA_ARG_THREADS_BATCH", help="CPU threads for prompts and pictures (default: as --threads)")
    add("-lm", "--load-mode", choices=LOAD_MODES, metavar="MODE", env="LLAMA_ARG_LOAD_MODE", help=f"how the model is loaded: {', '.join(LOAD_MODES)} (default: auto)")
    add("-b", "--batch-size", dest="n_batch", type=number(int, 1), metavar="N", env="LLAMA_ARG_BATCH", help=f"logical batch (default: {defaults.n_batch})")
    add("-ub", "--ubatch-size", dest="n_ubatch", type=number(int, 1), metavar="N", env="LLAMA_ARG_UBATCH", help=f"physical batch (default: {defaults.n_ubatch})")
    add("-fa", "--flash-attn", dest="flash_attn", choices=FLASH_ATTN, env="LLAMA_ARG_FLASH_ATTN", help="flash attention: on, off, auto (default: auto)", metavar="on|off|auto")
    add("-ctk", "--cache-type-k", choices=CACHE_TYPES, metavar="TYPE", env="LLAMA_ARG_CACHE_TYPE_K", help=f"type of the hot keys: {', '.join(CACHE_TYPES)} (default: f16)")
    add("-ctv", "--cache-type-v", choices=CACHE_TYPES, metavar="TYPE", env="LLAMA_ARG_CACHE_TYPE_V", help="type of the hot values (default: f16)")
    add("--image-min-tokens", type=number(int, 1), metavar="N", env="LLAMA_ARG_IMAGE_MIN_TOKENS", help="fewest tokens of a picture, for projectors of variable size")
    add("--image-max-tokens", type=number(int, 1), metavar="N", env="LLAMA_ARG_IMAGE_MAX_TOKENS", help="most tokens of a picture, for projectors of variable size")
    add("--temp", "--temperature", dest="temp", type=number(float, 0), metavar="T", env="LLAMA_ARG_TEMPERATURE", help=f"temperature, 0 = always the likeliest token (default: {defaults.temp})")
    add("--top-k", type=number(int, 0), metavar="N", env="LLAMA_ARG_TOP_K", help=f"sample from the N likeliest tokens, 0 = all (default: {defaults.top_k})")
    add("--top-p", type=number(float, 0, 1), metavar="P", env="LLAMA_ARG_TOP_P", help=f"sample from the likeliest tokens that add up to P (default: {defaults.top_p})")
    add("--min-p", type=number(float, 0, 1), metavar="P", env="LLAMA_ARG_MIN_P", help="leave out tokens with less than P times the likeliest one's probability, 0 = none (default: 0)")
    add("--repeat-penalty", type=number(float, 0, 100, above=True), metavar="N", help="make tokens of the answer that come again less likely, 1 = no (default: 1)")
    add("--repeat-last-n", type=number(int, 0), metavar="N", help=f"of so many last tokens (default: {defaults.repeat_last_n})")
    add("-s", "--seed", type=number(int, -1, 0xFFFFFFFF), metavar="N", help="random seed, -1 = a new one each time (default: -1)")
    add("--image-cache", type=Path, metavar="DIR", env="LLAMA_ARG_IMAGE_CACHE", help="keep read pictures in this folder, for the next start (default: off)")
    add("--image-cache-mib", type=number(int, 1), metavar="N", env="LLAMA_ARG_IMAGE_CACHE_MIB", help=f"most MiB in that folder, the least recently used go first (default: {DEFAULT_MIB})")
    add("--json", action="store_true", help="one JSON object per answer instead of its text")
    add("-v", "--verbose", action="store_true", help="show llama.cpp's own log")
    return parser, twins
