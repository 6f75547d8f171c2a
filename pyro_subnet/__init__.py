"""Subnetwork Laplace inference for Pyro models."""
