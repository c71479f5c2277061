"""Edges: the direct effect of every chosen neuron, embedding and bias on every chosen neuron and goal.

    weight(s -> t)      = (a_s - a_s,base) * d a_t / d a_s     attention and norms frozen, MLPs in between stopped
    attribution(s -> t) = weight(s -> t) * dG / d a_t          through all paths from t on; averaged over prompts

The rules of relevance propagation act inside the target's MLP too, so the weights of all sources sum to the target's
activation: chosen neurons, the embedding of each position, positional embeddings, biases, and per position the
remainder (the neurons that were not chosen). That sum is checked whenever edges are computed. With pairs, weights are
of differences, biases cancel, and the residual of the linearisation is a source of its own.

Cost: two forward passes a prompt (three for pairs) and a vector-Jacobian product a target, in chunks of `max_bytes`.
Source: Arora et al. 2026, arXiv 2601.22594; METHODS 1.5.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from .._errors import NumericalError
from ..models import TransformerLensModel
from ..propagation import biases_in_graph, relp
from ..tasks import Batch
from ._edges_run import PromptRun, run_prompt
from ._edges_totals import Changes, Totals, totals, wide
from ._goals import Goal

_ALLOWED = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.1}
Neurons = Int[Tensor, "neuron 3"]
"""Layer, position and unit of each chosen neuron, ordered by layer."""


@dataclass(frozen=True, eq=False)
class DirectEffects:
    """Edges as one sparse matrix: a row a target, a column a source, two values an edge (weight, attribution).

    Targets: the neurons, then the goals. Sources: the neurons, then by position the embeddings and the remainders, then
    the positional embeddings, the biases and the residual.

    Example:
        >>> import torch
        >>> import tl_neuron_circuits as tnc
        >>> from tl_neuron_circuits import attribution
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.PromptPairs(clean=["The dogs near the cat"], answer=[" are"])
        >>> batches = list(tnc.tasks.tokenise(model, pairs).batches(1))
        >>> goals = [attribution.answer_goal(against_wrong=False)]
        >>> neurons = torch.tensor([[0, 2, 7], [1, 2, 9], [2, 5, 3]])  # layer, position, unit
        >>> found = attribution.direct_effects(model, batches, neurons, goals, paired=False)
        >>> weight, attribution_of_edge = found.edges.to_dense()[1, 0].tolist()  # from the first neuron to the second
        >>> found.columns.embedding, found.columns.remainder, len(found.columns)
        (3, 9, 18)
    """

    neurons: Neurons
    n_positions: int
    edges: Float[Tensor, "target source 2"]
    totals: Totals
    largest_residual: float
    """What incoming edges leave unexplained where nothing should be, relative to the sum of their sizes."""
    chunk: int
    """Targets in one backward pass."""

    @property
    def columns(self) -> "Columns":
        """Where each kind of source stands."""
        return Columns(len(self.neurons), self.n_positions)


@dataclass(frozen=True)
class Columns:
    """The order of the sources."""

    n_neurons: int
    n_positions: int

    @property
    def embedding(self) -> int:
        """First embedding."""
        return self.n_neurons

    @property
    def remainder(self) -> int:
        """First remainder."""
        return self.n_neurons + self.n_positions

    @property
    def positional(self) -> int:
        """The positional embeddings."""
        return self.n_neurons + 2 * self.n_positions

    @property
    def bias(self) -> int:
        """The biases."""
        return self.positional + 1

    @property
    def residual(self) -> int:
        """What the linearisation misses."""
        return self.positional + 2

    def __len__(self) -> int:
        """How many sources there are."""
        return self.positional + 3


def mean_totals(
    model: TransformerLensModel, batches: Sequence[Batch], goals: Sequence[Goal], *, paired: bool
) -> Totals:
    """Total effects on the goals' sum, averaged over batches of one prompt each.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> from tl_neuron_circuits import attribution
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.PromptPairs(clean=["The dogs near the cat"], answer=[" are"])
        >>> batches = list(tnc.tasks.tokenise(model, pairs).batches(1))
        >>> goals = [attribution.answer_goal(against_wrong=False)]
        >>> found = attribution.mean_totals(model, batches, goals, paired=False)
        >>> everything = float(found.embedding.sum()) + found.positional + found.bias
        >>> abs(everything / float(found.goals.sum()) - 1) < 1e-3  # relevance is conserved
        True
    """
    found = None
    for batch in batches:
        one, _ = totals(model, batch, goals, paired=paired)
        found = one if found is None else found.plus(one)
    assert found is not None
    return found.over(len(batches))


def direct_effects(
    model: TransformerLensModel, batches: Sequence[Batch], neurons: Neurons, goals: Sequence[Goal], *,
    paired: bool, max_bytes: int = 2**30, verbose: bool = False,
) -> DirectEffects:  # fmt: skip
    """Edges between `neurons`, and from everything to them and to the goals, averaged over prompts of one length.

    Args:
        model: any TransformerLens model that RelP applies to.
        batches: one prompt each.
        neurons: layer, position and unit, ordered by layer.
        goals: see `Goal`.
        paired: take differences to the corrupt prompts.
        max_bytes: for the gradients of one chunk of targets, on top of the graph of one prompt.
        verbose: show progress.

    Raises:
        NumericalError: incoming edges do not sum to a target's activation.

    Example:
        >>> import torch
        >>> import tl_neuron_circuits as tnc
        >>> from tl_neuron_circuits import attribution
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.PromptPairs(clean=["The dogs near the cat"], answer=[" are"])
        >>> batches = list(tnc.tasks.tokenise(model, pairs).batches(1))
        >>> goals = [attribution.answer_goal(against_wrong=False)]
        >>> neurons = torch.tensor([[0, 2, 7], [1, 2, 9], [2, 5, 3]])  # layer, position, unit
        >>> found = attribution.direct_effects(model, batches, neurons, goals, paired=False)
        >>> tuple(found.edges.shape) == (len(neurons) + len(goals), len(found.columns), 2)
        True
        >>> found.largest_residual < 1e-4
        True
    """
    n_positions = batches[0].clean.shape[1]
    columns = Columns(len(neurons), n_positions)
    size = (len(neurons) + len(goals), len(columns), 2)
    found, sums, worst, chunk = None, None, 0.0, 1
    with tqdm(total=len(batches) * size[0], desc="edges", disable=not verbose, unit="target") as bar:
        for batch in batches:
            one, change = totals(model, batch, goals, paired=paired)
            prompt = _Prompt(model, batch, goals, neurons, columns, change, one, max_bytes)
            parts = list(prompt.edges(bar))
            indices, values = torch.cat([i for i, _ in parts], 1), torch.cat([v for _, v in parts])
            matrix = torch.sparse_coo_tensor(indices, values / len(batches), size, check_invariants=True)
            found = matrix if found is None else (found + matrix)
            sums = one if sums is None else sums.plus(one)
            worst, chunk = max(worst, prompt.largest_residual), prompt.chunk
    assert found is not None and sums is not None
    return DirectEffects(neurons, n_positions, found.coalesce(), sums.over(len(batches)), worst, chunk)


class _Prompt:
    """Edges of one prompt, a chunk of targets at a time."""

    def __init__(
        self, model: TransformerLensModel, batch: Batch, goals: Sequence[Goal], neurons: Neurons, columns: Columns,
        change: Changes, total: Totals, max_bytes: int,
    ) -> None:  # fmt: skip
        self._model, self._batch, self._goals, self._neurons = model, batch, goals, neurons
        self._columns, self._change, self._total = columns, change, total
        self._allowed = _ALLOWED.get(change.embedding.dtype, 1e-4)
        self.largest_residual = 0.0
        self.chunk = max(1, min(len(neurons), max_bytes // bytes_per_target(change)))

    def edges(self, bar: tqdm) -> Iterator[tuple[Int[Tensor, "2 edge"], Float[Tensor, "edge 2"]]]:
        """Target and source of each edge that is not zero, and its weight and attribution."""
        biased = nullcontext({}) if self._change.paired else biases_in_graph(self._model)
        with relp(self._model), biased as biases:
            run = run_prompt(self._model, self._batch, cut=True)
            goals = torch.stack([goal.value(run, self._batch) for goal in self._goals])
            for layer in self._neurons[:, 0].unique().tolist():
                of_layer = (self._neurons[:, 0] == layer).nonzero()[:, 0]
                for rows in of_layer.split(self.chunk):
                    yield self._neuron_rows(run, biases, layer, rows)
                    bar.update(len(rows))
            for rows in torch.arange(len(self._goals)).split(self.chunk):
                yield self._goal_rows(run, biases, goals, rows)
                bar.update(len(rows))

    def _neuron_rows(self, run: PromptRun, biases: dict, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        written = run.written[layer]
        place, unit = self._neurons[rows, 1].to(written.device), self._neurons[rows, 2].to(written.device)
        chosen = written.new_zeros((len(rows), *written.shape))
        chosen[torch.arange(len(rows), device=written.device), 0, place, unit] = 1
        weights = self._weights(run, biases, written, chosen, layer)
        activation = self._change.neurons[layer][0, place, unit].cpu().double()
        slope = self._total.gradient[layer][place, unit].cpu().double()
        return self._sparse(weights, rows, activation, slope, exact=not self._change.paired)

    def _goal_rows(self, run: PromptRun, biases: dict, goals: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.eye(len(goals), dtype=goals.dtype, device=goals.device)[rows.to(goals.device)]
        weights = self._weights(run, biases, goals, chosen, len(run.read))
        exact = not self._change.paired and all(goal.linear for goal in self._goals)
        rows_after = rows + len(self._neurons)
        return self._sparse(weights, rows_after, self._change.goals[rows], torch.ones(len(rows)).double(), exact=exact)

    def _weights(
        self, run: PromptRun, biases: dict[str, Tensor], output: Tensor, chosen: Tensor, n_layers: int
    ) -> Float[Tensor, "target source"]:
        """Dense weights of a few targets, by one batched backward pass."""
        change, columns = self._change, self._columns
        positional = [] if change.positional is None or run.positional is None else [run.positional]
        inputs = [*run.read[:n_layers], run.embedding, *positional, *biases.values()]
        gradients = torch.autograd.grad(
            output, inputs, chosen, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        weights = torch.zeros(len(chosen), len(columns), dtype=torch.float64)
        left = weights[:, columns.remainder : columns.positional]
        for layer, gradient in enumerate(gradients[:n_layers]):
            if gradient is None:
                continue
            product = wide(gradient[:, 0]) * wide(change.neurons[layer][0])
            here = (self._neurons[:, 0] == layer).nonzero()[:, 0]
            place, unit = self._neurons[here, 1], self._neurons[here, 2]
            of_chosen = product[:, place.to(product.device), unit.to(product.device)].cpu().double()
            weights[:, here] = of_chosen
            left += _sum(product).index_add(1, place, of_chosen, alpha=-1)
        embedding = gradients[n_layers]
        if embedding is not None:
            weights[:, columns.embedding : columns.remainder] = _sum(wide(embedding[:, 0]) * wide(change.embedding[0]))
        if positional and gradients[n_layers + 1] is not None:
            assert change.positional is not None
            weights[:, columns.positional] = _dots(change.positional, gradients[n_layers + 1])
        for bias, gradient in zip(biases.values(), gradients[n_layers + 1 + len(positional) :], strict=True):
            if gradient is not None:
                weights[:, columns.bias] += _dots(bias, gradient)
        return weights

    def _sparse(
        self, weights: Tensor, rows: Tensor, activation: Tensor, slope: Tensor, *, exact: bool
    ) -> tuple[Tensor, Tensor]:
        """Check the sums, add the residual where one belongs, and keep what is not zero."""
        residual = activation - weights.sum(1)
        relative = residual.abs() / (weights.abs().sum(1) + torch.finfo(torch.float32).tiny)
        if exact:
            self.largest_residual = max(self.largest_residual, float(relative.max()))
            if not self.largest_residual <= self._allowed:
                raise NumericalError(
                    f"incoming edges do not sum to their target's activation: off by {self.largest_residual:.1e} of "
                    f"the sum of their sizes, allowed {self._allowed:.0e}. check_model(model) tells whether relevance "
                    "is conserved on this model; in half precision use float32."
                )
        else:
            rounding = 100 * torch.finfo(self._change.embedding.dtype).eps
            weights[:, self._columns.residual] = torch.where(relative > rounding, residual, 0.0)
        target, source = weights.nonzero(as_tuple=True)
        weight = weights[target, source]
        return torch.stack([rows[target], source]), torch.stack([weight, weight * slope[target]], 1)


def _sum(product: Float[Tensor, "target pos d"]) -> Float[Tensor, "target pos"]:
    if product.device.type == "mps":  # no float64 there
        return product.sum(-1).cpu().double()
    return product.sum(-1, dtype=torch.float64).cpu()


def _dots(value: Tensor, gradient: Tensor) -> Float[Tensor, " target"]:
    return _sum((wide(gradient) * wide(value.detach())).reshape(len(gradient), 1, -1))[:, 0]


def bytes_per_target(change: Changes) -> int:
    """Bytes that one target's backward pass holds at its peak: the gradients at all neurons, and a few more."""
    neurons = sum(t[0].numel() for t in change.neurons)
    largest = max(t[0].numel() for t in change.neurons)
    return change.embedding.element_size() * (neurons + 5 * largest + 12 * change.embedding[0].numel())
