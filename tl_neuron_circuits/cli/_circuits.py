"""`tl-neuron-circuits trace`, `steer`, `lasso` and `export`: find a circuit, steer its neurons, convert it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .._errors import SettingsError
from ._inputs import (
    PROMPT,
    AnswerStart,
    AsJson,
    Backend,
    BatchSize,
    Chat,
    ChatMessage,
    Device,
    Dtype,
    KeepFitting,
    Model,
    MultiToken,
    NoBos,
    Seed,
    SkipSpecial,
    WhereRight,
    in_chat,
    load_circuit,
    load_model,
    load_saved,
    prepare,
    read_inputs,
)
from ._terminal import console, print_json, show, show_written, tell

FORMATS = {".html": "html", ".json": "neuronpedia", ".csv": "csv"}


def trace(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the circuit, its page and its JSON.")],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            help="The text whose next token is explained, or several; {city:Dallas} marks what differs in length.",
            metavar="PROMPT...",
        ),
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="Instead of prompts: pairs as in attribute, answer against wrong answer.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="A token as it follows the prompt; repeat it for several prompts. Else the likeliest."),
    ] = None,
    nodes: Annotated[
        str | None,
        typer.Option(help="How many, 'share(0.005)' of the target each (the default), or 'mass(0.8)' of all |scores|."),
    ] = None,
    share: Annotated[float | None, typer.Option(help="Short for --nodes 'share(...)'.")] = None,
    mass: Annotated[float | None, typer.Option(help="Short for --nodes 'mass(...)'.")] = None,
    dictionaries: Annotated[
        list[str] | None,
        typer.Option(help="Features of these instead of neurons: a folder, or a SAELens release; repeat for more."),
    ] = None,
    explained: Annotated[
        float | None,
        typer.Option(help="Instead of --nodes: as many as give this share of the target when run alone, such as 0.5."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="For --explained of prompts: texts, one per line, whose means other neurons have."),
    ] = None,
    positions: Annotated[str, typer.Option(help="keep, or sum: one node per neuron, prompts of any length.")] = "keep",
    selection: Annotated[str, typer.Option(help="Of several prompts: by their mean score, or the union.")] = "mean",
    profiles: Annotated[
        bool, typer.Option("--profiles", help="Also what each token brings to each neuron; see by_prompt.csv.")
    ] = False,
    keep_fitting: KeepFitting = False,
    multi_token: MultiToken = "error",
    where_right: WhereRight = False,
    chat: Chat = False,
    message: ChatMessage = PROMPT,
    answer_start: AnswerStart = "",
    skip_special: SkipSpecial = False,
    no_bos: NoBos = False,
    backend: Backend = "auto",
    device: Device = None,
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Trace prompts, or pairs, to a circuit; write it, an interactive page and Neuronpedia's attribution graph."""
    from pandas import DataFrame

    from .._files import write_text
    from ..bases._activations import Neurons
    from ..bases._dictionary_basis import Dictionaries
    from ..bases._load_dictionaries import load_dictionaries
    from ..circuits._trace import trace as run
    from ..explain._node_details import node_details
    from ..tasks._pairs import PromptPairs
    from ..tasks._tokenize import tokenize

    if bool(prompts) == (pairs is not None):
        raise SettingsError(f"expected either PROMPT or --pairs; got {'both' if prompts else 'neither'}.")
    if pairs is not None and target:
        raise SettingsError("expected no --target beside --pairs: pairs have answers of their own. Leave it out.")
    if pairs is None and (keep_fitting or where_right or multi_token != "error"):
        raise SettingsError("expected --pairs beside --keep-fitting, --where-right and --multi-token. Add it.")
    choice = _choice(nodes, share, mass, explained)
    if (reference is not None) != (explained is not None and pairs is None):
        raise SettingsError(
            "expected --explained and --reference together: circuits are run with every other neuron at its mean over "
            "the reference texts, one per line (with --pairs, over the pairs: no --reference)."
        )
    for name, value, known in (("positions", positions, ("keep", "sum")), ("selection", selection, ("mean", "union"))):
        if value not in known:
            raise SettingsError(f"expected --{name} {' or '.join(known)}; got {value!r}.")
    texts = None if reference is None else read_inputs(None, reference)
    basis = Dictionaries(load_dictionaries(dictionaries)) if dictionaries else Neurons()
    questions: Any = prompts if pairs is None else PromptPairs.from_jsonl(pairs)
    loaded = load_model(model, backend, device, dtype)
    if pairs is not None:
        asked: Any = prepare(
            loaded, questions, no_bos=no_bos, chat=chat, message=message, answer_start=answer_start,
            keep_fitting=keep_fitting, multi_token=multi_token, where_right=where_right,
            same_length=positions == "keep",
        )  # fmt: skip
        if multi_token != "error":
            asked = tokenize(loaded, asked, multi_token=multi_token)  # pyright: ignore[reportArgumentType]
    else:
        each = [in_chat(loaded, prompt, chat, message, answer_start, no_bos) for prompt in questions]
        asked = each if len(each) > 1 else each[0]
    targets: Any = target[0] if target and len(target) == 1 else target or None
    circuit = run(
        loaded, asked, targets, basis=basis, nodes=choice, reference=texts,
        positions=positions,  # pyright: ignore[reportArgumentType]
        selection=selection,  # pyright: ignore[reportArgumentType]
        profiles=profiles, skip_special=skip_special, prepend_bos=False if no_bos and pairs is None else None,
    )  # fmt: skip
    files = [out / "circuit", out / "circuit.html"]
    circuit.save(files[0])
    has_neurons = bool((circuit.nodes["kind"] == "neuron").any())
    circuit.to_html(files[1], details=node_details(loaded, circuit) if has_neurons else None)
    if circuit.settings["tokens"]:  # Neuronpedia's format has one position per node
        circuit.to_neuronpedia(out / "neuronpedia.json")
        files.append(out / "neuronpedia.json")
    if circuit.by_prompt is not None:
        write_text(out / "by_prompt.csv", circuit.by_prompt.to_csv(index=False))
        files.append(out / "by_prompt.csv")
    best = circuit.to_dataframe().query("kind != 'logit'").head(20)
    by_prompt = circuit.settings["prompts"] or []
    if as_json:
        content = {"circuit": repr(circuit), "notes": circuit.notes, "files": files, "prompts": by_prompt}
        content |= {"spans": circuit.spans(), "explained": circuit.settings["explained"], "nodes": best}
        print_json("trace", content)
        return
    if by_prompt:
        show(DataFrame(by_prompt), "what the model says on each prompt")
    show(best[["node", "token", "activation", "score", "share"]], repr(circuit))
    show_written(files)


def _choice(nodes: str | None, share: float | None, mass: float | None, explained: float | None) -> Any:
    """The one way to choose nodes that was given."""
    from ..circuits._choose import ByMass, ByShare, parse_choice
    from ..circuits._explained import ByExplained

    options = {"nodes": nodes, "share": share, "mass": mass, "explained": explained}
    given = [f"--{name} {value}" for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise SettingsError(f"expected either --nodes or one of --share, --mass, --explained; got {', '.join(given)}.")
    if explained is not None:
        return ByExplained(explained)
    if mass is not None:
        return ByMass(mass)
    return ByShare(share) if share is not None else parse_choice(nodes or "share")


def steer(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text whose next token is predicted.")],
    node: Annotated[
        list[str] | None, typer.Option(help="L0/N92 at every position, L0/N92@7 at one; repeat for more.")
    ] = None,
    circuit: Annotated[
        Path | None, typer.Option(help="Steer the neurons of a circuit saved by trace or lasso.")
    ] = None,
    group: Annotated[list[str] | None, typer.Option(help="Only those of this group of the circuit.")] = None,
    watch: Annotated[
        list[str] | None,
        typer.Option(help="Also say how the activations of a group of the circuit change, or of NAME=L0/N92@7,L1/N3."),
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Multiply by it: 0 ablates, 2 doubles, -1 flips signs.")] = None,
    value: Annotated[float | None, typer.Option(help="Set to it.")] = None,
    add: Annotated[float | None, typer.Option(help="Add it.")] = None,
    positions: Annotated[
        str | None, typer.Option(help="Tokens at which to steer, such as 3,7; BOS counts, from 0.")
    ] = None,
    top: Annotated[int, typer.Option(help="Tokens listed before and after.", min=1)] = 10,
    generate: Annotated[int, typer.Option(help="Also continue the prompt by this many tokens.", min=0)] = 0,
    chat: Chat = False,
    message: ChatMessage = PROMPT,
    answer_start: AnswerStart = "",
    no_bos: NoBos = False,
    backend: Backend = "auto",
    device: Device = None,
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Multiply, set or add to neurons and show the next token before and after.

    Give --node or --circuit, and one of --scale, --value and --add.
    """
    from pandas import DataFrame

    from ..interventions._steer import steer as run
    from ..interventions._steering_prompts import read_prompts, text_pieces

    chosen = _nodes(node or [], circuit, group or [])
    watched = {name: nodes for name, nodes in (_watched(one, circuit) for one in watch or [])}
    places = _positions(positions)
    loaded = load_model(model, backend, device, dtype)
    prompt = in_chat(loaded, prompt, chat, message, answer_start, no_bos)
    bos = False if no_bos else None
    result = run(
        loaded, prompt, chosen, scale=scale, value=value, add=add, positions=places, watch=watched, top_k=top,
        generate=generate, prepend_bos=bos,
    )  # fmt: skip
    tokens = text_pieces(loaded, read_prompts(loaded, prompt, bos).tokens[0])
    table = result.to_dataframe().drop(columns=["prompt", "token_id"])
    kl, continuations = float(result.kl[0]), (result.continuations or [None])[0]
    if as_json:
        content = {"kl": kl, "top_before": result.top_before[0], "top_after": result.top_after[0], "tokens": tokens}
        content |= {"nodes": result.nodes["label"].tolist(), "table": result.to_dataframe().drop(columns="prompt")}
        content |= {"watched": {name: float(change[0]) for name, change in result.watched.items()}}
        print_json("steer", content | {"continuations": continuations})
        return
    console.print("  ".join(f"{place}:{token!r}" for place, token in enumerate(tokens)), markup=False, highlight=False)
    title = f"{result.top_before[0]!r} -> {result.top_after[0]!r}, KL {kl:.4g} nats, nodes steered: {len(result.nodes)}"
    shown = table[["token", "probability_before", "probability_after", "log_probability_change"]]
    names = ["token", "before", "after", "change of log-probability"]
    show(shown.assign(token=shown["token"].map(repr)).set_axis(names, axis=1), title)
    if watched:
        changes = [(name, len(watched[name]), float(change[0])) for name, change in result.watched.items()]
        show(DataFrame(changes, columns=["group", "nodes", "relative change of its activations"]), "watched; -1: gone")
    for name, text in zip(("before", "after"), continuations or (), strict=False):
        console.print(f"continued {name}: {text!r}", markup=False, highlight=False)


def _nodes(labels: list[str], folder: Path | None, groups: list[str]) -> Any:
    """Labels as given, or a circuit's neurons."""
    if bool(labels) == (folder is not None):
        raise SettingsError(
            f"expected either --node (repeat it for several) or --circuit; got {'both' if labels else 'neither'}. "
            "Labels are like L0/N92 (every position) or L0/N92@7 (one)."
        )
    if groups and folder is None:
        raise SettingsError("expected --circuit beside --group: groups are those of a saved circuit. Add it.")
    if folder is None:
        return labels
    circuit = load_circuit(folder)
    return _members(circuit, groups) if groups else circuit


def _watched(text: str, folder: Path | None) -> tuple[str, list[str]]:
    """A group's name and nodes, from NAME=LABEL,LABEL or the name of a group of the circuit."""
    name, equals, labels = text.partition("=")
    if equals:
        return name, [label.strip() for label in labels.split(",") if label.strip()]
    if folder is None:
        raise SettingsError(f"expected --watch NAME=L0/N92@7,L1/N3, or a group of --circuit; got {text!r}.")
    return text, _members(load_circuit(folder), [text])


def _members(circuit: Any, groups: list[str]) -> list[str]:
    """The neurons in these groups, also where `collapse` has made supernodes of them."""
    nodes, collapsed = circuit.nodes, dict(circuit.settings.get("groups") or {})
    alone = nodes[nodes["kind"] != "group"]
    there = sorted({*alone["group"], *collapsed} - {""})
    if missing := [name for name in groups if name not in there]:
        raise SettingsError(f"expected a group out of {there or 'none: this circuit has no groups'}; got {missing}.")
    members = [label for name in groups for label in collapsed.get(name, [])]
    return list(dict.fromkeys([*members, *alone.loc[alone["group"].isin(groups), "node"]]))


def _positions(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise SettingsError(f"expected --positions as numbers from 0 with commas, such as 3,7; got {text!r}.")
    return [int(part) for part in parts]


def lasso(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for edges.csv, the circuit and its page.")],
    pairs: Annotated[Path | None, typer.Option(help="JSON lines as in attribute; clean prompts are observed.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Or a text file, one prompt per line.")] = None,
    n_edges: Annotated[int | None, typer.Option(help="Maximum number of edges, instead of --share.", min=1)] = None,
    share: Annotated[float | None, typer.Option(help="Penalty as a share of the one that leaves no edge; 0.2.")] = None,
    attention: Annotated[str, typer.Option(help="Components: heads or layers.")] = "heads",
    mlp: Annotated[str, typer.Option(help="Components: outputs of MLPs, or their neurons.")] = "outputs",
    regressors: Annotated[str, typer.Option(help="same, pooled or earlier positions.")] = "pooled",
    bootstrap: Annotated[int, typer.Option(help="Resamples for the stability of edges.", min=0)] = 0,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    no_bos: NoBos = False,
    backend: Backend = "auto",
    device: Device = None,
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Find a circuit by regressing each component on those before it: CircuitLasso, one forward pass per prompt.

    Give --pairs or --prompts. An edge says what predicts what; it is not a causal effect.
    """
    from .._errors import SettingsError
    from .._files import write_text
    from ..lasso._circuit_lasso import CircuitLasso, MostEdges, Share
    from ..lasso._observations import Components

    inputs = read_inputs(pairs, prompts)
    if n_edges is not None and share is not None:
        raise SettingsError("expected at most one of --n-edges and --share; got both.")
    method = CircuitLasso(
        penalty=MostEdges(n_edges) if n_edges is not None else Share(0.2 if share is None else share),
        nodes=Components(attention, mlp),  # pyright: ignore[reportArgumentType]
        regressors=regressors,  # pyright: ignore[reportArgumentType]
        bootstrap=bootstrap,
        seed=seed,
    )
    loaded = load_model(model, backend, device, dtype)
    found = method.fit(loaded, inputs, batch_size=batch_size, prepend_bos=False if no_bos else None)
    files = [out / "edges.csv", out / "circuit", out / "circuit.html"]
    circuit = found.to_circuit()
    circuit.save(files[1])
    circuit.to_html(files[2])
    write_text(files[0], found.edges.to_csv(index=False))
    if as_json:
        print_json("lasso", {"circuit": repr(found), "notes": found.notes, "files": files, "edges": found.edges})
        return
    for note in found.notes:
        tell(note)
    show(found.edges.head(20).dropna(axis="columns", how="all"), repr(found))
    show_written(files)


def export(
    saved: Annotated[Path, typer.Argument(help="Folder that trace, lasso or attribute wrote.", metavar="SAVED")],
    out: Annotated[Path, typer.Option(help="File to write: .html, .json (Neuronpedia) or .csv.")],
    form: Annotated[str | None, typer.Option("--format", help="html, neuronpedia or csv; else by the name.")] = None,
    top: Annotated[int | None, typer.Option(help="Scores: only this many, the best.", min=1)] = None,
    slug: Annotated[str | None, typer.Option(help="Neuronpedia: name of the graph; else from the prompt.")] = None,
    scan: Annotated[str | None, typer.Option(help="Neuronpedia: name of the model there; else its own.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a saved circuit or saved scores as a page, as Neuronpedia's attribution graph or as CSV.

    A circuit's CSV is its nodes; its edges go to a second file, NAME_edges.csv.
    """
    from ..circuits._circuit import Circuit

    chosen = form or FORMATS.get(out.suffix.lower(), f"the name {out.name!r}")
    if chosen not in FORMATS.values():
        endings = ", ".join(FORMATS)
        raise SettingsError(
            f"expected --format html, neuronpedia or csv, or a name that ends in {endings}; got {chosen}."
        )
    result = load_saved(saved)
    if isinstance(result, Circuit):
        files = _circuit(result, out, chosen, slug, scan)
    else:
        files = _scores(result, out, chosen, top)
    if as_json:
        print_json("export", {"saved": repr(result), "format": chosen, "files": files})
        return
    show_written(files)


def _circuit(circuit: Any, out: Path, form: str, slug: str | None, scan: str | None) -> list[Path]:
    from .._files import write_text

    if form == "html":
        circuit.to_html(out)
    elif form == "neuronpedia":
        circuit.to_neuronpedia(out, slug=slug, scan=scan)
    else:
        edges = out.with_name(f"{out.stem}_edges{out.suffix}")
        write_text(out, circuit.to_dataframe().to_csv(index=False))
        write_text(edges, circuit.edges.to_csv(index=False))
        return [out, edges]
    return [out]


def _scores(scores: Any, out: Path, form: str, top: int | None) -> list[Path]:
    from .._files import write_text
    from .._html import document

    if form == "neuronpedia":
        raise SettingsError(f"expected a circuit for an attribution graph; got {scores!r}. Run trace for edges.")
    if form == "csv":
        write_text(out, (scores.to_dataframe() if top is None else scores.top(top)).to_csv(index=False))
    else:
        write_text(out, document(repr(scores), scores.to_html(top or 200)))
    return [out]
