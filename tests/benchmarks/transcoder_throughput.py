"""Cost of collecting activations and of training transcoders, against plain forward passes of the same model.

Run: `python -m tests.benchmarks.transcoder_throughput`. CPU time of this process, the best of several alternating
rounds, so that other processes on the machine matter little.
"""

import time
from collections.abc import Callable

import torch

from tl_neuron_circuits.demo import load_demo_model
from tl_neuron_circuits.demo.train_dictionaries import CONFIG, demo_documents
from tl_neuron_circuits.transcoders import train
from tl_neuron_circuits.transcoders._buffer import flat_values

ROUNDS, STEPS = 5, 40


def cpu_seconds(function: Callable[[], object]) -> float:
    """CPU time of one call."""
    begin = time.process_time()
    function()
    return time.process_time() - begin


def main() -> None:
    """Print the ratios."""
    torch.set_num_threads(1)
    model = load_demo_model()
    pad = int(model.tokenizer.pad_token_id)
    tokens = demo_documents(model, 2048, seed=1)
    batch = tokens[:64]
    hooks = [
        f"blocks.{n}.{name}" for n in range(model.cfg.n_layers) for name in ("ln2.hook_normalized", "hook_mlp_out")
    ]

    def forward() -> None:
        with torch.no_grad():
            for _ in range(10):
                model(batch)

    def collect() -> None:
        for _ in range(10):
            flat_values(model, batch, hooks, (pad,), torch.float32)

    forward()
    rounds = [(cpu_seconds(forward), cpu_seconds(collect)) for _ in range(ROUNDS)]
    plain, collected = (min(column) for column in zip(*rounds, strict=True))
    print(f"collecting {len(hooks)} hook points / plain forward: {collected / plain:.2f}")
    per_position = plain / 10 / int((batch != pad).sum())
    config = CONFIG.replace(ignore_tokens=(pad,), steps=STEPS, log_every=STEPS)
    for name, size in (("with the shuffle buffer", 4 * config.batch_size), ("without it", 0)):
        settings = config.replace(buffer_size=size)
        seconds = min(cpu_seconds(lambda s=settings: train(model, tokens, s, verbose=False)) for _ in range(2))
        positions = STEPS * config.batch_size
        print(
            f"training {model.cfg.n_layers} layers {name}: {positions / seconds:,.0f} positions/s, "
            f"{seconds / positions / per_position:.1f} x a plain forward over as many positions"
        )


if __name__ == "__main__":
    main()
