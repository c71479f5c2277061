"""Do labels of neurons hold on texts that were not used to find them? `python -m tests.evidence.descriptions`.

SmolLM2 reads English prose out of the documentation of installed Python packages, of which half, by package, is held
out. Two sets of neurons are described in one pass: 100 random ones, and those of a circuit of 300 nodes. Beside
the labels' precision, recall and base rate stand those of two controls: every neuron scored with the label of another
one, and labels of neurons whose activations were shuffled over the positions. Time is CPU time of one thread, against
bare forward passes over every fourth batch, measured in between.

Writes `docs/evidence/descriptions.json` and the tables of `docs/how-to/descriptions.md`; `--tables` writes the tables
alone, from the JSON that is there.
"""

import ast
import hashlib
import json
import re
import sys
import sysconfig
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch

import tl_neuron_circuits as tnc
from tests import smollm2
from tests.real_models import boot_folder
from tl_neuron_circuits._version import versions
from tl_neuron_circuits.bases._runs import values_at
from tl_neuron_circuits.explain import _describe
from tl_neuron_circuits.explain._activation_sample import SIGNS
from tl_neuron_circuits.explain._token_labels import (
    LEAST_F1,
    Condition,
    Vocabulary,
    choose_labels,
    score_label,
)
from tl_neuron_circuits.interventions._steering_prompts import token_names

ROOT = Path(__file__).parents[2]
JSON, PAGE = ROOT / "docs" / "evidence" / "descriptions.json", ROOT / "docs" / "how-to" / "descriptions.md"
TOKENS = 100_000
PROMPT = "When Mary and John went to the store, John gave a drink to"
N_RANDOM, N_CIRCUIT, PER_PACKAGE = 100, 300, 40


# --- Texts ---


def prose() -> dict[str, list[str]]:
    """Paragraphs of English prose by package: the standard library's documentation, READMEs and docstrings."""
    found: dict[str, list[str]] = defaultdict(list)
    from pydoc_data import topics

    for text in topics.topics.values():
        found["the Python language reference"] += paragraphs(text)
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"] or "unknown"
        found[name] += paragraphs(distribution.read_text("METADATA") or "")
    for folder in (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]):
        for file in sorted(Path(folder).glob("*/*.py")) + sorted(Path(folder).glob("*.py")):
            package = file.parent.name if file.parent != Path(folder) else file.stem
            if package != "site-packages" and len(found[package]) < 10 * PER_PACKAGE:
                found[package] += docstrings(file)
    seen: set[str] = set()
    for package in sorted(found):  # a license is in many packages, and counts in one
        kept = [text for text in dict.fromkeys(found[package]) if text[:120].lower() not in seen]
        seen |= {text[:120].lower() for text in kept}
        found[package] = sorted(kept, key=digest)[:PER_PACKAGE]
    return {package: texts for package, texts in found.items() if texts}


def docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield from paragraphs(ast.get_docstring(node) or "")


def paragraphs(text: str) -> list[str]:
    """Paragraphs of 40 words and more that read as sentences."""
    found = []
    for part in re.split(r"\n\s*\n", text):
        one = re.sub(r"\s+", " ", part).strip()
        letters = sum(c.isalpha() or c.isspace() for c in one)
        odd = any(sign in one for sign in (">>>", "::", "http", "|", "==", "->", "```"))
        if 200 <= len(one) <= 1500 and letters > 0.9 * len(one) and one.endswith(".") and not odd:
            found.append(one)
    return found


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def halves(model: Any, n_tokens: int) -> tuple[list[str], list[str], dict[str, Any]]:
    """Texts for discovery and texts held out, from different packages, half of `n_tokens` each."""
    by_package = prose()
    sides: list[list[str]] = [[], []]
    for package, texts in by_package.items():
        sides[int(digest(package)[:8], 16) % 2] += texts
    chosen, tokens = [], []
    for texts in sides:
        kept, total = [], 0
        for text in sorted(texts, key=digest):
            if total >= n_tokens / 2:
                break
            kept.append(text)
            total += len(model.tokenizer(text)["input_ids"])
        chosen.append(kept)
        tokens.append(total)
    about = {
        "texts": "English prose from the documentation of installed Python packages (docstrings, READMEs, reference)",
        "packages": len(by_package), "paragraphs": [len(kept) for kept in chosen], "tokens": tokens,
        "sha256": digest("\n".join(chosen[0] + chosen[1])),
    }  # fmt: skip
    return chosen[0], chosen[1], about


# --- Measuring ---


def measure() -> dict[str, Any]:
    """Labels of random neurons and of a circuit's, their controls, and the time it takes to describe all of them."""
    model = load()
    discovery, held_out, about = halves(model, TOKENS)
    generator = np.random.default_rng(0)
    width = model.cfg.d_mlp
    drawn = generator.choice(model.cfg.n_layers * width, N_RANDOM, replace=False)
    random_names = [f"L{place // width}/N{place % width}" for place in drawn]
    of_circuit = circuit_neurons(model)
    nodes = list(dict.fromkeys([*random_names, *of_circuit]))
    kept: dict[str, Any] = {}
    with keeping(kept), timed() as seconds:
        started = time.process_time()
        found = tnc.describe(model, nodes, discovery, held_out=held_out, verbose=True)
        seconds["describe"] = time.process_time() - started - seconds["bare"]
    passes = seconds["bare"] * seconds["tokens"] / seconds["bare_tokens"]
    table, samples = found.to_dataframe(), kept["samples"]
    return {
        "model": smollm2.LABEL, "about": about, "prompt": PROMPT, "versions": versions(),
        "positions": [found.settings["positions"], found.settings["held_out_positions"]],
        "nodes": {"random": len(random_names), "circuit": N_CIRCUIT, "neurons of the circuit": len(of_circuit)},
        "random": groups(model, samples, nodes, random_names, generator),
        "circuit": groups(model, samples, nodes, of_circuit, generator),
        "examples": examples(table, random_names), "layers": by_layer(table, random_names),
        "timing": {
            "neurons": len(nodes), "tokens": sum(about["tokens"]), "seconds": seconds, "passes": passes,
            "rest": seconds["describe"] - seconds["blocks"], "ratio": seconds["describe"] / passes,
            "ratio of the stream": seconds["blocks"] / passes,
        },
    }  # fmt: skip


def load() -> Any:
    folder = smollm2.prepared()
    assert folder is not None, "python -m tests.smollm2 makes the model"
    torch.set_num_threads(1)
    return boot_folder(folder)


def circuit_neurons(model: Any) -> list[str]:
    circuit = tnc.trace(model, PROMPT, nodes=N_CIRCUIT)
    return list(dict.fromkeys(name.partition("@")[0] for name in circuit.nodes["node"] if name in circuit.members))


class timed:
    """CPU seconds of a bare pass over every fourth batch, up to the same hook point, among the passes of `describe`."""

    def __enter__(self) -> dict[str, float]:
        self.seconds = {"bare": 0.0, "bare_tokens": 0.0, "tokens": 0.0, "blocks": 0.0}
        run = _describe._run

        def both(model: Any, frame: pd.DataFrame, pieces: Any, batch_size: int, samples: Any) -> None:
            last = list(frame["hook"].unique())
            last = [max(last, key=lambda name: int(name.split(".")[1]))]
            for number, batch in enumerate(_describe._batches(pieces, batch_size)):
                length = max(len(piece) for _, _, piece in batch)
                self.seconds["tokens"] += len(batch) * length
                if number % 4 == 0:
                    rows = np.stack([np.pad(p, (0, length - len(p)), mode="edge") for _, _, p in batch])
                    started = time.process_time()
                    values_at(model, torch.from_numpy(rows), last, kept=lambda v: v[..., :0])
                    self.seconds["bare"] += time.process_time() - started
                    self.seconds["bare_tokens"] += rows.size
            started = time.process_time()
            run(model, frame, pieces, batch_size, samples)
            self.seconds["blocks"] += time.process_time() - started

        self.patch = mock.patch.object(_describe, "_run", both)
        self.patch.start()
        return self.seconds

    def __exit__(self, *_: object) -> None:
        self.patch.stop()


class keeping:
    """Keep the samples that `describe` assembles from, for the controls."""

    def __init__(self, kept: dict[str, Any]) -> None:
        self.kept = kept

    def __enter__(self) -> None:
        assemble = _describe._assemble

        def keep(model: Any, frame: Any, samples: Any, *rest: Any) -> Any:
            self.kept["samples"] = samples
            return assemble(model, frame, samples, *rest)

        self.patch = mock.patch.object(_describe, "_assemble", keep)
        self.patch.start()

    def __exit__(self, *_: object) -> None:
        self.patch.stop()


def groups(
    model: Any, samples: Any, nodes: list[str], names: list[str], generator: np.random.Generator
) -> dict[str, Any]:
    """The labels' scores, and those of both controls, over the live signs of these neurons."""
    (tokens, values), (other_tokens, other_values) = (one.sampled() for one in samples)
    columns = [nodes.index(name) for name in names]
    own, other = values[:, columns], other_values[:, columns]
    live = np.quantile(own, 0.99, axis=0) - np.quantile(own, 0.01, axis=0) > 1e-3
    ids = np.unique(np.concatenate([tokens.reshape(-1), other_tokens.reshape(-1)]))
    vocabulary = Vocabulary(ids, token_names(model, ids.tolist()))
    words = vocabulary.words_at(other_tokens)
    shuffled = np.stack([generator.permutation(column) for column in own.T], 1)
    other_shuffled = np.stack([generator.permutation(column) for column in other.T], 1)
    cases = {
        "labels": (own, other, LEAST_F1), "shuffled activations": (shuffled, other_shuffled, LEAST_F1),
        "shuffled activations, best condition however weak": (shuffled, other_shuffled, 0.0),
    }  # fmt: skip
    labels: dict[str, list[tuple[Condition, np.ndarray]]] = {key: [] for key in cases}
    for sign in SIGNS:
        for key, (here, there, least) in cases.items():
            threshold = np.maximum(np.quantile(sign * here, _describe.ACTIVE_ABOVE, axis=0), 0.0)
            active = sign * here > threshold
            chosen = choose_labels(active, tokens, vocabulary, least_f1=least)
            alive, other_active = live & active.any(0), sign * there > threshold
            labels[key] += [(one, other_active[:, i]) for i, one in enumerate(chosen) if alive[i]]
    has = [(condition, active) for condition, active in labels["labels"] if condition.kind]
    order = generator.permutation(len(has))
    shift = np.roll(order, 1)
    swapped = [(has[shift[i]][0], has[order[i]][1]) for i in range(len(has))]
    labels["labels of other neurons"] = swapped
    out: dict[str, Any] = {"live": int(live.sum()), "signs": len(labels["labels"])}
    for key, rows in labels.items():
        scores = [score_label(c, a, other_tokens, words, vocabulary) for c, a in rows if c.kind]
        kinds = [c.kind for c, _ in rows if c.kind]
        frame = pd.DataFrame(
            [(s.precision, s.recall, s.base_rate, s.f1) for s in scores],
            columns=["precision", "recall", "base_rate", "f1"],
        )
        lift = frame["precision"] / frame["base_rate"]
        out[key] = {
            "labelled": len(scores), "unlabelled": len(rows) - len(scores),  # codespell:ignore
            **{name: mean(frame[name]) for name in frame},
            "median precision": median(frame["precision"]), "median recall": median(frame["recall"]),
            "above 5 x base rate": float((lift > 5).mean()) if len(lift) else None,
            "kinds": {kind: kinds.count(kind) for kind in ("token", "class", "after")},
        }  # fmt: skip
    return out


def mean(column: pd.Series) -> float | None:
    return float(column.mean()) if column.notna().any() else None


def median(column: pd.Series) -> float | None:
    return float(column.median()) if column.notna().any() else None


def examples(table: pd.DataFrame, names: list[str]) -> list[dict[str, Any]]:
    """The first labels of the random neurons, in the order in which they were drawn."""
    rows = table[table["node"].isin(names[:12])].set_index("node").loc[names[:12]].reset_index()
    shown = rows[["node", "sign", "label", "kind", "precision", "recall", "base_rate"]]
    return json.loads(shown.to_json(orient="records"))


def by_layer(table: pd.DataFrame, names: list[str]) -> list[dict[str, Any]]:
    rows = table[table["node"].isin(names)]
    third = pd.cut(rows["layer"], [-1, 9, 19, 29], labels=["0-9", "10-19", "20-29"])
    grouped = rows.groupby(third, observed=True)
    return [
        {"layers": str(key), "signs": len(part), "labelled": int((part["label"] != "").sum()),  # codespell:ignore
         "precision": mean(part["precision"]), "recall": mean(part["recall"])}
        for key, part in grouped
    ]  # fmt: skip


# --- The page ---


def tables(found: dict[str, Any]) -> str:
    """The page's tables, from the JSON."""
    about, nodes = found["about"], found["nodes"]
    sets = (("random", f"{nodes['random']} random"), ("circuit", f"{nodes['neurons of the circuit']} of a circuit"))
    lines = [
        f"Measured on {found['model']}, with {sum(found['positions']):,} positions in {sum(about['paragraphs']):,} "
        "paragraphs of prose from the documentation of Python packages. The held-out half is from other packages.",
        "",
        "| neurons | | signs with a label | precision | recall | base rate | above 5 x base rate |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {CASES[key]} | {table_row(found[which], key)} |"
            for which, name in sets for key in CASES if key in found[which]
        ),
        "",
        "The first random neurons drawn: " + "; ".join(map(said, found["examples"][:6])) + ".",
        "",
        timing_line(found["timing"]),
    ]  # fmt: skip
    return "\n".join(lines)


CASES = {
    "labels": "their labels", "labels of other neurons": "labels of other neurons",
    "shuffled activations, best condition however weak": "shuffled activations",
}  # fmt: skip


def said(row: dict[str, Any]) -> str:
    name = f"{row['node']}{'+' if row['sign'] > 0 else '-'}"
    if not row["label"]:
        return f"{name} none"
    return f"{name} `{row['label']}` ({number(row['precision'])}, {number(row['recall'])})"


def timing_line(timing: dict[str, Any]) -> str:
    return (
        f"All {timing['neurons']} neurons on {timing['tokens']:,} tokens took {timing['seconds']['describe']:.0f} CPU "
        f"seconds on one thread, {timing['ratio']:.2f} times the bare forward passes."
    )


def table_row(found: dict[str, Any], key: str) -> str:
    group = found[key]
    share = group["above 5 x base rate"]
    cells = (
        f"{group['labelled']} of {found['signs']}", number(group["precision"]), number(group["recall"]),
        number(group["base_rate"], 3), "" if share is None else f"{share:.0%}",
    )  # fmt: skip
    return " | ".join(cells)


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def write_tables() -> None:
    found = json.loads(JSON.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    start, end = "<!-- tables: tests.evidence.descriptions -->\n", "<!-- end of tables -->"
    before, _, rest = text.partition(start)
    PAGE.write_text(f"{before}{start}\n{tables(found)}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


if __name__ == "__main__":
    if "--tables" not in sys.argv:
        JSON.parent.mkdir(parents=True, exist_ok=True)
        JSON.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    write_tables()
