"""What the stored posteriors have in common, for tests that do without torch."""

NOISE = 0.8  # standard deviation of y about its mean; priors are standard normal
NUM_DATA = 40
NUM_DRAWS = 2000  # of each Laplace posterior
WIDTHS = (1, 2, 4)  # of the three networks' hidden layers
FEATURES = ("age", "bmi", "bp")
KINDS = ("low", "mid", "high")
