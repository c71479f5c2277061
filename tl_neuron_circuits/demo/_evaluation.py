"""What a demo model knows, on held-out prompts, and whether the state is a hidden step of its two-hop answers.

The hidden-step test patches MLP neurons (the input of the down projection) of a recipient two-hop prompt with those of
a donor prompt about another state that asks for another attribute. The last position is never touched. It counts how
often the recipient's attribute of the donor's state becomes the top token of the whole vocabulary.
Works on plain Hugging Face models, so that it does not depend on the version of TransformerLens. At the end: a model's
numbers, saved as `metrics.json` and written as its card and as a page of the documentation.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .._files import write_text
from ..tasks import _english as english
from ..tasks._agreement import STRUCTURES, Structure, agreement_prompt
from ..tasks._greater_than import greater_than_prompt
from ..tasks._ioi import IOI_PHRASINGS, ioi_prompt
from . import _states as states
from ._text import Chance, held_out

Question = tuple[str, str, str | None]
"""Prompt, answer and, where only two answers are compared, the wrong one (both as they follow the prompt)."""


@dataclass(frozen=True)
class StateSwap:
    """A recipient and a donor two-hop prompt about different states that ask for different attributes."""

    recipient: str
    donor: str
    answer: str
    target: str


def _agreement(structure: Structure) -> Iterator[Question]:
    chance = Chance(1)
    finite, inner = english.FINITE_VERBS, english.TRANSITIVE_VERBS
    for i, subject in enumerate(english.NOUNS):
        for j, attractor in enumerate(english.NOUNS):
            if structure != "simple" and (i == j or not held_out("nouns", i, j)):
                continue
            for plural, other in ((False, False), (False, True), (True, False), (True, True)):
                asked = chance.pick(inner if structure == "within_rc" else finite)
                prompt = agreement_prompt(
                    structure,
                    subject,
                    plural,
                    attractor,
                    other,
                    verb=chance.pick(inner),
                    preposition=chance.pick(english.PREPOSITIONS),
                )
                number = other if structure == "within_rc" else plural
                yield prompt, f" {asked.form(number)}", f" {asked.form(not number)}"
            if structure == "simple" and j == 4:
                break


def _city_to_state() -> Iterator[Question]:
    for phrasing in range(len(states.CITY_PHRASINGS)):
        for city in states.CITIES:
            yield states.city_prompt(city, phrasing), f" {city.state.name}", None


def _one_hop() -> Iterator[Question]:
    for phrasing in range(len(states.ONE_HOP_PHRASINGS)):
        for state in states.STATES:
            for attribute in states.ATTRIBUTES:
                prompt = states.one_hop_prompt(state, attribute, phrasing)
                yield prompt, f" {state.attribute(attribute)}", None


def _two_hop(attributes: tuple[str, ...]) -> Iterator[Question]:
    combinations = states.held_out_combinations()
    for phrasing in range(len(states.TWO_HOP_PHRASINGS)):
        for city in states.CITIES:
            for attribute in attributes:
                if (city.name, attribute) in combinations:
                    prompt = states.two_hop_prompt(city, attribute, phrasing)
                    yield prompt, f" {city.state.attribute(attribute)}", None


def _ioi() -> Iterator[Question]:
    chance = Chance(2)
    for i, a in enumerate(english.NAMES):
        for j, b in enumerate(english.NAMES):
            if i != j and held_out("names", i, j):
                for giver, receiver in ((a, b), (b, a)):
                    place, thing = chance.pick(english.PLACES), chance.pick(english.OBJECTS)
                    phrasing = chance.below(len(IOI_PHRASINGS))
                    yield ioi_prompt(a, b, giver, place, thing, phrasing), f" {receiver}", None


TASKS: dict[str, Callable[[], Iterator[Question]]] = {
    **{f"agreement: {s}": (lambda s=s: _agreement(s)) for s in STRUCTURES},
    "town to state": _city_to_state,
    "one-hop facts": _one_hop,
    "two-hop capitals": lambda: _two_hop(("capital",)),
    "two-hop, all attributes": lambda: _two_hop(states.ATTRIBUTES),
    "IOI": _ioi,
}


def _batches(tokenizer: PreTrainedTokenizerFast, questions: list[Question]) -> Iterator[list[int]]:
    """Indices of questions whose prompts have the same number of tokens."""
    lengths: dict[int, list[int]] = {}
    for i, ids in enumerate(tokenizer([prompt for prompt, _, _ in questions])["input_ids"]):
        lengths.setdefault(len(ids), []).append(i)
    for members in lengths.values():
        yield from (members[start : start + 256] for start in range(0, len(members), 256))


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Int[Tensor, "batch pos"]:
    """Token ids of texts of one length."""
    return torch.tensor(tokenizer(texts)["input_ids"])


def next_token(tokenizer: PreTrainedTokenizerFast, prompts: list[str], answers: list[str]) -> Int[Tensor, "batch"]:
    """The token that follows each prompt when its answer does."""
    whole = [f"{prompt}{answer}" for prompt, answer in zip(prompts, answers, strict=True)]
    return encode(tokenizer, whole)[:, len(tokenizer(prompts[0])["input_ids"])]


@torch.no_grad()
def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: list[Question]) -> float:
    """The share of questions whose answer is the top token, or beats the wrong answer where one is given."""
    right = 0
    for members in _batches(tokenizer, questions):
        prompts, answers, wrong = zip(*(questions[i] for i in members), strict=True)
        logits = model(encode(tokenizer, list(prompts))).logits[:, -1]
        answer = next_token(tokenizer, list(prompts), list(answers))
        if wrong[0] is None:
            right += int((logits.argmax(-1) == answer).sum())
        else:
            other = next_token(tokenizer, list(prompts), list(wrong))
            right += int((logits.gather(1, answer[:, None]) > logits.gather(1, other[:, None])).sum())
    return right / len(questions)


@torch.no_grad()
def greater_than(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> float:
    """Mean probability of the later two-digit years minus that of the others, over held-out triples."""
    triples = [
        (event, century, year)
        for event in range(len(english.EVENTS))
        for century in range(len(english.CENTURIES))
        for year in range(2, 99)
        if held_out("years", event, century, year)
    ]
    prompts = [greater_than_prompt(english.CENTURIES[c], english.YEARS[y], english.EVENTS[e]) for e, c, y in triples]
    ids = torch.tensor(tokenizer.convert_tokens_to_ids([f"##{year}" for year in english.YEARS]))
    probabilities = model(encode(tokenizer, prompts)).logits[:, -1].softmax(-1)[:, ids]
    later = torch.arange(100) > torch.tensor([year for _, _, year in triples])[:, None]
    return float((probabilities * later).sum(-1).sub((probabilities * ~later).sum(-1)).mean())


def state_swaps(n: int, phrasing: int = 0, seed: int = 0) -> list[StateSwap]:
    """Random pairs of held-out (town, attribute) combinations with different states, attributes and answers."""
    chance = Chance(seed)
    combinations = sorted(states.held_out_combinations())
    towns = {city.name: city for city in states.CITIES}
    swaps = []
    while len(swaps) < n:
        (recipient, attribute), (donor, other) = chance.two(combinations)
        answer, target = (towns[name].state.attribute(attribute) for name in (recipient, donor))
        if attribute != other and answer != target and target != towns[donor].state.attribute(other):
            texts = (
                states.two_hop_prompt(recipient, attribute, phrasing),
                states.two_hop_prompt(donor, other, phrasing),
            )
            swaps.append(StateSwap(*texts, f" {answer}", f" {target}"))
    return swaps


def down_projections(model: PreTrainedModel) -> list[nn.Module]:
    """The module of each layer whose input are the MLP's neurons."""
    return [m for name, m in model.named_modules() if name.endswith((".mlp.c_proj", ".mlp.down_proj"))]


@contextmanager
def edited_neurons(model: PreTrainedModel, edit: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Pass the neurons of each layer through `edit`."""
    handles = [
        module.register_forward_pre_hook(lambda _, args, layer=layer: (edit(layer, args[0]),))
        for layer, module in enumerate(down_projections(model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Where = Bool[Tensor, "layer pos unit"]


@torch.no_grad()
def swap_success(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, swaps: list[StateSwap], where: Where
) -> Float[Tensor, "batch"]:
    """1 where patching the chosen neurons makes the recipient's attribute of the donor's state the top token."""
    recipients, donors = [s.recipient for s in swaps], [s.donor for s in swaps]
    targets = next_token(tokenizer, recipients, [s.target for s in swaps])
    seen: dict[int, Tensor] = {}

    def keep(layer: int, value: Tensor) -> Tensor:
        seen[layer] = value
        return value

    with edited_neurons(model, keep):
        model(encode(tokenizer, donors))
    with edited_neurons(model, lambda layer, value: torch.where(where[layer], seen[layer], value)):
        logits = model(encode(tokenizer, recipients)).logits[:, -1]
    return (logits.argmax(-1) == targets).float()


def neuron_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, swaps: list[StateSwap]
) -> Float[Tensor, "layer unit"]:
    """Mean |change x gradient| of each neuron, summed over positions but the last; target is above the own answer."""
    recipients, donors = [s.recipient for s in swaps], [s.donor for s in swaps]
    targets = next_token(tokenizer, recipients, [s.target for s in swaps])
    own = next_token(tokenizer, recipients, [s.answer for s in swaps])
    runs: list[list[Tensor]] = []

    def keep(_: int, value: Tensor) -> Tensor:
        runs[-1].append(value)
        return value

    for prompts in (donors, recipients):
        runs.append([])
        with torch.enable_grad(), edited_neurons(model, keep):
            logits = model(encode(tokenizer, prompts)).logits[:, -1]
    metric = (logits.gather(1, targets[:, None]) - logits.gather(1, own[:, None])).sum()
    gradients = torch.autograd.grad(metric, runs[1])
    effects = [((d - r).detach() * g)[:, :-1].sum(1) for d, r, g in zip(*runs, gradients, strict=True)]
    return torch.stack([effect.abs().mean(0) for effect in effects])


SWAPS = 400
_ALL = "all but the last"


@dataclass(frozen=True)
class HiddenStep:
    """Shares of state swaps, in one phrasing, that put the donor's answer on top; keyed by layer ("all") and place."""

    phrasing: str
    by_place: dict[str, dict[str, float]]
    by_share_of_neurons: dict[str, float]


def places(tokens: list[str]) -> dict[str, list[int]]:
    """Positions of a two-hop prompt by what stands there."""
    second = next(i for i, token in enumerate(tokens) if token.startswith("##"))
    last = len(tokens) - 1
    named = {
        "before the town": list(range(second - 1)),
        "first piece": [second - 1],
        "second piece": [second],
        "between town and last": list(range(second + 1, last)),
        _ALL: list(range(last)),
    }
    return {place: positions for place, positions in named.items() if positions}


def hidden_step(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, phrasing: int, n: int) -> HiddenStep:
    """Patch the neurons of one layer or all, at one place or all but the last, and count the swaps that succeed."""
    swaps = state_swaps(n, phrasing)
    ids = encode(tokenizer, [swaps[0].recipient])[0]
    tokens = [str(tokenizer.convert_ids_to_tokens(int(i))) for i in ids]
    layers = down_projections(model)
    width = sum(p.numel() for n, p in layers[0].named_parameters() if n == "weight") // model.config.hidden_size
    nothing = torch.zeros(len(layers), len(ids), width, dtype=torch.bool)
    table: dict[str, dict[str, float]] = {}
    for layer in (*range(len(layers)), "all"):
        for place, positions in places(tokens).items():
            where = nothing.clone()
            where[slice(None) if layer == "all" else layer, positions] = True
            share = float(swap_success(model, tokenizer, swaps, where).mean())
            table.setdefault(str(layer), {})[place] = round(share, 4)
    scores = neuron_scores(model, tokenizer, state_swaps(256, phrasing, seed=1))
    shares = {}
    for share in (0.05, 0.1, 0.2):
        chosen = torch.zeros(scores.numel(), dtype=torch.bool)
        chosen[scores.flatten().topk(int(share * scores.numel())).indices] = True
        where = nothing | chosen.view(scores.shape)[:, None]
        where[:, -1] = False
        shares[f"{share:.0%}"] = round(float(swap_success(model, tokenizer, swaps, where).mean()), 4)
    return HiddenStep(states.TWO_HOP_PHRASINGS[phrasing], table, shares)


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Every number of a model's card."""
    accuracies = {}
    for task, questions in TASKS.items():
        asked = list(questions())
        share = accuracy(model, tokenizer, asked)
        accuracies[task] = {"accuracy": round(share, 4), "prompts": len(asked)}
    steps = [hidden_step(model, tokenizer, phrasing, SWAPS) for phrasing in range(len(states.TWO_HOP_PHRASINGS))]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tasks": accuracies,
        "greater_than": round(greater_than(model, tokenizer), 4),
        "hidden_step": [vars(step) for step in steps],
        "swaps": SWAPS,
    }


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def results_markdown(metrics: dict[str, Any]) -> str:
    """The tables of one model."""
    tasks = [[task, f"{v['accuracy']:.3f}", str(v["prompts"])] for task, v in metrics["tasks"].items()]
    tasks.append(["greater-than (probability difference)", f"{metrics['greater_than']:.3f}", ""])
    parts = [_table(["task", "accuracy", "prompts"], tasks)]
    for step in metrics["hidden_step"]:
        few = ", ".join(f"{share} of them {value:.2f}" for share, value in step["by_share_of_neurons"].items())
        parts.append(f"Hidden step, “{_prompt(step)}”:\n\n{_places(step)}")
        parts.append(f"With few neurons (all layers, all positions but the last): {few}.")
    return "\n\n".join(parts)


def _prompt(step: dict[str, Any]) -> str:
    return step["phrasing"].format(attribute="capital", city="Dallas")


def _places(step: dict[str, Any]) -> str:
    where = list(step["by_place"]["all"])
    return _table(
        ["layer", *where], [[layer, *(f"{row[p]:.2f}" for p in where)] for layer, row in step["by_place"].items()]
    )


_EXPLANATION = """Held out of training:

- agreement, except "simple": one in ten ordered pairs of nouns; the right verb must score above the other;
- two-hop: 400 of 2,400 pairs of town and attribute; the answer must be the top token in all three phrasings;
- IOI: one in ten pairs of names; the answer must be the top token;
- greater-than: one in ten triples of event, century, and start year; the number is the mean probability of later years
  minus that of the others.

Nothing of "simple", "town to state", or "one-hop facts" was held out.

Hidden step: the MLP neurons of a two-hop prompt, except at the last position, take their values from a prompt about
another state and attribute, both pairs held out. The number is the share of {swaps} pairs whose answer becomes the
first prompt's attribute of the other state. The best neurons have the largest mean |change x gradient| on 256 other
pairs.

The step was trained in. It is a known truth to test methods against, not a discovery: GPT-2-like models trained on text
alone answered as well, but passed on only 0.07 and 0.35 of the pairs, since they worked out the state at the last
position. Training therefore includes such exchanges, in all layers or in layer 0 alone, with the other state's
attribute as the target (interchange intervention training, Geiger et al. 2022, arXiv 2112.00826). Held-out pairs are
never targets."""


def write_card(folder: Path, name: str, metrics: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Write `metrics.json` and the model card `README.md`."""
    content = {"name": name, "recipe": recipe, **metrics}
    write_text(folder / "metrics.json", json.dumps(content, indent=2) + "\n")
    settings = ", ".join(f"{key} {value}" for key, value in recipe.items())
    card = f"""---
license: mit
library_name: transformers
---

# {name}

A small language model ({metrics["parameters"]:,} parameters) for trying out neuron circuits. It knows only the
synthetic English of `tl_neuron_circuits.demo`: number agreement, facts about the 50 US states in one and two hops
(towns other than Dallas are invented), who gives what to whom, and years. Of no use as a language model.

    tnc.load_demo_model("{name}")

Trained by `python -m tl_neuron_circuits.demo.train_models --name {name}` ({settings}); measured by the same with
`--evaluate-only`.

{results_markdown(metrics)}

{_EXPLANATION.format(swaps=metrics["swaps"])}
"""
    write_text(folder / "README.md", card)


def documentation(all_metrics: dict[str, dict[str, Any]]) -> str:
    """The page `docs/demo_models.md`."""
    names = list(all_metrics)
    first, *_ = all_metrics.values()
    rows = [["parameters", "", *(f"{metrics['parameters']:,}" for metrics in all_metrics.values())]]
    for task, value in first["tasks"].items():
        shares = [f"{metrics['tasks'][task]['accuracy']:.3f}" for metrics in all_metrics.values()]
        rows.append([task, str(value["prompts"]), *shares])
    years = [f"{metrics['greater_than']:.3f}" for metrics in all_metrics.values()]
    rows.append(["greater-than (probability difference)", "", *years])
    parts = [
        "# The demo models",
        "Two small models come with the package for offline use: `demo-gelu` (GPT-2-like) and `demo-swiglu` "
        "(Llama-like).\n\n```bash\npython -m tl_neuron_circuits.demo.train_models --evaluate-only "
        "--documentation docs/demo_models.md\n```",
        "## Accuracy\n\n" + _table(["task", "prompts", *names], rows),
        "## The hidden step\n\nShare of pairs whose answer flips when neurons take another state's values: those at "
        "the second piece of\nthe town's name, or the best few anywhere except at the last position.",
        _hidden_steps(all_metrics),
    ]
    parts.append("## What the numbers mean\n\n" + _EXPLANATION.format(swaps=SWAPS))
    return "\n\n".join(parts) + "\n"


def _hidden_steps(all_metrics: dict[str, dict[str, Any]]) -> str:
    rows, shares = [], []
    for name, metrics in all_metrics.items():
        for step in metrics["hidden_step"]:
            shares = list(step["by_share_of_neurons"])
            town = [step["by_place"][layer]["second piece"] for layer in ("0", "all")]
            values = [f"{value:.2f}" for value in (*town, *step["by_share_of_neurons"].values())]
            rows.append([name, _prompt(step), *values])
    return _table(["model", "prompt", "layer 0", "all layers", *(f"best {share}" for share in shares)], rows)
