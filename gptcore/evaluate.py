"""Room 8: the fixed yardstick. The whole validation split, each token once, in order; bits per byte is the headline."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from gptcore.batches import val_batches
from gptcore.checkpoint import check_checkpoint, load_model
from gptcore.config import UserError, load_config
from gptcore.device import Device, choose_device
from gptcore.entry import process_parser, recording, run_process
from gptcore.models import LanguageModel
from gptcore.ranks import ALONE, Ranks
from gptcore.resampling import ratio_interval
from gptcore.shards import ShardSet, TokenView
from gptcore.store import write_json


@dataclass(frozen=True)
class Evaluation:
    """Sums over target tokens, kept by record (document or section) so that an interval can resample them."""

    nats: float  # all targets
    tokens: int
    record_nats: np.ndarray  # (records,) of text targets: `<|endoftext|>` excluded
    record_bytes: np.ndarray  # (records,) UTF-8 bytes of those targets
    position_nats: np.ndarray  # (block_size,) mean nats of a target by its position in the window
    record_documents: np.ndarray  # (records,) number of each record's document: what an interval may draw together

    @property
    def loss(self) -> float:
        """Mean nats per target token."""
        return self.nats / self.tokens

    @property
    def ppl(self) -> float | None:
        """Perplexity; None for a loss whose exponential no number holds: 709.8 nats and more."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return None

    @property
    def bpb(self) -> float:
        """Bits per byte of the target text."""
        return float(self.record_nats.sum() / (math.log(2) * self.record_bytes.sum()))

    def metrics(self) -> dict[str, float]:
        values = {"val/loss": self.loss, "val/ppl": self.ppl, "val/bpb": self.bpb}
        return {key: value for key, value in values.items() if value is not None}


class HeldOutText(Protocol):
    """What the evaluation asks of a shard set, so that a view of one can stand in its place."""

    directory: Path
    eot_id: int
    token_bytes: np.ndarray

    def tokens(self, split: str) -> np.ndarray | TokenView: ...

    def index(self, split: str) -> np.ndarray: ...


class SplitView:
    """A shard set whose `split` stands where the evaluation looks for validation text, up to its first `max_tokens` ids (0: all).

    is_shuffled: every record's ids in random order.
    """

    def __init__(self, shards: ShardSet, split: str, max_tokens: int = 0, *, is_shuffled: bool = False) -> None:
        self.directory, self.eot_id, self.token_bytes = shards.directory, shards.eot_id, shards.token_bytes
        index = shards.index(split)
        ids = np.asarray(shards.tokens(split)[: max_tokens or None])
        self._view, self._index = ids, index[index[:, 0] < len(ids)]
        if is_shuffled:
            self._view = ids.copy()
            rng = np.random.default_rng(0)
            ends = np.append(self._index[1:, 0], len(ids))
            for begin, end in zip(self._index[:, 0] + 1, ends, strict=True):
                rng.shuffle(self._view[begin:end])

    def tokens(self, split: str) -> np.ndarray | TokenView:
        return self._view

    def index(self, split: str) -> np.ndarray:
        return self._index


@torch.no_grad()
def evaluate_loss(
    model: LanguageModel, shards: HeldOutText, device: Device, batch_size: int, max_tokens: int = 0, *, ranks: Ranks = ALONE
) -> Evaluation:
    """Evaluate on the validation split: its first `max_tokens` tokens in whole batches, or all of it when 0; several processes share
    the work.

    Each process makes the same number of passes, also where there is nothing left for it: the weights may be spread over all.
    Windows of `block_size` tokens do not overlap, so the first token of a window is predicted from one token of context,
    as in training. Raises UserError when the split holds no two tokens.
    """
    T = model.block_size
    was_training = model.training
    model.eval()
    tokens, index = shards.tokens("val"), shards.index("val")
    starts = index[:, 0]
    record_nats, record_bytes = np.zeros(len(index)), np.zeros(len(index))
    position_nats, position_count = np.zeros(T), np.zeros(T)
    nats, seen, passes, rounds = 0.0, 0, 0, 0
    for number, (x, y) in enumerate(val_batches(tokens, T, batch_size)):
        if max_tokens and seen >= max_tokens:
            break
        is_target, rounds = y >= 0, number // ranks.count + 1
        if number % ranks.count != ranks.rank:  # another process's
            seen += int(is_target.sum())
            continue
        passes += 1
        losses = _losses(model, device, x, y)
        flat, targets = losses[is_target], y[is_target]
        records = np.searchsorted(starts, np.arange(seen + 1, seen + 1 + targets.size), side="right") - 1
        is_text = targets != shards.eot_id
        np.add.at(record_nats, records[is_text], flat[is_text])
        np.add.at(record_bytes, records[is_text], shards.token_bytes[targets[is_text]])
        position_nats += np.where(is_target, losses, 0.0).sum(0)
        position_count += is_target.sum(0)
        nats += float(flat.sum())
        seen += targets.size
    if passes < rounds:
        _losses(model, device, x, y)
    model.train(was_training)
    sums = torch.from_numpy(np.concatenate((record_nats, record_bytes, position_nats, position_count, [nats])))
    ranks.sum_(sums)  # float64, on the CPU
    cuts = np.cumsum([len(index), len(index), T, T])
    record_nats, record_bytes, position_nats, position_count, (nats,) = np.split(sums.numpy(), cuts)
    if not seen:
        raise UserError(
            f"{shards.directory}: the validation split holds no two tokens; give more text or a larger data.val_fraction"
        )
    if not max_tokens:
        # Every text token was a target, so the bytes are those of the text itself, unknown characters included.
        record_bytes = index[:, 2].astype(np.float64)
    return Evaluation(float(nats), seen, record_nats, record_bytes, position_nats / np.maximum(position_count, 1), index[:, 1])


def _losses(model: LanguageModel, device: Device, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Nats of every target, (B, T) float64."""
    with device.autocast():
        loss = model(torch.from_numpy(x).to(device.torch), torch.from_numpy(y).to(device.torch), reduction="none")[1]
    assert loss is not None
    return loss.float().cpu().numpy().astype(np.float64)


def bootstrap_bpb(evaluation: Evaluation, resamples: int, seed: int) -> tuple[float, float, str] | None:
    """95 % percentile interval of bits per byte, and what was resampled; None where too little can be resampled."""
    bits = evaluation.record_nats / math.log(2)
    return ratio_interval(bits, evaluation.record_bytes, evaluation.record_documents, resamples, seed)


def main(argv: list[str]) -> dict[str, Any]:
    parser = process_parser(__doc__, "checkpoint", "a step_NNNNNN directory")
    parser.add_argument("--config", type=Path, help="experiment file (default: the checkpoint's own)")
    args = parser.parse_args(argv)
    if args.shards is None or args.out is None:
        raise UserError(
            "evaluate needs --shards DIR, which `gptloom data EXPERIMENT.yaml` prints (a checkpoint's config.yaml will do), and --out DIR "
            "for its results"
        )
    start = time.perf_counter()
    shards = ShardSet.open(args.shards)
    check_checkpoint(args.checkpoint)
    config = load_config(args.config or args.checkpoint / "config.yaml")
    device = choose_device(config.train.device, config.train.precision)
    torch.manual_seed(config.evaluate.seed)
    model, checkpoint = load_model(args.checkpoint, device.torch)
    if checkpoint.state["vocab_fingerprint"] != shards.fingerprint:
        raise UserError(
            f"checkpoint {args.checkpoint} was trained with another vocabulary than --shards {args.shards}; give the shard set of its run"
        )
    with recording(args.out, args.run, args.parent) as journal:
        evaluation = evaluate_loss(model, shards, device, config.evaluate.batch_size)
        result: dict[str, Any] = {
            "val_loss": evaluation.loss,
            "val_ppl": evaluation.ppl,
            "val_bpb": evaluation.bpb,
            "tokens": evaluation.tokens,
            "bytes": int(evaluation.record_bytes.sum()),
            "loss_by_position": [round(float(x), 5) for x in evaluation.position_nats],
            "parameters": model.count_parameters(),
            "checkpoint": str(args.checkpoint.resolve()),
        }
        metrics = evaluation.metrics()
        interval = bootstrap_bpb(evaluation, config.evaluate.bootstrap, config.evaluate.seed)
        if interval is not None:
            low, high, unit = interval
            result |= {"val_bpb_low": low, "val_bpb_high": high, "interval_unit": unit}
            metrics |= {"val/bpb_low": low, "val/bpb_high": high}
        result["seconds"] = time.perf_counter() - start
        journal.tags(device.tags())
        journal.params({"checkpoint_step": checkpoint.state["step"], "tokens": evaluation.tokens, "bytes": result["bytes"]})
        journal.metrics(
            metrics | {"evaluate/seconds": result["seconds"]},
            tokens_seen=checkpoint.state["tokens_seen"],
            step=checkpoint.state["step"],
        )
        write_json(args.out / "evaluation.json", result, has_checksum=False)
        journal.artifact("evaluation.json")
    return result


if __name__ == "__main__":
    raise SystemExit(run_process(main))
