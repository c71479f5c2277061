"""Edges: the direct effect of every chosen node, embedding, error and bias on every chosen node and target.

    weight(s -> t)      = (a_s - a_s,base) * d a_t / d a_s     attention and norms frozen, nodes in between stopped
    attribution(s -> t) = weight(s -> t) * dG / d a_t          through all paths from t on; averaged over prompts
    score(n)            = (a_n - a_n,base) * dG / d a_n        through all paths: what circuits choose their nodes by

G is the sum of the targets (`_targets.py`). The receiver t is a neuron, read through its MLP by the rules of relevance
propagation, or a feature, read by its encoder as it fires: both are linear in what arrives. So the weights of all
sources sum to the receiver's activation: chosen nodes, the embedding of each position, positional embeddings, biases
(those of dictionaries too), the dictionary's error at each layer and position, and at each position the remainder (the
nodes that were not chosen). A transcoder's skip is part of the paths, as attention is. That sum is checked whenever
edges are computed. Pairs take the corrupt prompt as baseline: weights are of differences, biases cancel, and the error
of the linearization is a source of its own. With a zero baseline the scores of embeddings, positions, biases and errors
sum to G.

The algorithm, for each prompt: one forward pass whose slots write leaves (`_prompt_graph.run_prompt`, `_slots`); one
backward pass for the scores (`total_effects`); then a vector-Jacobian product per receiver, through attention alone and
only below the receiver, in chunks of `max_bytes` (`_Edges`). Pairs need one forward pass more. Prompts are averaged
one by one, so tables per prompt would need nothing but another sum.
Source: Arora et al. 2026, arXiv 2601.22594; Ameisen et al. 2025 (features, local replacement); METHODS 1.2, 1.5, 4.5.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._errors import NumericalError, PropagationError, SettingsError
from .._progress import Bar, progress
from ..models._protocol import TransformerLensModel
from ..propagation._biases import biases_in_graph
from ..propagation._relp import relp
from ..tasks._tokenized import Batch
from ._prompt_graph import End, Paths, PromptRun, find_paths, run_prompt
from ._slots import Chosen, DictionarySlot, Reading, Slot, SlotChange, node_gradient, sum_last_axis, widened
from ._targets import Target, goal_positions

Targets = Sequence[Target] | Callable[[Float[Tensor, " d_vocab"]], Sequence[Target]]
"""Targets, or what finds them from the logits of the next token."""
_ALLOWED = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Totals:
    """Scores and mean values of one prompt, or their mean over prompts. Signs of gate and up come from the values.

    Lists have one entry per slot, each as wide as its slot has units.
    """

    score: Sequence[Float[Tensor, "pos _"]]
    activation: Sequence[Float[Tensor, "pos _"]]
    change: Sequence[Float[Tensor, "pos _"]]
    """The activation minus its baseline."""
    gradient: Sequence[Float[Tensor, "pos _"]]
    gate: Sequence[Float[Tensor, "pos _"] | None]
    up: Sequence[Float[Tensor, "pos _"] | None]
    errors: Sequence[Float[Tensor, " pos"] | None]
    """Scores of the error nodes."""
    embedding: Float[Tensor, " pos"]
    positional: float
    bias: float
    target_changes: Float[Tensor, " target"]
    """The targets minus their baseline: their scores."""
    target_values: Float[Tensor, " target"]
    probabilities: Float[Tensor, "goal d_vocab"]
    """Of the next token, at every position where a target is read (`goal_positions`)."""

    @property
    def target(self) -> float:
        """What the scores are shares of."""
        return float(self.target_changes.sum())

    def plus(self, other: "Totals") -> "Totals":
        """The sum, number by number."""
        add = lambda a, b: None if a is None or b is None else a + b  # noqa: E731
        sums: Any = {
            name: list(map(add, mine, theirs)) if isinstance(mine, list) else mine + theirs
            for (name, mine), theirs in zip(vars(self).items(), vars(other).values(), strict=True)
        }
        return Totals(**sums)

    def divided_by(self, n: int) -> "Totals":
        """Every number divided by `n`."""
        share = lambda tensors: [None if t is None else t / n for t in tensors]  # noqa: E731
        means: Any = {k: share(v) if isinstance(v, list) else v / n for k, v in vars(self).items()}
        return Totals(**means)


@dataclass(frozen=True)
class Columns:
    """Which column of the edges belongs to which source.

    The chosen nodes, embeddings by position, remainders by position, positional embeddings, biases, the linearization
    error; then the errors of each slot that has them, by position.
    """

    n_nodes: int
    n_positions: int
    slots_with_errors: tuple[int, ...] = ()

    @property
    def embedding(self) -> int:
        """First embedding."""
        return self.n_nodes

    @property
    def unselected(self) -> int:
        """First remainder."""
        return self.n_nodes + self.n_positions

    @property
    def positional(self) -> int:
        """The positional embeddings."""
        return self.n_nodes + 2 * self.n_positions

    @property
    def bias(self) -> int:
        """The biases."""
        return self.positional + 1

    @property
    def linearization_error(self) -> int:
        """What the linearization misses."""
        return self.positional + 2

    def errors(self, slot: int) -> slice:
        """The errors of one slot."""
        first = self.linearization_error + 1 + self.slots_with_errors.index(slot) * self.n_positions
        return slice(first, first + self.n_positions)

    def __len__(self) -> int:
        """How many sources there are."""
        return self.linearization_error + 1 + len(self.slots_with_errors) * self.n_positions


@dataclass(frozen=True, eq=False)
class DirectEffects:
    """Edges as one sparse matrix: a row per receiver, a column per source, two values per edge (weight, attribution).

    Receivers: the nodes, then the targets. Sources: see `Columns`.
    """

    nodes: Chosen
    edges: Float[Tensor, "receiver source 2"]
    totals: Totals
    largest_residual: float
    """What incoming edges leave unexplained where nothing should be, relative to the sum of their sizes."""
    chunk: int
    """Receivers in one backward pass."""
    columns: Columns
    targets: Sequence[Target]


def direct_effects(
    model: TransformerLensModel, batches: Sequence[Batch], nodes: Chosen | Callable[[Totals], Chosen],
    targets: Targets, *, paired: bool, slots: Sequence[Slot], max_bytes: int = 2**30, verbose: bool | None = None,
) -> DirectEffects:  # fmt: skip
    """Edges between `nodes`, and from everything to them and to the targets, averaged over prompts of one length.

    Args:
        model: any TransformerLens model that RelP applies to.
        batches: one prompt each.
        nodes: slot, position and unit; or what chooses them from the scores averaged over prompts.
        targets: see `Target`; for one prompt also what finds them from its next token's logits.
        paired: take differences to the corrupt prompts.
        slots: from `find_slots`.
        max_bytes: for the gradients of one chunk of receivers, on top of the graph of one prompt.
        verbose: a progress bar. None: after two seconds, in a notebook or a terminal.

    Raises:
        NumericalError: incoming edges do not sum to a receiver's activation.
        SettingsError: several prompts, and targets that depend on each.
    """
    if len(batches) > 1 and callable(targets):
        raise SettingsError(f"expected targets for {len(batches)} prompts; got a function that finds them for one.")
    if len(batches) > 1 and not isinstance(nodes, Tensor) and not callable(targets):
        nodes = nodes(mean_totals(model, batches, targets, paired=paired, slots=slots, verbose=verbose))
    mean, totals, largest_residual, chunk = None, None, 0.0, 1
    with progress(desc="edges", verbose=verbose, unit="receiver") as bar:
        for batch in batches:
            with open_prompt(model, batch, slots, targets, paired=paired) as prompt:
                own = total_effects(prompt)
                nodes = nodes if isinstance(nodes, Tensor) else nodes(own)
                edges = _Edges(prompt, own, nodes, max_bytes)
                bar.total = len(batches) * edges.size[0]
                indices, values = zip(*edges.chunks(bar), strict=True)
            share = torch.cat(values) / len(batches)
            matrix = torch.sparse_coo_tensor(torch.cat(indices, 1), share, edges.size, check_invariants=True)
            mean = matrix if mean is None else mean + matrix
            totals = own if totals is None else totals.plus(own)
            largest_residual, chunk = max(largest_residual, edges.largest_residual), edges.chunk
    assert mean is not None and totals is not None and isinstance(nodes, Tensor)
    totals = totals.divided_by(len(batches))
    return DirectEffects(nodes, mean.coalesce(), totals, largest_residual, chunk, edges.columns, prompt.targets)


def mean_totals(
    model: TransformerLensModel, batches: Sequence[Batch], targets: Sequence[Target], *, paired: bool,
    slots: Sequence[Slot], verbose: bool | None = False,
) -> Totals:  # fmt: skip
    """Total effects on the targets' sum, averaged over batches of one prompt each."""
    totals = None
    for batch in progress(batches, desc="scores", verbose=verbose, unit="prompt"):
        with open_prompt(model, batch, slots, targets, paired=paired) as prompt:
            own = total_effects(prompt)
        totals = own if totals is None else totals.plus(own)
    assert totals is not None
    return totals.divided_by(len(batches))


@dataclass(frozen=True, eq=False)
class OpenPrompt:
    """One prompt while its graph stands."""

    run: PromptRun
    slots: Sequence[Slot]
    paths: Paths
    targets: Sequence[Target]
    values: Float[Tensor, " target"]
    """Of the targets, with their past."""
    biases: Sequence[Tensor]
    position: int
    """Where targets are read."""
    paired: bool
    changes: Sequence[SlotChange]
    """Values minus their baseline, by slot; so are the three below."""
    embedding: Float[Tensor, "1 pos d_model"]
    positional: Float[Tensor, "1 pos d_model"] | None
    target_changes: Float[Tensor, " target"]


@contextmanager
def open_prompt(
    model: TransformerLensModel,
    batch: Batch,
    slots: Sequence[Slot],
    targets: Targets,
    *,
    paired: bool,
    keep: Iterable[str] = (),
) -> Iterator[OpenPrompt]:
    """Run a batch of one prompt with a graph, and its corrupt prompt without one for pairs.

    `keep` names hook points whose tensors of the graph the caller wants.

    Raises:
        PropagationError: gradients are disabled.
    """
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise PropagationError(
            "expected gradients to be enabled; call this outside torch.no_grad() and inference_mode()."
        )
    corrupt, base, position = batch.on_corrupt() if paired else None, None, int(batch.position[0])
    if corrupt is not None:
        with torch.no_grad():
            base = run_prompt(model, corrupt, slots)
    with relp(model), nullcontext({}) if paired else biases_in_graph(model) as bias_of_name:
        run, biases = run_prompt(model, batch, slots, keep), list(bias_of_name.values())
        found = targets(run.logits[0, position].detach()) if callable(targets) else targets
        values = torch.stack([target.value(run, batch) for target in found])
        target_changes, embedding = values.detach().cpu().double(), run.embedding.detach()
        positional = None if run.positional is None else run.positional.detach()
        base_slots: list[Any] = [None] * len(slots)
        if base is not None and corrupt is not None:
            base_values = torch.stack([target.value(base, corrupt) for target in found])
            target_changes, embedding = target_changes - base_values.cpu().double(), embedding - base.embedding
            positional, base_slots = None, list(base.slots)  # positional embeddings are the same on every prompt
        with torch.no_grad():
            changes = [slot.change(own, other) for slot, own, other in zip(slots, run.slots, base_slots, strict=True)]
        yield OpenPrompt(
            run, slots, find_paths(run, slots, values, biases, positional=positional is not None), found, values,
            biases, position, paired, changes, embedding, positional, target_changes,
        )  # fmt: skip


def total_effects(prompt: OpenPrompt) -> Totals:
    """Scores of one prompt: one backward pass.

    Where a dictionary has the nodes of a layer, paths go through its features, each frozen as firing or not, and
    through its skip, not through the MLP itself: the gradient of the local replacement model.
    """
    run, slots, changes = prompt.run, prompt.slots, prompt.changes
    gradients = prompt.paths.total(slots)
    at_sources = [gradients.get(("slot", i), torch.zeros_like(s.source))[0].flatten(1) for i, s in enumerate(run.slots)]
    bias = sum(_dot(bias, gradients.get(("bias", i))) for i, bias in enumerate(prompt.biases))
    nodes = [node_gradient(slots, index, dict(enumerate(at_sources))) for index in range(len(slots))]
    if not prompt.paired:
        bias += sum(s.bias_score(r, g, n) for s, r, g, n in zip(slots, run.slots, at_sources, nodes, strict=True))
    at_embedding = gradients.get(("embedding", 0), torch.zeros_like(prompt.embedding))
    return Totals(
        score=[widened(change.nodes) * g for change, g in zip(changes, nodes, strict=True)],
        activation=[widened(slot.nodes) for slot in run.slots],
        change=[widened(change.nodes) for change in changes],
        gradient=nodes,
        gate=[slot.gate for slot in run.slots],
        up=[slot.up for slot in run.slots],
        errors=[
            None if c.error is None else (widened(c.error) * g.to(c.error)).sum(-1).cpu().double()
            for c, g in zip(changes, at_sources, strict=True)
        ],
        embedding=(widened(prompt.embedding[0]) * widened(at_embedding[0])).sum(-1).cpu().double(),
        positional=0.0 if prompt.positional is None else _dot(prompt.positional, gradients.get(("positional", 0))),
        bias=float(bias),
        target_changes=prompt.target_changes,
        target_values=prompt.values.detach().cpu().double(),
        probabilities=run.logits[0, goal_positions(prompt.targets, prompt.position)].detach().float().softmax(-1).cpu(),
    )


class _Edges:
    """Edges of one prompt, a chunk of receivers at a time: nodes ordered by slot, then the targets."""

    def __init__(self, prompt: OpenPrompt, totals: Totals, nodes: Chosen, max_bytes: int) -> None:
        self._prompt, self._totals, self._nodes = prompt, totals, nodes
        n_targets, n_slots = len(prompt.targets), len(prompt.slots)
        with_errors = tuple(index for index, slot in enumerate(prompt.slots) if slot.has_error)
        self.columns = Columns(len(nodes), prompt.embedding.shape[1], with_errors)
        self.size = (len(nodes) + n_targets, len(self.columns), 2)
        self._rows_of_slot = [(nodes[:, 0] == index).nonzero()[:, 0] for index in range(n_slots)]
        self._order = torch.cat([*self._rows_of_slot, len(nodes) + torch.arange(n_targets)])
        self._slot = torch.cat([nodes[self._order[: len(nodes)], 0], torch.full((n_targets,), n_slots)])
        self.largest_residual = 0.0
        self.chunk = max(1, min(self.size[0], max_bytes // bytes_per_receiver(prompt)))

    def chunks(self, bar: Bar) -> Iterator[tuple[Int[Tensor, "2 edge"], Float[Tensor, "edge 2"]]]:
        """Receiver and source of each edge that is not zero, and its weight and attribution."""
        for rows, slot in zip(self._order.split(self.chunk), self._slot.split(self.chunk), strict=True):
            weights = self._weights(rows, slot)
            for index in slot.unique().tolist():
                here = slot == index
                yield self._sparse(weights[here], rows[here], index)
            bar.update(len(rows))

    def _weights(self, rows: Tensor, slot: Tensor) -> Float[Tensor, "receiver source"]:
        """Dense weights into some receivers, by one batched backward pass."""
        columns, prompt = self.columns, self._prompt
        weights = torch.zeros(len(rows), len(columns), dtype=torch.float64)

        def rows_of(index: int) -> range:
            here = (slot == index).nonzero()[:, 0].tolist()
            return range(here[0], here[-1] + 1) if here else range(0)

        def seeds(index: int, some: range) -> tuple[Tensor, Tensor]:
            reading = self._read(index, rows[some.start : some.stop])
            if reading.constant is not None and not prompt.paired:
                weights[some.start : some.stop, columns.bias] += reading.constant
            return reading.tensor, reading.seeds

        for receivers, end, gradient in prompt.paths.direct(rows_of, seeds):
            into = weights[receivers]
            if end.kind == "slot":
                self._add_slot(into, end, gradient.reshape(len(gradient), prompt.embedding.shape[1], -1))
            elif end.kind == "embedding":
                product = widened(gradient[:, 0]) * widened(prompt.embedding[0])
                into[:, columns.embedding : columns.unselected] = sum_last_axis(product)
            elif end.kind == "positional":
                assert prompt.positional is not None
                into[:, columns.positional] = _dots(prompt.positional, gradient)
            else:
                into[:, columns.bias] += _dots(prompt.biases[end.index], gradient)
        return weights

    def _read(self, index: int, rows: Tensor) -> Reading:
        """Receivers of one slot, or targets."""
        prompt = self._prompt
        if index == len(prompt.slots):
            values = prompt.values
            return Reading(values, torch.eye(len(values)).to(values)[rows - len(self._nodes)])
        place, unit = self._nodes[rows, 1], self._nodes[rows, 2]
        return prompt.slots[index].read(prompt.paths.runs[index], place, unit)

    def _add_slot(self, weights: Tensor, end: End, gradient: Float[Tensor, "receiver pos d"]) -> None:
        """Enter what comes from one slot: its chosen nodes, the remainder, errors and biases."""
        prompt, columns, own = self._prompt, self.columns, self._rows_of_slot[end.index]
        place, unit = self._nodes[own, 1], self._nodes[own, 2]
        run, change = prompt.paths.runs[end.index], prompt.changes[end.index]
        slot = prompt.slots[end.index]
        parts = slot.contributions(gradient, run, change, place, unit)
        weights[:, own] += parts.nodes
        left = weights[:, columns.unselected : columns.positional]
        left += parts.everything
        left.index_add_(1, place, parts.nodes, alpha=-1)
        for index, other in enumerate(prompt.slots):  # earlier layers of a cross-layer transcoder write here too
            if isinstance(slot, DictionarySlot) and isinstance(other, DictionarySlot) and slot.receives_from(other):
                own = self._rows_of_slot[index]
                place, unit = self._nodes[own, 1], self._nodes[own, 2]
                nodes = slot.contributions_of(other, gradient, prompt.changes[index], place, unit)
                weights[:, own] += nodes
                left.index_add_(1, place, nodes, alpha=-1)
        if parts.error is not None:
            weights[:, columns.errors(end.index)] = parts.error
        if parts.bias is not None and not prompt.paired:
            weights[:, columns.bias] += parts.bias

    def _sparse(self, weights: Tensor, rows: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Check the sums of one slot's receivers, add the linearization error, and keep what is not zero."""
        prompt = self._prompt
        if index == len(prompt.slots):
            activation, slope = prompt.target_changes[rows - len(self._nodes)], torch.ones(len(rows)).double()
            exact = not prompt.paired and all(target.linear for target in prompt.targets)
        else:
            place, unit = self._nodes[rows, 1], self._nodes[rows, 2]
            activation, slope = (
                values[place.to(values.device), unit.to(values.device)].cpu().double()
                for values in (prompt.changes[index].nodes, self._totals.gradient[index])
            )
            exact = not prompt.paired
        self._check(weights, activation, exact=exact)
        receiver, source = weights.nonzero(as_tuple=True)
        weight = weights[receiver, source]
        return torch.stack([rows[receiver], source]), torch.stack([weight, weight * slope[receiver]], 1)

    def _check(self, weights: Tensor, activation: Tensor, *, exact: bool) -> None:
        residual = activation - weights.sum(1)
        relative = residual.abs() / (weights.abs().sum(1) + torch.finfo(torch.float32).tiny)
        dtype = self._prompt.embedding.dtype
        if not exact:
            rounding = 100 * torch.finfo(dtype).eps
            weights[:, self.columns.linearization_error] = torch.where(relative > rounding, residual, 0.0)
            return
        self.largest_residual = max(self.largest_residual, float(relative.max()))
        if not self.largest_residual <= (allowed := _ALLOWED.get(dtype, 1e-4)):
            raise NumericalError(
                f"incoming edges do not sum to their node's activation: they are off by {self.largest_residual:.1e} of "
                f"the sum of their sizes, allowed {allowed:.0e}. check_model(model) says whether relevance is "
                "conserved on this model; instead of half precision use float32."
            )


def bytes_per_receiver(prompt: OpenPrompt) -> int:
    """Bytes that one receiver's backward pass holds at its peak: gradients at the residual stream and in one layer.

    Gradients of all neurons are held where the weights of few cannot be used, and of all layers where there are none.
    """
    n_positions, d_model = prompt.embedding[0].shape
    runs = prompt.paths.runs
    widths = [run.source[0, 0].numel() for run in runs if run.output is None or run.input is None]
    at_once = 0 if prompt.paths.layered else sum(widths)
    return prompt.embedding.element_size() * n_positions * (at_once + 5 * max(widths, default=0) + 12 * d_model)


def _dot(value: Tensor, gradient: Tensor | None) -> float:
    """The sum of the products, zero without a gradient."""
    return 0.0 if gradient is None else float((widened(value.detach()) * widened(gradient)).sum().cpu().double())


def _dots(value: Tensor, gradient: Tensor) -> Float[Tensor, " receiver"]:
    """The same for each receiver."""
    product = widened(gradient) * widened(value.detach())
    return sum_last_axis(product.reshape(len(gradient), 1, -1))[:, 0]
