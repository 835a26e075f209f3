"""Room 6: what turns gradients into steps. Muon for hidden matrices, AdamW for the rest, schedules as functions of the step."""

from gptcore.optim.ema import WeightAverage
from gptcore.optim.groups import Optimizers, build_optimizers
from gptcore.optim.muon import Muon
from gptcore.optim.schedules import lr_factor

__all__ = ["Muon", "Optimizers", "WeightAverage", "build_optimizers", "lr_factor"]
