"""Sums and counts over a large matrix and its mask on the CPU, each in one pass. Their specifications are in `bisparse.gap`."""
