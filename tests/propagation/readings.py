"""The three ways in which a TransformerLens user reads gradients, and what the replicas say that they are."""

from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tests.families import FAMILIES, ModelCase, random_tokens
from tests.replicas import replica_gradients, replica_of, switches_of

Metric = Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, ""]]
Gradients = dict[str, Tensor]

ALL_RULES = ("ln", "identity", "half", "attention")
SINGLE_RULES = tuple((rule,) for rule in ALL_RULES)
STEPWISE_NORMS = pytest.mark.filterwarnings("ignore:Backward hooks on hook_scale/hook_normalized require")
"""TransformerBridge warns, relp or not, that a backward hook inside a norm makes it compute the norm itself."""
PAIRS_OF_RULES = tuple((a, b) for i, a in enumerate(ALL_RULES) for b in ALL_RULES[i + 1 :])


@cache
def model_of(case: ModelCase) -> Any:
    """Build each model once: tests leave it as they found it."""
    return settled(case.build())


def settled(model: Any) -> Any:
    """Let the Bridge add the hooks of its own that it adds on its first runs."""
    model.run_with_cache(random_tokens(model))
    return model


@cache
def tokens_of(case: ModelCase) -> Int[Tensor, "batch pos"]:
    """Draw two prompts longer than the sliding windows."""
    return random_tokens(model_of(case), batch=2, pos=6)


def next_token_loss(logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Average the cross-entropy of the next tokens, as `return_type="loss"` does: the one scalar that a cache reads."""
    return -logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).mean()


@cache
def expected_gradients(case: ModelCase, rules: str | tuple[str, ...]) -> Gradients:
    """Ask the replica for d loss at every hook that it records and that a backward hook can be put on.

    Queries and keys that the rules cut from the graph are left out: no gradient arrives there.
    """
    tokens = tokens_of(case)
    _, gradients = replica_gradients(replica_of(case), tokens, partial(next_token_loss, tokens=tokens), rules)
    cut = ("hook_q", "hook_k") if "attention" in switches_of(rules) else ()
    return {name: gradients[name] for name in recorded_hooks(case, gradients) if not name.endswith(cut)}


def recorded_hooks(case: ModelCase, names: Collection[str]) -> list[str]:
    """List the names that are hooks of the model; on the Bridge `hook_resid_mid` misses the skip connection."""
    present = [name for name in names if name in model_of(case).hook_dict]
    is_bridge = case.backend == "TransformerBridge"
    return [name for name in present if not (is_bridge and name.endswith("hook_resid_mid"))]


def by_capture(model: Any, tokens: Tensor, names: Sequence[str]) -> Gradients:
    """Capture the tensors in forward hooks and call `autograd.grad`."""
    captured: dict[str, Tensor] = {}

    def capture(value: Tensor, hook: Any, name: str) -> Tensor:
        captured[name] = value
        return value

    logits = model.run_with_hooks(tokens, fwd_hooks=[(name, partial(capture, name=name)) for name in names])
    found = torch.autograd.grad(next_token_loss(logits, tokens), [captured[name] for name in names])
    return dict(zip(names, found, strict=True))


def by_backward_hooks(model: Any, tokens: Tensor, names: Sequence[str]) -> Gradients:
    """Let the user's own backward hooks collect the gradients."""
    captured: dict[str, Tensor] = {}

    def capture(gradient: Tensor, hook: Any, name: str) -> None:
        captured[name] = gradient.detach().clone()

    with model.hooks(bwd_hooks=[(name, partial(capture, name=name)) for name in names]):
        next_token_loss(model(tokens), tokens).backward()
    return captured


def by_cache(model: Any, tokens: Tensor, names: Sequence[str]) -> Gradients:
    """Let `run_with_cache` go forward and backward."""
    _, found = model.run_with_cache(tokens, return_type="loss", incl_bwd=True, return_cache_object=False)
    return {name: found[f"{name}_grad"] for name in names}


READINGS = {"capture": by_capture, "backward_hooks": by_backward_hooks, "cache": by_cache}


def assert_close(found: Gradients, expected: Gradients, case: ModelCase, note: object = "") -> None:
    """Compare hook by hook, relative to the largest gradient at the hook."""
    missing = expected.keys() - found.keys()
    assert not missing, f"{case.id} {note}: no gradient arrived at {sorted(missing)}"
    for name, gradient in expected.items():
        size = max(float(gradient.abs().max()), 1e-3)
        off = float((found[name].reshape(gradient.shape) - gradient).abs().max()) / size
        assert off <= case.tolerance, f"{case.id} {note} {name}: off by {off:.1e} of the largest gradient"


def rules_that_matter(case: ModelCase) -> set[str]:
    """List the rules that change this family's gradient."""
    family = FAMILIES[case.family]
    settings = family.hooked or {}
    rules = {"attention"}
    rules |= {"ln"} if "normalization_type" not in settings or settings["normalization_type"] else set()
    rules |= set() if settings.get("act_fn") == "relu" else {"identity"}
    return rules | ({"half"} if family.gated else set())
