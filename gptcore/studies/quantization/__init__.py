"""What fewer bits a weight cost and give: size, memory, speed, bits per byte on the same tokens.

A cell is one method on one trained model; summary says what they gave together.
"""

from __future__ import annotations

from gptcore.studies import Study
from gptcore.studies.quantization.brief import brief
from gptcore.studies.quantization.cell import measure_cell
from gptcore.studies.quantization.options import QuantizationOptions
from gptcore.studies.quantization.summary import summarize

STUDY = Study("Quantization", QuantizationOptions, measure_cell, summarize, version=2, brief=brief)
