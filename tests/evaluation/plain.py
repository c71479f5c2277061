"""Ablation written out: one prompt at a time, every hook replaced by a value computed beforehand."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.nodes.plain import metric_at, values_of
from tl_neuron_circuits.tasks import TokenizedPairs


def baselines(model: Any, pairs: TokenizedPairs, names: list[str], ablation: str) -> list[dict[str, Tensor]]:
    """What ablated nodes take, for every prompt: [pos, unit]."""
    assert pairs.corrupt is not None
    corrupt = [values_of(model, tokens, names) for tokens in pairs.corrupt]
    if ablation == "corrupt":
        return corrupt
    if ablation == "zero":
        return [{name: torch.zeros_like(value) for name, value in row.items()} for row in corrupt]
    out = []
    for tokens in pairs.clean:
        alike = [row for row, other in zip(corrupt, pairs.corrupt, strict=True) if len(other) == len(tokens)]
        out.append({name: torch.stack([row[name] for row in alike]).mean(0) for name in names})
    return out


def ablated_metric(
    model: Any,
    pairs: TokenizedPairs,
    index: int,
    base: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    reset: Mapping[str, Tensor] | None = None,
) -> float:
    """The metric with every node outside `keep` at its baseline; kept ones live, or at `reset` (the usual mistake)."""

    def replace(value: Tensor, hook: Any, name: str) -> Tensor:
        live = value.flatten(2) if reset is None else reset[name][None]
        return torch.where(keep[name], live, base[name][None]).reshape(value.shape)

    hooks = [(name, lambda value, hook, name=name: replace(value, hook, name)) for name in keep]
    with torch.no_grad():
        return float(metric_at(model.run_with_hooks(pairs.clean[index][None], fwd_hooks=hooks), pairs, index))
