"""Distributions of outputs, and of y, at new inputs.

May import laplace, tracing.
"""
