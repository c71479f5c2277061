"""Runs in which every node is mixed with its counterfactual value by a mask, and the loss of such a run.

    value of a node = m * its live value + (1 - m) * its counterfactual value          ("keep"; "flip" the other way)

with one number m in [0, 1] per node; the counterfactual value is that of the corrupt prompt, zero, or a mean. Losses,
per prompt, with f the faithfulness of that prompt:

    matching    |f - 1| (flip: |f|)
    metric      minus the metric (flip: the metric)
    kl          from the clean run's next token (flip: from that of the run without any node)

Source: METHODS 5.8.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import SettingsError
from ..bases._runs import Values, answers_only, capture, require_fired, run_logits
from ..bases._site import Parts, Site, refuse_cross_layer
from ..models._threads import hooked
from ..propagation._relp import frozen
from ..tasks._metrics import logit_difference, measure, read
from ..tasks._tokenized import Batch
from ._method import Method
from ._patching import block_shape
from ._scope import Blocks, Means, Scope

CHOICES = {
    "schedule": ("log", "uniform"),
    "loss": ("matching", "metric", "kl"),
    "direction": ("keep", "flip"),
    "start": ("zero", "relp"),
    "cache": ("auto", "always", "never"),
}
Shapes = dict[tuple[str, str], torch.Size]
References = Mapping[str, Tensor]
"""Per pair: counterfactual values by "kind/hook", and "full", "empty" (metric) or "target" (log-probabilities)."""


@dataclass(frozen=True)
class NestedMasks(Method):
    """What a learned mask and its form without learning have in common: budgets, a loss, and scores that are an
    order.
    """

    ranking: ClassVar[Literal["abs", "signed"]] = "signed"
    steps: int
    schedule: str
    loss: str
    direction: str

    def check(self, scope: Scope) -> None:
        """Known choices, positive numbers, single nodes, and no denoising."""
        refuse_cross_layer(scope.sites, self.name)
        for option, known in CHOICES.items():
            value = getattr(self, option, known[0])
            if value not in known:
                raise SettingsError(f"expected {option} of {self.name} out of {list(known)}; got {value!r}.")
        for option in ("steps", "pairs_per_step"):
            if hasattr(self, option):
                self.at_least_one(option)
        for option in ("lr", "eps", "temperature", "cooling"):
            value = getattr(self, option, 1.0)
            if not (0 < value < math.inf) or (option == "cooling" and value > 1):
                at_most = " of at most 1" if option == "cooling" else ""
                raise SettingsError(
                    f"expected {option} of {self.name} to be a positive number{at_most}; got {value!r}."
                )
        if scope.units == "sum":
            raise SettingsError(f"units='sum' adds up scores; {self.name} ranks single nodes. Use units='keep'.")
        self.no_denoising(scope)


def draw_budget(u: float, n: int, schedule: str) -> float:
    """The budget at quantile u, 0 <= u < 1, strictly between 0 and n: n**u ("log"), or one of 1 .. n - 1."""
    return min(n**u, n - 0.5) if schedule == "log" else 1.0 + math.floor(u * (n - 1))


def node_shapes(scope: Scope, values: Values) -> Shapes:
    """The shape of every block of scores, in the order of the nodes."""
    parts = {site.hook: site.take_apart(values) for site in scope.sites}
    kinds = [(site.hook, kind) for site in scope.sites for kind in ("node", *site.vectors)]
    return {(hook, kind): block_shape(scope, parts[hook], kind) for hook, kind in kinds}


def split_blocks(flat: Float[Tensor, " node"], shapes: Shapes) -> Blocks:
    """One number per node, as blocks."""
    pieces = flat.split([shape.numel() for shape in shapes.values()])
    return {key: piece.reshape(shape) for (key, shape), piece in zip(shapes.items(), pieces, strict=True)}


def mask_gradient(
    method: NestedMasks,
    scope: Scope,
    batch: Batch,
    references: References,
    means: Means | None,
    mask: Float[Tensor, " node"],
    shapes: Shapes,
) -> tuple[Tensor, Float[Tensor, " node"]]:
    """The loss of a batch under a mask and its gradient at the mask, both summed over the batch."""
    mask = mask.detach().requires_grad_(True)
    with torch.enable_grad(), frozen(scope.model):
        run = masked_run(method, scope, batch, references, means, split_blocks(mask, shapes))
        losses = loss_of_run(method, run, references)
        (gradient,) = torch.autograd.grad(losses.sum(), mask)
    return losses.detach().sum(dtype=torch.float64), gradient


def masked_run(
    method: NestedMasks,
    scope: Scope,
    batch: Batch,
    references: References,
    means: Means | None,
    masks: Blocks,
) -> Tensor:
    """What the loss reads, per prompt, with every node mixed: the metric, or log-probabilities ("kl").

    Masks are of what stays live ("keep") or of what takes counterfactual values ("flip").
    """
    counterfactuals = _counterfactual_parts(scope, batch, references, means)
    fired: Values = {}
    hooks: list[tuple[str, Any]] = []
    for site in scope.sites:
        seen: Values = {}
        hooks += [capture(seen, name) for name in site.reads if name != site.hook]
        hooks.append((site.hook, partial(_mix_site, method, site, masks, counterfactuals[site.hook], seen, fired)))
    logits, narrowed = _run(method, scope, batch, hooks)
    require_fired(fired, [site.hook for site in scope.sites], scope.model)
    fired.clear()
    if method.loss == "kl":
        return read(logits, narrowed).log_softmax(-1)
    return measure(scope.metric, logits, narrowed)


def _mix_site(
    method: NestedMasks, site: Site, masks: Blocks, other: Parts | None, seen: Values, fired: Values, value: Tensor,
    hook: Any,
) -> Tensor:  # fmt: skip
    """As a hook: every node of a site mixed with its counterfactual value."""
    live = site.take_apart({**seen, site.hook: value})
    seen.clear()
    fired[site.hook] = value
    nodes = _mix(method, live.nodes, other and other.nodes, masks[site.hook, "node"])
    vectors = {
        kind: _mix(method, vector, other and other.vectors[kind], masks[site.hook, kind][..., None])
        for kind, vector in live.vectors.items()
    }
    return site.put_together(Parts(nodes, vectors), value)


def measure_references(
    method: NestedMasks,
    scope: Scope,
    batch: Batch,
    means: Means | None,
    shapes: Shapes,
    *,
    large: bool = True,
) -> dict[str, Tensor]:
    """What the masked runs of a batch are mixed with and compared with; without `large`, the metrics alone."""
    found: dict[str, Tensor] = {}
    if scope.baseline == "corrupt" and (large or method.loss == "matching"):
        for hook, parts in scope.baseline_parts(batch, means).items():
            if parts is not None:
                found |= {f"{kind}/{hook}": part for kind, part in {"node": parts.nodes, **parts.vectors}.items()}
    none = {key: torch.full(shape, float(method.direction == "flip")) for key, shape in shapes.items()}
    with torch.no_grad():
        if method.loss == "matching":
            logits, narrowed = _run(method, scope, batch, [])
            found["full"] = measure(scope.metric, logits, narrowed)
            found["empty"] = masked_run(method, scope, batch, found, means, none)
        if method.loss == "kl" and large:
            if method.direction == "keep":
                logits, narrowed = _run(method, scope, batch, [])
                found["target"] = read(logits, narrowed).log_softmax(-1)
            else:
                found["target"] = masked_run(method, scope, batch, found, means, none)
    return found if large else {key: tensor for key, tensor in found.items() if key in ("full", "empty")}


def _run(method: NestedMasks, scope: Scope, batch: Batch, hooks: Sequence[tuple[str, Any]]) -> tuple[Tensor, Batch]:
    """Logits, and the batch that they are of: at the answers alone where that is all that is read."""
    narrow = logit_difference if method.loss == "kl" else scope.metric
    with answers_only(scope.model, batch, narrow) as narrowed, hooked(scope.model, hooks):
        return run_logits(scope.model, batch.clean, batch.attention_mask), narrowed


def _mix(method: NestedMasks, live: Tensor, other: Tensor | None, mask: Tensor) -> Tensor:
    """mask * live + (1 - mask) * other, or the other way round ("flip"); None is zero."""
    live = live.to(torch.promote_types(live.dtype, torch.float32))  # masks are finer than a bfloat16
    other = live.new_zeros(()).expand_as(live) if other is None else other.to(live)
    first, second = (other, live) if method.direction == "keep" else (live, other)
    return torch.lerp(first, second, mask.to(live))


def _counterfactual_parts(
    scope: Scope, batch: Batch, references: References, means: Means | None
) -> Mapping[str, Parts | None]:
    if scope.baseline != "corrupt":
        return scope.baseline_parts(batch, means)
    return {
        site.hook: Parts(
            references[f"node/{site.hook}"], {kind: references[f"{kind}/{site.hook}"] for kind in site.vectors}
        )
        for site in scope.sites
    }


def loss_of_run(method: NestedMasks, found: Tensor, references: References) -> Tensor:
    """One number per prompt."""
    keep = method.direction == "keep"
    if method.loss == "metric":
        return -found if keep else found
    if method.loss == "kl":
        target = references["target"].to(found)
        return (target.exp() * (target - found)).sum(-1)
    full, empty = references["full"].to(found), references["empty"].to(found)
    span = torch.maximum((full - empty).abs(), 0.1 * full.abs()).clamp(min=1e-6)
    return (found - (full if keep else empty)).abs() / span


def select(batch: Batch, rows: Sequence[int]) -> Batch:
    """These rows of a batch."""
    index = torch.tensor(rows, device=batch.index.device)
    columns: dict[str, Any] = {field.name: getattr(batch, field.name) for field in fields(batch)}
    for name, column in columns.items():
        if isinstance(column, Tensor):
            columns[name] = column[index.to(column.device)]
        elif column is not None:
            columns[name] = tuple(column[row] for row in rows)
    return Batch(**columns)
