"""Every kind of circuit meets every method: each works or says what it needs, and none fails in another way."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

import tl_neuron_circuits as tnc
from tests.families import MAJOR
from tl_neuron_circuits._typing import ArgumentError
from tl_neuron_circuits.bases import Dictionaries

PROMPT = "The capital of the state containing Dallas is"
PROMPTS = [PROMPT, "The capital of Texas is"]
CUT = (1, 0, 5, 3)  # layer, head, query, key


@cache
def model() -> Any:
    return tnc.load_demo_model()


@cache
def pairs() -> tnc.PromptPairs:
    return tnc.tasks.subject_verb_agreement("simple", n=8)


@cache
def features(kind: str) -> Dictionaries:
    return Dictionaries(tnc.load_demo_dictionaries(kind))


def reloaded(circuit: Any) -> Any:
    folder = Path(mkdtemp()) / "saved"
    circuit.save(folder)
    return type(circuit).load(folder)


def through_neuronpedia(circuit: tnc.Circuit) -> tnc.Circuit:
    path = Path(mkdtemp()) / "graph.json"
    circuit.to_neuronpedia(path)
    return tnc.Circuit.from_neuronpedia(path)


def of_a_regression() -> Any:
    nodes = tnc.lasso.Components(attention="layers")
    method = tnc.lasso.CircuitLasso(penalty=tnc.lasso.Share(0.5), nodes=nodes, regressors="same")
    return method.fit(model(), pairs())


def of_weights() -> tnc.Circuit:
    dictionaries = tnc.load_demo_dictionaries("transcoder")
    best = tnc.attribute(model(), tnc.demo.capitals(n=8), basis=Dictionaries(dictionaries)).to_dataframe()
    row = best[best["layer"] == 3].iloc[0]
    return tnc.transcoders.trace_feature(model(), dictionaries, PROMPT, f"L3/F{row['unit']}@-1")


def traced(*args: Any, **options: Any) -> tnc.Circuit:
    return tnc.trace(model(), *args, nodes=12, **options)


KINDS: dict[str, Callable[[], Any]] = {
    "prompt": lambda: traced(PROMPT, " Austin"),
    "prompts, summed": lambda: traced(PROMPTS, positions="sum"),
    "pairs": lambda: traced(pairs()),
    "pairs, summed": lambda: traced(pairs(), positions="sum"),
    "SAE features": lambda: traced(PROMPT, " Austin", basis=features("sae")),
    "SAE features of pairs": lambda: traced(pairs(), basis=features("sae")),
    "transcoder features": lambda: traced(PROMPT, " Austin", basis=features("transcoder")),
    "with heads": lambda: traced(PROMPT, " Austin").with_heads(20),
    "regression": of_a_regression,
    "regression, plain": lambda: of_a_regression().to_circuit(),
    "weights": of_weights,
    "collapsed": lambda: (c := traced(PROMPT, " Austin")).group({"some": sorted(c.members)[:4]}).collapse(),
    "summed later": lambda: traced(PROMPT, " Austin").sum_positions(),
    "merged": lambda: traced(PROMPT, " Austin") | tnc.trace(model(), PROMPT, " Austin", nodes=20),
    "prompt, loaded": lambda: reloaded(traced(PROMPT, " Austin")),
    "pairs, loaded": lambda: reloaded(traced(pairs())),
    "SAE features, loaded": lambda: reloaded(traced(PROMPT, " Austin", basis=features("sae"))),
    "regression, loaded": lambda: reloaded(of_a_regression()),
    "Neuronpedia's": lambda: through_neuronpedia(traced(PROMPT, " Austin")),
}
ALWAYS: dict[str, Callable[[Any], Any]] = {
    "repr": repr,
    "len": len,
    "notebook view": lambda c: c._repr_html_(),
    "notes": lambda c: c.notes,
    "shares": lambda c: (c.target_value, c.unexplained, c.graph_replacement, c.graph_completeness, c.graph_scores()),
    "layers": lambda c: c.layers(),
    "spans": lambda c: c.spans(),
    "prune": lambda c: (c.prune(count=3), c.prune(share=0.01), c.prune(edges=5)),
    "label": lambda c: c.label({min(c.members): "x"}),
    "group": lambda c: c.group({"new": sorted(c.members)[:2]}).collapse(),
    "jaccard": lambda c: c.jaccard(traced(PROMPT, " Austin")),
    "table": lambda c: c.to_dataframe(),
    "graph": lambda c: c.graph(),
    "plot": lambda c: c.plot(),
    "page": lambda c: c.to_html(Path(mkdtemp()) / "page.html"),
    "save": reloaded,
}
WHERE_IT_FITS: dict[str, Callable[[Any], Any]] = {
    "on_prompt": lambda c: c.on_prompt(0),
    "prune by flow": lambda c: c.prune(relative=0.01),
    "prune by influence": lambda c: c.prune(node_influence=0.8, edge_influence=0.9),
    "at_fdr": lambda c: c.at_fdr(0.1, null="pairs"),
    "describe": lambda c: c.describe(),
    "describe by model": lambda c: c.describe(model=model()),
    "describe by texts": lambda c: c.describe(tnc.demo.capitals(n=8).clean, model=model()),
    "groups": lambda c: c.describe(groups=3, model=model()),
    "collapse": lambda c: c.collapse(),
    "sum_positions": lambda c: c.sum_positions(),
    "merge with itself": lambda c: tnc.Circuit.merge([c, c]),
    "merge with another": lambda c: traced(PROMPT, " Austin") & c,
    "scores": lambda c: c.to_scores(),
    "with_heads": lambda c: c.with_heads(5),
    "with_heads by model": lambda c: c.with_heads(5, model=model()),
    "heads": lambda c: c.heads(model=model()),
    "heads of other pairs": lambda c: c.heads(model=model(), pairs=pairs()),
    "a model for edges": lambda c: c.with_heads(model()),
    "attention": lambda c: c.attention(CUT),
    "attention by model": lambda c: c.attention(CUT, model=model()),
    "attention of an edge": lambda c: c.attention((c.edges["source"][0], c.edges["target"][0]), model=model()),
    "cut_heads": lambda c: c.cut_heads(),
    "cut_heads by model": lambda c: c.cut_heads(model=model()),
    "names for rows": lambda c: c.cut_heads(["L0H0"], model=model()),
    "Neuronpedia": through_neuronpedia,
    "steer": lambda c: tnc.steer(model(), PROMPT, c, scale=0.0),
    "steering_hooks": lambda c: tnc.steering_hooks(model(), c, scale=0.0),
    "sweep": lambda c: tnc.sweep(model(), PROMPT, c, scales=[0.0, 1.0]),
    "evaluate": lambda c: tnc.evaluate(model(), pairs(), c.to_scores()),
    "direct_logit_effects": lambda c: tnc.direct_logit_effects(model(), c),
    "profiles": lambda c: tnc.profiles(model(), PROMPT, c),
    "max_activating_examples": lambda c: tnc.max_activating_examples(model(), PROMPTS, c),
}
OF_NEURONS = ("prompt", "prompts, summed", "pairs", "pairs, summed", "with heads", "summed later")


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_works_or_says_what_it_needs(kind: str) -> None:
    if MAJOR < 3 and kind in ("transcoder features", "weights"):
        pytest.skip("the demo transcoders read the norm before its weight, where TransformerLens 2 has no hook point")
    circuit, said = KINDS[kind](), {}
    for name, call in (ALWAYS | WHERE_IT_FITS).items():
        try:
            call(circuit)
        except (tnc.NeuronCircuitsError, ArgumentError) as error:  # anything else is a failure
            said[name] = str(error)
    assert not set(said) & set(ALWAYS), said
    if kind in OF_NEURONS:
        needed = {"describe", "describe by texts", "groups", "scores", "steer", "sweep", "direct_logit_effects"}
        assert not set(said) & needed, said
    if "features" in kind and "loaded" not in kind:
        assert not set(said) & {"describe", "describe by texts", "scores", "steer", "with_heads"}, said


def test_dictionaries_of_a_loaded_circuit_are_asked_for_where_edges_are_split() -> None:
    circuit = KINDS["SAE features"]()
    folder = Path(mkdtemp()) / "saved"
    circuit.save(folder)
    with pytest.raises(tnc.SettingsError, match="circuit is of 'sae'; got 'neurons'"):
        tnc.Circuit.load(folder).heads(5, model=model())
    again = tnc.Circuit.load(folder, basis=features("sae")).heads(5, model=model())
    assert again.equals(circuit.heads(5))


def test_a_regression_is_no_part_of_a_mean() -> None:
    circuit = of_a_regression()
    for mean in (lambda: tnc.Circuit.merge([circuit, circuit]), lambda: circuit | circuit, lambda: circuit & circuit):
        with pytest.raises(tnc.SettingsError, match="the regression of neither"):
            mean()
    assert len(tnc.Circuit.merge([circuit.to_circuit()] * 2)) == len(circuit)
