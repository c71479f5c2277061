"""The rows of `python -m tests.benchmarks`: each a piece of work beside a reference, on one model, in one process.

A row's `build` gives the two callables; how long they take is measured by `measuring`, alternating. Sizes are chosen so
that the whole table takes minutes on two cores; `quick` makes them smaller to see that a row still runs.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tl_neuron_circuits as tnc
from tests.benchmarks import curve_cost, edges, relp_cost
from tests.benchmarks.curve_cost import counted
from tests.families import build_bridge_from_module
from tests.methods import with_steps
from tl_neuron_circuits.lasso._solver import largest_penalty, solve_lasso
from tl_neuron_circuits.lasso._statistics import Accumulator, standardize
from tl_neuron_circuits.nodes import Patching
from tl_neuron_circuits.tasks import TokenizedPairs, tokenize


@dataclass
class Pair:
    """Work beside its reference; `per` divides the ratio, for work that does the reference's job many times."""

    work: Callable[[], Any]
    reference: Callable[[], Any]
    per: float = 1.0
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the table. `limit` is what it must not exceed; `memory` whether peaks are measured as well."""

    name: str
    work: str
    reference: str
    build: Callable[[bool], Pair]
    limit: float | None = None
    memory: bool = False
    rounds: int = 5
    memory_limit: float | None = None


def no_grad(work: Callable[[], Any]) -> Callable[[], Any]:
    return torch.no_grad()(work)


def gpt2(quick: bool, backend: str = "HookedTransformer", d_vocab: int = relp_cost.D_VOCAB) -> tuple[Any, Any]:
    """A random GPT-2-like model, 12 layers and 768 wide, and 8 prompts of 32 tokens."""
    there = relp_cost.HookedTransformer is not None and backend == "HookedTransformer"
    backend = backend if there or backend != "HookedTransformer" else "TransformerBridge"
    return relp_cost.model_of(backend, *((2, 128) if quick else (12, 768)), d_vocab), relp_cost.tokens_of()


def random_pairs(tokens: torch.Tensor, n: int) -> TokenizedPairs:
    many = tokens.repeat(-(-n // len(tokens)), 1)[:n]
    return TokenizedPairs.from_tokens(many, many[:, 0], many.flip(1), many[:, 1])


def relp_over(
    reference: str, backend: str = "HookedTransformer", d_vocab: int = relp_cost.D_VOCAB
) -> Callable[[bool], Pair]:
    def build(quick: bool) -> Pair:
        model, tokens = gpt2(quick, backend, d_vocab)
        references = {"forward": no_grad(lambda: model(tokens)), "both": lambda: relp_cost.plain(model, tokens)}
        return Pair(lambda: relp_cost.propagated(model, tokens), references[reference])

    return build


def attribute_over_passes(quick: bool) -> Pair:
    model, tokens = gpt2(quick)
    pairs = random_pairs(tokens, 8)
    forward = no_grad(lambda: model(tokens))

    def bare() -> None:
        forward()  # the corrupt prompts
        relp_cost.propagated(model, tokens)

    return Pair(lambda: tnc.attribute(model, pairs, batch_size=8), bare)


def method_over_relp(method: str) -> Callable[[bool], Pair]:
    def build(quick: bool) -> Pair:
        model = relp_cost.model_of("TransformerBridge" if relp_cost.HookedTransformer is None else "HookedTransformer",
                                   *((2, 64) if quick else (6, 256)))  # fmt: skip
        pairs = random_pairs(relp_cost.tokens_of(), 8)
        work = lambda: tnc.attribute(model, pairs, method=with_steps(method, 2 if quick else 10))  # noqa: E731
        return Pair(work, lambda: tnc.attribute(model, pairs))

    return build


def demo(task: str, n: int) -> tuple[Any, Any]:
    return tnc.load_demo_model(), tnc.tasks.subject_verb_agreement(task, n=n)


def patching_over_relp(quick: bool) -> Pair:
    model, pairs = demo("simple", 16)
    scores = tnc.attribute(model, pairs)
    some = scores.to_dataframe().sample(16 if quick else 128, random_state=0)
    share = len(some) / len(scores)
    note = f"a sample of {len(some)} of {len(scores):,} neurons, times the rest"
    work = lambda: tnc.attribute(model, pairs, method=Patching(some))  # noqa: E731
    return Pair(work, lambda: tnc.attribute(model, pairs), per=share, note=note)


def curve_over_forwards(quick: bool) -> Pair:
    n = 8 if quick else 64
    model, pairs = demo("nounpp", 2 * n)
    train, test = pairs.split(0.5, by="label")
    return curve_of(model, test[:n], tnc.attribute(model, train))


def curve_of_gpt2(quick: bool) -> Pair:
    (model, _), n, length = gpt2(quick), 8 if quick else 16, 8
    return curve_of(model, curve_cost.random_pairs(n, length), tnc.attribute(model, curve_cost.random_pairs(4, length)))


def curve_of(model: Any, test: Any, scores: tnc.NodeScores) -> Pair:
    runs = curve_cost.work_and_reference(model, test, scores)
    forwards, _ = counted(model, runs["curve"])
    return Pair(runs["curve"], runs["forwards"], note=f"20 sizes, {len(test)} pairs, {forwards} forwards")


def compare_over_parts(quick: bool) -> Pair:
    model, pairs = demo("simple", 16 if quick else 64)
    train, test = pairs.split(0.5, by="label")
    bases, sizes = [tnc.bases.Neurons(), tnc.bases.MLPOutputs()], [1, 10] if quick else None
    work = lambda: tnc.compare(model, train, test, bases=bases, methods=["relp", "gradient"], sizes=sizes)  # noqa: E731
    forwards, _ = counted(model, work)
    (batch, *_) = tokenize(model, test).batches(64)

    @torch.no_grad()
    def reference() -> None:
        for _ in range(forwards):
            model(batch.clean)

    return Pair(work, reference, note=f"2 bases, 2 methods, {forwards} forwards, 4 of them with a backward")


def edges_over_passes(quick: bool) -> Pair:
    model = edges.random_model(*((2, 64) if quick else (12, 256)))
    tokens, nodes = edges.random_tokens(model, 1, 12), 20 if quick else 200
    circuit = tnc.trace(model, tokens, nodes=nodes)
    reference = lambda: relp_cost.propagated(model, tokens)  # noqa: E731
    note = f"{len(circuit.edges):,} edges between {nodes} nodes, a target"
    return Pair(lambda: tnc.trace(model, tokens, nodes=nodes), reference, per=nodes, note=note)


def edges_in_chunks(quick: bool) -> Pair:
    """A chunk of targets against one forward and backward pass of the prompt, whose graph they share."""
    model = edges.random_model(*((2, 64) if quick else (12, 768)))
    tokens, nodes = edges.random_tokens(model, 1, 12), 20 if quick else 200
    work = lambda: tnc.trace(model, tokens, nodes=nodes, max_bytes=2**24)  # noqa: E731
    circuit = work()
    targets, chunk = int(circuit.nodes["kind"].isin(["neuron", "logit"]).sum()), circuit.settings["chunk"]
    note = f"12 x 768, {targets} targets in chunks of {chunk}"
    return Pair(work, lambda: relp_cost.propagated(model, tokens), per=targets / chunk, note=note)


def edges_over_prompts(quick: bool) -> Pair:
    """All targets of a circuit against as many prompts, forward and backward: a target costs no more than a prompt."""
    model = edges.random_model(*((2, 64) if quick else (12, 256)))
    tokens, nodes = edges.random_tokens(model, 1, 12), 20 if quick else 200
    chunk = tnc.trace(model, tokens, nodes=nodes).settings["chunk"]
    many = tokens.repeat(nodes, 1)
    note = f"{nodes} targets, at most {chunk} in a chunk; {nodes} prompts"
    return Pair(lambda: tnc.trace(model, tokens, nodes=nodes), lambda: relp_cost.propagated(model, many), note=note)


def steering_over_forward(quick: bool) -> Pair:
    model, pairs = demo("nounpp", 16)
    scores = tnc.attribute(model, pairs)
    (batch, *_) = tokenize(model, pairs).batches(16)
    hooks = tnc.steering_hooks(model, scores.top(50), scale=0)
    steered = no_grad(lambda: model.run_with_hooks(batch.clean, fwd_hooks=hooks))
    many = lambda work: [work() for _ in range(2 if quick else 20)]  # noqa: E731
    plain = no_grad(lambda: model(batch.clean))
    return Pair(lambda: many(steered), lambda: many(plain), note="50 neurons in 4 layers")


def lasso_over_sklearn(quick: bool) -> Pair:
    import numpy as np

    from tests.benchmarks.lasso import by_path, draw, prepared, structure

    units, n = (60, 500) if quick else (500, 20_000)
    weights, allowed = structure(units)
    x = draw(weights, n, seed=0)

    def ours() -> Any:
        accumulator = Accumulator()
        for batch in x.split(8192):
            accumulator.add(batch)
        problem = standardize(accumulator.total())
        penalty = 0.05 * largest_penalty(problem, allowed)
        return penalty, solve_lasso(problem, penalty, allowed=allowed, tolerance=1e-6)

    penalty, _ = ours()

    def loop() -> None:
        standard, gram = prepared(x)
        for target in np.flatnonzero(allowed.any(0).numpy()):
            by_path(standard, gram, allowed[:, target].numpy(), int(target), penalty / (2 * n))

    return Pair(ours, loop, note=f"{units} units, {n:,} observations, Gram included on both sides")


def training_over_forward(quick: bool) -> Pair:
    from tl_neuron_circuits.demo.train_dictionaries import CONFIG, demo_documents
    from tl_neuron_circuits.transcoders import train

    model, steps = tnc.load_demo_model(), 3 if quick else 20
    pad = int(model.tokenizer.pad_token_id)
    tokens = demo_documents(model, 512 if quick else 2048, seed=1)
    config = CONFIG.replace(ignore_tokens=(pad,), steps=steps, log_every=steps, buffer_size=0)
    positions, batch = steps * config.batch_size, tokens[:64]
    times = positions / int((batch != pad).sum())

    @torch.no_grad()
    def forwards() -> None:
        for _ in range(max(1, round(times))):
            model(batch)

    note = f"{model.cfg.n_layers} layers, {positions:,} positions"
    return Pair(lambda: train(model, tokens, config, verbose=False), forwards, note=note)


def html_over_trace(quick: bool) -> Pair:
    model, pairs = demo("simple", 2)
    prompt = pairs.clean[0]
    circuit = tnc.trace(model, prompt, nodes=20 if quick else 150)
    path = Path(tempfile.mkdtemp()) / "circuit.html"
    circuit.to_html(path)
    note = f"{len(circuit)} neurons, {len(circuit.edges):,} edges, {path.stat().st_size / 1e6:.1f} MB"
    return Pair(lambda: circuit.to_html(path), lambda: tnc.trace(model, prompt, nodes=20 if quick else 150), note=note)


def many_over_few(quick: bool) -> Pair:
    few, many = (16, 64) if quick else (64, 4096)
    model = relp_cost.model_of("TransformerBridge" if relp_cost.HookedTransformer is None else "HookedTransformer",
                               *((2, 64) if quick else (2, 128)))  # fmt: skip
    tokens = relp_cost.tokens_of()[:, :16]
    work, reference = (lambda n=n: tnc.attribute(model, random_pairs(tokens, n)) for n in (many, few))
    return Pair(work, reference, per=many / few, note=f"{many:,} prompts and {few}; time per prompt")


BOTH, IN_ATTRIBUTE, IG = "forward + backward", "RelP, both in `attribute`", "integrated_gradients"
BRIDGE, GPT2 = "TransformerBridge", "GPT-2's vocabulary of 50,257"
ALL = [
    Row("relp/forward", "RelP, four rules, checks", "one forward", relp_over("forward")),
    Row("relp", "RelP, four rules, checks", BOTH, relp_over("both"), 0.95, True, 9, 0.8),
    Row("relp-bridge", f"RelP on {BRIDGE}", BOTH, relp_over("both", BRIDGE), 0.95, True, 9, 0.8),
    Row("relp-50257", f"RelP, {GPT2}", BOTH, relp_over("both", d_vocab=relp_cost.GPT2_VOCAB), 0.95, True, 9, 0.8),
    Row(
        "relp-bridge-50257",
        f"RelP on {BRIDGE}, {GPT2}",
        BOTH,
        relp_over("both", BRIDGE, relp_cost.GPT2_VOCAB),
        0.95,
        True,
        9,
        0.8,
    ),
    Row("attribute", "`attribute`, scores included", "its bare passes", attribute_over_passes, 1.1, True, 7),
    Row("ig-10", "IG-10, layer by layer", IN_ATTRIBUTE, method_over_relp(IG), rounds=2),
    Row("ig-10-inputs", "IG-10 over inputs", IN_ATTRIBUTE, method_over_relp(f"{IG}_inputs"), rounds=3),
    Row("patching", "exact patching of every neuron", IN_ATTRIBUTE, patching_over_relp, rounds=3),
    Row("curve", "`evaluate`, a whole curve", "45 forwards of the batch", curve_over_forwards, 1.0, rounds=9),
    Row("curve-gpt2", "`evaluate`, 12 x 768", "45 forwards of the batch", curve_of_gpt2, 1.0, rounds=3),
    Row("compare", "`compare`", "as many bare forwards", compare_over_parts, rounds=3),
    Row("edges", "`trace`, a target of an edge", "RelP forward + backward", edges_over_passes, rounds=3),
    Row("edges-share", "`trace`, a chunk of targets", f"RelP {BOTH}", edges_in_chunks, 1.3, rounds=3),
    Row("edges-chunk", "`trace`, all edges", f"RelP {BOTH}, one prompt per target", edges_over_prompts, 1.3, rounds=3),
    Row("steering", "a steered forward", "a forward", steering_over_forward),
    Row("lasso", "CircuitLasso, all targets", "scikit-learn `lasso_path`", lasso_over_sklearn, rounds=2),
    Row("transcoders", "training transcoders", "forwards of as many positions", training_over_forward, rounds=2),
    Row("html", "`to_html`", "the `trace` it shows", html_over_trace, rounds=3),
    Row("streaming", "`attribute` on many prompts", "on few", many_over_few, 1.1, True, 2, 1.1),
]
ROWS: dict[str, Row] = {
    row.name: row for row in ALL if not row.name.startswith("relp-bridge") or build_bridge_from_module is not None
}
