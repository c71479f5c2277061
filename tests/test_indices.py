"""Integers, counts, indices and masks are taken as users have them; everything else is refused by name."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import tl_neuron_circuits as tnc
from tests.loops import for_each
from tl_neuron_circuits._errors import SettingsError
from tl_neuron_circuits._indices import as_indices, as_integer

MASK = [True, False, False, True]
PAIRS = tnc.PromptPairs(clean=list("abcd"), answer=list("ABCD"))


@for_each(
    "key",
    [
        *([0, 3], (0, -1), range(0, 4, 3), slice(0, 4, 3), [np.int64(0), torch.tensor(3)]),
        *(np.array([0, 3]), torch.tensor([0, 3]), pd.Series([0, 3]), pd.Index([0, 3])),
        *(MASK, np.array(MASK), torch.tensor(MASK), pd.Series(MASK), [np.bool_(entry) for entry in MASK]),
    ],
    ids=lambda key: f"{type(key).__name__} {np.asarray(key)[:1] if not isinstance(key, slice) else ''}",
)
def test_pairs_are_chosen_by_indices_and_masks(key: Any) -> None:
    assert [pair.clean for pair in PAIRS[key]] == ["a", "d"]


@for_each("key", [3, -1, np.int32(3), np.array(3), torch.tensor(3)], ids=repr)
def test_one_pair_is_chosen_by_any_integer(key: Any) -> None:
    assert PAIRS[key].clean == "d"


@for_each(
    ("key", "message"),
    [
        (MASK[:2], "a mask of 4 entries; got one of 2"),
        (np.array([*MASK, True]), "a mask of 4 entries; got one of 5"),
        ([0, True], "got [0, True], a list"),
        (True, "got True, a bool"),
        (np.array([0.0, 3.0]), "got a ndarray of float64 with shape [2]"),
        (torch.zeros(2, 2, dtype=torch.long), "got a Tensor of torch.int64 with shape [2, 2]"),
        ("0", "got '0', a str"),
        ({0, 3}, "got {0, 3}, a set"),
        ([0, 4], "between 0 and 3; got [4]"),
    ],
)
def test_other_keys_are_refused_by_what_they_are(key: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=r"^expected pairs\[\.\.\.\] ") as error:
        PAIRS[key]
    assert message in str(error.value)


def test_without_a_length_masks_stand_for_where_they_are_true() -> None:
    assert as_indices(MASK, "positions") == [0, 3] and as_indices(np.int64(2), "positions") == [2]
    assert as_integer(torch.tensor(2), "k") == 2
    for wrong in (True, 1.0, "1", None, torch.tensor([1])):
        with pytest.raises(SettingsError, match="^expected k to be an integer; got "):
            as_integer(wrong, "k")


@pytest.mark.parametrize(
    "whole",
    [np.int64, torch.tensor, np.array],
    ids=["numpy", "torch", "array"],
)
def test_counts_seeds_sizes_layers_and_positions_may_be_of_any_integer_type(whole: Any) -> None:
    model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=whole(4), seed=whole(1))
    assert pairs == tnc.tasks.subject_verb_agreement("simple", n=4, seed=1)
    basis, steps = tnc.bases.Neurons(layers=np.array([0, 2])), tnc.IntegratedGradients(steps=whole(2))
    scores = tnc.attribute(model, pairs, basis=basis, method=steps, batch_size=whole(2))
    assert steps == tnc.IntegratedGradients(steps=2) and [site.layer for site in basis.sites(model)] == [0, 2]
    assert len(scores.top(whole(3))) == 3
    for sizes in (range(1, 3), np.array([1, 2]), torch.tensor([1, 2]), pd.Series([1, 2])):
        assert tnc.evaluate(model, pairs, scores, sizes=sizes, ablation="zero").sizes == (1, 2)
    for positions in (whole(1), torch.tensor([1]), np.array([False, True]), pd.Series([1])):
        steered = tnc.steer(model, "The dog", pd.Series(["L0/N1", "L0/N2"]), scale=0, positions=positions)
        assert steered.nodes["position"].tolist() == [1, 1]


def test_layers_may_be_a_mask_of_the_models_layers() -> None:
    model = tnc.load_demo_model()
    mask = [layer == 1 for layer in range(model.cfg.n_layers)]
    assert [site.layer for site in tnc.bases.MLPOutputs(layers=mask).sites(model)] == [1]
    for wrong in (mask[:-1], [-1], [0.0], "0"):
        with pytest.raises(SettingsError, match="^expected layers "):
            tnc.bases.MLPOutputs(layers=wrong).sites(model)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("count", [0, -1])
def test_counts_that_make_no_sense_are_refused(count: int) -> None:
    model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=2)
    scores = tnc.attribute(model, pairs)
    calls = (
        lambda: tnc.evaluate(model, pairs, scores, batch_size=count),
        lambda: tnc.nodes.activation_variance(model, pairs, batch_size=count),
        lambda: tnc.compare_with_patching(scores, scores, top_k=count),
        lambda: scores.top(count - 1),
        lambda: tnc.lasso.CircuitLasso(penalty=tnc.lasso.MostEdges(count - 1)),
    )
    for call in calls:
        with pytest.raises(SettingsError, match="to be at least [01]; got "):
            call()
