"""A circuit as node scores, which is what `evaluate` ranks and ablates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .._errors import SettingsError
from ..attribution import NodeScores, SiteLabels
from ..bases import Neurons

if TYPE_CHECKING:
    from ._circuit import Circuit


def to_scores(circuit: Circuit) -> NodeScores:
    """Scores of the chosen neurons, nan for all others.

    Raises:
        SettingsError: the nodes are not single neurons of a model.
    """
    settings = circuit.settings
    wrong = circuit.nodes["kind"].isin(("group", "feature", "component")).any() or not settings.get("d_mlp")
    if wrong or not circuit.members:
        raise SettingsError(
            "expected a circuit of single neurons; this one has supernodes or imported features, or no nodes at all. "
            "Use the circuit before collapse()."
        )
    summed = settings.get("positions") == "sum"
    length = () if summed else (len(settings["tokens"]),)
    hooks = [Neurons.hook.format(layer=layer) for layer in range(settings["n_layers"])]
    values = {
        hook: torch.full((*length, width), torch.nan) for hook, width in zip(hooks, settings["d_mlp"], strict=True)
    }
    for row in circuit.nodes[circuit.nodes["kind"] == "neuron"].itertuples():
        place = (row.unit,) if summed else (row.position, row.unit)
        values[hooks[row.layer]][place] = row.score  # pyright: ignore[reportCallIssue, reportArgumentType]
    return NodeScores(
        values,
        errors={},
        skips={},
        sites={hook: SiteLabels(layer, Neurons.letter) for layer, hook in enumerate(hooks)},
        settings={
            "method": "trace", "metric": ", ".join(settings["target"]), "basis": Neurons.name,
            "positions": "sum" if summed else "keep", "units": "keep", "rules": settings["rules"],
            "model": settings["model"], "n_pairs": settings["n_prompts"], "pairs_hash": settings["pairs_hash"],
            "baseline": settings["baseline"], "versions": settings["versions"],
        },
        basis=Neurons(),
    )  # fmt: skip
