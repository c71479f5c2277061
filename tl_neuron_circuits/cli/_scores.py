"""`tl-neuron-circuits check`, `attribute` and `compare`: is a model supported, and which nodes matter."""

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
    PairsFile,
    Seed,
    SkipSpecial,
    WhereRight,
    load_model,
    prepare,
)
from ._terminal import FAILED, console, print_json, say, show, show_written, tell


def check(
    model: Model,
    sites: Annotated[bool, typer.Option("--sites", help="List every site: hook point, shape, rule.")] = False,
    backend: Backend = "auto",
    device: Device = None,
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Check whether relevance propagation holds on a model: sites, rules, conservation, memory, in one screen.

    Exit code 1 where it does not.
    """
    from ..propagation._check_model import check_model

    loaded = load_model(model, backend, device, dtype)
    say("checking which sites fire, and that relevance is conserved")
    report = check_model(loaded)
    if as_json:
        content = {"ok": report.ok, "conservation": report.conservation, "problems": list(report.problems)}
        content |= {"model": report.model_line, "prompts": report.input_line, "sites": list(report.sites)}
        print_json("check", content)
    else:
        for line in [f"{report.model_name} ({report.model_class})", *report.summary().splitlines()]:
            console.print(line, soft_wrap=True, markup=False, style="red" if line.startswith("problem") else None)
        if sites:
            show(report.to_dataframe(), "sites")
        else:
            say("--sites lists every hook point")
    if not report.ok:
        raise typer.Exit(FAILED)


def attribute(
    model: Model,
    pairs: PairsFile,
    method: Annotated[
        str, typer.Option(help="relp, gradient, integrated_gradients, ...; options in parentheses.")
    ] = "relp",
    basis: Annotated[str, typer.Option(help="neurons, mlp_outputs, head_outputs or residual_stream.")] = "neurons",
    positions: Annotated[str, typer.Option(help="keep or sum.")] = "keep",
    keep_fitting: KeepFitting = False,
    multi_token: MultiToken = "error",
    where_right: WhereRight = False,
    batch_size: BatchSize = 32,
    top: Annotated[int, typer.Option(help="How many nodes to show.", min=1)] = 20,
    out: Annotated[Path | None, typer.Option(help="Save all scores to this folder.")] = None,
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
    """Score every node of a basis by its effect on the logit difference, on pairs from a file."""
    from .._processes import current_processes
    from ..bases._activations import ACTIVATION_BASES
    from ..nodes._attribute import attribute as score
    from ..tasks._pairs import PromptPairs
    from ..tasks._tokenize import tokenize

    if basis not in ACTIVATION_BASES:
        raise SettingsError(f"expected --basis out of {', '.join(ACTIVATION_BASES)}; got {basis!r}.")
    read = PromptPairs.from_jsonl(pairs)
    processes = current_processes()  # before the model is loaded: under `accelerate launch` it chooses the GPU
    loaded = load_model(model, backend, device, dtype)
    read = prepare(
        loaded, read, no_bos=no_bos, chat=chat, message=message, answer_start=answer_start, keep_fitting=keep_fitting,
        multi_token=multi_token, where_right=where_right, same_length=positions == "keep",
    )  # fmt: skip
    scores = score(
        loaded,
        tokenize(loaded, read, multi_token=multi_token),  # pyright: ignore[reportArgumentType]
        method=method,
        basis=ACTIVATION_BASES[basis](),
        positions=positions,  # pyright: ignore[reportArgumentType]
        skip_special=skip_special,
        batch_size=batch_size,
    )
    if not processes.first:
        return
    if out is not None:
        scores.save(out)
    if as_json:
        files = [] if out is None else [out]
        print_json("attribute", {"scores": repr(scores), "files": files, "nodes": scores.top(top)})
        return
    show(scores.top(top).drop(columns="hook"), repr(scores))
    if out is not None:
        show_written([out])


def compare(
    model: Model,
    pairs: PairsFile,
    out: Annotated[Path, typer.Option(help="Folder for the results; the same call resumes from there.")],
    evaluation_pairs: Annotated[Path | None, typer.Option(help="Held-out pairs; else half of the words.")] = None,
    basis: Annotated[list[str] | None, typer.Option(help="neurons, mlp_outputs, ...; these two by default.")] = None,
    sae: Annotated[list[Path] | None, typer.Option(help="Folder of an SAE, or of folders of them.")] = None,
    transcoder: Annotated[list[Path] | None, typer.Option(help="Likewise for transcoders.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="As in attribute, with options in parentheses.")] = None,
    size: Annotated[list[int] | None, typer.Option(help="Number of nodes; 20 log-spaced ones by default.")] = None,
    ablation: Annotated[str, typer.Option(help="mean, zero, resample or corrupt.")] = "mean",
    ranking: Annotated[
        list[str] | None, typer.Option(help="abs, signed, or both; each method's own by default.")
    ] = None,
    error_nodes: Annotated[str, typer.Option(help="Errors of dictionaries: rank, keep or ablate.")] = "rank",
    mib: Annotated[bool, typer.Option("--mib", help="Also CPR and CMD on MIB's grid.")] = False,
    keep_fitting: KeepFitting = False,
    multi_token: MultiToken = "error",
    where_right: WhereRight = False,
    chat: Chat = False,
    message: ChatMessage = PROMPT,
    answer_start: AnswerStart = "",
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    no_bos: NoBos = False,
    backend: Backend = "auto",
    device: Device = None,
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Compare neurons, MLP outputs, SAEs and transcoders by how faithful their circuits are, on pairs from a file.

    Options that take several values are given once for each: --basis neurons --basis mlp_outputs.
    """
    from ..evaluation._compare import DEFAULT_METHODS
    from ..evaluation._compare import compare as run
    from ..tasks._pairs import PromptPairs
    from ..tasks._tokenize import tokenize

    bases = _bases(basis or ["neurons", "mlp_outputs"], sae or [], transcoder or [])
    read = {file: PromptPairs.from_jsonl(file) for file in (pairs, evaluation_pairs) if file is not None}
    loaded = load_model(model, backend, device, dtype)
    sets = []
    for file, each in read.items():
        if len(read) > 1 and (keep_fitting or where_right):
            tell(f"{file}:")
        sets.append(
            prepare(
                loaded, each, no_bos=no_bos, chat=chat, message=message, answer_start=answer_start,
                keep_fitting=keep_fitting, multi_token=multi_token, where_right=where_right,
            )
        )  # fmt: skip
    if len(sets) == 1:
        sets = sets[0].split(0.5, seed=seed, by="contrast" if sets[0].labels is None else "label")
    train, test = (tokenize(loaded, each, multi_token=multi_token) for each in sets)  # pyright: ignore[reportArgumentType]
    result = run(
        loaded,
        train,
        test,
        bases=bases,
        methods=method or DEFAULT_METHODS,
        sizes=size,
        ablation=ablation,  # pyright: ignore[reportArgumentType]
        rankings=ranking or None,  # pyright: ignore[reportArgumentType]
        error_nodes=error_nodes,  # pyright: ignore[reportArgumentType]
        mib=mib,
        batch_size=batch_size,
        seed=seed,
        directory=out / "comparison",
    )
    files = _write(result, out)
    if as_json:
        print_json(
            "compare",
            {"headline": result.headline(), "notes": result.notes, "files": files, "summary": result.summary()},
        )
        return
    show(_readable(result.summary()), repr(result))
    console.print(result.headline(), soft_wrap=True, markup=False, highlight=False)
    show_written(files)


def _bases(names: list[str], sae: list[Path], transcoder: list[Path]) -> list[Any]:
    """Bases of the layers that the dictionaries have, so that all compete for the same layers."""
    from ..bases._activations import ACTIVATION_BASES
    from ..bases._dictionary_basis import Dictionaries
    from ..bases._load_dictionaries import load_dictionaries

    if wrong := [name for name in names if name not in ACTIVATION_BASES]:
        raise SettingsError(f"expected --basis out of {', '.join(ACTIVATION_BASES)}; got {', '.join(wrong)}.")
    kinds = {"sae": load_dictionaries(sae), "transcoder": load_dictionaries(transcoder)}
    layers = sorted({dictionary.layer for found in kinds.values() for dictionary in found}) or None
    dictionaries = [Dictionaries(found, name=kind) for kind, found in kinds.items() if found]
    return [ACTIVATION_BASES[name](layers) for name in names] + dictionaries


def _readable(summary: Any) -> Any:
    """What fits into 80 columns; all of it is in summary.csv."""
    names = {"basis": "basis", "method": "method", "n_nodes": "nodes", "log_area": "area", "size_at_0.5": "to .5"}
    names |= {"size_at_0.8": "to .8", "cpr": "CPR", "cmd": "CMD", "unexplained": "FVU"}
    shown = summary[list(names)].rename(columns=names).dropna(axis="columns", how="all")
    shown = shown if shown.get("FVU", shown["area"]).any() else shown.drop(columns="FVU")  # activations leave nothing
    return shown.replace({"method": {"integrated_gradients": "IG", "activation_difference": "difference"}})


def _write(result: Any, out: Path) -> list[Path]:
    """The figure, every point of every curve, and the summary."""
    from .._files import write_text

    files = [out / name for name in ("sparsity.html", "sparsity.csv", "summary.csv")]
    write_text(files[0], result.plot().to_html(include_plotlyjs=True))
    write_text(files[1], result.to_dataframe().to_csv(index=False))
    write_text(files[2], result.summary().to_csv(index=False))
    return files
