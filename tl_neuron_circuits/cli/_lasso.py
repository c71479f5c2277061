"""`tl-neuron-circuits lasso`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ._load import load_model
from ._options import AsJson, Backend, BatchSize, Device, Dtype, Model, Seed
from ._terminal import print_json, progress, show, show_written


def lasso(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for edges.csv, the circuit and its page.")],
    pairs: Annotated[Path | None, typer.Option(help="JSON lines as in attribute; clean prompts are observed.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Or a text file, one prompt a line.")] = None,
    n_edges: Annotated[int | None, typer.Option(help="At most so many edges; 40 unless --share.", min=1)] = None,
    share: Annotated[float | None, typer.Option(help="Penalty as a share of the one that leaves no edge.")] = None,
    attention: Annotated[str, typer.Option(help="Components: heads or layers.")] = "heads",
    mlp: Annotated[str, typer.Option(help="Components: outputs of MLPs, or their neurons.")] = "outputs",
    regressors: Annotated[str, typer.Option(help="same, pooled or earlier positions.")] = "pooled",
    bootstrap: Annotated[int, typer.Option(help="Resamples for the stability of edges.", min=0)] = 0,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    backend: Backend = "auto",
    device: Device = None,
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Find a circuit by regressing each component on those before it: CircuitLasso, one forward pass a prompt.

    Give --pairs or --prompts. An edge says what predicts what; it is no causal effect.
    """
    from .._errors import SettingsError
    from ..lasso._circuit_lasso import CircuitLasso, Components, MostEdges, Share

    inputs = read_inputs(pairs, prompts)
    if n_edges is not None and share is not None:
        raise SettingsError("expected at most one of --n-edges and --share; got both.")
    method = CircuitLasso(
        penalty=MostEdges(n_edges or 40) if share is None else Share(share),
        nodes=Components(attention, mlp),  # pyright: ignore[reportArgumentType]
        regressors=regressors,  # pyright: ignore[reportArgumentType]
        bootstrap=bootstrap,
        seed=seed,
    )
    loaded = load_model(model, backend, device, dtype)
    found = method.fit(loaded, inputs, batch_size=batch_size, verbose=progress())
    files = [out / "edges.csv", out / "circuit", out / "circuit.html"]
    circuit = found.to_circuit()
    circuit.save(files[1])
    circuit.to_html(files[2])
    found.edges.to_csv(files[0], index=False)
    if as_json:
        print_json({"circuit": repr(found), "files": files, "edges": found.edges})
        return
    show(found.edges.head(20).dropna(axis="columns", how="all"), repr(found))
    show_written(files)


def read_inputs(pairs: Path | None, prompts: Path | None) -> Any:
    """Pairs, or the lines of a text file that are not blank."""
    from .._errors import PairsError, SettingsError
    from ..tasks._pairs import PromptPairs

    if (pairs is None) == (prompts is None):
        raise SettingsError(f"expected either --pairs or --prompts; got {'neither' if pairs is None else 'both'}.")
    if pairs is not None:
        return PromptPairs.from_jsonl(pairs)
    assert prompts is not None
    try:
        lines = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise PairsError(f"expected text in UTF-8, one prompt a line, in {prompts}; got {error}.") from error
    if not lines:
        raise PairsError(f"expected text, one prompt a line, in {prompts}; it is empty.")
    return lines
