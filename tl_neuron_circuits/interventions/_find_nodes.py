"""Which activations are meant: nodes as labels, as a DataFrame, or as a circuit, turned into (hook, unit, position).

Position -1 means every position, as in `NodeScores.top` where positions were summed. Features of a dictionary are found
by its basis; their hook point is the one the dictionary writes.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from .._errors import SettingsError, UnsupportedModelError
from .._indices import Indices, as_indices
from ..bases._activations import ACTIVATION_BASES, Neurons
from ..bases._dictionary_basis import DictionarySite
from ..bases._runs import Values
from ..bases._site import Basis, Site, basis_sites, refuse_cross_layer
from ..models._protocol import TransformerLensModel, hook_point, hook_points
from ..models._sites import find_sites

logger = logging.getLogger(__name__)

_LABEL = re.compile(r"L(\d+)/([A-Z])(\d+)[+-]?(?:@(\d+))?")
_NEURONS = re.compile(r"blocks\.(\d+)\.mlp\.hook_post")
_BASES = {basis.letter: basis for basis in ACTIVATION_BASES.values()}
_UNIT_KINDS = ("node", "neuron", "feature")
_FEATURE = "F"
EVERYWHERE = -1
EVERY_UNIT = -1
EVERY_UNIT = -1
_OF_CIRCUIT = {"kind", "layer", "unit", "position"}


@runtime_checkable
class HasNodes(Protocol):
    """Anything with a DataFrame of nodes, such as a `Circuit`."""

    @property
    def nodes(self) -> Any:
        """Columns kind, layer, unit and position; rows of the kinds "neuron" and "feature" are steered."""
        ...


Nodes = pd.DataFrame | pd.Series | str | Sequence[str] | HasNodes
"""Labels such as "L12/N345@7" (at position 7), "L12/N345" (everywhere) or "L12/F6@7" (a feature), also as a Series;
rows of `NodeScores.top` or of `Circuit.nodes`; or a circuit."""
Dictionaries = Basis | Sequence[Basis] | None
"""The basis of features, as given to `attribute` or `trace`; a circuit knows its own unless it was loaded."""


Complement = bool | Nodes
"""Whether everything else is steered: in the model, or among these nodes."""


@dataclass(frozen=True, eq=False)
class Steered:
    """The nodes that are steered; with a complement, those that are left alone while it is steered.

    `complement` has the columns of `nodes`; its unit -1 is every unit of a hook point.
    """

    nodes: pd.DataFrame
    complement: pd.DataFrame | None = None


def basis_of(nodes: Nodes, basis: Dictionaries) -> Dictionaries:
    """The basis given, else that of a circuit."""
    return getattr(nodes, "basis", None) if basis is None else basis


def find_nodes(
    model: TransformerLensModel, nodes: Nodes, positions: Indices | None = None,
    basis: Dictionaries = None, *, features: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """The nodes as a DataFrame with columns label, hook, unit and position (-1: everywhere), checked against the model.

    With `features`, two more columns: `site`, a feature's `DictionarySite` or None, and `key`, which tells features
    from the units of the hook point they are written at. Without, features are refused. With `positions`, every node
    stands at each of them: nodes outer, positions inner.

    Raises:
        SettingsError: a label that cannot be read, a layer or a column that is missing, an error node, a feature
            without its dictionary, a node listed twice, a negative position, or positions for nodes that have their
            own.
        UnsupportedModelError: the model lacks the hook point, or has no neurons there (a mixture of experts).
    """
    found = _Features(model, basis_of(nodes, basis))
    if isinstance(nodes, pd.Series):  # of labels, as in `scores.top(3)["label"]`
        nodes = nodes.tolist()
    if isinstance(nodes, pd.DataFrame):
        frame = _from_rows(nodes, found)
    elif isinstance(nodes, str):
        frame = _from_labels(model, [nodes], found)
    elif isinstance(nodes, Sequence):
        frame = _from_labels(model, nodes, found)
    else:
        frame = _from_circuit(model, nodes, found)
    if frame.empty:
        others = () if isinstance(nodes, Sequence | pd.DataFrame) else sorted(set(nodes.nodes["kind"]))
        only = f", only {', '.join(others)}" if others else ""
        raise SettingsError(f"expected at least one neuron, feature or other unit of activations; got none{only}.")
    if not features and frame["site"].notna().any():
        label = frame.loc[frame["site"].notna(), "label"].iloc[0]
        raise SettingsError(
            f"expected units of activations; {label} is a dictionary feature, which this does not read."
        )
    _check_hooks(model, frame)
    frame = frame if positions is None else _place(frame, positions)
    _check_rows(frame)
    frame = frame.reset_index(drop=True)
    return frame if features else frame.drop(columns=["site", "key"])


def find_steered(
    model: TransformerLensModel, nodes: Nodes, positions: Indices | None = None,
    basis: Dictionaries = None, complement: Complement = False,
) -> Steered:  # fmt: skip
    """`find_nodes` with features; and their complement, where one is asked for.

    Raises:
        SettingsError: as `find_nodes`; or nodes at hook points of which no basis knows the others.
    """
    if complement is False:
        return Steered(find_nodes(model, nodes, positions, basis, features=True))
    basis = basis_of(nodes, basis)
    none = isinstance(nodes, Sequence | pd.DataFrame | pd.Series) and not len(nodes)
    if complement is not True:
        among = find_nodes(model, complement, basis=basis_of(complement, basis), features=True)
        basis = basis_of(complement, basis)
        return Steered(among[:0] if none else find_nodes(model, nodes, positions, basis, features=True), among)
    if none:
        sites = basis_sites(model, Neurons() if basis is None else basis)
    else:
        kept = find_nodes(model, nodes, positions, basis, features=True)
        sites = _sites_of(model, kept, basis)
    rows = [
        (f"all at {site.hook}", site.hook, EVERY_UNIT, EVERYWHERE, site if isinstance(site, DictionarySite) else None)
        for site in sites
    ]
    every = _keyed(pd.DataFrame(rows, columns=["label", "hook", "unit", "position", "site"]))
    return Steered(every[:0] if none else kept, every)


def _sites_of(model: TransformerLensModel, frame: pd.DataFrame, basis: Dictionaries) -> list[Site]:
    """Every site of the bases in which these nodes live."""
    sites: list[Site] = []
    if frame["site"].notna().any() and basis is not None:
        found = [site for site in basis_sites(model, basis) if isinstance(site, DictionarySite)]
        refuse_cross_layer(found, "steering")
        sites += found
    units = set(frame.loc[frame["site"].isna(), "hook"])
    for kind in _BASES.values() if units else ():
        hooks = {kind.hook.format(layer=layer) for layer in range(int(model.cfg.n_layers))}
        if units & hooks:
            sites += kind().sites(model)
            units -= hooks
    if units:
        raise SettingsError(
            f"expected nodes of {[kind.name for kind in _BASES.values()]} or features with complement=True; of "
            f"{sorted(units)[0]} no others are known. Give complement= the nodes among which the others are steered."
        )
    return sites


class _Features:
    """The dictionaries of a basis, resolved when the first feature needs its own."""

    def __init__(self, model: TransformerLensModel, basis: Dictionaries) -> None:
        self._model, self._basis = model, basis
        self._sites: list[DictionarySite] | None = None

    def site(self, name: str, *, layer: int | None = None, hook: str | None = None) -> DictionarySite:
        if self._sites is None:
            found = () if self._basis is None else basis_sites(self._model, self._basis)
            self._sites = [site for site in found if isinstance(site, DictionarySite)]
        fits = [site for site in self._sites if site.layer == layer or site.hook == hook]
        if len(fits) != 1:
            where = "several dictionaries" if fits else "none"
            raise SettingsError(
                f"{name} is a feature of a dictionary, which is needed to read or steer it; got {where} there. Give "
                "basis=bases.Dictionaries([...]), as to attribute or trace."
            )
        refuse_cross_layer(fits, "steering")
        return fits[0]


def _from_labels(model: TransformerLensModel, labels: Sequence[str], features: _Features) -> pd.DataFrame:
    read = [_LABEL.fullmatch(label) if isinstance(label, str) else None for label in labels]
    for label, parts in zip(labels, read, strict=True):
        if parts is None or parts[2] not in (*_BASES, _FEATURE):
            raise SettingsError(
                f"expected labels such as 'L12/N345@7' or 'L12/N345' with one of the letters "
                f"{sorted([*_BASES, _FEATURE])}; got {label!r}. Error nodes cannot be steered."
            )
    wanted: dict[str, set[int]] = {}  # layers by letter: TransformerBridge lists its hook points anew at every look
    for parts in filter(None, read):
        wanted.setdefault(parts[2], set()).add(int(parts[1]))
    hooks = {
        (site.layer, letter): site.hook
        for letter, layers in wanted.items()
        if letter != _FEATURE
        for site in _BASES[letter](layers=sorted(layers)).sites(model)
    }
    rows = []
    for label, parts in zip(labels, filter(None, read), strict=True):
        layer, letter, unit = int(parts[1]), parts[2], int(parts[3])
        site = features.site(label, layer=layer) if letter == _FEATURE else None
        hook = hooks[layer, letter] if site is None else site.hook
        rows.append((label, hook, unit, EVERYWHERE if parts[4] is None else int(parts[4]), site))
    return _keyed(pd.DataFrame(rows, columns=["label", "hook", "unit", "position", "site"]))


def _keyed(frame: pd.DataFrame) -> pd.DataFrame:
    """With a key that tells features from the units of their hook point."""
    pairs = zip(frame["hook"], frame["site"], strict=True)
    return frame.assign(key=[hook if site is None else f"features at {hook}" for hook, site in pairs])


def _from_circuit(model: TransformerLensModel, circuit: HasNodes, features: _Features) -> pd.DataFrame:
    """Its neurons and features, members of supernodes too: tokens, logits, errors and remainders cannot be steered."""
    nodes = circuit.nodes
    if not isinstance(nodes, pd.DataFrame) or not _OF_CIRCUIT <= set(nodes.columns):
        raise SettingsError("expected .nodes to be a DataFrame with columns kind, layer, unit and position.")
    names = list(nodes.loc[nodes["kind"] == "group", "node"]) if "node" in nodes.columns else []
    groups = getattr(circuit, "settings", {}).get("groups") or {}
    lost = [name for name in names if name not in groups]
    if lost:
        raise SettingsError(f"expected the members of the supernodes {lost[:3]} in the circuit; it does not list them.")
    members = _from_labels(model, [label for name in names for label in groups[name]], features)
    single = nodes[nodes["kind"].isin(_UNIT_KINDS)]
    return pd.concat([_from_table(single, features), members]) if names else _from_table(single, features)


def _from_table(nodes: pd.DataFrame, features: _Features) -> pd.DataFrame:
    """Rows of a circuit's table that have units."""
    if nodes.attrs.get("positions") == "spans":
        raise SettingsError(
            "expected nodes at positions; this circuit aligns prompts of different lengths, and has places instead. "
            "Give circuit.on_prompt(0), its nodes where they stand in that prompt."
        )
    rows = [
        (features.site(f"L{layer}/F{unit}", layer=layer) if kind == "feature" else None, layer, unit, position)
        for kind, layer, unit, position in nodes[["kind", "layer", "unit", "position"]].itertuples(index=False)
    ]
    hooks = [Neurons.hook.format(layer=layer) if site is None else site.hook for site, layer, _, _ in rows]
    frame = pd.DataFrame(rows, columns=["site", "layer", "unit", "position"]).assign(hook=hooks)
    named = [_name(hook, site, unit, at) for hook, (site, _, unit, at) in zip(hooks, rows, strict=True)]
    return _keyed(frame.assign(label=named)[["label", "hook", "unit", "position", "site"]])


def _from_rows(nodes: pd.DataFrame, features: _Features) -> pd.DataFrame:
    if "hook" not in nodes.columns and _OF_CIRCUIT <= set(nodes.columns):
        return _from_table(_steerable(nodes), features)
    missing = {"hook", "unit", "position"} - set(nodes.columns)
    if missing:
        raise SettingsError(
            "expected rows of NodeScores (columns hook, unit, position) or of a circuit's nodes (kind, layer, unit, "
            f"position); {sorted(missing)} missing."
        )
    nodes = _steerable(nodes) if "kind" in nodes.columns else nodes
    labels = nodes["label"] if "label" in nodes.columns else [_name(h, None, u, p) for h, u, p in _triples(nodes)]
    sites = []
    for label, hook in zip(labels, nodes["hook"], strict=True):
        read = _LABEL.fullmatch(str(label))
        feature = read is not None and read[2] == _FEATURE
        sites.append(features.site(str(label), hook=hook) if feature else None)
        if (
            read is not None
            and not feature
            and (read[2] not in _BASES or _BASES[read[2]].hook.format(layer=read[1]) != hook)
        ):
            raise SettingsError(
                f"expected units of activations; {label} at {hook} is a node of another basis, whose number is not a "
                "unit there. Give it by its own hook point."
            )
    columns = {"hook": list(nodes["hook"])} | {key: as_indices(nodes[key], key) for key in ("unit", "position")}
    return _keyed(pd.DataFrame({"label": list(labels), **columns, "site": pd.Series(sites, dtype=object)}))


def _steerable(nodes: pd.DataFrame) -> pd.DataFrame:
    """The rows that have units; the others are named in the log.

    Raises:
        SettingsError: no row has a unit, or some are supernodes, whose members a table does not know.
    """
    steerable = nodes["kind"].isin(_UNIT_KINDS)
    names = nodes["node"] if "node" in nodes.columns else nodes["label"] if "label" in nodes.columns else nodes["kind"]
    others = [f"{name} ({kind})" for name, kind in zip(names[~steerable], nodes.loc[~steerable, "kind"], strict=True)]
    if (nodes["kind"] == "group").any():
        raise SettingsError(
            "expected rows of single nodes; the table has supernodes, whose members it does not list. Give the circuit "
            "itself, or the rows of the circuit before collapse()."
        )
    if others and not steerable.any():
        raise SettingsError(
            f"expected neurons, features or other units of activations; got {', '.join(others[:5])} alone."
        )
    if others:
        logger.warning("left out %d rows that have no unit to steer: %s", len(others), ", ".join(others[:5]))
    return nodes[steerable]


def reads_of_nodes(frame: pd.DataFrame) -> list[str]:
    """The hook points that say what these nodes are in a run."""
    names = []
    for hook, site in zip(frame["hook"], frame["site"], strict=True):
        names += [hook] if site is None else list(site.reads)
    return list(dict.fromkeys(names))


def values_by_key(values: Values, frame: pd.DataFrame) -> Values:
    """The values of a run `[batch, pos, unit]` by the frame's keys; features are what their encoders say."""
    out: Values = {}
    for key, rows in frame.groupby("key", sort=False):
        site = rows["site"].iloc[0]
        out[str(key)] = values[rows["hook"].iloc[0]].flatten(2) if site is None else site.take_apart(values).nodes
    return out


def _triples(frame: pd.DataFrame) -> Any:
    return zip(frame["hook"], frame["unit"], frame["position"], strict=True)


def _name(hook: str, site: DictionarySite | None, unit: int, position: int) -> str:
    neurons = _NEURONS.fullmatch(hook)
    name = f"L{neurons[1]}/N{unit}" if neurons else f"{hook}[{unit}]"
    name = name if site is None else f"L{site.layer}/F{unit}"
    return name if position < 0 else f"{name}@{position}"


def _check_hooks(model: TransformerLensModel, frame: pd.DataFrame) -> None:
    known, points = None, hook_points(model)
    for hook in frame["hook"].unique():
        neurons = _NEURONS.fullmatch(hook)
        if neurons:
            known = find_sites(model) if known is None else known
            problems = [p.message for p in known.problems if f"blocks.{neurons[1]}.mlp" in p.message]
            if problems and int(neurons[1]) not in {mlp.layer for mlp in known.mlps}:
                raise UnsupportedModelError("\n".join(problems))
        if hook not in points:
            hook_point(model, hook)  # raises, and says what is near it


def _place(frame: pd.DataFrame, positions: Indices) -> pd.DataFrame:
    if (frame["position"] >= 0).any():
        label = frame["label"][frame["position"] >= 0].iloc[0]
        raise SettingsError(
            f"expected nodes without positions beside positions=; {label} has its own. Leave positions= out, or take "
            "the nodes' positions away: nodes.assign(position=-1).drop_duplicates(['hook', 'unit'])."
        )
    places = as_indices(positions, "positions")
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
    everywhere = set(zip(*(frame.loc[frame["position"] < 0, key] for key in ("key", "unit")), strict=True))
    fixed = frame[frame["position"] >= 0]
    twice = frame[frame.assign(position=frame["position"].clip(lower=-1)).duplicated(["key", "unit", "position"])]
    covered = [row for row in zip(fixed["label"], fixed["key"], fixed["unit"], strict=True) if row[1:] in everywhere]
    if len(twice) or covered:
        label = twice["label"].iloc[0] if len(twice) else covered[0][0]
        raise SettingsError(f"expected every node once; {label} is listed twice (or also without a position).")
