"""make_context.py FOLDER: writes model.gguf and capsule.gguf, a tiny model and its capsule, for context.cpp."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from attacks.make import MODEL  # noqa: E402
from make_capsule import random_capsule  # noqa: E402
from tiny_gguf import write  # noqa: E402

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    model = write(MODEL, folder / "model.gguf")
    random_capsule(model, folder / "capsule.gguf", tiers=[4, 8])
