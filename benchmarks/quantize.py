"""GPT-2 124M decoding one token at a time over a KV cache: quantized weights against fp32, speed and file size.

    .venv/bin/python benchmarks/quantize.py [--methods int8 int4 …] [--rounds 5]                       # about 3 minutes on 2 cores
    .venv/bin/python benchmarks/quantize.py --device cuda --methods bf16 int8 int4 fp8 --tokens 512    # half a minute; no speed goals

Speed and size do not depend on what the weights are, so they are random and nothing is downloaded. All arms take turns within a round,
each decodes the same number of tokens from the start of a context. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

# Between the 50 kernels of a token OpenMP's threads had better wait awake, as GNU's own default has it; gptcore shortens that for
# trainings that share their cores. The same for all arms.
os.environ.setdefault("GOMP_SPINCOUNT", "300000")

import torch
from figures import figure, print_figures, say
from safetensors.torch import save_file

from gptcore.config import ModelConfig
from gptcore.generate import generate
from gptcore.models import LanguageModel, build_model
from gptcore.quantize import METHODS, quantize

SPEED_GOALS = {"int8": 3.5, "int4": 6.0}
SIZE_GOALS = {"int8": 27.0, "int4": 16.0}  # percent of fp32
VOCAB = {"cpu": 50_257, "cuda": 50_304}  # padded where kernels want multiples of 8


def file_bytes(model: LanguageModel) -> int:
    """Size of the model as a safetensors file."""
    with tempfile.TemporaryDirectory(prefix="gptloom-bench-") as name:
        path = Path(name) / "model.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in model.weights().items()}, path)
        return path.stat().st_size


def decode(model: LanguageModel, batch: int, tokens: int, device: str) -> float:
    """Tokens a second over all rows, sampling included, and on a GPU recording too."""
    idx = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    rng = torch.Generator(device).manual_seed(0)
    start = time.perf_counter()
    generate(model, idx, tokens, rng).tolist()  # waits for the device
    return batch * tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=["int8", "int4"], choices=list(METHODS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--preset", default="gpt2", choices=["gpt2", "modern"], help="gpt2 ties embedding and head")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64, help="decoded by each arm in each round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA GPU here; leave --device out to measure on the CPU")
    torch.manual_seed(0)
    config = ModelConfig(preset=args.preset, n_layer=12, n_head=12, n_embd=768, block_size=1024)
    full = build_model(config, VOCAB[args.device]).eval().to(args.device)
    arms = {"fp32": full}
    for method in args.methods:
        say(f"quantizing: {method}")
        arms[method] = quantize(full, METHODS[method].by_rounding())
    sizes = {name: file_bytes(model) for name, model in arms.items()}
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(args.rounds + 1):
        for name, model in arms.items():
            speed = decode(model, args.batch, args.tokens if number or args.device == "cuda" else 4, args.device)
            if number:  # the first round warms up
                speeds[name].append(speed)
        say(f"round {number}: " + ", ".join(f"{n} {s[-1]:.1f}" for n, s in speeds.items() if s))
    found = []
    for name in args.methods:
        goal = SPEED_GOALS.get(name) if args.batch == 1 and args.device == "cpu" else None
        goals = {} if goal is None else {"goal": goal, "goal_is": "at least", "of": "ratio"}
        label = f"{name}: decoding, batch {args.batch}"
        found.append(figure(label, "tok/s", speeds[name], peer=speeds["fp32"], digits=1, **goals))
        size = [100 * sizes[name] / sizes["fp32"]]
        found.append(figure(f"{name}: file size", "% of fp32", size, goal=SIZE_GOALS.get(name), digits=2))
    print_figures(found, parameters=full.count_parameters(), fp32_bytes=sizes["fp32"])


if __name__ == "__main__":
    main()
