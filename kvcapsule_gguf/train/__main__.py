"""python -m kvcapsule_gguf.train"""

import sys

from ..runtime.start import train

sys.exit(train())
