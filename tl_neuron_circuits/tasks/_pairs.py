"""`PromptPairs`: clean prompts, their answers, and (for paired methods) corrupt prompts and wrong answers.

Text only: nothing here knows a tokenizer. `tokenize(model, pairs)` turns pairs into tokens and checks them there.
A *contrast* is the unordered {clean, corrupt} of a pair; tasks emit both directions of every contrast, so that a
model whose nodes are ablated to their mean prefers neither answer. `split` never separates the two directions.
Files: JSON lines in the fields of Marks et al. 2025 (arXiv 2403.19647; METHODS.md 1.4).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, SupportsIndex, overload

import msgspec
import pandas as pd

from .. import _html
from .._errors import PairsError
from .._files import parse_json_lines, read_text, short, write_text
from .._indices import Indices, as_indices, brief, is_integer
from .._typing import checked
from ._selection import MadeFor, Selection
from ._split import split_groups

if TYPE_CHECKING:
    from ..models._protocol import TransformerLensModel
    from ._metrics import Metric

_JSON_FIELDS = {
    "clean_prefix": "clean",
    "patch_prefix": "corrupt",
    "clean_answer": "answer",
    "patch_answer": "wrong_answer",
    "case": "label",
}


_MARK = "made_for"
_COLUMNS = ("clean", "answer", "corrupt", "wrong_answer", "labels")


class PromptPair(NamedTuple):
    """One pair: what indexing and iterating `PromptPairs` gives.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> pairs = tnc.PromptPairs(clean=["The keys"], answer=[" are"], labels=["key"])
        >>> pairs[0]
        PromptPair(clean='The keys', answer=' are', corrupt=None, wrong_answer=None, label='key')
    """

    clean: str
    answer: str
    corrupt: str | None = None
    wrong_answer: str | None = None
    label: str | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class PromptPairs:
    """Prompts with answers, and optionally corrupt prompts, wrong answers and labels, one entry per pair.

    Answers are the text that continues the prompt, as it stands: `" are"` after `"The keys"`.
    Without `corrupt` the pairs serve unpaired methods only; without `wrong_answer`, metrics of one answer only.

    Pairs that a task drew for a model also know it: `made_for` has the tokenizer's fingerprint and the BOS setting,
    which `tasks.tokenize` uses and holds other models to. `selection` says how many candidates were left out and why,
    until pairs are picked out of them. Neither belongs to the content: `hash` and `==` ignore both. Files keep
    `made_for`.

    Raises:
        PairsError: lengths differ, an entry is empty or not a string, or an answer equals its wrong answer.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> pairs = tnc.PromptPairs(clean=["The keys"], answer=[" are"], corrupt=["The key"], wrong_answer=[" is"])
        >>> pairs.both_directions()
        PromptPairs(n=2, first='The keys' → ' are' | 'The key' → ' is')
    """

    clean: Sequence[str]
    answer: Sequence[str]
    corrupt: Sequence[str] | None = None
    wrong_answer: Sequence[str] | None = None
    labels: Sequence[str] | None = None
    made_for: MadeFor | None = field(default=None, compare=False)
    selection: Selection | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Store every column as a tuple and check it."""
        for name in _COLUMNS:
            column = getattr(self, name)
            if column is not None:
                object.__setattr__(self, name, _column(name, column))
        self._check_lengths()
        for index, pair in enumerate(self):
            if pair.answer == pair.wrong_answer:
                raise PairsError(
                    f"pair {index} ({pair.clean!r}): answer and wrong_answer are both {pair.answer!r}. "
                    "Give two different answers, or no wrong_answer at all."
                )

    def _check_lengths(self) -> None:
        columns = {name: getattr(self, name) for name in _COLUMNS}
        lengths = {name: len(column) for name, column in columns.items() if column is not None}
        if max(lengths.values()) == 0:
            raise PairsError("expected at least one pair, got none. Give non-empty lists for `clean` and `answer`.")
        if len(set(lengths.values())) > 1:
            short = min(lengths.values())
            prompt = repr(self.clean[short]) if short < len(self.clean) else "no clean prompt"
            raise PairsError(
                f"every column needs one entry per pair, got lengths {lengths}: pair {short} ({prompt}) is the first "
                "incomplete one. Complete it, or leave an optional column out (None)."
            )

    @classmethod
    @checked
    def from_pairs(cls, pairs: Iterable[PromptPair]) -> "PromptPairs":
        """Build from single pairs; a column is None where every pair has None, and an error where only some have.

        Raises:
            PairsError: no pairs, or a column that only some pairs have.
        """
        rows = list(pairs)
        if not rows:
            raise PairsError("expected at least one pair, got none.")
        columns = {name: [getattr(row, name) for row in rows] for name in PromptPair._fields}
        for name, column in columns.items():
            index = next((i for i, value in enumerate(column) if (value is None) != (column[0] is None)), None)
            if index is not None:
                raise PairsError(
                    f"pair {index} ({rows[index].clean!r}) has {name}={column[index]!r} but pair 0 has "
                    f"{name}={column[0]!r}: give {name} for all pairs or for none."
                )
        optional = {name: None if column[0] is None else column for name, column in columns.items()}
        return cls(
            clean=columns["clean"],
            answer=columns["answer"],
            corrupt=optional["corrupt"],
            wrong_answer=optional["wrong_answer"],
            labels=optional["label"],
        )

    @classmethod
    @checked
    def from_jsonl(cls, path: str | Path) -> "PromptPairs":
        """Read JSON lines with `clean_prefix`, `clean_answer`, and optionally `patch_prefix`, `patch_answer`, `case`.

        Lines that `to_jsonl` wrote also have `made_for`, the tokenizer and BOS setting of pairs that were drawn for a
        model: `tasks.tokenize` then refuses another's.

        Raises:
            PairsError: the file is missing or empty, or a line is not such an object or has other fields; the message
                has its number. Or lines were made for different tokenizers.

        Example:
            >>> import tl_neuron_circuits as tnc
            >>> tnc.tasks.subject_verb_agreement("simple", n=4).to_jsonl("pairs.jsonl")
            >>> len(tnc.PromptPairs.from_jsonl("pairs.jsonl"))
            4
        """
        path = Path(path)
        try:
            read = [(_read_mark(path, number, row), _read_row(path, number, row))
                    for number, row in parse_json_lines(read_text(path))]  # fmt: skip
        except (OSError, ValueError) as error:
            raise PairsError(
                f"cannot read pairs from {path}: {short(error)}. Give a UTF-8 file of JSON lines, one object per line."
            ) from error
        if not read:
            raise PairsError(f"{path} has no pairs: expected one JSON object per line with {', '.join(_JSON_FIELDS)}.")
        marks = {mark for mark, _ in read}
        if len(marks) > 1:
            raise PairsError(
                f"the lines of {path} were made for different tokenizers or BOS settings, or only some say for which. "
                "Put each kind into a file of its own, or remove `made_for` from all lines."
            )
        try:
            return cls.from_pairs([row for _, row in read]).remember(marks.pop())
        except PairsError as error:
            raise PairsError(
                f"{path}: {short(error)} (in the file a label is called case; pairs count from 0, "
                "blank lines not counted)"
            ) from error

    @checked
    def to_jsonl(self, path: str | Path) -> None:
        """Write the pairs as JSON lines that `from_jsonl` reads back; an existing file is replaced at once.

        The tokenizer and BOS setting that pairs were made for are on every line, so that lines can be cut and joined.

        Raises:
            SaveError: it could not be written; an older file is as it was.
        """
        rows = ({key: getattr(pair, name) for key, name in _JSON_FIELDS.items()} for pair in self)
        mark = {} if self.made_for is None else {_MARK: asdict(self.made_for)}
        lines = [json.dumps({key: value for key, value in row.items() if value is not None} | mark) for row in rows]
        write_text(path, "\n".join(lines) + "\n")

    @checked
    def split(
        self, fraction: float, seed: int = 0, *, by: Literal["contrast", "label"] = "contrast"
    ) -> tuple["PromptPairs", "PromptPairs"]:
        """Two disjoint parts, the first with as near to `fraction` of the pairs as whole groups allow.

        `by="contrast"` keeps pairs with the same {clean, corrupt} together, that is both directions of a contrast;
        `by="label"` also keeps pairs of one label together: tasks label pairs by their lexical item, so the parts
        share no item. The order of the pairs stays; only the choice depends on `seed`.

        Raises:
            PairsError: `fraction` is not between 0 and 1, labels are missing, or all pairs form one group.

        Example:
            >>> import tl_neuron_circuits as tnc
            >>> train, test = tnc.tasks.subject_verb_agreement("simple", n=32).split(0.5, by="label")
            >>> set(train.labels) & set(test.labels)
            set()
        """
        if not 0 < fraction < 1:
            raise PairsError(f"fraction must lie strictly between 0 and 1, got {fraction}.")
        if by == "label" and self.labels is None:
            raise PairsError(
                "split(by='label') needs labels, and these pairs have none. Give labels=, or by='contrast'."
            )
        keys = [[("contrast", frozenset((pair.clean, pair.corrupt or pair.clean)))] for pair in self]
        if by == "label":
            keys = [[*key, ("label", pair.label)] for key, pair in zip(keys, self, strict=True)]
        first, second = split_groups(keys, fraction, seed)
        if not second:
            raise PairsError(
                f"split(by={by!r}): all {len(self)} pairs are linked by shared {by}s, so they cannot be divided. "
                "Make two sets of pairs from different words instead."
            )
        return self[first], self[second]

    def both_directions(self) -> "PromptPairs":
        """Append every pair with clean and corrupt, and the two answers, swapped, unless it is there already.

        Labels go with their pair unchanged, so they should name the contrast, not a direction.

        Raises:
            PairsError: there are no corrupt prompts or no wrong answers to swap.
        """
        if self.corrupt is None or self.wrong_answer is None:
            missing = "corrupt" if self.corrupt is None else "wrong_answer"
            raise PairsError(f"both_directions() swaps clean and corrupt, but these pairs have no {missing}. Give it.")
        pairs = list(self)
        swapped = [PromptPair(p.corrupt or "", p.wrong_answer or "", p.clean, p.answer, p.label) for p in pairs]
        seen = {pair[:4] for pair in pairs}
        both = PromptPairs.from_pairs([*pairs, *(pair for pair in swapped if pair[:4] not in seen)])
        return both.remember(self.made_for)

    def where_model_is_right(
        self, model: "TransformerLensModel", *, metric: "Metric | None" = None, batch_size: int = 32,
        verbose: bool | None = None,
    ) -> "PromptPairs":  # fmt: skip
        """Only the contrasts in which the model prefers the answer in every direction: a metric above zero.

        A curve over pairs that the model fails measures noise. `.selection.share` has the share of pairs that were
        kept, and the repr says it. Directions that are not among the pairs are not asked.

        Args:
            model: a HookedTransformer or TransformerBridge.
            metric: the logit difference unless given; right is above zero.
            batch_size: prompts of one length in one pass.
            verbose: a progress bar. None: after two seconds, in a notebook or a terminal.

        Raises:
            PairsError: the model is right in no contrast, or pairs do not fit its tokenizer.

        Example:
            >>> import tl_neuron_circuits as tnc
            >>> model = tnc.load_demo_model()
            >>> pairs = tnc.tasks.subject_verb_agreement("rc", n=32).where_model_is_right(model)
            >>> pairs.selection.share
            1.0
        """
        from ._where_right import contrasts_right

        kept = contrasts_right(model, self, metric, batch_size, verbose)
        lost = len(self) - len(kept)
        left_out = {"of contrasts in which the model is wrong": lost} if lost else {}
        return self[kept].remember(self.made_for, Selection(len(kept), len(self), left_out))

    def remember(self, made_for: MadeFor | None = None, selection: Selection | None = None) -> "PromptPairs":
        """The same pairs with this note of their tokenizer and of how they were chosen."""
        return replace(self, made_for=made_for, selection=selection)

    @property
    def hash(self) -> str:
        """SHA-256 of the content, in hexadecimal: the same pairs in the same order have the same hash."""
        content = json.dumps([list(pair) for pair in self], ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair, with those of the columns clean, answer, corrupt, wrong_answer, label that are given."""
        frame = pd.DataFrame(list(self), columns=list(PromptPair._fields))
        return frame.dropna(axis="columns", how="all")

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.clean)

    def __iter__(self) -> Iterator[PromptPair]:
        """Go through the pairs one by one."""
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, key: SupportsIndex) -> PromptPair: ...
    @overload
    def __getitem__(self, key: Indices) -> "PromptPairs": ...
    def __getitem__(self, key: Any) -> "PromptPair | PromptPairs":
        """Pick one pair by an index, or several pairs by a slice, by indices or by a boolean mask.

        Raises:
            SettingsError: the key is none of these, or a mask that is not as long as the pairs.
            IndexError: there is no pair of that index.
            PairsError: no pair is chosen.
        """
        if is_integer(key):
            key = int(key)
            columns = (self.clean, self.answer, self.corrupt, self.wrong_answer, self.labels)
            return PromptPair(*(None if column is None else column[key] for column in columns))  # pyright: ignore[reportArgumentType]
        indices = as_indices(key, "pairs[...]", len(self))
        if len(indices) == 0:
            raise PairsError(f"the choice {brief(key)} of {len(self)} pairs is empty. Choose at least one pair.")
        return PromptPairs.from_pairs([self[index] for index in indices]).remember(self.made_for)

    def __add__(self, other: "PromptPairs") -> "PromptPairs":
        """Join two sets of pairs that have the same columns.

        Raises:
            PairsError: one has a column that the other lacks, or they were made for different tokenizers.
        """
        if not isinstance(other, PromptPairs):
            return NotImplemented
        marks = {pairs.made_for for pairs in (self, other) if pairs.made_for is not None}
        if len(marks) > 1:
            raise PairsError(
                "these pairs were made for different tokenizers or BOS settings. Draw both with one model=, or join "
                "their text: PromptPairs.from_pairs([*first, *second])."
            )
        return PromptPairs.from_pairs([*self, *other]).remember(next(iter(marks), None))

    def __repr__(self) -> str:
        """One line: how many, and the first pair."""
        first = self[0]
        text = f"{first.clean!r} → {first.answer!r}"
        if first.corrupt is not None:
            text += f" | {first.corrupt!r}"
        if first.wrong_answer is not None:
            text += f" → {first.wrong_answer!r}"
        chosen = self.selection
        if chosen is not None and (chosen.left_out or chosen.words):
            text += f"; {chosen}"
        return f"PromptPairs(n={len(self)}, first={text})"

    def _repr_html_(self) -> str:
        return _html.block(repr(self), _html.table(self.to_dataframe(), rows=10))


def directions(pairs: PromptPairs) -> list[int]:
    """The contrast that each pair belongs to, by number: a pair and the one that swaps it are one contrast.

    Where no pair swaps both prompts and answers, pairs with swapped answers against one corrupt prompt belong together
    (IOI against three other names), or else those of one {clean, corrupt} (greater-than).
    """
    rows = {pair[:4] for pair in pairs}
    against = {pair[1:4] for pair in pairs}
    numbers: dict[Any, int] = {}
    out = []
    for clean, answer, corrupt, wrong, _ in pairs:
        answers = frozenset((answer, wrong))
        if (corrupt, wrong, clean, answer) in rows:
            key = (frozenset((clean, corrupt)), answers)
        elif corrupt is not None and (wrong, corrupt, answer) in against:
            key = (corrupt, answers)
        else:
            key = frozenset((clean, corrupt or clean))
        out.append(numbers.setdefault(key, len(numbers)))
    return out


def _column(name: str, values: Iterable[str]) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise PairsError(
            f"{name} must be a list of strings, one per pair, got {values!r}. Put a single prompt in a list."
        )
    column = tuple(values)
    for index, text in enumerate(column):
        if not isinstance(text, str) or not text:
            raise PairsError(f"{name} of pair {index} must be a non-empty string, got {text!r}.")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise PairsError(
                f"{name} of pair {index}: expected text that UTF-8 can hold, got half of a surrogate pair in {text!r}. "
                "Decode the bytes with errors='replace', or give tokens (TokenizedPairs.from_tokens)."
            ) from None
    return column


def _read_mark(path: Path, number: int, row: Any) -> MadeFor | None:
    """What a line says of its tokenizer, taken out of it."""
    if not isinstance(row, dict) or _MARK not in row:
        return None
    try:
        return msgspec.convert(row.pop(_MARK), MadeFor)
    except msgspec.ValidationError as error:
        raise PairsError(f"{path}, line {number}: `{_MARK}` is not as to_jsonl writes it: {short(error)}.") from None


def _read_row(path: Path, number: int, row: Any) -> PromptPair:
    if not isinstance(row, dict):
        raise PairsError(
            f"{path}, line {number}: expected an object with {', '.join(_JSON_FIELDS)}, got {short(repr(row))}."
        )
    missing = [key for key in ("clean_prefix", "clean_answer") if key not in row]
    if missing:
        raise PairsError(
            f"{path}, line {number} lacks {' and '.join(missing)}; it has {short(', '.join(row)) or 'no fields'}."
        )
    unknown = sorted(row.keys() - _JSON_FIELDS.keys())
    if unknown:
        raise PairsError(
            f"{path}, line {number} has the unknown fields {short(str(unknown))}; there are {', '.join(_JSON_FIELDS)}. "
            "Correct or remove them."
        )
    given = [key for key in _JSON_FIELDS if key in ("clean_prefix", "clean_answer") or row.get(key) is not None]
    wrong = [key for key in given if not (isinstance(row[key], str) and row[key])]
    if wrong:
        raise PairsError(
            f"{path}, line {number}: {wrong[0]} must be a non-empty string, got {short(repr(row[wrong[0]]))}."
        )
    optional = (row.get(key) for key in ("patch_prefix", "patch_answer", "case"))
    return PromptPair(row["clean_prefix"], row["clean_answer"], *optional)
