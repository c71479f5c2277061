"""`tl-neuron-circuits export`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ._options import AsJson
from ._saved import load_saved
from ._terminal import print_json, show_written

FORMATS = {".html": "html", ".json": "neuronpedia", ".csv": "csv"}


def export(
    saved: Annotated[Path, typer.Argument(help="Folder that trace, lasso or attribute wrote.", metavar="SAVED")],
    out: Annotated[Path, typer.Option(help="File to write: .html, .json (Neuronpedia) or .csv.")],
    form: Annotated[str | None, typer.Option("--format", help="html, neuronpedia or csv; else by the name.")] = None,
    top: Annotated[int | None, typer.Option(help="Scores: only the best so many.", min=1)] = None,
    slug: Annotated[str | None, typer.Option(help="Neuronpedia: name of the graph; else from the prompt.")] = None,
    scan: Annotated[str | None, typer.Option(help="Neuronpedia: name of the model there; else its own.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a saved circuit or saved scores as a page, as Neuronpedia's attribution graph or as CSV.

    A circuit's CSV is its nodes; its edges go to a second file, NAME_edges.csv.
    """
    from .._errors import SettingsError
    from ..circuits._circuit import Circuit

    chosen = form or FORMATS.get(out.suffix.lower(), f"the name {out.name!r}")
    if chosen not in FORMATS.values():
        endings = ", ".join(FORMATS)
        raise SettingsError(
            f"expected --format html, neuronpedia or csv, or a name that ends in {endings}; got {chosen}."
        )
    result = load_saved(saved)
    out.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(result, Circuit):
        files = _circuit(result, out, chosen, slug, scan)
    else:
        files = _scores(result, out, chosen, top)
    if as_json:
        print_json({"saved": repr(result), "format": chosen, "files": files})
        return
    show_written(files)


def _circuit(circuit: Any, out: Path, form: str, slug: str | None, scan: str | None) -> list[Path]:
    if form == "html":
        circuit.to_html(out)
    elif form == "neuronpedia":
        circuit.to_neuronpedia(out, slug=slug, scan=scan)
    else:
        edges = out.with_name(f"{out.stem}_edges{out.suffix}")
        circuit.to_dataframe().to_csv(out, index=False)
        circuit.edges.to_csv(edges, index=False)
        return [out, edges]
    return [out]


def _scores(scores: Any, out: Path, form: str, top: int | None) -> list[Path]:
    from .._errors import SettingsError
    from .._html import document

    if form == "neuronpedia":
        raise SettingsError(f"expected a circuit for an attribution graph; got {scores!r}. Run trace for edges.")
    if form == "csv":
        (scores.to_dataframe() if top is None else scores.top(top)).to_csv(out, index=False)
    else:
        out.write_text(document(repr(scores), scores.to_html(top or 200)), encoding="utf-8")
    return [out]
