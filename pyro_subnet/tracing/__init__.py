"""One call of a Pyro model at the MAP, as a function of its subnet."""
