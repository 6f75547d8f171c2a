"""Curvature of the log posterior: likelihood, Jacobians, prior."""
