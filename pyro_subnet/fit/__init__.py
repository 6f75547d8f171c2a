"""One pass over the data, and what it sums.

May import laplace, tracing.
"""
