"""Learned nested masks (Matryoshka attribution).

Every node n has a score s_n, zero at first. A step draws a budget k, 0 < k < number of nodes, and softens "the k best":

    m_n = sigmoid((s_n - tau) / T),   tau such that sum_n m_n = k
    value of a node = m_n * its live value + (1 - m_n) * its counterfactual value          (direction "keep")
    s <- Adam(s, d loss / d s)

One mask holds the next, so one run gives a ranking and thereby circuits of every size. tau moves with s:
dtau/ds_n = w_n / sum w with w = m (1 - m), hence

    d loss / d s_n = w_n / T * (g_n - sum w g / sum w),   g = d loss / d m

Masked runs and their losses are in `_masked_runs.py`. `MaskGradient` is the expected first step, without learning.

With development pairs learning stops early: every 25 steps the loss of hard circuits, of the sizes at eight quantiles
of the schedule, is measured on them, and the scores with the least are the result.

Sign: positive supports the answer. Scores are those of a ranking: read them by sign, never by |score|.
Cost: a forward and a backward per step and pair of the step; counterfactual runs come on top, and eight forwards per
development pair every 25 steps.
Source: Arora et al. 2026, arXiv 2609.25518; METHODS 5.8.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from .._errors import PairsError, SettingsError
from .._memory import Halving
from .._processes import Processes
from .._progress import progress
from ..bases._runs import Values
from ..tasks._pairs import PromptPairs
from ..tasks._tokenize import tokenize
from ..tasks._tokenized import Batch, TokenizedPairs
from ._mask_gradient import MaskGradient
from ._masked_pairs import MaskedPairs
from ._masked_runs import NestedMasks, draw_budget, split_blocks
from ._saved_learning import Learning, SavedLearning, read_learning
from ._scope import Blocks, Means, Scope

_BETAS = (0.9, 0.999)
_EVERY, _QUANTILES = 25, 8  # steps between two looks at the development pairs, and circuits of each look


@dataclass(frozen=True)
class LearnedMask(NestedMasks):
    """Scores learned so that the k best nodes do the task, for every k at once.

    A run with fewer steps is the beginning of a run with more: with `attribute(..., resume=directory)` the steps 50,
    150 and 500 are three calls, each of which continues the last.

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
        development: pairs of other words than those to learn on, and never those to be judged on: learning stops where
            circuits get no better on them, and the best scores are the result.
        patience: how many looks at them, every 25 steps, may pass without a new best.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> scores = tnc.attribute(model, pairs, method=tnc.LearnedMask(steps=5))
        >>> scores.settings["learning"]["steps"], scores.ranking
        (5, 'signed')
    """

    name: ClassVar[str] = "learned_mask"
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
    development: PromptPairs | TokenizedPairs | None = None
    patience: int = 4

    @property
    def options(self) -> dict[str, Any]:
        """Every option by name, as JSON has it: development pairs by their hash."""
        development = None if self.development is None else self.development.hash
        return {**super().options, "development": development}

    @property
    def label(self) -> str:
        """The name and the options that are not the default; of development pairs, how many."""
        if self.development is None:
            return super().label
        plain = replace(self, development=None).label.removeprefix(self.name).strip("()")
        return f"{self.name}({', '.join([*filter(None, [plain]), f'development={len(self.development)} pairs'])})"

    def check(self, scope: Scope) -> None:
        """Known choices, positive numbers, single nodes, and no denoising."""
        super().check(scope)
        self.at_least_one("patience")

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
        pairs = MaskedPairs(self, scope, tokens, means, processes, halving, self.cache)
        n = sum(shape.numel() for shape in pairs.shapes.values())
        if n < 2:
            raise SettingsError(f"expected at least two nodes to rank; got {n}. Use a basis with more nodes.")
        others = None
        if self.development is not None:
            others = self._development(scope, tokens, means, processes, halving, pairs)
        state = None
        if resume is not None:
            state = processes.from_first(lambda: read_learning(Path(resume), identity, self.steps))
        if state is None:
            scores = torch.zeros(n) if self.start == "zero" else pairs.relp_scores()
            state = Learning(scores, torch.zeros(n), torch.zeros(n), [], scores.clone(), [])
        state.to(tokens.answer.device)
        save = SavedLearning(Path(resume), identity) if resume is not None and processes.first else None
        begun = len(state.losses)
        schedule = itertools.islice(self._draws(len(tokens), n), begun, self.steps)
        with progress(total=self.steps, initial=begun, desc=self.label, verbose=shown, unit="step") as bar:
            for step, (chosen, budget) in enumerate(schedule, begun):
                if state.looks_without_gain >= self.patience:
                    break
                self._step(state, pairs, chosen, budget, self.temperature * self.cooling**step)
                if others is not None and (step + 1) % _EVERY == 0:
                    state.look(others.hard_loss(state.scores, self._sizes(n)))
                if save is not None:
                    save(state, last=step + 1 == self.steps or state.looks_without_gain >= self.patience)
                bar.set_postfix(loss=f"{state.losses[-1]:.3f}", refresh=False)
                bar.update()
        scores, kept = (state.best, _EVERY * state.best_look) if state.looks else (state.scores, len(state.losses))
        notes = {
            "steps": kept,
            "losses": state.losses,
            "softness": softness(scores, self.temperature * self.cooling ** (kept - 1)),
            "counterfactuals": pairs.how,
            "forward_equivalents_per_pair": self._cost(
                len(tokens), scope, len(state.losses), again=pairs.how == "run again"
            ),
        }
        if others is not None:
            notes["development"] = state.looks
        blocks = split_blocks(scores, pairs.shapes)
        return {key: block.to(pairs.devices[key[0]]) for key, block in blocks.items()}, notes

    def _development(
        self,
        scope: Scope,
        tokens: TokenizedPairs,
        means: Means | None,
        processes: Processes,
        halving: Halving,
        pairs: MaskedPairs,
    ) -> MaskedPairs:
        """The development pairs under the same masks.

        Raises:
            PairsError: they have other lengths, or are among the pairs to learn on.
        """
        assert self.development is not None
        others = tokenize(scope.model, self.development)
        known = {tuple(prompt.tolist()) for prompt in tokens.clean}
        shared = sum(tuple(prompt.tolist()) in known for prompt in others.clean)
        lengths = set(others.lengths) - set(tokens.lengths)
        if shared or lengths:
            raise PairsError(
                f"expected development pairs of other words and the same length; {shared} of {len(others)} prompts are "
                f"learned on too, and lengths {sorted(lengths)} are new. Split the pairs: pairs.split(0.8, by='label')."
            )
        found = MaskedPairs(self, scope, others, means, processes, halving, self.cache)
        assert found.shapes == pairs.shapes
        return found

    def _sizes(self, n: int) -> list[int]:
        """Sizes of the circuits that development pairs judge."""
        budgets = [draw_budget((place + 0.5) / _QUANTILES, n, self.schedule) for place in range(_QUANTILES)]
        return sorted({min(max(1, round(budget)), n - 1) for budget in budgets})

    def _step(self, state: Learning, pairs: MaskedPairs, chosen: list[int], budget: float, temperature: float) -> None:
        """One step of Adam on the mean loss of the chosen pairs at this budget."""
        tau = find_threshold(state.scores, budget, temperature)
        mask = ((state.scores - tau) / temperature).sigmoid()
        loss, gradient = pairs.gradient(mask, chosen)
        adam_step(state, loss, through_threshold(gradient, mask, temperature), self.lr, self.eps)

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

    def _cost(self, n_pairs: int, scope: Scope, steps: int, *, again: bool) -> float:
        """Forward passes per pair; a backward pass counts as one, since parameters get no gradient."""
        seen = steps * min(self.pairs_per_step, n_pairs) / n_pairs
        counterfactual = float(scope.baseline == "corrupt")
        references = {"metric": 0, "matching": 2, "kl": 1}[self.loss]
        each = counterfactual + (references if self.loss == "kl" else 0)
        start = (2 + counterfactual) if self.start == "relp" else 0
        once = counterfactual + references
        looks = 0 if self.development is None else steps // _EVERY
        looked = looks * _QUANTILES * (1 + (each if again else 0)) * len(self.development or ()) / n_pairs
        return start + 2 * seen + (once + seen * each if again else once) + looked


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


def adam_step(state: Learning, loss: float, gradient: Float[Tensor, " node"], lr: float, eps: float) -> None:
    """One step of Adam down the gradient of this loss."""
    count = len(state.losses) + 1
    state.first.lerp_(gradient, 1 - _BETAS[0])
    state.second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
    size = (state.second / (1 - _BETAS[1] ** count)).sqrt_().add_(eps)
    state.scores.addcdiv_(state.first, size, value=-lr / (1 - _BETAS[0] ** count))
    state.losses.append(loss)


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
