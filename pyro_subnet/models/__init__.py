"""Pyro models made of the user's: linearized, hybrid."""
