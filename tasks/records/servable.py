"""What MLflow runs for a registered model: text in, text out. This file is the model's code; its weights are a checkpoint.

mlflow models serve -m models:/shakespeare@champion --env-manager local        # where gptloom is installed
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class TextModel(PythonModel):
    """A list of prompts becomes a list of continued texts."""

    def load_context(self, context: Any) -> None:
        from gptcore.checkpoint import load_model
        from gptcore.vocab import Vocab

        directory = Path(context.artifacts["checkpoint"])
        self.model = load_model(directory)[0]
        self.vocab = Vocab.load(directory)

    def predict(self, context, model_input, params=None):  # hints would replace the signature
        """`model_input`: texts, or a table whose first column holds them; `params`: see the signature."""
        asked = {"max_new_tokens": 200, "temperature": 0.8, "seed": 0, **(params or {})}
        prompts = model_input.iloc[:, 0] if hasattr(model_input, "iloc") else model_input
        return [self._continue(str(prompt), **asked) for prompt in prompts]

    def _continue(self, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> str:
        import numpy as np
        import torch

        from gptcore.generate import generate

        rng = torch.Generator().manual_seed(int(seed))
        ids = np.concatenate(([self.vocab.eot_id], self.vocab.encode(prompt))).astype(np.int64)
        idx = torch.from_numpy(ids)[None, -self.model.block_size :]
        out = generate(self.model, idx, int(max_new_tokens), rng, temperature=temperature, vocab_size=self.vocab.size)
        return prompt + self.vocab.decode(out[0].numpy())


set_model(TextModel())
