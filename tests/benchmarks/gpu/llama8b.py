"""RelP attribution, `trace` and a sparsity curve on Llama-3.1-8B's exact shape, with random bfloat16 weights, on a GPU.

    python -m tests.benchmarks.gpu.llama8b [--pairs 64] [--tokens 32] [--batch-size auto] [--nodes 300]
    python -m tests.benchmarks.gpu.llama8b --tiny      the same on the CPU with a small model: does it run?

Prints a row a step: seconds and peak memory, of which the weights take 16.1 GB. No weights are downloaded: times and
memory do not depend on them. Without CUDA it says so and ends with exit code 0.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tl_neuron_circuits as tnc
from tests.families import build_bridge_from_module
from tl_neuron_circuits.tasks import TokenizedPairs

LLAMA_3_1_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 200,
    "max_position_embeddings": 64,
}


def model_of(settings: dict[str, Any], device: str) -> Any:
    """The Bridge on a random model, made on its device."""
    config = LlamaConfig(**settings, bos_token_id=0, eos_token_id=1)
    config._attn_implementation = "eager"
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            source = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return build_bridge_from_module(source.eval(), "LlamaForCausalLM", hf_config=config).eval()


def pairs_of(model: Any, n: int, length: int, device: str) -> TokenizedPairs:
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = (torch.randint(2, model.cfg.d_vocab, (n, length), generator=generator) for _ in range(2))
    answer, wrong = (torch.randint(2, model.cfg.d_vocab, (n,), generator=generator) for _ in range(2))
    return TokenizedPairs.from_tokens(clean.to(device), answer.to(device), corrupt.to(device), wrong.to(device))


def measured(name: str, device: str, work: Callable[[], Any]) -> Any:
    """Do the work once; print its seconds and peak memory."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if device == "cuda" else "not measured"
    print(f"| {name} | {seconds:.2f} | {peak} |", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batch-size", default="auto")
    parser.add_argument("--nodes", type=int, default=300)
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        print("skipped: no CUDA device here; --tiny runs the same steps on the CPU")
        return
    device = "cpu" if options.tiny else "cuda"
    if options.tiny:
        options.pairs, options.tokens, options.nodes = 8, 8, 30
    size = options.batch_size if options.batch_size == "auto" else int(options.batch_size)
    where = "CPU, tiny" if options.tiny else torch.cuda.get_device_name()
    print(f"{where}, torch {torch.__version__}, {options.pairs} pairs of {options.tokens} tokens, bfloat16\n")
    print("| step | seconds | peak memory |\n|---|---|---|")
    model = measured("build the model", device, lambda: model_of(TINY if options.tiny else LLAMA_3_1_8B, device))
    pairs = pairs_of(model, options.pairs, options.tokens, device)
    print(f"| {tnc.estimate_memory(model, pairs, batch_size=8)!r} | | |")
    one = pairs_of(model, 1, options.tokens, device)
    measured("a forward of one prompt (warm-up)", device, lambda: model(one.clean[0][None]))
    scores = measured("attribute, RelP, all pairs", device, lambda: tnc.attribute(model, pairs, batch_size=size))
    print(f"| {len(scores):,} nodes; batch_size used: {scores.settings['batch_size']} | | |")
    trace = lambda: tnc.trace(model, one.clean[0], nodes=options.nodes)  # noqa: E731
    circuit = measured(f"trace, {options.nodes} nodes and all edges", device, trace)
    print(f"| {len(circuit.edges):,} edges | | |")
    batch = min(scores.settings["batch_size"], options.pairs)
    curve = lambda: tnc.evaluate(model, pairs, scores, batch_size=batch)  # noqa: E731
    measured("evaluate, 20 sizes with completeness", device, curve)


if __name__ == "__main__":
    main()
