"""`NodeScores`: ranking, tables, files."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from tests.families import ModelCase, all_models
from tests.loops import for_each
from tests.nodes.plain import POSTS, random_pairs
from tests.propagation.readings import model_of
from tests.saved_files import edit
from tl_neuron_circuits._errors import FileFormatError
from tl_neuron_circuits.bases import HeadOutputs, Neurons, ResidualStream
from tl_neuron_circuits.nodes import NodeScores, Random, attribute

models = pytest.mark.parametrize("case", all_models("gpt2"))
COLUMNS = ["label", "layer", "unit", "position", "score", "kind", "hook"]


@models
def test_top_ranks_by_size_or_by_sign(case: ModelCase) -> None:
    scores = attribute(model_of(case), random_pairs(4, 4))
    flat = scores.flat()
    assert len(scores) == flat.numel() == 2 * 4 * 24
    by_size, signed = scores.top(9), scores.top(9, by="signed")
    assert list(by_size.columns) == COLUMNS
    assert by_size["score"].abs().tolist() == flat.abs().sort(descending=True).values[:9].tolist()
    assert signed["score"].tolist() == flat.sort(descending=True).values[:9].tolist()
    assert len(scores.top(10_000)) == len(scores)


@models
def test_a_row_names_its_node(case: ModelCase) -> None:
    """Label, hook, position and unit lead back to the score; so does the order of the table."""
    scores = attribute(model_of(case), random_pairs(4, 4), basis=[Neurons(), HeadOutputs(layers=[1])])
    for row in scores.top(20).itertuples():
        letter = "A" if "attn" in row.hook else "N"
        assert row.label == f"L{row.layer}/{letter}{row.unit}@{row.position}"
        assert f"blocks.{row.layer}." in row.hook
        assert float(scores.values[row.hook][row.position, row.unit]) == pytest.approx(row.score)
    table = scores.to_dataframe()
    assert torch.equal(torch.tensor(table["score"].to_numpy()), scores.flat())
    summed = attribute(model_of(case), random_pairs(4, 4), positions="sum")
    row = next(summed.top(1).itertuples())
    assert row.position == -1 and row.label == f"L{row.layer}/N{row.unit}"
    assert float(summed.values[row.hook][row.unit]) == pytest.approx(row.score)


@models
def test_scores_show_themselves(case: ModelCase) -> None:
    scores = attribute(model_of(case), random_pairs(4, 4))
    assert repr(scores).startswith("NodeScores(relp of logit_difference") and "\n" not in repr(scores)
    assert "<table" in scores._repr_html_()


@pytest.mark.parametrize("positions", ["keep", "sum"])
@models
def test_what_is_saved_is_loaded(case: ModelCase, positions: str, tmp_path: Path) -> None:
    scores = attribute(model_of(case), random_pairs(4, 4), basis=[Neurons(), ResidualStream()], positions=positions)
    for _ in range(2):  # saving again replaces
        scores.save(tmp_path / "deep" / "scores")
    loaded = NodeScores.load(tmp_path / "deep" / "scores")
    assert torch.equal(loaded.flat(), scores.flat()) and loaded.values.keys() == scores.values.keys()
    assert loaded.settings == json.loads(json.dumps(dict(scores.settings)))
    assert loaded.sites == scores.sites and [basis.name for basis in loaded.basis] == ["neurons", "residual_stream"]
    pd.testing.assert_frame_equal(loaded.top(5), scores.top(5))
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["scores"]


def _truncate(folder: Path) -> None:
    file = folder / "scores.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def _flip_a_bit(folder: Path) -> None:
    file = folder / "scores.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def _foreign(folder: Path) -> None:
    save_file({"x": torch.ones(2)}, folder / "scores.safetensors")


def _older(folder: Path) -> None:
    """As the version before wrote it."""
    _foreign(folder)
    (folder / "scores.json").write_text('{"generator": "tl_neuron_circuits", "kind": "scores", "schema": 2}')


def _newer(folder: Path) -> None:
    edit(folder / "scores.safetensors", lambda head, _: head.update(schema=99))


def _without_settings(folder: Path) -> None:
    edit(folder / "scores.safetensors", lambda head, _: head["notes"].pop("settings"))


def _without_a_setting(folder: Path) -> None:
    edit(folder / "scores.safetensors", lambda head, _: head["notes"]["settings"].pop("positions"))


def _without_a_layer(folder: Path) -> None:
    edit(folder / "scores.safetensors", lambda _, tensors: tensors.popitem())


def _infinite(folder: Path) -> None:
    edit(folder / "scores.safetensors", lambda _, tensors: next(iter(tensors.values())).fill_(torch.inf))


def _flat(folder: Path) -> None:
    edit(folder / "scores.safetensors", lambda _, tensors: tensors.update({k: t[0] for k, t in tensors.items()}))


def _without_tensors(folder: Path) -> None:
    (folder / "scores.safetensors").unlink()


DAMAGES = {
    _truncate: "truncated or foreign",
    _flip_a_bit: "another checksum",
    _foreign: "holds something else",
    _older: "kept settings in scores.json",
    _newer: "expected schema 3 .*; got 99",
    _without_settings: "missing required field `settings`",
    _without_a_setting: "missing required field `positions`",
    _without_a_layer: "missing",
    _infinite: "expected finite scores",
    _flat: "has the shape",
    _without_tensors: "scores.safetensors is missing",
}


@for_each("damage", DAMAGES, ids=lambda damage: damage.__name__)
@models
def test_damaged_files_are_told(case: ModelCase, damage: Callable[[Path], None], tmp_path: Path) -> None:
    attribute(model_of(case), random_pairs(4, 4)).save(tmp_path / "scores")
    damage(tmp_path / "scores")
    with pytest.raises(FileFormatError, match=DAMAGES[damage]):
        NodeScores.load(tmp_path / "scores")


@models
def test_other_peoples_files_are_not_overwritten(case: ModelCase, tmp_path: Path) -> None:
    scores = attribute(model_of(case), random_pairs(4, 4))
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(FileFormatError, match="found something else there"):
            scores.save(path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(FileFormatError, match=r"scores\.safetensors is missing"):
        NodeScores.load(tmp_path / "nothing")


@models
def test_controls_know_nothing_or_activations_only(case: ModelCase) -> None:
    model, pairs = model_of(case), random_pairs(4, 4, 4)
    noise = [attribute(model, pairs, method=Random(seed)).flat() for seed in (0, 0, 1)]
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])
    assert abs(float(noise[0].mean())) < 0.3 and 0.8 < float(noise[0].std()) < 1.2
    found = attribute(model, pairs, method="activation_difference", batch_size=2)
    runs = [model.run_with_cache(torch.stack(list(prompts)))[1] for prompts in (pairs.clean, pairs.corrupt)]
    for name in POSTS:
        expected = (runs[0][name] - runs[1][name]).abs().mean(0).detach().float()
        torch.testing.assert_close(found.values[name], expected, atol=1e-6, rtol=1e-6)
