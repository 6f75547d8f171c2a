"""Derivatives: families, Jacobians, their sums, the prior.

May import tensors, subnet, options.
"""
