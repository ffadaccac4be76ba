"""Zeroes a tensor off a mask, or on it, in one pass on the CPU. The specification is in `bisparse.training.bits`."""
