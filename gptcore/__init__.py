"""gptcore: text to trained language model, as a plain library.

It knows no orchestrator and no tracker: `python -m gptcore.train CONFIG.yaml` runs on a bare machine. Its files
are numbered along one token's journey (README, "The tree"); a file imports only lower numbers and the side
files config, store, journal, entry, device and timing.
"""

__version__ = "0.1.0"

import os
import sys

# `python -m gptcore.…` looks for whatever it imports in the folder it is called in first, where a user's own random.py may lie.
_is_command = sys.argv[:1] == ["-m"] and any(word.startswith("gptcore.") for word in sys.orig_argv)
if _is_command and sys.path[0] == os.getcwd() and not os.path.samefile(sys.path[0], os.path.dirname(__path__[0])):
    del sys.path[0]

# Part of the key of every kept study result: raised when the same config begins to give other numbers.
NUMERICS_VERSION = 2

# OpenMP threads that wait by spinning make a training crawl as soon as another process wants a core: on 2 cores with one
# busy neighbour a step of the small GPT took over 1,500 ms instead of 155, with a short spin 370 ms, and no slower when alone.
# Read by GNU's runtime when torch is loaded, hence here.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
