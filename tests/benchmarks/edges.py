"""`trace` with all edges: seconds and memory by the number of nodes, against one backward pass a node.

    python tests/benchmarks/edges.py [--layers 12] [--width 768] [--tokens 12] [--nodes 100 300 600] [--threads 2]

The model is random, GPT-2's architecture; a prompt of 12 tokens, target the five likeliest tokens. Reference: the same
edges with a chunk of one target, so one backward pass a node. Each row runs in its own process, so that its peak of
resident memory is its own: the table gives it over that of a process that only runs the model forward and backward.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import tl_neuron_circuits as tnc  # noqa: E402
from tests.families import hooked_transformer, random_tokens  # noqa: E402


def random_model(layers: int, width: int) -> Any:
    shape = {"n_layers": layers, "d_model": width, "n_heads": width // 64, "d_head": 64, "d_mlp": 4 * width}
    model = hooked_transformer("gpt2", dtype=torch.float32, d_vocab=5000, **shape)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.1)
    return model


def one_run(options: argparse.Namespace) -> dict[str, float]:
    """What one process measures: `nodes` 0 is a forward and backward pass alone."""
    torch.set_num_threads(options.threads)
    model = random_model(options.layers, options.width)
    tokens = random_tokens(model, 1, options.tokens)
    with tnc.relp(model):
        model(tokens)[0, -1].max().backward()
    start, cpu, chunk = time.perf_counter(), time.process_time(), 0
    if options.nodes[0]:
        circuit = tnc.trace(model, tokens, nodes=options.nodes[0], max_bytes=options.max_bytes)
        chunk = circuit.settings["chunk"]
    return {
        "wall": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "chunk": chunk,
    }


def in_a_process(options: argparse.Namespace, nodes: int, max_bytes: int) -> dict[str, float]:
    settings = {"layers": options.layers, "width": options.width, "tokens": options.tokens, "threads": options.threads}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--one",
        *words,
        "--nodes",
        str(nodes),
        "--max-bytes",
        str(max_bytes),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("layers", 12), ("width", 768), ("tokens", 12), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 300, 600])
    parser.add_argument("--max-bytes", type=int, default=2**30)
    parser.add_argument("--one", action="store_true", help="measure one row in this process, and print it as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_run(options)))
        return
    base = in_a_process(options, 0, 1)
    print(f"{options.layers} layers, width {options.width}, {options.tokens} tokens, {options.threads} threads")
    print(f"forward and backward alone: peak {base['mib']:.0f} MiB resident")
    print("nodes  max_bytes  chunk   wall s   cpu s  ms/node  peak MiB over that")
    rows = [(nodes, limit) for nodes in options.nodes for limit in (options.max_bytes, 2**26)]
    found = {}
    for nodes, limit in [*rows, (options.nodes[0], 1)]:
        row = found[nodes, limit] = in_a_process(options, nodes, limit)
        each = 1000 * row["cpu"] / nodes
        over = row["mib"] - base["mib"]
        print(
            f"{nodes:5d} {limit:10d} {row['chunk']:6.0f} {row['wall']:8.2f} {row['cpu']:7.2f} {each:8.1f} {over:8.0f}"
        )
    ratio = found[options.nodes[0], options.max_bytes]["cpu"] / found[options.nodes[0], 1]["cpu"]
    print(f"chunked over one backward pass a node, CPU seconds at {options.nodes[0]} nodes: {ratio:.2f}")


if __name__ == "__main__":
    main()
