"""Quantisation of weights in which zeros stay zero: `quantize_`, its schemes and its report."""

from bisparse.quantization.quantize import quantize_
from bisparse.quantization.report import QuantizationReport, QuantizedLayer, stored_values
from bisparse.quantization.scheme import SCHEMES, Scheme, parse_scheme

__all__ = ["SCHEMES", "QuantizationReport", "QuantizedLayer", "Scheme", "parse_scheme", "quantize_", "stored_values"]
