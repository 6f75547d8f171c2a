"""Pyro models made of the user's: linearized, hybrid.

May import tracing, gaussians.
"""
