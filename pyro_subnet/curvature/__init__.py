"""Derivatives: families, Jacobians, their sums, the prior."""
