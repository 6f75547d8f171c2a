"""Families of observed distributions: their outputs and their information."""
