"""What users hold: the MAP guide, the posterior guide.

May import models, predictions, files, selection, training, nn.
"""
