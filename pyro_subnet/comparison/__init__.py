"""A subnet beside the full posterior over all weights."""
