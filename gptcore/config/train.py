"""`train`: the optimizer's loop. Batches are stated in sequences per optimizer step."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from gptcore.config.base import Section

DeviceName = Literal["auto", "cpu", "cuda"]
ENDS = ("max_steps", "max_tokens", "minutes")
DEFAULT_STEPS = 1000  # where the file names no end at all

# What may differ in a run that goes on: how the work is cut up and what is kept, not what is learnt.
MAY_CHANGE = {"micro_batch_size", "processes", "parallel", "save_interval", "keep_checkpoints", "keep_interval"}


class TrainConfig(Section):
    """The optimizer's loop. A run ends at the first of max_steps, max_tokens and minutes that is given."""

    seed: int = Field(1337, ge=0, lt=2**63, title="Seed", description="Seed of weights, sample order and dropout.")
    init_from: str | None = Field(None, min_length=1)
    """Checkpoint directory (step_NNNNNN) whose weights the run starts from; empty: random weights."""
    device: DeviceName = Field("auto", title="Device", description="auto: a CUDA GPU if there is one, else the CPU.")
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16", "fp8"] = "auto"
    """Arithmetic of the matrix products. auto: bf16 on a GPU that has it, fp32 on a CPU. fp16 scales the loss; fp8 is bf16 with
    the large products in 8 bits."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile. auto: on for a GPU with a compiler, off on a CPU, where short runs never earn it back."""
    cuda_graph: Literal["on", "off"] = "off"
    """Launch the whole step of one GPU as one CUDA graph: for small models, where launching kernels takes longer than they
    run."""
    deterministic: bool = False
    """On a GPU, the same bits from every run of this config on the same device and versions, killed and resumed or not: slower.
    On a CPU in fp32 that is so anyway."""
    processes: int = Field(1, ge=1, le=1024)
    """Processes of the training, one GPU of this machine each; under torchrun its number counts instead."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Several processes. ddp: the whole model on each; fsdp: weights, gradients and optimizer state spread over them (FSDP2),
    for a GPT that one GPU does not hold."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: Muon for hidden matrices and AdamW for the rest; adamw: AdamW for everything."""
    global_batch_size: int = Field(32, ge=1, title="Batch (sequences per step)")
    """Sequences per optimizer step, over all micro-steps and processes."""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Sequences per forward pass; must divide global_batch_size. auto: as many as fit in memory, halved when it runs out."""
    max_steps: int | None = Field(None, ge=1, title="Length (optimizer steps)")
    """Optimizer steps; 1000 where neither these nor max_tokens nor minutes are given."""
    max_tokens: int | None = Field(None, ge=1, description="Training tokens, rounded up to whole steps.")
    minutes: float | None = Field(None, gt=0)
    """Minutes of training, evaluation and saving; the schedule follows the clock."""
    lr: float = Field(0.02, gt=0, lt=10, title="Peak learning rate")
    """Peak learning rate of Muon's matrices (of everything with optimizer=adamw)."""
    adamw_lr: float = Field(0.003, gt=0, lt=10)
    """Peak learning rate of AdamW's parameters beside Muon (embeddings, head; all of lstm and bigram)."""
    min_lr: float = Field(0.0, ge=0, lt=10, description="Learning rate at the last step; AdamW's falls by the same factor.")
    schedule: Literal["wsd", "cosine", "linear"] = "wsd"
    """After the warmup. wsd: flat, then linearly to min_lr over decay_fraction; cosine: half a cosine to min_lr; linear: to
    min_lr from the start."""
    warmup_steps: int = Field(20, ge=0, description="Steps of linear warmup.")
    decay_fraction: float = Field(0.6, ge=0, le=1)
    """wsd: share of the steps at the end in which the learning rate falls."""
    weight_decay: float = Field(0.1, ge=0, lt=10)
    """Decoupled weight decay of matrices; look-up tables, gains and biases have none."""
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the gradient mean.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's decay of the squared gradient mean.")
    grad_clip: float = Field(1.0, ge=0, description="Largest gradient norm; 0 switches clipping off.")
    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Moving average of the weights, evaluated and saved in their place: its memory is about 1 / (1 - ema_decay) steps; 0:
    off."""
    log_interval: int = Field(10, ge=1, description="Steps between two lines of the journal.")
    eval_interval: int = Field(250, ge=1, description="Steps between two evaluations; one is always made at the end.")
    eval_tokens: int = Field(65_536, ge=0)
    """Validation tokens of an evaluation during training, the first ones in order, up to the end of a batch of
    evaluate.batch_size sequences; 0: all."""
    select: Literal["last", "best"] = "last"
    """Which weights the run hands on: the last, or those of the evaluation with the best bpb."""
    patience: int = Field(0, ge=0, description="Stop early after so many evaluations in a row without a better bpb; 0: never.")
    save_interval: int = Field(500, ge=1, description="Steps between two checkpoints; one is always saved at the end.")
    keep_checkpoints: int = Field(2, ge=1, description="How many of the newest checkpoints stay on disk.")
    keep_interval: int = Field(0, ge=0)
    """Checkpoints at multiples of so many steps stay on disk too; 0: none. With select=best the best one always stays."""

    @model_validator(mode="before")
    @classmethod
    def _fill_end(cls, values: Any) -> Any:
        if isinstance(values, dict) and all(values.get(key) is None for key in ENDS):
            return values | {"max_steps": DEFAULT_STEPS}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        micro = self.micro_batch_size
        if micro != "auto":
            if micro < 1:
                raise ValueError(f"train.micro_batch_size={micro} must be at least 1, or auto")
            if self.global_batch_size % micro:
                raise ValueError(
                    f"train.micro_batch_size={micro} does not divide train.global_batch_size={self.global_batch_size}"
                )
        if self.global_batch_size % self.processes:
            raise ValueError(
                f"train.global_batch_size={self.global_batch_size} cannot be divided among train.processes={self.processes}; "
                "use a multiple"
            )
        if self.max_steps is not None and self.warmup_steps > self.max_steps:
            raise ValueError(f"train.warmup_steps={self.warmup_steps} is more than train.max_steps={self.max_steps}; lower it")
        if self.min_lr > self.lr:
            raise ValueError(f"train.min_lr={self.min_lr} is above train.lr={self.lr}; lower it")
        return self

    @property
    def length(self) -> str:
        """Where the run ends, for people: `1000 steps`, `5 minutes`."""
        ends = ((self.max_steps, "steps"), (self.max_tokens, "tokens"), (self.minutes, "minutes"))
        return " or ".join(f"{value:g} {unit}" if unit == "minutes" else f"{value} {unit}" for value, unit in ends if value)

    def count_steps(self, block_size: int) -> int | None:
        """Steps until max_steps or max_tokens, whichever is sooner; None when only the clock ends the run."""
        steps = [] if self.max_steps is None else [self.max_steps]
        if self.max_tokens is not None:
            steps.append(-(-self.max_tokens // (self.global_batch_size * block_size)))
        return min(steps) if steps else None
