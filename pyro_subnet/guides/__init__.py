"""What users hold: the MAP guide and the posterior guide."""
