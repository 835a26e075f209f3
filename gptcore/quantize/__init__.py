"""Room 11: fewer bits a weight. bf16, int8 (weights alone, or activations too), FP8, int4 by rounding, by GPTQ, after fine-tuning.

    small = quantize(model, Method("int4", algorithm="gptq"), calibration=ids)
    python -m gptcore.quantize CHECKPOINT --method int4-gptq --shards DIR --out DIR      # a checkpoint like any other

Matrices are rounded (Dettmers et al. 2022, Frantar et al. 2022), all else becomes bfloat16. Embedding and head are chosen separately;
tied ones are one matrix and follow the head. Torch's own kernels multiply (`gptcore.models.quantized`).
"""

from gptcore.quantize.model import METHODS, Method, calibration_ids, quantize, quantize_checkpoint

__all__ = ["METHODS", "Method", "calibration_ids", "quantize", "quantize_checkpoint"]
