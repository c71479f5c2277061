"""`tl-neuron-circuits attribute`."""

from pathlib import Path
from typing import Annotated

import typer

from ._load import load_model
from ._options import AsJson, Backend, BatchSize, Device, Dtype, Model, PairsFile
from ._terminal import print_json, progress, show, show_written


def attribute(
    model: Model,
    pairs: PairsFile,
    method: Annotated[str, typer.Option(help="relp, gradient, integrated_gradients, patching, ...")] = "relp",
    basis: Annotated[str, typer.Option(help="neurons, mlp_outputs, head_outputs or residual_stream.")] = "neurons",
    positions: Annotated[str, typer.Option(help="keep or sum.")] = "keep",
    multi_token: Annotated[str, typer.Option(help="error or first_difference.")] = "error",
    batch_size: BatchSize = 32,
    top: Annotated[int, typer.Option(help="How many nodes to show.", min=1)] = 20,
    out: Annotated[Path | None, typer.Option(help="Save all scores to this folder.")] = None,
    backend: Backend = "auto",
    device: Device = None,
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Score every node of a basis by its effect on the logit difference, on pairs from a file."""
    from .._errors import SettingsError
    from .._processes import here
    from ..bases._activations import ACTIVATION_BASES
    from ..nodes._attribute import attribute as score
    from ..tasks._pairs import PromptPairs
    from ..tasks._tokenize import tokenize

    if basis not in ACTIVATION_BASES:
        raise SettingsError(f"expected --basis out of {', '.join(ACTIVATION_BASES)}; got {basis!r}.")
    read = PromptPairs.from_jsonl(pairs)
    processes = here()  # under `accelerate launch` before the model is loaded: it chooses this process' GPU
    loaded = load_model(model, backend, device, dtype)
    scores = score(
        loaded,
        tokenize(loaded, read, multi_token=multi_token),  # pyright: ignore[reportArgumentType]
        method=method,
        basis=ACTIVATION_BASES[basis](),
        positions=positions,  # pyright: ignore[reportArgumentType]
        batch_size=batch_size,
        verbose=progress(),
    )
    if not processes.first:
        return
    if out is not None:
        scores.save(out)
    if as_json:
        print_json(scores.top(top))
        return
    show(scores.top(top).drop(columns="hook"), repr(scores))
    if out is not None:
        show_written([out])
