"""The replicas' named rule sets are what they say: judged by finite differences, by LXT's and GIM's wiring, by hand.

Conventions (METHODS.md 5.9): a set changes gradients only. The half rule on attention's two products gives the values
1/2 of their gradient, and queries and keys 1/2 of the half that reaches the pattern.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.families import ModelCase, random_tokens, typical_models
from tests.loops import for_each
from tests.replicas import (
    RULE_SETS,
    Replica,
    measure_conservation,
    relevance_of,
    replica_gradients,
    replica_of,
    switches_of,
)
from tests.replicas import _forward as written_out
from tests.test_replicas import metric

FREE = ("attnlrp", "gim")
"""The sets that leave queries and keys in the graph."""


def by_finite_differences(
    replica: Replica, tokens: Tensor, name: str, site: str, step: float, monkeypatch: pytest.MonkeyPatch
) -> tuple[float, Tensor]:
    """Move the value at `site` along a random direction, all that the rules call constant kept where it was.

    What is constant: whatever the replica detaches. So a first pass notes each detached value, and later passes get
    these back. The softmax at temperature 2 moves as 2 softmax(scores / 2), from where the ordinary softmax stands.
    """
    noted: list[Tensor] = []
    queue: list[Tensor] = []
    detach = Tensor.detach

    def note(value: Tensor) -> Tensor:
        noted.append(detach(value).clone())
        return noted[-1]

    def softened(scores: Tensor) -> Tensor:
        soft = (scores / 2).softmax(-1)
        return scores.softmax(-1).detach() + 2 * (soft - soft.detach())

    direction = torch.empty(0)

    def metric_at(distance: float) -> float:
        def record(hook: str, value: Tensor) -> Tensor:
            nonlocal direction
            if hook != site:
                return value
            if not direction.numel():
                direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(5), dtype=value.dtype)
            return value + distance * direction

        queue[:] = noted
        return float(metric(written_out.forward(replica, tokens, switches_of(name), record)))

    with torch.no_grad(), monkeypatch.context() as patched:
        patched.setattr(written_out, "SoftmaxAtTemperature", SimpleNamespace(apply=softened))
        patched.setattr(Tensor, "detach", note)
        metric_at(0.0)
        patched.setattr(Tensor, "detach", lambda value: queue.pop(0))
        slope = (metric_at(step) - metric_at(-step)) / (2 * step)
        assert not queue
    return slope, direction


@for_each("case", typical_models())
def test_gradients_are_finite_differences_with_the_constants_held(
    case: ModelCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the embedding, at queries, keys and values, and before an activation."""
    replica, tokens = replica_of(case), random_tokens(case.build(), pos=6)
    sites = ("hook_embed", *(f"blocks.0.attn.hook_{letter}" for letter in "qkv"), "blocks.1.mlp.hook_pre")
    for name in RULE_SETS:
        _, gradients = replica_gradients(replica, tokens, metric, name)
        for site in sites:
            slope, direction = by_finite_differences(replica, tokens, name, site, 1e-5, monkeypatch)
            size = float(gradients[site].norm() * direction.norm())
            assert abs(slope - float((gradients[site] * direction).sum())) <= 1e-6 * max(size, 1e-3), (name, site)


@for_each("case", typical_models())
def test_sets_leave_the_forward_pass_alone_and_differ_in_the_gradient(case: ModelCase) -> None:
    """All but "cp", which is "relp" by another name; each set is not the plain gradient either."""
    replica, tokens = replica_of(case), random_tokens(case.build(), pos=6)
    logits, plain = replica_gradients(replica, tokens, metric)
    embedding = {"plain": plain["hook_embed"]}
    for name in RULE_SETS:
        with_set, gradients = replica_gradients(replica, tokens, metric, name)
        torch.testing.assert_close(with_set, logits, atol=1e-12, rtol=1e-12)
        embedding[name] = gradients["hook_embed"]
    assert torch.equal(embedding.pop("cp"), embedding["relp"])
    names = list(embedding)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            gap = (embedding[one] - embedding[other]).abs().max()
            assert gap > 1e-3 * embedding[one].abs().max(), (one, other)


@for_each("name", FREE)
@for_each("case", typical_models())
def test_halved_products_are_factors_at_queries_keys_and_values(case: ModelCase, name: str) -> None:
    """1/4, 1/4 and 1/2 where attention reads them: how LXT and GIM write the two half rules."""
    replica, tokens = replica_of(case), random_tokens(case.build(), pos=6)
    factors = {"hook_q": 0.25, "hook_k": 0.25, "hook_v": 0.5}

    def scaled(hook: str, value: Tensor) -> Tensor:
        factor = factors.get(hook.rsplit(".", 1)[-1], 1.0)
        if hook == "hook_embed":
            embedding.append(value := value.requires_grad_())
        return value.detach() + factor * (value - value.detach())

    embedding: list[Tensor] = []
    switches = [switch for switch in switches_of(name) if switch != "halve_attention"]
    (found,) = torch.autograd.grad(metric(written_out.forward(replica, tokens, switches, scaled)), embedding)
    _, expected = replica_gradients(replica, tokens, metric, name)
    torch.testing.assert_close(found, expected["hook_embed"], atol=1e-9, rtol=1e-9)


def test_softmax_at_temperature_by_hand() -> None:
    """s (g - sum s g) with s = softmax(x / 2): twice the slope of softmax(x / 2). What is masked gets zero."""
    scores = torch.tensor([[1.0, -2.0, 0.5, -torch.inf], [3.0, -torch.inf, -torch.inf, -torch.inf]]).double()
    incoming = torch.tensor([[0.3, -1.0, 2.0, 7.0], [5.0, 1.0, 1.0, 1.0]]).double()
    found_at, slope_at = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    (found,) = torch.autograd.grad(written_out.SoftmaxAtTemperature.apply(found_at), found_at, incoming)
    (slope,) = torch.autograd.grad((slope_at / 2).softmax(-1), slope_at, incoming)
    torch.testing.assert_close(found, 2 * slope)
    weights = [2.718281828459045**power for power in (0.5, -1.0, 0.25)]
    softened = [weight / sum(weights) for weight in weights]
    mean = sum(s * float(g) for s, g in zip(softened, incoming[0], strict=False))
    by_hand = [s * (float(g) - mean) for s, g in zip(softened, incoming[0], strict=False)]
    torch.testing.assert_close(found, torch.tensor([[*by_hand, 0.0], [0.0] * 4]).double())


@for_each("case", typical_models())
def test_relp_and_cp_conserve_relevance_and_the_others_do_not(case: ModelCase) -> None:
    replica, tokens = replica_of(case), random_tokens(case.build(), pos=9)
    for name in RULE_SETS:
        error = measure_conservation(replica, tokens, metric, name).relative_error
        assert error < 1e-9 if name in ("relp", "cp") else error > 1e-3, name


@for_each("name", FREE)
@for_each("case", typical_models())
def test_attention_shares_relevance_as_the_half_rule_says(case: ModelCase, name: str) -> None:
    """Values carry half of what their heads' outputs carry, queries as much as keys: in every layer.

    Rotary angles, ALiBi, soft caps, windows, grouped heads and frozen norms of queries and keys change nothing.
    """
    replica, tokens = replica_of(case), random_tokens(case.build(), pos=9)
    relevance, _ = relevance_of(replica, tokens, metric, name)
    for layer in range(replica.architecture.n_layers):
        q, k, v, z = (relevance[f"blocks.{layer}.attn.hook_{letter}"] for letter in "qkvz")
        assert v == pytest.approx(z / 2, rel=1e-9, abs=1e-9)
        assert q == pytest.approx(k, rel=1e-9, abs=1e-9) and abs(q) > 1e-6


@for_each("name", FREE)
@for_each("case", typical_models())
def test_relevance_is_lost_at_the_softmax_and_the_plain_activation_alone(case: ModelCase, name: str) -> None:
    """No cut below an attention layer carries the logits' relevance, but the ledger closes.

    A softmax is not homogeneous (a constant added to a row of scores changes nothing), so what the pattern receives,
    half of z's relevance, is not what queries and keys pass on. Soft caps and ALiBi sit on the same path. For "gim" an
    activation passes pre * f'(pre) where f(pre) arrived.
    """
    replica, tokens = replica_of(case), random_tokens(case.build(), pos=9)
    relevance, biases = relevance_of(replica, tokens, metric, name)
    measured = measure_conservation(replica, tokens, metric, name)
    made, size = 0.0, abs(measured.logits)
    for layer in range(replica.architecture.n_layers):
        q, k, z = (relevance[f"blocks.{layer}.attn.hook_{letter}"] for letter in "qkz")
        terms = [q, k, -z / 2]
        if name == "gim":
            mlp = f"blocks.{layer}.mlp"
            after_product = biases.get(f"{mlp}.b_in", 0.0) if replica.architecture.gated else 0.0
            output = relevance.get(f"{mlp}.hook_mid", relevance[f"{mlp}.hook_post"]) - after_product
            terms += [relevance[f"{mlp}.hook_pre"], relevance.get(f"{mlp}.hook_pre_linear", 0.0), -output]
        made += sum(terms)
        size += sum(map(abs, terms))
    total = measured.embeddings + sum(biases.values())
    assert abs(total - measured.logits - made) < 1e-9 * size
    assert abs(made) > 1e-3 * abs(measured.logits)


@pytest.mark.parametrize("case", typical_models("qwen3", "gemma3"))
def test_queries_behind_an_unfrozen_norm_would_carry_nothing(case: ModelCase) -> None:
    """Their scale is irrelevant to the model, so query times gradient sums to zero: why the sets freeze these norms."""
    replica, tokens = replica_of(case), random_tokens(case.build(), pos=9)
    switches = [switch for switch in switches_of("attnlrp") if switch != "head_norms"]
    unfrozen, _ = relevance_of(replica, tokens, metric, switches)
    frozen, _ = relevance_of(replica, tokens, metric, "attnlrp")
    name = "blocks.0.attn.hook_q"
    assert abs(unfrozen[name]) < 1e-3 * abs(frozen[name])


@for_each("case", [case for case in typical_models() if not case.id.startswith("solu")])
def test_gim_takes_the_plain_slope_of_an_activation_and_half_of_a_product(case: ModelCase) -> None:
    """The step from hook_post to hook_pre is the half rule's, or no rule's, neuron by neuron (solu mixes them)."""
    replica, tokens = replica_of(case), random_tokens(case.build(), pos=6)
    gated = replica.architecture.gated
    _, gim = replica_gradients(replica, tokens, metric, "gim")
    _, alone = replica_gradients(replica, tokens, metric, ["half"] if gated else [])
    post = "blocks.0.mlp.hook_post"
    for name in ["blocks.0.mlp.hook_pre", *(["blocks.0.mlp.hook_pre_linear"] if gated else [])]:
        torch.testing.assert_close(gim[name] * alone[post], alone[name] * gim[post], atol=1e-9, rtol=1e-9)
