"""The device's part of a night, in one process: judge the new text, train the arms, evaluate every model on every hold-out.

    python -m gptcore.nights PLAN.json --out DIR --run NAME [--parent NAME]

The plan (written by tasks/nightly.py) names models by key and hold-outs by night:

    champion   {key, checkpoint} or null          judge     {holdout, percent}: refuse unreadable text before training
    models     [{key, checkpoint}]  earlier champions, for the ledger
    arms       [{key, config, shards}]            holdouts  [{name, shards: {vocabulary fingerprint: directory}}]
    scores     where <key>/<hold-out>.npz go; what is there already is not measured again

An arm is an ordinary training in a folder of its own, with journal and checkpoints: a night that was cut short goes on.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from gptcore.checkpoint import load_model
from gptcore.config import UserError, load_config
from gptcore.device import choose_device
from gptcore.entry import process_parser
from gptcore.evaluate import SplitView, evaluate_loss
from gptcore.models import LanguageModel
from gptcore.nights.scores import Scores, save_scores, score_path
from gptcore.ranks import ALONE
from gptcore.reciting import recite
from gptcore.shards import ShardSet
from gptcore.store import read_json, write_json
from gptcore.train.run import run_training

log = logging.getLogger(__name__)

JUDGED_TOKENS = 1 << 17
LEAST_GAIN = 0.05  # a record whose order saves the model less than this share of its bits is unreadable to it


def main(argv: list[str]) -> dict[str, Any]:
    args = process_parser(__doc__, "plan", "what to do tonight (JSON)").parse_args(argv)
    plan = read_json(args.plan)
    if args.out is None or args.run is None:
        raise UserError("a night needs --out DIR and --run NAME; `gptloom nightly` gives both")
    result: dict[str, Any] = {"arms": {}, "unreadable_percent": None}
    judge = Judge(plan, args.out)
    if plan["judge"] and plan["champion"]:
        result["unreadable_percent"] = judge.unreadable_percent()
        if result["unreadable_percent"] > plan["judge"]["percent"]:
            return result
    for arm in plan["arms"]:
        log.info("arm %s", arm["key"])
        directory = args.out / arm["key"]
        trained = run_training(
            load_config(arm["config"]), ShardSet.open(arm["shards"]), directory, ALONE, f"{args.run}/{arm['key']}", args.run
        )
        write_json(directory / "result.json", trained)
        result["arms"][arm["key"]] = trained
    for model in [plan["champion"], *plan["models"]] if plan["champion"] else plan["models"]:
        judge.evaluate(model["key"], Path(model["checkpoint"]))
    for arm in plan["arms"]:
        trained = result["arms"][arm["key"]]
        model = judge.evaluate(f"{args.run}/{arm['key']}", Path(trained["checkpoint"]))
        own = ShardSet.open(arm["shards"])
        trained["recited"] = [recite(model, own, split, judge.device).share for split in ("train", "val")]
    return result


class Judge:
    """Hold-outs, and what has been measured on them."""

    def __init__(self, plan: dict[str, Any], out: Path) -> None:
        self.plan, self.out, self.scores = plan, out, Path(plan["scores"])
        config = load_config(plan["arms"][0]["config"])
        self.batch_size = config.evaluate.batch_size
        self.device = choose_device(config.train.device, config.train.precision)

    def unreadable_percent(self) -> float:
        """Share (per cent) of tonight's new text whose order means nothing to the champion.

        A record is read as it is and with its ids shuffled. Whoever knows a language, even badly, loses by the shuffling,
        whatever the author; in damaged text, or in another language, there is nothing to lose. Both splits are new to the
        champion, so both are read, JUDGED_TOKENS of each at most.
        """
        model, loaded = load_model(Path(self.plan["champion"]["checkpoint"]), self.device.torch)
        (places,) = (h["shards"] for h in self.plan["holdouts"] if h["name"] == self.plan["judge"]["holdout"])
        shards = ShardSet.open(places[loaded.state["vocab_fingerprint"]])
        unreadable = total = 0.0
        for split in ("val", "train"):
            nats = []
            for is_shuffled in (False, True):
                view = SplitView(shards, split, JUDGED_TOKENS, is_shuffled=is_shuffled)
                seen = evaluate_loss(model, view, self.device, self.batch_size, JUDGED_TOKENS)
                nats.append(seen.record_nats)
            sizes = view.index(split)[:, 2].astype(np.float64)
            unreadable += float(sizes[nats[0] > (1 - LEAST_GAIN) * nats[1]].sum())
            total += float(sizes.sum())
        log.info("%.1f %% of the new text is unreadable to the champion", 100 * unreadable / total)
        return 100 * unreadable / total

    def evaluate(self, key: str, checkpoint: Path) -> LanguageModel:
        """Measure a model on the hold-outs where it has not been, and that are there in its vocabulary; returns it."""
        model, loaded = load_model(checkpoint, self.device.torch)
        fingerprint = loaded.state["vocab_fingerprint"]
        for holdout in self.plan["holdouts"]:
            path = score_path(self.scores, key, holdout["name"])
            if path.exists() or fingerprint not in holdout["shards"]:
                continue
            shards = ShardSet.open(holdout["shards"][fingerprint])
            evaluation = evaluate_loss(model, shards, self.device, self.batch_size)
            sources = shards.index("val")[:, 3]
            scores = Scores(evaluation.record_nats, evaluation.record_bytes, evaluation.record_documents, sources)
            save_scores(path, scores)
            log.info("%s on %s: %.4f bits per byte", key, holdout["name"], scores.bpb)
        return model
