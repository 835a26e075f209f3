"""Room 10: the next id, again and again. Sampling with temperature and top-k over a cache, streamed or whole."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptcore.checkpoint import check_checkpoint, load_model
from gptcore.config import ExperimentConfig, load_config
from gptcore.decoding import Step, start_decoding
from gptcore.device import choose_device
from gptcore.entry import process_parser, recording, run_process
from gptcore.journal import Journal
from gptcore.models import LanguageModel
from gptcore.store import write_json
from gptcore.vocab import Vocab


def pick_next(logits: Tensor, temperature: float, top_k: int | None, rng: torch.Generator) -> Tensor:
    """Draw one id a row. logits: (B, V); returns (B, 1). Temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    if top_k is not None and top_k < logits.size(-1):
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    # One uniform number a row, looked up in the running sum: torch.multinomial draws one for each id of the vocabulary, which at
    # 50,000 ids takes as long as a whole model in int4. Ids of probability 0 are steps of height 0 and never hit.
    below = logits.softmax(-1).cumsum(-1)  # (B, V)
    drawn = torch.rand(len(logits), 1, device=logits.device, generator=rng) * below[:, -1:]
    return torch.searchsorted(below, drawn.clamp_max_(below[:, -1:].nextafter(below.new_zeros(1))), right=True)


@torch.inference_mode()
def stream_ids(
    model: LanguageModel,
    idx: Tensor,
    max_new_tokens: int,
    rng: torch.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[Tensor]:
    """Yield the next id of each row, (B, 1), `max_new_tokens` times. idx: (B, T) with T >= 1.

    A model with positions forgets the older half of its context whenever its `block_size` is full: the cache is then
    refilled from the newer half. `vocab_size` keeps padding rows of the head from being drawn.
    """

    def pick(logits: Tensor) -> Tensor:
        return pick_next(logits[:, :vocab_size], temperature, top_k, rng)

    def start(given: int, left: int) -> Step:
        tokens = min(given + left, model.block_size) if model.has_positions else given + left
        return start_decoding(model, len(idx), tokens, pick, rng)

    step, pending, context = start(idx.size(1), max_new_tokens), idx, [idx]
    used = 0
    for number in range(max_new_tokens):
        if model.has_positions:
            if used + pending.size(1) > model.block_size:
                pending = torch.cat(context, dim=1)[:, -max(1, model.block_size // 2) :]
                step, used, context = start(pending.size(1), max_new_tokens - number), 0, [pending]
            used += pending.size(1)
        pending = step(pending)  # (B, 1)
        if model.has_positions:
            context.append(pending)
        yield pending


def generate(model: LanguageModel, idx: Tensor, max_new_tokens: int, rng: torch.Generator, **sampling: Any) -> Tensor:
    """`stream_ids` gathered: (B, max_new_tokens)."""
    return torch.cat(list(stream_ids(model, idx, max_new_tokens, rng, **sampling)), dim=1)


def main(argv: list[str]) -> dict[str, Any]:
    parser = process_parser(__doc__, "checkpoint", "a step_NNNNNN directory")
    parser.add_argument(
        "--config", type=Path, help="experiment file with an `evaluate` section (default: the checkpoint's own)"
    )
    parser.add_argument("--prompt", help="start of the text (default: evaluate.prompt)")
    args = parser.parse_args(argv)
    check_checkpoint(args.checkpoint)
    config = load_config(args.config or args.checkpoint / "config.yaml")
    with recording(args.out, args.run, args.parent) if args.out else nullcontext() as journal:
        result = write_samples(config, args.checkpoint, args.prompt, args.out, journal)
    for sample in result["samples"]:
        print(sample, end="\n\n", file=sys.stderr)
    return result


def write_samples(
    config: ExperimentConfig, directory: Path, prompt: str | None, out: Path | None, journal: Journal | None
) -> dict[str, Any]:
    """Samples of the checkpoint in `directory` as `config.evaluate` asks for them; returned, and kept in `out` with its journal."""
    settings = config.evaluate
    device = choose_device(config.train.device, "fp32")
    model, checkpoint = load_model(directory, device.torch)
    vocab = Vocab.load(directory / "tokenizer.json")
    rng = torch.Generator(device.torch).manual_seed(settings.seed)
    prompt = settings.prompt if prompt is None else prompt
    ids = np.concatenate(([vocab.eot_id], vocab.encode(prompt))).astype(np.int64)
    n_samples = max(1, settings.samples)
    idx = torch.from_numpy(ids).to(device.torch).repeat(n_samples, 1)[:, -model.block_size :]
    start = time.perf_counter()
    sampling = {"temperature": settings.temperature, "top_k": settings.top_k, "vocab_size": vocab.size}
    sampled = generate(model, idx, settings.sample_tokens, rng, **sampling)
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {
        "samples": [prompt + vocab.decode(row) for row in sampled.cpu().numpy()],
        "tok_per_sec": sampled.numel() / seconds,
        "seconds": seconds,
    }
    if out is not None and journal is not None:
        write_json(out / "samples.json", result, has_checksum=False)
        journal.tags(device.tags())
        chosen = settings.model_dump(include={"temperature", "top_k", "seed"})
        journal.params({"checkpoint_step": checkpoint.state["step"], **chosen})
        journal.metrics({"generate/tok_per_sec": result["tok_per_sec"]}, tokens_seen=checkpoint.state["tokens_seen"])
        journal.artifact("samples.json")
    return result


if __name__ == "__main__":
    raise SystemExit(run_process(main))
