"""Jacobians over the chosen elements: two routes to the same numbers."""
