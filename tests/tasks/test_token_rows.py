"""Prompts in one tensor are the prompts one by one."""

import hashlib
import itertools

import pytest
import torch
from torch import Tensor

from tl_neuron_circuits._errors import PairsError
from tl_neuron_circuits.tasks import TokenizedPairs
from tl_neuron_circuits.tasks._token_rows import TokenRows


def prompts(*lengths: int) -> list[Tensor]:
    start = itertools.accumulate(lengths, initial=1)
    return [torch.arange(first, first + length) for first, length in zip(start, lengths, strict=False)]


def padded(rows: list[Tensor], pad: int, side: str) -> tuple[list[list[int]], list[list[int]], list[int]]:
    longest = max(map(len, rows))
    tokens, mask, shifts = [], [], []
    for row in rows:
        empty = longest - len(row)
        left = side == "left"
        fill, zeros = [pad] * empty, [0] * empty
        tokens.append(fill + row.tolist() if left else row.tolist() + fill)
        mask.append(zeros + [1] * len(row) if left else [1] * len(row) + zeros)
        shifts.append(empty if left else 0)
    return tokens, mask, shifts


def test_rows_come_back_as_they_were() -> None:
    given = prompts(3, 1, 4, 1, 5)
    rows = TokenRows.of(given)
    assert len(rows) == 5
    for found in (list(rows), [rows[i] for i in range(5)], list(rows[:]), list(map(torch.tensor, rows.lists()))):
        assert all(torch.equal(a, b) for a, b in zip(found, given, strict=True))
    assert torch.equal(rows[-1], given[-1])
    assert [row.tolist() for row in rows[3:0:-2]] == [given[3].tolist(), given[1].tolist()]
    with pytest.raises(IndexError):
        rows[5]
    table = torch.arange(12).reshape(3, 4)
    assert torch.equal(torch.stack(list(TokenRows.of(table))), table)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_rectangle_is_padding_one_by_one(side: str) -> None:
    given = prompts(3, 1, 4, 1, 5)
    for chosen in ([0], [1, 3], [4, 0, 2], [2, 2, 1], [0, 1, 2, 3, 4]):
        found = TokenRows.of(given).rectangle(chosen, 99, side)  # pyright: ignore[reportArgumentType]
        assert tuple(part.tolist() for part in found) == padded([given[row] for row in chosen], 99, side)


def test_the_hash_is_that_of_the_columns_text() -> None:
    """Results saved before are still recognized."""
    clean, corrupt = prompts(2, 3), prompts(3, 2)
    answer, wrong = torch.tensor([7, 8]), torch.tensor([9, 1])
    for others, against in ((corrupt, wrong), (None, None)):
        pairs = TokenizedPairs.from_tokens(clean, answer, others, against)
        columns = [clean, answer, pairs.position, others, against, pairs.corrupt_position]
        lists = [
            [row.tolist() for row in c] if isinstance(c, list) else c if c is None else c.tolist() for c in columns
        ]
        assert pairs.hash == hashlib.sha256(repr(lists).encode()).hexdigest()


def test_a_prompt_weighs_what_its_tokens_weigh() -> None:
    tokens = torch.ones(5000, 4, dtype=torch.long)
    pairs = TokenizedPairs.from_tokens(tokens, tokens[:, 0], tokens, tokens[:, 1])
    first, second = pairs.clean[0], pairs.clean[4999]
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert len(pairs.clean) == 5000


def test_positions_outside_a_prompt_are_named() -> None:
    with pytest.raises(PairsError, match=r"pair 1: position 2 is outside the clean prompt of 2 tokens \[4, 5\]"):
        TokenizedPairs.from_tokens(prompts(3, 2), torch.tensor([1, 1]), position=torch.tensor([2, 2]))
