"""Edges: the direct effect of every chosen node, embedding, error and bias on every chosen node and goal.

    weight(s -> t)      = (a_s - a_s,base) * d a_t / d a_s     attention and norms frozen, nodes in between stopped
    attribution(s -> t) = weight(s -> t) * dG / d a_t          through all paths from t on; averaged over prompts

The target is a neuron, read through its MLP by the rules of relevance propagation, or a feature, read by its encoder
as it fires: both are linear in what arrives. So the weights of all sources sum to the target's activation: chosen
nodes, the embedding of each position, positional embeddings, biases (those of dictionaries too), per layer and position
the dictionary's error, and per position the remainder (the nodes that were not chosen). A transcoder's skip is part of
the paths, as attention is. That sum is checked whenever edges are computed. With pairs, weights are of differences,
biases cancel, and the residual of the linearization is a source of its own.

Cost: a forward and a backward pass a prompt (one forward more for pairs), and a vector-Jacobian product a target,
through attention alone and only below the target, in chunks of `max_bytes`.
Source: Arora et al. 2026, arXiv 2601.22594; Ameisen et al. 2025 (features); METHODS 1.5, 4.5.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from .._errors import NumericalError, SettingsError
from ..bases._activations import Neurons
from ..models._protocol import TransformerLensModel
from ..tasks._tokenized import Batch
from ._paths import End
from ._prompt import Goals, Prompt, opened
from ._slot import Chosen, Reading, Slot, summed, wide
from ._slots import slots_of
from ._target import Goal
from ._totals import Totals

_ALLOWED = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.1}


@dataclass(frozen=True, eq=False)
class DirectEffects:
    """Edges as one sparse matrix: a row a target, a column a source, two values an edge (weight, attribution).

    Targets: the nodes, then the goals. Sources: see `Columns`.
    """

    nodes: Chosen
    edges: Float[Tensor, "target source 2"]
    totals: Totals
    largest_residual: float
    """What incoming edges leave unexplained where nothing should be, relative to the sum of their sizes."""
    chunk: int
    """Targets in one backward pass."""
    columns: "Columns"
    goals: Sequence[Goal]


@dataclass(frozen=True)
class Columns:
    """Where each kind of source stands: nodes, by position embeddings and remainders, positions, biases, the residual.

    Then the errors of each slot that has them, by position.
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
    def residual(self) -> int:
        """What the linearization misses."""
        return self.positional + 2

    def errors(self, slot: int) -> slice:
        """The errors of one slot."""
        first = self.residual + 1 + self.slots_with_errors.index(slot) * self.n_positions
        return slice(first, first + self.n_positions)

    def __len__(self) -> int:
        """How many sources there are."""
        return self.residual + 1 + len(self.slots_with_errors) * self.n_positions


def mean_totals(
    model: TransformerLensModel, batches: Sequence[Batch], goals: Sequence[Goal], *, paired: bool,
    slots: Sequence[Slot] | None = None,
) -> Totals:  # fmt: skip
    """Total effects on the goals' sum, averaged over batches of one prompt each."""
    slots = slots_of(model, Neurons()) if slots is None else slots
    found = None
    for batch in batches:
        with opened(model, batch, slots, goals, paired=paired) as prompt:
            found = prompt.totals if found is None else found.plus(prompt.totals)
    assert found is not None
    return found.over(len(batches))


def direct_effects(
    model: TransformerLensModel, batches: Sequence[Batch], nodes: Chosen | Callable[[Totals], Chosen],
    goals: Goals, *, paired: bool, slots: Sequence[Slot] | None = None, max_bytes: int = 2**30,
    verbose: bool = False,
) -> DirectEffects:  # fmt: skip
    """Edges between `nodes`, and from everything to them and to the goals, averaged over prompts of one length.

    Args:
        model: any TransformerLens model that RelP applies to.
        batches: one prompt each.
        nodes: slot, position and unit, ordered by slot; or what chooses them from the scores averaged over prompts.
        goals: see `Goal`; for one prompt also what finds them from its next token's logits.
        paired: take differences to the corrupt prompts.
        slots: from `slots_of`; the neurons of every layer unless given.
        max_bytes: for the gradients of one chunk of targets, on top of the graph of one prompt.
        verbose: show progress.

    Raises:
        NumericalError: incoming edges do not sum to a target's activation.
        SettingsError: several prompts, and goals that depend on each.
    """
    slots = slots_of(model, Neurons()) if slots is None else slots
    if len(batches) > 1 and callable(goals):
        raise SettingsError(f"expected goals for {len(batches)} prompts; got a function that finds them for one.")
    if len(batches) > 1 and not isinstance(nodes, Tensor) and not callable(goals):
        nodes = nodes(mean_totals(model, batches, goals, paired=paired, slots=slots))
    found, sums, worst, chunk = None, None, 0.0, 1
    with tqdm(desc="edges", disable=not verbose, unit="target") as bar:
        for batch in batches:
            with opened(model, batch, slots, goals, paired=paired) as prompt:
                nodes = nodes if isinstance(nodes, Tensor) else nodes(prompt.totals)
                edges = _Edges(prompt, nodes, max_bytes)
                bar.total = len(batches) * edges.size[0]
                parts, of = list(edges.of_chunks(bar)), prompt.goals
            indices, values = torch.cat([i for i, _ in parts], 1), torch.cat([v for _, v in parts])
            matrix = torch.sparse_coo_tensor(indices, values / len(batches), edges.size, check_invariants=True)
            found = matrix if found is None else (found + matrix)
            sums = prompt.totals if sums is None else sums.plus(prompt.totals)
            worst, chunk, columns = max(worst, edges.largest_residual), edges.chunk, edges.columns
    assert found is not None and sums is not None and isinstance(nodes, Tensor)
    return DirectEffects(nodes, found.coalesce(), sums.over(len(batches)), worst, chunk, columns, of)


class _Edges:
    """Edges of one prompt, a chunk of targets at a time: nodes ordered by slot, then the goals."""

    def __init__(self, prompt: Prompt, nodes: Chosen, max_bytes: int) -> None:
        self._prompt, self._slots, self._change = prompt, prompt.slots, prompt.change
        self._n_goals, n_slots = len(prompt.goals), len(prompt.slots)
        self._linear = all(goal.linear for goal in prompt.goals)
        with_errors = tuple(index for index, slot in enumerate(prompt.slots) if slot.has_error)
        self.columns = Columns(len(nodes), prompt.change.embedding.shape[1], with_errors)
        self.size = (len(nodes) + self._n_goals, len(self.columns), 2)
        self._allowed = _ALLOWED.get(prompt.change.embedding.dtype, 1e-4)
        self._nodes = nodes
        self._of_slot = [(nodes[:, 0] == index).nonzero()[:, 0] for index in range(n_slots)]
        goals = len(nodes) + torch.arange(self._n_goals)
        self._order = torch.cat([*self._of_slot, goals])
        self._slot = torch.cat([nodes[self._order[: len(nodes)], 0], torch.full((self._n_goals,), n_slots)])
        self.largest_residual = 0.0
        self.chunk = max(1, min(self.size[0], max_bytes // bytes_per_target(prompt)))

    def of_chunks(self, bar: tqdm) -> Iterator[tuple[Int[Tensor, "2 edge"], Float[Tensor, "edge 2"]]]:
        """Target and source of each edge that is not zero, and its weight and attribution."""
        for rows, slot in zip(self._order.split(self.chunk), self._slot.split(self.chunk), strict=True):
            weights = self._weights(rows, slot)
            for index in slot.unique().tolist():
                here = slot == index
                yield self._sparse(weights[here], rows[here], index)
            bar.update(len(rows))

    def _weights(self, rows: Tensor, slot: Tensor) -> Float[Tensor, "target source"]:
        """Dense weights of some targets, by one batched backward pass."""
        columns, change = self.columns, self._change
        weights = torch.zeros(len(rows), len(columns), dtype=torch.float64)

        def rows_of(index: int) -> range:
            here = (slot == index).nonzero()[:, 0].tolist()
            return range(here[0], here[-1] + 1) if here else range(0)

        def seeds(index: int, some: range) -> tuple[Tensor, Tensor]:
            reading = self._read(index, rows[some.start : some.stop])
            if reading.constant is not None and not change.paired:
                weights[some.start : some.stop, columns.bias] += reading.constant
            return reading.tensor, reading.seeds

        for targets, end, gradient in self._prompt.paths.direct(rows_of, seeds):
            into = weights[targets]
            if end.kind == "slot":
                self._arrive(into, end, gradient.reshape(len(gradient), change.embedding.shape[1], -1))
            elif end.kind == "embedding":
                into[:, columns.embedding : columns.unselected] = summed(
                    wide(gradient[:, 0]) * wide(change.embedding[0])
                )
            elif end.kind == "positional":
                assert change.positional is not None
                into[:, columns.positional] = _dots(change.positional, gradient)
            else:
                into[:, columns.bias] += _dots(self._prompt.biases[end.index], gradient)
        return weights

    def _read(self, index: int, rows: Tensor) -> Reading:
        goals = self._prompt.values
        if index == len(self._slots):
            return Reading(goals, torch.eye(len(goals)).to(goals)[rows - len(self._nodes)])
        place, unit = self._nodes[rows, 1], self._nodes[rows, 2]
        return self._slots[index].read(self._prompt.paths.runs[index], place, unit)

    def _arrive(self, weights: Tensor, end: End, gradient: Float[Tensor, "target pos d"]) -> None:
        """Enter what comes from one slot: its chosen nodes, the remainder, errors and biases."""
        slot, columns, here = end.index, self.columns, self._of_slot[end.index]
        place, unit = self._nodes[here, 1], self._nodes[here, 2]
        run, change = self._prompt.paths.runs[slot], self._change.slots[slot]
        found = self._slots[slot].arrivals(gradient, run, change, place, unit)
        weights[:, here] = found.nodes
        left = weights[:, columns.unselected : columns.positional]
        left += found.everything
        left.index_add_(1, place, found.nodes, alpha=-1)
        if found.error is not None:
            weights[:, columns.errors(slot)] = found.error
        if found.bias is not None and not self._change.paired:
            weights[:, columns.bias] += found.bias

    def _sparse(self, weights: Tensor, rows: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Check the sums of one slot's targets, add the residual where one belongs, and keep what is not zero."""
        prompt, paired = self._prompt, self._change.paired
        if index == len(self._slots):
            activation = self._change.goals[rows - len(self._nodes)]
            slope, exact = torch.ones(len(rows)).double(), not paired and self._linear
        else:
            place, unit = self._nodes[rows, 1], self._nodes[rows, 2]
            activation, slope = (
                of[place.to(of.device), unit.to(of.device)].cpu().double()
                for of in (self._change.slots[index].nodes, prompt.totals.gradient[index])
            )
            exact = not paired
        self._check(weights, activation, exact=exact)
        target, source = weights.nonzero(as_tuple=True)
        weight = weights[target, source]
        return torch.stack([rows[target], source]), torch.stack([weight, weight * slope[target]], 1)

    def _check(self, weights: Tensor, activation: Tensor, *, exact: bool) -> None:
        residual = activation - weights.sum(1)
        relative = residual.abs() / (weights.abs().sum(1) + torch.finfo(torch.float32).tiny)
        if not exact:
            rounding = 100 * torch.finfo(self._change.embedding.dtype).eps
            weights[:, self.columns.residual] = torch.where(relative > rounding, residual, 0.0)
            return
        self.largest_residual = max(self.largest_residual, float(relative.max()))
        if not self.largest_residual <= self._allowed:
            raise NumericalError(
                f"incoming edges do not sum to their target's activation: off by {self.largest_residual:.1e} of "
                f"the sum of their sizes, allowed {self._allowed:.0e}. check_model(model) tells whether relevance "
                "is conserved on this model; in half precision use float32."
            )


def _dots(value: Tensor, gradient: Tensor) -> Float[Tensor, " target"]:
    return summed((wide(gradient) * wide(value.detach())).reshape(len(gradient), 1, -1))[:, 0]


def bytes_per_target(prompt: Prompt) -> int:
    """Bytes that one target's backward pass holds at its peak: gradients at the residual stream and inside one layer.

    Gradients of all neurons are held where the weights of few cannot be used, and of all layers where there are none.
    """
    n_positions, d_model = prompt.change.embedding[0].shape
    runs = prompt.paths.runs
    wide_ones = [run.source[0, 0].numel() for run in runs if run.output is None or run.input is None]
    at_once = 0 if prompt.paths.layered else sum(wide_ones)
    numbers = at_once + 5 * max(wide_ones, default=0) + 12 * d_model
    return prompt.change.embedding.element_size() * n_positions * numbers
