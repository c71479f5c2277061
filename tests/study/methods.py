"""The methods of the study, their rankings, and what they cost.

Cost is counted, not estimated: rows of forward passes through the first block, those under a gradient twice (parameters
get none, so a backward pass is about a forward pass), over the number of pairs that are scored. Second order adds its
products, three forward passes each on half of the layers.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import tl_neuron_circuits as tnc
from tl_neuron_circuits import LearnedMask, NodeScores, PromptPairs, RelP

STEPS = (50, 150, 500)
"""Checkpoints of one run."""
BOTH: tuple[Literal["abs", "signed"], ...] = ("abs", "signed")


@dataclass(frozen=True)
class Entry:
    """A method under its name on the page."""

    name: str
    method: Any
    rankings: tuple[Literal["abs", "signed"], ...] = BOTH

    @property
    def key(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.name)


ENTRIES = {
    entry.name: entry
    for entry in (
        Entry("RelP", RelP()),
        Entry("AttnLRP", RelP(rules="attnlrp")),
        Entry("GIM", RelP(rules="gim")),
        Entry("AtP", tnc.Gradient()),
        Entry("IG", tnc.IntegratedGradients(steps=5)),
        Entry("IG over inputs", tnc.IntegratedGradientsInputs(steps=5)),
        Entry("AtP, second order", "second order"),
        Entry("mask gradient", tnc.MaskGradient(10), ("signed",)),
        *(Entry(f"learned, {n} steps", LearnedMask(n), ("signed",)) for n in STEPS),
        *(Entry(f"learned from RelP, {n} steps", LearnedMask(n, start="relp"), ("signed",)) for n in STEPS),
        *(Entry(f"learned, uniform k, {n} steps", LearnedMask(n, schedule="uniform"), ("signed",)) for n in STEPS),
        Entry("RelP, best 100 patched", "screened"),
        Entry("exact patching", tnc.Patching()),
        Entry("activation difference", tnc.ActivationDifference(), ("abs",)),
        Entry("random", tnc.Random(), ("abs",)),
    )
}
ATTRIBUTIONS = ("RelP", "AttnLRP", "GIM", "AtP", "IG over inputs")
CHEAP = (*ATTRIBUTIONS, "mask gradient", "activation difference", "random")
FROM_ZERO = tuple(name for name in ENTRIES if name.startswith("learned, ") and "uniform" not in name)
FROM_RELP = tuple(name for name in ENTRIES if name.startswith("learned from RelP"))
SCREENED = "RelP, best 100 patched"
UNIFORM = tuple(name for name in ENTRIES if "uniform" in name)


def score(
    entry: Entry, model: Any, pairs: Any, *, baseline: Any, resume: Path | None, **settings: Any
) -> tuple[NodeScores, float]:
    """Scores, and their cost in forward passes per pair."""
    n = len(pairs)
    if entry.method == "second order":
        with counted(model) as rows:
            scores = _second_order(model, pairs, baseline, settings)
        sites = model.cfg.n_layers
        lengths = next(iter(scores.values.values())).shape[0]
        return scores, rows[0] / n + sites * lengths * 3 / 2
    if entry.method == "screened":
        with counted(model) as rows:
            scores = _screened(model, pairs, baseline, settings)
        return scores, rows[0] / n
    if isinstance(entry.method, LearnedMask):
        scores = tnc.attribute(model, pairs, method=entry.method, baseline=baseline, resume=resume, **settings)
        return scores, float(scores.settings["learning"]["forward_equivalents_per_pair"])
    if isinstance(entry.method, RelP):
        few = pairs[:2] if isinstance(pairs, PromptPairs) else pairs
        tnc.attribute(model, few, method=entry.method, baseline=baseline, **settings)  # its check runs once
    with counted(model) as rows:
        scores = tnc.attribute(model, pairs, method=entry.method, baseline=baseline, **settings)
    return scores, rows[0] / n


def _second_order(model: Any, pairs: Any, baseline: Any, settings: dict[str, Any]) -> NodeScores:
    """Gradient times change, and every node's share of its group's second order."""
    known = {name: value for name, value in settings.items() if name in ("metric", "basis")}
    first = tnc.attribute(model, pairs, method="gradient", baseline=baseline, **settings)
    second = tnc.reliability(model, pairs, baseline=baseline, **known).interactions
    values = {hook: block + second.values[hook] for hook, block in first.values.items()}
    label = {"method": "gradient + second order", "method_options": {"name": "gradient + second order"}}
    return NodeScores(values, {}, {}, first.sites, dict(first.settings) | label, first.basis)


def _screened(model: Any, pairs: Any, baseline: Any, settings: dict[str, Any], k: int = 100) -> NodeScores:
    """RelP's scores, those of its k largest replaced by the exact effect."""
    first = tnc.attribute(model, pairs, method="relp", baseline=baseline, **settings)
    exact = tnc.attribute(model, pairs, method=tnc.Patching(first.top(k)), baseline=baseline, **settings)
    values = {hook: torch.where(block.isnan(), first.values[hook], block) for hook, block in exact.values.items()}
    label = {"method": "relp, best patched", "method_options": {"name": "relp, best patched"}}
    return NodeScores(values, {}, {}, first.sites, dict(first.settings) | label, first.basis)


@contextlib.contextmanager
def counted(model: Any) -> Iterator[list[float]]:
    """Rows that pass the first block, those under a gradient twice."""
    rows = [0.0]

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[0] if args else kwargs["hidden_states"]
        rows[0] += value.shape[0] * (2 if torch.is_grad_enabled() else 1)

    handle = model.blocks[0].register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()
