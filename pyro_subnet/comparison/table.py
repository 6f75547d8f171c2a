"""What a comparison of subnets finds, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class SubnetComparisonRow:
    """One subnet at one set of inputs.

    Attributes:
        selector: Name of the selector.
        size: S, how many weights it has.
        inputs: Name of the inputs.
        kept_variance: Share of the full posterior's linearized predictive variance.
        wasserstein: 2-Wasserstein distance to the full posterior over all weights,
            unconstrained.
        kl: Mean divergence of the predictive from the full posterior's, in nats per
            data point; None for families that have no closed form here.
    """

    selector: str
    size: int
    inputs: str
    kept_variance: float
    wasserstein: float
    kl: float | None


@final
@dataclass(frozen=True)
class SubnetComparison:
    """What :func:`~pyro_subnet.compare_subnets` finds; ``print`` shows the table.

    Attributes:
        rows: By selector, size and inputs, in the order given.
        num_params: D, how many there are in all.
    """

    rows: tuple[SubnetComparisonRow, ...]
    num_params: int

    def table(self) -> str:
        """The rows as plain text.

        Returns:
            A line of column heads, and one line for each row.
        """
        cells = [("selector", "S", "inputs", "kept", "W2", "KL")]
        for row in self.rows:
            kl = "-" if row.kl is None else f"{row.kl:.4g}"
            kept, distance = f"{row.kept_variance:.4f}", f"{row.wasserstein:.4g}"
            cells.append((row.selector, str(row.size), row.inputs, kept, distance, kl))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                # Words to the left, numbers to the right.
                cell.ljust(width) if column in {0, 2} else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in cells
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()
