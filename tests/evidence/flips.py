"""Do about a hundred neurons control agreement on SmolLM2? `python -m tests.evidence.flips`

Run `tests.evidence.agreement` first: neurons come from its scores (RelP, four rules, by |score|, learning nouns).

Declared before the run. In a structure the claim is *reproduced* if interchange of the best 100 neurons with the other
number's prompt makes the model prefer the other number in at least 80 % of the held-out pairs, both for verbs of the
learning pairs and for new ones, while 100 matched neurons (same layer and position, nearest size of change, not chosen)
do so in at most 10 %.

Beside it: the summed probability of singular and of plural verb forms; one structure's neurons, wherever they fire, on
the other structures; and KL on neutral text with these neurons at zero, beside matched and random neurons.
"""

from typing import Any

import pandas as pd
import torch
from torch import Tensor

import tl_neuron_circuits as tnc
from tests.evidence import cells, splits
from tests.evidence.agreement import pairs_of
from tests.evidence.matching import matched_nodes

KEPT = (100, 10, 30, 300)
NEUTRAL = (
    "The weather in the north of the country", "She opened the door and", "In the second half of the century,",
    "Water freezes at a temperature of", "He wrote a long letter to", "It is not easy to",
    "For more information, please", "The number of people who live in", "My favorite part of the book was",
    "After the war ended,", "To make the soup, first",
    "Light travels much faster than", "They decided to go", "One of the most important",
    "On the other side of the river there", "Learning to play the piano takes",
)  # fmt: skip
FORMS = {
    "singular": "is has does goes was likes knows loves sees helps follows fears meets trusts thanks".split(),
    "plural": "are have do go were like know love see help follow fear meet trust thank".split(),
}


def token_ids(model: Any, words: list[str]) -> Tensor:
    """The one token of each word after a space."""
    rows = [model.to_tokens(f" {word}", prepend_bos=False)[0] for word in words]
    assert all(len(row) == 1 for row in rows)
    return torch.stack([row[0] for row in rows])


def everywhere(scores: tnc.NodeScores, k: int) -> pd.DataFrame:
    """The best neurons with positions summed, steered at every position."""
    frame = scores.to_dataframe().groupby(["hook", "layer", "unit"], as_index=False)["score"].sum()
    frame = frame.loc[frame["score"].abs().nlargest(k).index]
    labels = [f"L{layer}/N{unit}" for layer, unit in zip(frame["layer"], frame["unit"], strict=True)]
    return frame.assign(position=-1, kind="node", label=labels)


def at_every(nodes: pd.DataFrame, length: int) -> pd.DataFrame:
    """Each neuron at every position of a prompt."""
    frames = [nodes.assign(position=place, label=nodes["label"] + f"@{place}") for place in range(length)]
    return pd.concat(frames, ignore_index=True)


def flips(model: Any, pairs: tnc.PromptPairs, nodes: pd.DataFrame) -> dict[str, Any]:
    """What interchange with the corrupt prompts does to the pair's verbs and to all singular and plural forms."""
    result = tnc.interchange(model, list(pairs.clean), list(pairs.corrupt or ()), nodes, prepend_bos=False)
    own = token_ids(model, [answer.strip() for answer in pairs.answer])
    other = token_ids(model, [(answer or "").strip() for answer in pairs.wrong_answer or ()])
    rows = torch.arange(len(pairs))
    difference = [logits[rows, own] - logits[rows, other] for logits in (result.before, result.after)]
    new = torch.tensor([splits.asks_new_verb(pair.answer, pair.wrong_answer) for pair in pairs])
    flipped = (difference[1] < 0).float()
    forms = {number: token_ids(model, words) for number, words in FORMS.items()}
    plural = torch.isin(own, forms["plural"])
    mass = {}
    for when, logits in (("before", result.before), ("after", result.after)):
        summed = {number: logits.softmax(-1)[:, ids].sum(-1) for number, ids in forms.items()}
        right = torch.where(plural, summed["plural"], summed["singular"])
        wrong = torch.where(plural, summed["singular"], summed["plural"])
        mass |= {f"right number {when}": float(right.mean()), f"other number {when}": float(wrong.mean())}
    return {
        "flips, known verbs": float(flipped[~new].mean()) if (~new).any() else None,
        "flips, new verbs": float(flipped[new].mean()) if new.any() else None,
        "flips": float(flipped.mean()),
        "difference before": float(difference[0].mean()), "difference after": float(difference[1].mean()),
        "nodes": len(nodes), **mass,
    }  # fmt: skip


def run(model: Any, kept: cells.Cells, scored: cells.Cells) -> None:
    """Every cell."""
    scores = {name: scored.scores(f"scores-{name}-neurons-relp") for name in splits.STRUCTURES}
    parts = {name: pairs_of(model, name, scored) for name in splits.STRUCTURES}
    pairs = {name: part["evaluation"] for name, part in parts.items()}
    changes = {
        name: kept.scores(f"changes-{name}", lambda part=part: tnc.attribute(
            model, part["learning"][:32], method="activation_difference"))
        for name, part in parts.items()
    }  # fmt: skip
    for k in KEPT[:1]:
        for name in splits.STRUCTURES:
            one_size(model, kept, name, k, pairs[name], scores[name], changes[name])
    for source in splits.STRUCTURES:
        nodes = everywhere(scores[source], 100)
        for target in splits.STRUCTURES:
            judged = pairs[target][::2]  # both directions of a contrast follow each other: one of each
            length = tnc.tasks.tokenize(model, judged).lengths[0]
            kept.values(f"transfer-{source}-{target}", lambda nodes=nodes, judged=judged, length=length: flips(
                model, judged, at_every(nodes, length)))  # fmt: skip
    for source in splits.STRUCTURES:
        nodes, found = everywhere(scores[source], 100), changes[source]
        summed = tnc.NodeScores(
            {hook: values.sum(0) for hook, values in found.values.items()}, {}, {}, found.sites,
            {**found.settings, "positions": "sum"}, found.basis,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        units = torch.randperm(model.cfg.d_mlp, generator=generator)[: len(nodes)].tolist()
        labels = [f"L{layer}/N{unit}" for layer, unit in zip(nodes["layer"], units, strict=True)]
        random = nodes.assign(unit=units, label=labels)
        for what, chosen in (("chosen", nodes), ("matched", matched_nodes(nodes, summed)), ("random", random)):
            kept.values(f"neutral-{source}-{what}", lambda chosen=chosen: {
                "kl": (kl := tnc.steer(model, list(NEUTRAL), chosen, scale=0, prepend_bos=False).kl.tolist()),
                "mean kl": sum(kl) / len(kl),
            })  # fmt: skip
        length = tnc.tasks.tokenize(model, pairs[source]).lengths[0]
        controls = at_every(matched_nodes(nodes, summed), length)
        kept.values(f"transfer-{source}-matched", lambda source=source, controls=controls: flips(
            model, pairs[source][::2], controls))  # fmt: skip
    best = {name: set(everywhere(scores[name], 100)["label"]) for name in splits.STRUCTURES}
    kept.values("shared", lambda: {one: {other: len(best[one] & best[other]) for other in best} for one in best})

    for k in KEPT[1:]:
        for name in splits.STRUCTURES:
            one_size(model, kept, name, k, pairs[name], scores[name], changes[name])


def one_size(
    model: Any, kept: cells.Cells, name: str, k: int, pairs: tnc.PromptPairs, scores: tnc.NodeScores,
    changes: tnc.NodeScores,
) -> None:  # fmt: skip
    """Flips by the best k neurons; for a hundred also by matched ones, and by those with the best scores."""
    nodes = scores.top(k)
    kept.values(f"{name}-{k}", lambda: flips(model, pairs, nodes))
    if k == 100:
        kept.values(f"{name}-{k}-matched", lambda: flips(model, pairs, matched_nodes(nodes, changes)))
        kept.values(f"{name}-{k}-signed", lambda: flips(model, pairs, scores.top(k, by="signed")))


def collect(kept: cells.Cells) -> dict[str, Any]:
    """Everything that the page shows, from the cells."""
    found = {path.stem: kept.values(path.stem) for path in sorted(kept.folder.glob("*.json"))}
    verdict = {}
    for name in splits.STRUCTURES:
        chosen, matched = found.get(f"{name}-100"), found.get(f"{name}-100-matched")
        if chosen and matched:
            flipped = [chosen["flips, known verbs"], chosen["flips, new verbs"]]
            verdict[name] = bool(min(flipped) >= 0.8 and matched["flips"] <= 0.1)
    return {**found, "reproduced": verdict}


def main() -> None:
    given = cells.options(__doc__)
    kept = cells.Cells(given.work / "flips", run=not given.no_run)
    if kept.run:
        run(cells.load_model(), kept, cells.Cells(given.work / "agreement"))
    if given.update_docs:
        cells.write_results("flips", collect(kept))
        from tests.evidence.tables import flips_tables, in_short

        cells.update_page(flips_tables() | in_short())


if __name__ == "__main__":
    main()
