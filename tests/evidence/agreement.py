"""Agreement on SmolLM2: are neurons a sparse basis, and is RelP a good ranking? `python -m tests.evidence.agreement`

Declared before the run. Primary endpoint: E = mean over log size, 1 to 10,000 nodes, of min(1, |1 - faithfulness|),
averaged over the four structures, for neurons minus MLP outputs, both by RelP (four rules, |score|), under mean
ablation, without BOS, on evaluation pairs that the model gets right in both directions. "Neurons are the sparser basis"
is claimed only if the whole 95 % interval, paired, over couples of nouns, lies below 0. Secondary, the same way: RelP
minus AtP on neurons, by |score| and by score; neurons minus randomly rotated neurons. All else is description.

Means come from the learning pairs: 200, or as many as there are, against 60 for evaluation. All pairs are
repeated for neurons, interchange and BOS for MLP outputs too. Integrated gradients one site at a time cost 30 x 5
backward passes, so they see 16 learning pairs, beside RelP on the same 16.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import tl_neuron_circuits as tnc
from tests.evidence import cells, splits
from tests.evidence.controls import mean_difference_basis, pca_basis, rotated_basis

N_LEARNING, N_EVALUATION = 200, 60
N_IG, STEPS = 16, 5
SIZES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
THREE_RULES = tnc.RelP(rules=("ln", "identity", "half"))
METHODS: dict[str, Any] = {
    "relp": "relp", "relp3": THREE_RULES, "atp": "gradient",
    "ig": tnc.IntegratedGradients(steps=STEPS), "ig_inputs": tnc.IntegratedGradientsInputs(steps=STEPS),
    "difference": "activation_difference", "random": "random",
}  # fmt: skip
BASES: dict[str, Any] = {
    "neurons": tnc.bases.Neurons(), "mlp_outputs": tnc.bases.MLPOutputs(), "heads": tnc.bases.HeadOutputs(),
    "residual": tnc.bases.ResidualStream(),
}  # fmt: skip
ORDER: tuple[tuple[str, str, str, bool], ...] = (
    # basis, method, ranking, with completeness; the first ones first, for a run that is stopped
    ("neurons", "relp", "abs", True), ("mlp_outputs", "relp", "abs", True),
    ("neurons", "atp", "abs", True), ("neurons", "relp", "signed", True),
    ("rotated", "relp", "abs", True), ("neurons", "atp", "signed", False),
    ("neurons", "random", "abs", False), ("neurons", "difference", "abs", False),
    ("heads", "relp", "abs", False), ("mean_difference", "relp", "abs", False),
    ("residual", "relp", "abs", False), ("neurons", "relp3", "abs", False),
    ("neurons", "ig_inputs", "abs", False), ("pca", "relp", "abs", False),
    ("mlp_outputs", "relp", "signed", False),
    ("neurons", "ig", "abs", False), ("neurons", "relp_few", "abs", False),
)  # fmt: skip
ERROR_NODES: dict[str, Any] = {"mean_difference": "ablate", "rotated": "keep", "pca": "keep"}
EXTRA = ("corrupt", "all", "bos")
"""For neurons by RelP: interchange instead of means, all pairs, and with BOS (there for MLP outputs too)."""


def pairs_of(model: Any, name: splits.Structure, kept: cells.Cells, *, bos: bool = False) -> dict[str, tnc.PromptPairs]:
    """Learning and evaluation pairs that the model gets right, and "all" evaluation pairs."""
    sizes: Any = {"learning": N_LEARNING, "evaluation": N_EVALUATION, "development": 8}
    drawn: dict[str, splits.AgreementSplit] = {}

    def draw() -> splits.AgreementSplit:
        if not drawn:
            drawn[name] = splits.agreement(model, name, prepend_bos=bos, sizes=sizes)
        return drawn[name]

    made: dict[str, Callable[[], tnc.PromptPairs]] = {
        "learning": lambda: draw().right["learning"], "evaluation": lambda: draw().right["evaluation"],
        "all": lambda: draw().evaluation,
    }  # fmt: skip
    if bos:
        return {part: make() for part, make in made.items()}
    return {part: kept.pairs(f"pairs-{name}-{part}", make) for part, make in made.items()}


class Structure:
    """One structure's pairs, scores and curves."""

    def __init__(self, model: Any, name: splits.Structure, kept: cells.Cells, *, bos: bool = False) -> None:
        self.model, self.name, self.kept = model, name, kept
        self.parts = pairs_of(model, name, kept, bos=bos)
        self.learning = self.parts["learning"]
        self.suffix = "-bos" if bos else ""
        self._scored: dict[tuple[str, str], tnc.NodeScores] = {}

    def basis(self, name: str) -> Any:
        """A basis by name; those that are computed come from the learning pairs."""
        made: dict[str, Callable[[], Any]] = {
            "rotated": lambda: rotated_basis(self.model),
            "pca": lambda: pca_basis(self.model, self.learning),
            "mean_difference": lambda: mean_difference_basis(self.model, self.learning),
        }
        return BASES[name] if name in BASES else made[name]()

    def scores(self, basis: str, method: str) -> tnc.NodeScores:
        """Scores from the learning pairs, kept while this structure is at work."""
        if (basis, method) not in self._scored:
            few = method in ("ig", "relp_few")
            pairs = self.learning[:N_IG] if few else self.learning
            how = METHODS.get(method, "relp")
            make = lambda: tnc.attribute(self.model, pairs, method=how, basis=self.basis(basis))  # noqa: E731
            name = f"scores-{self.name}-{basis}-{method}{self.suffix}"
            self._scored[basis, method] = self.kept.scores(name, make) if basis in BASES else make()
        return self._scored[basis, method]

    def curve(self, basis: str, method: str, ranking: Any, complete: bool, kind: str = "") -> Any:
        """One curve; `kind` is one of `EXTRA` or empty."""
        evaluation = self.parts["all" if kind == "all" else "evaluation"]

        def make() -> tnc.SparsityCurve:
            scores = self.scores(basis, method)
            scalar = sum(values.numel() for values in scores.values.values())  # errors are kept or ablated here
            sizes = [size for size in SIZES if size <= scalar]
            return tnc.evaluate(
                self.model, evaluation, scores, sizes=sizes, ranking=ranking, completeness=complete,
                ablation="corrupt" if kind == "corrupt" else "mean",
                reference=None if kind == "corrupt" else self.learning,
                error_nodes=ERROR_NODES.get(basis, "rank"),
            )  # fmt: skip

        return self.kept.curve("_".join(filter(None, (self.name, basis, method, ranking, kind))), make)


def run(model: Any, kept: cells.Cells, names: Sequence[splits.Structure]) -> None:
    """Every cell; the most important ones of all structures first."""
    structures = [Structure(model, name, kept) for name in names]
    for start, stop in ((0, 5), (5, 10), (10, 15)):
        for structure in structures:
            for basis, method, ranking, complete in ORDER[start:stop]:
                structure.curve(basis, method, ranking, complete)
        if start == 0:
            for structure in structures:
                for basis in ("neurons", "mlp_outputs"):
                    structure.curve(basis, "relp", "abs", True, "corrupt")
    for structure in structures:
        structure.curve("neurons", "relp", "abs", True, "all")
    for name in names:
        with_bos = Structure(model, name, kept, bos=True)
        for basis in ("neurons", "mlp_outputs"):
            with_bos.curve(basis, "relp", "abs", False, "bos")
    for structure in structures:
        for basis, method, ranking, complete in ORDER[15:]:
            structure.curve(basis, method, ranking, complete)


def live_nodes(kept: cells.Cells, name: str, basis: str = "neurons") -> dict[str, Any]:
    """How many nodes have a score at all, and how many neurons the best nodes are."""
    scores = kept.scores(f"scores-{name}-{basis}-relp")
    live = int((scores.flat() != 0).sum())
    unique = {k: len(scores.top(k)[["layer", "unit"]].drop_duplicates()) for k in (30, 100, 300, 1000)}
    count = lambda column: Counter(sorted(scores.top(100)[column].tolist()))  # noqa: E731
    layers, at = count("layer"), count("position")
    return {
        "nodes": len(scores), "live": live, "unique": unique,
        "layers of the best 100": {int(k): int(v) for k, v in layers.items()},
        "positions of the best 100": {int(k): int(v) for k, v in at.items()},
    }  # fmt: skip


def couples(kept: cells.Cells) -> dict[str, str]:
    """Each evaluation noun's couple, the same in all structures."""
    curve = kept.curve("nounpp_neurons_relp_abs")
    assert curve is not None and curve.groups is not None
    found = {word: label for label in curve.groups for word in label.split(" and ")}
    for name in ("rc", "within_rc"):
        other = kept.curve(f"{name}_neurons_relp_abs")
        if other is not None and other.groups is not None:
            found |= {word: label for label in other.groups for word in label.split(" and ")}
    return found


def contrast(kept: cells.Cells, one: str, other: str, n: int = 2000) -> dict[str, Any] | None:
    """The endpoint of one curve minus another's: per structure and over them, with intervals over couples.

    Structures that lack a curve are left out; the four share the draws of couples.
    """
    couple = couples(kept)
    per: dict[str, Any] = {}
    drawn = []
    for structure in splits.STRUCTURES:
        first, second = (kept.curve(f"{structure}_{which}") for which in (one, other))
        if first is None or second is None or first.groups is None:
            continue
        words = [couple.get(word, word) for word in (group.split(" and ")[0] for group in first.groups)]
        among = sorted({*couple.values(), *words})
        found = first.contrast(second, largest=cells.LARGEST, clusters=words, among=among, draws=n)
        drawn.append(found.attrs["draws"])
        per[structure] = {"difference": found["difference"], "interval": [found["low"], found["high"]]}
    if not per:
        return None
    mean = float(np.mean([row["difference"] for row in per.values()]))
    return {"structures": per, "mean": mean, "interval": cells.interval(np.mean(drawn, axis=0))}


CONTRASTS = (
    ("neurons_relp_abs", "mlp_outputs_relp_abs"),
    ("neurons_relp_abs", "rotated_relp_abs"),
    ("neurons_relp_abs", "neurons_atp_abs"),
    ("neurons_relp_signed", "neurons_atp_signed"),
    ("neurons_relp_signed", "neurons_relp_abs"),
    ("neurons_relp_abs", "neurons_relp3_abs"),
    ("neurons_relp_abs", "neurons_ig_inputs_abs"),
    ("neurons_relp_abs", "pca_relp_abs"),
    ("neurons_relp_abs", "heads_relp_abs"),
    ("neurons_relp_few_abs", "neurons_ig_abs"),
)


def contrasts(kept: cells.Cells) -> dict[str, Any]:
    """Those that the cells allow."""
    found = {f"{one} minus {other}": contrast(kept, one, other) for one, other in CONTRASTS}
    return {name: row for name, row in found.items() if row is not None}


def n_pairs(kept: cells.Cells) -> dict[str, list[int]]:
    """Learning and evaluation pairs, by structure."""
    files = {name: [kept.folder / f"pairs-{name}-{part}.jsonl" for part in ("learning", "evaluation")]
             for name in splits.STRUCTURES}  # fmt: skip
    return {name: [len(file.read_text().splitlines()) for file in both] for name, both in files.items()
            if all(file.exists() for file in both)}  # fmt: skip


def curves(kept: cells.Cells) -> dict[str, Any]:
    """Every curve that is there."""
    wanted = [(basis, method, ranking, "") for basis, method, ranking, _ in ORDER]
    wanted += [(basis, "relp", "abs", kind) for basis in ("neurons", "mlp_outputs") for kind in EXTRA]
    names = ["_".join(filter(None, (structure, *parts))) for structure in splits.STRUCTURES for parts in wanted]
    made = {name: kept.curve(name) for name in names}
    return {name: cells.summary(curve) for name, curve in made.items() if curve is not None}


def collect(kept: cells.Cells) -> dict[str, Any]:
    """Everything that the page shows, from the cells."""
    found = curves(kept)
    return {
        "settings": {"pairs": n_pairs(kept), "ig pairs": N_IG, "ig steps": STEPS},
        "curves": found,
        "live": {name: live_nodes(kept, name) for name in splits.STRUCTURES if f"{name}_neurons_relp_abs" in found},
        "contrasts": contrasts(kept),
    }  # fmt: skip


def main() -> None:
    given = cells.options(__doc__)
    kept = cells.Cells(given.work / "agreement", run=not given.no_run)
    if kept.run:
        run(cells.load_model(), kept, [name for name in splits.STRUCTURES if not given.only or name in given.only])
    if given.update_docs:
        cells.write_results("agreement", collect(cells.Cells(kept.folder, run=False)))
        from tests.evidence.tables import agreement_tables, in_short

        cells.update_page(agreement_tables() | in_short())


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
