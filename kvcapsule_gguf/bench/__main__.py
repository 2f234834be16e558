"""python -m kvcapsule_gguf.bench"""

import sys

from .cli import main

sys.exit(main())
