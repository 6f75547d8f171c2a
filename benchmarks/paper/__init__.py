"""The experiments of Daxberger et al. (2021), and the baselines they compare with.

``python -m benchmarks.paper EXPERIMENT...`` runs them, and goes on where it was killed;
``report`` makes tables and pictures; benchmarks/paper/README.md says what they show.
"""
