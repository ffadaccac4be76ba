"""Export of pruned models for other engines: compressed-tensors folders and ONNX files."""

from bisparse.export.compressed_tensors import QUANTIZATION, can_be_stored, save_quantized
from bisparse.export.onnx import OnnxExport, export_onnx, onnx_metadata

__all__ = ["QUANTIZATION", "OnnxExport", "can_be_stored", "export_onnx", "onnx_metadata", "save_quantized"]
