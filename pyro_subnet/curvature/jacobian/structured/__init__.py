"""Jacobians layer by layer, the chosen entries alone."""
