"""Gradients at every hook of a replica, and whether relevance is conserved."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tests.families import ModelCase, hugging_face
from tests.replicas._architecture import ALL_RULES, Replica, switches_of
from tests.replicas._forward import forward
from tests.replicas._from_hooked import from_hooked_transformer
from tests.replicas._from_hugging_face import from_hugging_face

Metric = Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, ""]]


@cache
def replica_of(case: ModelCase, seed: int = 0) -> Replica:
    """Build the replica of `case.build(seed=seed)`; for a Bridge, from an untouched copy of its Hugging Face model."""
    if case.backend == "HookedTransformer":
        return from_hooked_transformer(case.build(seed=seed))
    return from_hugging_face(hugging_face(case.family, seed=seed))


@dataclass(frozen=True)
class _Run:
    logits: Tensor
    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    bias_relevance: dict[str, float]


def _run(replica: Replica, tokens: Int[Tensor, "batch pos"], metric: Metric, rules: str | Collection[str]) -> _Run:
    switches = switches_of(rules)
    leaves: dict[int, Tensor] = {}  # a tensor that serves under two names stays one tensor
    for value in replica.weights.values():
        leaves.setdefault(id(value), value.detach().clone().requires_grad_())
    live = Replica(replica.architecture, {name: leaves[id(value)] for name, value in replica.weights.items()})
    values: dict[str, Tensor] = {}

    def record(name: str, value: Tensor) -> Tensor:
        assert name not in values, f"{name} recorded twice"
        values[name] = value
        return value

    logits = forward(live, tokens, switches, record)
    biases = {id(live.weights[name]): name for name in live.weights if name.rsplit(".", 1)[-1].startswith("b")}
    wanted = list(values.values()) + [live.weights[name] for name in biases.values()]
    found = torch.autograd.grad(metric(logits), wanted, allow_unused=True)
    found = [torch.zeros_like(v) if g is None else g for v, g in zip(wanted, found, strict=True)]
    relevance = {
        name: float((live.weights[name] * gradient).sum().detach())
        for name, gradient in zip(biases.values(), found[len(values) :], strict=True)
    }
    gradients = dict(zip(values, found[: len(values)], strict=True))
    return _Run(logits.detach(), {n: v.detach() for n, v in values.items()}, gradients, relevance)


def replica_gradients(
    replica: Replica, tokens: Int[Tensor, "batch pos"], metric: Metric, rules: str | Collection[str] = ()
) -> tuple[Float[Tensor, "batch pos d_vocab"], dict[str, Tensor]]:
    """Return the logits and the gradient of the metric at every recorded hook, under rules or a named set."""
    run = _run(replica, tokens, metric, rules)
    return run.logits, run.gradients


@dataclass(frozen=True)
class Conservation:
    """Both sides of: relevance of the embeddings plus that of the biases equals sum_v (dm/dz_v) z_v."""

    embeddings: float
    biases: dict[str, float]
    logits: float
    """z is taken before a soft cap."""

    @property
    def relative_error(self) -> float:
        """Return the gap over the larger of the sides' magnitudes."""
        total = self.embeddings + sum(self.biases.values())
        size = max(abs(self.logits), abs(self.embeddings) + sum(map(abs, self.biases.values())))
        return abs(total - self.logits) / size


def measure_conservation(
    replica: Replica, tokens: Int[Tensor, "batch pos"], metric: Metric, rules: str | Collection[str] = ALL_RULES
) -> Conservation:
    """Sum the relevance of token and positional embeddings, of biases, and of the logits."""
    relevance, biases = relevance_of(replica, tokens, metric, rules)
    embeddings = relevance["token_embedding"] + relevance.get("hook_pos_embed", 0.0)
    return Conservation(embeddings, biases, relevance["logits_before_cap"])


def relevance_of(
    replica: Replica, tokens: Int[Tensor, "batch pos"], metric: Metric, rules: str | Collection[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Sum value times gradient at every recorded hook, and for every bias."""
    run = _run(replica, tokens, metric, rules)
    relevance = {name: float((value * run.gradients[name]).sum()) for name, value in run.values.items()}
    return relevance, run.bias_relevance
