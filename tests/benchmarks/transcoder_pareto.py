"""Sparsity against fidelity: transcoders beside SAEs of equal width and equal tokens, and linear maps.

    python -m tests.benchmarks.transcoder_pareto [--model demo-gelu] [--folder docs/images]

On `demo-gelu`: documents from the generator of its own training text. On `stories260K` (`--model PATH`, the folder that
holds it): text sampled from the model itself, at temperature 1. All layers learn from the same forward passes; linear
maps are fitted to the same tokens; everything is measured on other documents. Prints markdown and writes
`pareto_MODEL.png` and `pareto_MODEL.json`. The figure needs chromium.
"""

import argparse
import json
import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import tl_neuron_circuits as tnc
from tests.benchmarks.compare_bases import markdown, write_png
from tests.families import HookedTransformer
from tests.real_models import load_stories260K
from tl_neuron_circuits.demo._models import DEMO_MODELS
from tl_neuron_circuits.demo.train_dictionaries import demo_documents
from tl_neuron_circuits.transcoders import TrainingConfig, pareto
from tl_neuron_circuits.transcoders._pareto import ParetoFront

SIZES = (4, 8, 16, 32)
DEMO = TrainingConfig(
    d_dict=768, steps=250, batch_size=512, learning_rate=4e-3, buffer_size=16384, forward_rows=64, log_every=100
)
STORIES = DEMO.replace(d_dict=512, steps=300, forward_rows=32)


@dataclass(frozen=True)
class Material:
    """A model, what its dictionaries are trained on, and what they are measured on."""

    model: Any
    config: TrainingConfig
    train: list[Tensor]
    held_out: list[Tensor]


def sampled(model: Any, prompts: int, length: int, seed: int) -> Tensor:
    """Tokens `[prompt, length]` that the model writes after its beginning of sequence, at temperature 1."""
    start = torch.full((prompts, 1), int(model.tokenizer.bos_token_id))
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # generate() draws from the global generator
        return model.generate(
            start, max_new_tokens=length - 1, do_sample=True, temperature=1.0, stop_at_eos=False, verbose=False,
            return_type="tokens",
        )  # fmt: skip


def batches_by_length(tokens: Tensor, pad: int, rows: int = DEMO.forward_rows) -> list[Tensor]:
    """Documents of similar length together, cut to the longest, so that little is computed on padding."""
    lengths = (tokens != pad).sum(1)
    order = lengths.argsort(stable=True).split(rows)
    shuffled = torch.randperm(len(order), generator=torch.Generator().manual_seed(0)).tolist()
    return [tokens[order[i], : int(lengths[order[i]].max())] for i in shuffled]


def material_of(name: str, steps: int | None) -> Material:
    """Load the model and its text."""
    if name in DEMO_MODELS:
        model = tnc.load_demo_model(name)
        pad = int(model.tokenizer.pad_token_id)
        config = DEMO.replace(ignore_tokens=(pad,))
        parts = (demo_documents(model, documents, seed) for documents, seed in ((6_000, 201), (600, 202)))
        train, held_out = (batches_by_length(part, pad) for part in parts)
    else:
        model = load_stories260K(Path(name), "TransformerBridge" if HookedTransformer is None else "HookedTransformer")
        model.cfg.model_name = "stories260K"
        config = STORIES
        parts = (sampled(model, prompts, 128, seed) for prompts, seed in ((1024, 201), (160, 202)))
        train, held_out = (list(part.split(config.forward_rows)) for part in parts)
    return Material(model, config if steps is None else config.replace(steps=steps), train, held_out)


def fidelity_table(front: ParetoFront, measure: str) -> pd.DataFrame:
    """A row a layer: the measure of every dictionary (a column a sort and k) and of the linear maps."""
    table = front.to_dataframe()
    rows = []
    for layer in dict.fromkeys(table["layer"]):
        here = table[table["layer"] == layer]
        row: dict[str, Any] = {"layer": layer}
        for target in ("transcoder", "sae"):
            own = here[here["replacement"] == target].set_index("k")[measure]
            row |= {f"{target}, k = {int(k)}": f"{value:.4f}" for k, value in own.items()}
        for name in ("affine", "rank 16"):
            maps = here[(here["replacement"] == name) & (here["target"] == "transcoder")]
            row |= {f"{name} map": f"{maps[measure].item():.4f}"} if len(maps) else {}
        rows.append(row)
    return pd.DataFrame(rows)


def sparsity_table(front: ParetoFront) -> pd.DataFrame:
    """A row a sort and k: the range over layers of L0, FVU and dead share on held-out text."""
    table = front.to_dataframe()
    own = table[table["replacement"].isin(("transcoder", "sae")) & (table["layer"] != "all")]
    rows = []
    for (target, k), group in own.groupby(["target", "k"], sort=False):
        ranges = {name: f"{group[name].min():.3g} to {group[name].max():.3g}" for name in ("l0", "fvu", "dead_share")}
        rows.append({"dictionary": target, "k": int(k), **ranges})
    return pd.DataFrame(rows)


def winners(front: ParetoFront, measure: str, *, higher: bool) -> str:
    """Where SAEs and where transcoders of equal k are better."""
    table = front.to_dataframe()
    own = table[table["replacement"].isin(("transcoder", "sae"))]
    wide = own.pivot_table(index=["layer", "k"], columns="replacement", values=measure, sort=False)
    ahead = wide[(wide["sae"] > wide["transcoder"]) if higher else (wide["sae"] < wide["transcoder"])]
    places = ", ".join(f"layer {layer} k = {int(k)}" for layer, k in ahead.index)
    return f"By {measure} SAEs are ahead in {len(ahead)} of {len(wide)} places: {places or 'none'}."


def narrow(figure: Any) -> Any:
    """The figure for a page's column: short axis titles and the legend below."""
    figure.update_xaxes(title="L0")
    return figure.update_layout(legend={"orientation": "h", "y": -0.2}, margin={"r": 20})


def main() -> None:
    """Train, measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-gelu", help="demo-gelu, demo-swiglu, or the folder of stories260K")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="values of k")
    parser.add_argument("--steps", type=int, help="updates a dictionary")
    parser.add_argument("--folder", type=Path, help="write figure and JSON there")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", "HookedTransformer", DeprecationWarning)
    torch.set_num_threads(1)
    given = material_of(options.model, options.steps)
    begin = time.process_time()
    front = pareto(
        given.model, given.train, given.config, options.sizes, evaluation_tokens=given.held_out, verbose=False
    )
    seconds = time.process_time() - begin
    layers, runs = len(front.dictionaries["sae", float(options.sizes[0])]), 2 * len(options.sizes)
    positions = given.config.steps * given.config.batch_size
    print(
        f"{front!r}: {runs} x {layers} dictionaries of {given.config.d_dict} features, {positions:,} positions each, "
    )
    print(f"{seconds:.0f} CPU s in all, {seconds / runs / layers:.0f} a dictionary, measuring included.\n")
    print(f"{markdown(sparsity_table(front))}\n")
    for measure, title, higher in (
        ("recovered_zero", "Loss recovered against zero ablation", True),
        ("divergence", "KL divergence from the model's own predictions, nats", False),
    ):
        print(f"{title}:\n\n{markdown(fidelity_table(front, measure))}\n\n{winners(front, measure, higher=higher)}\n")
    ablated = front.to_dataframe().query("replacement in ('zero', 'mean')")
    print(f"Ablations:\n\n{markdown(ablated[['layer', 'replacement', 'loss', 'divergence', 'recovered_zero']])}\n")
    if options.folder:
        name = front.model
        options.folder.mkdir(parents=True, exist_ok=True)
        notes = {
            "command": f"python -m tests.benchmarks.transcoder_pareto --model {options.model}",
            "config": given.config.to_json(),
            "training_positions": positions,
            "cpu_seconds": round(seconds),
            "table": json.loads(front.to_dataframe().to_json(orient="records", double_precision=6)),
        }
        (options.folder / f"pareto_{name}.json").write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")
        write_png(narrow(front.plot(measure="divergence")), options.folder / f"pareto_{name}.png", width=1000)


if __name__ == "__main__":
    main()
