"""The replicas are right: judged by the models' own forward and backward, and by arithmetic on single rules."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from tests.families import FAMILIES, ModelCase, model_cases, random_tokens, typical_models
from tests.loops import for_each
from tests.real_models import BACKENDS, load_stories260K
from tests.replicas import ALL_RULES, from_hooked_transformer, measure_conservation, replica_gradients, replica_of
from tests.replicas._forward import RATIOS


def metric(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, ""]:
    """Contrast two tokens at the end, plus something that is not linear in the logits."""
    last = logits[:, -1]
    return (last[:, 3] - last[:, 5]).sum() + last.log_softmax(-1)[:, 7].sum()


def breaking_rules(case: ModelCase) -> list[str]:
    """List the rules that change this family's gradient (norms, a curved activation, a product, attention)."""
    family = FAMILIES[case.family]
    settings = family.hooked or {}
    rules = ["attention"]
    if "normalization_type" not in settings or settings["normalization_type"] is not None:
        rules.append("ln")
    if settings.get("act_fn") != "relu":
        rules.append("identity")
    if family.gated:
        rules.append("half")
    return rules


@for_each("case", typical_models())
def test_logits_are_the_models(case: ModelCase) -> None:
    """Longer than a sliding window, in a batch."""
    model = case.build()
    tokens = random_tokens(model, batch=2, pos=9)
    logits, _ = replica_gradients(replica_of(case), tokens, metric)
    torch.testing.assert_close(logits, model(tokens).detach(), atol=case.tolerance, rtol=0)


def by_autograd(model: Any, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Differentiate with respect to the tensors that forward hooks see."""
    captured: dict[str, Tensor] = {}

    def capture(value: Tensor, hook: Any, name: str) -> Tensor:
        captured[name] = value
        return value

    hooks = [(name, partial(capture, name=name)) for name in names]
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    found = torch.autograd.grad(metric(logits), [captured[name] for name in names])
    return dict(zip(names, found, strict=True))


def by_backward_hooks(model: Any, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Let TransformerLens' own backward hooks collect the gradients."""
    captured: dict[str, Tensor] = {}

    def capture(gradient: Tensor, hook: Any, name: str) -> None:
        captured[name] = gradient.clone()

    with model.hooks(bwd_hooks=[(name, partial(capture, name=name)) for name in names]):
        metric(model(tokens)).backward()
    return captured


@for_each("measure", [by_autograd, by_backward_hooks])
@for_each("case", typical_models())
def test_gradients_without_rules_are_the_models_own(case: ModelCase, measure: Callable[..., dict[str, Tensor]]) -> None:
    """At every hook that the replica records and the model has, the neurons and the embeddings among them."""
    model = case.build()
    tokens = random_tokens(model, batch=2, pos=9)
    _, expected = replica_gradients(replica_of(case), tokens, metric)
    names = [name for name in expected if name in model.hook_dict]
    if case.backend == "TransformerBridge":  # there it is the input of ln2, not the residual stream: next test
        names = [name for name in names if not name.endswith("hook_resid_mid")]
    assert {"hook_embed", "blocks.0.hook_resid_pre", "blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"} <= set(names)
    gradients = measure(model, tokens, names)
    for name in names:
        size = expected[name].abs().max().item()
        torch.testing.assert_close(
            gradients[name], expected[name], atol=case.tolerance * max(size, 1), rtol=0, msg=f"{case.id} {name}"
        )


@pytest.mark.parametrize("case", typical_models("gpt2", "llama", "gemma2", "opt"))
def test_resid_mid_is_on_the_residual_path_in_hooked_transformer_only(case: ModelCase) -> None:
    """The Bridge's hook_resid_mid is ln2's input: backward hooks on it miss the gradient of the skip connection."""
    model = case.build()
    tokens = random_tokens(model, batch=2, pos=9)
    name = "blocks.0.hook_resid_mid"
    _, expected = replica_gradients(replica_of(case), tokens, metric)
    gradient = by_backward_hooks(model, tokens, [name])[name]
    whole = torch.allclose(gradient, expected[name], atol=1e-5)
    assert whole == (case.backend == "HookedTransformer")


@for_each("case", typical_models())
def test_rules_leave_the_forward_pass_alone(case: ModelCase) -> None:
    """Every rule changes gradients only, and each that applies to the family does change them."""
    replica = replica_of(case)
    tokens = random_tokens(case.build(), pos=6)
    logits, plain = replica_gradients(replica, tokens, metric)
    for rule in ALL_RULES:
        with_rule, gradients = replica_gradients(replica, tokens, metric, [rule])
        torch.testing.assert_close(with_rule, logits, atol=1e-12, rtol=1e-12)
        unchanged = torch.allclose(gradients["hook_embed"], plain["hook_embed"], rtol=1e-6, atol=1e-9)
        assert unchanged == (rule not in breaking_rules(case)), rule


@for_each("case", typical_models())
def test_relevance_is_conserved_with_all_rules(case: ModelCase) -> None:
    """Embeddings and biases together carry sum_v (dm/dz_v) z_v, z before the soft cap."""
    tokens = random_tokens(case.build(), pos=9)
    measured = measure_conservation(replica_of(case), tokens, metric)
    assert measured.relative_error < 1e-9, measured
    assert abs(measured.logits) > 1e-3


@for_each("case", typical_models())
def test_conservation_tells_a_missing_rule(case: ModelCase) -> None:
    """Except attention where queries and keys are normed: their scale is then irrelevant, so they carry nothing."""
    tokens = random_tokens(case.build(), pos=9)
    replica = replica_of(case)
    for rule in breaking_rules(case):
        rest = [name for name in ALL_RULES if name != rule]
        error = measure_conservation(replica, tokens, metric, rest).relative_error
        if rule == "attention" and replica.architecture.qk_norm:
            assert error < 1e-4
        else:
            assert error > 1e-3, rule


@for_each("case", typical_models())
def test_every_bias_but_those_of_queries_and_keys_carries_relevance(case: ModelCase) -> None:
    """These count: b_V, b_O, the MLP's, those of norms and of the unembedding."""
    tokens = random_tokens(case.build(), pos=9)
    for name, share in measure_conservation(replica_of(case), tokens, metric).biases.items():
        assert (share == 0) == name.endswith((".b_Q", ".b_K")), name


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in model_cases("gemma2")])
def test_relevance_is_conserved_near_the_soft_cap(case: ModelCase) -> None:
    """The cap bends the metric's logits by more than half, and conservation holds before it, not after it."""
    replica = replica_of(case)
    cap = replica.architecture.logit_cap
    assert cap is not None
    tokens = random_tokens(case.build(), batch=8, pos=9, seed=2)
    logits, _ = replica_gradients(replica, tokens, metric)
    before_cap = cap * torch.atanh(logits[:, -1] / cap)
    row, token = divmod(int(before_cap.abs().argmax()), logits.shape[-1])
    assert before_cap[row, token].abs() > 1.5 * logits[row, -1, token].abs()

    def capped_logit(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, ""]:
        return logits[0, -1, token]

    measured = measure_conservation(replica, tokens[row : row + 1], capped_logit)
    assert measured.relative_error < 1e-9, measured
    assert abs(measured.logits - logits[row, -1, token]) > 0.3 * abs(logits[row, -1, token])


@for_each("rules", [("identity",), ("identity", "half"), ("half",)])
@for_each("case", typical_models("llama", "gemma2", "qwen3"))
def test_gated_gradients_by_hand(case: ModelCase, rules: tuple[str, ...]) -> None:
    """d/dpre = share * up * ratio (or f') * d/dpost, d/dup = share * f(pre) * d/dpost; share = 1/2 by the half rule."""
    replica = replica_of(case)
    tokens = random_tokens(case.build())
    values = _values(case, tokens)
    _, gradients = replica_gradients(replica, tokens, metric, rules)
    share = 0.5 if "half" in rules else 1.0
    for layer in range(replica.architecture.n_layers):
        name = f"blocks.{layer}.mlp"
        pre, up = values[f"{name}.hook_pre"], values[f"{name}.hook_pre_linear"]
        ratio = RATIOS[replica.architecture.activation]
        slope = ratio(pre) if "identity" in rules else _derivative(case, pre)
        post = gradients[f"{name}.hook_post"]
        close = {"atol": 10 * case.tolerance, "rtol": 10 * case.tolerance}
        torch.testing.assert_close(gradients[f"{name}.hook_pre"], share * up * slope * post, **close)
        torch.testing.assert_close(gradients[f"{name}.hook_pre_linear"], share * pre * ratio(pre) * post, **close)


@pytest.mark.parametrize("case", typical_models("gpt2", "pythia", "opt", "solu", "bloom"))
def test_activation_gradients_by_hand(case: ModelCase) -> None:
    """With the identity rule, d/dpre = f(pre) / pre * d/dpost, f taken from the model itself."""
    tokens = random_tokens(case.build())
    values = _values(case, tokens)
    _, gradients = replica_gradients(replica_of(case), tokens, metric, ["identity"])
    for name in [key for key in values if key.endswith("mlp.hook_pre")]:
        post = name.replace("hook_pre", "hook_post")
        expected = values[post] / values[name] * gradients[post]
        torch.testing.assert_close(gradients[name], expected, atol=100 * case.tolerance, rtol=100 * case.tolerance)


@pytest.mark.skipif("HookedTransformer" not in BACKENDS, reason="the weights are stored as HookedTransformer")
def test_a_real_model_is_replicated_too(shared_models: Path) -> None:
    """stories260K, in float32 against the replica's float64."""
    model = load_stories260K(shared_models, "HookedTransformer")
    tokens = model.to_tokens("Lily saw a big ball. She")
    replica = from_hooked_transformer(model)
    logits, _ = replica_gradients(replica, tokens, metric)
    torch.testing.assert_close(logits, model(tokens).detach().double(), atol=1e-4, rtol=0)
    assert measure_conservation(replica, tokens, metric).relative_error < 1e-9


def _values(case: ModelCase, tokens: Tensor) -> dict[str, Tensor]:
    _, cache = case.build().run_with_cache(tokens)
    endings = ("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post")
    return {name: cache[name].detach() for name in cache if name.endswith(endings)}


def _derivative(case: ModelCase, x: Tensor) -> Tensor:
    """Differentiate torch's own activation."""
    x = x.clone().requires_grad_()
    if case.family.startswith("gemma"):
        value = torch.nn.functional.gelu(x, approximate="tanh")
    else:
        value = torch.nn.functional.silu(x)
    return torch.autograd.grad(value.sum(), x)[0]
