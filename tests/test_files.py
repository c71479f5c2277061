"""What is saved is there as a whole or not at all, whatever happens meanwhile; `tests.killed_saves` tries it longer."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tl_neuron_circuits as tnc
from tests import killed_saves
from tests.killed_saves import small_files
from tests.loops import for_each
from tests.saved_files import plain
from tl_neuron_circuits import FileFormatError, PairsError, PromptPairs, SaveError
from tl_neuron_circuits._files import read_directory, staged, write_directory, write_text
from tl_neuron_circuits.bases import _dictionary_files

PAIRS = PromptPairs(clean=["The dog", "The dogs"], answer=[" is", " are"])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # of the forks that save
def test_kills_races_and_full_disks_lose_and_mix_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """A few trials of three kinds of save: one file, two files that belong together, text."""
    killed_saves.main(["--trials", "5", "--saves", "10", "--kinds", "scores", "dictionary", "pairs"])
    shown = capsys.readouterr().out
    assert "'killed: kills': 15" in shown and "'full disk: full: refused': 3" in shown


def test_only_stages_that_no_process_holds_are_swept(tmp_path: Path) -> None:
    dead, other = tmp_path / ".tnc-0123456789abcdef.stage", tmp_path / ".somebody.stage"
    dead.mkdir(), other.mkdir()
    (dead / "it").write_text("half")
    with staged(tmp_path / "slow.txt") as place:
        place.write_text("slow")
        write_text(tmp_path / "fast.txt", "fast")  # would sweep the other stage, were it not locked
        assert place.exists() and not dead.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".somebody.stage", "fast.txt", "slow.txt"]


def test_a_failed_write_says_so_and_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    PAIRS.to_jsonl(file)
    with small_files(10), pytest.raises(SaveError, match="could not be written.*unchanged") as caught:
        PAIRS[:1].to_jsonl(file)
    assert isinstance(caught.value, OSError) and caught.value.errno == errno.EFBIG
    assert PromptPairs.from_jsonl(file) == PAIRS and [*tmp_path.iterdir()] == [file]
    with pytest.raises(SaveError, match="directory"):
        PAIRS.to_jsonl(tmp_path)


def test_links_stay_links_and_new_files_get_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("deep/file")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "deep" / "file").read_text() == "text"
    (tmp_path / "plain").touch()
    assert (tmp_path / "deep" / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    write_directory(tmp_path / "it", "kind", 1, {"a": whole, "b": whole[:3], "c": whole.view(2, 3)}, {})
    tensors, _ = read_directory(tmp_path / "it", "kind", 1, dict)
    assert torch.equal(tensors["a"], whole) and torch.equal(tensors["b"], whole[:3]) and tensors["c"].shape == (2, 3)


@pytest.mark.parametrize("by_others", [False, True])
def test_a_dictionary_that_was_saved_halfway_is_the_old_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_others: bool
) -> None:
    old, new = tnc.load_demo_dictionaries("sae")[:2]
    path = tnc.save_dictionary(old, tmp_path / "sae")
    if by_others:  # neither file has an id
        tensors, _, _ = _dictionary_files.read_tensors(path / "sae_weights.safetensors")
        from safetensors.torch import save_file

        config = json.loads((path / "cfg.json").read_text())
        config["metadata"].pop(_dictionary_files.ID)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / "sae_weights.safetensors")
        (path / "cfg.json").write_text(json.dumps(config))

    def content(dictionary: Any) -> Any:
        return plain(replace(dictionary, name=""))

    def fail(*_: Any) -> None:
        raise SaveError("killed")

    expected = content(tnc.load_dictionary(path)), content(replace(new, metadata={}))
    with monkeypatch.context() as patch:
        patch.setattr(_dictionary_files, "write_tensors", fail)
        with pytest.raises(SaveError):
            tnc.save_dictionary(new, path, overwrite=True)
    assert content(tnc.load_dictionary(path)) == expected[0]
    real = write_text

    def fail_last(file: Path, text: str) -> None:
        if f'"{_dictionary_files.ID}": null' not in text:
            fail()
        real(file, text)

    with monkeypatch.context() as patch:
        patch.setattr(_dictionary_files, "write_text", fail_last)
        with pytest.raises(SaveError):
            tnc.save_dictionary(new, path, overwrite=True)
    half = tnc.load_dictionary(path)
    assert half.hook_in == new.hook_in and torch.equal(half.W_enc, new.W_enc)


def test_a_config_that_was_edited_is_refused_until_it_gives_up_its_id(tmp_path: Path) -> None:
    path = tnc.save_dictionary(tnc.load_demo_dictionaries("sae")[3], tmp_path / "sae")
    config = json.loads((path / "cfg.json").read_text())
    config["metadata"]["hook_name"] = "blocks.2.hook_mlp_out"
    (path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(FileFormatError, match="remove tl_neuron_circuits_id"):
        tnc.load_dictionary(path)
    del config["metadata"][_dictionary_files.ID]
    (path / "cfg.json").write_text(json.dumps(config))
    assert tnc.load_dictionary(path).hook_in == "blocks.2.hook_mlp_out"


def test_json_lines_end_at_line_feeds_alone_and_may_begin_with_a_mark(tmp_path: Path) -> None:
    prompts = "The\u2028dog\u0085", "A\x0c"
    lines = [json.dumps({"clean_prefix": text, "clean_answer": " is"}, ensure_ascii=False) for text in prompts]
    (tmp_path / "pairs").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    assert PromptPairs.from_jsonl(tmp_path / "pairs").clean == prompts


@for_each(
    ("line", "message"),
    [
        (
            '{"clean_prefix": "a", "clean_answer": " b", "patch_prefx": "c"}',
            r"line 1 has the unknown fields \['patch_prefx'\]",
        ),
        (r'{"clean_prefix": "\ud800", "clean_answer": " b"}', "surrogates not allowed"),
        ("[" * 100_000, "nested more than 64 levels"),
        ('{"clean_prefix": ' + "9" * 5000 + "}", "line 1 is not JSON"),
    ],
)
def test_lines_that_lose_something_are_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "pairs").write_text(line)
    with pytest.raises(PairsError, match=message):
        PromptPairs.from_jsonl(tmp_path / "pairs")


def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(PairsError, match="not a regular file"):
            PromptPairs.from_jsonl(path)


def test_half_surrogates_of_tokens_survive_a_circuit_s_files(tmp_path: Path) -> None:
    circuit = tnc.trace(tnc.load_demo_model(), "The capital of the state containing Dallas is", " Austin", nodes=5)
    circuit = circuit.label({circuit.nodes["node"][0]: "half \ud83d"})
    circuit.save(tmp_path / "circuit")
    circuit.to_neuronpedia(tmp_path / "graph.json")
    circuit.to_html(tmp_path / "page.html")
    for again in (tnc.Circuit.load(tmp_path / "circuit"), tnc.Circuit.from_neuronpedia(tmp_path / "graph.json")):
        assert again.nodes.equals(circuit.nodes) and again.edges.equals(circuit.edges)
