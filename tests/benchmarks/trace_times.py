"""`trace` with transcoder features beside circuit-tracer's `attribute`: CPU seconds by the number of nodes.

    python -m venv CT && CT/bin/pip install circuit-tracer==0.5.0
    python -m tests.benchmarks.trace_times --tracer CT/bin/python [--nodes 200 500 1000 2000] [--rounds 2]

A random GPT-2 with random ReLU transcoders, about one feature in twenty active; the same weights, tokens, five logits
and number of features on both sides, one thread, each in processes of its own that take turns. Also the graph's two
scores and its pruning at circuit-tracer's thresholds. circuit-tracer runs with its default batch of 512 and with 64,
whichever is faster; ours with its defaults. CPU seconds, the least of the rounds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

TOKENS, D_VOCAB = 12, 500


def make(folder: Path, layers: int, width: int, features: int) -> None:
    """Write config, weights and transcoders that both sides read."""
    from safetensors.torch import save_file
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    shape: dict[str, Any] = {"n_layers": layers, "d_model": width, "n_heads": width // 32, "d_head": 32}
    shape |= {"d_mlp": 4 * width, "d_vocab": D_VOCAB, "n_ctx": 32, "act_fn": "gelu_new", "normalization_type": "LN"}
    generator = torch.Generator().manual_seed(0)
    model = HookedTransformer(HookedTransformerConfig(**shape, seed=0, device="cpu"))
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    for layer in range(layers):
        draw = torch.randn(2, features, width, generator=generator) / width**0.5
        tensors |= {f"transcoder.{layer}.W_enc": draw[0].clone(), f"transcoder.{layer}.W_dec": draw[1].clone() / 4}
        tensors[f"transcoder.{layer}.b_enc"] = torch.full((features,), -1.7)
        tensors[f"transcoder.{layer}.b_dec"] = torch.zeros(width)
    tensors["tokens"] = torch.randint(D_VOCAB, (1, TOKENS), generator=generator)
    save_file(tensors, folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps(shape))


def read(folder: Path, model_class: Any) -> tuple[Any, list[dict[str, torch.Tensor]], torch.Tensor]:
    """A model of this class, the tensors of its transcoders, and the tokens."""
    from safetensors.torch import load_file
    from transformer_lens import HookedTransformerConfig

    tensors = load_file(folder / "weights.safetensors")
    config = json.loads((folder / "config.json").read_text())
    model = model_class(HookedTransformerConfig(**config, device="cpu"))
    buffers = ("tokens", "mask", "IGNORE")
    own = {n: t for n, t in tensors.items() if not n.startswith("transcoder.") and not n.endswith(buffers)}
    model.load_state_dict(own, strict=False)
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    layers = [{n: tensors[f"transcoder.{layer}.{n}"] for n in names} for layer in range(config["n_layers"])]
    return model.eval(), layers, tensors["tokens"]


def seconds(work: Any) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def ours(folder: Path, nodes: list[int], rounds: int) -> dict[str, Any]:
    from transformer_lens import HookedTransformer

    import tl_neuron_circuits as tnc

    model, layers, tokens = read(folder, HookedTransformer)
    dictionaries = [
        tnc.bases.Dictionary(
            "transcoder", hook_in=f"blocks.{layer}.ln2.hook_normalized", hook_out=f"blocks.{layer}.hook_mlp_out",
            **(tensors | {"W_enc": tensors["W_enc"].T.contiguous()}),
        )
        for layer, tensors in enumerate(layers)
    ]  # fmt: skip
    basis = tnc.bases.Dictionaries(dictionaries)
    tnc.trace(model, tokens, basis=basis, nodes=20)
    found: dict[str, Any] = {"trace": {}}
    for n in nodes:
        took = [seconds(lambda n=n: tnc.trace(model, tokens, basis=basis, nodes=n)) for _ in range(rounds)]
        circuit = took[-1][1]
        found["trace"][n] = min(t for t, _ in took)
        found["edges"] = len(circuit.edges)
    found["scores"] = min(seconds(lambda: circuit.graph_scores(zero_positions=[0]))[0] for _ in range(rounds))
    prune = lambda: circuit.prune(node_influence=0.8, edge_influence=0.98, zero_positions=[0])  # noqa: E731
    found["prune"] = min(seconds(prune)[0] for _ in range(rounds))
    return found


def theirs(folder: Path, nodes: list[int], rounds: int) -> dict[str, Any]:
    from circuit_tracer.attribution.attribute import attribute  # pyright: ignore[reportMissingImports]
    from circuit_tracer.graph import compute_graph_scores, prune_graph  # pyright: ignore[reportMissingImports]
    from circuit_tracer.replacement_model.replacement_model_transformerlens import (  # pyright: ignore[reportMissingImports]
        TransformerLensReplacementModel,
    )
    from circuit_tracer.transcoder.single_layer_transcoder import (  # pyright: ignore[reportMissingImports]
        SingleLayerTranscoder,
        TranscoderSet,
    )

    model, layers, tokens = read(folder, TransformerLensReplacementModel)
    made = {}
    for layer, tensors in enumerate(layers):
        features, width = tensors["W_enc"].shape
        made[layer] = SingleLayerTranscoder(width, features, torch.relu, layer)
        made[layer].load_state_dict(tensors)
    hooks = {"feature_input_hook": "ln2.hook_normalized", "feature_output_hook": "hook_mlp_out"}
    model.tokenizer = SimpleNamespace(
        decode=str, all_special_ids=[int(tokens[0, 0])], padding_side="right", vocab_size=D_VOCAB
    )
    model._configure_replacement_model(TranscoderSet(made, **hooks))
    given: dict[str, Any] = {"max_n_logits": 5, "desired_logit_prob": 1.0}
    attribute(tokens[0], model, max_feature_nodes=20, **given)
    found: dict[str, Any] = {"trace": {}}
    for n in nodes:
        took = []
        for batch in [512, 64] * rounds:
            run = lambda n=n, batch=batch: attribute(  # noqa: E731
                tokens[0], model, max_feature_nodes=n, batch_size=batch, **given
            )
            took.append(seconds(run))
        graph = took[-1][1]
        found["trace"][n] = min(t for t, _ in took)
        found["active"] = len(graph.active_features)
    found["scores"] = min(seconds(lambda: compute_graph_scores(graph))[0] for _ in range(rounds))
    found["prune"] = min(seconds(lambda: prune_graph(graph, 0.8, 0.98))[0] for _ in range(rounds))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tracer", help="the Python of an environment with circuit-tracer")
    parser.add_argument("--nodes", type=int, nargs="+", default=[200, 500, 1000, 2000])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "FOLDER"))
    options = parser.parse_args()
    if options.child:
        torch.set_num_threads(1)
        side = {"ours": ours, "theirs": theirs}[options.child[0]]
        print(json.dumps(side(Path(options.child[1]), options.nodes, options.rounds)))
        return
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), options.layers, options.width, options.features)
        numbers = [str(n) for n in options.nodes]
        found = {}
        for side, python in (("ours", sys.executable), ("theirs", options.tracer)):
            command = [python, "-W", "ignore", __file__, "--child", side, name, "--rounds", str(options.rounds)]
            done = subprocess.run([*command, "--nodes", *numbers], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            found[side] = json.loads(done.stdout.splitlines()[-1])
    mine, reference = found["ours"], found["theirs"]
    print(f"{options.layers} layers of {options.width}, {TOKENS} tokens, {reference['active']} active features")
    print("| nodes | trace, CPU s | circuit-tracer, CPU s | ratio |\n| --- | --- | --- | --- |")
    for n in numbers:
        a, b = mine["trace"][n], reference["trace"][n]
        print(f"| {int(n):,} | {a:.2f} | {b:.2f} | {a / b:.2f} |")
    for what in ("scores", "prune"):
        a, b = mine[what], reference[what]
        print(f"| {what} at {options.nodes[-1]:,} | {a:.2f} | {b:.2f} | {a / b:.2f} |")


if __name__ == "__main__":
    main()
