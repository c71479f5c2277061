"""What RelP costs, beside references measured in the same run.

    python -m tests.benchmarks.relp_cost [--rounds 7] [--layers 12] [--width 768]

A random 12-layer 768-wide GPT-2-like model, 8 prompts of 32 tokens, frozen parameters, float32, one thread unless told.

- time: RelP (all four rules, checks included; entering and leaving the context too) over plain forward + backward
  (`autograd.grad` of the same metric on the same tensors: the neurons of all layers), alternating, medians after a
  warm-up; and integrated gradients with 10 steps a layer over RelP, through `attribute`'s own code paths.
- memory: peak resident memory above the model's, each in a process of its own (`VmHWM` of /proc/self/status, reset
  through /proc/self/clear_refs after the model is built; malloc told to give freed blocks back). tracemalloc does not
  see torch's memory, and torch's profiler counts what the allocator hands out but not what it keeps; resident memory
  is what a user's machine must have.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.families import HookedTransformer, HookedTransformerConfig, build_bridge_from_module
from tl_neuron_circuits.nodes import attribute
from tl_neuron_circuits.propagation import relp
from tl_neuron_circuits.tasks import TokenizedPairs

BATCH, POS, D_VOCAB, GPT2_VOCAB = 8, 32, 1000, 50257


def model_of(backend: str, layers: int, width: int, d_vocab: int = D_VOCAB) -> Any:
    """Build the random model with frozen parameters."""
    heads = width // 64
    if backend == "HookedTransformer":
        shape = {"n_layers": layers, "d_model": width, "n_heads": heads, "d_head": 64, "d_mlp": 4 * width}
        config = HookedTransformerConfig(
            **shape, d_vocab=d_vocab, n_ctx=64, act_fn="gelu_new", normalization_type="LN", device="cpu", seed=0
        )
        model = HookedTransformer(config)
    else:
        from transformers import GPT2Config, GPT2LMHeadModel

        settings = {"n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": d_vocab, "n_positions": 64}
        config = GPT2Config(**settings, bos_token_id=0, eos_token_id=1)
        config._attn_implementation = "eager"
        model = build_bridge_from_module(GPT2LMHeadModel(config), "GPT2LMHeadModel", hf_config=config)
    for parameter in torch.nn.Module.parameters(model):
        parameter.requires_grad_(False)
    return model.eval()


def tokens_of() -> Tensor:
    return torch.randint(0, D_VOCAB, (BATCH, POS), generator=torch.Generator().manual_seed(0))


def gradients(model: Any, tokens: Tensor, *, leaf: bool) -> None:
    """Gradients of a logit difference at every layer's neurons; `leaf` starts the graph where parameters are frozen."""
    store: list[Tensor] = []
    posts = [f"blocks.{layer}.mlp.hook_post" for layer in range(model.cfg.n_layers)]
    hooks: list[Any] = [(name, lambda value, hook: store.append(value)) for name in posts]
    if leaf:
        hooks.append(("hook_embed", lambda value, hook: value.requires_grad_(True)))
    with model.hooks(fwd_hooks=hooks):
        logits = model(tokens)
    torch.autograd.grad((logits[:, -1, 3] - logits[:, -1, 5]).sum(), store)


def plain(model: Any, tokens: Tensor) -> None:
    gradients(model, tokens, leaf=True)


def propagated(model: Any, tokens: Tensor) -> None:
    with relp(model):
        gradients(model, tokens, leaf=False)


def alternating(runs: dict[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """CPU seconds of every run, one after the other, round by round: a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + warm_up):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if number >= warm_up:
                times[name].append(time.process_time() - start)
    return times


def measure_time(backend: str, arguments: argparse.Namespace) -> dict[str, float]:
    model, tokens = model_of(backend, arguments.layers, arguments.width, arguments.vocabulary), tokens_of()
    forward = lambda: model(tokens)  # noqa: E731
    runs = {"forward": forward, "plain": lambda: plain(model, tokens), "relp": lambda: propagated(model, tokens)}
    seconds = alternating(runs, arguments.rounds)
    ratios = [a / b for a, b in zip(seconds["relp"], seconds["plain"], strict=True)]
    pairs = TokenizedPairs.from_tokens(tokens, tokens[:, 0], tokens.flip(0), tokens[:, 1])
    methods = {
        "attribute_relp": lambda: attribute(model, pairs),
        "attribute_inputs": lambda: attribute(model, pairs, method="integrated_gradients_inputs(steps=10)"),
        "attribute_ig": lambda: attribute(model, pairs, method="integrated_gradients(steps=10)"),
    }
    whole = (
        alternating(methods, arguments.ig_rounds, warm_up=0)
        if arguments.ig_rounds
        else {name: [0.0] for name in methods}
    )
    out = {name: statistics.median(values) for name, values in (seconds | whole).items()}
    return out | {"ratio": statistics.median(ratios)}


def peak_memory(backend: str, what: str, arguments: argparse.Namespace) -> float:
    """Megabytes of resident memory above the model's, in this process; plain and relp as in `measure_time`."""
    model, tokens = model_of(backend, arguments.layers, arguments.width, arguments.vocabulary), tokens_of()
    model(tokens[:1, :2])  # libraries that are loaded on first use
    {"plain": plain, "relp": propagated}[what](model, tokens[:1, :2])
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    {"plain": plain, "relp": propagated}[what](model, tokens)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def main() -> None:
    """Print one table a model class."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ig-rounds", type=int, default=1, help="rounds of RelP and IG-10 through attribute; 0: none")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=D_VOCAB, help=f"GPT-2's is {GPT2_VOCAB}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", help="only this model class")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        print(json.dumps(peak_memory(*arguments.child, arguments)))
        return
    built = {"HookedTransformer": HookedTransformer, "TransformerBridge": build_bridge_from_module}
    for backend in [name for name, there in built.items() if there is not None and arguments.backend in (None, name)]:
        seconds = measure_time(backend, arguments)
        memory = {what: _in_child(backend, what) for what in ("plain", "relp")}
        print(f"\n{backend}, {arguments.layers} layers, {arguments.width} wide, {BATCH} x {POS} tokens")
        print("| | CPU seconds | peak memory above the model, MB |\n|---|---|---|")
        print(f"| forward | {seconds['forward']:.2f} | |")
        for name, title in (("plain", "forward + backward"), ("relp", "RelP, four rules, checks included")):
            print(f"| {title} | {seconds[name]:.2f} | {memory[name]:.0f} |")
        print(f"| RelP / (forward + backward) | {seconds['ratio']:.2f} | {memory['relp'] / memory['plain']:.2f} |")
        if arguments.ig_rounds:
            relp_seconds = seconds["attribute_relp"]
            print(f"| attribute, RelP (its corrupt run included) | {relp_seconds:.2f} | |")
            for name, title in (("attribute_ig", "IG-10, layer by layer"), ("attribute_inputs", "IG-10 over inputs")):
                print(f"| attribute, {title} | {seconds[name]:.1f} | |")
                print(f"| {title} / RelP | {seconds[name] / relp_seconds:.1f} | |")
        sys.stdout.flush()


def _in_child(backend: str, what: str) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.relp_cost", *sys.argv[1:], "--child", backend, what]
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # freed blocks leave resident memory
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **exact})
    return float(done.stdout)


if __name__ == "__main__":
    main()
