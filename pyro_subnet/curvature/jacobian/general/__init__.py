"""Jacobians of any model, by forward or reverse mode."""
