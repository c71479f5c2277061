"""Is the state a hidden step? Transplant few neurons from a prompt about another state that asks for another attribute.

    python -m tests.benchmarks.hidden_state [--pairs 200]

Neurons are chosen on some towns and tested on other towns. The donor asks for another attribute, the last position is
never touched, and the recipient's own attribute of the donor's state must become the top token of the whole vocabulary.
Neurons are moved at every position but the last; shares are of all neurons of the model. Beside the choice of RelP:
AtP's of the same size, random neurons, the ceiling (all MLP neurons at those positions), and a control matched to
RelP's choice by layer, position and size of the change. Then the group is ablated on the held-out towns.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import tl_neuron_circuits as tnc
from tl_neuron_circuits import NodeScores, PromptPairs
from tl_neuron_circuits.bases import Neurons, mean_parts, run_values
from tl_neuron_circuits.interventions import ablation_hooks
from tl_neuron_circuits.models import DEMO_MODELS
from tl_neuron_circuits.models import _states as states
from tl_neuron_circuits.tasks import Batch, TokenisedPairs, measure, tokenise

Masks = dict[str, Tensor]
SHARES = (0.025, 0.05, 0.1, 0.2)


def question(city: states.City, attribute: str) -> tuple[str, str]:
    """A two-hop prompt and its answer."""
    return states.two_hop_prompt(city, attribute, 0), f" {city.state.attribute(attribute)}"


def draw(cities: list[states.City], n: int, seed: int) -> tuple[PromptPairs, list[str], list[str]]:
    """Recipients as clean, the same question about the donor's town as corrupt; donors' prompts; their attributes."""
    generator = torch.Generator().manual_seed(seed)
    pick = lambda items: items[int(torch.randint(len(items), (1,), generator=generator))]  # noqa: E731
    pairs, donors, asked = [], [], []
    while len(pairs) < n:
        here, there, x, y = pick(cities), pick(cities), pick(states.ATTRIBUTES), pick(states.ATTRIBUTES)
        (prompt, answer), (other, target) = question(here, x), question(there, x)
        if here.state == there.state or x == y or answer == target:
            continue
        pairs.append((prompt, answer, other, target))
        donors.append(question(there, y)[0])
        asked.append(x)
    clean, answer, corrupt, wrong = map(list, zip(*pairs, strict=True))
    return PromptPairs(clean=clean, answer=answer, corrupt=corrupt, wrong_answer=wrong), donors, asked


def everywhere_but_last(units: Mapping[str, Tensor], positions: int) -> Masks:
    """The neurons' masks at every position but the last."""
    masks = {hook: unit[None].repeat(positions, 1) for hook, unit in units.items()}
    for mask in masks.values():
        mask[-1] = False
    return masks


def best(scores: Mapping[str, Tensor], share: float) -> Masks:
    """The neurons with the largest scores, summed over every position but the last: `share` of all of the model's."""
    sums = {hook: score[:-1].sum(0) for hook, score in scores.items()}
    flat = torch.cat(list(sums.values()))
    threshold = flat.topk(round(share * len(flat))).values[-1]
    return {hook: total >= threshold for hook, total in sums.items()}


def matched(chosen: Masks, change: Mapping[str, Tensor]) -> Masks:
    """For each chosen neuron an unchosen one of its layer whose activations change as much at each position, if any."""
    out = {hook: torch.zeros_like(mask) for hook, mask in chosen.items()}
    for hook, mask in chosen.items():
        free = (~mask).nonzero()[:, 0].tolist()
        profile = change[hook][:-1]
        for unit in mask.nonzero()[:, 0].tolist():
            if free:
                off = (profile[:, free] - profile[:, unit, None]).norm(dim=0)
                out[hook][free.pop(int(off.argmin()))] = True
    return out


def flipped(model: Any, pairs: TokenisedPairs, donors: Tensor, masks: Masks) -> float:
    """How often the recipient's attribute of the donor's state is the top token after the transplant."""
    batch = next(iter(pairs.batches(len(pairs))))
    donor = Batch(batch.index, donors[batch.index], batch.answer, batch.position)
    values = run_values(model, donor, list(masks))
    hooks = [
        (hook, lambda value, hook, mask=mask, there=values[hook]: torch.where(mask, there, value))
        for hook, mask in masks.items()
    ]
    assert batch.wrong_answer is not None
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        top = model(batch.clean)[:, -1].argmax(-1)
    return float((top == batch.wrong_answer).float().mean())


def drop(model: Any, pairs: TokenisedPairs, masks: Masks) -> float:
    """The share of the logit difference that is lost when the neurons are mean-ablated."""
    sites = Neurons().sites(model)
    batch = next(iter(pairs.batches(len(pairs))))
    means = mean_parts(model, sites, [batch.on_corrupt()])
    base = {site.hook: means[site.hook, batch.clean.shape[1]] for site in sites}
    kept = {(hook, "node"): ~mask for hook, mask in masks.items()}
    with torch.no_grad():
        full = measure(tnc.tasks.logit_difference, model(batch.clean), batch).mean()
        with model.hooks(fwd_hooks=ablation_hooks(sites, kept, base)):
            ablated = measure(tnc.tasks.logit_difference, model(batch.clean), batch).mean()
    return float(1 - ablated / full)


def table(name: str, n: int) -> pd.DataFrame:
    """One row a share of the neurons."""
    model = tnc.load_demo_model(name)
    cities = sorted(states.CITIES, key=lambda city: (city.state.name, city.name))
    train, test = cities[0::2], cities[1::2]
    learned, _, _ = draw(train, 512, seed=0)
    pairs, donors, _ = draw(test, n, seed=1)
    tokens = tokenise(model, pairs)
    donor_tokens = model.to_tokens(donors)
    scores = {m: tnc.attribute(model, learned, method=m) for m in ("relp", "gradient", "activation_difference")}
    chance: NodeScores = tnc.attribute(model, learned, method="random", seed=0)
    length = tokens.lengths[0]
    every = {hook: torch.ones(score.shape[1], dtype=torch.bool) for hook, score in scores["relp"].values.items()}
    everything = everywhere_but_last(every, length)
    rows = [{"model": name, "share": 1.0, "RelP": flipped(model, tokens, donor_tokens, everything)}]
    for share in SHARES:
        chosen = {label: best(scores[m].values, share) for label, m in (("RelP", "relp"), ("AtP", "gradient"))}
        chosen["random"] = best(chance.values, share)
        chosen["matched"] = matched(chosen["RelP"], scores["activation_difference"].values)
        chosen = {label: everywhere_but_last(units, length) for label, units in chosen.items()}
        row: dict[str, Any] = {"model": name, "share": share}
        row |= {label: flipped(model, tokens, donor_tokens, masks) for label, masks in chosen.items()}
        row |= {f"drop, {label}": drop(model, tokens, chosen[label]) for label in ("RelP", "random", "matched")}
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    """Print the table of both demo models as markdown."""
    parser = argparse.ArgumentParser(description="Is the state a hidden step?")
    parser.add_argument("--pairs", type=int, default=200)
    options = parser.parse_args()
    frame = pd.concat([table(name, options.pairs) for name in DEMO_MODELS], ignore_index=True)
    columns = list(frame.columns)
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for row in frame.itertuples(index=False):
        print("| " + " | ".join("" if v != v else f"{v:.3g}" if isinstance(v, float) else v for v in row) + " |")


if __name__ == "__main__":
    main()
