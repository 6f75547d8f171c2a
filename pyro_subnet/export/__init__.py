"""Posteriors and chains as ArviZ reads them."""
