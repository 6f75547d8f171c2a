"""What is written and read, whole or not at all.

May import laplace, tracing, nn, _version.
"""
