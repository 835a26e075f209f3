"""What every language model here shares: the contract, its size, its cost, and its weights as a file holds them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gptcore.models.head import Head


class LanguageModel(nn.Module):
    """Base of all models. `vocab_size` is the number of ids it can emit, padding included.

    A family says how ids become what the head reads (`hidden`), and what it remembers between calls (`new_cache`).
    """

    block_size: int
    vocab_size: int
    lm_head: Head
    has_positions: bool = False  # True where the context cannot grow beyond block_size
    is_trained: bool = True  # False: fitted without gradients
    has_layers: bool = True  # False: model.n_layer means nothing

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        src: Tensor | None = None,
        cache: Any = None,
        reduction: str = "mean",
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits (B, T, V) of ids (B, T), or their loss against targets (B, T): then the logits may be None."""
        assert src is None, "only an encoder-decoder takes src"
        return self.read_out(self.hidden(idx, cache), targets, reduction)

    def hidden(self, idx: Tensor, cache: Any) -> Tensor:
        """Ids (B, T) to what the head reads, (B, T, C); with a cache, after all that it has seen."""
        raise NotImplementedError(type(self).__name__)

    def read_out(self, x: Tensor, targets: Tensor | None, reduction: str) -> tuple[Tensor | None, Tensor | None]:
        """The last hidden states x (B, T, C) to what `forward` returns."""
        if targets is None:
            return self.lm_head.logits(x), None
        # No logits beside a loss: nobody reads them, and whole they would be the largest tensor of a step.
        return None, self.lm_head.loss(x, targets, reduction)

    def new_cache(self, batch_size: int) -> Any:
        """State for generation of at most `block_size` further tokens; to be passed to every forward."""
        raise NotImplementedError(type(self).__name__)

    def matmul_parameters(self) -> int:
        """Parameters that are matrix-multiplied for each token: look-up tables, gains and biases do not count."""
        raise NotImplementedError(type(self).__name__)

    def flops_per_token(self) -> float:
        """Training FLOPs of one token, forward and backward (6N, Kaplan et al. 2020, plus attention)."""
        # A weight is one multiplication and one addition forwards, and twice that backwards: once for the gradient of what
        # came in, once for the weight's own.
        return 6.0 * self.matmul_parameters()

    def count_parameters(self) -> int:
        """Tied parameters count once; a quantized matrix has as many as the one it stands for."""
        stored = sum(int(getattr(module, "stored_parameters", 0)) for module in self.modules())
        return stored + sum(p.numel() for p in self.parameters())

    def weights(self) -> dict[str, Tensor]:
        """Parameters and lasting buffers by name, a tied one once and under its first name: what a file holds."""
        # `state_dict` alone would name a tied matrix twice, and safetensors refuses two names for one memory.
        lasting = self.state_dict().keys()
        buffers = {name: buffer for name, buffer in self.named_buffers() if name in lasting}
        return {name: parameter.detach() for name, parameter in self.named_parameters()} | buffers

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Copy `weights()` back in. Names must match exactly."""
        # Not strict: the second name of a tied matrix is missing, and is filled by its first.
        missing, unexpected = self.load_state_dict(tensors, strict=False)
        lacking = set(self.weights()) & set(missing)
        assert not lacking, f"weights do not fit: missing {sorted(lacking)}"
        assert not unexpected, f"weights do not fit: unknown {unexpected}"
