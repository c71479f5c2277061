"""Which method finds the best circuits, at which price: `python -m tests.study [--models ...] [--page]`.

PRIMARY ENDPOINT, fixed before the first run:
    compactness of neuron circuits on SmolLM2, scored with interchange (baseline "corrupt") and judged with interchange
    (ablation "corrupt") on pairs of other nouns, averaged over nounpp, rc and two-hop capitals.
Compactness is the mean of two areas over log size, from 1 node to all: the share of pairs that the best nodes alone
answer right, and the share that is wrong once the best nodes alone are ablated. It lies in [0, 1] and does not reward
overshoot. Everything else (mean ablation, crossed ablations, faithfulness, demo models, known circuits) is secondary.

DECISION, fixed likewise: differences to RelP by |score|, the default, are paired (same pairs) with 95 % intervals over
words: both nouns of a pair together, or both states. A method is recommended over one that costs less only if its
interval excludes 0; the sentences on the page are made from the table by that rule.

No setting was tuned here: learning rates and the rest are the package's defaults. Development pairs choose among the
checkpoints of a learned mask, and nothing else. A cell is written when it is done; a second call goes on from there.
`--page` writes docs/which-method.json, docs/which-method.md and its figure from the cells that are there.
"""

import argparse
import time
import warnings
from pathlib import Path

import torch

from tests.study.cases import MODELS, TASKS

KNOWN = ("planted", "tracr", "stability", "reliability")
"""Parts beside the cells: known circuits, false discoveries on them, and group effects on SmolLM2."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("study"), help="for the cells")
    parser.add_argument("--models", nargs="*", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--tasks", nargs="*", default=[*TASKS], choices=[*TASKS])
    parser.add_argument("--known", nargs="*", default=[*KNOWN], choices=[*KNOWN])
    parser.add_argument("--minutes", type=float, default=120, help="of CPU time, after which no cell is begun")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")
    torch.set_num_threads(1)
    if options.page:
        from tests.study.page import write_page

        write_page(options.folder)
        return
    from tests.study import known_stability
    from tests.study.cells import describe, plan, run, run_known, run_reliability

    for cell in plan(options.models, options.tasks):
        if time.process_time() > 60 * options.minutes:
            break
        if run(cell, options.folder):
            print(f"{time.process_time() / 60:.1f} min:", describe(cell, "done"), flush=True)
    if "reliability" in options.known and "smollm2" in options.models:
        run_reliability(options.folder)
    for line in run_known(options.folder, tuple(options.known)):
        print(line, flush=True)
    if "stability" in options.known:
        known_stability.run(options.folder)


if __name__ == "__main__":
    main()
