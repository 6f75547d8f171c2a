"""Speed and memory of the curvature engine beside laplace-torch 0.3.

``python -m benchmarks.engine`` prints the table; README.md beside this file says what
its rows are and how they are measured.
"""
