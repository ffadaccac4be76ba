"""2:4 matrices as sparse tensor cores read them: positions of the kept weights, metadata, and packing."""

from bisparse.kernels.sparse24 import dispatch as dispatch
