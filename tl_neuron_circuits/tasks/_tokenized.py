"""`TokenizedPairs` and its `Batch`: what attribution, evaluation and metrics read.

Prompts are stored one by one, unpadded, with BOS where the model's default says so. `batches` groups prompts of equal
length, so that nothing is padded; `batches(..., equal_length=False)` pads instead, for models and methods that take
an attention mask. Every row of a batch carries the position at which a metric reads the logits.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from .._errors import PairsError, SettingsError
from .._typing import checked
from ._token_rows import TokenRows


@dataclass(frozen=True, eq=False)
class Batch:
    """A few pairs as rectangular tensors.

    `index` holds the rows' places in the `TokenizedPairs`. `attention_mask` is None where nothing is padded, else 1 at
    tokens and 0 at padding. `position` is where a metric reads the clean run's logits, `corrupt_position` the corrupt
    run's (the same wherever clean and corrupt are aligned).
    """

    index: Int[Tensor, " batch"]
    clean: Int[Tensor, "batch pos"]
    answer: Int[Tensor, " batch"]
    position: Int[Tensor, " batch"]
    corrupt: Int[Tensor, "batch corrupt_pos"] | None = None
    wrong_answer: Int[Tensor, " batch"] | None = None
    corrupt_position: Int[Tensor, " batch"] | None = None
    attention_mask: Int[Tensor, "batch pos"] | None = None
    corrupt_attention_mask: Int[Tensor, "batch corrupt_pos"] | None = None
    labels: Sequence[str] | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.index)

    def on_corrupt(self) -> "Batch":
        """Return the batch as metrics read the corrupt run: its prompts, mask and position, the same answers.

        Raises:
            PairsError: the pairs have no corrupt prompts.
        """
        if self.corrupt is None or self.corrupt_position is None:
            raise PairsError("these pairs have no corrupt prompts: give `corrupt`, or use an unpaired method.")
        mask = self.corrupt_attention_mask
        return replace(self, clean=self.corrupt, position=self.corrupt_position, attention_mask=mask)

    def repeat(self, n: int) -> "Batch":
        """Return the rows `n` times over, block after block, without the corrupt run."""
        return replace(
            self,
            index=self.index.repeat(n),
            clean=self.clean.repeat(n, 1),
            answer=self.answer.repeat(n),
            wrong_answer=None if self.wrong_answer is None else self.wrong_answer.repeat(n),
            position=self.position.repeat(n),
            attention_mask=None if self.attention_mask is None else self.attention_mask.repeat(n, 1),
            corrupt=None,
            corrupt_position=None,
            corrupt_attention_mask=None,
            labels=None if self.labels is None else [*self.labels] * n,
        )

    def split(self, size: int) -> Iterator["Batch"]:
        """Yield the rows in batches of at most `size`, in order."""
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            columns = ((field.name, getattr(self, field.name)) for field in fields(self))
            part: dict[str, Any] = {name: None if column is None else column[rows] for name, column in columns}
            yield Batch(**part)


@dataclass(frozen=True, eq=False, repr=False)
class TokenizedPairs:
    """Pairs as tokens of one model; made by `tokenize`, or by `from_tokens` for models without a tokenizer.

    `position[i]` is the position in prompt i at which metrics read (the last, unless given). `pad_token` fills padded
    batches; it is masked, so its value does not matter to a model that respects the mask.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> pairs = tnc.tasks.subject_verb_agreement("simple", n=8)
        >>> tokens = tnc.tasks.tokenize(model, pairs)
        >>> len(tokens), set(tokens.lengths)
        (8, {3})
    """

    clean: Sequence[Int[Tensor, " _"]]
    answer: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    corrupt: Sequence[Int[Tensor, " _"]] | None = None
    wrong_answer: Int[Tensor, " n"] | None = None
    corrupt_position: Int[Tensor, " n"] | None = None
    labels: Sequence[str] | None = None
    pad_token: int = 0

    def __post_init__(self) -> None:
        """Check that the columns fit together, and store the prompts in one tensor."""
        for name in ("clean", "corrupt"):
            if (rows := getattr(self, name)) is not None:
                object.__setattr__(self, name, TokenRows.of(rows))
        columns = {name: getattr(self, name) for name in ("clean", "answer", "position", "corrupt", "wrong_answer")}
        _check_lengths({**columns, "corrupt_position": self.corrupt_position, "labels": self.labels})
        for name, prompts, positions in (
            ("clean", self.clean, self.position),
            ("corrupt", self.corrupt, self.corrupt_position),
        ):
            if prompts is None or positions is None:
                continue
            lengths = TokenRows.of(prompts).lengths
            for index, (length, position) in enumerate(zip(lengths, positions.tolist(), strict=True)):
                if not 0 <= position < length:
                    raise PairsError(
                        f"pair {index}: position {position} is outside the {name} prompt of {length} tokens "
                        f"{prompts[index].tolist()}. Positions count from 0, padding not counted."
                    )

    @classmethod
    @checked
    def from_tokens(
        cls,
        clean: Int[Tensor, "n pos"] | Sequence[Int[Tensor, " _"]],
        answer: Int[Tensor, " n"],
        corrupt: Int[Tensor, "n pos"] | Sequence[Int[Tensor, " _"]] | None = None,
        wrong_answer: Int[Tensor, " n"] | None = None,
        *,
        labels: Sequence[str] | None = None,
        position: Int[Tensor, " n"] | None = None,
        pad_token: int = 0,
    ) -> "TokenizedPairs":
        """Take tokens as they are (BOS included where the model wants one), for models without a tokenizer.

        `position` says where metrics read, in both prompts; the last position of each unless given.

        Raises:
            PairsError: columns differ in length, there are no pairs, or a position is outside its prompt.

        Example:
            >>> import torch
            >>> import tl_neuron_circuits as tnc
            >>> tnc.TokenizedPairs.from_tokens(torch.tensor([[1, 2, 0]]), torch.tensor([0])).lengths
            (3,)
        """
        _check_lengths({"clean": clean, "answer": answer, "corrupt": corrupt, "labels": labels})
        device = answer.device
        corrupt_position = None
        if corrupt is not None:
            corrupt = _on(device, corrupt)
            corrupt_position = _last(corrupt, device) if position is None else position.to(device)
        clean = _on(device, clean)
        return cls(
            clean=clean,
            answer=answer,
            position=_last(clean, device) if position is None else position.to(device),
            corrupt=corrupt,
            wrong_answer=None if wrong_answer is None else wrong_answer.to(device),
            corrupt_position=corrupt_position,
            labels=None if labels is None else tuple(labels),
            pad_token=pad_token,
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Token length of every clean prompt."""
        return TokenRows.of(self.clean).lengths

    @property
    def hash(self) -> str:
        """SHA-256 of the tokens, answers and positions, in hexadecimal, for provenance."""
        digest = hashlib.sha256()
        columns = (self.clean, self.answer, self.position, self.corrupt, self.wrong_answer, self.corrupt_position)
        for number, column in enumerate(columns):  # the text of a list of lists, without building it
            digest.update(b", " if number else b"[")
            if column is None or isinstance(column, Tensor):
                digest.update(repr(column if column is None else column.tolist()).encode())
                continue
            for row, prompt in enumerate(TokenRows.of(column).lists()):
                digest.update((", " if row else "[").encode() + repr(prompt).encode())
            digest.update(b"]")
        digest.update(b"]")
        return digest.hexdigest()

    def longest(self, n: int) -> "TokenizedPairs":
        """Return the pair of the longest prompt `n` times over: what measures the memory that a batch needs."""
        return self.select([max(range(len(self)), key=lambda index: len(self.clean[index]))] * n)

    def select(self, rows: Sequence[int]) -> "TokenizedPairs":
        """Return these pairs in this order, each as often as it is named."""
        index = torch.tensor(rows, device=self.answer.device)
        column = lambda tensor: None if tensor is None else tensor[index]  # noqa: E731
        return replace(
            self,
            clean=[self.clean[row] for row in rows],
            answer=self.answer[index],
            position=self.position[index],
            corrupt=None if self.corrupt is None else [self.corrupt[row] for row in rows],
            wrong_answer=column(self.wrong_answer),
            corrupt_position=column(self.corrupt_position),
            labels=None if self.labels is None else [self.labels[row] for row in rows],
        )

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.clean)

    def __repr__(self) -> str:
        """One line: how many pairs, of which lengths, with what."""
        shortest, longest = min(self.lengths), max(self.lengths)
        length = str(shortest) if shortest == longest else f"{shortest} to {longest}"
        having = [name for name in ("corrupt", "wrong_answer", "labels") if getattr(self, name) is not None]
        return f"TokenizedPairs(n={len(self)}, length={length}, with={', '.join(having) or 'answers only'})"

    @checked
    def batches(
        self, batch_size: int, *, equal_length: bool = True, padding_side: Literal["left", "right"] = "right"
    ) -> Iterator[Batch]:
        """Go through all pairs once, at most `batch_size` at a time.

        With `equal_length` (the default) a batch holds prompts of one token length, shortest first and otherwise in
        order, and has no padding and no mask. Without it pairs come in order, padded on `padding_side` to the longest
        of the batch, with attention masks; run the model with them (`model(batch.clean, attention_mask=...)`, on the
        side that the model expects). Rows keep their place in `batch.index` either way.

        Raises:
            SettingsError: `batch_size` is below 1.
        """
        if batch_size < 1:
            raise SettingsError(f"batch_size must be at least 1, got {batch_size}.")
        return self._batches(batch_size, equal_length, padding_side)

    def _batches(self, batch_size: int, equal_length: bool, padding_side: Literal["left", "right"]) -> Iterator[Batch]:
        groups: dict[tuple[int, int], list[int]] = {}
        others = (0,) * len(self) if self.corrupt is None else TokenRows.of(self.corrupt).lengths
        for index, lengths in enumerate(zip(self.lengths, others, strict=True)):
            groups.setdefault(lengths if equal_length else (0, 0), []).append(index)
        for key in sorted(groups):
            for start in range(0, len(groups[key]), batch_size):
                yield self._batch(groups[key][start : start + batch_size], not equal_length, padding_side)

    def _batch(self, rows: list[int], padded: bool, side: Literal["left", "right"]) -> Batch:
        index = torch.tensor(rows, device=self.answer.device)
        clean, mask, shift = TokenRows.of(self.clean).rectangle(rows, self.pad_token, side)
        corrupt = corrupt_mask = corrupt_position = None
        if self.corrupt is not None and self.corrupt_position is not None:
            others = TokenRows.of(self.corrupt)
            corrupt, corrupt_mask, corrupt_shift = others.rectangle(rows, self.pad_token, side)
            corrupt_position = self.corrupt_position[index] + corrupt_shift
        return Batch(
            index=index,
            clean=clean,
            answer=self.answer[index],
            position=self.position[index] + shift,
            corrupt=corrupt,
            wrong_answer=None if self.wrong_answer is None else self.wrong_answer[index],
            corrupt_position=corrupt_position,
            attention_mask=mask if padded else None,
            corrupt_attention_mask=corrupt_mask if padded else None,
            labels=None if self.labels is None else tuple(self.labels[row] for row in rows),
        )


def unanswered(prompts: Sequence[Int[Tensor, " _"]]) -> TokenizedPairs:
    """Prompts that no metric reads, as pairs: their answers are token 0."""
    return TokenizedPairs.from_tokens(prompts, torch.zeros(len(prompts), dtype=torch.long, device=prompts[0].device))


def _check_lengths(columns: dict[str, Any]) -> None:
    lengths = {name: len(column) for name, column in columns.items() if column is not None}
    if lengths["clean"] == 0 or len(set(lengths.values())) > 1:
        raise PairsError(f"every column needs one entry per pair and at least one pair, got lengths {lengths}.")


def _on(device: torch.device, prompts: Int[Tensor, "n pos"] | Sequence[Int[Tensor, " _"]]) -> TokenRows:
    if isinstance(prompts, Tensor | TokenRows):
        return TokenRows.of(prompts).to(device)
    return TokenRows.of([prompt.to(device) for prompt in prompts])


def _last(prompts: TokenRows, device: torch.device) -> Int[Tensor, " n"]:
    return torch.tensor(prompts.lengths, dtype=torch.long, device=device) - 1
