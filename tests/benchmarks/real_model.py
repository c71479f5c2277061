"""What each step costs on a real language model, beside its own forward and backward in the same run.

    python -m tests.benchmarks.real_model [--update-docs] [--rounds 1] [--only trace]

CPU seconds of one thread (a busy machine slows work and reference alike), each work followed by its reference, medians
over the rounds after one that warms up; long rows run once. Peaks are resident memory above what was resident before
(`VmHWM`). The model is that of `python -m tests.smollm2`.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import tl_neuron_circuits as tnc
from tests.benchmarks.__main__ import machine
from tests.benchmarks.relp_cost import _status
from tests.smollm2 import LABEL, prepared
from tl_neuron_circuits.tasks import tokenize
from tl_neuron_circuits.tasks._tokenized import Batch

DOCS = Path(__file__).parents[2] / "docs"
JSON, PAGE = DOCS / "real-model-cost.json", DOCS / "how-to" / "large-models.md"
BEGIN, END = "<!-- written by tests.benchmarks.real_model -->", "<!-- to here -->"
CAPITAL = "The capital of the state containing Dallas is"
Work = Callable[[], object]


class Row(NamedTuple):
    """A work, the batch whose forward and whose forward + backward it stands beside, and what bounds it."""

    work: str
    run: Work
    batch: Batch
    bound: str = ""
    rounds: int | None = None


def rows(model: Any) -> dict[str, Row]:
    """Every row, by a short name."""
    pairs = tnc.tasks.subject_verb_agreement("nounpp", n=32, model=model)
    shots = tnc.tasks.capitals(16, model=model, shots=4)
    one = tnc.TokenizedPairs.from_tokens(model.to_tokens(CAPITAL), torch.tensor([0]))
    (agreement,), (few_shot,), (prompt,) = (tuple(tokenize(model, part).batches(64)) for part in (pairs, shots, one))
    scores, of_shots = tnc.attribute(model, pairs), tnc.attribute(model, shots, batch_size=16)
    circuits = {n: tnc.trace(model, CAPITAL, nodes=n) for n in (100, 300)}
    nodes = circuits[100].nodes.query("kind == 'neuron'")["node"].tolist()
    page = Path(tempfile.mkdtemp()) / "circuit.html"

    def traced(n: int) -> Work:
        return lambda: tnc.trace(model, CAPITAL, nodes=n)

    def written() -> None:
        circuits[300].to_html(page, details=tnc.node_details(model, circuits[300], pairs.clean))

    size = f"{len(agreement)} pairs of {agreement.clean.shape[1]} tokens"
    shot = f"{len(few_shot)} pairs of {few_shot.clean.shape[1]} tokens"
    length = f"{prompt.clean.shape[1]} tokens"
    return {
        "attribute": Row(f"`attribute`, RelP, {size}", lambda: tnc.attribute(model, pairs), agreement, "f + fb"),
        "curve": Row(
            f"`evaluate`, 20 sizes, with completeness, {size}",
            lambda: tnc.evaluate(model, pairs, scores), agreement, "41 f", 0,
        ),
        "few_shot": Row(
            f"the same, few-shot capitals, {shot}, of which all but the last few are shared",
            lambda: tnc.evaluate(model, shots, of_shots), few_shot, "a third of 41 f", 0,
        ),
        "trace100": Row(f"`trace`, 100 nodes, one prompt of {length}", traced(100), prompt),
        "trace300": Row(f"`trace`, 300 nodes, one prompt of {length}", traced(300), prompt),
        "trace1000": Row(f"`trace`, 1,000 nodes, one prompt of {length}", traced(1000), prompt, "", 0),
        "page": Row("`node_details` over 32 prompts and `to_html`, 300 nodes", written, agreement),
        "html": Row("`to_html` alone, 300 nodes", lambda: circuits[300].to_html(page), prompt),
        "steer": Row(
            f"`steer`, {len(nodes)} neurons, one prompt of {length}",
            lambda: tnc.steer(model, CAPITAL, nodes, scale=0), prompt, "2 f",
        ),
        "sweep": Row(
            f"`sweep`, 7 scales, {len(nodes)} neurons", lambda: tnc.sweep(model, CAPITAL, nodes), prompt, "8 f"
        ),
    }  # fmt: skip


def forward(model: Any, batch: Batch) -> Work:
    """All logits, as a user gets them."""

    def run() -> None:
        with torch.no_grad():
            model(batch.clean)

    return run


def forward_and_backward(model: Any, batch: Batch) -> Work:
    """Gradients of a logit difference at the neurons of all layers, without the package."""
    posts = [f"blocks.{layer}.mlp.hook_post" for layer in range(model.cfg.n_layers)]

    def run() -> None:
        store: list[torch.Tensor] = []
        hooks: list[Any] = [(name, lambda value, hook: store.append(value)) for name in posts]
        with model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: value.requires_grad_(True)), *hooks]):
            logits = model(batch.clean)
        torch.autograd.grad((logits[:, -1, 3] - logits[:, -1, 5]).sum(), store)

    return run


def run_once(work: Work) -> tuple[float, float]:
    """CPU seconds, and megabytes of resident memory above what there was; freed blocks go back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _status("VmRSS"), time.process_time()
    work()
    return time.process_time() - start, (_status("VmHWM") - before) / 1024


def measure(model: Any, row: Row, rounds: int) -> dict[str, Any]:
    """Seconds and peaks of the row's work, and of its references."""
    sides = {"work": row.run, "forward": forward(model, row.batch), "both": forward_and_backward(model, row.batch)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    megabytes: dict[str, float] = {}
    for number in range(rounds + 1):
        for name, run in sides.items():
            took, peak = run_once(run)
            if number or not rounds:  # else it warms up
                seconds[name].append(took)
            megabytes[name] = peak
    found = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "work": row.work, "bound": row.bound, "seconds": found["work"], "forward": found["forward"],
        "both": found["both"], "mb": megabytes,
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The table, as it stands in the docs."""
    lines = [
        "| step | CPU s | in forwards | in forwards + backwards | bound | peak, MB | of forward + backward's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"].values():
        mb = row["mb"]
        numbers = (f"{row['seconds'] / row[side]:.3g}" for side in ("forward", "both"))
        share = f"{mb['work'] / mb['both']:.2g}" if mb["both"] > 1 else ""
        lines.append(
            f"| {row['work']} | {row['seconds']:.3g} | {' | '.join(numbers)} | {row['bound']} | {mb['work']:.0f} | "
            f"{share} |"
        )
    return "\n".join(lines)


def write_docs(results: dict[str, Any]) -> None:
    """The JSON, and the table between its marks."""
    JSON.write_text(json.dumps(results, indent=1) + os.linesep)
    before, rest = PAGE.read_text().split(BEGIN)
    m = results["machine"]
    said = (
        f"{m['cpu']}, one thread, torch {m['torch']}, TransformerLens {m['transformer-lens']}, {m['date']}; "
        f"{results['model']}, on TransformerBridge."
    )
    PAGE.write_text(f"{before}{BEGIN}\n{said}\n\n{table(results)}\n{END}{rest.split(END)[1]}")


def main() -> None:
    """Measure, print, and with `--update-docs` write the JSON and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--update-docs", action="store_true")
    options = parser.parse_args()
    folder = prepared()
    if folder is None:
        raise SystemExit("SmolLM2 is not on this machine: python -m tests.smollm2 fetches it.")
    torch.set_num_threads(1)
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(str(folder), device="cpu")
    for parameter in torch.nn.Module.parameters(model):
        parameter.requires_grad_(False)
    chosen = {name: row for name, row in rows(model).items() if not options.only or name in options.only}
    found = {}
    for name, row in chosen.items():
        found[name] = measure(model, row, options.rounds if row.rounds is None else row.rounds)
        print(json.dumps({name: found[name]}), flush=True)
    results = {"model": LABEL, "machine": machine(1), "rows": found}
    print(table(results))
    if options.update_docs:
        write_docs(results)


if __name__ == "__main__":
    main()
