"""`PromptPairs`: validation, files, splits, directions, provenance."""

import json
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import TypeCheckError

from tests.loops import for_each
from tl_neuron_circuits._errors import PairsError
from tl_neuron_circuits.tasks import PromptPair, PromptPairs


def numbered(n: int, n_labels: int = 1) -> PromptPairs:
    """Both directions of n contrasts, labels going round."""
    return PromptPairs(
        clean=[f"clean {i}" for i in range(n)],
        answer=[" yes"] * n,
        corrupt=[f"corrupt {i}" for i in range(n)],
        wrong_answer=[" no"] * n,
        labels=[f"label {i % n_labels}" for i in range(n)],
    ).both_directions()


def test_columns_are_tuples_and_pairs_come_back_by_index_slice_and_list() -> None:
    pairs = numbered(3)
    assert isinstance(pairs.clean, tuple)
    assert pairs[0] == PromptPair("clean 0", " yes", "corrupt 0", " no", "label 0")
    assert pairs[-1].clean == "corrupt 2"
    assert list(pairs[1:3].clean) == ["clean 1", "clean 2"]
    assert list(pairs[[2, 0]].clean) == ["clean 2", "clean 0"]
    assert len(list(pairs)) == len(pairs) == 6
    assert PromptPairs.from_pairs(pairs) == pairs


@for_each(
    ("columns", "message"),
    [
        ({"clean": [], "answer": []}, "at least one pair, got none"),
        ({"clean": ["a b", "c d"], "answer": [" x"]}, r"pair 1 \('c d'\) is the first incomplete"),
        ({"clean": ["a"], "answer": [" x", " y"]}, "pair 1 .no clean prompt."),
        ({"clean": ["a"], "answer": [" x"], "labels": []}, "pair 0"),
        ({"clean": ["a\udce9"], "answer": [" x"]}, "clean of pair 0: expected text that UTF-8 can hold"),
        ({"clean": ["a", ""], "answer": [" x", " y"]}, "clean of pair 1 must be a non-empty string, got ''"),
        ({"clean": "a", "answer": [" x"]}, "clean must be a list of strings, .* got 'a'"),
        ({"clean": ["a"], "answer": [" x"], "wrong_answer": [" x"]}, r"pair 0 \('a'\): answer and wrong_answer"),
    ],
)
def test_columns_that_do_not_fit_are_refused_by_pair(columns: dict, message: str) -> None:
    with pytest.raises(PairsError, match=message):
        PromptPairs(**columns)


@for_each("answer", [[3], 5, [None], b"x"])
def test_columns_of_another_type_are_refused(answer: Any) -> None:
    with pytest.raises((PairsError, TypeCheckError)):  # the type check runs first where tests switch it on
        PromptPairs(clean=["a"], answer=answer)


def test_arguments_are_keyword_only_and_pairs_are_frozen() -> None:
    with pytest.raises(TypeError):
        PromptPairs(["a"], [" x"])  # pyright: ignore[reportCallIssue]
    with pytest.raises(AttributeError):
        numbered(1).clean = ("other",)  # pyright: ignore[reportAttributeAccessIssue]


def test_both_directions_swap_prompts_and_answers_and_never_repeat() -> None:
    pairs = PromptPairs(clean=["The keys"], answer=[" are"], corrupt=["The key"], wrong_answer=[" is"])
    both = pairs.both_directions()
    assert list(both) == [
        PromptPair("The keys", " are", "The key", " is"),
        PromptPair("The key", " is", "The keys", " are"),
    ]
    assert both.both_directions() == both


@pytest.mark.parametrize("column", ["corrupt", "wrong_answer"])
def test_both_directions_need_something_to_swap(column: str) -> None:
    columns = {"corrupt": ["The key"], "wrong_answer": [" is"]} | {column: None}
    with pytest.raises(PairsError, match=f"these pairs have no {column}"):
        PromptPairs(clean=["The keys"], answer=[" are"], **columns).both_directions()


@for_each("seed", range(8))
@for_each("by", ["contrast", "label"])
def test_split_is_a_partition_that_keeps_groups_together(by: str, seed: int) -> None:
    pairs = numbered(20, n_labels=5)
    train, test = pairs.split(0.7, seed, by=by)
    assert sorted([*train, *test]) == sorted(pairs)
    assert not {*train.clean, *(train.corrupt or ())} & {*test.clean, *(test.corrupt or ())}
    if by == "label":
        assert not set(train.labels or ()) & set(test.labels or ())
    expected = {"contrast": 28, "label": 24}[
        by
    ]  # groups of 2 and of 8 out of 40: nearest to 28, of 24 and 32 the first
    assert len(train) == expected
    assert list(train) == [pair for pair in pairs if pair in set(train)], "the order stays"


def test_split_depends_on_the_seed_alone() -> None:
    pairs = numbered(20)
    assert pairs.split(0.5, seed=3) == pairs.split(0.5, seed=3)
    assert pairs.split(0.5, seed=3) != pairs.split(0.5, seed=4)


def test_split_always_leaves_something_on_both_sides() -> None:
    train, test = numbered(3).split(0.01)
    assert (len(train), len(test)) == (2, 4)
    train, test = numbered(3).split(0.99)
    assert (len(train), len(test)) == (4, 2)


def test_split_refuses_what_it_cannot_divide() -> None:
    pairs = numbered(4, n_labels=1)
    for fraction in (0.0, 1.0, -1.0, 1.5):
        with pytest.raises(PairsError, match="strictly between 0 and 1"):
            pairs.split(fraction)
    with pytest.raises(PairsError, match="all 8 pairs are linked by shared labels"):
        pairs.split(0.5, by="label")
    with pytest.raises(PairsError, match="needs labels"):
        PromptPairs(clean=["a", "b"], answer=[" x", " y"]).split(0.5, by="label")


def test_addition_joins_equal_columns_only() -> None:
    pairs = numbered(2)
    assert (pairs[:1] + pairs[1:]) == pairs
    with pytest.raises(PairsError, match=r"pair 4 .* has corrupt=None but pair 0 has corrupt='corrupt 0'"):
        pairs + PromptPairs(clean=["a"], answer=[" x"])


def test_hash_follows_the_content() -> None:
    pairs = numbered(2)
    assert pairs.hash == numbered(2).hash and len(pairs.hash) == 64
    assert len({pairs.hash, pairs[::-1].hash, pairs[:3].hash, numbered(2, n_labels=2).hash}) == 4


def test_reprs_and_table_show_the_columns_that_exist() -> None:
    pairs = PromptPairs(clean=["The <keys>"] * 30, answer=[" are"] * 30)
    assert repr(pairs) == "PromptPairs(n=30, first='The <keys>' → ' are')"
    assert repr(numbered(1)) == "PromptPairs(n=2, first='clean 0' → ' yes' | 'corrupt 0' → ' no')"
    assert list(pairs.to_dataframe()) == ["clean", "answer"]
    assert numbered(1).to_dataframe().shape == (2, 5)
    assert "&lt;keys&gt;" in pairs._repr_html_() and pairs._repr_html_().count("<tr") < 15


@pytest.mark.parametrize(
    "pairs", [numbered(3), PromptPairs(clean=["über\n"], answer=[" ‘x’"])], ids=["paired", "plain"]
)
def test_files_round_trip(pairs: PromptPairs, tmp_path: Path) -> None:
    pairs.to_jsonl(tmp_path / "pairs.jsonl")
    assert PromptPairs.from_jsonl(tmp_path / "pairs.jsonl") == pairs


@for_each(
    ("text", "message"),
    [
        ("", "has no pairs"),
        ("\n \n", "has no pairs"),
        ('{"clean_prefix": "a", "clean_answer": " x"}\n{"clean_prefix": "a"', "line 2 is not JSON"),
        ('\n["a"]', "line 2: expected an object with clean_prefix"),
        ('{"prompt": "a"}', "line 1 lacks clean_prefix and clean_answer; it has prompt"),
        ('{"clean_prefix": "a", "clean_answer": 3}', "line 1: clean_answer must be a non-empty string, got 3"),
        ('{"clean_prefix": "a", "clean_answer": null}', "line 1: clean_answer must be a non-empty string, got None"),
        (
            '{"clean_prefix": "a", "clean_answer": " x", "made_for": 3}',
            "line 1: `made_for` is not as to_jsonl writes it",
        ),
        ('{"clean_prefix": "", "clean_answer": " x"}', "line 1: clean_prefix must be a non-empty string, got ''"),
        (
            '{"clean_prefix": "a", "clean_answer": " x", "case": "c"}\n\n{"clean_prefix": "b", "clean_answer": " x"}',
            r"pair 1 \('b'\) has label=None but pair 0 has label='c'",
        ),
    ],
)
def test_files_that_are_no_pairs_are_refused_by_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(PairsError, match=message) as caught:
        PromptPairs.from_jsonl(tmp_path / "pairs.jsonl")
    assert "pairs.jsonl" in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PairsError, match="cannot read pairs from"):
        PromptPairs.from_jsonl(tmp_path / "absent.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PairsError, match="cannot read pairs from"):
        PromptPairs.from_jsonl(tmp_path / "binary.jsonl")


@pytest.mark.parametrize(("name", "n"), [("simple_train", 480), ("simple_test", 120), ("within_rc_test", 2400)])
def test_real_agreement_files_load_whole(name: str, n: int, shared_models: Path) -> None:
    path = shared_models.parent / "data" / "sva" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"the real agreement data are not on this machine (looked for {path})")
    pairs = PromptPairs.from_jsonl(path)
    assert len(pairs) == n
    first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    fields = ("clean_prefix", "clean_answer", "patch_prefix", "patch_answer", "case")
    assert pairs[0] == PromptPair(*(first[field] for field in fields))
    train, test = pairs.split(0.5)
    assert not set(train.clean) & set(test.clean)
