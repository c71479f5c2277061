"""How much of an activation a dictionary fails to rebuild: the fraction of variance unexplained.

    FVU = sum |target - reconstruction|^2 / sum |target - mean(target)|^2

over positions, with the mean of each unit over the same positions. 0 is perfect, 1 is as bad as writing the mean, more
is worse. Attention sinks such as BOS carry most of the variance of many models: leave them out where the circuit does.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import NumericalError
from .._typing import checked


@dataclass(frozen=True, eq=False)
class VarianceSums:
    """Sums over positions; adding two is as if their positions had come in one batch."""

    count: int
    mean: Float[Tensor, " d_out"]
    """Mean of the target, float64 on the CPU."""
    variation: float
    """Sum of squared deviations of the target from its mean."""
    error: float
    """Sum of squared differences between target and reconstruction."""

    @classmethod
    def measure(
        cls, target: Float[Tensor, "*batch d_out"], reconstruction: Float[Tensor, "*batch d_out"]
    ) -> "VarianceSums":
        """The sums of one batch; pass only positions that count (`target[mask]`)."""
        wide = torch.promote_types(target.dtype, torch.float32)
        target, reconstruction = (x.detach().to(wide).reshape(-1, x.shape[-1]) for x in (target, reconstruction))
        if not len(target):
            return cls(0, torch.zeros(target.shape[-1], dtype=torch.float64), 0.0, 0.0)
        mean = target.mean(dim=0)
        variation, error = (target - mean).square().sum(), (target - reconstruction).square().sum()
        return cls(len(target), mean.cpu().double(), float(variation), float(error))

    def __add__(self, other: "VarianceSums") -> "VarianceSums":
        """Both together (the pairwise update of Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        if count == 0:
            return self
        step = other.mean - self.mean
        between = float(step.square().sum()) * self.count * other.count / count
        return VarianceSums(
            count,
            self.mean + step * (other.count / count),
            self.variation + other.variation + between,
            self.error + other.error,
        )

    @property
    def unexplained(self) -> float:
        """The fraction of variance unexplained.

        Raises:
            NumericalError: the target does not vary, or a number is not finite.
        """
        if not self.variation > 0:
            raise NumericalError(
                f"The target is constant over {self.count} positions, so its fraction of variance unexplained is "
                "undefined: pass more positions."
            )
        fraction = self.error / self.variation
        if fraction != fraction or fraction == float("inf"):
            raise NumericalError(
                f"The fraction of variance unexplained is {fraction}: a value is NaN or infinite. "
                "Leave those positions out, or use float32."
            )
        return fraction


@checked
def fraction_variance_unexplained(
    target: Float[Tensor, "*batch d_out"], reconstruction: Float[Tensor, "*batch d_out"]
) -> float:
    """Squared error over squared deviation from the mean: 0 is perfect, 1 is no better than the mean.

    Raises:
        NumericalError: the target does not vary over the positions, or a number is not finite.

    Example:
        >>> import torch
        >>> import tl_neuron_circuits as tnc
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> tnc.bases.fraction_variance_unexplained(x, torch.ones(2, 1))
        1.0
    """
    return VarianceSums.measure(target, reconstruction).unexplained
