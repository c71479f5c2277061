"""A circuit as node scores, which is what `evaluate` ranks and ablates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .._errors import SettingsError
from ..bases._activations import Neurons
from ..bases._site import Basis
from ..nodes._scores import NodeScores, SiteLabels
from ._table import KIND_OF_LETTER

if TYPE_CHECKING:
    from ._circuit import Circuit


def node_sites(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hook point, layer, letter, width and errors of every layer with nodes; empty where the circuit does not say."""
    return list(settings.get("sites") or [])


def own_basis(settings: Mapping[str, Any]) -> Basis | Sequence[Basis] | None:
    """The basis of a circuit of neurons; None where there are dictionaries, which circuit files do not hold."""
    sites = node_sites(settings)
    known = sites and all(site["letter"] == Neurons.letter for site in sites)
    return Neurons(layers=[site["layer"] for site in sites]) if known else None


def to_scores(circuit: Circuit) -> NodeScores:
    """Scores of the chosen nodes, nan for all others, errors among them.

    A transcoder's skip is not a node, so `evaluate` leaves it live.

    Raises:
        SettingsError: the nodes are not single neurons or features of a model.
    """
    settings, sites = circuit.settings, node_sites(circuit.settings)
    nodes = circuit.nodes[circuit.nodes["kind"].isin(KIND_OF_LETTER.values())]
    places = {(KIND_OF_LETTER[site["letter"]], site["layer"]): site["hook"] for site in sites}
    without = _without_scores(circuit, set(zip(nodes["kind"], nodes["layer"], strict=True)) <= set(places))
    if without is not None:
        raise SettingsError(f"expected a circuit of single neurons or features of dictionaries; {without}")
    if settings.get("positions") == "spans":
        raise SettingsError(
            "expected a circuit whose places are positions; here a span of several tokens is one place. Sum its "
            "positions, circuit.sum_positions(), or take one prompt's nodes, circuit.on_prompt(0)."
        )
    summed = settings.get("positions") == "sum"
    length = () if summed else (len(settings["tokens"]),)
    values = {site["hook"]: torch.full((*length, site["width"]), torch.nan) for site in sites}
    rows: Any = nodes.itertuples()
    for row in rows:
        place = (row.unit,) if summed else (row.position, row.unit)
        values[places[row.kind, row.layer]][place] = row.score
    return NodeScores(
        values,
        errors={site["hook"]: torch.full(length, torch.nan) for site in sites if site["errors"]},
        skips={},
        sites={site["hook"]: SiteLabels(site["layer"], site["letter"]) for site in sites},
        settings={
            "method": "trace", "metric": ", ".join(settings["target"]),
            "basis": settings.get("basis", Neurons.title), "positions": "sum" if summed else "keep", "units": "keep",
            "direction": "noising",
            "method_options": {"name": "trace", "rules": settings["rules"]},
            "model": settings["model"], "n_pairs": settings["n_prompts"],
            "pairs_hash": settings["pairs_hash"], "baseline": settings["baseline"], "versions": settings["versions"],
        },
        basis=circuit.basis,
    )  # fmt: skip


def _without_scores(circuit: Circuit, placed: bool) -> str | None:
    """Why its nodes have no scores; None if they do."""
    kinds = set(circuit.nodes["kind"])
    if "group" in kinds:
        return "this one has groups in their place. Use the circuit before collapse()."
    if "component" in kinds:
        return "this one has whole components. components.metric_of_edges(...) tests what their edges carry."
    if not circuit.members:
        return "this one has none."
    if circuit.settings.get("method") == "circuit_lasso":
        return "a regression gives its nodes no scores, only its edges weights."
    return None if placed else "this one's were imported, and their hook points are not known."
