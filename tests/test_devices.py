"""A model spread over two devices gives what it gives on one, and no operation mixes tensors of both.

The devices are fake (`tests/fake_devices.py`): they hold their numbers on the CPU and refuse what CUDA refuses. So
these tests show where tensors live; not speed, memory or a GPU's kernels.
"""

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.bases.site_dictionaries import dictionaries, dictionary
from tests.bases.tiny_dictionaries import RANDOM, tiny_dictionaries
from tests.fake_devices import SECOND, fake_devices
from tests.families import N_LAYERS, ModelCase, model_cases, random_tokens
from tests.methods import with_steps
from tests.two_devices import TwoDevices, home
from tl_neuron_circuits import (
    Circuit,
    NodeScores,
    attribute,
    check_model,
    compare,
    direct_logit_effects,
    estimate_memory,
    evaluate,
    interchange,
    lasso,
    max_activating_examples,
    node_values,
    profiles,
    prompt_scores,
    relp,
    steer,
    steering_hooks,
    sweep,
    trace,
    transcoders,
)
from tl_neuron_circuits.bases import (
    AttentionBlockOutputs,
    Dictionaries,
    HeadOutputs,
    MLPOutputs,
    Neurons,
    ResidualStream,
)
from tl_neuron_circuits.components import EdgeScores, component_edges
from tl_neuron_circuits.evaluation import evaluate_edges
from tl_neuron_circuits.nodes import Patching, activation_variance
from tl_neuron_circuits.tasks import TokenizedPairs, logit_difference
from tl_neuron_circuits.transcoders import TrainingConfig

pytestmark = RANDOM
CASES = model_cases("gpt2", "llama")
ONE_A_CLASS = [case for case in CASES if (case.family == "llama") == (case.backend == "HookedTransformer")]
POSTS = [f"blocks.{layer}.mlp.hook_post" for layer in range(N_LAYERS)]


@functools.cache
def built(case: ModelCase) -> TwoDevices:
    return TwoDevices(case)


@pytest.fixture(params=CASES, ids=lambda case: case.id)
def each(request: Any) -> TwoDevices:
    return built(request.param)


@pytest.fixture(params=ONE_A_CLASS, ids=lambda case: case.id)
def both(request: Any) -> TwoDevices:
    return built(request.param)


def in_turn(paths: Mapping[str, Any], first: int = 0) -> pytest.MarkDecorator:
    """Each path through one model class: HookedTransformer and Bridge in turn, where there are both."""
    cases = []
    for turn, (name, path) in enumerate(paths.items(), first):
        case = ONE_A_CLASS[turn % len(ONE_A_CLASS)]
        cases.append(pytest.param(case, path, id=f"{name}-{case.id}"))
    return pytest.mark.parametrize(("both", "path"), cases, indirect=["both"])


def test_the_model_is_on_two_devices(each: TwoDevices) -> None:
    for layer in range(N_LAYERS):
        assert {p.device for p in each.spread.blocks[layer].parameters()} == {home(layer)}
    assert len({p.device for p in each.spread.parameters()}) == 2
    each.agree(lambda model, pairs: model(torch.stack(list(pairs.clean))))


def test_relp_takes_gradients_across(both: TwoDevices) -> None:
    def run(model: Any, pairs: TokenizedPairs) -> Any:
        kept: dict[str, Tensor] = {}
        hooks = [(name, lambda value, hook, name=name: kept.update({name: value})) for name in POSTS]
        batch = next(pairs.batches(6))
        with relp(model), model.hooks(fwd_hooks=hooks):
            metric = logit_difference(model(batch.clean), batch)
            gradients = torch.autograd.grad(metric.sum(), [kept[name] for name in POSTS])
        return [metric, *gradients, check_model(model).conservation]

    _, *gradients, _ = both.agree(run)
    assert [gradient.device for gradient in gradients] == [home(layer) for layer in range(N_LAYERS)]


METHODS = [
    "relp",
    "gradient",
    "integrated_gradients",
    "integrated_gradients_inputs",
    "patching",
    "learned_mask",
    "mask_gradient",
    "activation_difference",
]


@in_turn({method: method for method in (*METHODS, "random")})
def test_every_method_scores_each_layer_where_it_lives(both: TwoDevices, path: Any) -> None:
    settings: dict[str, Any] = {"positions": "sum"} if path == "patching" else {}
    scores = both.agree(lambda model, pairs: attribute(model, pairs, method=with_steps(path, 2), **settings))
    assert [scores.values[hook].device for hook in scores.values] == [home(layer) for layer in range(N_LAYERS)]


BASES = {
    "outputs": ([MLPOutputs(), HeadOutputs()], {"baseline": "zero"}),
    "writes": ([Neurons(), AttentionBlockOutputs()], {"baseline": "mean", "positions": "sum"}),
    "residual": (ResidualStream(), {"direction": "denoising"}),
    "sae_mlp_out": (dictionaries("sae_mlp_out"), {"baseline": "mean"}),
    "sae_residual": (dictionaries("sae_residual"), {"method": "integrated_gradients(steps=2)"}),
    "sae_attention": (dictionaries("sae_attention"), {"baseline": "zero"}),
    "transcoder": (dictionaries("transcoder"), {"method": "integrated_gradients_inputs(steps=2)"}),
    "skip_transcoder": (dictionaries("skip_transcoder"), {"positions": "sum"}),
}


@in_turn(BASES)
def test_every_basis(both: TwoDevices, path: Any) -> None:
    basis, settings = path
    both.agree(lambda model, pairs: attribute(model, pairs, basis=basis, batch_size=2, **settings))


@in_turn({"own encoder": None})
def test_a_dictionary_with_an_encoder_of_its_own(both: TwoDevices, path: None) -> None:
    both.agree(lambda model, pairs: attribute(model, pairs, basis=tiny_dictionaries("skip_transcoder", model)))


@in_turn({"second device": None}, first=1)
def test_dictionaries_on_one_device_serve_layers_on_both(both: TwoDevices, path: None) -> None:
    with fake_devices():
        there = Dictionaries([dictionary("sae_mlp_out", layer).to(SECOND) for layer in range(N_LAYERS)])
    bases = iter([dictionaries("sae_mlp_out"), there])
    both.agree(lambda model, pairs: attribute(model, pairs, basis=next(bases)))


def test_prompts_on_the_cpu(both: TwoDevices) -> None:
    def run(model: Any, pairs: TokenizedPairs) -> Any:
        scores = attribute(model, both.pairs)
        return scores, evaluate(model, both.pairs, scores, sizes=[5], completeness=False)

    both.agree(run)


CURVES = {
    "mean": (Neurons(), "mean", "sum"),
    "corrupt": (dictionaries("skip_transcoder"), "corrupt", "keep"),
    "resample": (dictionaries("sae_mlp_out"), "resample", "sum"),
}


@in_turn(CURVES)
def test_saved_scores_are_evaluated(both: TwoDevices, path: Any, tmp_path: Path) -> None:
    basis, ablation, positions = path

    def run(model: Any, pairs: TokenizedPairs) -> Any:
        attribute(model, pairs, basis=basis, positions=positions).save(tmp_path / "scores")
        scores = NodeScores.load(tmp_path / "scores")
        return scores, scores.map(), evaluate(model, pairs, scores, sizes=[10], ablation=ablation, basis=basis)

    both.agree(run)


@in_turn({"compare": None})
def test_compare(both: TwoDevices, path: None) -> None:
    settings: dict[str, Any] = {"methods": ("relp",), "sizes": [5], "bootstrap": 2}
    bases = [dictionaries("transcoder")]
    both.agree(lambda model, pairs: compare(model, pairs, pairs, bases=bases, **settings).to_dataframe())


@in_turn({"resume": None}, first=1)
def test_patching_of_chosen_nodes_and_resume(both: TwoDevices, path: None, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def run(model: Any, pairs: TokenizedPairs) -> Any:
        calls: list[int] = []

        def metric(logits: Any, batch: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise Stopped
            return logit_difference(logits, batch)

        again: dict[str, Any] = {"batch_size": 2, "metric": metric, "baseline": "mean", "positions": "sum"}
        again["resume"] = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        with pytest.raises(Stopped):
            attribute(model, pairs, **again)
        scores = attribute(model, pairs, **again)
        return scores, attribute(model, pairs, method=Patching(scores.top(5)), positions="sum").top(5)

    both.agree(run)


TRACES = {
    "neurons": (Neurons(), {"baseline": "corrupt"}),
    "relevance": (Neurons(), {"baseline": "zero", "target": 7}),
    "transcoder": (dictionaries("skip_transcoder"), {"baseline": "zero"}),
    "sae": (dictionaries("sae_residual"), {"baseline": "corrupt"}),
}


@in_turn(TRACES)
def test_trace_finds_the_same_nodes_and_edges(both: TwoDevices, path: Any, tmp_path: Path) -> None:
    basis, settings = path

    def run(model: Any, pairs: TokenizedPairs) -> Circuit:
        circuit = trace(model, pairs, basis=basis, nodes=8, **settings)
        circuit.save(tmp_path / "circuit")
        return circuit

    both.agree(run, n=1)


@in_turn({"traced": None}, first=1)
def test_a_traced_prompt_is_ablated_node_by_node_and_edge_by_edge(both: TwoDevices, path: None) -> None:
    def run(model: Any, pairs: TokenizedPairs) -> Any:
        circuit = trace(model, pairs.clean[0], nodes=6)
        curves = [evaluate_edges(model, pairs, circuit, protocol=p, sizes=[4]) for p in ("nodes", "edges")]
        return circuit, evaluate(model, pairs, circuit, sizes=[3]), curves

    both.agree(run)


EDGES = {"relp": "heads", "eap_ig_inputs": "heads", "patching": "layers", "acdc": "layers"}


@in_turn({method: (method, attention) for method, attention in EDGES.items()})
def test_component_edges(both: TwoDevices, path: Any, tmp_path: Path) -> None:
    method, attention = path

    def run(model: Any, pairs: TokenizedPairs) -> Any:
        edges = component_edges(model, pairs, method=method, attention=attention)
        edges.save(tmp_path / "edges")
        return EdgeScores.load(tmp_path / "edges"), edges.to_dataframe()

    both.agree(run)


LASSOS: dict[str, dict[str, Any]] = {
    "components": {"noise": 0.1},
    "earlier": {"regressors": "earlier", "readout": "metric", "nodes": lasso.Components(attention="layers")},
    "neurons": {"nodes": lasso.Components("layers", "neurons"), "readout": "logits", "regressors": "same"},
    "features": {"nodes": dictionaries("transcoder"), "readout": "answers"},
    "no readout": {"nodes": dictionaries("sae_mlp_out"), "readout": "none"},
}


@in_turn(LASSOS)
def test_circuit_lasso(both: TwoDevices, path: Any, tmp_path: Path) -> None:
    def run(model: Any, pairs: TokenizedPairs) -> Any:
        method = lasso.CircuitLasso(penalty=lasso.Share(0.5), blocks=2, skip_positions=1, tolerance=1e-3, **path)
        return method.fit(model, pairs, resume=tmp_path / f"{len(list(tmp_path.iterdir()))}")

    both.agree(run, n=8)


@in_turn({"pooled": None})
def test_pooled_features(both: TwoDevices, path: None) -> None:
    basis = dictionaries("sae_mlp_out")
    both.agree(lambda model, pairs: lasso.pooled_features(model, pairs, basis, skip_positions=1).values)


def tokens_for(model: Any, pairs: TokenizedPairs, batch: int, pos: int) -> Tensor:
    return random_tokens(model, batch, pos).to(pairs.answer.device)


SMALL: dict[str, Any] = {"d_dict": 12, "k": 3, "steps": 4, "batch_size": 16, "buffer_size": 64, "forward_rows": 4}


@in_turn({"transcoder": "transcoder", "sae": "sae"})
def test_transcoders_are_trained_and_judged(both: TwoDevices, path: Any, tmp_path: Path) -> None:
    def run(model: Any, pairs: TokenizedPairs) -> Any:
        tokens = tokens_for(model, pairs, 12, 8)
        config = TrainingConfig(target=path, dead_after=32, auxiliary_k=4, checkpoint_every=2, **SMALL)
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        transcoders.train(model, tokens, config, directory=folder, verbose=False)
        shutil.rmtree(max(folder.glob("checkpoint-*")))
        report = transcoders.train(model, tokens, config, directory=folder, resume=True, verbose=False)
        found = transcoders.fidelity(model, report.dictionaries, tokens[:4], rank=2)
        return [made.tensors() for made in report.dictionaries], found

    both.agree(run)


@in_turn({"weights": None}, first=1)
def test_transcoder_circuits(both: TwoDevices, path: None) -> None:
    made = [dictionary("skip_transcoder", layer) for layer in range(N_LAYERS)]

    def run(model: Any, pairs: TokenizedPairs) -> Any:
        prompt, tokens = pairs.clean[0], torch.stack(list(pairs.clean))
        return (
            transcoders.contributions(model, made, prompt, "L1/F2@-1"),
            transcoders.trace_feature(model, made, prompt, "L1/F2@-1", num_iters=2, num_branches=5),
            [transcoders.connections(model, made, 0, 1, head=head) for head in (None, (1, 2))],
            [transcoders.pull_back(model, made, "L1/F2", tokens=prompts) for prompts in (None, tokens)],
            [transcoders.deembed(model, made, "L1/F2", head=head) for head in (None, (0, 1))],
            transcoders.logit_weights(model, made, ["L0/F1", "L1/F2"]),
        )

    both.agree(run)


@in_turn({"neurons": Neurons(), "features": dictionaries("skip_transcoder")})
def test_steering(both: TwoDevices, path: Any) -> None:
    basis = path

    def run(model: Any, pairs: TokenizedPairs) -> Any:
        tokens, amounts = tokens_for(model, pairs, 3, 5), torch.arange(4.0).to(pairs.answer.device)
        found = attribute(model, pairs, basis=basis).top(40)
        nodes = found[found["kind"] == "node"].head(4).reset_index(drop=True)
        assert len(set(nodes["layer"])) > 1
        hooks = steering_hooks(model, nodes, scale=2.0, basis=basis)
        there = node_values(model, tokens, nodes, basis=basis)
        result = steer(model, tokens, nodes, value=amounts, basis=basis, watch={"these": nodes}, batch_size=2)
        return (
            model.run_with_hooks(tokens, fwd_hooks=hooks),
            [there, result, steer(model, tokens, nodes, add=there, basis=basis).after],
            interchange(model, tokens, tokens.flip(0), nodes, basis=basis).after,
            [one.after for one in sweep(model, tokens, nodes, basis=basis, scales=[-1, 2]).results],
        )

    both.agree(run)


@in_turn({"explain": None}, first=1)
def test_explanations(both: TwoDevices, path: None) -> None:
    def run(model: Any, pairs: TokenizedPairs) -> Any:
        tokens, nodes = tokens_for(model, pairs, 4, 5), ["L0/N3@2", "L0/N9", "L1/N4"]
        found = max_activating_examples(model, tokens, nodes, k=2, batch_size=2)
        return (
            {label: [list(example.activations) for example in examples] for label, examples in found.examples.items()},
            direct_logit_effects(model, nodes),
            profiles(model, tokens[:2], nodes, targets=2),
            prompt_scores(model, pairs, nodes).values,
            prompt_scores(model, pairs, baseline="corrupt", share=0.01).values,
            activation_variance(model, pairs),
        )

    both.agree(run)


@in_turn({"memory": None})
def test_memory_is_estimated(both: TwoDevices, path: None) -> None:
    plain = estimate_memory(both.plain, both.pairs, batch_size=2)
    with fake_devices():
        estimate = estimate_memory(both.spread, both.pairs, batch_size=2)
    assert estimate.available is None  # a device that does not tell
    assert estimate.model == plain.model and estimate.per_prompt == pytest.approx(plain.per_prompt, rel=0.1)
