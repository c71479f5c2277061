"""The command line: thin, every command a call of the Python interface with the same words.

Exit codes: 0 done, 1 the model or a computation failed a check, 2 bad input, 130 interrupted.
"""

import json
import logging
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="Neuron circuits with RelP on any TransformerLens model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
complain = Console(stderr=True)
F = TypeVar("F", bound=Callable[..., Any])

Model = Annotated[str, typer.Argument(help="demo-gelu, demo-swiglu, a name TransformerLens loads, or a local folder.")]
Backend = Annotated[str, typer.Option(help="auto, HookedTransformer or TransformerBridge.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables; progress goes to stderr.")]
PairsFile = Annotated[Path, typer.Option("--pairs", help="JSON lines: clean_prefix, patch_prefix, clean_answer, ...")]


def guarded(command: F) -> F:
    """Turn a user's mistake into one message and exit code 2, and Ctrl-C into 130; no traceback for either."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        from jaxtyping import TypeCheckError

        from ._errors import NeuronCircuitsError

        try:
            return command(*args, **kwargs)
        except (NeuronCircuitsError, TypeCheckError, FileNotFoundError, PermissionError, IsADirectoryError) as error:
            complain.print(f"[bold red]{type(error).__name__}[/]: ", end="")
            complain.print(str(error), markup=False, highlight=False)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            complain.print("interrupted")
            raise typer.Exit(130) from None

    return run  # pyright: ignore[reportReturnType]


def load_model(name: str, backend: str) -> Any:
    """A demo model, a local Hugging Face folder (TransformerBridge), or a name that TransformerLens can load.

    Raises:
        SettingsError: nothing of that name, or the installed TransformerLens lacks the class for it.
    """
    from ._errors import SettingsError
    from .models import DEMO_MODELS, load_demo_model

    if name in DEMO_MODELS:
        return load_demo_model(name, backend)
    if backend not in ("auto", "HookedTransformer", "TransformerBridge"):
        raise SettingsError(f"expected backend auto, HookedTransformer or TransformerBridge; got {backend!r}.")
    loaders = {"HookedTransformer": [_hooked], "TransformerBridge": [_bridge], "auto": [_hooked, _bridge]}[backend]
    reasons = []
    for load in loaders:
        try:
            return load(name)
        except ImportError:
            reasons.append(f"{load.__name__.strip('_')}: not in the installed TransformerLens")
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reasons.append(f"{load.__name__.strip('_')}: {str(error).strip().splitlines()[0][:200]}")
    raise SettingsError(
        f"cannot load {name!r}. Give demo-gelu, demo-swiglu, a name that TransformerLens knows or a local Hugging Face "
        "folder (with TransformerLens 3.9 or later).\n" + "\n".join(reasons)
    )


def _hooked(name: str) -> Any:
    from transformer_lens import HookedTransformer

    if Path(name).is_dir():
        raise ValueError("a local folder loads as TransformerBridge")
    with warnings.catch_warnings():  # leaving TransformerLens, and what most users of versions below 4 still hold
        warnings.filterwarnings("ignore", "HookedTransformer", DeprecationWarning)
        return HookedTransformer.from_pretrained(name)


def _bridge(name: str) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(name, device="cpu")


def shown(cell: Any) -> str:
    """A cell of a table: three decimals, empty where there is nothing."""
    import pandas as pd

    missing = pd.isna(cell)
    return "" if missing else f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def show(frame: Any, title: str) -> None:
    """Print a DataFrame as a table."""
    table = Table(title=title, title_justify="left")
    for column in frame.columns:
        table.add_column(str(column), justify="right" if frame[column].dtype.kind in "if" else "left")
    for row in frame.itertuples(index=False):
        table.add_row(*map(shown, row))
    console.print(table)


@app.command()
@guarded
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the figure and the tables.")] = Path("neuron_circuits_demo"),
    model: Annotated[str, typer.Option(help="demo-gelu or demo-swiglu.")] = "demo-gelu",
    backend: Backend = "auto",
    seed: Annotated[int, typer.Option(help="Of the pairs and their split.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Trace, test and show neuron circuits of a demo model: agreement, and Dallas -> Texas -> Austin."""
    from .demo import run_demo

    say = (lambda _: None) if as_json else (lambda text: console.print(f"[dim]{text}[/]"))
    result = run_demo(out, name=model, backend=backend, seed=seed, verbose=not as_json, say=say)
    if as_json:
        rows = result.table().to_dict(orient="records")
        content = {"conservation": result.report.conservation, "table": rows, "files": [str(f) for f in result.files]}
        print(json.dumps(content))
        return
    console.print(f"\n{result.report!r}\n")
    columns = ["label", "layer", "unit", "position", "score"]
    show(result.agreement.top(10)[columns], "agreement: the neurons that support the right verb most")
    show(result.dallas.top(10)[columns], f"{result.dallas_pair.clean[0]} ->{result.dallas_pair.answer[0]}")
    wide = result.table().pivot_table(
        index=["task", "method"], columns="size", values=["faithfulness", "completeness"], sort=False
    )
    for measure, ideal in (("faithfulness", 1), ("completeness", 0)):
        show(wide[measure].reset_index(), f"{measure} of the best k neurons, held-out pairs (ideal: {ideal})")
    console.print("written: " + ", ".join(str(file) for file in result.files), soft_wrap=True)


@app.command()
@guarded
def check(model: Model, backend: Backend = "auto", as_json: AsJson = False) -> None:
    """Check whether relevance propagation holds on a model: sites, rules, conservation, memory."""
    from .propagation import check_model

    report = check_model(load_model(model, backend))
    if as_json:
        content = {"ok": report.ok, "conservation": report.conservation, "problems": list(report.problems)}
        print(json.dumps({**content, "sites": list(report.sites)}))
    else:
        console.print(repr(report), soft_wrap=True)
        show(report.to_dataframe(), "sites")
        for problem in report.problems:
            console.print(f"[red]problem[/]: {problem}", soft_wrap=True)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
@guarded
def attribute(
    model: Model,
    pairs: PairsFile,
    method: Annotated[str, typer.Option(help="relp, gradient, integrated_gradients, patching, ...")] = "relp",
    basis: Annotated[str, typer.Option(help="neurons, mlp_outputs, attention_outputs or residual_stream.")] = "neurons",
    positions: Annotated[str, typer.Option(help="keep or sum.")] = "keep",
    multi_token: Annotated[str, typer.Option(help="error or first_difference.")] = "error",
    batch_size: Annotated[int, typer.Option(help="Prompts in one pass.")] = 32,
    top: Annotated[int, typer.Option(help="How many nodes to show.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Save all scores to this folder.")] = None,
    backend: Backend = "auto",
    as_json: AsJson = False,
) -> None:
    """Score every node of a basis by its effect on the logit difference, on pairs from a file."""
    from ._errors import SettingsError
    from ._processes import here
    from .attribution import attribute as score
    from .bases import ACTIVATION_BASES
    from .tasks import PromptPairs

    if basis not in ACTIVATION_BASES:
        raise SettingsError(f"expected a basis out of {list(ACTIVATION_BASES)}; got {basis!r}.")
    processes = here()  # under `accelerate launch` before the model is loaded: it chooses this process' GPU
    loaded = load_model(model, backend)
    scores = score(
        loaded,
        PromptPairs.from_jsonl(pairs),
        method=method,  # pyright: ignore[reportArgumentType]
        basis=ACTIVATION_BASES[basis](),
        positions=positions,  # pyright: ignore[reportArgumentType]
        multi_token=multi_token,  # pyright: ignore[reportArgumentType]
        batch_size=batch_size,
        verbose=not as_json,
    )
    if not processes.first:
        return
    if out is not None:
        scores.save(out)
    if as_json:
        print(scores.top(top).to_json(orient="records"))
        return
    show(scores.top(top).drop(columns="hook"), repr(scores))
    if out is not None:
        console.print(f"written: {out}")


@app.command()
@guarded
def compare(
    model: Model,
    pairs: PairsFile,
    out: Annotated[Path, typer.Option(help="Folder for the results; the same call goes on from what is there.")],
    evaluation_pairs: Annotated[Path | None, typer.Option(help="Held-out pairs; else half of the words.")] = None,
    basis: Annotated[list[str] | None, typer.Option(help="neurons, mlp_outputs, ...; neurons, mlp_outputs.")] = None,
    sae: Annotated[list[Path] | None, typer.Option(help="Folder of an SAE, or of folders of them.")] = None,
    transcoder: Annotated[list[Path] | None, typer.Option(help="Likewise for transcoders.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="relp, gradient, integrated_gradients, random, ...")] = None,
    size: Annotated[list[int] | None, typer.Option(help="Numbers of nodes; 20 log-spaced ones.")] = None,
    ablation: Annotated[str, typer.Option(help="mean, zero, resample or corrupt.")] = "mean",
    error: Annotated[str, typer.Option(help="A dictionary's error: nodes, keep or ablate.")] = "nodes",
    mib: Annotated[bool, typer.Option("--mib", help="Also CPR and CMD on MIB's grid.")] = False,
    batch_size: Annotated[int, typer.Option(help="Prompts in one pass.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the split, resampling and bands.")] = 0,
    backend: Backend = "auto",
    as_json: AsJson = False,
) -> None:
    """Compare neurons, MLP outputs, SAEs and transcoders by how faithful their circuits are, on pairs from a file."""
    from ._errors import SettingsError
    from .bases import ACTIVATION_BASES, Dictionaries, load_dictionaries
    from .evaluation import DEFAULT_METHODS
    from .evaluation import compare as run
    from .tasks import PromptPairs

    names = basis or ["neurons", "mlp_outputs"]
    if wrong := [name for name in names if name not in ACTIVATION_BASES]:
        raise SettingsError(f"expected bases out of {list(ACTIVATION_BASES)}; got {wrong}.")
    kinds = {"sae": load_dictionaries(sae or []), "transcoder": load_dictionaries(transcoder or [])}
    layers = sorted({dictionary.layer for found in kinds.values() for dictionary in found}) or None
    dictionaries = [Dictionaries(found, name=kind) for kind, found in kinds.items() if found]
    bases = [ACTIVATION_BASES[name](layers) for name in names] + dictionaries
    train = PromptPairs.from_jsonl(pairs)
    if evaluation_pairs is None:
        train, test = train.split(0.5, seed=seed, by="contrast" if train.labels is None else "label")
    else:
        test = PromptPairs.from_jsonl(evaluation_pairs)
    result = run(
        load_model(model, backend),
        train,
        test,
        bases=bases,
        methods=method or DEFAULT_METHODS,  # pyright: ignore[reportArgumentType]
        sizes=size,
        ablation=ablation,  # pyright: ignore[reportArgumentType]
        error=error,  # pyright: ignore[reportArgumentType]
        mib=mib,
        batch_size=batch_size,
        seed=seed,
        directory=out / "comparison",
        verbose=not as_json,
    )
    files = _write_comparison(result, out)
    if as_json:
        rows = json.loads(result.summary().to_json(orient="records") or "[]")
        print(json.dumps({"headline": result.headline(), "files": [str(file) for file in files], "summary": rows}))
        return
    show(result.summary().drop(columns="task").dropna(axis="columns", how="all"), repr(result))
    console.print(result.headline(), soft_wrap=True)
    console.print("written: " + ", ".join(str(file) for file in files), soft_wrap=True)


def _write_comparison(result: Any, out: Path) -> list[Path]:
    """The figure, every point of every curve, and the summary."""
    files = [out / name for name in ("sparsity.html", "sparsity.csv", "summary.csv")]
    result.plot().write_html(files[0], include_plotlyjs=True)
    result.to_dataframe().to_csv(files[1], index=False)
    result.summary().to_csv(files[2], index=False)
    return files


@app.command()
@guarded
def trace(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text whose next token is explained.")],
    out: Annotated[Path, typer.Option(help="Folder for the circuit, its page and its JSON.")],
    target: Annotated[
        str | None, typer.Option(help="A token as it follows the prompt; else the five likeliest.")
    ] = None,
    nodes: Annotated[str, typer.Option(help="share, mass, or how many neurons.")] = "share",
    share: Annotated[float, typer.Option(help="Least |score|, as a share of the target.")] = 0.005,
    backend: Backend = "auto",
    as_json: AsJson = False,
) -> None:
    """Trace a prompt to a circuit; write it, an interactive page and Neuronpedia's attribution graph."""
    from .circuits import trace as run

    choice = int(nodes) if nodes.isdigit() else nodes
    loaded = load_model(model, backend)
    circuit = run(loaded, prompt, target, nodes=choice, share=share, verbose=not as_json)  # pyright: ignore[reportArgumentType]
    files = [out / "circuit", out / "circuit.html", out / "neuronpedia.json"]
    circuit.save(files[0])
    circuit.to_html(files[1])
    circuit.to_neuronpedia(files[2])
    if as_json:
        rows = circuit.to_dataframe().head(20).to_json(orient="records")
        print(
            json.dumps(
                {"circuit": repr(circuit), "files": [str(file) for file in files], "nodes": json.loads(rows or "[]")}
            )
        )
        return
    columns = ["node", "kind", "token", "activation", "score", "share"]
    show(circuit.to_dataframe().head(20)[columns], repr(circuit))
    console.print("written: " + ", ".join(str(file) for file in files), soft_wrap=True)


def main() -> None:
    """Entry point of `tl-neuron-circuits`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    app()


if __name__ == "__main__":
    sys.exit(main())
