"""The gradients of batches as several processes make it: started by the accumulation study.

torchrun --nproc-per-node=2 -m gptcore.studies.accumulation.ranks CONFIG.yaml --shards DIR --out DIR

Reads `batch.safetensors` (weights, x, targets of each kind) in --out; the first process writes `gradients.safetensors` there.
"""

from __future__ import annotations

from typing import Any

from safetensors.torch import load_file, save_file

from gptcore.config import load_config
from gptcore.entry import process_parser, run_process
from gptcore.ranks import joined_ranks
from gptcore.shards import ShardSet
from gptcore.studies.accumulation.exactness import flat_gradient
from gptcore.train import build_trainer
from gptcore.train.step import backward_all
from gptcore.train.trainer import build_forward


def main(argv: list[str]) -> dict[str, Any]:
    args = process_parser(__doc__, "config", "experiment file (YAML)").parse_args(argv)
    with joined_ranks() as ranks:
        trainer = build_trainer(load_config(args.config), ShardSet.open(args.shards))
        tensors = load_file(args.out / "batch.safetensors")
        x = tensors["x"]
        weights = {name.removeprefix("weight/"): t for name, t in tensors.items() if name.startswith("weight/")}
        trainer.model.double()
        trainer.model.load_weights(weights)
        trainer.ranks, trainer.forward = ranks, build_forward(trainer.model, trainer.device, ranks, "off")
        local = len(x) // ranks.count
        trainer.micro_batch_size = max(1, local // 2)  # two micro-steps in each process
        mine = slice(ranks.rank * local, (ranks.rank + 1) * local)
        gradients = {}
        for name, y in tensors.items():
            if name.startswith("targets/"):
                trainer.optimizers.zero_grad()
                backward_all(trainer, x[mine], y[mine])
                scale = trainer.tokens_per_step / int((y >= 0).sum())
                gradients[name.removeprefix("targets/")] = flat_gradient(trainer.model) * scale
        if ranks.is_first:
            save_file(gradients, args.out / "gradients.safetensors")
    return {"ranks": ranks.count}


if __name__ == "__main__":
    raise SystemExit(run_process(main))
