"""Running a model on calibration data and collecting the statistics of its layers' inputs."""
