"""Greater-than and IOI on SmolLM2: `python -m tests.evidence.other_tasks`

Neurons, MLP outputs and head outputs by RelP, AtP on neurons. Names (IOI) and events (greater-than) of the evaluation
are not in the learning pairs; means come from the learning pairs.
"""

from typing import Any

import tl_neuron_circuits as tnc
from tests.evidence import cells

N = 24
SIZES = (1, 10, 30, 100, 300, 1000, 3000)
CURVES: tuple[tuple[str, str], ...] = (
    ("neurons", "relp"), ("mlp_outputs", "relp"), ("heads", "relp"), ("neurons", "gradient"), ("heads", "gradient"),
)  # fmt: skip
BASES: dict[str, Any] = {
    "neurons": tnc.bases.Neurons(), "mlp_outputs": tnc.bases.MLPOutputs(), "heads": tnc.bases.HeadOutputs(),
}  # fmt: skip


def drawn(model: Any, task: str) -> tuple[tnc.PromptPairs, tnc.PromptPairs, float]:
    """Learning pairs, evaluation pairs, and the share that the model gets right."""
    make = {"ioi": tnc.tasks.ioi, "greater_than": tnc.tasks.greater_than}[task]
    pairs = make(4 * N, model=model, prepend_bos=False)
    right = pairs.where_model_is_right(model)
    share = right.selection.share if right.selection is not None else 1.0
    learning, evaluation = right.split(0.5, by="label")
    return learning[:N], evaluation[:N], share


def run(model: Any, kept: cells.Cells, tasks: list[str]) -> None:
    """Every cell."""
    for task in tasks:
        learning, evaluation, share = drawn(model, task)
        kept.values(f"pairs-{task}", lambda share=share, one=learning, other=evaluation: {
            "share right": share, "learning": len(one), "evaluation": len(other),
            "labels shared": len(set(one.labels or ()) & set(other.labels or ())), "example": one.clean[0],
        })  # fmt: skip
        for basis, method in CURVES:
            scores = kept.scores(
                f"scores-{task}-{basis}-{method}",
                lambda basis=basis, method=method, pairs=learning: tnc.attribute(
                    model, pairs, method=method, basis=BASES[basis], batch_size=12
                ),
            )
            given: dict[str, Any] = {"reference": learning, "sizes": SIZES, "completeness": method == "relp"}
            kept.curve(f"{task}_{basis}_{method}", lambda scores=scores, pairs=evaluation, given=given: tnc.evaluate(
                model, pairs, scores, batch_size=12, **given))  # fmt: skip


def collect(kept: cells.Cells) -> dict[str, Any]:
    """Everything that the page shows, from the cells."""
    found: dict[str, Any] = {path.stem: kept.values(path.stem) for path in sorted(kept.folder.glob("*.json"))}
    names = [f"{task}_{basis}_{method}" for task in ("ioi", "greater_than") for basis, method in CURVES]
    made = {name: kept.curve(name) for name in names}
    return {**found, "curves": {name: cells.summary(curve) for name, curve in made.items() if curve is not None}}


def main() -> None:
    given = cells.options(__doc__)
    kept = cells.Cells(given.work / "other_tasks", run=not given.no_run)
    if kept.run:
        run(cells.load_model(), kept, given.only or ["ioi", "greater_than"])
    if given.update_docs:
        cells.write_results("other_tasks", collect(cells.Cells(kept.folder, run=False)))
        from tests.evidence.tables import in_short, other_tables

        cells.update_page(other_tables() | in_short())


if __name__ == "__main__":
    main()
