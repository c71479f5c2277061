"""`tl-neuron-circuits check`."""

import typer

from ._load import load_model
from ._options import AsJson, Backend, Device, Dtype, Model
from ._terminal import FAILED, console, print_json, say, show


def check(
    model: Model, backend: Backend = "auto", device: Device = None, dtype: Dtype = "float32", as_json: AsJson = False
) -> None:
    """Check whether relevance propagation holds on a model: sites, rules, conservation, memory.

    Exit code 1 where it does not.
    """
    from ..propagation._check_model import check_model

    loaded = load_model(model, backend, device, dtype)
    say("checking which sites fire, and that relevance is conserved")
    report = check_model(loaded)
    if as_json:
        content = {"ok": report.ok, "conservation": report.conservation, "problems": list(report.problems)}
        print_json({**content, "sites": list(report.sites)})
    else:
        console.print(repr(report), soft_wrap=True, markup=False)
        show(report.to_dataframe(), "sites")
        for problem in report.problems:
            console.print(f"problem: {problem}", soft_wrap=True, markup=False, style="red")
    if not report.ok:
        raise typer.Exit(FAILED)
