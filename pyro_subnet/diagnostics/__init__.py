"""How far predictions and a posterior can be trusted.

Some judge predictions, whatever model they come from: functions of tensors and
distributions, each a few lines of torch with its source. A library is used where the
core has it, as Pyro's score of draws; torchmetrics or scikit-learn would be one more
dependency for less (each function says what they lack), and the tests compare with
them. Others judge a
posterior, some with a pass over the training data.
"""

from pyro_subnet.comparison.kept_variance import kept_variance
from pyro_subnet.diagnostics.absorbed_noise import absorbed_noise
from pyro_subnet.diagnostics.calibration import (
    Reliability,
    classwise_calibration_error,
    expected_calibration_error,
    reliability,
)
from pyro_subnet.diagnostics.conditioning import condition_number
from pyro_subnet.diagnostics.crps import crps_from_draws, crps_normal
from pyro_subnet.diagnostics.effective_dimension import (
    effective_dimension,
    effective_dimension_by_site,
)
from pyro_subnet.diagnostics.entropy import (
    EntropyDecomposition,
    decompose_entropy,
    predictive_entropy,
)
from pyro_subnet.diagnostics.importance import (
    ImportanceCheck,
    importance_check,
    pareto_smoothed,
)
from pyro_subnet.diagnostics.intervals import (
    interval_coverage,
    mean_interval_width,
    pit_from_draws,
    pit_values,
    quantile,
)
from pyro_subnet.diagnostics.out_of_distribution import auroc, out_of_distribution_auroc
from pyro_subnet.diagnostics.risk_coverage import RiskCoverage, risk_coverage
from pyro_subnet.diagnostics.scores import brier_score, negative_log_likelihood
from pyro_subnet.diagnostics.stationarity import (
    Stationarity,
    stationarity,
    stationarity_from,
)
from pyro_subnet.fit.absorbed_noise import AbsorbedNoise

__all__ = [
    "AbsorbedNoise",
    "EntropyDecomposition",
    "ImportanceCheck",
    "Reliability",
    "RiskCoverage",
    "Stationarity",
    "absorbed_noise",
    "auroc",
    "brier_score",
    "classwise_calibration_error",
    "condition_number",
    "crps_from_draws",
    "crps_normal",
    "decompose_entropy",
    "effective_dimension",
    "effective_dimension_by_site",
    "expected_calibration_error",
    "importance_check",
    "interval_coverage",
    "kept_variance",
    "mean_interval_width",
    "negative_log_likelihood",
    "out_of_distribution_auroc",
    "pareto_smoothed",
    "pit_from_draws",
    "pit_values",
    "predictive_entropy",
    "quantile",
    "reliability",
    "risk_coverage",
    "stationarity",
    "stationarity_from",
]
