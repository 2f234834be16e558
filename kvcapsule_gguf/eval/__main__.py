"""python -m kvcapsule_gguf.eval"""

import sys

from ..runtime.start import evaluate

sys.exit(evaluate())
