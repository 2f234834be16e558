"""What the converters share: logging, output names, one line for an error."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kvcapsule_gguf.format.tile_capsule import TileCapsule
from kvcapsule_gguf.runtime.errors import CapsuleError


def options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--dry-run", action="store_true", help="only check and say what would be written")
    p.add_argument("--verbose", action="store_true", help="say more")


def outfile(given: Path | None, default: Path, outtype: str) -> Path:
    """--outfile may have {ftype} in it, as llama.cpp's converters allow."""
    return Path(str(given).replace("{ftype}", outtype)) if given else default


def describe(logger: logging.Logger, capsule: TileCapsule) -> None:
    tiers = ", ".join(f"{x:.2f}x" for x in capsule.smaller)
    logger.info("%s: %d layers of %s, tiers of %s", capsule.name or "capsule", len(capsule.layers), capsule.base.architecture, tiers)


def main(logger: logging.Logger, args: argparse.Namespace, work: Callable[[argparse.Namespace], Path]) -> int:
    """work returns the path of what it wrote, or would have written."""
    logging.basicConfig(level=logging.DEBUG if args.verbose else logging.INFO, format="%(levelname)s:%(name)s:%(message)s", stream=sys.stderr)
    logging.getLogger("gguf").setLevel(logging.WARNING)
    try:
        path = work(args)
    except ImportError as error:
        logger.error("%s: pip install 'kvcapsule-gguf[converters]'", error)
        return 1
    except (CapsuleError, OSError) as error:
        logger.error("%s", error)
        return 1
    logger.info("dry run, nothing written: %s" if args.dry_run else "written to %s", path)
    return 0
