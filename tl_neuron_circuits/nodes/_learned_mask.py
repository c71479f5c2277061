"""Learned nested masks (Matryoshka attribution), and the same without learning.

Every node n has a score s_n, zero at first. A step draws a budget k, 0 < k < number of nodes, and softens "the k best":

    m_n = sigmoid((s_n - tau) / T),   tau such that sum_n m_n = k
    value of a node = m_n * its live value + (1 - m_n) * its counterfactual value          (direction "keep")
    s <- Adam(s, d loss / d s)

One mask holds the next, so one run gives a ranking and thereby circuits of every size. tau moves with s:
dtau/ds_n = w_n / sum w with w = m (1 - m), hence

    d loss / d s_n = w_n / T * (g_n - sum w g / sum w),   g = d loss / d m

`MaskGradient` is the expected negative gradient while all scores are zero, where m is the same t = k / n for all nodes:
an integrated gradient over t in mask space,

    score(n) = - mean_k t (1 - t) / T * (g_n(t) - mean over nodes of g(t))

Sign: positive supports the answer. Scores are those of a ranking: read them by sign, never by |score|.
Cost: a forward and a backward per step and pair of the step; counterfactual runs come on top.
Source: Arora et al. 2026, arXiv 2609.25518; METHODS 5.8.
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import msgspec
import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import FileFormatError, NumericalError, SettingsError
from .._files import present, read_directory, require_shapes, write_directory
from .._memory import Halving, available_memory
from .._processes import Processes
from .._progress import progress
from ..bases._runs import Values, answers_only, require_fired, run_logits
from ..bases._site import Parts, Site, refuse_cross_layer
from ..models._threads import hooked
from ..propagation._relp import frozen
from ..tasks._metrics import logit_difference, measure, read
from ..tasks._tokenized import Batch, TokenizedPairs
from ._method import Method
from ._patching import block_shape
from ._relp import RelP
from ._scope import Blocks, Means, Scope

CHOICES = {
    "schedule": ("log", "uniform"),
    "loss": ("matching", "metric", "kl"),
    "direction": ("keep", "flip"),
    "start": ("zero", "relp"),
    "cache": ("auto", "always", "never"),
}
KIND, SCHEMA = "learning", 2
_BETAS = (0.9, 0.999)
_CACHED_SHARE = 0.25  # of the memory that is free may go to counterfactual values
_WRITING = 20  # writing may take one part in so many of the time
Shapes = dict[tuple[str, str], torch.Size]
References = Mapping[str, Tensor]
"""Per pair: counterfactual values by "kind/hook", and "full", "empty" (metric) or "target" (log-probabilities)."""


@dataclass(frozen=True)
class MaskGradient(Method):
    """Gradients in mask space, averaged over how much of every node is kept: the learned mask without learning.

    Args:
        steps: how many budgets, at the quantiles of `schedule`.
        schedule: as in `LearnedMask`, and so are the others.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tnc.nodes.MaskGradient(steps=5).label
        'mask_gradient(steps=5)'
    """

    name: ClassVar[str] = "mask_gradient"
    ranking: ClassVar[Literal["abs", "signed"]] = "signed"
    steps: int = 10
    schedule: str = "uniform"
    loss: str = "metric"
    direction: str = "keep"
    temperature: float = 0.5

    def check(self, scope: Scope) -> None:
        """Known choices, positive numbers, single nodes, and no denoising."""
        _check(self, scope)

    def score(
        self, scope: Scope, batch: Batch, means: Means | None, *, rows: int, verbose: bool | None
    ) -> tuple[Values, Blocks]:
        """The negative gradient at masks that are the same for all nodes, weighted by t (1 - t) / T."""
        values = scope.values(batch)
        shapes = node_shapes(scope, values)
        n, references = (
            sum(shape.numel() for shape in shapes.values()),
            measure_references(self, scope, batch, means, shapes),
        )
        total = torch.zeros(n, device=batch.clean.device)
        for step in range(self.steps):
            t = draw_budget((step + 0.5) / self.steps, n, self.schedule) / n
            _, gradient = mask_gradient(self, scope, batch, references, means, torch.full_like(total, t), shapes)
            total -= t * (1 - t) / self.temperature / self.steps * gradient
        blocks = split_blocks(total, shapes)
        return values, {key: block.to(values[key[0]].device) for key, block in blocks.items()}

    def finish(self, sums: Blocks, n_pairs: int) -> Blocks:
        """The mean over pairs, from which the mean over nodes is taken: tau moves with all of them."""
        n = sum(block.numel() for block in sums.values())
        mean = sum(float(block.double().sum()) for block in sums.values()) / n
        return {key: (block - mean) / n_pairs for key, block in sums.items()}


@dataclass(frozen=True)
class LearnedMask(Method):
    """Scores learned so that the k best nodes do the task, for every k at once.

    A run with fewer steps is the beginning of a run with more: with `attribute(..., resume=directory)` the steps 50,
    150 and 500 are three calls that go on from each other.

    Args:
        steps: of Adam.
        schedule: budgets uniform in log k ("log", for circuits that are small among many nodes), or in k ("uniform").
        loss: "matching", |f - 1| with f the faithfulness of each pair (to flip: |f|), which punishes overshoot;
            "metric", minus the metric; "kl", from the clean run's next token (to flip: from that of the run without any
            node). In "matching" a pair whose metric moves by less than a tenth of itself is divided by that tenth.
        direction: "keep": the best nodes stay live and must do the task; "flip": they alone take counterfactual values
            and must undo it.
        lr: of Adam, and so is `eps`: at 1e-8 a step is the sign of its gradient, and scores of many nodes are counts.
        temperature: T above; after step i it is T * cooling**i.
        start: "zero", or "relp": from RelP's scores r, as sign(r) log(1 + |r| / median) scaled to at most 1.
        pairs_per_step: prompts of one step, all with the same budget.
        seed: of the order of pairs and of the budgets.
        cache: keep all counterfactual values ("always": 4 bytes per node and pair), or run them again in every step
            ("never"); "auto" keeps them where they take at most a quarter of the free memory.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> scores = tnc.attribute(model, pairs, method=tnc.LearnedMask(steps=5))
        >>> scores.settings["learning"]["steps"], scores.ranking
        (5, 'signed')
    """

    name: ClassVar[str] = "learned_mask"
    ranking: ClassVar[Literal["abs", "signed"]] = "signed"
    steps: int = 500
    schedule: str = "log"
    loss: str = "matching"
    direction: str = "keep"
    lr: float = 0.05
    eps: float = 1e-2
    temperature: float = 0.5
    cooling: float = 1.0
    start: str = "zero"
    pairs_per_step: int = 8
    seed: int = 0
    cache: str = "auto"

    def check(self, scope: Scope) -> None:
        """Known choices, positive numbers, single nodes, and no denoising."""
        _check(self, scope)

    def score(
        self, scope: Scope, batch: Batch, means: Means | None, *, rows: int, verbose: bool | None
    ) -> tuple[Values, Blocks]:
        """Of one batch: the first step's direction, which takes as much memory as any step."""
        free = MaskGradient(1, self.schedule, self.loss, self.direction, self.temperature)
        return free.score(scope, batch, means, rows=rows, verbose=verbose)

    def learn(
        self,
        scope: Scope,
        tokens: TokenizedPairs,
        means: Means | None,
        processes: Processes,
        halving: Halving,
        *,
        resume: str | Path | None,
        identity: Mapping[str, Any],
        shown: bool | None,
    ) -> tuple[Blocks, dict[str, Any]]:
        """The scores of every node after all steps, and how they came about, as JSON has it.

        Under several processes each runs its own pairs of a step; gradients are added up, so all take the same step.
        """
        pairs = _Pairs(self, scope, tokens, means, processes, halving)
        n = sum(shape.numel() for shape in pairs.shapes.values())
        if n < 2:
            raise SettingsError(f"expected at least two nodes to rank; got {n}. Use a basis with more nodes.")
        state = None
        if resume is not None:
            state = processes.from_first(lambda: _read_state(Path(resume), identity, self.steps))
        if state is None:
            scores = torch.zeros(n) if self.start == "zero" else pairs.relp_scores()
            state = _State(scores, torch.zeros(n), torch.zeros(n), [])
        state.to(tokens.answer.device)
        save = _Saving(Path(resume), identity) if resume is not None and processes.first else None
        begun = len(state.losses)
        schedule = itertools.islice(self._draws(len(tokens), n), begun, self.steps)
        with progress(total=self.steps, initial=begun, desc=self.label, verbose=shown, unit="step") as bar:
            for step, (chosen, budget) in enumerate(schedule, begun):
                self._step(state, pairs, chosen, budget, self.temperature * self.cooling**step)
                if save is not None:
                    save(state, last=step + 1 == self.steps)
                bar.set_postfix(loss=f"{state.losses[-1]:.3f}", refresh=False)
                bar.update()
        notes = {
            "steps": self.steps,
            "losses": state.losses,
            "softness": softness(state.scores, self.temperature * self.cooling ** (self.steps - 1)),
            "counterfactuals": pairs.how,
            "forward_equivalents_per_pair": self._cost(len(tokens), scope, again=pairs.how == "run again"),
        }
        blocks = split_blocks(state.scores, pairs.shapes)
        return {key: block.to(pairs.devices[key[0]]) for key, block in blocks.items()}, notes

    def _step(self, state: "_State", pairs: "_Pairs", chosen: list[int], budget: float, temperature: float) -> None:
        """One step of Adam on the mean loss of the chosen pairs at this budget."""
        tau = find_threshold(state.scores, budget, temperature)
        mask = ((state.scores - tau) / temperature).sigmoid()
        loss, gradient = pairs.gradient(mask, chosen)
        gradient = through_threshold(gradient, mask, temperature)
        count = len(state.losses) + 1
        state.first.lerp_(gradient, 1 - _BETAS[0])
        state.second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        size = (state.second / (1 - _BETAS[1] ** count)).sqrt_().add_(self.eps)
        state.scores.addcdiv_(state.first, size, value=-self.lr / (1 - _BETAS[0] ** count))
        state.losses.append(loss)

    def _draws(self, n_pairs: int, n_nodes: int) -> Iterator[tuple[list[int], float]]:
        """Pairs and budget of every step: each pair once per round, in random order; draws do not depend on `steps`."""
        order, budgets = (torch.Generator().manual_seed(self.seed + 1_000_003 * kind) for kind in (0, 1))

        def rows() -> Iterator[int]:
            while True:
                yield from torch.randperm(n_pairs, generator=order).tolist()

        row = rows()
        while True:
            u = float(torch.rand((), generator=budgets, dtype=torch.float64))
            chosen = list(itertools.islice(row, min(self.pairs_per_step, n_pairs)))
            yield chosen, draw_budget(u, n_nodes, self.schedule)

    def _cost(self, n_pairs: int, scope: Scope, *, again: bool) -> float:
        """Forward passes per pair; a backward pass counts as one, since parameters get no gradient."""
        seen = self.steps * min(self.pairs_per_step, n_pairs) / n_pairs
        counterfactual = float(scope.baseline == "corrupt")
        references = {"metric": 0, "matching": 2, "kl": 1}[self.loss]
        each = counterfactual + (references if self.loss == "kl" else 0)
        start = (2 + counterfactual) if self.start == "relp" else 0
        once = counterfactual + references
        return start + 2 * seen + (once + seen * each if again else once)


def draw_budget(u: float, n: int, schedule: str) -> float:
    """The budget at quantile u, 0 <= u < 1, strictly between 0 and n: n**u ("log"), or one of 1 .. n - 1."""
    return min(n**u, n - 0.5) if schedule == "log" else 1.0 + math.floor(u * (n - 1))


def find_threshold(scores: Float[Tensor, " node"], budget: float, temperature: float) -> float:
    """tau with sum_n sigmoid((s_n - tau) / T) = budget, by Newton's method inside a bracket.

    The step is that of log(sum / (n - sum)), which is linear in tau while scores are close to each other, so that the
    first one is then exact; a step that leaves the bracket becomes a bisection.
    """
    n = scores.numel()
    if budget > n / 2:  # the smaller side is added up: near n, 1 - m is lost in float32
        return -find_threshold(-scores, n - budget, temperature)
    logit = math.log(budget / (n - budget))
    low, high = (float(end) - temperature * logit for end in torch.aminmax(scores))
    tau = float(scores.mean(dtype=torch.float64)) - temperature * logit
    for _ in range(100):
        mask = ((scores - tau) / temperature).sigmoid_()
        total = float(mask.sum(dtype=torch.float64))
        if abs(total - budget) <= 1e-7 * budget:
            break
        low, high = (tau, high) if total > budget else (low, tau)
        slope = (total - float(mask.square_().sum(dtype=torch.float64))) / temperature  # of -sum, by tau
        new = math.nan
        if slope > 0 and 0 < total < n:
            new = tau + (math.log(total / (n - total)) - logit) * total * (n - total) / (n * slope)
        before, tau = tau, new if low < new < high else (low + high) / 2
        if abs(tau - before) <= 1e-7 * max(abs(tau), temperature):  # as fine as float32 scores can tell
            break
    return tau


def through_threshold(gradient: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """The gradient at the scores from that at the mask, tau moving along; zero where every mask is saturated."""
    weight = mask * (1 - mask)
    total = weight.sum(dtype=torch.float64).clamp(min=torch.finfo(torch.float32).tiny)
    mean = ((weight * gradient).sum(dtype=torch.float64) / total).to(gradient)
    return weight * (gradient - mean) / temperature


def softness(scores: Float[Tensor, " node"], temperature: float) -> list[list[float]]:
    """For sizes k in powers of ten: k, and the mask's mass outside the k best over k: 0 where the mask is hard."""
    ordered = scores.sort(descending=True).values
    rows = []
    for size in (10**power for power in range(9)):
        if size < len(ordered):
            tau = find_threshold(ordered, float(size), temperature)
            outside = float(((ordered[size:] - tau) / temperature).sigmoid().sum(dtype=torch.float64))
            rows.append([float(size), outside / size])
    return rows


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
    method: "MaskGradient | LearnedMask",
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
        losses = _loss(
            method, masked_run(method, scope, batch, references, means, split_blocks(mask, shapes)), references
        )
        (gradient,) = torch.autograd.grad(losses.sum(), mask)
    return losses.detach().sum(dtype=torch.float64), gradient


def masked_run(
    method: "MaskGradient | LearnedMask",
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
    fired: dict[str, Tensor] = {}

    def hooks_of(site: Site) -> Iterator[tuple[str, Callable[..., Tensor | None]]]:
        seen: Values = {}
        for name in site.reads:
            if name != site.hook:
                yield name, lambda value, hook, name=name: seen.__setitem__(name, value)

        def mix(value: Tensor, hook: Any) -> Tensor:
            live, other = site.take_apart({**seen, site.hook: value}), counterfactuals[site.hook]
            seen.clear()
            fired[site.hook] = value
            nodes = _mix(method, live.nodes, other and other.nodes, masks[site.hook, "node"])
            vectors = {
                kind: _mix(method, vector, other and other.vectors[kind], masks[site.hook, kind][..., None])
                for kind, vector in live.vectors.items()
            }
            return site.put_together(Parts(nodes, vectors), value)

        yield site.hook, mix

    hooks = [hook for site in scope.sites for hook in hooks_of(site)]
    logits, narrowed = _run(method, scope, batch, hooks)
    require_fired(fired, [site.hook for site in scope.sites], scope.model)
    fired.clear()
    if method.loss == "kl":
        return read(logits, narrowed).log_softmax(-1)
    return measure(scope.metric, logits, narrowed)


def measure_references(
    method: "MaskGradient | LearnedMask",
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


class _Pairs:
    """This process' pairs, with what their masked runs are mixed with and compared with."""

    def __init__(
        self,
        method: LearnedMask,
        scope: Scope,
        tokens: TokenizedPairs,
        means: Means | None,
        processes: Processes,
        halving: Halving,
    ) -> None:
        self._method, self._scope, self._means = method, scope, means
        self._processes, self._halving = processes, halving
        self._groups = list(tokens.batches(len(tokens)))  # one per length
        self._place = {
            index: (number, row)
            for number, group in enumerate(self._groups)
            for row, index in enumerate(group.index.tolist())
        }
        first = select(self._groups[0], [0])
        values = scope.values(first)
        self.shapes = node_shapes(scope, values)
        self.devices = {site.hook: values[site.hook].device for site in scope.sites}
        self._cached = processes.from_first(lambda: self._fits(first, len(tokens)))
        self._stored: dict[str, Tensor] = {}
        self._rows: dict[int, int] = {}
        self._store()

    @property
    def how(self) -> str:
        """Where counterfactual values come from."""
        if self._scope.baseline != "corrupt":
            return self._scope.baseline
        return "cached" if self._cached else "run again"

    def gradient(self, mask: Float[Tensor, " node"], chosen: Sequence[int]) -> tuple[float, Tensor]:
        """The mean loss of the chosen pairs, and its gradient at the mask: the same on every process."""
        loss, gradient = torch.zeros((), dtype=torch.float64), torch.zeros_like(mask)
        for batch in self._batches(chosen):
            for attempt in self._halving.pieces(batch):
                with attempt as piece:
                    references = self._references(piece)
                    part = mask_gradient(self._method, self._scope, piece, references, self._means, mask, self.shapes)
                    loss += part[0].to(loss)
                    gradient += part[1]
        total = self._processes.total({"loss": loss, "gradient": gradient})
        gradient = total["gradient"] / len(chosen)
        if not gradient.isfinite().all():
            raise NumericalError(
                "the gradient at the mask contains NaN or inf: the model's values or gradients overflow. Try dtype "
                "float32 or bfloat16, and check_model(model)."
            )
        return float(total["loss"]) / len(chosen), gradient

    def relp_scores(self) -> Tensor:
        """RelP's scores r as a start: sign(r) log(1 + |r| / median |r|), scaled to at most 1."""
        sums = torch.zeros(sum(shape.numel() for shape in self.shapes.values()))
        for batch in self._batches(list(self._place)):
            for attempt in self._halving.pieces(batch):
                with attempt as piece:
                    _, blocks = RelP().score(self._scope, piece, self._means, rows=1, verbose=False)
                    sums += torch.cat([blocks[key].reshape(-1).cpu() for key in self.shapes])
        sums = self._processes.total({"sums": sums})["sums"]
        live = sums.abs()[sums != 0]
        if not len(live):
            return sums
        started = sums.sign() * (sums.abs() / live.median()).log1p()
        return started / started.abs().max()

    def _batches(self, chosen: Sequence[int]) -> Iterator[Batch]:
        """This process' part of the chosen pairs, in batches of one length."""
        mine = [index for index in chosen if index % self._processes.count == self._processes.rank]
        for number, group in enumerate(self._groups):
            rows = [self._place[index][1] for index in mine if self._place[index][0] == number]
            for start in range(0, len(rows), self._halving.size):
                yield select(group, rows[start : start + self._halving.size])

    def _fits(self, first: Batch, n: int) -> bool:
        if self._method.cache != "auto":
            return self._method.cache == "always"
        with torch.no_grad():
            found = measure_references(self._method, self._scope, first, self._means, self.shapes)
        needed = n * sum(tensor.numel() * tensor.element_size() for tensor in found.values())
        available = available_memory(self._scope.model)
        return needed <= (2e9 if available is None else _CACHED_SHARE * available)

    def _store(self) -> None:
        """Measure what every pair is compared with, once; all of it where it is cached."""
        if not self._cached and self._method.loss != "matching":
            return
        kept: dict[str, list[tuple[list[int], Tensor]]] = {}
        for batch in self._batches(list(self._place)):
            for attempt in self._halving.pieces(batch):
                with attempt as piece:
                    found = measure_references(
                        self._method, self._scope, piece, self._means, self.shapes, large=self._cached
                    )
                    for name, tensor in found.items():
                        kept.setdefault(f"{piece.clean.shape[1]}/{name}", []).append((piece.index.tolist(), tensor))
        for name in list(kept):
            parts = kept.pop(name)
            self._stored[name] = torch.cat([tensor for _, tensor in parts])
            self._rows |= {index: row for row, index in enumerate(itertools.chain(*(rows for rows, _ in parts)))}

    def _references(self, batch: Batch) -> References:
        prefix = f"{batch.clean.shape[1]}/"
        rows = torch.tensor([self._rows.get(index, 0) for index in batch.index.tolist()])
        found = {
            name.removeprefix(prefix): tensor[rows.to(tensor.device)]
            for name, tensor in self._stored.items()
            if name.startswith(prefix)
        }
        if not self._cached:
            again = MaskGradient(1, loss="metric") if self._method.loss == "matching" else self._method
            with torch.no_grad():
                found |= measure_references(again, self._scope, batch, self._means, self.shapes)
        return found


@dataclass
class _State:
    """Scores, Adam's moments and the losses of all steps so far."""

    scores: Tensor
    first: Tensor
    second: Tensor
    losses: list[float]

    def to(self, device: torch.device) -> None:
        for name in ("scores", "first", "second"):
            setattr(self, name, getattr(self, name).to(device))


class _Saving:
    """Writes the state after a step, unless writing would take more than a twentieth of the time."""

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self._directory, self._identity = directory, identity
        self._written_at, self._cost = time.monotonic(), 0.0

    def __call__(self, state: _State, *, last: bool) -> None:
        started = time.monotonic()
        if not last and started - self._written_at < _WRITING * self._cost:
            return
        tensors = {name: getattr(state, name).cpu().contiguous() for name in ("scores", "first", "second")}
        write_directory(
            self._directory, KIND, SCHEMA, tensors, {"settings": dict(self._identity), "losses": state.losses}
        )
        self._written_at = time.monotonic()
        self._cost = self._written_at - started


class _Notes(msgspec.Struct, forbid_unknown_fields=True):
    settings: dict[str, Any]
    losses: list[float]


def _read_state(directory: Path, identity: Mapping[str, Any], steps: int) -> _State | None:
    """The state on disk; None where there is none yet."""
    if not directory.exists() or (directory.is_dir() and not present(directory)):
        return None
    tensors, notes = read_directory(directory, KIND, SCHEMA, _Notes)
    n = tensors["scores"].numel() if "scores" in tensors else 0
    require_shapes(directory, tensors, dict.fromkeys(("scores", "first", "second"), (n,)))
    wanted = json.loads(json.dumps(dict(identity)))
    if notes.settings != wanted:
        keys = sorted(wanted.keys() | notes.settings.keys())
        differ = [key for key in keys if notes.settings.get(key) != wanted.get(key)]
        raise FileFormatError(
            f"{directory} is of another run ({differ} differ). Resume from another directory, or remove it."
        )
    if len(notes.losses) > steps:
        raise SettingsError(
            f"{directory} holds {len(notes.losses)} steps, more than the {steps} asked for. Ask for at least as "
            "many, or begin in another directory."
        )
    return _State(tensors["scores"], tensors["first"], tensors["second"], notes.losses)


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


def _run(
    method: "MaskGradient | LearnedMask", scope: Scope, batch: Batch, hooks: Sequence[tuple[str, Any]]
) -> tuple[Tensor, Batch]:
    """Logits, and the batch that they are of: at the answers alone where that is all that is read."""
    narrow = logit_difference if method.loss == "kl" else scope.metric
    with answers_only(scope.model, batch, narrow) as narrowed, hooked(scope.model, hooks):
        return run_logits(scope.model, batch.clean, batch.attention_mask), narrowed


def _mix(method: "MaskGradient | LearnedMask", live: Tensor, other: Tensor | None, mask: Tensor) -> Tensor:
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


def _loss(method: "MaskGradient | LearnedMask", found: Tensor, references: References) -> Tensor:
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


def _check(method: "MaskGradient | LearnedMask", scope: Scope) -> None:
    refuse_cross_layer(scope.sites, method.name)
    for option, known in CHOICES.items():
        value = getattr(method, option, known[0])
        if value not in known:
            raise SettingsError(f"expected {option} of {method.name} out of {list(known)}; got {value!r}.")
    for option in ("steps", "pairs_per_step"):
        if hasattr(method, option):
            method.at_least_one(option)
    for option in ("lr", "eps", "temperature", "cooling"):
        value = getattr(method, option, 1.0)
        if not (0 < value < math.inf) or (option == "cooling" and value > 1):
            at_most = " of at most 1" if option == "cooling" else ""
            raise SettingsError(f"expected {option} of {method.name} to be a positive number{at_most}; got {value!r}.")
    if scope.units == "sum":
        raise SettingsError(f"units='sum' adds up scores; {method.name} ranks single nodes. Use units='keep'.")
    method.no_denoising(scope)
