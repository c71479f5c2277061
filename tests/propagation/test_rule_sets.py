"""The named rule sets of `relp`: "relp", "cp", "attnlrp" and "gim" are the slow replicas', on every family and class.

A gradient at a hook is the coefficient of that value's relevance: attention's two products come after `hook_q`,
`hook_k` and `hook_v`, so the gradients there are the halved ones, however they are read.
"""

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import (
    FAMILIES,
    MAJOR,
    ModelCase,
    all_models,
    build_bridge_from_module,
    each_model,
    hooked_transformer,
    hugging_face,
    model_cases,
    random_tokens,
)
from tests.loops import for_each
from tests.propagation.readings import (
    READINGS,
    STEPWISE_NORMS,
    assert_close,
    by_capture,
    expected_gradients,
    model_of,
    next_token_loss,
    settled,
    tokens_of,
)
from tests.propagation.test_conservation import without_biases
from tests.propagation.test_forward import assert_identical
from tests.replicas import replica_gradients, replica_of
from tl_neuron_circuits._errors import NumericalError, PropagationError, SettingsError, UnsupportedModelError
from tl_neuron_circuits.propagation import relp

Untouched = Callable[[Any], AbstractContextManager[None]]
SETS = ("relp", "attnlrp", "gim")
"""And "cp", which one test shows to be "relp" bit for bit."""
FREE = ("attnlrp", "gim")
"""The sets that leave queries and keys in the graph."""
WITHOUT_SCORES = [case for case in model_cases("opt", "gptj") if case.backend == "TransformerBridge"]
"""Their adapters leave attention to Hugging Face and show hooks its pattern afterwards, under both names."""
THOROUGH = ("gpt2", "llama", "gemma2", "qwen3")
"""One of each kind: plain, grouped queries, soft caps with windows, norms of queries and keys."""
POST = "blocks.0.mlp.hook_post"


def sets_and_models(*families: str, sets: Collection[str] = SETS) -> list[Any]:
    """Parametrize a test by a set's name and a model that offers what the set needs."""
    return [
        pytest.param(case, name, id=f"{case.id}-{name}")
        for case in model_cases(*families)
        for name in sets
        if not (name == "gim" and case in WITHOUT_SCORES)
    ]


def each_set(*families: str, sets: Collection[str] = SETS) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test on each model, with the sets that it offers."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        looped = for_each("name", sets, unless=lambda case, name: name == "gim" and case in WITHOUT_SCORES)(test)
        return each_model(*families)(looped)

    return decorate


def attention_hooks(ends: Iterable[str]) -> list[str]:
    """Name these hooks in both layers."""
    return [f"blocks.{layer}.attn.hook_{end}" for layer in range(2) for end in ends]


def captured_run(model: Any, tokens: Tensor, names: Collection[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Run forward once, keeping the tensors at these hooks in the graph."""
    store: dict[str, Tensor] = {}
    hooks = [(name, lambda value, hook, name=name: store.update({name: value}) or value) for name in names]
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    return logits, {name: store[name] for name in names}


# --- What a set does to values: nothing; to gradients: what the replica says ---


@each_set()
def test_forward_is_bit_identical(case: ModelCase, name: str) -> None:
    assert_identical(model_of(case), tokens_of(case), name)


@each_set("gpt2", "llama", "gemma2", "bloom", sets=FREE)
def test_forward_is_bit_identical_in_bfloat16(case: ModelCase, name: str) -> None:
    """Softmax is computed in float32 by most Bridges, in the model's own dtype elsewhere."""
    model = case.build(dtype=torch.bfloat16)
    tokens = random_tokens(model)
    assert_identical(model, tokens, name)
    with relp(model, name):
        found = by_capture(model, tokens, ["hook_embed", *attention_hooks("qkv")])
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())


@pytest.mark.parametrize(
    ("case", "name"),
    [p for p in sets_and_models("gpt2", "llama", "gemma2", sets=FREE) if p.values[0].backend == "TransformerBridge"],
)
def test_compatibility_mode_changes_no_gradient_of_a_neuron(case: ModelCase, name: str) -> None:
    """Folded and centered weights, scores masked with -inf: the same function, propagated by the same rules.

    A contrast of logits in place of a loss, as centring moves the logits together.
    """
    plain, folded = case.build(), case.build()
    folded.enable_compatibility_mode(disable_warnings=True)
    tokens, found = random_tokens(plain), []
    for model in (plain, folded):
        with relp(model, name):
            logits, store = captured_run(settled(model), tokens, [POST])
            found += torch.autograd.grad(logits[0, -1, 3] - logits[0, -1, 5], store[POST])
        assert_identical(model, tokens, name)
    torch.testing.assert_close(found[1], found[0], atol=1e-4 * float(found[0].abs().max()), rtol=0)


@STEPWISE_NORMS
@each_set()
def test_gradients_are_the_replicas(case: ModelCase, name: str, untouched: Untouched) -> None:
    """At the embedding, the residual stream, neurons, z and values, and where they are not cut at queries and keys."""
    model, tokens = model_of(case), tokens_of(case)
    expected = expected_gradients(case, name)
    visible = attention_hooks("qkvz" if name in FREE else "vz")
    assert {"hook_embed", "blocks.1.hook_resid_pre", POST, *visible} <= set(expected)
    readings = READINGS.values() if case.family in THOROUGH else [by_capture]
    for read in readings:
        with untouched(model):
            with relp(model, name):
                found = read(model, tokens, list(expected))
            assert_close(found, expected, case, name)


@each_model()
def test_no_gradient_arrives_at_queries_and_keys_that_relp_cuts(case: ModelCase) -> None:
    model, tokens = model_of(case), tokens_of(case)
    heard: list[Tensor] = []
    hooks = [(hook, lambda gradient, hook: heard.append(gradient.clone())) for hook in attention_hooks("qk")]
    with relp(model, "relp"):
        logits, store = captured_run(model, tokens, attention_hooks("qk"))
        loss = next_token_loss(logits, tokens)
        reached = [value for value in store.values() if value.requires_grad]
        found = torch.autograd.grad(loss, reached, allow_unused=True) if reached else ()
        with model.hooks(bwd_hooks=hooks):
            next_token_loss(model(tokens), tokens).backward()
    assert not any(gradient.any() for gradient in (*found, *heard) if gradient is not None)


@each_model()
def test_cp_is_relp_bit_for_bit_and_both_are_the_four_rules(case: ModelCase) -> None:
    """The default, the set's two names, and the tuple of its rules."""
    model, tokens = model_of(case), tokens_of(case)
    names = list(expected_gradients(case, "relp"))
    with relp(model):
        expected = by_capture(model, tokens, names)
    for rules in ("relp", "cp", ("ln", "identity", "half", "attention")):
        with relp(model, rules):
            found = by_capture(model, tokens, names)
        for name in names:
            assert torch.equal(found[name], expected[name]), (rules, name)


@for_each("rule", ["ln", "identity", "half", "attention"])
@pytest.mark.parametrize("case", all_models("llama"))
def test_the_name_of_one_rule_is_that_rule_alone(case: ModelCase, rule: str) -> None:
    model, tokens = model_of(case), tokens_of(case)
    expected = expected_gradients(case, (rule,))
    with relp(model, rule):
        assert_close(by_capture(model, tokens, list(expected)), expected, case, rule)


def test_gradients_are_those_of_transformer_lens_where_it_has_rules_of_its_own() -> None:
    """Its norms and MLPs alone: the final norm and attention are not in its rules, so gradients end before the one and
    the other has no rule here either.
    """
    theirs = pytest.importorskip(
        "transformer_lens.model_bridge._relevance_rules", reason="TransformerLens has no relevance rules before 4.4"
    )
    rules = theirs.RelevanceRules(normalization=True, activation=True, multiplicative_gate=True)
    for case in (case for case in model_cases("llama") if case.backend == "TransformerBridge"):
        model, tokens = model_of(case), tokens_of(case)
        start, end = "blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"
        names = [start, "blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post", end]
        found = []
        for context in (relp(model, ("ln", "identity", "half")), theirs.use_relevance_rules(model, rules)):
            with context as coverage:
                _, store = captured_run(model, tokens, names)
                direction = torch.linspace(-1, 1, store[end].numel()).reshape(store[end].shape).to(store[end])
                gradients = torch.autograd.grad((store[end] * direction).sum(), [store[name] for name in names[:-1]])
                found.append(dict(zip(names, gradients, strict=False)))
        # ln1, ln2, activation and gate of two layers
        assert coverage is not None and len(coverage.installed) == 8 and not coverage.skipped
        assert_close(found[0], found[1], case)


@pytest.mark.parametrize("case", all_models("gpt2"))
def test_an_unknown_set_is_refused_by_a_list_of_the_known(case: ModelCase) -> None:
    """A set inside a tuple of rules is not a rule."""
    with pytest.raises(SettingsError, match=r"(?s)attnlrp.*gim"):
        relp(model_of(case), "attn-lrp")
    with pytest.raises(SettingsError, match="gim"):
        relp(model_of(case), ("ln", "gim"))


# --- Conservation ---


def relevance_at(model: Any, tokens: Tensor, rules: str, names: Collection[str]) -> dict[str, float]:
    """Sum value times gradient at each hook, and at the logits before a soft cap, for a contrast at the end."""
    raw: list[Tensor] = []
    handle = model.unembed.register_forward_hook(lambda module, arguments, output: raw.append(output))
    try:
        with relp(model, rules):
            logits, store = captured_run(model, tokens, names)
            values = {"logits": raw[0], **store}
            found = torch.autograd.grad(logits[0, -1, 3] - logits[0, -1, 5], list(values.values()))
    finally:
        handle.remove()
    return {name: float((v * g).sum().detach()) for (name, v), g in zip(values.items(), found, strict=True)}


@each_set(sets=FREE)
def test_values_carry_half_of_z_and_queries_as_much_as_keys(case: ModelCase, name: str) -> None:
    """In every layer, biases or not: what the half rule conserves where attention is not cut."""
    model, tokens = model_of(case), tokens_of(case)[:1]
    relevance = relevance_at(model, tokens, name, attention_hooks("qkvz"))
    close = max(1e-9, 3 * case.tolerance) * max(map(abs, relevance.values()))
    for layer in range(2):
        q, k, v, z = (relevance[f"blocks.{layer}.attn.hook_{letter}"] for letter in "qkvz")
        assert abs(v - z / 2) <= close
        assert abs(q - k) <= close


@each_set()
def test_the_ledger_of_relevance_closes(case: ModelCase, name: str) -> None:
    """Without biases, embeddings carry what the logits carry and what attention and activations add or lose.

    "relp" and "cp" add and lose nothing. The others do at the softmax, which is not homogeneous: half of z's relevance
    arrives there, that of queries and keys leaves. "gim" does at activations too: pre * f'(pre) is not f(pre).
    """
    model = without_biases(case)
    tokens = random_tokens(model, batch=1, pos=7)
    positional = model.cfg.positional_embedding_type == "standard" and "hook_pos_embed" in model.hook_dict
    embeddings = ["hook_embed", *(["hook_pos_embed"] if positional else [])]
    attention = attention_hooks("qkz") if name in FREE else []
    activation_norm = (FAMILIES[case.family].hooked or {}).get("act_fn") == "solu_ln"
    ends = ["hook_mid"] if activation_norm and case.backend == "HookedTransformer" else ["hook_post"]
    starts = ["hook_pre", *(["hook_pre_linear"] if FAMILIES[case.family].gated else [])]
    mlps = [f"blocks.{layer}.mlp.{hook}" for layer in range(2) for hook in (*starts, *ends)] if name == "gim" else []
    relevance = relevance_at(model, tokens, name, [*embeddings, *attention, *mlps])
    shares = {"hook_q": 1.0, "hook_k": 1.0, "hook_z": -0.5, "hook_pre": 1.0, "hook_pre_linear": 1.0}
    made = sum(shares.get(hook.rsplit(".", 1)[-1], -1.0) * relevance[hook] for hook in (*attention, *mlps))
    gap = sum(relevance[hook] for hook in embeddings) - relevance["logits"]
    size = sum(map(abs, relevance.values()))
    assert abs(gap - made) < max(1e-6, 3 * case.tolerance) * size
    assert (abs(gap) > 1e-4 * size) == (name in FREE)


# --- One graph, many backward passes; many graphs, one backward pass ---


@each_set(*THOROUGH)
def test_batches_of_gradients_are_their_members(case: ModelCase, name: str) -> None:
    """Once more with `retain_graph`, and together with `is_grads_batched`."""
    model, tokens = model_of(case), tokens_of(case)
    with relp(model, name):
        logits, store = captured_run(model, tokens, ["hook_embed", POST, *attention_hooks("v")])
        outputs, places = logits[0, -1, :3], list(store.values())
        one_by_one = [torch.autograd.grad(output, places, retain_graph=True) for output in outputs]
        again = [torch.autograd.grad(output, places, retain_graph=True) for output in outputs]
        batched = torch.autograd.grad(outputs, places, grad_outputs=torch.eye(3).to(outputs), is_grads_batched=True)
    for row, (gradients, repeated) in enumerate(zip(one_by_one, again, strict=True)):
        for site, gradient in enumerate(gradients):
            assert torch.equal(gradient, repeated[site])
            torch.testing.assert_close(batched[site][row], gradient, atol=1e-12, rtol=1e-12)


@each_set(*THOROUGH, sets=FREE)
def test_each_forward_pass_keeps_its_own_scores(case: ModelCase, name: str) -> None:
    """Two forward passes, then their gradients together and one after the other, in either order."""
    model = model_of(case)
    prompts = [random_tokens(model, seed=seed) for seed in (1, 2)]
    sites = [POST, *attention_hooks("q")]
    with relp(model, name):
        alone = [by_capture(model, tokens, sites) for tokens in prompts]
        runs = [captured_run(model, tokens, sites) for tokens in prompts]
        losses = [next_token_loss(logits, tokens) for (logits, _), tokens in zip(runs, prompts, strict=True)]
        places = [value for _, store in runs for value in store.values()]
        together = torch.autograd.grad(losses[0] + losses[1], places, retain_graph=True)
        first = torch.autograd.grad(losses[0], list(runs[0][1].values()))
        second = torch.autograd.grad(losses[1], list(runs[1][1].values()))
    expected = [gradients[name] for gradients in alone for name in sites]
    for found, gradient in zip((*together, *first, *second), (*expected, *expected), strict=True):
        torch.testing.assert_close(found, gradient, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize("case", all_models("gpt2", "llama"))
def test_gim_softens_the_scores_that_the_model_used(case: ModelCase, when: str) -> None:
    """A user's hook that doubles the scores doubles those of the softmax at temperature 2 as well.

    Added inside the context, where it runs after ours, it may be refused instead, but never overlooked (trap 4).
    """
    model, tokens = model_of(case), tokens_of(case)
    doubled = replica_of(case)
    architecture = replace(doubled.architecture, score_scale=tuple(2 * s for s in doubled.architecture.score_scale))
    loss = partial(next_token_loss, tokens=tokens)
    _, expected = replica_gradients(replace(doubled, architecture=architecture), tokens, loss, "gim")
    names = ["hook_embed", POST, *attention_hooks("qkv")]
    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", lambda scores, hook: 2 * scores) for layer in range(2)]
    try:
        with ExitStack() as stack:
            contexts = [model.hooks(fwd_hooks=hooks), relp(model, "gim")]
            for context in contexts if when == "before" else reversed(contexts):
                stack.enter_context(context)
            found = by_capture(model, tokens, names)
    except PropagationError:
        assert when == "inside"
        return
    assert_close(found, {name: expected[name] for name in names}, case)


@each_set(*THOROUGH, sets=FREE)
def test_backward_hooks_inside_attention_are_heard(case: ModelCase, name: str) -> None:
    """A hook at the scores or the pattern fires in every layer; listening changes no other gradient."""
    model, tokens = model_of(case), tokens_of(case)
    heard: dict[str, Tensor] = {}
    names = attention_hooks(["attn_scores", "pattern"])
    hooks = [(hook, lambda gradient, hook, n=hook: heard.update({n: gradient.clone()})) for hook in names]
    expected = expected_gradients(case, name)
    with relp(model, name), model.hooks(bwd_hooks=hooks):
        assert_close(by_capture(model, tokens, list(expected)), expected, case, name)
    assert set(heard) == set(names)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in heard.values())


def contrast_gradients(model: Any, name: str, tokens: Tensor, **settings: Any) -> list[Tensor]:
    """Differentiate a contrast at the end with respect to the embedding and to neurons."""
    with relp(model, name):
        store: dict[str, Tensor] = {}
        hooks = [(hook, lambda v, hook, n=hook: store.update({n: v}) or v) for hook in ("hook_embed", POST)]
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks, **settings)
        return list(torch.autograd.grad(logits[0, -1, 3] - logits[0, -1, 5], [store["hook_embed"], store[POST]]))


def assert_padding_changes_nothing(model: Any, name: str, tokens: Tensor) -> None:
    padded, mask = left_padded(tokens)
    together = contrast_gradients(model, name, padded, attention_mask=mask)
    for found, own in zip(together, contrast_gradients(model, name, tokens), strict=True):
        torch.testing.assert_close(found[:, 2:], own, atol=1e-6 * float(own.abs().max()), rtol=0)
        assert found.isfinite().all()


def left_padded(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Put two padding tokens in front; the mask is zero there."""
    padded = torch.cat([torch.ones(1, 2, dtype=tokens.dtype), tokens], dim=1)
    return padded, (torch.arange(padded.shape[1])[None] >= 2).to(padded.dtype)


@each_set("gpt2", "llama", "gemma2", "bloom")
def test_left_padding_gives_a_prompt_its_own_gradients(case: ModelCase, name: str) -> None:
    """Where the model's own logits are NaN, as most Bridges' are, the error says so, whichever the set."""
    model, tokens = model_of(case), tokens_of(case)[:1]
    padded, mask = left_padded(tokens)
    if model(padded, attention_mask=mask).isfinite().all():
        assert_padding_changes_nothing(model, name, tokens)
        return
    assert case.backend == "TransformerBridge"
    with pytest.raises(NumericalError, match="rows of padding that attend to nothing"):
        contrast_gradients(model, name, padded, attention_mask=mask)


@pytest.mark.parametrize(
    ("case", "name"),
    [p for p in sets_and_models("gpt2", "llama", sets=("relp", "gim")) if p.values[0].backend == "TransformerBridge"],
)
def test_rows_of_scores_that_are_masked_throughout_send_no_nan_back(case: ModelCase, name: str) -> None:
    """In compatibility mode they are -inf, so that their softmax is NaN at any temperature.

    Not claimed of "attnlrp": its softmax gradient is torch's own, and on TransformerLens 3.9 NaN without rules too.
    """
    model = case.build()
    model.enable_compatibility_mode(disable_warnings=True)
    assert_padding_changes_nothing(settled(model), name, random_tokens(model, batch=1, pos=6))


# --- What a set asks of a model ---


def refused_by_gim(model: Any, tokens: Tensor, untouched: Untouched) -> None:
    """Refusing on entering is best; a model that shows only when it runs is refused then."""
    with (
        untouched(model),
        pytest.raises(UnsupportedModelError, match=r"blocks\.0\.attn.*hook_(attn_scores|pattern)"),
        relp(model, "gim"),
    ):
        model(tokens)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in WITHOUT_SCORES])
def test_gim_is_refused_where_hook_attn_scores_is_not_the_scores(case: ModelCase, untouched: Untouched) -> None:
    """These fire after attention, with the pattern; the gradients would be wrong by half without a sign of it."""
    refused_by_gim(model_of(case), tokens_of(case), untouched)


def with_sdpa(family: str) -> Any:
    """Build a Bridge whose Hugging Face model would use torch's fused attention."""
    if build_bridge_from_module is None:
        pytest.skip("TransformerBridge needs TransformerLens 3 or later")
    source = hugging_face(family)
    source.set_attn_implementation("sdpa")
    return settled(build_bridge_from_module(source, FAMILIES[family].architecture, hf_config=source.config).eval())


def test_gim_is_refused_where_fused_attention_shows_no_scores(untouched: Untouched) -> None:
    model = with_sdpa("opt")
    refused_by_gim(model, random_tokens(model), untouched)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_fused_attention_is_no_obstacle_where_no_scores_are_needed_or_the_bridge_computes_them(
    family: str, name: str
) -> None:
    """Most adapters compute attention themselves, whatever Hugging Face would use."""
    if (family, name) == ("opt", "gim"):
        return
    model, case = with_sdpa(family), ModelCase(family, "TransformerBridge")
    expected = expected_gradients(case, name)
    with relp(model, name):
        assert_close(by_capture(model, tokens_of(case), list(expected)), expected, case, name)


@pytest.mark.skipif(MAJOR < 3, reason="TransformerLens 2 has no attention sinks")
def test_gim_is_refused_where_attention_has_sinks(untouched: Untouched) -> None:
    """A column of its own joins the softmax after hook_attn_scores: the pattern is not the softmax of the scores."""
    model = settled(hooked_transformer("llama", use_attention_sinks=True))
    with (
        untouched(model),
        pytest.raises((UnsupportedModelError, PropagationError), match=r"blocks\.0\.attn"),
        relp(model, "gim"),
    ):
        model(random_tokens(model))
