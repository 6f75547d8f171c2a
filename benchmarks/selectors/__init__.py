"""Which subnet to choose: selectors side by side, in distribution and under shift.

``python -m benchmarks.selectors uci|digits`` measures, ``report`` prints the tables;
benchmarks/selectors/README.md says what they show.
"""
