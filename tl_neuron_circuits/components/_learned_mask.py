"""Learned nested masks of edges (Matryoshka attribution): one order of all edges, whose beginnings are circuits.

Every edge has a score s_e, zero at first. A step draws a budget k, 0 < k < number of edges, and softens "the k best":

    m_e = sigmoid((s_e - tau) / T),   tau such that sum_e m_e = k
    what v reads of u = m_uv * u's live write + (1 - m_uv) * u's write on the corrupt prompt
    s <- Adam(s, d loss / d s)          loss: |f - 1| with f the faithfulness of each pair, or minus the metric

Without learning (`learn=False`) scores stay zero, where a mask of budget k is the same k / n for all edges, and the
negative gradient at the scores is averaged over the budgets of `steps` quantiles: an integrated gradient.

Threshold, its gradient and Adam's step are those of the nodes' learned mask (`nodes/_learned_mask.py`).
Sign: scores are an order alone, the best edge first; they are shifted so that the last edge has 0, hence |score| ranks
them too. Cost: a forward and a backward per step and pair of the step, of as many rows as a layer has heads.
Source: Arora et al. 2026, arXiv 2609.25518; METHODS 5.8.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._errors import SettingsError
from .._progress import progress
from ..nodes._learned_mask import adam_step, find_threshold, through_threshold
from ..nodes._masked_runs import draw_budget, select
from ..nodes._saved_learning import Learning
from ..propagation._relp import frozen
from ..tasks._metrics import measure
from ..tasks._tokenized import Batch
from ._method import EdgeMethod, EdgeQuestion, EdgeSums
from ._streams import Streams, paired_streams, run_with_edges


@dataclass(frozen=True)
class LearnedMask(EdgeMethod):
    """An order of edges learned so that the k best do the task, for every k at once.

    Args:
        steps: of Adam; the source has 5,000 for edges.
        schedule: budgets uniform in k ("uniform"), or in log k ("log").
        loss: "matching", |f - 1|, which punishes overshoot; or "metric", minus the metric.
        lr: of Adam, and so is `eps`.
        temperature: T above.
        pairs_per_step: pairs of one step, all with the same budget.
        seed: of the order of pairs and of the budgets.
        learn: False for the form without learning, in which every step takes all pairs; ten steps are enough.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> method = tnc.components.LearnedMask(steps=3)
        >>> edges = tnc.components.component_edges(model, pairs, method=method, attention="layers")
        >>> bool(edges.to_dataframe()["score"].min() == 0)
        True
    """

    name: ClassVar[str] = "learned_mask"
    steps: int = 500
    schedule: str = "uniform"
    loss: str = "matching"
    lr: float = 0.05
    eps: float = 1e-2
    temperature: float = 0.5
    pairs_per_step: int = 8
    seed: int = 0
    learn: bool = True

    def score(self, question: EdgeQuestion) -> EdgeSums:
        """The scores after all steps, shifted to begin at 0."""
        self._check()
        graph, edges = question.graph, question.graph.edges
        n, n_pairs = int(edges.sum()), len(question.tokens)
        groups = list(question.tokens.batches(n_pairs))  # one per length
        references = [self._references(question, group) for group in groups]
        place = {i: (g, row) for g, group in enumerate(groups) for row, i in enumerate(group.index.tolist())}
        state = Learning(torch.zeros(n), torch.zeros(n), torch.zeros(n), [], torch.zeros(n), [])
        if self.learn:
            draws = itertools.islice(self._draws(n_pairs, n), self.steps)
        else:
            places = ((step + 0.5) / self.steps for step in range(self.steps))
            draws = ((list(range(n_pairs)), draw_budget(u, n, self.schedule)) for u in places)
        total = torch.zeros(n)
        with progress(total=self.steps, desc=self.label, verbose=question.verbose, unit="step") as bar:
            for chosen, budget in draws:
                tau = find_threshold(state.scores, budget, self.temperature)
                mask = ((state.scores - tau) / self.temperature).sigmoid()
                loss, gradient = 0.0, torch.zeros(n)
                for number, group in enumerate(groups):
                    rows = [place[index][1] for index in chosen if place[index][0] == number]
                    for start in range(0, len(rows), question.batch_size):
                        part = rows[start : start + question.batch_size]
                        found = self._gradient(question, group, part, references[number], mask, edges)
                        loss, gradient = loss + found[0], gradient + found[1]
                gradient = through_threshold(gradient / len(chosen), mask, self.temperature)
                if self.learn:
                    adam_step(state, loss / len(chosen), gradient, self.lr, self.eps)
                else:
                    total -= gradient / self.steps
                bar.set_postfix(loss=f"{loss / len(chosen):.3f}", refresh=False)
                bar.update()
        learned = state.scores if self.learn else total
        scores = torch.zeros(len(graph), len(graph))
        scores[edges] = learned - learned.min()
        return EdgeSums(scores * n_pairs)

    def _gradient(
        self, question: EdgeQuestion, group: Batch, rows: list[int], known: "_References", mask: Tensor, edges: Tensor
    ) -> tuple[float, Tensor]:
        """The loss of these pairs under a mask of the edges and its gradient at the mask, both summed over pairs."""
        soft = torch.zeros(edges.shape)
        soft[edges] = mask
        soft.requires_grad_(True)
        batch, clean, corrupt = select(group, rows), known.clean.of_rows(rows), known.corrupt.of_rows(rows)
        with torch.enable_grad(), frozen(question.model):
            logits = run_with_edges(question.model, question.graph, batch, soft[None], clean, corrupt)[0]
            found = measure(question.metric, logits, batch)
            losses = -found
            if self.loss == "matching":
                full, empty = known.full[rows].to(found), known.empty[rows].to(found)
                losses = (found - full).abs() / torch.maximum((full - empty).abs(), 0.1 * full.abs()).clamp(min=1e-6)
            (gradient,) = torch.autograd.grad(losses.sum(), soft)
        return float(losses.detach().double().sum()), gradient[edges]

    def _references(self, question: EdgeQuestion, group: Batch) -> "_References":
        """Of all pairs of one length: the streams of both runs, and the metric with all edges and with none."""
        clean, corrupt = paired_streams(question.model, question.graph, group)
        full, empty = [], []
        for start in range(0, len(group), question.batch_size):
            rows = list(range(start, min(start + question.batch_size, len(group))))
            ends = torch.stack([question.graph.edges, torch.zeros_like(question.graph.edges)])
            batch, of_both = select(group, rows), (clean.of_rows(rows), corrupt.of_rows(rows))
            logits = run_with_edges(question.model, question.graph, batch, ends, *of_both)
            with torch.no_grad():
                for into, side in zip((full, empty), logits, strict=True):
                    into.append(measure(question.metric, side, batch).cpu())
        return _References(clean, corrupt, torch.cat(full), torch.cat(empty))

    def _draws(self, n_pairs: int, n_edges: int) -> Iterator[tuple[list[int], float]]:
        """Pairs and budget of every step: each pair once per round, in random order."""
        order, budgets = (torch.Generator().manual_seed(self.seed + 1_000_003 * kind) for kind in (0, 1))

        def rows() -> Iterator[int]:
            while True:
                yield from torch.randperm(n_pairs, generator=order).tolist()

        row = rows()
        while True:
            u = float(torch.rand((), generator=budgets, dtype=torch.float64))
            chosen = list(itertools.islice(row, min(self.pairs_per_step, n_pairs)))
            yield chosen, draw_budget(u, n_edges, self.schedule)

    def _check(self) -> None:
        for option in ("steps", "pairs_per_step"):
            self.at_least_one(option)
        for option, known in {"schedule": ("uniform", "log"), "loss": ("matching", "metric")}.items():
            if getattr(self, option) not in known:
                raise SettingsError(
                    f"expected {option} of {self.name} out of {list(known)}; got {getattr(self, option)!r}."
                )
        for option in ("lr", "eps", "temperature"):
            if not 0 < getattr(self, option) < float("inf"):
                raise SettingsError(
                    f"expected {option} of {self.name} to be a positive number; got {getattr(self, option)!r}."
                )


@dataclass(frozen=True)
class _References:
    clean: Streams
    corrupt: Streams
    full: Tensor
    empty: Tensor
