"""`estimate_memory` beside the peak of resident memory that `attribute` really reaches.

    export MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=0
    python -m tests.benchmarks.memory_estimate [BACKEND LAYERS WIDTH]

32 prompts of 32 tokens in batches of 16, on a random GPT-2-like model; the environment makes malloc give freed blocks
back. Linux only: the peak is `VmHWM`, reset through /proc/self/clear_refs.
"""

import sys
from pathlib import Path

import torch

import tl_neuron_circuits as tnc
from tests.benchmarks import relp_cost
from tests.benchmarks.rows import random_pairs


def main(backend: str = "HookedTransformer", layers: str = "12", width: str = "768") -> None:
    torch.set_num_threads(1)
    model = relp_cost.model_of(backend, int(layers), int(width))
    pairs = random_pairs(relp_cost.tokens_of(), 32)
    estimated = tnc.estimate_memory(model, pairs, batch_size=16).needed / 2**20
    tnc.attribute(model, pairs, batch_size=16)  # what is loaded and cached on first use
    Path("/proc/self/clear_refs").write_text("5")
    before = relp_cost._status("VmRSS")
    tnc.attribute(model, pairs, batch_size=16)
    peak = (relp_cost._status("VmHWM") - before) / 1024
    print(f"{backend} {layers} x {width}: estimated {estimated:.0f} MiB, peak {peak:.0f} MiB, {estimated / peak:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
