"""Fidelity against its definition, endpoints, linear maps against least squares, and the front."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import random_tokens
from tests.transcoders.conftest import SMALL
from tl_neuron_circuits._errors import NumericalError, SettingsError
from tl_neuron_circuits.bases import Dictionary
from tl_neuron_circuits.transcoders import fidelity, pareto, train
from tl_neuron_circuits.transcoders._buffer import flat_values
from tl_neuron_circuits.transcoders._fidelity import Moments, fit_maps

Untouched = Callable[[Any], AbstractContextManager[None]]


def identity(layer: int, width: int) -> Dictionary:
    """An SAE without error: a feature for either sign of every unit."""
    eye = torch.eye(width)
    both = torch.cat([eye, -eye])
    hook = f"blocks.{layer}.hook_mlp_out"
    return Dictionary("standard", both.mT, both, torch.zeros(width), b_enc=torch.zeros(2 * width), hook_in=hook)


def slow_loss(model: Any, tokens: Tensor, ignore: int, hook: str | None = None, value: Any = None) -> float:
    """Next-token loss, one prompt and position after the other; `value(pos)` is written at `hook`."""
    losses = []
    for prompt in tokens:
        hooks = [] if hook is None else [(hook, lambda old, hook: value.expand_as(old))]
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            log_p = model(prompt[None])[0].log_softmax(-1)
        for pos in range(len(prompt) - 1):
            if ignore not in (int(prompt[pos]), int(prompt[pos + 1])):
                losses.append(-float(log_p[pos, prompt[pos + 1]]))
    return sum(losses) / len(losses)


def test_an_exact_dictionary_recovers_everything(tiny: Any, untouched: Untouched) -> None:
    tokens = random_tokens(tiny, batch=6, pos=9)
    tiny(tokens)
    with untouched(tiny):
        found = fidelity(tiny, [identity(1, 16), identity(0, 16)], tokens, baselines=False)
    rows = found.of("sae")
    assert list(rows.index) == [0, 1, "all"]
    for column, ideal in (("recovered_zero", 1), ("recovered_mean", 1), ("fvu", 0), ("divergence", 0), ("l0", 16)):
        assert rows[column].dropna().tolist() == pytest.approx([ideal] * rows[column].count(), abs=1e-5)
    for ablation in ("zero", "mean"):
        assert found.of(ablation)[f"recovered_{ablation}"].tolist() == pytest.approx([0, 0, 0], abs=1e-7)
    assert rows["loss"].tolist() == pytest.approx([found.model_loss] * 3, abs=1e-6)


def test_losses_are_what_the_definition_gives(tiny: Any) -> None:
    """Zero and mean ablation, padding left out, whatever the batches."""
    tokens = random_tokens(tiny, batch=5, pos=8)
    ignore = int(tokens[0, 3])
    hook = "blocks.1.hook_mlp_out"
    found = fidelity(tiny, [identity(1, 16)], tokens, baselines=False, ignore_tokens=(ignore,), forward_rows=2)
    mean = flat_values(tiny, tokens, [hook], (ignore,), torch.float32)[hook].mean(0)
    assert found.model_loss == pytest.approx(slow_loss(tiny, tokens, ignore), abs=1e-5)
    for name, value in (("zero", torch.zeros(16)), ("mean", mean)):
        assert found.of(name)["loss"].item() == pytest.approx(slow_loss(tiny, tokens, ignore, hook, value), abs=1e-5)
        with torch.no_grad():
            log_p = tiny(tokens).log_softmax(-1)
            with tiny.hooks(fwd_hooks=[(hook, lambda old, hook, new=value: new.expand_as(old))]):
                log_q = tiny(tokens).log_softmax(-1)
        kept = (tokens[:, :-1] != ignore) & (tokens[:, 1:] != ignore)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)[:, :-1][kept].mean()
        assert found.of(name)["divergence"].item() == pytest.approx(float(divergence), abs=1e-5)


def test_a_skip_is_part_of_what_is_written(tiny: Any) -> None:
    """A transcoder of nothing but a skip and a bias equals the affine map that it copies."""
    tokens = random_tokens(tiny, batch=40, pos=9)
    names = ("blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out")
    values = flat_values(tiny, tokens, names, (), torch.float32)
    affine = fit_maps(Moments.measure(*(values[name] for name in names)), 4)["affine"]
    nothing = torch.zeros(16, 1)
    skip = Dictionary(
        "skip_transcoder", nothing, nothing.mT, affine.bias, b_enc=torch.zeros(1), W_skip=affine.weight.mT.contiguous(),
        hook_in=names[0], hook_out=names[1],
    )  # fmt: skip
    table = fidelity(tiny, [skip], tokens, rank=4).to_dataframe().set_index("replacement")
    assert table.loc["transcoder", "loss"] == pytest.approx(table.loc["affine", "loss"], abs=1e-5)
    read: dict[str, Tensor] = {}
    hooks = [
        (names[0], lambda old, hook: read.update(x=old)),
        (names[1], lambda old, hook: read["x"] @ affine.weight + affine.bias),
    ]
    with torch.no_grad(), tiny.hooks(fwd_hooks=hooks):
        log_p = tiny(tokens)[:, :-1].log_softmax(-1)
    loss = -float(log_p.gather(-1, tokens[:, 1:, None]).mean())
    assert table.loc["transcoder", "loss"] == pytest.approx(loss, abs=1e-5)
    assert table.loc["transcoder", "fvu"] == pytest.approx(table.loc["affine", "fvu"], abs=1e-5)
    assert table.loc["affine", "fvu"] < table.loc["rank 4", "fvu"] < 1


def test_a_dictionary_on_attention_heads(tiny: Any) -> None:
    """`attn.hook_z` has heads; nothing is replaced by nothing else than it says."""
    tokens = random_tokens(tiny, batch=8, pos=9)
    hook = "blocks.0.attn.hook_z"
    exact = replace(identity(0, 16), hook_in=hook, hook_out=hook, reshape_activations="hook_z")
    found = fidelity(tiny, [exact], tokens, baselines=False)
    assert found.of("sae")["divergence"].item() == pytest.approx(0, abs=1e-6)
    assert found.of("sae")["fvu"].item() == pytest.approx(0, abs=1e-6)
    zero = found.of("zero")["loss"].item()
    assert zero == pytest.approx(slow_loss(tiny, tokens, -1, hook, torch.zeros(1)), abs=1e-5)


def test_linear_maps_are_the_best_of_their_rank() -> None:
    """Affine equals least squares, and no nearby map of the same rank has a smaller error."""
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(200, 7, generator=generator, dtype=torch.float64) @ torch.randn(7, 7, generator=generator).double()
        + 1
    )
    y = x.relu() @ torch.randn(7, 6, generator=generator).double() - 2
    maps = fit_maps(Moments.measure(x[:50], y[:50]) + Moments.measure(x[50:], y[50:]), 3)
    ones = torch.cat([x, torch.ones(200, 1)], 1)
    best = torch.linalg.lstsq(ones, y).solution
    torch.testing.assert_close(maps["affine"].weight.double(), best[:-1], atol=1e-4, rtol=1e-4)
    low = maps["rank 3"]
    assert int(torch.linalg.matrix_rank(low.weight, rtol=1e-4)) == 3

    def error(left: Tensor, right: Tensor) -> float:
        rebuilt = (x - x.mean(0)) @ left @ right + y.mean(0)
        return float((rebuilt - y).square().sum())

    u, s, v = torch.linalg.svd(low.weight.double())
    left, right = u[:, :3] * s[:3], v[:3]
    found = error(left, right)
    assert found == pytest.approx(float((low(x) - y).square().sum()), rel=1e-4)
    for _ in range(100):
        nudges = [1e-2 * torch.randn(m.shape, generator=generator, dtype=torch.float64) for m in (left, right)]
        assert error(left + nudges[0], right + nudges[1]) > found
    # A gradient descent from there finds nothing better.
    left, right = left.clone().requires_grad_(), right.clone().requires_grad_()
    optimizer = torch.optim.Adam([left, right], lr=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        loss = ((x - x.mean(0)) @ left @ right + y.mean(0) - y).square().sum()
        loss.backward()
        optimizer.step()
    assert error(left.detach(), right.detach()) > found * (1 - 1e-5)


def test_the_front_compares_transcoders_and_saes(one_tiny: Any, tokens: Tensor) -> None:
    config = SMALL.replace(steps=20, learning_rate=2e-2, layers=(0,))
    front = pareto(one_tiny, tokens, config, [2, 6], evaluation_tokens=tokens, verbose=False)
    table = front.to_dataframe()
    own = table[table["replacement"].isin(("sae", "transcoder")) & (table["layer"] != "all")]
    assert len(own) == 4 and set(own["k"]) == {2, 6} and set(own["d_dict"]) == {SMALL.d_dict}
    assert len(table[(table["layer"] == 0) & (table["replacement"] == "mean")]) == 1
    for _, rows in own.groupby(["layer", "replacement"]):
        assert rows["on_front"].any()
        best = rows.loc[rows["recovered_zero"].idxmax()]
        assert best["on_front"]
    assert front.dictionaries["sae", 2.0][0].kind == "jumprelu"
    for (target, value), dictionaries in front.dictionaries.items():  # measured with what was known, as if alone
        alone = fidelity(one_tiny, dictionaries, tokens, baselines=False).of(target).loc[0]
        row = own[(own["replacement"] == target) & (own["k"] == value)].iloc[0]
        for column in ("loss", "divergence", "fvu", "l0", "recovered_zero", "recovered_mean"):
            assert row[column] == pytest.approx(alone[column], abs=1e-4)
    figure = front.plot()
    assert {trace.name for trace in figure.data} >= {"transcoder", "SAE (MLP out)", "affine", "rank 16"}
    with pytest.raises(SettingsError, match="measure to be one of"):
        front.plot(measure="color")


def test_errors(one_tiny: Any, tokens: Tensor) -> None:
    dictionaries = train(one_tiny, tokens, SMALL.replace(steps=1), verbose=False).dictionaries
    with pytest.raises(SettingsError, match="at least one dictionary"):
        fidelity(one_tiny, [], tokens)
    with pytest.raises(SettingsError, match="one dictionary per hook point"):
        fidelity(one_tiny, [dictionaries[0], dictionaries[0]], tokens)
    with pytest.raises(SettingsError, match="at least one prompt"):
        fidelity(one_tiny, dictionaries, [])
    with pytest.raises(SettingsError, match="two tokens that are not ignored"):
        fidelity(one_tiny, dictionaries, tokens[:, :1], baselines=False)
    with pytest.raises(NumericalError, match=r"more than 16 positions.*got 12"):
        fidelity(one_tiny, dictionaries, tokens[:1])
    with pytest.raises(SettingsError, match="expected one of"):
        fidelity(one_tiny, dictionaries, tokens).of("color")
    with pytest.raises(SettingsError, match="at least one value of k"):
        pareto(one_tiny, tokens, SMALL, [], evaluation_tokens=tokens)
