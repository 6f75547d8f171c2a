"""Prior and noise learned by the evidence while training, against other ways."""
