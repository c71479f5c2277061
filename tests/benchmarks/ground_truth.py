"""Every edge method against known circuits, in one run: SHD, AUROC, seconds, mean and spread over seeds.

    python -m tests.benchmarks.ground_truth [--seeds 3] [--pairs 64] [--out results.csv]

Cases: the planted circuits of `tests/planted`, and the compiled models of `../shared/models` where they are (apart:
there unused parts are zeros, so finding them is trivial). A seed draws the prompts. CircuitLasso sees 256 clean prompts
(or as many as its row says) and is ranked by its weights (the paper) and by `reach`; the others see `--pairs` pairs.
Thresholds are chosen on the other cases of the same kind and seed, for every method alike; the row "chosen" also takes,
for every case, that setting of CircuitLasso (with its ranking) which has the least mean SHD on the other cases.
CPU seconds a case, without loading the model.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tests.planted.load import load_planted, planted_seeds
from tests.real_models import TRACR_PROGRAMS, load_hooked_form
from tl_neuron_circuits.components import component_edges, judge_edges, tracr_ground_truth
from tl_neuron_circuits.components._method import EdgeMethod
from tl_neuron_circuits.lasso import CircuitLasso, Share
from tl_neuron_circuits.tasks import TokenizedPairs
from tl_neuron_circuits.tasks._tokenized import Batch

SHARED = Path(__file__).resolve().parents[3] / "shared" / "models"
SHARED = SHARED if SHARED.is_dir() else Path("/work/shared/models")
COLUMNS = ("auroc", "average_precision", "shd", "shd_best", "shd_empty", "seconds")
SHARE = 0.05  # of the smallest penalty that leaves no edge; chosen on four planted cases, the same for all
Case = tuple[Any, Any, Callable[[int, int], tuple[TokenizedPairs, Any]]]


def lasso(prompts: int = 256, share: float = SHARE, **settings: Any) -> Callable[..., Any]:
    def run(model: Any, draw: Callable[..., Any], seed: int, options: argparse.Namespace, compiled: bool) -> Any:
        pairs, metric = draw(prompts, seed)
        given = {"blocks": 4, "seed": seed, "skip_positions": 0, "shares": (0.3,), "penalty": Share(share), **settings}
        fit = CircuitLasso(**given, readout="logits" if compiled else None).fit
        start = time.process_time()
        edges = fit(model, pairs, metric=metric, batch_size=256).edges
        took = time.process_time() - start
        reach = edges[["source", "target", "reach"]].rename(columns={"reach": "score"})
        return took, {"": edges[["source", "target", "weight"]], ", reach": reach}

    return run


def scored(method: str | EdgeMethod) -> Callable[..., Any]:
    def run(model: Any, draw: Callable[..., Any], seed: int, options: argparse.Namespace, compiled: bool) -> Any:
        pairs, metric = draw(options.pairs, seed)
        start = time.process_time()
        found = component_edges(model, pairs, method=method, metric=metric, batch_size=64)
        return time.process_time() - start, {"": found}

    return run


METHODS: dict[str, Callable[..., Any]] = {
    "CircuitLasso (same)": lasso(regressors="same"),
    "CircuitLasso (pooled)": lasso(regressors="pooled"),
    "CircuitLasso (pooled, 1024 prompts, share .02)": lasso(1024, regressors="pooled", share=0.02),
    "CircuitLasso (pooled, noise .3, 1024 prompts)": lasso(1024, regressors="pooled", noise=0.3),
    "CircuitLasso (pooled, noise .3, 1024 prompts, share .02)": lasso(1024, regressors="pooled", share=0.02, noise=0.3),
    "CircuitLasso (earlier)": lasso(regressors="earlier"),
    "EAP": scored("eap"),
    "EAP-IG (5 steps)": scored("eap_ig_inputs"),
    "RelP": scored("relp"),
    "RelP without attention": scored("relp(rules=ln+identity+half)"),
    "exact patching": scored("patching"),
    "ACDC": scored("acdc(divergence=metric)"),
    "random": scored("random"),
}


def planted_cases() -> list[Case]:
    found = []
    for seed in planted_seeds():
        planted = load_planted(seed)

        def draw(n: int, seed: int, planted: Any = planted) -> tuple[TokenizedPairs, Any]:
            pairs = planted.pairs(n, seed)
            return pairs, planted.metric(pairs)

        found.append((planted.truth, planted.model, draw))
    return found


def all_outputs(logits: Tensor, batch: Batch) -> Tensor:
    """A number that depends on every output of a compiled model."""
    weights = torch.linspace(0.5, 2, logits.shape[1] * logits.shape[2]).reshape(logits.shape[1:])
    return (logits.square() * weights).sum((1, 2))


def compiled_cases() -> list[Case]:
    found = []
    for program in TRACR_PROGRAMS if SHARED.is_dir() else ():
        path = SHARED / f"tracr_{program}"
        model = load_hooked_form(path)

        def draw(n: int, seed: int, model: Any = model) -> tuple[TokenizedPairs, Any]:
            generator = torch.Generator().manual_seed(seed)
            tokens = torch.randint(1, model.cfg.d_vocab, (2 * n, model.cfg.n_ctx), generator=generator)
            tokens[:, 0] = 0
            return TokenizedPairs.from_tokens(
                tokens[:n], torch.arange(n) % model.cfg.d_vocab_out, tokens[n:]
            ), all_outputs

        found.append((tracr_ground_truth(path), model, draw))
    return found


def measure(kind: str, cases: list[Case], options: argparse.Namespace) -> list[pd.DataFrame]:
    tables = []
    for seed in range(options.seeds):
        of_lasso = []
        for name, method in METHODS.items():
            judged: dict[str, list] = {}
            seconds = []
            for truth, model, draw in cases:
                took, scores = method(model, draw, seed, options, kind == "compiled")
                seconds.append(took)
                for ranking, found in scores.items():
                    judged.setdefault(name + ranking, []).append((truth, found))
            for ranking, pairs_judged in judged.items():
                table = judge_edges(pairs_judged).assign(method=ranking, seed=seed, kind=kind, seconds=seconds)
                tables.append(table)
                of_lasso += [table] if name.startswith("CircuitLasso") else []
                means = table[[*COLUMNS]].mean()
                print(kind, ranking, seed, means.round(3).to_dict(), flush=True)
        tables.append(chosen_on_others(of_lasso))
    return tables


def chosen_on_others(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """For every case the row of that setting whose mean SHD on the other cases is least."""
    distances = pd.concat([table["shd"] for table in tables], axis=1)
    rows = []
    for case in distances.index:
        best = int(distances.drop(case).mean().to_numpy().argmin())
        rows.append(tables[best].loc[[case]])
    return pd.concat(rows).assign(method="CircuitLasso, setting chosen on the other cases")


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over cases, then mean and spread over seeds."""
    columns = list(COLUMNS)
    by_seed = table.groupby(["kind", "method", "seed"], sort=False)[columns].mean()
    mean, spread = (getattr(by_seed.groupby(["kind", "method"], sort=False), f)() for f in ("mean", "std"))
    return pd.DataFrame(
        {c: [f"{m:.3f} +- {s:.3f}" for m, s in zip(mean[c], spread[c], strict=True)] for c in columns}, mean.index
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=64, help="for the other methods")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")
    torch.set_num_threads(1)
    tables = measure("planted", planted_cases(), options)
    compiled = compiled_cases()
    tables += measure("compiled", compiled, options) if compiled else []
    table = pd.concat(tables, ignore_index=True)
    print(summary(table).to_string())
    if options.out is not None:
        table.to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
