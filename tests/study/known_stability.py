"""What stability says where the truth is known: frequencies of true and false nodes, and rates of false discoveries.

Planted circuits: one chain's question at a time. Clean and corrupt differ in the token that the question asks about,
and the metric is the difference of the two answers' logits; null pairs differ in the tokens that it does not ask
about. Compiled programs (tracr): random prompts with another output at the last position, and null pairs with the same
output there; the metric is the difference of the two outputs' logits. Each pair is a cluster of its own.

Two truths, since a test of scores can know of effects alone:
    member    planted: of the chain's heads and MLPs; tracr: a neuron on a path to the output
    effect    patching this node alone, exactly, moves the metric by at least `SMALLEST` of what the strongest one does
A node outside the chain may well have an effect: training leaves heads that read and write a little of everything.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tl_neuron_circuits as tnc
from tests.study.cases import _read, tracr
from tl_neuron_circuits import TokenizedPairs
from tl_neuron_circuits.evaluation._stability import Stability

RATES = (0.05, 0.1, 0.2)
N_PAIRS, SIZE, DRAWS, NULL_DRAWS = 64, 10, 200, 100
SMALLEST = (0.0, 0.001, 0.01)
"""Shares of the strongest exact effect from which a node counts as having one (above, for 0)."""


def chain_pairs(planted: Any, chain: int, seed: int = 0) -> tuple[TokenizedPairs, TokenizedPairs]:
    """Pairs of one chain's question, and null pairs with the same answers."""
    from tests.planted.circuits import N_TOKENS, prompts

    place, order = planted.case.chains[chain].position, torch.tensor(planted.case.chains[chain].permutation)
    clean, other = prompts(2 * N_PAIRS, 500 + seed).chunk(2)
    step = 1 + torch.randint(N_TOKENS - 1, (N_PAIRS,), generator=torch.Generator().manual_seed(600 + seed))
    changed = (clean[:, place] + step) % N_TOKENS
    corrupt, null = clean.clone(), other.clone()
    corrupt[:, place], null[:, place] = changed, clean[:, place]
    answer, wrong = (chain * N_TOKENS + order[tokens] for tokens in (clean[:, place], changed))
    labels = [str(index) for index in range(N_PAIRS)]
    make = lambda end: TokenizedPairs.from_tokens(clean, answer, end, wrong, labels=labels)  # noqa: E731
    return make(corrupt), make(null)


def planted_rows(seed: int, chains: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
    """One row per chain of a planted circuit, or for some of them."""
    from tests.planted.load import load_planted

    planted = load_planted(seed)
    width = planted.model.cfg.d_head
    for number in range(len(planted.case.chains)) if chains is None else chains:
        chain = planted.case.chains[number]
        pairs, null = chain_pairs(planted, number, seed)
        found = tnc.stability(
            planted.model, pairs, sizes=(SIZE,), draws=DRAWS, null_draws=NULL_DRAWS, null_pairs=null,
            basis=[tnc.bases.HeadOutputs(), tnc.bases.Neurons()],
        )  # fmt: skip

        def is_true(label: str, nodes: tuple[str, ...] = chain.nodes) -> bool:
            layer, letter, unit = _read(label)
            return (f"L{layer}/MLP" if letter == "N" else f"L{layer}/H{unit // width}") in nodes

        true = np.array([is_true(label) for label in found.scores.to_dataframe()["label"]])
        exact = tnc.attribute(planted.model, pairs, method="patching", basis=found.scores.basis).flat().numpy()
        rates = _rates(found, true, exact)
        yield {"case": planted.case.name, "chain": number, **_frequencies(found, true), "rates": rates}


def compiled_pairs(model: Any, n: int, seed: int = 0) -> tuple[TokenizedPairs, TokenizedPairs]:
    """Random prompts beside others with another output at the last position, and beside others with the same."""
    generator = torch.Generator().manual_seed(700 + seed)
    clean, corrupt, null = (
        torch.randint(1, model.cfg.d_vocab, (200 * n, model.cfg.n_ctx), generator=generator) for _ in range(3)
    )
    for prompts in (clean, corrupt, null):
        prompts[:, 0] = 0
    with torch.no_grad():
        outputs = [model(prompts)[:, -1].argmax(-1) for prompts in (clean, corrupt, null)]
    rows = ((outputs[0] != outputs[1]) & (outputs[0] == outputs[2])).nonzero()[:n, 0]
    labels = [str(index) for index in range(len(rows))]
    make = lambda end: TokenizedPairs.from_tokens(  # noqa: E731
        clean[rows], outputs[0][rows], end[rows], outputs[1][rows], labels=labels
    )
    return make(corrupt), make(null)


def compiled_row(program: str) -> dict[str, Any] | None:
    """One program, by plain gradients: much of what these programs do goes through attention patterns, which RelP
    freezes. None without outputs to tell apart, or without neurons.
    """
    known = tracr(program)
    if known.model.cfg.d_vocab_out < 2 or not known.truth:
        return None
    pairs, null = compiled_pairs(known.model, N_PAIRS)
    n = min(sum(known.truth.values()), SIZE)
    settings: dict[str, Any] = {"basis": tnc.bases.Neurons()}
    found = tnc.stability(
        known.model, pairs, method="gradient", sizes=(n,), draws=DRAWS, null_draws=NULL_DRAWS, null_pairs=null,
        **settings,
    )  # fmt: skip
    labels = [label.split("@")[0] for label in found.scores.to_dataframe()["label"]]
    inside = np.array([label in known.truth for label in labels])
    true = np.array([known.truth.get(label, False) for label in labels])
    exact = tnc.attribute(known.model, pairs, method="patching", **settings).flat().numpy()
    rates = _rates(found, true, exact)
    return {"case": program, "size": n, **_frequencies(found, true, inside), "rates": rates}


def _frequencies(found: Stability, true: np.ndarray, inside: np.ndarray | None = None) -> dict[str, Any]:
    """Mean selection frequency of true nodes and of false ones, over those that have one at all, and the core."""
    size = found.sizes[-1]
    index, counts = found.best[:, :size].unique(return_counts=True)
    frequency = np.zeros(len(true))
    frequency[index.numpy()] = counts.numpy() / len(found.best)
    core = frequency >= 0.9
    false = ~true if inside is None else ~true & inside
    return {
        "true_share_of_draws": float(frequency[true].sum() / size),
        "false_share_of_draws": float(frequency[false].sum() / size),
        "mean_true": float(frequency[true].mean()),
        "mean_false": float(frequency[false].mean()) if false.any() else None,
        "core": int(core.sum()), "core_true": int((core & true).sum()),
    }  # fmt: skip


def _rates(found: Stability, true: np.ndarray, exact: np.ndarray) -> dict[str, dict[str, dict[str, Any]]]:
    """By null and nominal rate: how many nodes are named; the share of them outside the circuit, and that share of
    |score|; by smallest effect the share without one, and the share of nodes with one that are named.
    """
    rates: dict[str, dict[str, dict[str, Any]]] = {}
    strength = np.abs(exact) / max(np.abs(exact).max(), 1e-12)
    size = np.abs(found.scores.flat().numpy())
    for null in ("signs", "pairs"):
        for rate in RATES:
            named = ~found.at_fdr(rate, null=null).flat().isnan().numpy()
            row: dict[str, Any] = {"named": int(named.sum())}
            if named.any():
                row["outside"] = float((named & ~true).sum() / named.sum())
                row["outside_mass"] = float(size[named & ~true].sum() / size[named].sum())
                effects = {smallest: strength > max(smallest, 1e-7) for smallest in SMALLEST}
                row["without_effect"] = {str(x): float((named & ~y).sum() / named.sum()) for x, y in effects.items()}
                row["effects_named"] = {str(x): float((named & y).sum() / y.sum()) for x, y in effects.items()}
            rates.setdefault(null, {})[str(rate)] = row
    return rates


def run(folder: Path) -> None:
    """All rows, unless they are there."""
    from tests.planted.load import planted_seeds
    from tests.real_models import TRACR_PROGRAMS

    path = folder / "known_stability.json"
    if path.exists():
        return
    planted = [row for seed in planted_seeds() for row in planted_rows(seed)]
    compiled = [row for program in TRACR_PROGRAMS if (row := compiled_row(program)) is not None]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"planted": planted, "tracr": compiled}, indent=1))
