"""gptcore: text to trained language model, as a plain library.

It knows no orchestrator and no tracker: `python -m gptcore.train CONFIG.yaml` runs on a bare machine. Its files
are numbered along one token's journey (README, "The tree"); a file imports only lower numbers and the side
files config, store, journal, entry, device and timing.
"""

__version__ = "0.1.0"
