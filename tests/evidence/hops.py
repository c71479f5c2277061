"""City, state, capital on SmolLM2: `python -m tests.evidence.hops`

Curves: neurons found on some cities, judged on other cities of the same states (mean ablation, means from the learning
pairs). RelP is run with all four rules, with each one left out, and beside AtP, to see which rule costs what on a
prompt of some thirty tokens. Differences have intervals over states, of which there are six.

Interchange: the best neurons at the city's positions take the values that they have on a donor prompt,

    another state         the corrupt prompt: its capital should come
    another attribute     as before, but the donor asks for the governor: its *capital* should come all the same
    same state            the other city of the state: nothing should change
    matched neurons       not chosen, of the same layer and position and of the nearest size of change

A shift is how far the difference of the two capitals' logits moves on the way to the donor's own: 0 nothing, 1 all.
All of it twice: for the best neurons of any layer, and for those after layer 0, which knows little but the token.

Steering: for every evaluation city and every other state, the best neurons after layer 0 at the city move from their
values towards those that they have after the other state's *learning* city, once, twice or four times the way.
"""

from typing import Any

import pandas as pd
import torch

import tl_neuron_circuits as tnc
from tests.evidence import cells, splits
from tests.evidence.matching import matched_nodes

N_LEARNING, N_EVALUATION = 30, 30
SIZES = (30, 100, 300, 1000, 3000, 10_000)
KEPT = (100, 300, 1000)
TIMES = (1, 2, 4)
RULES: dict[str, Any] = {
    "relp": "relp", "atp": "gradient",
    "without attention": tnc.RelP(rules=("ln", "identity", "half")),
    "without ln": tnc.RelP(rules=("identity", "half", "attention")),
    "without half": tnc.RelP(rules=("ln", "identity", "attention")),
    "without identity": tnc.RelP(rules=("ln", "half", "attention")),
    "attention alone": tnc.RelP(rules=("attention",)),
}  # fmt: skip
OTHER = splits.QUESTION.replace("capital", "governor")


def spread(pairs: tnc.PromptPairs, n: int) -> tnc.PromptPairs:
    """`n` of the pairs: both directions of contrasts that are evenly spread over the states."""
    contrasts: dict[frozenset[str | None], list[int]] = {}
    for place, pair in enumerate(pairs):
        contrasts.setdefault(frozenset((pair.clean, pair.corrupt)), []).append(place)
    both = list(contrasts.values())
    chosen = torch.linspace(0, len(both) - 1, min(n // 2, len(both))).round().long().unique().tolist()
    return pairs[[place for number in chosen for place in both[number]]]


def city_positions(model: Any, pairs: tnc.PromptPairs) -> list[int]:
    """Where clean and corrupt differ."""
    tokens = tnc.tasks.tokenize(model, pairs)
    differ = torch.stack([clean != corrupt for clean, corrupt in zip(tokens.clean, tokens.corrupt or (), strict=True)])
    return differ.any(0).nonzero().flatten().tolist()


def curves(
    model: Any, kept: cells.Cells, learning: tnc.PromptPairs, evaluation: tnc.PromptPairs, rules_by_name: dict[str, Any]
) -> None:
    """Neurons by every rule set, and MLP outputs by RelP and AtP."""
    wanted = [("neurons", name, "abs") for name in rules_by_name]
    if len(rules_by_name) == len(RULES):
        wanted += [("mlp_outputs", "relp", "abs"), ("neurons", "relp", "signed"), ("neurons", "atp", "signed")]
    bases: dict[str, Any] = {"neurons": tnc.bases.Neurons(), "mlp_outputs": tnc.bases.MLPOutputs()}
    for basis, rules, ranking in wanted:
        scores = kept.scores(
            f"scores-{basis}-{rules}",
            lambda basis=basis, rules=rules: tnc.attribute(
                model, learning, method=RULES[rules], basis=bases[basis], batch_size=10
            ),
        )
        kept.curve(f"{basis}_{rules}_{ranking}", lambda scores=scores, ranking=ranking: tnc.evaluate(
            model, evaluation, scores, reference=learning, sizes=SIZES, ranking=ranking, batch_size=30,
            completeness=False,
        ))  # fmt: skip


def donors(model: Any, split: dict[str, Any], evaluation: tnc.PromptPairs) -> dict[str, list[str]]:
    """Donor prompts for every evaluation pair, by what they share with it."""
    own = {names[0]: split["learning"][state][0] for state, names in split["evaluation"].items()}
    line = splits.QUESTION.split("{city}")[0]
    cities = [prompt.rsplit(line, 1)[1].rsplit(" is", 1)[0] for prompt in evaluation.clean]
    corrupt = list(evaluation.corrupt or ())
    return {
        "another state": corrupt,
        "another attribute": [_governor(prompt) for prompt in corrupt],
        "same state": [splits.SHOTS + splits.QUESTION.format(city=own[city]) for city in cities],
    }


def _governor(prompt: str) -> str:
    before, last = prompt.rsplit("\n", 1)
    return f"{before}\n{last.replace('capital', 'governor')}"


def shift(model: Any, pairs: tnc.PromptPairs, donor: list[str], nodes: pd.DataFrame) -> dict[str, float]:
    """How far the difference of the two capitals' logits moves, and how often the donor's capital wins."""
    result = tnc.interchange(model, list(pairs.clean), donor, nodes, prepend_bos=False, batch_size=10)
    first = lambda text: model.to_tokens(text, prepend_bos=False)[0, 0].item()  # noqa: E731
    own = torch.tensor([first(answer) for answer in pairs.answer])
    other = torch.tensor([first(answer) for answer in pairs.wrong_answer or ()])
    capitals = torch.tensor([first(f" {capital}") for capital, _ in splits.STATES.values()])
    rows = torch.arange(len(pairs))
    difference = lambda logits: logits[rows, own] - logits[rows, other]  # noqa: E731
    before, after = difference(result.before), difference(result.after)
    best = capitals[result.after[:, capitals].argmax(-1)]
    return {
        "before": float(before.mean()), "after": float(after.mean()),
        "shift": float(((before - after) / (2 * before.mean())).mean()),
        "other capital higher": float((after < 0).float().mean()),
        "other capital first of all": float((best == other).float().mean()),
        "own capital first of all": float((best == own).float().mean()),
        "kl": float(result.kl.mean()),
    }  # fmt: skip


def interchanges(model: Any, kept: cells.Cells, split: dict[str, Any], evaluation: tnc.PromptPairs) -> None:
    """Every number of neurons with every donor, and matched neurons."""
    places = city_positions(model, evaluation)
    kept.values("positions", lambda: places)
    found = kept.scores("scores-neurons-relp")
    ranked = found.top(20_000)
    at_city = ranked[ranked["position"].isin(places)]
    sizes = kept.scores("scores-difference", lambda: tnc.attribute(
        model, spread(evaluation, 8), method="activation_difference", batch_size=10))  # fmt: skip
    by_donor = donors(model, split, evaluation)
    for which, among in (("", at_city), ("later-", at_city[at_city["layer"] > 0])):
        for k in KEPT:
            nodes = among.head(k)
            kept.values(f"chosen-{which}{k}", lambda nodes=nodes: {
                "layers": {int(layer): int(n) for layer, n in nodes["layer"].value_counts().sort_index().items()},
                "unique": len(nodes[["layer", "unit"]].drop_duplicates()),
                "labels": nodes["label"].head(10).tolist(),
            })  # fmt: skip
            for name, donor in by_donor.items():
                kept.values(f"interchange-{which}{k}-{name}",
                            lambda donor=donor, nodes=nodes: shift(model, evaluation, donor, nodes))  # fmt: skip
            kept.values(f"interchange-{which}{k}-matched neurons", lambda nodes=nodes: shift(
                model, evaluation, by_donor["another state"], matched_nodes(nodes, sizes)))  # fmt: skip
    later = at_city[at_city["layer"] > 0]
    for k in KEPT:
        for times in TIMES:
            kept.values(f"steer-{k}-{times}", lambda k=k, times=times: steer_states(
                model, split, later.head(k), times))  # fmt: skip
            kept.values(f"steer-{k}-{times}-matched", lambda k=k, times=times: steer_states(
                model, split, matched_nodes(later.head(k), sizes), times))  # fmt: skip


def steer_states(model: Any, split: dict[str, Any], nodes: pd.DataFrame, times: float) -> dict[str, Any]:
    """Every evaluation city towards every other state, whose learning city says where the neurons go."""
    prompt = lambda city: splits.SHOTS + splits.QUESTION.format(city=city)  # noqa: E731
    rows = [(state, to) for state in split["evaluation"] for to in split["learning"] if to != state]
    clean = [prompt(split["evaluation"][state][0]) for state, _ in rows]
    donor = [prompt(split["learning"][to][0]) for _, to in rows]
    own, other = (tnc.node_values(model, texts, nodes, prepend_bos=False) for texts in (clean, donor))
    result = tnc.steer(model, clean, nodes, value=own + times * (other - own), prepend_bos=False, batch_size=10)
    first = lambda text: model.to_tokens(text, prepend_bos=False)[0, 0].item()  # noqa: E731
    capitals = torch.tensor([first(f" {capital}") for capital, _ in splits.STATES.values()])
    names = list(splits.STATES)
    best = [names[place] for place in result.after[:, capitals].argmax(-1).tolist()]
    top = [model.tokenizer.decode([token]) for token in result.after.argmax(-1).tolist()]
    probability = result.after.softmax(-1)[range(len(rows)), [first(f" {splits.STATES[to][0]}") for _, to in rows]]
    share = lambda chosen: sum(chosen) / len(rows)  # noqa: E731
    return {
        "target capital first of all capitals": share(to == name for (_, to), name in zip(rows, best, strict=True)),
        "own capital first of all capitals": share(state == name for (state, _), name in zip(rows, best, strict=True)),
        "target capital's probability": float(probability.mean()), "kl": float(result.kl.mean()),
        "rows": [
            {"city": split["evaluation"][state][0], "to": to, "best capital": splits.STATES[name][0], "top": token}
            for (state, to), name, token in zip(rows, best, top, strict=True)
        ],
    }  # fmt: skip


def placed(kept: cells.Cells, method: str) -> dict[str, float]:
    """Share of the summed |score| of neurons by place in the prompt: solved examples, question, city, after it."""
    scores = kept.scores(f"scores-neurons-{method}")
    total = torch.stack([values.abs().sum(-1) for values in scores.values.values()])
    places = kept.values("positions", lambda: None)
    before, city, after = total[:, : places[0]].sum(), total[:, places].sum(), total[:, places[-1] + 1 :].sum()
    everything = total.sum()
    return {
        "before the city": float(before / everything), "city": float(city / everything),
        "after it": float(after / everything), "last token": float(total[:, -1].sum() / everything),
    }  # fmt: skip


def run(model: Any, kept: cells.Cells) -> None:
    """Every cell."""
    found = kept.values("cities", lambda: _cities(model))
    split = found["parts"]
    pairs = {part: cells_pairs(model, split[part]) for part in ("learning", "evaluation")}
    right = kept.values("right", lambda: {
        part: len(some.where_model_is_right(model, batch_size=10)) / len(some) for part, some in pairs.items()
    })  # fmt: skip
    assert min(right.values()) == 1.0, "the cities were chosen so that all pairs are right"
    learning, evaluation = spread(pairs["learning"], N_LEARNING), spread(pairs["evaluation"], N_EVALUATION)
    first = {name: RULES[name] for name in ("relp", "atp", "without attention")}
    curves(model, kept, learning, evaluation, first)
    interchanges(model, kept, split, evaluation)
    curves(model, kept, learning, evaluation, RULES)


def cells_pairs(model: Any, cities: dict[str, list[str]]) -> tnc.PromptPairs:
    """The pairs of some cities, made for this tokenizer without BOS."""
    return tnc.tasks.keep_fitting(model, splits.cities_pairs(cities), prepend_bos=False)


def _cities(model: Any) -> dict[str, Any]:
    drawn = splits.cities(model)
    return {"parts": drawn.cities, "known": drawn.known, "asked": len(drawn.asked)}


def collect(kept: cells.Cells) -> dict[str, Any]:
    """Everything that the page shows, from the cells."""
    found: dict[str, Any] = {path.stem: kept.values(path.stem, dict) for path in sorted(kept.folder.glob("*.json"))}
    for name in found:
        if name.startswith("steer-") and name != "steer-1000-2":  # the rows of one setting are enough to look at
            found[name].pop("rows")
    found["curves"] = {}
    for path in sorted(kept.folder.iterdir()):
        if path.is_dir() and not path.name.startswith("scores"):
            curve = kept.curve(path.name)
            assert curve is not None
            found["curves"][path.name] = cells.summary(curve)
    contrasts = {
        f"{name} minus relp": ("neurons_relp_abs", f"neurons_{name}_abs") for name in RULES if name != "relp"
    } | {"atp, by score minus relp, by score": ("neurons_relp_signed", "neurons_atp_signed")}  # fmt: skip
    found["contrasts"] = {}
    for name, (base, changed) in contrasts.items():
        one, two = kept.curve(changed), kept.curve(base)
        if one is not None and two is not None:
            row = one.contrast(two, largest=cells.LARGEST)
            found["contrasts"][name] = {key: float(row[key]) for key in ("difference", "low", "high")}
    if "positions" in found:
        found["placed"] = {method: placed(kept, method) for method in ("relp", "atp", "without attention")}
    return found


def main() -> None:
    given = cells.options(__doc__)
    kept = cells.Cells(given.work / "hops", run=not given.no_run)
    if kept.run:
        run(cells.load_model(), kept)
    if given.update_docs:
        cells.write_results("hops", collect(kept))
        from tests.evidence.tables import hops_tables, in_short

        cells.update_page(hops_tables() | in_short())


if __name__ == "__main__":
    main()
