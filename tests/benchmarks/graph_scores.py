"""Circuits of neurons and of dictionary features side by side: what each leaves out, its two scores, and ablation.

    python tests/benchmarks/graph_scores.py [--nodes 50 100 200]

demo-gelu. `left out`, `errors` (the part of it that flows to error nodes), `replacement` and `completeness` are of the
Dallas prompt's circuit; faithfulness is of a circuit of half of the two-hop pairs of ten tokens, on the other half,
with the errors ablated like everything outside the circuit, and with all errors kept.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import tl_neuron_circuits as tnc  # noqa: E402
from tl_neuron_circuits.demo import capitals  # noqa: E402
from tl_neuron_circuits.tasks import tokenize  # noqa: E402

PROMPT, LENGTH = "The capital of the state containing Dallas is", 10


def of_one_length(model: Any, pairs: tnc.PromptPairs) -> tnc.PromptPairs:
    lengths = tokenize(model, pairs).lengths
    keep = [index for index, length in enumerate(lengths) if length == LENGTH]
    columns = {key: [getattr(pairs, key)[i] for i in keep] for key in ("clean", "corrupt", "answer", "wrong_answer")}
    return tnc.PromptPairs(**columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[50, 100, 200])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = tnc.load_demo_model("demo-gelu")
    train, test = (of_one_length(model, part) for part in capitals().split(0.5))
    bases: dict[str, Any] = {"neurons": tnc.bases.Neurons()}
    bases |= {kind: tnc.bases.Dictionaries(tnc.load_demo_dictionaries(kind)) for kind in ("transcoder", "sae")}
    print(f"demo-gelu, {len(train)} pairs traced, {len(test)} evaluated")
    print("nodes        number  left out  errors  replacement  completeness  faithfulness  with errors kept")
    for name, basis in bases.items():
        for number in options.nodes:
            circuit = tnc.trace(model, PROMPT, " Austin", basis=basis, nodes=number)
            errors = circuit.nodes.loc[circuit.nodes["kind"] == "error", "flow"].sum() / circuit.target_value
            of_pairs = tnc.trace(model, train, basis=basis, nodes=number)
            found = [
                float(tnc.evaluate(model, test, of_pairs, error_nodes=e).faithfulness[0]) for e in ("rank", "keep")
            ]
            print(
                f"{name:12s} {number:6d} {circuit.unexplained:9.2f} {errors:7.2f} {circuit.graph_replacement:12.2f} "
                f"{circuit.graph_completeness:13.2f} {found[0]:13.2f} {found[1]:17.2f}"
            )


if __name__ == "__main__":
    main()
