"""python -m kvcapsule_gguf.inspect"""

import sys

from ..runtime.start import inspect

sys.exit(inspect())
