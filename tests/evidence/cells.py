"""What the evidence scripts share: the model, results kept cell by cell, statistics of curves, tables for the page.

A cell is one curve (or one measurement). It is written as soon as it is there, so a script that was stopped goes on
where it was. Cells lie in `--work` (by default beside the cached model, outside the repository); what the page needs
of them goes to docs/evidence/*.json, and from there into the tables of docs/real-model.md.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tl_neuron_circuits as tnc
from tests import smollm2
from tl_neuron_circuits.evaluation._curve import log_area

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "docs" / "real-model.md", ROOT / "docs" / "real-model-appendix.md")
RESULTS = ROOT / "docs" / "evidence"
LARGEST = 10_000
"""Areas over log size go from 1 node to here for every basis, so that they compare."""
Array = np.ndarray


def options(description: str | None) -> argparse.Namespace:
    """The command line of every script."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=smollm2.cache() / "evidence", help="where cells are kept")
    parser.add_argument("--update-docs", action="store_true", help="write docs/evidence and the tables of the page")
    parser.add_argument("--no-run", action="store_true", help="only what is there already")
    parser.add_argument("--only", nargs="+", help="only these structures (agreement) or parts (the others)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    return given


def load_model() -> Any:
    """SmolLM2 as a TransformerBridge, without BOS unless asked; `python -m tests.smollm2` makes its folder."""
    from tests.real_models import boot_folder

    model = boot_folder(smollm2.prepare())
    model.cfg.default_prepend_bos = False  # for pairs that were read from a file, which does not say it
    return model


class Cells:
    """Results by name in one folder."""

    def __init__(self, folder: Path, run: bool = True) -> None:
        self.folder, self.run = folder, run
        folder.mkdir(parents=True, exist_ok=True)

    def curve(self, name: str, make: Callable[[], tnc.SparsityCurve] | None = None) -> tnc.SparsityCurve | None:
        """The curve of that name, made now if it is not there; None if it may not be made."""
        path = self.folder / name
        if not path.exists():
            if not self.run or make is None:
                return None
            start = time.process_time()
            make().save(path)
            print(f"{time.strftime('%H:%M:%S')} {name} {time.process_time() - start:.0f} CPU s", flush=True)
        return tnc.SparsityCurve.load(path)

    def scores(self, name: str, make: Callable[[], tnc.NodeScores] | None = None) -> tnc.NodeScores:
        """The scores of that name; of the model's own activations only, as dictionaries are not saved with them.

        Raises:
            FileFormatError: they are not there, and there is nothing to make them.
        """
        path = self.folder / name
        if not path.exists() and make is not None:
            make().save(path)
        return tnc.NodeScores.load(path)

    def pairs(self, name: str, make: Callable[[], tnc.PromptPairs]) -> tnc.PromptPairs:
        """The pairs of that name: drawing them and asking the model which are right takes a while."""
        path = self.folder / f"{name}.jsonl"
        if not path.exists():
            make().to_jsonl(path)
        return tnc.PromptPairs.from_jsonl(path)

    def values(self, name: str, make: Callable[[], Any] | None = None) -> Any:
        """JSON values of that name; None if they may not be made."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            if not self.run or make is None:
                return None
            start = time.process_time()
            found = make()
            path.write_text(json.dumps(found, indent=1), encoding="utf-8")
            print(f"{time.strftime('%H:%M:%S')} {name} {time.process_time() - start:.0f} CPU s", flush=True)
        return json.loads(path.read_text(encoding="utf-8"))


def summary(curve: tnc.SparsityCurve) -> dict[str, Any]:
    """What the page may show of one curve; raw metrics beside everything that is normalized."""
    right = curve.full > 0
    empty = float((curve.empty[right] > 0).float().mean())
    return {
        "sizes": list(curve.sizes), "nodes": curve.total, "pairs": len(curve.full),
        "F(M)": curve.metric_full, "F(0)": curve.metric_empty,
        "faithfulness": rounded(curve.faithfulness), "completeness": rounded(curve.completeness),
        "accuracy": rounded(curve.accuracy), "flips": rounded(curve.flips),
        "error": curve.error_area(LARGEST), "within .2 from": curve.size_within(),
        "overshoot area": curve.overshoot_area(LARGEST),
        "signed overshoot area": curve.overshoot_area(LARGEST, signed=True),
        "accuracy area": log_area(curve.sizes, curve.accuracy, LARGEST, empty, float(curve.accuracy[-1])),
        "accuracy empty": empty,
        "accuracy full": float(right.float().mean()),
    }  # fmt: skip


def rounded(values: Iterable[float]) -> list[float | None]:
    """Four digits after the point; None for what was not measured."""
    return [None if np.isnan(value) else round(float(value), 4) for value in values]


def interval(values: Array) -> list[float]:
    """The middle 95 %."""
    return [float(np.nanpercentile(values, tail)) for tail in (2.5, 97.5)]


def write_results(name: str, found: Mapping[str, Any]) -> None:
    """docs/evidence/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"model": smollm2.LABEL, **found}, indent=1, allow_nan=True)
    (RESULTS / f"{name}.json").write_text(text.replace("Infinity", '"inf"').replace("NaN", "null") + "\n")


def read_results(name: str) -> dict[str, Any]:
    """What `write_results` wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown, numbers right-aligned."""
    body = [[show(cell) for cell in row] for row in rows]
    line = lambda row: "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |"  # noqa: E731
    if not body:
        return "Not run."
    return "\n".join([line(head), "| --- |" + " ---: |" * (len(head) - 1), *map(line, body)])


def show(value: Any) -> str:
    """A number with as many digits as a reader can use."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return "never" if value == "inf" else value
    if isinstance(value, int):
        return f"{value:,}"
    if np.isinf(value):
        return "never"
    if np.isnan(value):
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.0f}" if abs(value) >= 20 else f"{value:.2f}"
    return text.removeprefix("-") if text == "-0.00" else text


def update_page(tables: Mapping[str, str]) -> None:
    """Put every table between its two markers, on the page or its appendix."""
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    for name, content in tables.items():
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.S)
        places = [page for page, text in texts.items() if pattern.search(text)]
        if not places:
            print(f"no page has a place for the table {name}")
        for page in places:
            texts[page] = pattern.sub(
                lambda match, content=content: f"{match[1]}\n{content}\n\n{match[2]}", texts[page]
            )
    for page, text in texts.items():
        page.write_text(text, encoding="utf-8")
