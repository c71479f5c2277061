"""What a sparsity curve costs: 20 sizes with completeness for 64 pairs, at most 45 forwards of the same batch.

    python -m tests.benchmarks.curve_cost [--model demo-gelu] [--pairs 64] [--rounds 9]
    python -m tests.benchmarks.curve_cost --model random [--backend TransformerBridge] [--tokens 16] [--rounds 1]

Two numbers: how many forwards, and CPU seconds of the whole call (tokens, masks, hooks, metric) over those of 45 plain
forwards of the batch, in turn, in one process; the median of the rounds' ratios and its range. "random" is GPT-2's
shape, 12 layers of 768, with random weights and prompts.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import tl_neuron_circuits as tnc
from tests.benchmarks import relp_cost
from tl_neuron_circuits.bases import Dictionaries, MLPOutputs, Neurons
from tl_neuron_circuits.bases._site import Basis
from tl_neuron_circuits.tasks import TokenizedPairs, tokenize

MOST_FORWARDS = 45
Case = tuple[str, Any, Any, tnc.NodeScores]


def counted(model: Any, work: Callable[[], object]) -> tuple[int, float]:
    """Forwards of the model, and CPU seconds."""
    forwards: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    start = time.process_time()
    work()
    seconds = time.process_time() - start
    handle.remove()
    return len(forwards), seconds


def random_pairs(n: int, length: int, seed: int = 0) -> TokenizedPairs:
    """Pairs of random prompts for `relp_cost.model_of`; each prompt's contrast is the prompt reversed."""
    tokens = torch.randint(0, relp_cost.D_VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))
    return TokenizedPairs.from_tokens(tokens, tokens[:, 0], tokens.flip(1), tokens[:, 1])


def work_and_reference(model: Any, test: Any, scores: tnc.NodeScores) -> dict[str, Callable[[], object]]:
    """A curve over all pairs in one batch, and as many plain forwards as it may cost."""
    n = len(test)
    (batch,) = tokenize(model, test).batches(n)

    @torch.no_grad()
    def forwards() -> None:
        for _ in range(MOST_FORWARDS):
            model(batch.clean)

    return {"curve": lambda: tnc.evaluate(model, test, scores, batch_size=n), "forwards": forwards}


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Name, model, pairs and scores."""
    if options.model == "random":
        model, test = relp_cost.model_of(options.backend, 12, 768), random_pairs(options.pairs, options.tokens)
        scores = tnc.attribute(model, random_pairs(4, options.tokens, seed=1))
        yield f"neurons, {options.backend}", model, test, scores
        return
    model = tnc.load_demo_model(options.model)
    train, test = tnc.tasks.subject_verb_agreement("nounpp", n=2 * options.pairs).split(0.5, by="label")
    bases: dict[str, Basis | list[Basis]] = {"neurons": Neurons(), "mlp_outputs": MLPOutputs()}
    if options.model == "demo-gelu" and (found := tnc.load_demo_dictionaries("transcoder")):
        bases["transcoder"] = Dictionaries(found)
    for name, basis in bases.items():
        yield name, model, test[: options.pairs], tnc.attribute(model, train, basis=basis)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-gelu", help='a demo model, or "random"')
    parser.add_argument("--backend", default="HookedTransformer", help="of the random model")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16, help="of a random prompt")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, model, test, scores in cases(options):
        runs = work_and_reference(model, test, scores)
        n, _ = counted(model, runs["curve"])
        seconds = relp_cost.alternating(runs, options.rounds)
        ratios = [curve / plain for curve, plain in zip(seconds["curve"], seconds["forwards"], strict=True)]
        ours, theirs = (statistics.median(seconds[what]) for what in ("curve", "forwards"))
        shown = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(
            f"{name}: {n} forwards, {ours:.2f} s; {MOST_FORWARDS} plain ones {theirs:.2f} s; ratio {shown}", flush=True
        )
        if n > MOST_FORWARDS:
            raise SystemExit(f"expected at most {MOST_FORWARDS} forwards; counted {n}.")


if __name__ == "__main__":
    main()
