"""Families of observed distributions whose Fisher information is known."""
