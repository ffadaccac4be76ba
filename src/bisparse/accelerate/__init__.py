"""Acceleration on NVIDIA GPUs: products with 2:4 weights on sparse tensor cores, forward and backward."""

from bisparse.accelerate.backend import BackendError, usable_backends
from bisparse.accelerate.convert import AcceleratedLayer, AccelerationReport, accelerate_
from bisparse.accelerate.linear import PackedLinear, SparseLinear

__all__ = [
    "AcceleratedLayer",
    "AccelerationReport",
    "BackendError",
    "PackedLinear",
    "SparseLinear",
    "accelerate_",
    "usable_backends",
]
