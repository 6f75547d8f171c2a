"""The precision G + s P0 in its forms, and the Gaussian of each."""
