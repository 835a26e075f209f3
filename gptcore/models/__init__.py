"""Room 5: the models. One contract for all, so trainer, evaluation and generation never ask which one they hold.

    forward(idx, targets=None, *, src=None, cache=None, reduction="mean"|"sum"|"none") -> (logits, loss)

`idx`, `targets`: int64 (B, T); a target of -1 is ignored; logits (B, T, V), which may be None beside a loss; loss in nats. With `cache`
(from `new_cache(batch_size)`) `idx` continues what the cache has seen. `src` is for encoder–decoders; the others refuse it.
"""

from gptcore.models.base import LanguageModel
from gptcore.models.build import build_model

__all__ = ["LanguageModel", "build_model"]
