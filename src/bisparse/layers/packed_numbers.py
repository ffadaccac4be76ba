"""Which stored tensors are the packed numbers of a quantised weight: several numbers in each entry, with scales next to them.

A name alone is no evidence, nor is a dtype: bitsandbytes stores 4-bit numbers as float16 or bfloat16 where FSDP asks for it
(``bnb_4bit_quant_storage``), and tables of integers may be called ``blocks``. What shows packed numbers are the tensors that
unpacking them needs.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from bisparse.layers.names import layer_name

__all__ = ["STATES", "quantisation_state", "shows_packed_numbers"]

STATES = ("absmax", "quant_map", "quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
"""What bitsandbytes stores under the name of a weight."""
NAMES = ("qweight", "q_weight", "weight_packed", "weight_q", "W_q", "weight_qdata", "codes")
"""Names of packed numbers: GPTQ and AWQ, EXL2, compressed-tensors, HQQ, torchao, AQLM."""
COMPANIONS = (
    "scales", "scale", "q_scale", "q_scale_max", "weight_scale", "weight_scale_inv", "weight_shape", "weight_global_scale",
    "qzeros", "zeros", "zero", "weight_zero_point", "meta", "codebooks",
)  # fmt: skip
"""Names of the tensors next to them."""
SCALES = ("_scale", "_scales", "_scale_inv")
"""Endings of the scales of tensors that are no layer's ``weight``, such as fused experts."""
BYTES = ("I8", "F8_E4M3", "F8_E5M2")
"""Dtypes with one number in each entry: such a weight is quantised, but not packed."""
FLOATS = ("F64", "F32", "F16", "BF16")


def quantisation_state(name: str, names: Collection[str]) -> str | None:
    """The tensor that shows a stored weight to be numbers of bitsandbytes, in whatever dtype; None if there is none."""
    return next((state for one in STATES if (state := f"{name}.{one}") in names), None)


def shows_packed_numbers(name: str, dtype: str, names: Collection[str]) -> bool:
    """Whether a stored tensor is the packed numbers of a quantised weight.

    Args:
        dtype: as safetensors names it.
        names: the names of all tensors of the checkpoint.
    """
    if quantisation_state(name, names) is not None:
        return True
    if dtype in FLOATS and not name.endswith(".W_q"):  # HQQ stores numbers in the dtype of the model, if asked to
        return False
    if name.endswith("_blocks"):  # MXFP4
        return re.sub("_blocks$", "_scales", name) in names
    layer, _, last = name.rpartition(".")
    if last in NAMES:
        return any(f"{layer}.{one}" in names for one in COMPANIONS)
    if dtype in BYTES:
        return False
    if last == "weight" and any(f"{layer_name(name)}.{one}" in names for one in COMPANIONS):
        return True
    return any(name + one in names for one in SCALES)
