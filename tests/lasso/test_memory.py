"""What will not fit says so before it starts; where it helps, blocks are joined as they come."""

import pytest
import torch

import tl_neuron_circuits as tnc
from tl_neuron_circuits._meter import Meter
from tl_neuron_circuits.lasso import _circuit_lasso
from tl_neuron_circuits.lasso._memory import Size

PROMPTS = tnc.tasks.subject_verb_agreement("simple", n=16)
NODES = tnc.bases.Neurons(layers=[3])


def give(monkeypatch: pytest.MonkeyPatch, available: int | None) -> None:
    monkeypatch.setattr(_circuit_lasso, "available_memory", lambda model: available)


def test_joined_blocks_give_the_circuit_of_blocks_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tnc.load_demo_model()
    method = tnc.lasso.CircuitLasso(penalty=tnc.lasso.Share(0.3), nodes=NODES, blocks=4)
    give(monkeypatch, None)
    apart = method.observe(model, PROMPTS)
    one, four = (Size(512, 2, 1, 2, kept).bytes for kept in (1, 4))
    give(monkeypatch, (one + four) // 2)
    joined = method.observe(model, PROMPTS)
    assert [len(apart.blocks[0]), len(joined.blocks[0])] == [4, 1]
    for first, second in zip(apart.total(), joined.total(), strict=True):
        assert first.n == second.n
        assert torch.allclose(first.products, second.products, rtol=1e-12, atol=1e-10)
    first, second = (method.solve(observed).edges for observed in (apart, joined))
    assert list(first["source"]) == list(second["source"]) and len(first) > 0
    assert first["weight"].to_numpy() == pytest.approx(second["weight"].to_numpy(), rel=1e-6)


def test_what_cannot_fit_names_sizes_and_remedies_before_anything_is_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tnc.load_demo_model()
    give(monkeypatch, 10_000_000)
    with pytest.raises(tnc.SettingsError, match=r"1,024 sources.* 512 targets.*in each of 8 blocks.*GB.*free") as error:
        tnc.lasso.CircuitLasso(nodes=NODES).fit(model, PROMPTS)
    for remedy in ("regressors='same'", "no held-out error", "MostEdges", "fewer layers"):
        assert remedy in str(error.value), remedy
    with pytest.raises(tnc.SettingsError, match=r"attention='layers'"):
        tnc.lasso.CircuitLasso(penalty=tnc.lasso.Share(0.5)).fit(model, PROMPTS)


def test_the_size_is_what_is_held_at_once() -> None:
    """Between the tensors that are certainly held and twice as many."""
    model = tnc.load_demo_model()
    method = tnc.lasso.CircuitLasso(penalty=tnc.lasso.Share(0.8), nodes=NODES, blocks=4, shares=(1.0,))
    with Meter() as meter:
        method.fit(model, PROMPTS)
    assert 0.6 < Size(512, 2, 1, 2, 4).bytes / meter.peak < 1.7
