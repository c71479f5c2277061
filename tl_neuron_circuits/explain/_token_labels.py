"""The short label of a node and sign: the condition on tokens that best tells where it is active, and how well it does.

A sign is active at a position above its 99th percentile on the discovery texts. Conditions: the token is a certain
word, the token is of a certain class, or the token before is a certain word; words without case and outer spaces. The
label is the condition with the largest

    F1 = 2 |active and condition| / (|active| + |condition|)

on the discovery texts, and none where that is below `LEAST_F1` or rests on fewer than `LEAST_SUPPORT` positions. On the
held-out texts the same threshold and the same condition give

    precision = |active and condition| / |condition|,   recall = |active and condition| / |active|

beside the base rate |active| / |positions|, which is the precision of any condition that says nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_F1, LEAST_SUPPORT = 0.1, 5
KINDS = ("", "token", "class", "after")
_WORDS = {
    "article or determiner": "a an the this that these those each every some any no all both either neither another",
    "pronoun": "i you he she it we they me him her us them my your his its our their mine yours hers ours theirs who "
    "whom whose which what myself yourself himself herself itself themselves",
    "preposition": "of in to for with on at from by about as into through over after between under without within "
    "along during before against among upon toward towards across behind beyond near since until above below",
    "conjunction": "and or but nor so yet if because although though while unless whereas when where than whether",
    "auxiliary verb": "is are was were be been being am do does did has have had having will would shall should can "
    "could may might must",
    "negation": "not never none nothing nobody n't cannot without",
}  # fmt: skip
_WORD_SETS = {name: frozenset(words.split()) for name, words in _WORDS.items()}
_ENDINGS = ("ing", "ed", "ly", "tion", "s")
_BRACKETS, _QUOTES, _ENDS, _SIGNS = "()[]{}<>", "\"'`“”‘’«»", ".!?…", "=+*/\\|&^%$#@~<>_"


def word_of(token: str) -> str:
    """The token without case and outer spaces; white space as it is."""
    return token.strip().lower() or token


def classes_of(token: str) -> list[str]:
    """Every class that a token's text is of."""
    bare = token.strip()
    if not bare:
        return ["line break"] if "\n" in token or "\r" in token else ["white space"]
    found = [name for name, words in _WORD_SETS.items() if bare.lower() in words]
    if any(c.isdigit() for c in bare):
        found.append("number")
    if bare.isalpha():
        found += ["capitalized word"] if bare[0].isupper() and bare[1:].islower() else []
        found += ["word in capitals"] if len(bare) > 1 and bare.isupper() else []
        found += ["single letter"] if len(bare) == 1 else []
        found += ["lowercase, no space before"] if bare[0].islower() and token[0] == bare[0] else []
        found += [f"word ending in -{e}" for e in _ENDINGS if len(bare) > len(e) + 2 and bare.lower().endswith(e)]
    if not any(c.isalnum() for c in bare):
        found.append("punctuation")
        kinds = (("bracket", _BRACKETS), ("quotation mark", _QUOTES), ("end of a sentence", _ENDS), ("sign", _SIGNS))
        found += [name for name, characters in kinds if all(c in characters for c in bare)]
    if not bare.isascii():
        found.append("beyond ASCII")
    return found


@dataclass(frozen=True)
class Condition:
    """Where a label holds: `kind` out of `KINDS`, and the number of the word or class."""

    kind: str = ""
    number: int = -1


@dataclass(frozen=True)
class LabelScore:
    """How well a label tells where a node is active, on some positions; nan where there is nothing to divide by."""

    precision: float = float("nan")
    recall: float = float("nan")
    base_rate: float = float("nan")

    @property
    def f1(self) -> float:
        """Of precision and recall; 0 where both are."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


class Vocabulary:
    """Words and classes of the tokens that occur."""

    def __init__(self, ids: np.ndarray, texts: Sequence[str]) -> None:
        self.ids = ids  # sorted
        words = [word_of(text) for text in texts]
        self.words, word_of_id = np.unique(np.array(words, dtype=object), return_inverse=True)
        self._word_of_id = word_of_id.reshape(-1)
        classes = [classes_of(text) for text in texts]
        self.classes = sorted({name for found in classes for name in found})
        self._class_of_id = np.zeros((len(ids), len(self.classes)), dtype=bool)
        for row, found in enumerate(classes):
            self._class_of_id[row, [self.classes.index(name) for name in found]] = True

    def words_at(self, tokens: np.ndarray) -> np.ndarray:
        """The word number of every token."""
        return self._word_of_id[np.searchsorted(self.ids, tokens)]

    def classes_at(self, tokens: np.ndarray) -> np.ndarray:
        """Every token's classes `[token, class]`."""
        return self._class_of_id[np.searchsorted(self.ids, tokens)]

    def text(self, condition: Condition) -> str:
        """A condition in words: `"dogs"`, `number`, `after "of"`; nothing for none."""
        if condition.kind == "class":
            return self.classes[condition.number]
        if not condition.kind:
            return ""
        word = _quoted(str(self.words[condition.number]))
        return word if condition.kind == "token" else f"after {word}"


def _quoted(word: str) -> str:
    return '"' + word.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r") + '"'


def choose_labels(
    active: np.ndarray, tokens: np.ndarray, vocabulary: Vocabulary, *, least_f1: float = LEAST_F1
) -> list[Condition]:
    """The best condition of every column of `active` `[position, node]`; `tokens` are `[position, (own, before)]`."""
    best = np.full(active.shape[1], np.nextafter(least_f1, 0))
    chosen = [Condition() for _ in best]
    n_active = active.sum(0)
    words = vocabulary.words_at(tokens)
    for kind in KINDS[1:]:
        if kind == "class":
            holds = vocabulary.classes_at(tokens[:, 0])
            rows, nodes = active.nonzero()
            both = np.zeros((active.shape[1], holds.shape[1]), dtype=np.int64)
            np.add.at(both, nodes, holds[rows].astype(np.int64))
            node, number = np.nonzero(both)
            count, total = both[node, number], holds.sum(0)
        else:
            word = words[:, 0 if kind == "token" else 1]
            rows, nodes = active.nonzero()
            pairs, count = np.unique(nodes * len(vocabulary.words) + word[rows], return_counts=True)
            node, number = np.divmod(pairs, len(vocabulary.words))
            total = np.bincount(word, minlength=len(vocabulary.words))
        enough = count >= LEAST_SUPPORT
        node, number, count = node[enough], number[enough], count[enough]
        f1 = 2 * count / (total[number] + n_active[node])
        order = np.lexsort((number, -f1, node))
        _, first = np.unique(node[order], return_index=True)
        for place in order[first]:
            if f1[place] > best[node[place]]:
                best[node[place]] = f1[place]
                chosen[node[place]] = Condition(kind, int(number[place]))
    return chosen


def score_label(
    condition: Condition, active: np.ndarray, tokens: np.ndarray, words: np.ndarray, vocabulary: Vocabulary
) -> LabelScore:
    """The label of one node on positions with `active` `[position]`; `words` are those of `tokens`."""
    base_rate = float(active.mean()) if len(active) else float("nan")
    if not condition.kind:
        return LabelScore(base_rate=base_rate)
    if condition.kind == "class":
        holds = vocabulary.classes_at(tokens[:, 0])[:, condition.number]
    else:
        holds = words[:, 0 if condition.kind == "token" else 1] == condition.number
    both = int((holds & active).sum())
    divide = lambda total: both / total if total else float("nan")  # noqa: E731
    return LabelScore(divide(int(holds.sum())), divide(int(active.sum())), base_rate)
