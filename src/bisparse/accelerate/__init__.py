"""Sparse products: 2:4 weights on the tensor cores of NVIDIA GPUs, forward and backward; any zeros on CPUs, for inference."""

from bisparse.accelerate.accelerate import AcceleratedLayer, AccelerationReport, accelerate_
from bisparse.accelerate.advice import Advice, LayerAdvice, LayerShape
from bisparse.accelerate.advisor import advise, advise_shapes, layer_shapes
from bisparse.accelerate.backends import BackendError, usable_backends
from bisparse.accelerate.grid import Grid, GridPoint, stored_grids
from bisparse.accelerate.linear_packed import PackedLinear
from bisparse.accelerate.linear_trained import SparseLinear
from bisparse.accelerate.load_accelerated import load_accelerated_
from bisparse.accelerate.public_times import PUBLIC_DEVICES, DevicePrediction, LayerPrediction, predict_products
from bisparse.accelerate.timing import Pass, Timing, measure_linear

__all__ = [
    "PUBLIC_DEVICES",
    "AcceleratedLayer",
    "AccelerationReport",
    "Advice",
    "BackendError",
    "DevicePrediction",
    "Grid",
    "GridPoint",
    "LayerAdvice",
    "LayerPrediction",
    "LayerShape",
    "PackedLinear",
    "Pass",
    "SparseLinear",
    "Timing",
    "accelerate_",
    "advise",
    "advise_shapes",
    "layer_shapes",
    "load_accelerated_",
    "measure_linear",
    "predict_products",
    "stored_grids",
    "usable_backends",
]
