"""Which heads carry edges of SmolLM2-135M-Instruct's circuits: predicted against measured, and the time it takes.

    python -m tests.benchmarks.heads

Two prompts are traced with 300 nodes and their 100 strongest edges split by head. The 20 strongest parts are cut, one
at a time, by path patching; the table has what the part said the target would lose, and what it lost. Nothing is
linearized in the measurement: norms and the target's own activation respond.
"""

import time

import numpy as np
import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

import tl_neuron_circuits as tnc
from tests.smollm2 import LABEL, prepare

PROMPTS = (("The keys to the old wooden cabinet", " are"), ("The capital of France is", " Paris"))


def main() -> None:
    """Print both tables and the times."""
    model = TransformerBridge.boot_transformers(str(prepare()), device="cpu")
    print(LABEL)
    for prompt, target in PROMPTS:
        tnc.trace(model, prompt, target, nodes=20).with_heads(edges=5)  # warm
        begin = time.process_time()
        circuit = tnc.trace(model, prompt, target, nodes=300)
        traced = time.process_time()
        circuit = circuit.with_heads(edges=100)
        split = time.process_time()
        tested = circuit.cut_heads()
        into_logits = tested["target"].str.startswith("logit")
        slope = np.polyfit(tested["predicted"], tested["measured"], 1)[0]
        print(f"\n{prompt!r} -> {target!r}: trace {traced - begin:.2f} CPU s, heads of 100 edges {split - traced:.2f}")
        with pd.option_context("display.width", 150):
            columns = ["source", "target", "layer", "head", "from_position", "predicted", "measured"]
            print(tested[columns].round(3).to_string(index=False))
        print(f"correlation {tested['predicted'].corr(tested['measured']):.3f}, slope {slope:.2f}")
        for name, own in (("logits", tested[into_logits]), ("neurons", tested[~into_logits])):
            if len(own):
                error = (own["measured"] - own["predicted"]).abs().sum() / own["predicted"].abs().sum()
                print(f"into {name} ({len(own)}): |measured - predicted| is {error:.0%} of |predicted|")


if __name__ == "__main__":
    main()
