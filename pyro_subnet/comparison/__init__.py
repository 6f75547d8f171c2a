"""A subnet beside the full posterior."""
