"""The planted circuits are what they are said to be: the circuit alone answers, and patching finds it."""

import torch

from tests.loops import for_each
from tests.planted.circuits import N_CASES, N_TOKENS, planted_case, prompts
from tests.planted.load import FOLDER, RightAnswers, load_planted, planted_seeds
from tests.planted.train import Model, mask_of, train
from tl_neuron_circuits.components import component_edges, component_graph, metric_of_edges
from tl_neuron_circuits.tasks._tokenized import Batch


class Right(RightAnswers):
    """Share of questions answered right."""

    def __call__(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        final = logits[torch.arange(len(batch)), batch.position].unflatten(1, (-1, N_TOKENS))
        return (final.argmax(-1) == self.answers[batch.index]).float().mean(1)


def test_every_case_is_there_and_together_they_are_small() -> None:
    assert planted_seeds() == list(range(N_CASES)) and N_CASES >= 10
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 4e6
    assert {planted_case(seed).n_layers for seed in planted_seeds()} == {2, 3, 4}


@for_each("seed", planted_seeds())
def test_the_circuit_alone_answers_and_the_rest_alone_does_not(seed: int) -> None:
    planted = load_planted(seed)
    graph = component_graph(planted.model)
    assert graph.names == planted.case.nodes
    assert {(graph.names[i], graph.names[j]) for i, j in graph.edges.nonzero().tolist()} == planted.truth.possible
    circuit = mask_of(planted.case, set(planted.truth.edges)).bool()
    pairs = planted.pairs(128, seed=9)
    kept = torch.stack([graph.edges, circuit, graph.edges & ~circuit])
    whole, alone, rest = metric_of_edges(
        planted.model, pairs, kept, metric=Right(planted.metric(pairs).answers), batch_size=128
    ).mean(1)
    assert whole > 0.97 and alone > 0.8 and rest < 0.5


def test_exact_patching_ranks_the_planted_edges_first() -> None:
    planted = load_planted(3)
    pairs = planted.pairs(48, seed=1)
    exact, noise = (
        planted.truth.auroc(component_edges(planted.model, pairs, method=method, metric=planted.metric(pairs)))
        for method in ("patching", "random")
    )
    assert exact > 0.95 > noise


def test_training_starts_again_from_its_seed_and_its_model_is_the_loaded_one() -> None:
    case = planted_case(3)
    one, _ = train(case, steps=4)
    two, _ = train(case, steps=4)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    planted = load_planted(3)
    loaded = Model(case)
    with torch.no_grad():
        state = planted.model.state_dict()
        for name, tensor in loaded.state().items():
            assert state[name].shape == tensor.shape
        planted.model.load_state_dict(loaded.state(), strict=False)
        tokens = prompts(5, 0)
        assert torch.allclose(planted.model(tokens)[:, -1], loaded(tokens)[0], atol=1e-5)
