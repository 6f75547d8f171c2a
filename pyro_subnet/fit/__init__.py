"""One pass over the data, and what it sums."""
