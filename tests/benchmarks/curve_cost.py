"""What a sparsity curve costs in forwards: 20 sizes with completeness for 64 pairs, at most 45.

    python -m tests.benchmarks.curve_cost [--model demo-gelu] [--pairs 64]

The reference is as many plain forwards of the same batch, in the same run.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

import tl_neuron_circuits as tnc
from tl_neuron_circuits.bases import Basis, Dictionaries, MLPOutputs, Neurons
from tl_neuron_circuits.tasks import tokenise

MOST_FORWARDS = 45


def counted(model: Any, work: Callable[[], object]) -> tuple[int, float]:
    """Forwards of the model, and CPU seconds."""
    forwards: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    start = time.process_time()
    work()
    seconds = time.process_time() - start
    handle.remove()
    return len(forwards), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-gelu")
    parser.add_argument("--pairs", type=int, default=64)
    options = parser.parse_args()
    model = tnc.load_demo_model(options.model)
    train, test = tnc.tasks.subject_verb_agreement("nounpp", n=2 * options.pairs).split(0.5, by="label")
    (batch, *_) = tokenise(model, test[: options.pairs]).batches(options.pairs)
    bases: dict[str, Basis | list[Basis]] = {"neurons": Neurons(), "mlp_outputs": MLPOutputs()}
    if options.model == "demo-gelu" and (found := tnc.load_demo_dictionaries("transcoder")):
        bases["transcoder"] = Dictionaries(found)

    def forwards(n: int) -> None:
        with torch.no_grad():
            for _ in range(n):
                model(batch.clean)

    forwards(5)
    for name, basis in bases.items():
        scores = tnc.attribute(model, train, basis=basis)
        n, seconds = counted(model, lambda s=scores: tnc.evaluate(model, test[: options.pairs], s, batch_size=64))
        _, plain = counted(model, lambda n=n: forwards(n))
        print(f"{name}: {n} forwards, {seconds:.2f} s; {n} plain forwards {plain:.2f} s; ratio {seconds / plain:.2f}")
        if n > MOST_FORWARDS:
            raise SystemExit(f"expected at most {MOST_FORWARDS} forwards; counted {n}.")


if __name__ == "__main__":
    main()
