"""The synthetic English that the demo models are trained on, and their tokenizer: documents of one to four sentences.

Held out of all text: (town, attribute) combinations of two-hop sentences, ordered pairs of subject and attractor nouns,
unordered pairs of names in IOI sentences, and (event, century, year) triples of greater-than sentences.

The tokenizer has whole words, names of several words as one token, and town names and years in two pieces:
"The capital of the state containing Dallas is" becomes `The capital of the state containing Dal ##las is`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Int
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..tasks import _english as english
from ..tasks._agreement import agreement_prompt
from ..tasks._greater_than import greater_than_prompt
from ..tasks._ioi import IOI_PHRASINGS, ioi_prompt
from . import _states as states

T = TypeVar("T")

COMPLEMENTS: dict[str, tuple[str, ...]] = {
    "is": ("happy", "here", "old", "tall", "late"),
    "has": ("money", "time", "food"),
    "does": ("work", "nothing", "sports"),
    "goes": ("home", "away", "out"),
    "was": ("sad", "there", "young", "quiet", "early"),
}
"""Words that end a sentence after a finite verb, by its singular."""

START_YEARS = english.YEARS[2:99]
"""Years a war may start in, so that some year is earlier and some later."""

CITY_SENTENCES = (
    "She lives in {city} {state}.",
    "He went to {city} {state}.",
    "{name} drove from {city} {state} to {city2} {state2}.",
    "{city} {state} is the city of {name}.",
    "{city} {state} is a city.",
    *(f"{phrasing} {{state}}." for phrasing in states.CITY_PHRASINGS),
)
"""A town followed by its state, at once or after some words."""


class Chance:
    """Draws from a local generator."""

    def __init__(self, seed: int) -> None:
        """Start from `seed`."""
        self._generator = torch.Generator().manual_seed(seed)

    def below(self, n: int) -> int:
        """An integer in 0 .. n-1."""
        return int(torch.randint(n, (1,), generator=self._generator))

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.below(len(options))]

    def two(self, options: Sequence[T]) -> tuple[T, T]:
        """Two different options."""
        i = self.below(len(options))
        j = self.below(len(options) - 1)
        return options[i], options[j + (j >= i)]


def held_out(kind: str, *parts: int) -> bool:
    """Whether a combination of list indices (one in ten, spread evenly) is kept out of the training text."""
    weights = {"nouns": (3, 7), "names": (1, 1), "years": (1, 3, 7)}[kind]
    return sum(weight * part for weight, part in zip(weights, parts, strict=True)) % 10 == 0


def _nouns(chance: Chance) -> tuple[english.Inflected, english.Inflected]:
    while True:
        subject, attractor = chance.two(english.NOUNS)
        if not held_out("nouns", english.NOUNS.index(subject), english.NOUNS.index(attractor)):
            return subject, attractor


def agreement_sentence(chance: Chance) -> str:
    """A subject with or without an attractor, a finite verb and a complement."""
    subject, attractor = _nouns(chance)
    plural, other = bool(chance.below(2)), bool(chance.below(2))
    verb, preposition = chance.pick(english.TRANSITIVE_VERBS), chance.pick(english.PREPOSITIONS)
    structure = chance.pick(("simple", "nounpp", "rc", "rc"))  # an rc sentence also asks for the inner verb
    start = agreement_prompt(structure, subject, plural, attractor, other, verb=verb, preposition=preposition)
    finite = chance.pick(english.FINITE_VERBS)
    return f"{start} {finite.form(plural)} {chance.pick(COMPLEMENTS[finite.singular])}."


def city_sentence(chance: Chance) -> str:
    """A town and its state."""
    city, city2 = chance.two(states.CITIES)
    return chance.pick(CITY_SENTENCES).format(
        city=city.name,
        state=city.state.name,
        city2=city2.name,
        state2=city2.state.name,
        name=chance.pick(english.NAMES),
    )


def one_hop_sentence(chance: Chance) -> str:
    """A state and one of its attributes."""
    state, attribute = chance.pick(states.STATES), chance.pick(states.ATTRIBUTES)
    prompt = states.one_hop_prompt(state, attribute, chance.below(len(states.ONE_HOP_PHRASINGS)))
    return f"{prompt} {state.attribute(attribute)}."


def two_hop_sentence(chance: Chance) -> str:
    """A town and one to four attributes of its state, except the held-out combinations.

    A state that is asked for several times, and that may also follow at once ("Dallas Texas"), pays to be worked out
    once, at the town.
    """
    city = chance.pick(states.CITIES)
    known = [attribute for attribute in states.ATTRIBUTES if (city.name, attribute) not in _HELD_OUT]
    number = chance.pick((1, 1, 2, 3, 4))
    asked: list[str] = []
    while len(asked) < number:
        attribute = chance.pick(known)
        if attribute not in asked:
            asked.append(attribute)
    prompt = states.two_hop_prompt(city, asked[0], chance.below(len(states.TWO_HOP_PHRASINGS)))
    if chance.below(4) == 0:
        prompt = prompt.replace(city.name, f"{city.name} {city.state.name}")
    more = "".join(f", the {attribute} is {city.state.attribute(attribute)}" for attribute in asked[1:])
    return f"{prompt} {city.state.attribute(asked[0])}{more}."


_HELD_OUT = states.held_out_combinations()


def ioi_sentence(chance: Chance) -> str:
    """Two names; one of them gives something to the other."""
    while True:
        a, b = chance.two(english.NAMES)
        if not held_out("names", english.NAMES.index(a), english.NAMES.index(b)):
            break
    giver, receiver = (a, b) if chance.below(2) else (b, a)
    place, thing = chance.pick(english.PLACES), chance.pick(english.OBJECTS)
    return f"{ioi_prompt(a, b, giver, place, thing, chance.below(len(IOI_PHRASINGS)))} {receiver}."


def greater_than_sentence(chance: Chance) -> str:
    """A start year and a later end year."""
    while True:
        event, century = chance.below(len(english.EVENTS)), chance.below(len(english.CENTURIES))
        year = 2 + chance.below(len(START_YEARS))
        if not held_out("years", event, century, year):
            break
    prompt = greater_than_prompt(english.CENTURIES[century], english.YEARS[year], english.EVENTS[event])
    return f"{prompt}{chance.pick(english.YEARS[year + 1 :])}."


SENTENCES: dict[Callable[[Chance], str], int] = {
    agreement_sentence: 3,
    city_sentence: 5,
    one_hop_sentence: 4,
    two_hop_sentence: 9,
    ioi_sentence: 3,
    greater_than_sentence: 2,
}
"""The kinds of sentences and their shares."""


def sentence(chance: Chance) -> str:
    """A sentence of a random kind."""
    return chance.pick(_KINDS)(chance)


_KINDS = tuple(kind for kind, share in SENTENCES.items() for _ in range(share))


@dataclass(frozen=True)
class Interchange:
    """Two-hop prompts of one phrasing, which of them is the donor of each, and what then follows each of them."""

    input_ids: Int[Tensor, "batch pos"]
    answers: Int[Tensor, "batch"]
    donor: Int[Tensor, "batch"]
    targets: Int[Tensor, "batch"]


def interchange(tokenizer: PreTrainedTokenizerFast, chance: Chance, n: int) -> Interchange:
    """Prompts and donors; a target that would tell a held-out combination of town and attribute is left out (-100)."""
    phrasing = chance.below(len(states.TWO_HOP_PHRASINGS))
    asked: list[tuple[states.City, str]] = []
    while len(asked) < n:
        city, attribute = chance.pick(states.CITIES), chance.pick(states.ATTRIBUTES)
        if (city.name, attribute) not in _HELD_OUT:
            asked.append((city, attribute))
    shift = 1 + chance.below(n - 1)
    donor = [(i + shift) % n for i in range(n)]
    swapped = [(asked[j][0], attribute) for j, (_, attribute) in zip(donor, asked, strict=True)]
    prompts = [states.two_hop_prompt(city, attribute, phrasing) for city, attribute in asked]

    def tokens(pairs: list[tuple[states.City, str]]) -> Tensor:
        words = [city.state.attribute(attribute) for city, attribute in pairs]
        return torch.tensor(tokenizer.convert_tokens_to_ids(words))

    told = torch.tensor([(city.name, attribute) in _HELD_OUT for city, attribute in swapped])
    ids = torch.tensor(tokenizer(prompts)["input_ids"])
    return Interchange(ids, tokens(asked), torch.tensor(donor), tokens(swapped).masked_fill(told, -100))


@dataclass(frozen=True)
class Packed:
    """Documents packed into rows, none of which sees another: what to pass to a Hugging Face model."""

    input_ids: Int[Tensor, "rows length"]
    position_ids: Int[Tensor, "rows length"]
    attention_mask: Bool[Tensor, "rows 1 length length"]
    targets: Int[Tensor, "rows length"]


def batch(tokenizer: PreTrainedTokenizerFast, chance: Chance, rows: int, length: int) -> Packed:
    """Documents of one sentence (two in a quarter of them), each with `<bos>` first, as many as fit into each row."""
    packed: list[list[list[int]]] = []
    current: list[list[int]] = []
    while len(packed) < rows:
        texts = [" ".join(sentence(chance) for _ in range(1 + (chance.below(4) == 0))) for _ in range(2 * rows)]
        for ids in tokenizer(texts)["input_ids"]:
            if len(ids) > length:
                continue
            if sum(map(len, current)) + len(ids) > length:
                packed.append(current)
                current = []
            current = [*current, ids]
    tokens = torch.full((rows, length), int(tokenizer.pad_token_id))  # pyright: ignore[reportArgumentType]
    targets = torch.full((rows, length), -100)
    places = torch.zeros(rows, length, dtype=torch.long)
    owner = torch.full((rows, length), -1)
    for row, documents in enumerate(packed[:rows]):
        start = 0
        for number, ids in enumerate(documents):
            end = start + len(ids)
            tokens[row, start:end] = torch.tensor(ids)
            targets[row, start : end - 1] = tokens[row, start + 1 : end]
            places[row, start:end] = torch.arange(len(ids))
            owner[row, start:end] = number
            start = end
    same = (owner[:, None, :, None] == owner[:, None, None, :]).tril()
    return Packed(tokens, places, same, targets)


BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"
CONTEXT_LENGTH = 64
_FRAME_WORDS = (
    "The the of state containing with in it is In Then When After and went to gave handed a was from year lasted that "
    "city , . lives She He drove trip lies has"
)


def _plain_words() -> list[str]:
    words = [*_FRAME_WORDS.split(), *states.ATTRIBUTES, *english.PREPOSITIONS]
    for inflected in (*english.NOUNS, *english.FINITE_VERBS, *english.TRANSITIVE_VERBS):
        words += [inflected.singular, inflected.plural]
    for complements in COMPLEMENTS.values():
        words += complements
    return [*words, *english.NAMES, *english.PLACES, *english.OBJECTS, *english.EVENTS, *english.CENTURIES]


def _state_words() -> list[str]:
    return [word for state in states.STATES for word in (state.name, *map(state.attribute, states.ATTRIBUTES))]


def vocabulary() -> list[str]:
    """Every token, in the order of the ids."""
    pieces = [*states.FIRST_PIECES, *(f"##{piece}" for piece in states.SECOND_PIECES)]
    years = [f"##{year}" for year in english.YEARS]
    return list(dict.fromkeys([BOS, EOS, PAD, UNK, *_plain_words(), *_state_words(), *pieces, *years]))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of both demo models, made from the word lists; it puts `<bos>` first unless told otherwise."""
    vocab = {token: i for i, token in enumerate(vocabulary())}
    compound = sorted((w for w in _state_words() if re.search(r"\W", w)), key=len, reverse=True)
    words = "|".join([*map(re.escape, compound), r"\w+", r"[^\w\s]"])
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=UNK))  # pyright: ignore[reportCallIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(words), behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    bos = (BOS, vocab[BOS])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        padding_side="right",
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )
