"""Which activations to steer: nodes as labels, as a DataFrame, or as a circuit, turned into (hook, unit, position).

Position -1 means every position, as in `NodeScores.top` where positions were summed.
"""

import re
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from .._errors import SettingsError, UnsupportedModelError
from ..bases import ACTIVATION_BASES, Neurons
from ..models import TransformerLensModel, find_sites, hook_point

_LABEL = re.compile(r"L(\d+)/([A-Z])(\d+)[+-]?(?:@(\d+))?")
_NEURONS = re.compile(r"blocks\.(\d+)\.mlp\.hook_post")
_BASES = {basis.letter: basis for basis in ACTIVATION_BASES.values()}
_UNIT_KINDS = ("node", "neuron")
EVERYWHERE = -1


@runtime_checkable
class HasNodes(Protocol):
    """Anything with a DataFrame of nodes, such as a `Circuit`."""

    @property
    def nodes(self) -> Any:
        """Columns kind, layer, unit and position; rows of the kind "neuron" are the neurons."""
        ...


Nodes = pd.DataFrame | str | Sequence[str] | HasNodes
"""Labels such as "L12/N345@7" (at position 7) or "L12/N345" (everywhere), rows of `NodeScores.top`, or a circuit."""


def find_nodes(model: TransformerLensModel, nodes: Nodes, positions: int | Sequence[int] | None = None) -> pd.DataFrame:
    """The nodes as a DataFrame with columns label, hook, unit and position (-1: everywhere), checked against the model.

    With `positions`, every node stands at each of them: nodes outer, positions inner.

    Raises:
        SettingsError: a label that cannot be read, a layer or a column that is missing, an error node or a dictionary
            feature, a node listed twice, a negative position, or positions for nodes that have their own.
        UnsupportedModelError: the model lacks the hook point, or has no neurons there (a mixture of experts).

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> from tl_neuron_circuits.interventions import find_nodes
        >>> find_nodes(model, ["L2/N5", "L3/N7@4"])
             label                    hook  unit  position
        0    L2/N5  blocks.2.mlp.hook_post     5        -1
        1  L3/N7@4  blocks.3.mlp.hook_post     7         4
    """
    if isinstance(nodes, pd.DataFrame):
        frame = _from_rows(nodes)
    elif isinstance(nodes, str):
        frame = _from_labels(model, [nodes])
    elif isinstance(nodes, Sequence):
        frame = _from_labels(model, nodes)
    else:
        frame = _from_circuit(nodes)
    if frame.empty:
        raise SettingsError("expected at least one node to steer; got none.")
    _check_hooks(model, frame)
    frame = frame if positions is None else _at(frame, positions)
    _check_rows(frame)
    return frame.reset_index(drop=True)


def _from_labels(model: TransformerLensModel, labels: Sequence[str]) -> pd.DataFrame:
    rows = []
    hooks: dict[tuple[str, str], str] = {}
    for label in labels:
        read = _LABEL.fullmatch(label) if isinstance(label, str) else None
        if read is None or read[2] not in _BASES:
            raise SettingsError(
                f"expected labels such as 'L12/N345@7' or 'L12/N345' with one of the letters {sorted(_BASES)}; got "
                f"{label!r}. Error nodes and dictionary features are no activations of the model."
            )
        layer, letter = read[1], read[2]
        if (layer, letter) not in hooks:
            hooks[layer, letter] = _BASES[letter](layers=[int(layer)]).sites(model)[0].hook
        rows.append((label, hooks[layer, letter], int(read[3]), EVERYWHERE if read[4] is None else int(read[4])))
    return pd.DataFrame(rows, columns=["label", "hook", "unit", "position"])


def _from_circuit(circuit: HasNodes) -> pd.DataFrame:
    """Its neurons: tokens, logits, biases and remainders are no activations to steer."""
    nodes = circuit.nodes
    if not isinstance(nodes, pd.DataFrame) or not {"kind", "layer", "unit", "position"} <= set(nodes.columns):
        raise SettingsError("expected .nodes to be a DataFrame with columns kind, layer, unit and position.")
    if nodes["kind"].isin(("group", "feature")).any():
        raise SettingsError(
            "expected a circuit of neurons; it has supernodes or dictionary features. Steer the circuit before "
            "collapse(), or give the members of a group."
        )
    neurons = nodes[nodes["kind"].isin(_UNIT_KINDS)]
    hooks = [Neurons.hook.format(layer=layer) for layer in neurons["layer"]]
    return _from_rows(neurons[["unit", "position"]].assign(hook=hooks))


def _from_rows(nodes: pd.DataFrame) -> pd.DataFrame:
    missing = {"hook", "unit", "position"} - set(nodes.columns)
    if missing:
        raise SettingsError(f"expected nodes with columns hook, unit and position; {sorted(missing)} missing.")
    if "kind" in nodes.columns and not nodes["kind"].isin(_UNIT_KINDS).all():
        kinds = sorted(set(nodes["kind"]) - set(_UNIT_KINDS))
        raise SettingsError(
            f"expected neurons or other units; got rows of the kinds {kinds}. Leave them out: df[df.kind == 'node']."
        )
    labels = nodes["label"] if "label" in nodes.columns else [_name(*row) for row in _triples(nodes)]
    frame = pd.DataFrame({"label": list(labels), **{key: list(nodes[key]) for key in ("hook", "unit", "position")}})
    for label, hook in zip(frame["label"], frame["hook"], strict=True):
        read = _LABEL.fullmatch(str(label))
        if read is not None and (read[2] not in _BASES or _BASES[read[2]].hook.format(layer=read[1]) != hook):
            raise SettingsError(
                f"expected units of activations; {label} at {hook} is a node of another basis (a dictionary feature), "
                "whose number is no unit there. Steer neurons, or patch the dictionary's output."
            )
    return frame


def _triples(frame: pd.DataFrame) -> Any:
    return zip(frame["hook"], frame["unit"], frame["position"], strict=True)


def _name(hook: str, unit: int, position: int) -> str:
    neurons = _NEURONS.fullmatch(hook)
    name = f"L{neurons[1]}/N{unit}" if neurons else f"{hook}[{unit}]"
    return name if position < 0 else f"{name}@{position}"


def _check_hooks(model: TransformerLensModel, frame: pd.DataFrame) -> None:
    known = None
    for hook in frame["hook"].unique():
        neurons = _NEURONS.fullmatch(hook)
        if neurons:
            known = find_sites(model) if known is None else known
            problems = [p.message for p in known.problems if f"blocks.{neurons[1]}.mlp" in p.message]
            if problems and int(neurons[1]) not in {mlp.layer for mlp in known.mlps}:
                raise UnsupportedModelError("\n".join(problems))
        hook_point(model, hook)


def _at(frame: pd.DataFrame, positions: int | Sequence[int]) -> pd.DataFrame:
    if (frame["position"] >= 0).any():
        label = frame["label"][frame["position"] >= 0].iloc[0]
        raise SettingsError(
            f"expected nodes without positions beside positions=; {label} has its own. Leave positions= out, or take "
            "the nodes' positions away: nodes.assign(position=-1).drop_duplicates(['hook', 'unit'])."
        )
    places = [positions] if isinstance(positions, int) else list(positions)
    if not places or min(places) < 0:
        raise SettingsError(f"expected positions that count from 0 at the first token; got {places}.")
    repeated = frame.loc[frame.index.repeat(len(places))]
    repeated = repeated.assign(position=np.tile(places, len(frame)))
    return repeated.assign(
        label=[f"{label}@{p}" for label, p in zip(repeated["label"], repeated["position"], strict=True)]
    )


def _check_rows(frame: pd.DataFrame) -> None:
    if (frame["unit"] < 0).any():
        raise SettingsError(f"expected units that count from 0; got {frame['unit'].min()} at {frame['hook'].iloc[0]}.")
    everywhere = set(zip(*(frame.loc[frame["position"] < 0, key] for key in ("hook", "unit")), strict=True))
    fixed = frame[frame["position"] >= 0]
    twice = frame[frame.assign(position=frame["position"].clip(lower=-1)).duplicated(["hook", "unit", "position"])]
    covered = [row for row in zip(fixed["label"], fixed["hook"], fixed["unit"], strict=True) if row[1:] in everywhere]
    if len(twice) or covered:
        label = twice["label"].iloc[0] if len(twice) else covered[0][0]
        raise SettingsError(f"expected every node once; {label} is listed twice (or also without a position).")
