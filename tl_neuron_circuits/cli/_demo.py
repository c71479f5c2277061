"""`tl-neuron-circuits demo`."""

from pathlib import Path
from typing import Annotated

import typer

from ._inputs import AsJson, Backend, Seed
from ._terminal import console, print_json, say, show, show_written


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the figure and the tables.")] = Path("neuron_circuits_demo"),
    model: Annotated[str, typer.Option(help="demo-gelu or demo-swiglu.")] = "demo-gelu",
    backend: Backend = "auto",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Trace, test and show neuron circuits of a demo model: agreement, and Dallas -> Texas -> Austin."""
    from ..demo._run import run_demo

    result = run_demo(out, name=model, backend=backend, seed=seed, say=say)
    if as_json:
        print_json("demo", {"conservation": result.report.conservation, "table": result.table(), "files": result.files})
        return
    console.print(f"\n{result.report!r}\n", markup=False)
    columns = ["label", "layer", "unit", "position", "score"]
    show(result.agreement.top(10)[columns], "agreement: the neurons that support the right verb most")
    show(result.dallas.top(10)[columns], f"{result.dallas_pair.clean[0]} ->{result.dallas_pair.answer[0]}")
    wide = result.table().pivot_table(
        index=["task", "method"], columns="size", values=["faithfulness", "completeness"], sort=False
    )
    for measure, ideal in (("faithfulness", 1), ("completeness", 0)):
        show(wide[measure].reset_index(), f"{measure} of the best k neurons, held-out pairs (ideal: {ideal})")
    show_written(result.files)
