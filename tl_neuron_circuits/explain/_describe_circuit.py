"""`Circuit.describe`: labels, examples and logit effects of a circuit's nodes, and groups named by what they share."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import SettingsError
from ..circuits._circuit import Circuit
from ..interventions._direct_logit_effects import direct_logit_effects
from ..models._protocol import TransformerLensModel, model_name
from ._cluster import cluster, require_scikit_learn, shared_names
from ._describe import describe
from ._descriptions import SIGN_TEXT, Descriptions
from ._profiles import Profiles, profiles

LONGEST_LABEL = 40
"""Of a node on the page; the whole of a longer description stands in its details."""
_LOGIT_TOKENS = 5
_PROMPTS = 4  # of a circuit of several, that groups are made on


def describe_circuit(
    circuit: Circuit,
    texts: Iterable[str | Tensor] | None,
    labels: Descriptions | str | Path | None,
    groups: int | None,
    model: TransformerLensModel | None,
    options: Mapping[str, Any],
) -> Circuit:
    """See `Circuit.describe`."""
    if texts is not None and labels is not None:
        raise SettingsError("expected texts, or labels that are known; got both.")
    if texts is None and options:
        raise SettingsError(f"{sorted(options)} say how texts are read: give texts.")
    if model is None and (texts is not None or labels is None or groups is not None):
        raise SettingsError("this circuit was loaded, or its model is gone: give the model that was traced, model=...")
    if model is not None and circuit.settings["model"] != model_name(model):
        raise SettingsError(f"this circuit is of {circuit.settings['model']}; got {model_name(model)}.")
    rows = circuit.nodes[circuit.nodes["kind"].isin(["neuron", "feature"])]
    if rows.empty:
        raise SettingsError("expected a circuit with single neurons or features. Call this before collapse().")
    if groups is not None:
        _require_groups(circuit, rows, groups)  # now, and not after the texts were read
    found = labels if isinstance(labels, Descriptions) else None
    if isinstance(labels, str | Path):
        found = Descriptions.from_file(labels)
    if texts is not None and model is not None:
        named = [node.partition("@")[0] for node in dict.fromkeys(rows["node"])]
        found = describe(model, list(dict.fromkeys(named)), texts, **{"basis": circuit.basis, **options})
    effects = _effects(rows, found, model)
    text_of, details = {}, dict(circuit.details)
    for row in rows.to_dict("records"):
        neuron = row["node"].partition("@")[0]
        name = f"{neuron}{SIGN_TEXT[row['sign']]}"
        text = "" if found is None else found.text(name)
        if text and row["label"] == row["node"]:
            text_of[row["node"]] = text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1].rstrip()}…"
        told = _details(found, name, text) | ({"direct_logit_effects": effects[neuron]} if neuron in effects else {})
        details[row["node"]] = dict(details.get(row["node"], {})) | told
    described = replace(circuit.label(text_of), details={name: told for name, told in details.items() if told})
    if groups is None or model is None:
        return described
    return described.group(_groups(described, rows, found, model, groups))


def _effects(
    rows: pd.DataFrame, found: Descriptions | None, model: TransformerLensModel | None
) -> dict[str, list[list[Any]]]:
    """Direct logit effects by neuron: those that were found, else from the model's weights."""
    neurons = list(dict.fromkeys(node.partition("@")[0] for node in rows.loc[rows["kind"] == "neuron", "node"]))
    table = None if found is None else found.effects
    if table is None and model is not None and neurons:
        table = direct_logit_effects(model, neurons, k=_LOGIT_TOKENS).to_dataframe()
    if table is None:
        return {}
    table = table[table["label"].isin(neurons) & (table["rank"] < _LOGIT_TOKENS)]
    return {
        str(name): [[token, float(effect)] for token, effect in zip(part["token"], part["effect"], strict=True)]
        for name, part in table.groupby("label", sort=False)
    }


def _details(found: Descriptions | None, name: str, text: str) -> dict[str, Any]:
    """What the page says about one node and sign."""
    if found is None:
        return {}
    line = found.label_line(name)
    told: dict[str, Any] = {"label": line} if line else {"label": text} if text else {}
    if text and "description" in found.table and text not in line:
        told["description"] = text
    examples = [
        {"tokens": list(e.tokens), "values": list(e.activations), "note": f"text {e.prompt}"}
        for e in found.examples.get(name, ())
    ]
    return told | ({"examples": examples} if examples else {})


def _require_groups(circuit: Circuit, rows: pd.DataFrame, groups: int) -> None:
    require_scikit_learn()
    n_neurons = int((rows["kind"] == "neuron").sum())
    if not 2 <= groups < n_neurons:
        raise SettingsError(
            f"expected groups from 2 to one less than the circuit's neurons, of which it has {n_neurons} (groups are "
            f"of neurons, not of features); got {groups}. Other groups can be given to circuit.group()."
        )
    if circuit.settings.get("token_ids") is None and circuit.traced is None:
        raise SettingsError("groups are made on the circuit's prompts, which a loaded circuit of pairs does not hold.")


def _groups(
    circuit: Circuit, rows: pd.DataFrame, found: Descriptions | None, model: TransformerLensModel, groups: int
) -> dict[str, list[str]]:
    """Clusters of the circuit's neurons by their profiles on its prompts, and by their labels."""
    neurons = rows.loc[rows["kind"] == "neuron", ["node", "sign"]]
    labels = {} if found is None else {
        node: found.text(f"{node.partition('@')[0]}{SIGN_TEXT[int(sign)]}")
        for node, sign in zip(neurons["node"], neurons["sign"], strict=True)
    }  # fmt: skip
    made = _profiles(circuit, neurons["node"].tolist(), model)
    clusters = cluster(made, groups, labels=labels)
    token_of = dict(zip(rows["node"], rows["token"], strict=True))
    names = shared_names(made, clusters.labels.tolist(), labels, _entering(circuit, made), token_of)
    clusters = replace(clusters, names=names)
    taken = set(circuit.nodes["node"])
    return {f"{name} group" if name in taken else name: members for name, members in clusters.groups().items()}


def _profiles(circuit: Circuit, nodes: list[str], model: TransformerLensModel) -> Profiles:
    """On the circuit's prompt, or on the first of several."""
    own = circuit.settings.get("token_ids")
    if own is not None or circuit.traced is None:
        return profiles(model, torch.tensor([own]), nodes)
    pairs = circuit.traced.pairs
    return profiles(model, pairs.select(range(min(_PROMPTS, len(pairs)))), nodes)


def _entering(circuit: Circuit, made: Profiles) -> Float[Tensor, "node source"] | None:
    """Attributions of the circuit's edges from tokens into its nodes; None where the sources are of several prompts."""
    tokens = circuit.nodes[(circuit.nodes["kind"] == "embedding") & (circuit.nodes["position"] >= 0)]
    if circuit.settings.get("token_ids") is None or len(made.sources) <= tokens["position"].max():
        return None
    column, row = dict(zip(tokens["node"], tokens["position"], strict=True)), {n: i for i, n in enumerate(made.nodes)}
    edges = circuit.edges[circuit.edges["source"].isin(column) & circuit.edges["target"].isin(row)]
    table = torch.zeros(made.attribution.shape)
    at = (
        torch.tensor(edges["target"].map(row).to_list()).long(),
        torch.tensor(edges["source"].map(column).to_list()).long(),
    )
    return table.index_put(at, torch.tensor(edges["attribution"].to_list(), dtype=table.dtype), accumulate=True)
