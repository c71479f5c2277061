"""Check a demo model, attribute agreement and the Dallas prompt to neurons, and test the neurons found."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from .._files import write_text
from ..bases._activations import Neurons
from ..evaluation._compare import compare
from ..evaluation._comparison import Comparison
from ..nodes._attribute import attribute
from ..nodes._scores import NodeScores
from ..propagation._check_model import ModelReport, check_model
from ..tasks._agreement import subject_verb_agreement
from ..tasks._pairs import PromptPairs
from ._capitals import capitals
from ._models import load_demo_model

SIZES = (10, 30, 100, 300)
METHODS: tuple[str, ...] = ("relp", "gradient", "integrated_gradients", "random")
_MOST = 1800  # pairs of one phrasing: all of them, so that Dallas is among them


@dataclass(frozen=True)
class DemoResult:
    """What the demo computed, and where it was written."""

    report: ModelReport
    agreement: NodeScores
    dallas: NodeScores
    dallas_pair: PromptPairs
    comparison: Comparison
    files: tuple[Path, ...]

    def table(self) -> pd.DataFrame:
        """Faithfulness and completeness by task, method and size."""
        columns = ["task", "method", "size", "faithfulness", "completeness"]
        return self.comparison.to_dataframe().reindex(columns=columns)


def run_demo(
    out: Path,
    *,
    name: str = "demo-gelu",
    backend: str = "auto",
    seed: int = 0,
    verbose: bool | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> DemoResult:
    """Run the main job on a demo model and write a figure and tables to `out`.

    Neurons are scored on one half of the words (agreement) or states (capitals) and tested on the other half.

    Args:
        out: a folder, made if need be; files of an earlier demo are replaced.
        name: the demo model.
        backend: see `load_demo_model`.
        seed: of the pairs and their split.
        verbose: as in `attribute`.
        say: told about each step.

    Raises:
        SettingsError: an unknown demo model or backend.
    """
    say(f"loading {name}")
    model = load_demo_model(name, backend)
    say("checking which sites fire, and that relevance is conserved")
    report = check_model(model)
    agreement = subject_verb_agreement("nounpp", n=128, seed=seed).split(0.5, seed=seed, by="label")
    two_hop = capitals(n=128, seed=seed).split(0.5, seed=seed, by="label")
    say(f"attributing {len(agreement[0])} agreement pairs to neurons with RelP")
    scores = attribute(model, agreement[0], verbose=verbose)
    dallas_pair = _dallas(seed)
    say(f"attributing the Dallas prompt: {dallas_pair.clean[0]!r} -> {dallas_pair.answer[0]!r}")
    dallas = attribute(model, dallas_pair, verbose=verbose)
    say("keeping only the best neurons, then all but the best, on held-out words and states")
    comparison = compare(
        model,
        {"agreement": agreement[0], "capitals": two_hop[0]},
        {"agreement": agreement[1], "capitals": two_hop[1]},
        bases=[Neurons()],
        methods=METHODS,
        sizes=SIZES,
        seed=seed,
        verbose=verbose,
    )
    files = _write(out, scores, dallas, comparison)
    return DemoResult(report, scores, dallas, dallas_pair, comparison, files)


def _dallas(seed: int) -> PromptPairs:
    """The pair whose clean prompt is about Dallas, and its mirror image."""
    pairs = capitals(n=_MOST, seed=seed)
    index = next(i for i, prompt in enumerate(pairs.clean) if "Dallas" in prompt.split())
    return pairs[[index]].both_directions()


def _write(out: Path, agreement: NodeScores, dallas: NodeScores, comparison: Comparison) -> tuple[Path, ...]:
    figure, table = out / "sparsity.html", out / "sparsity.csv"
    write_text(figure, comparison.plot().to_html(include_plotlyjs=True))
    write_text(table, comparison.to_dataframe().to_csv(index=False))
    tops = {"agreement": agreement, "dallas": dallas}
    files = [figure, table]
    for name, scores in tops.items():
        files.append(out / f"top_neurons_{name}.csv")
        write_text(files[-1], scores.top(300).to_csv(index=False))
    return tuple(files)
