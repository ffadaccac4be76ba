"""Libraries that multiply by a 2:4 matrix, and the probe that tests them on a device."""
