"""`tl-neuron-circuits compare`, as a person uses it: tables, files, JSON, going on, messages."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.loops import for_each
from tests.test_cli import run
from tl_neuron_circuits import Comparison, Dictionary, save_dictionary
from tl_neuron_circuits.tasks import subject_verb_agreement

pytestmark = pytest.mark.filterwarnings("ignore:dictionaries leave more than 0.9")  # these are random
D_MODEL, N_LAYERS = 128, 4


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    subject_verb_agreement("simple", n=16).to_jsonl(tmp_path / "pairs.jsonl")
    return tmp_path / "pairs.jsonl"


def save(folder: Path, layer: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(layer)
    enc, dec = (torch.randn(shape, generator=generator) for shape in ((D_MODEL, 8), (8, D_MODEL)))
    block, out = f"blocks.{layer}.", f"blocks.{layer}.hook_mlp_out"
    hooks = {"hook_in": out if kind == "standard" else block + "ln2.hook_normalized", "hook_out": out}
    made = Dictionary(kind, enc, dec, torch.zeros(D_MODEL), b_enc=torch.zeros(8), **hooks)
    save_dictionary(made, folder / f"layer_{layer}")


def test_compare_shows_a_table_writes_what_it_names_and_goes_on(pairs_file: Path, tmp_path: Path) -> None:
    for layer in range(N_LAYERS):
        save(tmp_path / "saes", layer, "standard")
        save(tmp_path / "transcoders", layer, "transcoder")
    single = [("--transcoder", tmp_path / "transcoders" / f"layer_{layer}") for layer in range(N_LAYERS)]
    call = ["compare", "demo-gelu", "--pairs", pairs_file, "--basis", "neurons", "--basis", "mlp_outputs"]
    call += ["--sae", tmp_path / "saes", *(part for option in single for part in option), "--method", "relp"]
    call += ["--size", "1", "--size", "100", "--size", "800", "--out", tmp_path / "out"]
    code, out, err = run(*call)
    assert code == 0, err
    assert "transcoder" in out and "nodes of sae" in out.replace("\n", " ") and "sparsity.html" in out
    table = pd.read_csv(tmp_path / "out" / "sparsity.csv")
    assert set(table["basis"]) == {"neurons", "mlp_outputs", "sae", "transcoder"} and len(table) == 2 * 3 + 2 * 2
    assert (tmp_path / "out" / "sparsity.html").stat().st_size > 100_000
    held_out = len(next(iter(Comparison.load(tmp_path / "out" / "comparison").curves.values())).full)
    assert held_out == 8
    code, out, err = run(*call, "--json")
    content = json.loads(out)
    assert code == 0 and len(content["summary"]) == 4 and "faithfulness 0.8" in content["headline"], err
    code, _, err = run(*call, "--ablation", "zero")
    assert code == 2 and "other ['ablation'" in err.replace("\n", " ")


def test_a_layer_without_a_dictionary_is_left_out_of_every_basis(pairs_file: Path, tmp_path: Path) -> None:
    save(tmp_path / "saes", 2, "standard")
    call = ["compare", "demo-gelu", "--pairs", pairs_file, "--evaluation-pairs", pairs_file, "--method", "random"]
    code, out, err = run(*call, "--sae", tmp_path / "saes", "--size", "2", "--out", tmp_path / "out", "--json")
    assert code == 0, err
    sizes = {row["basis"]: row["n_nodes"] for row in json.loads(out)["summary"]}
    assert sizes == {"neurons": 3 * 512, "mlp_outputs": 3 * D_MODEL, "sae": 3 * (8 + 1)}


@for_each(
    ("option", "message"),
    [
        (("--basis", "nothing"), "expected --basis out of"),
        (("--sae", "no-such-folder"), "no-such-folder"),
        (("--method", "nothing"), "nothing"),
        (("--error-nodes", "nothing"), "nothing"),
        (("--size", "-3"), "-3"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    pairs_file: Path, tmp_path: Path, option: tuple[str, ...], message: str
) -> None:
    code, out, err = run("compare", "demo-gelu", "--pairs", pairs_file, "--out", tmp_path / "out", *option)
    assert code == 2 and message in " ".join(err.split()) and "Traceback" not in out + err
