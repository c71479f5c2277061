"""`tl-neuron-circuits trace`."""

from pathlib import Path
from typing import Annotated

import typer

from ._load import load_model
from ._options import AsJson, Backend, Device, Dtype, Model
from ._terminal import print_json, progress, show, show_written


def trace(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text whose next token is explained.")],
    out: Annotated[Path, typer.Option(help="Folder for the circuit, its page and its JSON.")],
    target: Annotated[
        str | None, typer.Option(help="A token as it follows the prompt; else the five likeliest.")
    ] = None,
    nodes: Annotated[
        str, typer.Option(help="How many neurons; or 'share(0.005)', of the target; or 'mass(0.8)', of all |scores|.")
    ] = "share(0.005)",
    backend: Backend = "auto",
    device: Device = None,
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Trace a prompt to a circuit; write it, an interactive page and Neuronpedia's attribution graph."""
    from ..circuits._choose import parse_choice
    from ..circuits._trace import trace as run
    from ..explain._node_details import node_details

    choice = parse_choice(nodes)
    loaded = load_model(model, backend, device, dtype)
    circuit = run(loaded, prompt, target, nodes=choice, verbose=progress())
    files = [out / "circuit", out / "circuit.html", out / "neuronpedia.json"]
    circuit.save(files[0])
    circuit.to_html(files[1], details=node_details(loaded, circuit))
    circuit.to_neuronpedia(files[2])
    best = circuit.to_dataframe().head(20)
    if as_json:
        print_json({"circuit": repr(circuit), "files": files, "nodes": best})
        return
    show(best[["node", "kind", "token", "activation", "score", "share"]], repr(circuit))
    show_written(files)
