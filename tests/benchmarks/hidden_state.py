"""Is the state a hidden step? Interchange few neurons from a prompt about another state, asked for another attribute.

    python -m tests.benchmarks.hidden_state [--models demo-gelu] [--pairs 200] [--draws 5]

Neurons are chosen on half of the towns and half of the attributes and tested on the other towns **and the other
attributes**. The donor asks for another attribute, the last position is never touched, and the recipient's own
attribute of the donor's state must become the top token of the whole vocabulary. Neurons are moved at every position
but the last; shares are of all neurons of the model. A draw has its own pairs to learn from, test pairs and controls.

Controls: random neurons of the model ("random"); for each chosen neuron one of the five unchosen ones of its layer
whose activations change most alike at each position ("matched"); these with what they write scaled, for every pair,
layer and position, to the norm of what the chosen ones write ("matched, scaled"); the chosen ones with their changes
dealt out among them at random within each layer, so that layer, position and norm are the same ("shuffled"). "Lost" is
the share of the logit difference that goes when a group is mean-ablated. McNemar's exact test and the difference with
its 95 % interval over draws compare RelP's choice with AtP's of the same size, pair by pair.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import tl_neuron_circuits as tnc
from tl_neuron_circuits import PromptPairs
from tl_neuron_circuits.bases import Neurons
from tl_neuron_circuits.bases._runs import Values, mean_parts, run_values
from tl_neuron_circuits.demo import _states as states
from tl_neuron_circuits.demo._models import DEMO_MODELS
from tl_neuron_circuits.interventions import ablation_hooks
from tl_neuron_circuits.interventions._ablation import Hooks
from tl_neuron_circuits.interventions._direct_logit_effects import output_weights
from tl_neuron_circuits.nodes import Random
from tl_neuron_circuits.tasks import tokenize
from tl_neuron_circuits.tasks._metrics import measure
from tl_neuron_circuits.tasks._tokenized import Batch

Masks = dict[str, Tensor]
SHARES = (0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2)
METHODS: dict[str, Any] = {"RelP": "relp", "AtP": "gradient"}
LEARN, TEST = states.ATTRIBUTES[1::2], states.ATTRIBUTES[0::2]
"""Attributes asked for when neurons are chosen, and when they are tested (the capital among the latter)."""
NEAREST = 5


def draw(cities: list[states.City], asked: tuple[str, ...], n: int, seed: int) -> tuple[PromptPairs, list[str]]:
    """Recipients as clean, the same question about the donor's town as corrupt; the donors' prompts."""
    generator = torch.Generator().manual_seed(seed)
    pick = lambda items: items[int(torch.randint(len(items), (1,), generator=generator))]  # noqa: E731
    pairs, donors = [], []
    while len(pairs) < n:
        here, there, x, y = pick(cities), pick(cities), pick(asked), pick(asked)
        answer, target = f" {here.state.attribute(x)}", f" {there.state.attribute(x)}"
        if here.state == there.state or x == y or answer == target:
            continue
        pairs.append((states.two_hop_prompt(here, x, 0), answer, states.two_hop_prompt(there, x, 0), target))
        donors.append(states.two_hop_prompt(there, y, 0))
    clean, answer, corrupt, wrong = map(list, zip(*pairs, strict=True))
    return PromptPairs(clean=clean, answer=answer, corrupt=corrupt, wrong_answer=wrong), donors


def best(scores: Mapping[str, Tensor], share: float) -> Masks:
    """The neurons with the largest scores, summed over every position but the last: `share` of all of the model's."""
    sums = {hook: score[:-1].sum(0) for hook, score in scores.items()}
    flat = torch.cat(list(sums.values()))
    threshold = flat.topk(round(share * len(flat))).values[-1]
    return {hook: total >= threshold for hook, total in sums.items()}


def matched(chosen: Masks, change: Mapping[str, Tensor], generator: torch.Generator) -> Masks:
    """For each chosen neuron one of the `NEAREST` unchosen ones of its layer by change at each position, if any."""
    out = {hook: torch.zeros_like(mask) for hook, mask in chosen.items()}
    for hook, mask in chosen.items():
        free, profile = (~mask).nonzero()[:, 0].tolist(), change[hook][:-1]
        units = mask.nonzero()[:, 0]
        for unit in units[torch.randperm(len(units), generator=generator)].tolist():
            if free:
                off = (profile[:, free] - profile[:, unit, None]).norm(dim=0)
                near = off.topk(min(NEAREST, len(free)), largest=False).indices
                out[hook][free.pop(int(near[int(torch.randint(len(near), (1,), generator=generator))]))] = True
    return out


@dataclass
class Trial:
    """The test pairs of one draw and what the model computes on them and on the donors."""

    model: Any
    batch: Batch
    here: Values
    there: Values

    @classmethod
    def of(cls, model: Any, pairs: PromptPairs, donors: list[str]) -> "Trial":
        """Run the recipients and the donors once."""
        tokens = tokenize(model, pairs)
        batch = next(iter(tokens.batches(len(tokens))))
        donor = Batch(batch.index, model.to_tokens(donors)[batch.index], batch.answer, batch.position)
        hooks = [site.hook for site in Neurons().sites(model)]
        return cls(model, batch, run_values(model, batch, hooks), run_values(model, donor, hooks))

    def flips(self, masks: Masks, like: Masks | None = None) -> Tensor:
        """Whether the recipient's attribute of the donor's state is the top token, per pair; `masks` are [pos, unit].

        With `like`, what the masked neurons write is scaled to the norm of what those of `like` would.
        """
        return self._hit(
            [(hook, self._write(hook, mask, None if like is None else like[hook])) for hook, mask in masks.items()]
        )

    def _hit(self, hooks: Hooks) -> Tensor:
        assert self.batch.wrong_answer is not None
        with torch.no_grad(), self.model.hooks(fwd_hooks=hooks):
            top = self.model(self.batch.clean)[:, -1].argmax(-1)
        return top == self.batch.wrong_answer

    def shuffled(self, units: Masks, generator: torch.Generator) -> Tensor:
        """`flips` with each neuron changing as another of its group and layer does; the norms stay."""
        hooks = []
        for hook, mask in units.items():
            own = mask.nonzero()[:, 0]
            dealt = own[torch.randperm(len(own), generator=generator)]
            change = torch.zeros_like(self.here[hook])
            change[:, :-1, own] = (self.there[hook] - self.here[hook])[:, :-1, dealt]
            hooks.append((hook, lambda value, hook, change=change: value + change))
        return self._hit(hooks)

    def _write(self, hook: str, mask: Tensor, like: Tensor | None) -> Callable[..., Tensor]:
        if like is None:
            return lambda value, hook, there=self.there[hook]: torch.where(mask, there, value)
        change = self.there[hook] - self.here[hook]
        weights = output_weights(self.model, int(hook.split(".")[1]))
        mine, theirs = ((change * one @ weights).norm(dim=-1, keepdim=True) for one in (mask, like))
        factor = torch.where(mine > 0, theirs / mine.clamp(min=1e-12), 0.0)
        return lambda value, hook: value + factor * change * mask

    def written(self, masks: Masks) -> float:
        """Mean norm of what the neurons' changes write at the second piece of the town, over layers and pairs."""
        change = {hook: self.there[hook] - self.here[hook] for hook in masks}
        parts = [change[h][:, -2] * masks[h][-2] @ output_weights(self.model, int(h.split(".")[1])) for h in masks]
        return float(torch.stack(parts).sum(0).norm(dim=-1).mean())

    def lost(self, masks: Masks) -> float:
        """The share of the logit difference that is lost when the neurons are mean-ablated."""
        sites, base, full = self._whole
        kept = {(hook, "node"): ~mask for hook, mask in masks.items()}
        with torch.no_grad(), self.model.hooks(fwd_hooks=ablation_hooks(sites, kept, base)):
            ablated = measure(tnc.tasks.logit_difference, self.model(self.batch.clean), self.batch).mean()
        return float(1 - ablated / full)

    @cached_property
    def _whole(self) -> tuple[Any, Any, Tensor]:
        """Sites, their means over the corrupt prompts, and the whole model's logit difference."""
        sites = Neurons().sites(self.model)
        means = mean_parts(self.model, sites, [self.batch.on_corrupt()])
        base = {site.hook: means[site.hook, self.batch.clean.shape[1]] for site in sites}
        with torch.no_grad():
            full = measure(tnc.tasks.logit_difference, self.model(self.batch.clean), self.batch).mean()
        return sites, base, full

    def placed(self, units: Masks, positions: slice = slice(0, -1)) -> Masks:
        """The neurons' masks at some positions; by default at every one but the last."""
        out = {}
        for hook, mask in units.items():
            out[hook] = torch.zeros(self.batch.clean.shape[1], len(mask), dtype=torch.bool)
            out[hook][positions] = mask
        return out


def rows_of(model: Any, n: int, seed: int) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """One draw: a row a share, and where all neurons, or RelP's tenth, carry the state."""
    cities = sorted(states.CITIES, key=lambda city: (city.state.name, city.name))
    learned, _ = draw(cities[0::2], LEARN, 512, 2 * seed)
    trial = Trial.of(model, *draw(cities[1::2], TEST, n, 2 * seed + 1))
    scores = {label: tnc.attribute(model, learned, method=m).values for label, m in METHODS.items()}
    change = tnc.attribute(model, learned, method="activation_difference").values
    chance = tnc.attribute(model, learned, method=Random(seed)).values
    generator = torch.Generator().manual_seed(seed)
    every = {hook: torch.ones(score.shape[1], dtype=torch.bool) for hook, score in change.items()}
    rows = [{"share": 1.0, "RelP": trial.flips(trial.placed(every))}]
    for share in SHARES:
        units = {label: best(scores[label], share) for label in METHODS} | {"random": best(chance, share)}
        units["matched"] = matched(units["RelP"], change, generator)
        count = {label: sum(int(mask.sum()) for mask in one.values()) for label, one in units.items()}
        masks = {label: trial.placed(one) for label, one in units.items()}
        row: dict[str, Any] = {"share": share} | {label: trial.flips(one) for label, one in masks.items()}
        row["matched, scaled"] = trial.flips(masks["matched"], masks["RelP"])
        row["shuffled"] = trial.shuffled(units["RelP"], generator)
        row["norm of matched"] = trial.written(masks["matched"]) / trial.written(masks["RelP"])
        row["found"] = count["matched"] / count["RelP"]
        row |= {f"lost, {label}": trial.lost(one) for label, one in masks.items()}
        rows.append(row)
    tenth = best(scores["RelP"], 0.1)
    return rows, where(trial, every, tenth)


def where(trial: Trial, every: Masks, chosen: Masks) -> pd.DataFrame:
    """Flips by layer and position, of all neurons there and of the chosen ones."""
    places = {
        "before the town": slice(0, -3),
        "first piece": slice(-3, -2),
        "second piece": slice(-2, -1),
        "all but the last": slice(0, -1),
    }
    rows = []
    for layer in [*every, "all"]:
        row: dict[str, Any] = {"layer": layer.split(".")[1] if layer != "all" else layer}
        row["chosen"] = sum(int(mask.sum()) for hook, mask in chosen.items() if layer in (hook, "all"))
        for label, units in (("all", every), ("chosen", chosen)):
            part = {hook: mask for hook, mask in units.items() if layer in (hook, "all")}
            for place, positions in places.items():
                row[f"{label}: {place}"] = float(trial.flips(trial.placed(part, positions)).float().mean())
        rows.append(row)
    return pd.DataFrame(rows)


def mcnemar(first: Tensor, second: Tensor) -> tuple[int, int, float]:
    """Pairs that only the first flips, that only the second flips, and the two-sided exact p."""
    wins, losses = int((first & ~second).sum()), int((second & ~first).sum())
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    return wins, losses, min(1.0, 2 * tail)


def summary(draws: list[list[dict[str, Any]]]) -> pd.DataFrame:
    """One row a share: means over draws, their 95 % intervals (normal, over draws), the paired tests."""
    rows = []
    for same in zip(*draws, strict=True):
        flips = {k: torch.stack([row[k] for row in same]) for k, v in same[0].items() if isinstance(v, Tensor)}
        row: dict[str, Any] = {"neurons": f"{100 * same[0]['share']:g}%"}
        for label, found in flips.items():
            row[label] = shown(found.float().mean(1).numpy())
        if "AtP" in flips:
            apart = (flips["RelP"].float() - flips["AtP"].float()).mean(1).numpy()
            wins, losses, p = mcnemar(flips["RelP"].flatten(), flips["AtP"].flatten())
            first = mcnemar(flips["RelP"][0], flips["AtP"][0])
            row["RelP - AtP"] = shown(apart)
            row["draws ahead"] = f"{int((apart > 0).sum())} of {len(apart)}"
            row["McNemar"] = f"{wins}:{losses}, p = {p:.2g}"
            row["first draw"] = (
                f"{flips['RelP'][0].float().mean():.2f} / {flips['AtP'][0].float().mean():.2f}, p = {first[2]:.2g}"
            )
        for key in ("norm of matched", "found"):
            if key in same[0]:
                row[key] = f"{np.mean([one[key] for one in same]):.2f}"
        rows.append(row | {k: shown(np.array([one[k] for one in same])) for k in same[0] if k.startswith("lost")})
    return pd.DataFrame(rows)


def shown(values: np.ndarray) -> str:
    """Mean ± half the 95 % interval of the mean over draws."""
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{values.mean():.3f} ± {half:.3f}"


def markdown(frame: pd.DataFrame) -> str:
    """A table as markdown; numbers to two digits, empty where there is nothing."""
    text = lambda cell: "" if cell != cell else f"{cell:.2f}" if isinstance(cell, float) else str(cell)  # noqa: E731
    lines = [list(frame.columns), ["---"] * len(frame.columns), *([text(c) for c in row] for row in frame.to_numpy())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print the tables of the demo models as markdown."""
    parser = argparse.ArgumentParser(description="Is the state a hidden step?")
    parser.add_argument("--models", nargs="+", default=list(DEMO_MODELS))
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--draws", type=int, default=5)
    options = parser.parse_args()
    for name in options.models:
        model = tnc.load_demo_model(name)
        found = [rows_of(model, options.pairs, seed) for seed in range(options.draws)]
        print(f"\n{name}, {options.draws} draws of {options.pairs} pairs\n\n{markdown(summary([r for r, _ in found]))}")
        print(f"\nby layer and position, first draw\n\n{markdown(found[0][1])}", flush=True)


if __name__ == "__main__":
    main()
