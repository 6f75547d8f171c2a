"""The posterior in numbers: state, evidence, tuning.

May import gaussians.
"""
