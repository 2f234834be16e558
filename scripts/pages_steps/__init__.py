"""Pages that follow from something else."""

from __future__ import annotations

from pathlib import Path

from . import chart, flags, includes


def made(root: Path) -> dict[Path, str]:
    """What each page should hold."""
    return {
        root / "docs" / "reference" / "flags.md": flags.page(root),
        root / "docs" / "pictures" / "quality.svg": chart.quality(root / "docs" / "results" / "demo-quality.json"),
        root / "docs" / "pictures" / "includes.svg": includes.picture(root / "patches" / "files"),
    }
