"""The page of a circuit: one self-contained HTML file with an interactive attribution graph, no network.

The circuit is embedded as JSON, and the scripts in `page/` are put into the file as they are: ours for layout and
drawing (nodes are SVG, so that pointer, keyboard and screen readers reach them; edges are on a canvas), d3-zoom for
gestures. Of a circuit with more than 10,000 edges the weakest stay out; their sums are in the file, by node and by
group.
Texts of the model and of the user reach the page only as JSON whose `<`, `>` and `&` are escaped, and the scripts set
them as text, never as markup; a content security policy forbids everything that is not in the file.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._errors import SettingsError, UnsupportedModelError
from .._files import write_text
from .._version import versions
from ..circuits._table import target_shares
from ..interventions._direct_logit_effects import direct_logit_effects
from ._style import PALETTE
from ._word_pieces import word_ends

if TYPE_CHECKING:
    from ..circuits._circuit import Circuit

_SCRIPTS = ("d3-zoom.min.js", "data.js", "layout.js", "graph.js", "zoom.js", "panel.js", "export.js", "controls.js")
_MOST_EDGES = 10_000
_MOST_EFFECTS = 300
_DARK = {
    "bg": "#14171c", "panel": "#1b1f26", "band": "#191d23", "fg": "#e7e9ec", "muted": "#9aa4b1", "line": "#343b46",
    "positive": PALETTE[5], "negative": PALETTE[4], "focus": "#ffffff", "tip": "#e7e9ec", "tip-fg": "#14171c",
}  # fmt: skip
"""Against a dark background the palette's light pair stands out: sky blue and orange."""
_GROUPS = (PALETTE[2], PALETTE[3], "#8C6BB1", "#999933", "#882255", "#44AA99")
_FORM = (
    '{"description": "...", "direct_logit_effects": [(token, number), ...], '
    '"examples": ["...", {"tokens": [...], "values": [...], "note": "..."}], "any heading": "any text"}'
)


Details = Mapping[str, Mapping[str, Any]]


def write_page(
    circuit: "Circuit", path: str | Path, details: Details | None = None, edge_share: float | None = None
) -> None:
    """Write the page of a circuit; an existing file is replaced.

    Args:
        circuit: any circuit, grouped or not.
        path: of the HTML file.
        details: see `Circuit.to_html`.
        edge_share: see `Circuit.to_html`.

    Raises:
        SettingsError: details of a node that is not there, or of another form.
        SaveError: it could not be written; an older file is as it was.
    """
    write_text(path, page(circuit, details, edge_share))


def page(circuit: "Circuit", details: Details | None = None, edge_share: float | None = None) -> str:
    """The page as text."""
    colors = {
        "positive": PALETTE[0],
        "negative": PALETTE[1],
        "dark": " ".join(f"--{name}: {color};" for name, color in _DARK.items()),
    }
    parts = {
        "title": _ascii(escape(_title(circuit))),
        "style": _filled(_part("page.css"), colors),
        "data": embedded_json(page_data(circuit, details, edge_share)),
        "script": "\n".join(_part(name) for name in _SCRIPTS),
    }
    return _filled(_part("page.html"), parts)


def _filled(text: str, parts: Mapping[str, str]) -> str:
    return re.sub(r"\[\[(\w+)\]\]", lambda match: parts[match[1]], text)


def embedded_json(value: Any) -> str:
    """JSON in ASCII that nothing inside a script element can end or open.

    Raises:
        ValueError: a number that JSON has no form for.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page_data(circuit: "Circuit", details: Details | None = None, edge_share: float | None = None) -> dict[str, Any]:
    """Everything that the page knows: columns of nodes and edges, numbers to five digits, None where there is none."""
    nodes, settings = circuit.nodes, circuit.settings
    index = {name: place for place, name in enumerate(nodes["node"])}
    edges, cut = _kept_edges(circuit, edge_share)
    found = checked_details(nodes, _with_effects(circuit, details))
    forms: dict[str, int] = {}
    unique = {name: forms.setdefault(json.dumps(form), len(forms)) for name, form in found.items()}
    promoted = {token for form in found.values() for token, _ in form["direct_logit_effects"]}
    return {
        "prompt": str(settings.get("prompt", "")),
        "facts": _facts(circuit),
        "tokens": [str(token) for token in settings.get("tokens") or []],
        "n_layers": int(settings.get("n_layers", 0)),
        "target_value": _number(circuit.target_value),
        "ends": _ends(circuit),
        "nodes": {name: _column(nodes[name]) for name in nodes.columns},
        "n_edges": len(circuit.edges),
        "edges": {
            "source": [index[name] for name in edges["source"]],
            "target": [index[name] for name in edges["target"]],
            **{name: _column(edges[name]) for name in ("weight", "relative", "attribution")},
        },
        "cut": cut,
        "heads": _heads(circuit, edges),
        "members": {str(group): list(members) for group, members in (settings.get("groups") or {}).items()},
        "details": [json.loads(form) for form in forms],
        "detail_of": unique,
        "word_ends": word_ends(None if circuit.traced is None else circuit.traced.model(), sorted(promoted)),
        "group_colors": list(_GROUPS),
    }


def _kept_edges(circuit: "Circuit", share: float | None) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The edges that go into the file, and what the others sum to.

    An edge stays if its |attribution| is at least `share` of the target, or if it is the strongest into or out of a
    node. Without `share` it is 0 for up to 10,000 edges, else that of the 10,000th, rounded up to two digits. Graphs of
    other programs have no attributions; there it is the share of the node that the edge enters.
    """
    edges, value = circuit.edges, abs(circuit.target_value)
    sizes = edges["attribution"].abs() / value if value else edges["attribution"].abs()
    measure = "attribution" if value and np.isfinite(sizes).all() else "relative"
    if measure == "relative":
        sizes = edges["relative"].abs()
    if share is None:
        share = 0.0
        if len(edges) > _MOST_EDGES:
            limit = float(np.sort(sizes.to_numpy())[-_MOST_EDGES])
            unit = 10.0 ** (np.floor(np.log10(limit)) - 1) if limit else 1.0
            share = float(np.ceil(limit / unit) * unit)
    if not share >= 0:
        raise SettingsError(f"expected edge_share as a share of the target, 0 or more; got {share}.")
    keep = (sizes >= share).to_numpy()
    order = sizes.sort_values(ascending=False, kind="stable").index
    for end in ("source", "target"):
        keep = keep | edges.index.isin(edges.loc[order].drop_duplicates(end).index)
    lost = edges[~keep]
    index = {name: place for place, name in enumerate(circuit.nodes["node"])}
    by_end = {
        name: {
            index[node]: (len(part), _number(part.sum())) for node, part in lost.groupby(end, sort=False)["attribution"]
        }
        for name, end in (("incoming", "target"), ("outgoing", "source"))
    }
    sums = {"sum": _number(lost["attribution"].sum()), "size": _number(lost["attribution"].abs().sum())}
    cut = {"count": len(lost), "share": share, "measure": measure, **sums, **by_end}
    return edges[keep], {**cut, "groups": _cut_between_groups(circuit.nodes, lost, index)}


def _cut_between_groups(nodes: pd.DataFrame, lost: pd.DataFrame, index: Mapping[str, int]) -> list[tuple[Any, ...]]:
    """Sums of lost edges from and to groups: (source, target, weight, attribution), the first group being -1.

    A pair is there for every way in which its groups can be collapsed, so that each supernode has its whole score.
    """
    members = nodes[(nodes["group"] != "") & nodes["kind"].isin(("neuron", "feature", "component", "head", "skip"))]
    group_of = members.set_index("node")["group"]
    groups = {name: -1 - place for place, name in enumerate(dict.fromkeys(group_of))}
    ends = {end: lost[end].map(index) for end in ("source", "target")}
    grouped = {end: lost[end].map(group_of).map(groups) for end in ("source", "target")}
    rows: list[tuple[Any, ...]] = []
    for source, target in ((True, True), (True, False), (False, True)):
        frame = lost.assign(
            source=(grouped if source else ends)["source"], target=(grouped if target else ends)["target"]
        ).dropna(subset=["source", "target"])
        sums = frame.groupby(["source", "target"], sort=False)[["weight", "attribution"]].sum().reset_index()
        rows += [(int(s), int(t), _number(w), _number(a)) for s, t, w, a in sums.itertuples(index=False)]
    return rows


def _with_effects(circuit: "Circuit", details: Details | None) -> Details:
    """The details, and direct logit effects of the strongest neurons that have none, while the model still lives."""
    given = details or {}
    model = None if circuit.traced is None else circuit.traced.model()
    chosen = circuit.nodes[circuit.nodes["kind"] == "neuron"]
    by = "score" if chosen["score"].notna().any() else "influence"
    nodes = chosen.sort_values(by, key=abs, ascending=False, kind="stable")["node"].head(_MOST_EFFECTS)
    neurons = {node: node.partition("@")[0] for node in nodes if not {node, node.partition("@")[0]} & set(given)}
    if model is None or not neurons:
        return given
    try:
        table = direct_logit_effects(model, list(dict.fromkeys(neurons.values())), k=8).to_dataframe()
    except UnsupportedModelError:
        return given
    pairs = {name: list(zip(rows["token"], rows["effect"], strict=True)) for name, rows in table.groupby("label")}
    return {node: {"direct_logit_effects": pairs[name]} for node, name in neurons.items()} | dict(given)


def _heads(
    circuit: "Circuit", edges: pd.DataFrame, most: int = 3
) -> dict[int, list[tuple[int, int, int, float | None]]]:
    """By edge, where edges were split: layer, head, position and share of its strongest parts; layer -1 is direct."""
    if circuit.head_parts is None:
        return {}
    parts = (
        circuit.head_parts[circuit.head_parts["kind"] != "rest"].groupby(["source", "target"], sort=False).head(most)
    )
    place = {pair: row for row, pair in enumerate(zip(edges["source"], edges["target"], strict=True))}
    heads: dict[int, list[tuple[int, int, int, float | None]]] = {}
    for part in parts.itertuples(index=False):
        row = (int(part.layer), int(part.head), int(part.from_position), _number(part.share))
        if (part.source, part.target) in place:
            heads.setdefault(place[part.source, part.target], []).append(row)
    return heads


def _part(name: str) -> str:
    return (files(__name__.rpartition(".")[0]) / "page" / name).read_text(encoding="utf-8")


def _ascii(text: str) -> str:
    """Characters beyond ASCII as references; half surrogates, which bytes in tokens can leave, as question marks."""
    return text.encode("utf-8", "replace").decode("utf-8").encode("ascii", "xmlcharrefreplace").decode("ascii")


def _title(circuit: "Circuit") -> str:
    target = ", ".join(str(one).strip() for one in circuit.settings.get("target", []))
    named = "the logit difference" if target == "logit_difference" else f"“{target}”"
    return f"Circuit for {named} on {str(circuit.settings.get('model', 'unknown')).rpartition('/')[2]}"


def _facts(circuit: "Circuit") -> list[tuple[str, str, str, str]]:
    """Name, text and meaning of what the page says about the circuit; the fourth is "more" for what stands below."""
    settings = circuit.settings
    target = ", ".join(_shown(one) for one in settings.get("target", []))
    unit, meaning = _unit(circuit)
    named = "" if target == "logit_difference" else f"{target}: "
    prompts = int(settings.get("n_prompts", 1))
    ends = _ends(circuit) or {"shares": [("explained", float("nan"))], "text": "", "cancels": False}
    explained = ends["shares"][0][1]
    made_with = {"tl-neuron-circuits": versions()["tl-neuron-circuits"]} | dict(settings.get("versions") or {})
    facts = [
        ("target", f"{named}{unit} {circuit.target_value:.4g}", f"What the circuit explains. {meaning}", ""),
        (
            "the model says",
            _prediction(settings),
            f"The likeliest next tokens by their mean probability over {prompts} prompts"
            if prompts > 1
            else "The model's likeliest next tokens",
            "",
        ),
        (
            "explained",
            _percent(explained) + " (parts cancel)" * ends["cancels"],
            f"Of the target: {ends['text']} Shares of single nodes and groups are not parts of it: they sum support "
            "and opposition along all paths.",
            "loud" if explained < 0.5 else "",
        ),
        ("model", str(circuit.settings.get("model", "")), "the model that was traced", "more"),
        ("prompts", str(prompts) if prompts != 1 else "", "Numbers are means over them", ""),
        (
            "replacement",
            _percent(circuit.graph_replacement),
            "influence of embeddings over that of embeddings and of what was left out",
            "more",
        ),
        (
            "completeness",
            _percent(circuit.graph_completeness),
            "share of all nodes' inputs that does not come from what was left out",
            "more",
        ),
        ("baseline", str(settings.get("baseline", "")), "scores are differences to this", "more"),
        *((name, str(version), "version the circuit was made with", "more") for name, version in made_with.items()),
    ]
    return [fact for fact in facts if fact[1]]


def _ends(circuit: "Circuit") -> dict[str, Any] | None:
    """Shares of the target by where it comes from in the end (`target_shares`), and the same in words."""
    if not circuit.target_value or circuit.nodes["flow"].isna().all():
        return None
    explained, left, bent = target_shares(circuit.nodes, circuit.target_value).values()
    shares = [("explained", explained), ("left", left)]
    if abs(bent) >= 0.0005:
        shares.append(("not-linear", bent))
    cancels = explained < -0.0005 or max(share for _, share in shares) > 1.0005
    return {"shares": shares, "text": _ends_text(dict(shares), cancels), "cancels": cancels}


def _ends_text(shares: Mapping[str, float], cancels: bool) -> str:
    bent = "attention patterns, norms and gates differ between the prompts, which more nodes do not explain"
    if cancels:
        times = {name: f"{share:.3g}".replace("-", "−") + " times the target" for name, share in shares.items()}
        text = (
            f"Large parts cancel, so none is a share of the whole: {times['explained']} is traced back to tokens and "
        )
        text += f"biases, {times['left']} comes through what was left out"
        return text + (f", {times['not-linear']} is not linear ({bent})." if "not-linear" in times else ".")
    text = f"{_percent(shares['explained'])} is explained: traced back to tokens and biases. "
    if "not-linear" not in shares:
        return text + f"What was left out holds the other {_percent(shares['left'])}."
    return text + (
        f"{_percent(shares['left'])} comes through what was left out, and {_percent(shares['not-linear'])} is not "
        f"linear: {bent}."
    )


def _unit(circuit: "Circuit") -> tuple[str, str]:
    """What the target's number is, and what that means."""
    names = circuit.nodes.loc[circuit.nodes["kind"] == "logit", "node"]
    of = "sum of " * (len(names) > 1), "s" * (len(names) > 1)
    if len(names) and names.str.fullmatch(r"logit/\d+-\d+(@\d+)?|logit_difference").all():
        return "{}logit difference{}".format(*of), "The logit of one token minus that of another."
    if len(names) and names.str.fullmatch(r"logit/\d+(@\d+)?|answer_logit").all():
        centered = bool(circuit.settings.get("center"))
        return "{}logit{}".format(*of), "Its logit minus the mean over all tokens." if centered else "Its logit."
    return "value", "A number that the model computes."


def _prediction(settings: Mapping[str, Any]) -> str:
    said = ", ".join(f"{_shown(token)} {_percent(p)}" for token, p in (settings.get("predicted") or [])[:3])
    return f"on average {said}" if said and int(settings.get("n_prompts", 1)) > 1 else said


def _shown(token: Any) -> str:
    """A token as it stands beside a number: one without a letter or digit in quotes, where a minus would be a sign."""
    text = str(token).strip()
    if any(character.isalnum() for character in text):
        return text
    return f"“{text}”" if text else repr(str(token))


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%".replace("-", "−") if np.isfinite(value) else ""


def _column(values: pd.Series) -> list[Any]:
    if values.dtype == "float64":
        return [_number(value) for value in values]
    return [int(value) for value in values] if values.dtype == "int64" else [str(value) for value in values]


def _number(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None


def checked_details(nodes: pd.DataFrame, details: Details) -> dict[str, dict[str, Any]]:
    """Details by node: a list of (heading, text), logit effects and examples, as plain JSON.

    Raises:
        SettingsError: a name that neither a node nor a group has, or details of another form.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, given in details.items():
        if not isinstance(given, Mapping):
            raise SettingsError(f"expected details such as {_FORM}; got {type(given).__name__} for {name!r}.")
        form = {
            "texts": [
                (str(key), str(text)) for key, text in given.items() if key not in ("direct_logit_effects", "examples")
            ],
            "direct_logit_effects": [_effect(name, pair) for pair in given.get("direct_logit_effects", ())],
            "examples": [_example(name, example) for example in given.get("examples", ())],
        }
        for node in _named(nodes, name):
            found[node] = form
    return found


def _named(nodes: pd.DataFrame, name: str) -> Sequence[str]:
    """The node, the nodes of a neuron at all positions, those with a label, or a group."""
    for same in (
        nodes["node"] == name,
        nodes["node"].str.rpartition("@")[0] == name,
        nodes["label"] == name,
    ):
        if same.any():
            return list(nodes.loc[same, "node"])
    if (nodes["group"] == name).any():
        return [name]
    near = nodes["node"].head(3).tolist()
    raise SettingsError(f"expected details of nodes of this circuit, such as {near}, or of a group; got {name!r}.")


def _effect(name: str, pair: Any) -> tuple[str, float]:
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        raise SettingsError(
            f"expected direct_logit_effects as pairs of a token and a number; got {pair!r} for {name!r}."
        )
    return str(pair[0]), _finite(name, [pair[1]])[0]


def _example(name: str, example: Any) -> dict[str, Any]:
    if isinstance(example, str):
        return {"tokens": [example], "values": [0.0], "note": ""}
    if hasattr(example, "tokens") and hasattr(example, "activations"):  # of `max_activating_examples`
        # Whole prompts. The first token is often far above all others, whatever it is: attention rests on it.
        at = example.position
        scale = {"peak": example.activations[at]} if at else {}
        example = {"tokens": example.tokens, "values": example.activations, "first": True, **scale}
    if not isinstance(example, Mapping) or not {"tokens", "values"} <= set(example):
        raise SettingsError(f"expected an example as text, or with tokens and values; got {example!r} for {name!r}.")
    tokens, values = [str(token) for token in example["tokens"]], _finite(name, example["values"])
    if len(tokens) != len(values):
        raise SettingsError(
            f"expected one value per token; got {len(tokens)} tokens and {len(values)} values for {name!r}."
        )
    made: dict[str, Any] = {"tokens": tokens, "values": values, "note": str(example.get("note", ""))}
    made |= {"first": True} if example.get("first") is True else {}
    return made if example.get("peak") is None else made | {"peak": _finite(name, [example["peak"]])[0]}


def _finite(name: str, values: Iterable[Any]) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise SettingsError(f"expected numbers in the details of {name!r}; got {error}.") from error
    if not np.isfinite(numbers).all():
        raise SettingsError(f"expected finite numbers in the details of {name!r}; got {numbers}.")
    return [float(f"{number:.5g}") for number in numbers]
