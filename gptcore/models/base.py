"""What every language model here shares: the contract, its size, its cost, and its weights as a file holds them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gptcore.models.losses import cross_entropy

__all__ = ["LanguageModel", "cross_entropy", "without_src"]


class LanguageModel(nn.Module):
    """Base of all models. `vocab_size` is the number of ids it can emit, padding included."""

    block_size: int
    vocab_size: int
    has_positions: bool = False  # True where the context cannot grow beyond block_size

    def new_cache(self, batch_size: int) -> Any:
        """State for generation of at most `block_size` further tokens; to be passed to every forward."""
        raise NotImplementedError(type(self).__name__)

    def matmul_parameters(self) -> int:
        """Parameters that are matrix-multiplied for each token: look-up tables, gains and biases do not count."""
        raise NotImplementedError(type(self).__name__)

    def flops_per_token(self) -> float:
        """Training FLOPs of one token, forward and backward (6N, Kaplan et al. 2020, plus attention)."""
        return 6.0 * self.matmul_parameters()

    def count_parameters(self) -> int:
        """Tied parameters count once; a quantized matrix has as many as the one it stands for."""
        stored = sum(int(getattr(module, "stored_parameters", 0)) for module in self.modules())
        return stored + sum(p.numel() for p in self.parameters())

    def weights(self) -> dict[str, Tensor]:
        """Parameters and lasting buffers by name, a tied one once and under its first name: what a file holds."""
        lasting = self.state_dict().keys()
        buffers = {name: buffer for name, buffer in self.named_buffers() if name in lasting}
        return {name: parameter.detach() for name, parameter in self.named_parameters()} | buffers

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Copy `weights()` back in. Names must match exactly."""
        missing, unexpected = self.load_state_dict(tensors, strict=False)
        lacking = set(self.weights()) & set(missing)
        assert not lacking, f"weights do not fit: missing {sorted(lacking)}"
        assert not unexpected, f"weights do not fit: unknown {unexpected}"


def without_src(src: Tensor | None) -> None:
    assert src is None, "only an encoder-decoder takes src"
