"""Distributions of outputs, and of y, at new inputs."""
