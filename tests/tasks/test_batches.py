"""`TokenizedPairs.batches`: every pair once, in its place, with or without padding."""

import pytest
import torch

from tests.loops import for_each
from tl_neuron_circuits._errors import PairsError, SettingsError
from tl_neuron_circuits.tasks import TokenizedPairs
from tl_neuron_circuits.tasks._tokenized import Batch

LENGTHS = [3, 5, 3, 4, 5, 5, 3]


def tokenized(lengths: list[int] = LENGTHS, extra: int = 0, seed: int = 0) -> TokenizedPairs:
    """Random tokens from 10 up; corrupt prompts `extra` tokens longer; 7 is the padding."""
    generator = torch.Generator().manual_seed(seed)
    n = len(lengths)
    return TokenizedPairs.from_tokens(
        [torch.randint(10, 50, (length,), generator=generator) for length in lengths],
        torch.arange(n),
        [torch.randint(10, 50, (length + extra,), generator=generator) for length in lengths],
        torch.arange(n) + 100,
        labels=[f"label {i}" for i in range(n)],
        pad_token=7,
    )


def assert_row(batch: Batch, row: int, pairs: TokenizedPairs) -> None:
    i = int(batch.index[row])
    assert pairs.corrupt is not None and batch.corrupt is not None and batch.labels is not None
    assert batch.corrupt_position is not None and batch.wrong_answer is not None
    clean_mask, corrupt_mask = batch.attention_mask, batch.corrupt_attention_mask
    kept = batch.clean[row] if clean_mask is None else batch.clean[row][clean_mask[row].bool()]
    assert torch.equal(kept, pairs.clean[i])
    kept = batch.corrupt[row] if corrupt_mask is None else batch.corrupt[row][corrupt_mask[row].bool()]
    assert torch.equal(kept, pairs.corrupt[i])
    assert batch.clean[row, batch.position[row]] == pairs.clean[i][-1]
    assert batch.corrupt[row, batch.corrupt_position[row]] == pairs.corrupt[i][-1]
    assert (batch.answer[row], batch.wrong_answer[row], batch.labels[row]) == (i, i + 100, f"label {i}")


@for_each("batch_size", [1, 2, 3, 100])
@for_each("extra", [0, 2])
def test_equal_length_batches_hold_every_pair_once_unpadded(batch_size: int, extra: int) -> None:
    pairs = tokenized(extra=extra)
    batches = list(pairs.batches(batch_size))
    assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == list(range(len(pairs)))
    for batch in batches:
        assert len(batch) <= batch_size and batch.attention_mask is None and batch.corrupt_attention_mask is None
        assert {pairs.lengths[i] for i in batch.index.tolist()} == {batch.clean.shape[1]}
        for row in range(len(batch)):
            assert_row(batch, row, pairs)
    assert len(batches) == {1: 7, 2: 5, 3: 3, 100: 3}[batch_size]


@for_each("side", ["left", "right"])
@for_each("batch_size", [1, 3, 100])
@for_each("extra", [0, 2])
def test_padded_batches_keep_order_and_mask_the_padding(side: str, batch_size: int, extra: int) -> None:
    pairs = tokenized(extra=extra)
    batches = list(pairs.batches(batch_size, equal_length=False, padding_side=side))
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(len(pairs)))
    for batch in batches:
        assert batch.attention_mask is not None
        assert (batch.clean[batch.attention_mask == 0] == 7).all()
        for row in range(len(batch)):
            assert_row(batch, row, pairs)
    if batch_size == 100:
        (batch,) = batches
        assert batch.clean.shape == (7, 5) and batch.corrupt.shape == (7, 5 + extra)
        assert batch.position.tolist() == ([4] * 7 if side == "left" else [length - 1 for length in LENGTHS])


def test_pairs_of_one_clean_length_but_several_corrupt_lengths_are_not_mixed() -> None:
    clean = [torch.arange(3)] * 3
    corrupt = [torch.arange(3), torch.arange(4), torch.arange(3)]
    pairs = TokenizedPairs.from_tokens(clean, torch.arange(3), corrupt)
    assert [batch.index.tolist() for batch in pairs.batches(8)] == [[0, 2], [1]]


def test_a_given_position_moves_with_left_padding() -> None:
    clean = [torch.tensor([10, 11, 12]), torch.tensor([20, 21, 22, 23])]
    pairs = TokenizedPairs.from_tokens(clean, torch.tensor([0, 0]), clean, position=torch.tensor([1, 0]))
    for options in ({"equal_length": True}, {"equal_length": False, "padding_side": "left"}, {"equal_length": False}):
        for batch in pairs.batches(1 if options["equal_length"] else 2, **options):
            for row in range(len(batch)):
                assert batch.clean[row, batch.position[row]] == (11, 20)[int(batch.index[row])]
                assert batch.corrupt_position is not None and batch.corrupt_position[row] == batch.position[row]


def test_the_corrupt_view_swaps_prompt_mask_and_position_but_not_answers() -> None:
    (batch,) = tokenized(extra=2).batches(7, equal_length=False)
    view = batch.on_corrupt()
    assert view.clean is batch.corrupt and view.position is batch.corrupt_position
    assert view.attention_mask is batch.corrupt_attention_mask
    assert view.answer is batch.answer and view.wrong_answer is batch.wrong_answer
    (unpaired,) = TokenizedPairs.from_tokens(torch.ones(2, 3, dtype=torch.long), torch.tensor([0, 1])).batches(2)
    with pytest.raises(PairsError, match="no corrupt prompts"):
        unpaired.on_corrupt()


def test_from_tokens_takes_a_rectangle_or_a_list() -> None:
    rectangle = torch.arange(6).view(2, 3)
    pairs = TokenizedPairs.from_tokens(rectangle, torch.tensor([1, 2]))
    assert pairs.lengths == (3, 3) and pairs.position.tolist() == [2, 2]
    assert pairs.hash == TokenizedPairs.from_tokens(list(rectangle), torch.tensor([1, 2])).hash
    assert pairs.hash != TokenizedPairs.from_tokens(rectangle, torch.tensor([2, 1])).hash
    assert repr(pairs) == "TokenizedPairs(n=2, length=3, with=answers only)"
    assert repr(tokenized()) == "TokenizedPairs(n=7, length=3 to 5, with=corrupt, wrong_answer, labels)"


def test_tokens_that_do_not_fit_are_refused() -> None:
    tokens, answer = torch.arange(6).view(2, 3), torch.tensor([1, 2])
    with pytest.raises(PairsError, match=r"got lengths \{.*'labels': 1"):
        TokenizedPairs.from_tokens(tokens, answer, labels=["only one"])
    with pytest.raises(PairsError, match=r"got lengths \{'clean': 2.*'corrupt': 1"):
        TokenizedPairs.from_tokens(list(tokens), answer, [tokens[0]])
    with pytest.raises(PairsError, match="pair 1: position 3 is outside the clean prompt of 3 tokens"):
        TokenizedPairs.from_tokens(tokens, answer, position=torch.tensor([0, 3]))
    with pytest.raises(PairsError, match="pair 0: position -1 is outside"):
        TokenizedPairs.from_tokens([tokens[0][:0], tokens[1]], answer)
    with pytest.raises(PairsError, match="at least one pair"):
        TokenizedPairs.from_tokens(tokens[:0], answer[:0])
    with pytest.raises(Exception, match="from_tokens: expected clean to be Int"):
        TokenizedPairs.from_tokens(tokens.float(), answer)
    with pytest.raises(Exception, match="from_tokens: expected answer to be Int"):
        TokenizedPairs.from_tokens(tokens, torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused_at_the_call(batch_size: int) -> None:
    with pytest.raises(SettingsError, match=f"at least 1, got {batch_size}"):
        tokenized().batches(batch_size)
