"""The unbiased 2:4 estimate of a gradient with the smallest variance (MVUE)."""

from bisparse.kernels.mvue import dispatch as dispatch
