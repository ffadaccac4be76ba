"""The exact solver on CPUs, in numba. `solve` registers it for the "cpu" device."""
