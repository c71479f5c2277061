"""Random regressions and linear structural models, in float64."""

import torch
from torch import Tensor


def regression(n: int, p: int, q: int, *, shared: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sources (with a common part of weight `shared`) and targets that depend on five of them; neither is centered."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = noise(n, p) * torch.linspace(0.5, 2, p) + shared * noise(n, 1) + 3
    y = x[:, : min(5, p)] @ noise(min(5, p), q) + noise(n, q) - 7
    return x, y


def structural_model(
    n: int, sites: int = 4, width: int = 6, *, edges: float = 0.2, noise: float = 0.3, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Observations of a linear structural model, its weights, and which weights the order of its sites allows."""
    generator = torch.Generator().manual_seed(seed)
    units = sites * width
    site = torch.arange(units) // width
    allowed = site[:, None] < site[None]
    size = 0.5 + torch.rand(units, units, generator=generator, dtype=torch.float64)
    sign = 2.0 * torch.randint(0, 2, (units, units), generator=generator) - 1
    weights = size * sign * ((torch.rand(units, units, generator=generator) < edges) & allowed)
    x = torch.randn(n, units, generator=generator, dtype=torch.float64)
    x[:, width:] *= noise
    for index in range(1, sites):
        here = site == index
        x[:, here] += x @ weights[:, here]
    return x, weights, allowed


def standardized_columns(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0, correction=0)
