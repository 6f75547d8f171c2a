"""Posteriors and chains as ArviZ reads them.

May import guides.
"""
