"""From a Gaussian over outputs to a distribution over y, one link a file."""
