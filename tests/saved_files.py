"""Real saved files of every kind with their readers, for tests that damage them; and edits that keep a checksum."""

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

import tl_neuron_circuits as tnc
from tests.families import model_cases, random_tokens
from tl_neuron_circuits._files import read_directory, read_tensors, write_tensors
from tl_neuron_circuits._processes import Processes
from tl_neuron_circuits.cli._inputs import load_saved, read_inputs
from tl_neuron_circuits.components import EdgeScores, GroundTruth, component_edges
from tl_neuron_circuits.evaluation import EdgeCurve, evaluate_edges
from tl_neuron_circuits.lasso._lasso_circuit import LassoCircuit
from tl_neuron_circuits.lasso._observations import read_blocks, write_block
from tl_neuron_circuits.lasso._statistics import Statistics
from tl_neuron_circuits.nodes._resume import SavedSums
from tl_neuron_circuits.nodes._sums import Sums
from tl_neuron_circuits.transcoders._train import _Notes as CheckpointNotes
from tl_neuron_circuits.transcoders._train import write_checkpoint

PROMPT = "The capital of the state containing Dallas is"


@dataclass(frozen=True)
class Saved:
    """Files that one reader reads. `checked`: a change can be told from what was saved, by a checksum."""

    name: str
    files: tuple[str, ...]
    load: Callable[[Path], Any]
    checked: bool


def edit(file: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    """Let `change` alter the content of the header and the tensors in place; the checksum is made anew."""
    tensors, content, _ = read_tensors(file)
    head = json.loads(content or "null")
    change(head, tensors)
    write_tensors(file, {name: tensor.clone() for name, tensor in tensors.items()}, json.dumps(head))


def results(names: Collection[str] | None = None) -> dict[str, Any]:
    """One result of every class that has `save`, or of some of them, of small models."""
    model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=4)
    tiny = model_cases("gpt2")[0].build(torch.float32)
    outputs = tnc.bases.MLPOutputs()
    lasso = tnc.lasso.CircuitLasso(penalty=tnc.lasso.Share(0.9), regressors="same")
    few = {"bases": [outputs], "methods": ["relp", "random"], "sizes": [10], "bootstrap": 3}
    makers: dict[str, Callable[[], Any]] = {
        "scores": lambda: tnc.attribute(model, pairs, basis=outputs),
        "circuit": lambda: tnc.trace(model, PROMPT, " Austin", nodes=10),
        "lasso": lambda: lasso.fit(tiny, random_tokens(tiny, batch=20, pos=4)),
        "curve": lambda: tnc.evaluate(model, pairs, tnc.attribute(model, pairs, basis=outputs), sizes=[10, 100]),
        "edge_curve": lambda: evaluate_edges(model, pairs, tnc.trace(model, pairs, nodes=10), sizes=[5]),
        "comparison": lambda: tnc.compare(model, pairs, pairs, **few),
        "edges": lambda: component_edges(model, pairs, method="eap", attention="layers"),
        "pairs": lambda: pairs,
    }
    return {name: make() for name, make in makers.items() if names is None or name in names}


def write_all(folder: Path) -> list[Saved]:
    """Every kind of file in a folder of its own."""
    made = results()
    for name in ("scores", "circuit", "lasso", "curve", "edge_curve", "comparison", "edges"):
        made[name].save(folder / name / "saved")
    file = "saved/{}.safetensors"
    kinds = {"lasso": "lasso_circuit", "edges": "edge_scores"}
    loaders: dict[str, Callable[[Path], Any]] = {
        "scores": tnc.NodeScores.load, "circuit": tnc.Circuit.load, "lasso": LassoCircuit.load,
        "curve": tnc.SparsityCurve.load, "edge_curve": EdgeCurve.load, "comparison": tnc.Comparison.load,
        "edges": EdgeScores.load,
    }  # fmt: skip
    saved = [
        Saved(name, (file.format(kinds.get(name, name)),), lambda path, load=load: load(path / "saved"), True)
        for name, load in loaders.items()
    ]
    saved.append(Saved("cli", ("saved/scores.safetensors",), lambda path: load_saved(path / "saved"), True))
    made["scores"].save(folder / "cli" / "saved")
    return saved + _resumable(folder) + _dictionaries(folder) + _texts(folder, made) + [_tracr(folder)]


def _resumable(folder: Path) -> list[Saved]:
    settings = {"model": "demo", "seed": 0}
    sums = Sums()
    sums.blocks["blocks.0.hook_mlp_out", "node"] = torch.ones(2, 3)
    SavedSums(folder / "sums", settings, Processes()).write(sums, 2, 4, 4, last=True)
    write_block(folder / "blocks", 0, (Statistics.from_rows(torch.arange(6.0).reshape(3, 2)),), settings)
    notes = {
        "config": {"k": 3}, "material": {"model": "demo"}, "buffer": {"cursor": 1, "batches": 2},
        "seconds": {"total": 1.0}, "history": [{"step": 1}], "sums": {"0": {"loss": 0.5}}, "sites": [["a", None]],
        "positions": 12,
    }  # fmt: skip
    write_checkpoint(folder / "checkpoint", 3, {"0.W_enc": torch.ones(2, 3)}, notes, 2)
    inside = "checkpoint-00000003"
    return [
        Saved(
            "sums",
            ("process0of1-000002/partial.safetensors",),
            lambda path: SavedSums(path, settings, Processes())._load(path / "process0of1-000002"),
            True,
        ),
        Saved("blocks", ("block0/observations.safetensors",), lambda path: _blocks(path, settings), True),
        Saved(
            "checkpoint",
            (f"{inside}/checkpoint.safetensors",),
            lambda path: read_directory(path / inside, "checkpoint", 3, CheckpointNotes),
            True,
        ),
    ]


def _blocks(path: Path, settings: Mapping[str, Any]) -> Any:
    found = read_blocks(path, settings)
    if not found:  # a block that is not there is one that is still to be observed
        raise tnc.FileFormatError("no blocks")
    return found


def _dictionaries(folder: Path) -> list[Saved]:
    generator = torch.Generator().manual_seed(0)
    tensors = {"W_enc": (4, 6), "W_dec": (6, 4), "b_enc": (6,), "b_dec": (4,), "threshold": (6,)}
    weights = {name: torch.rand(*shape, generator=generator) for name, shape in tensors.items()}
    config = {
        "d_in": 4, "d_sae": 6, "dtype": "float32", "architecture": "jumprelu",
        "metadata": {"hook_name": "blocks.0.hook_mlp_out", "sae_lens_version": "6.54.12"},
    }  # fmt: skip
    for name in ("sae", "sae_by_others"):
        (folder / name / "saved").mkdir(parents=True)
        save_file(weights, folder / name / "saved" / "sae_weights.safetensors")
        (folder / name / "saved" / "cfg.json").write_text(json.dumps(config))
    own = tnc.load_dictionary(folder / "sae" / "saved")
    tnc.save_dictionary(own, folder / "sae" / "saved", overwrite=True)
    load = lambda path: tnc.load_dictionary(path / "saved")  # noqa: E731
    return [
        Saved("sae", ("saved/sae_weights.safetensors",), load, True),
        Saved("sae_config", ("saved/cfg.json", "saved/sae_weights.safetensors"), load, False),
        Saved("sae_by_others", ("saved/cfg.json", "saved/sae_weights.safetensors"), load, False),
    ]


def _texts(folder: Path, made: Mapping[str, Any]) -> list[Saved]:
    import shutil

    shutil.copytree(folder / "sae", folder / "sae_config")
    for name in ("pairs", "bios", "prompts", "graph", "graph_by_others", "labels"):
        (folder / name).mkdir()
    made["pairs"].to_jsonl(folder / "pairs" / "pairs.jsonl")
    rows = [
        {"hard_text": "She lectures.", "profession": 21, "gender": 1},
        {"hard_text": "He helps.", "profession": "nurse", "gender": 0},
    ]
    (folder / "bios" / "bios.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "bios" / "bios.json").write_text(json.dumps(rows))
    pd.DataFrame(rows).to_csv(folder / "bios" / "bios.csv", index=False)
    (folder / "prompts" / "prompts.txt").write_text("The dog\nThe dogs near the tree\n")
    made["circuit"].to_neuronpedia(folder / "graph" / "graph.json")
    graph = json.loads((folder / "graph" / "graph.json").read_text())
    graph["metadata"]["info"].pop("tl_neuron_circuits")
    (folder / "graph_by_others" / "graph.json").write_text(json.dumps(graph))
    texts = tnc.demo.capitals(n=40).clean
    describe = lambda path: tnc.describe(tnc.load_demo_model(), ["L0/N5"], texts, cache=path, sample=50, k=1)  # noqa: E731
    described = describe(folder / "described")
    (cache,) = (folder / "described").glob("*/*/*.safetensors")
    described.to_csv(folder / "labels" / "labels.csv")
    described.to_json(folder / "labels" / "labels.json")
    labels = ("labels.csv", "labels.json")
    read = lambda path: [tnc.explain.Descriptions.from_file(path / name) for name in labels]  # noqa: E731
    load = lambda path: tnc.Circuit.from_neuronpedia(path / "graph.json")  # noqa: E731
    bios = tuple(f"bios.{form}" for form in ("jsonl", "json", "csv"))
    return [
        Saved("pairs", ("pairs.jsonl",), lambda path: tnc.PromptPairs.from_jsonl(path / "pairs.jsonl"), False),
        Saved(
            "bios", bios, lambda path: [tnc.lasso.LabeledTexts.from_bias_in_bios(path / name) for name in bios], False
        ),
        Saved("prompts", ("prompts.txt",), lambda path: read_inputs(None, path / "prompts.txt"), False),
        Saved("graph", ("graph.json",), load, True),
        Saved("graph_by_others", ("graph.json",), load, False),
        Saved("described", (str(cache.relative_to(folder / "described")),), describe, True),
        Saved("labels", labels, read, False),
    ]


def _tracr(folder: Path) -> Saved:
    path = folder / "tracr"
    path.mkdir()
    neuron = {"reads": {"token": 1.0}, "writes": {"token": -1.0}}
    contents = {
        "config": {"d_model": 2, "n_heads": 1, "d_mlp": 1},
        "ground_truth": {"residual_labels": ["token", "one"], "layers": [{"active_neurons": {"0": neuron}}]},
    }
    for name, content in contents.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    weights = {"embed.W_E": torch.ones(3, 2), "unembed.W_U": torch.ones(2, 3)}
    weights |= {f"blocks.0.attn.W_{name}": torch.ones(1, 2, 2) for name in "QKVO"}
    save_file(weights, path / "model.safetensors")
    return Saved("tracr", ("ground_truth.json", "config.json", "model.safetensors"), GroundTruth.from_tracr, False)


def plain(value: Any) -> Any:
    """The content of a result as nested tuples that can be compared, NaN equal to NaN."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, pd.DataFrame):
        return tuple((name, str(value[name].dtype), repr(value[name].tolist())) for name in value.columns)
    if isinstance(value, np.ndarray):
        return repr(value.tolist())
    if isinstance(value, msgspec.Struct):
        return plain(msgspec.structs.asdict(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [one.name for one in dataclasses.fields(value) if one.name != "basis"]
        return type(value).__name__, tuple((name, plain(getattr(value, name))) for name in names)
    if isinstance(value, Mapping):
        return tuple((repr(key), plain(one)) for key, one in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(map(plain, value))
    return tuple(sorted(map(repr, value))) if isinstance(value, set | frozenset) else repr(value)


def use(value: Any, folder: Path) -> None:
    """What people do first with what they loaded."""
    for name in ("__repr__", "_repr_html_", "to_dataframe", "__len__"):
        if hasattr(value, name):
            getattr(value, name)()
    if isinstance(value, tnc.NodeScores):
        value.top(3), value.map()
    elif isinstance(value, tnc.Circuit):
        value.prune(count=2)
        value.to_html(folder / "used.html")
    elif isinstance(value, tnc.Comparison):
        value.summary(), value.headline()
    elif isinstance(value, tnc.PromptPairs):
        assert value.hash
        [text.encode() for text in value.clean]
    if hasattr(value, "save"):
        value.save(folder / "used")
