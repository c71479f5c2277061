"""What will not fit says so before it starts; where it helps, blocks are joined, or targets are streamed."""

import logging
from typing import Any

import pytest
import torch

import tl_neuron_circuits as tnc
from tests.families import typical_models
from tests.loops import for_each
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
    give(monkeypatch, 1_000_000)
    with pytest.raises(tnc.SettingsError, match=r"1,024 sources.* 512 targets.*in each of 8 blocks.*GB.*free") as error:
        tnc.lasso.CircuitLasso(nodes=NODES).fit(model, PROMPTS)
    for remedy in ("regressors='same'", "no held-out error", "MostEdges", "fewer layers", "fewer prompts"):
        assert remedy in str(error.value), remedy
    with pytest.raises(tnc.SettingsError, match=r"attention='layers'"):
        tnc.lasso.CircuitLasso(penalty=tnc.lasso.Share(0.5)).fit(model, PROMPTS)
    give(monkeypatch, 30_000_000)
    with pytest.raises(tnc.SettingsError, match="no groups, so that targets can be streamed"):
        tnc.lasso.CircuitLasso(nodes=NODES, groups=True).fit(model, PROMPTS)


@for_each(
    "options",
    [
        {"penalty": tnc.lasso.MostEdges(30), "bootstrap": 2},
        {"penalty": tnc.lasso.HeldOut(2), "regressors": "same", "readout": "logits"},
        {"penalty": tnc.lasso.Share(0.5), "regressors": "earlier", "noise": 0.3},  # else columns are collinear
        {"penalty": tnc.lasso.Share(0.5), "joint": "adjacent"},
        {"penalty": tnc.lasso.Share(0.5), "nodes": tnc.bases.Neurons()},
    ],
)
def test_streamed_targets_give_the_circuit_of_whole_products(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = typical_models("gpt2")[0].values[0].build()
    tokens = torch.randint(0, 50, (24, 6), generator=torch.Generator().manual_seed(0))
    answers = torch.arange(24) % 3
    inputs = tnc.TokenizedPairs.from_tokens(tokens, answers, None, answers + 3)
    method = tnc.lasso.CircuitLasso(blocks=4, shares=(1.0, 0.8, 0.6, 0.5), tolerance=1e-10, **options)
    give(monkeypatch, None)
    whole = method.fit(model, inputs)
    give(monkeypatch, 10**9)
    monkeypatch.setattr(Size, "bytes", property(lambda size: 10**12))
    with caplog.at_level(logging.WARNING):
        streamed = method.fit(model, inputs)
    assert "CircuitLasso streams" in caplog.text and streamed.settings["streamed"]
    first, second = (found.edges.sort_values(["source", "target"], ignore_index=True) for found in (whole, streamed))
    assert list(first["source"]) == list(second["source"]) and list(first["target"]) == list(second["target"])
    for column in ("weight", "norm", "reach", "stability"):
        assert second[column].to_numpy() == pytest.approx(first[column].to_numpy(), abs=1e-6, nan_ok=True), column
    for column in whole.path:
        assert streamed.path[column].to_numpy() == pytest.approx(whole.path[column].to_numpy(), rel=1e-6), column
    assert streamed.nodes["r2"].to_numpy() == pytest.approx(whole.nodes["r2"].to_numpy(), abs=1e-6, nan_ok=True)


def test_streaming_holds_the_observations_and_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first penalty of a path chooses nothing, but its products are made of all targets and sources."""
    model, nodes = tnc.load_demo_model(), tnc.bases.Neurons(layers=[1, 3])
    method = tnc.lasso.CircuitLasso(penalty=tnc.lasso.Share(1.0), nodes=nodes, blocks=4, shares=(1.0,))
    size = Size(1024, 2, 1, 6, 1, rows=32, prompts=16, widest=64)
    give(monkeypatch, size.streamed_bytes + 1_000_000)
    with Meter() as meter:
        method.fit(model, PROMPTS)
    assert 0.1 * size.streamed_bytes < meter.peak < 1.2 * size.streamed_bytes < 0.4 * size.bytes


def test_the_size_is_what_is_held_at_once() -> None:
    """Between the tensors that are certainly held and twice as many."""
    model = tnc.load_demo_model()
    method = tnc.lasso.CircuitLasso(penalty=tnc.lasso.Share(0.8), nodes=NODES, blocks=4, shares=(1.0,))
    with Meter() as meter:
        method.fit(model, PROMPTS)
    assert 0.6 < Size(512, 2, 1, 2, 4).bytes / meter.peak < 1.7
