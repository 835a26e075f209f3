"""Room 9: the loop that drives all the rooms below it.

    python -m gptcore.train experiments/smoke.yaml [section.field=value …]
    python -m gptcore.train CONFIG.yaml --shards DIR --out DIR
    python -m gptcore.train CONFIG.yaml train.processes=4 train.parallel=fsdp
    torchrun --nproc-per-node=4 -m gptcore.train CONFIG.yaml --shards DIR --out DIR

`trainer` holds what a run is made of, `distribute` has it on several GPUs, `step` is one update of the weights, `graph` the same as one CUDA graph, `preflight` says
beforehand what a run will take, `loop` steps, evaluates and saves until the end, `saving` writes and resumes, `report` tells.
Needs torch, numpy, pydantic, PyYAML and safetensors only.
"""

from gptcore.train.loop import train_loop
from gptcore.train.preflight import preflight
from gptcore.train.saving import resume
from gptcore.train.step import accumulate_gradients, train_step
from gptcore.train.trainer import Trainer, build_trainer

__all__ = ["Trainer", "accumulate_gradients", "build_trainer", "preflight", "resume", "train_loop", "train_step"]
