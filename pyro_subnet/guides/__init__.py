"""What users hold: the MAP guide, the posterior guide."""
