"""Pruned models in the formats that other programs run: compressed-tensors folders and ONNX files."""

from bisparse.export.compressed_tensors import QUANTIZATION, can_be_stored, save_quantized

__all__ = ["QUANTIZATION", "can_be_stored", "save_quantized"]
