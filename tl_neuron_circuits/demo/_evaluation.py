"""What a demo model knows, on held-out prompts, and whether the state is a hidden step of its two-hop answers.

The hidden-step test patches MLP neurons (the input of the down projection) of a recipient two-hop prompt with those of
a donor prompt about another state that asks for another attribute. The last position is never touched. It counts how
often the recipient's attribute of the donor's state becomes the top token of the whole vocabulary.
Works on plain Hugging Face models, so that it does not depend on the version of TransformerLens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..tasks import _english as english
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


def _agreement(structure: english.Structure) -> Iterator[Question]:
    chance = Chance(1)
    finite, inner = english.FINITE_VERBS, english.TRANSITIVE_VERBS
    for i, subject in enumerate(english.NOUNS):
        for j, attractor in enumerate(english.NOUNS):
            if structure != "simple" and (i == j or not held_out("nouns", i, j)):
                continue
            for plural, other in ((False, False), (False, True), (True, False), (True, True)):
                asked = chance.pick(inner if structure == "within_rc" else finite)
                prompt = english.agreement_prompt(
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
                    phrasing = chance.below(len(english.IOI_PHRASINGS))
                    yield english.ioi_prompt(a, b, giver, place, thing, phrasing), f" {receiver}", None


TASKS: dict[str, Callable[[], Iterator[Question]]] = {
    **{f"agreement: {s}": (lambda s=s: _agreement(s)) for s in english.STRUCTURES},
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
    prompts = [
        english.greater_than_prompt(english.CENTURIES[c], english.YEARS[y], english.EVENTS[e]) for e, c, y in triples
    ]
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
