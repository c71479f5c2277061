"""`tl-neuron-circuits steer`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ._load import load_model
from ._options import AsJson, Backend, Device, Dtype, Model
from ._saved import load_circuit
from ._terminal import console, print_json, show


def steer(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text whose next token is looked at.")],
    node: Annotated[
        list[str] | None, typer.Option(help="L0/N92 for every position, L0/N92@7 for one; again for more.")
    ] = None,
    circuit: Annotated[
        Path | None, typer.Option(help="Steer the neurons of a circuit saved by trace or lasso.")
    ] = None,
    group: Annotated[list[str] | None, typer.Option(help="Only those of this group of the circuit.")] = None,
    scale: Annotated[float | None, typer.Option(help="Multiply by it: 0 ablates, 2 doubles, -1 turns round.")] = None,
    value: Annotated[float | None, typer.Option(help="Set to it.")] = None,
    add: Annotated[float | None, typer.Option(help="Add it.")] = None,
    positions: Annotated[
        str | None, typer.Option(help="Tokens at which to steer, such as 3,7; BOS counts, from 0.")
    ] = None,
    top: Annotated[int, typer.Option(help="Tokens listed before and after.", min=1)] = 10,
    generate: Annotated[int, typer.Option(help="Also continue the prompt by so many tokens.", min=0)] = 0,
    backend: Backend = "auto",
    device: Device = None,
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Multiply, set or add to neurons and show the next token before and after.

    Give --node or --circuit, and one of --scale, --value and --add.
    """
    from ..interventions._steer import steer as run
    from ..interventions._steering_prompts import read_prompts, text_pieces

    chosen = _nodes(node or [], circuit, group or [])
    places = _positions(positions)
    loaded = load_model(model, backend, device, dtype)
    result = run(
        loaded, prompt, chosen, scale=scale, value=value, add=add, positions=places, top_k=top, generate=generate
    )
    tokens = text_pieces(loaded, read_prompts(loaded, prompt).tokens[0])
    table = result.to_dataframe().drop(columns=["prompt", "token_id"])
    kl, continuations = float(result.kl[0]), (result.continuations or [None])[0]
    if as_json:
        content = {"kl": kl, "top_before": result.top_before[0], "top_after": result.top_after[0], "tokens": tokens}
        content |= {"nodes": result.nodes["label"].tolist(), "table": result.to_dataframe().drop(columns="prompt")}
        print_json(content | {"continuations": continuations})
        return
    console.print("  ".join(f"{place}:{token!r}" for place, token in enumerate(tokens)), markup=False, highlight=False)
    title = f"{result.top_before[0]!r} -> {result.top_after[0]!r}, KL {kl:.4g} nats, {len(result.nodes)} nodes steered"
    shown = table[["token", "probability_before", "probability_after", "logit_change"]]
    show(
        shown.assign(token=shown["token"].map(repr)).set_axis(["token", "before", "after", "change of logit"], axis=1),
        title,
    )
    for name, text in zip(("before", "after"), continuations or (), strict=False):
        console.print(f"continued {name}: {text!r}", markup=False, highlight=False)


def _nodes(labels: list[str], folder: Path | None, groups: list[str]) -> Any:
    """Labels as given, or a circuit's neurons."""
    from .._errors import SettingsError

    if bool(labels) == (folder is not None):
        raise SettingsError(
            f"expected either --node, once or more, or --circuit; got {'both' if labels else 'neither'}. "
            "Labels are like L0/N92 (every position) or L0/N92@7 (one)."
        )
    if groups and folder is None:
        raise SettingsError("expected --circuit beside --group: groups are those of a saved circuit. Add it.")
    if folder is None:
        return labels
    circuit = load_circuit(folder)
    return _members(circuit, groups) if groups else circuit


def _members(circuit: Any, groups: list[str]) -> list[str]:
    """The neurons in these groups, also where `collapse` has made supernodes of them."""
    from .._errors import SettingsError

    nodes, collapsed = circuit.nodes, dict(circuit.settings.get("groups") or {})
    alone = nodes[nodes["kind"] != "group"]
    there = sorted({*alone["group"], *collapsed} - {""})
    if missing := [name for name in groups if name not in there]:
        raise SettingsError(f"expected a group out of {there or 'none: this circuit has no groups'}; got {missing}.")
    members = [label for name in groups for label in collapsed.get(name, [])]
    return list(dict.fromkeys([*members, *alone.loc[alone["group"].isin(groups), "node"]]))


def _positions(text: str | None) -> list[int] | None:
    from .._errors import SettingsError

    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise SettingsError(f"expected --positions as numbers from 0 with commas, such as 3,7; got {text!r}.")
    return [int(part) for part in parts]
