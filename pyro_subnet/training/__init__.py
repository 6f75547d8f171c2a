"""Prior and noise learned by the evidence while a network trains."""
