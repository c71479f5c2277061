"""What a step of a learned mask costs beside a plain forward and backward pass.

    python -m tests.benchmarks.learned_mask

SmolLM2, 8 prompts of nounpp, one thread. Plain: the metric's gradient at the embeddings, parameters frozen. A step: the
threshold, the masked run, its gradient at every node's mask, and Adam's update. Rounds alternate in one process, and
each ratio is the median of rounds; bytes are those of tensors alive at once, the counterfactual values included.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from tests.study.cases import load, parts_of
from tl_neuron_circuits import LearnedMask
from tl_neuron_circuits._memory import Halving
from tl_neuron_circuits._meter import Meter
from tl_neuron_circuits._processes import current_processes
from tl_neuron_circuits.bases._activations import Neurons
from tl_neuron_circuits.bases._runs import answers_only, run_logits
from tl_neuron_circuits.bases._site import basis_sites
from tl_neuron_circuits.models._threads import hooked
from tl_neuron_circuits.nodes._masked_pairs import MaskedPairs
from tl_neuron_circuits.nodes._saved_learning import Learning
from tl_neuron_circuits.nodes._scope import Scope
from tl_neuron_circuits.propagation._relp import frozen
from tl_neuron_circuits.tasks import logit_difference, tokenize

ROUNDS, STEPS = 9, 500


def plain_pass(model: Any, tokens: Any) -> Callable[[], None]:
    """A forward and a backward pass of 8 prompts."""
    batch = next(tokens.batches(8))

    def run() -> None:
        def leaf(value: torch.Tensor, hook: Any) -> torch.Tensor:
            found.append(value.detach().requires_grad_(True))
            return found[0]

        found: list[torch.Tensor] = []
        with torch.enable_grad(), frozen(model), hooked(model, [("blocks.0.hook_resid_pre", leaf)]):
            with answers_only(model, batch, logit_difference) as narrowed:
                metric = logit_difference(run_logits(model, batch.clean, batch.attention_mask), narrowed)
            torch.autograd.grad(metric.sum(), found[0])

    return run


def mask_step(model: Any, tokens: Any, cache: str) -> Callable[[], None]:
    """One step on the same prompts, as `LearnedMask.learn` takes it."""
    method = LearnedMask(cache=cache)
    scope = Scope(model, basis_sites(model, Neurons()), logit_difference, "corrupt", "noising", "keep", "keep")
    pairs = MaskedPairs(method, scope, tokens, None, current_processes(), Halving(8, False), cache)
    n = sum(shape.numel() for shape in pairs.shapes.values())
    state = Learning(torch.zeros(n), torch.zeros(n), torch.zeros(n), [], torch.zeros(n), [])
    draws = method._draws(len(tokens), n)

    def run() -> None:
        _, budget = next(draws)
        method._step(state, pairs, list(range(8)), budget, method.temperature)

    return run


def bytes_held(run: Callable[[], None]) -> int:
    with Meter() as meter:
        run()
    return meter.peak


def seconds(run: Callable[[], None]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def main() -> None:
    torch.set_num_threads(1)
    model = load("smollm2")
    tokens = tokenize(model, parts_of("smollm2", "nounpp").learn[:8])
    plain = plain_pass(model, tokens)
    plain()
    peak = bytes_held(plain)
    for cache, name in (("always", "cached"), ("never", "run again")):
        with Meter() as meter:
            step = mask_step(model, tokens, cache)
            step()
        rounds = [(seconds(plain), seconds(step)) for _ in range(ROUNDS)]
        ratio = statistics.median(second / first for first, second in rounds)
        each = statistics.median(second for _, second in rounds)
        print(
            f"{name}: {ratio:.2f} x the time of forward and backward ({each:.2f} CPU s a step, {STEPS} steps "
            f"{STEPS * each / 60:.1f} min), {bytes_held(step) / peak:.2f} x the bytes in a step, "
            f"{meter.peak / peak:.2f} x with what is set up before",
            flush=True,
        )


if __name__ == "__main__":
    main()
