"""The numbers of the demo models: measured, saved as `metrics.json`, and written as model cards and documentation."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from . import _evaluation as evaluation
from . import _states as states

SWAPS = 400
_ALL = "all but the last"


@dataclass(frozen=True)
class HiddenStep:
    """Shares of state swaps, in one phrasing, that put the donor's answer on top; keyed by layer ("all") and place."""

    phrasing: str
    by_place: dict[str, dict[str, float]]
    by_share_of_neurons: dict[str, float]


def places(tokens: list[str]) -> dict[str, list[int]]:
    """Positions of a two-hop prompt by what stands there."""
    second = next(i for i, token in enumerate(tokens) if token.startswith("##"))
    last = len(tokens) - 1
    named = {
        "before the town": list(range(second - 1)),
        "first piece": [second - 1],
        "second piece": [second],
        "between town and last": list(range(second + 1, last)),
        _ALL: list(range(last)),
    }
    return {place: positions for place, positions in named.items() if positions}


def hidden_step(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, phrasing: int, n: int) -> HiddenStep:
    """Patch the neurons of one layer or all, at one place or all but the last, and count the swaps that succeed."""
    swaps = evaluation.state_swaps(n, phrasing)
    ids = evaluation.encode(tokenizer, [swaps[0].recipient])[0]
    tokens = [str(tokenizer.convert_ids_to_tokens(int(i))) for i in ids]
    layers = evaluation.down_projections(model)
    width = sum(p.numel() for n, p in layers[0].named_parameters() if n == "weight") // model.config.hidden_size
    nothing = torch.zeros(len(layers), len(ids), width, dtype=torch.bool)
    table: dict[str, dict[str, float]] = {}
    for layer in (*range(len(layers)), "all"):
        for place, positions in places(tokens).items():
            where = nothing.clone()
            where[slice(None) if layer == "all" else layer, positions] = True
            share = float(evaluation.swap_success(model, tokenizer, swaps, where).mean())
            table.setdefault(str(layer), {})[place] = round(share, 4)
    scores = evaluation.neuron_scores(model, tokenizer, evaluation.state_swaps(256, phrasing, seed=1))
    shares = {}
    for share in (0.05, 0.1, 0.2):
        chosen = torch.zeros(scores.numel(), dtype=torch.bool)
        chosen[scores.flatten().topk(int(share * scores.numel())).indices] = True
        where = nothing | chosen.view(scores.shape)[:, None]
        where[:, -1] = False
        shares[f"{share:.0%}"] = round(float(evaluation.swap_success(model, tokenizer, swaps, where).mean()), 4)
    return HiddenStep(states.TWO_HOP_PHRASINGS[phrasing], table, shares)


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Every number of a model's card."""
    accuracies = {}
    for task, questions in evaluation.TASKS.items():
        asked = list(questions())
        share = evaluation.accuracy(model, tokenizer, asked)
        accuracies[task] = {"accuracy": round(share, 4), "prompts": len(asked)}
    steps = [hidden_step(model, tokenizer, phrasing, SWAPS) for phrasing in range(len(states.TWO_HOP_PHRASINGS))]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tasks": accuracies,
        "greater_than": round(evaluation.greater_than(model, tokenizer), 4),
        "hidden_step": [vars(step) for step in steps],
        "swaps": SWAPS,
    }


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def results_markdown(metrics: dict[str, Any]) -> str:
    """The tables of one model."""
    tasks = [[task, f"{v['accuracy']:.3f}", str(v["prompts"])] for task, v in metrics["tasks"].items()]
    tasks.append(["greater-than (probability difference)", f"{metrics['greater_than']:.3f}", ""])
    parts = [_table(["task", "accuracy", "prompts"], tasks)]
    for step in metrics["hidden_step"]:
        where = list(step["by_place"]["all"])
        rows = [[layer, *(f"{row[p]:.2f}" for p in where)] for layer, row in step["by_place"].items()]
        few = ", ".join(f"{share} of them {value:.2f}" for share, value in step["by_share_of_neurons"].items())
        prompt = step["phrasing"].format(attribute="capital", city="Dallas")
        parts.append(f"Hidden step, “{prompt}”:\n\n{_table(['layer', *where], rows)}")
        parts.append(f"With few neurons (all layers, all positions but the last): {few}.")
    return "\n\n".join(parts)


_EXPLANATION = """Held out means never in the training text:

- agreement: ordered pairs of subject and attractor nouns, one in ten ("simple" has one noun: nothing is held out);
  right is the verb's right number above its wrong number;
- two-hop: (town, attribute) combinations in any two-hop phrasing, 400 of 2,400, every state with every attribute; the
  answer must be the top token of the whole vocabulary, in all three phrasings;
- IOI: unordered pairs of names, one in ten; the answer must be the top token;
- greater-than: (event, century, start year) triples, one in ten; the number is the mean probability of the later
  years minus that of the others;
- "town to state" and "one-hop facts" are facts as such and are in the training text.

Hidden step: the MLP neurons of a recipient two-hop prompt are replaced by those of a donor prompt about another state
that asks for another attribute, never at the last position; both are held-out combinations. The number is the share of
{swaps} random pairs for which the recipient's attribute of the donor's state becomes the top token. "Few neurons" takes
the neurons with the largest mean |change x gradient|, summed over positions, on 256 other pairs.

The hidden step was put there on purpose: it is a known truth to test methods against, not a discovery. Next-token
prediction alone (600 steps, two kinds of text) gave GPT-2-like models as accurate that passed this test on 0.07 and
0.35 of the pairs, since they worked out the state at the last position. So training has, beside the text, a
counterfactual loss on two-hop prompts (interchange intervention training, Geiger et al. 2022, arXiv 2112.00826):
the MLP neurons of all layers, or of layer 0 alone, at every position but the last come from another two-hop prompt,
and the recipient's attribute of the donor's state is the target. Held-out combinations are never a target there
either."""


def write_card(folder: Path, name: str, metrics: dict[str, Any], recipe: dict[str, Any]) -> None:
    """Write `metrics.json` and the model card `README.md`."""
    content = {"name": name, "recipe": recipe, **metrics}
    (folder / "metrics.json").write_text(json.dumps(content, indent=2) + "\n")
    settings = ", ".join(f"{key} {value}" for key, value in recipe.items())
    card = f"""---
license: mit
library_name: transformers
---

# {name}

A small language model ({metrics["parameters"]:,} parameters) for trying out neuron circuits. It knows only the
synthetic English of `tl_neuron_circuits.models`: number agreement, facts about the 50 US states in one and two hops
(towns are invented, but for Dallas), who gives what to whom, and years. Of no use as a language model.

    tnc.load_demo_model("{name}")

Trained by `python -m tl_neuron_circuits.demo.train_models --name {name}` ({settings}); measured by the same with
`--evaluate-only`.

{results_markdown(metrics)}

{_EXPLANATION.format(swaps=metrics["swaps"])}
"""
    (folder / "README.md").write_text(card)


def documentation(all_metrics: dict[str, dict[str, Any]]) -> str:
    """The page `docs/demo_models.md`."""
    parts = [
        "# The demo models",
        "Two small models come with the package, so that everything can be tried offline: `demo-gelu` (GPT-2-like) and "
        "`demo-swiglu` (Llama-like).\nThis page is written by\n\n"
        "    python -m tl_neuron_circuits.demo.train_models --evaluate-only --documentation docs/demo_models.md",
    ]
    for name, metrics in all_metrics.items():
        parts.append(f"## {name}\n\n{metrics['parameters']:,} parameters.\n\n{results_markdown(metrics)}")
    parts.append("## What the numbers mean\n\n" + _EXPLANATION.format(swaps=SWAPS))
    return "\n\n".join(parts) + "\n"
