"""python -m kvcapsule_gguf.bench"""

import sys

from ..runtime.start import bench

sys.exit(bench())
