"""Gradients at hook points, with an error that names the one that no gradient reaches."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .._errors import UnsupportedModelError


def gradients_by_name(
    output: Tensor,
    values: Mapping[str, Tensor],
    *,
    seed: Tensor | None = None,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> dict[str, Tensor]:
    """d output / d value at each hook point; an output that is not a scalar takes a gradient of its shape as `seed`.

    Raises:
        UnsupportedModelError: the output was not computed from the value that a hook point showed.
    """
    live = {name: value for name, value in values.items() if value.requires_grad}
    found = dict.fromkeys(values) | dict.fromkeys(live)
    if live and output.requires_grad:
        gradients = torch.autograd.grad(
            output,
            list(live.values()),
            seed,
            retain_graph=retain_graph or create_graph,
            create_graph=create_graph,
            allow_unused=True,
        )
        found |= zip(live, gradients, strict=True)
    cut = [name for name, gradient in found.items() if gradient is None]
    if cut:
        raise UnsupportedModelError(
            f"no gradient reaches {cut[0]} ({len(cut)} of {len(found)} hook points): this model goes on with another "
            "tensor than the one that its hook point shows, or a rule or a hook cuts the graph there. Use another "
            "basis, or method='patching', which needs no gradient."
        )
    return {name: gradient for name, gradient in found.items() if gradient is not None}
