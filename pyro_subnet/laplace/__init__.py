"""The posterior in numbers: evidence and tuning; no Pyro."""
