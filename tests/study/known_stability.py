"""What stability says where the truth is known: frequencies of true and false nodes, and rates of false discoveries.

Planted circuits: one chain's question at a time. Clean and corrupt differ in the token that the question asks about,
and the metric is the difference of the two answers' logits; null pairs differ in the tokens that it does not ask
about. True nodes are those of the chain's heads and MLPs, false ones those of all other heads and MLPs. Each pair is
a cluster of its own. Compiled programs (tracr): random prompts; true nodes are neurons on a path to the output, false
ones the other neurons that are no padding. There only frequencies are asked: false neurons have no effect at all.
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
        yield {"case": planted.case.name, "chain": number, **_frequencies(found, true), "rates": _rates(found, true)}


def tracr_row(program: str) -> dict[str, Any]:
    """Frequencies among the neurons of a compiled program that are no padding, by plain gradients: much of what these
    programs do goes through attention patterns, which RelP freezes.
    """
    known = tracr(program)
    labels = [str(index) for index in range(len(known.pairs))]
    pairs = TokenizedPairs(known.pairs.clean, known.pairs.answer, known.pairs.position, known.pairs.corrupt,
                           None, known.pairs.corrupt_position, labels)  # fmt: skip
    n = min(sum(known.truth.values()), SIZE)
    found = tnc.stability(
        known.model,
        pairs,
        method="gradient",
        sizes=(n,),
        draws=DRAWS,
        null_draws=0,
        metric=known.metric,
        positions="sum",
    )
    table = found.scores.to_dataframe()
    inside = np.array([label in known.truth for label in table["label"]])
    true = np.array([known.truth.get(label, False) for label in table["label"]])
    return {"case": program, "size": n, **_frequencies(found, true, inside)}


def _frequencies(found: Stability, true: np.ndarray, inside: np.ndarray | None = None) -> dict[str, float]:
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


def _rates(found: Stability, true: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """By null and nominal rate: how many nodes are named, the share of false ones, and their share of |score|."""
    rates: dict[str, dict[str, list[float]]] = {}
    for null in ("signs", "pairs"):
        for rate in RATES:
            named = ~found.at_fdr(rate, null=null).flat().isnan().numpy()
            size = np.abs(found.scores.flat().numpy())
            shares = (
                [float(x[named & ~true].sum() / x[named].sum()) for x in (np.ones(len(true)), size)]
                if named.any()
                else []
            )
            rates.setdefault(null, {})[str(rate)] = [int(named.sum()), *shares]
    return rates


def run(folder: Path) -> None:
    """All rows, unless they are there."""
    from tests.planted.load import planted_seeds
    from tests.real_models import TRACR_PROGRAMS

    path = folder / "known_stability.json"
    if path.exists():
        return
    planted = [row for seed in planted_seeds() for row in planted_rows(seed)]
    compiled = [tracr_row(program) for program in TRACR_PROGRAMS]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"planted": planted, "tracr": compiled}, indent=1))
