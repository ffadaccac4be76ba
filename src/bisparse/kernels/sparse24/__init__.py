"""2:4 matrices as sparse tensor cores read them: positions of the kept weights, metadata, and packing."""
