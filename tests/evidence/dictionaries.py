"""Neurons against dictionaries at equal layers, on SmolLM2: `python -m tests.evidence.dictionaries`

Four layers, those whose neurons' scores sum to the most by RelP on the learning pairs (|sum|, mean over structures).
SAEs and transcoders are trained by the package on these layers, from zero, on real English: `pydoc_data.topics`, the
language reference that comes with Python, 64 tokens a row, each token once; a quarter, a half and all of it. The last
rows are held out for fidelity. The layers' neurons and MLP outputs stand beside them, on the same pairs.

Only these layers are ablated, the rest of the model is intact. Where the effect that curves divide by is below a tenth
of clean minus corrupt no ratio may be given; the page has F(C) - F(0) in logits anyway.
"""

import time
from collections.abc import Sequence
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor

import tl_neuron_circuits as tnc
from tests.evidence import cells, splits
from tl_neuron_circuits import transcoders

N_LEARNING, N_EVALUATION = 32, 24
STRUCTURES = splits.STRUCTURES
SIZES = (1, 3, 10, 30, 100, 300, 1000, 3000)
N_LAYERS, WIDTH, ACTIVE = 4, 4, 32
N_TOKENS, ROW, N_HELD_OUT = 65_536, 64, 16
BATCH = 128
SHARES = {"quarter": 4, "half": 2, "all": 1}
KINDS = ("sae", "transcoder")
ERRORS = ("rank", "keep", "ablate")


def text_rows(model: Any) -> Tensor:
    """Rows of `ROW` tokens of Python's language reference, in a fixed random order."""
    text = "\n\n".join(text for _, text in sorted(topics.topics.items()))
    tokens = model.tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    rows = tokens[: len(tokens) // ROW * ROW].reshape(-1, ROW)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def best_layers(model: Any, drawn: dict[str, tnc.PromptPairs]) -> dict[str, Any]:
    """The layers whose scores sum to the most, and every layer's sum as a share of the metric."""
    totals = torch.zeros(model.cfg.n_layers)
    for pairs in drawn.values():
        scores = tnc.attribute(model, pairs)
        totals += torch.stack([values.sum() for values in scores.values.values()]).abs() / len(drawn)
    layers = sorted(totals.topk(N_LAYERS).indices.tolist())
    return {"layers": layers, "mass": [round(float(value), 3) for value in totals]}


def trained(model: Any, kept: cells.Cells, kind: str, share: str, layers: Sequence[int]) -> tnc.bases.Dictionaries:
    """The dictionaries of one kind, trained on a share of the tokens."""
    folder = kept.folder / f"trained-{kind}-{share}"
    n = N_TOKENS // SHARES[share]
    if not folder.exists():
        config = transcoders.TrainingConfig(
            target=kind, layers=tuple(layers), d_dict=WIDTH * model.cfg.d_model, k=ACTIVE, steps=n // BATCH,  # pyright: ignore[reportArgumentType]
            batch_size=BATCH, buffer_size=32 * BATCH, forward_rows=16, log_every=max(1, n // BATCH // 8),
            dead_after=n // 8, learning_rate=1e-3,
        )  # fmt: skip
        start = time.process_time()
        rows = text_rows(model)[N_HELD_OUT : N_HELD_OUT + n // ROW + 1]
        report = transcoders.train(model, rows, config, verbose=False)
        report.save(folder)
        kept.values(f"training-{kind}-{share}", lambda: {
            "tokens": report.positions, "seconds": dict(report.seconds), "cpu": time.process_time() - start,
            "history": report.to_dataframe().groupby("layer").last().reset_index().to_dict("records"),
        })  # fmt: skip
    made = [tnc.load_dictionary(folder / f"layer-{layer:02d}") for layer in layers]
    return tnc.bases.Dictionaries(made, name=kind)


def curves_of(model: Any, kept: cells.Cells, drawn: dict[str, splits.AgreementSplit], layers: Sequence[int],
              names: Sequence[tuple[str, str]]) -> None:  # fmt: skip
    """Curves of some bases, named (basis, share)."""
    for basis_name, share in names:
        basis = (
            trained(model, kept, basis_name, share, layers) if basis_name in KINDS
            else {"neurons": tnc.bases.Neurons, "mlp_outputs": tnc.bases.MLPOutputs}[basis_name](layers=tuple(layers))
        )  # fmt: skip
        errors = ("rank",) if basis_name not in KINDS or share != "all" else ERRORS
        for structure, split in drawn.items():
            pairs, means = split.right["evaluation"], split.right["learning"]
            scores = None
            for error_nodes in errors:
                name = "_".join((structure, basis_name, share, error_nodes))
                if (kept.folder / name).exists():
                    continue
                if scores is None:
                    scores = tnc.attribute(model, split.right["learning"], basis=basis)
                found = scores
                given: dict[str, Any] = {"reference": means, "sizes": SIZES, "completeness": False}
                given |= {"error_nodes": error_nodes, "basis": basis}
                kept.curve(name, lambda found=found, pairs=pairs, given=given: tnc.evaluate(
                    model, pairs, found, **given))  # fmt: skip
                best = found.top(100)
                kept.values(f"errors-{name}", lambda best=best: {
                    "errors among the best 10": int((best["kind"][:10] == "error").sum()),
                    "errors among the best 100": int((best["kind"] == "error").sum()),
                })  # fmt: skip


def fidelity_of(model: Any, kept: cells.Cells, layers: Sequence[int]) -> None:
    """Loss recovered on held-out text, for all shares."""
    held_out = text_rows(model)[:N_HELD_OUT]
    for kind in KINDS:
        for share in SHARES:
            basis = trained(model, kept, kind, share, layers)
            kept.values(f"fidelity-{kind}-{share}", lambda basis=basis: transcoders.fidelity(
                model, list(basis.dictionaries), held_out, baselines=False,
            ).to_dataframe().astype({"layer": str}).to_dict("records"))  # fmt: skip


def run(model: Any, kept: cells.Cells) -> None:
    """Every cell, the full training first."""
    sizes: Any = {"learning": N_LEARNING, "evaluation": N_EVALUATION, "development": 8}
    drawn = {name: splits.agreement(model, name, sizes=sizes) for name in STRUCTURES}
    learning = {name: split.right["learning"] for name, split in drawn.items()}
    layers = kept.values("layers", lambda: best_layers(model, learning))["layers"]
    curves_of(model, kept, drawn, layers, [("neurons", "all"), ("mlp_outputs", "all")])
    curves_of(model, kept, drawn, layers, [(kind, "all") for kind in KINDS])
    curves_of(model, kept, drawn, layers, [(kind, share) for share in ("quarter", "half") for kind in KINDS])
    fidelity_of(model, kept, layers)


def collect(kept: cells.Cells) -> dict[str, Any]:
    """Everything that the page shows, from the cells."""
    found: dict[str, Any] = {"settings": {
        "learning pairs": N_LEARNING, "evaluation pairs": N_EVALUATION, "width": WIDTH, "active": ACTIVE,
        "tokens": N_TOKENS, "held out": N_HELD_OUT * ROW,
    }, "curves": {}}  # fmt: skip
    for path in sorted(kept.folder.glob("*.json")):
        found[path.stem] = kept.values(path.stem, dict)
    for path in sorted(kept.folder.iterdir()):
        if path.is_dir() and path.name.split("_")[0] in ("simple", "nounpp", "rc", "within"):
            curve = kept.curve(path.name)
            assert curve is not None
            lift = (curve.kept - curve.empty).double().mean(1)
            found["curves"][path.name] = cells.summary(curve) | {
                "lift": [round(float(value), 4) for value in lift],
                "unexplained": dict(curve.settings.get("variance_unexplained", {})),
            }
    return found


def main() -> None:
    given = cells.options(__doc__)
    kept = cells.Cells(given.work / "dictionaries", run=not given.no_run)
    if kept.run:
        run(cells.load_model(), kept)
    if given.update_docs:
        cells.write_results("dictionaries", collect(kept))
        from tests.evidence.tables import dictionary_tables, in_short

        cells.update_page(dictionary_tables() | in_short())


if __name__ == "__main__":
    main()
