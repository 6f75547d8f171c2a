"""Jacobians of model outputs with respect to the chosen elements only."""
