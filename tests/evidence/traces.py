"""Five prompts on each of three models, traced and steered; and a circuit in which every claim was tested.

    python -m tests.evidence.traces [--models demo-gelu demo-swiglu smollm2] [--walk demo-gelu] [--write]

Traces: a two-hop prompt with its contrast, an agreement, a fact, a passage of 50 tokens, and a chat turn (in the chat
template where the model has one). Each circuit, of the default size, is then ablated, and so are nineteen groups of
matched neurons. Walk: neurons of agreement across a phrase, chosen on some nouns, every number on others. Figures go to
docs/evidence/traces.json; `--write` puts the tables made of them into docs/walk-through.md.
Times are CPU seconds of one thread.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import tl_neuron_circuits as tnc
from tests import smollm2
from tl_neuron_circuits import Circuit, PromptPairs, TokenizedPairs
from tl_neuron_circuits.demo._text import Chance, sentence
from tl_neuron_circuits.interventions._find_nodes import find_nodes
from tl_neuron_circuits.interventions._matched import draw_matched
from tl_neuron_circuits.interventions._steering_prompts import read_prompts
from tl_neuron_circuits.interventions._sweep import bootstrap_interval

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "docs" / "evidence" / "traces.json", ROOT / "docs" / "walk-through.md"
MODELS = ("demo-gelu", "demo-swiglu", "smollm2")
DRAWS = 19
WALKED = {"demo-gelu": (40, 40), "demo-swiglu": (40, 40), "smollm2": (8, 20)}
"""Pairs of the walk that neurons are chosen on, and that claims are tested on."""
PASSAGE = (
    "The history of the city begins in the early Middle Ages, when a small group of fishermen settled on the banks of "
    "the river. Over the following centuries the town grew into an important center of trade, and its merchants became "
    "some of the richest people in the country."
)
TWO_HOP = "The capital of the state containing {} is"
TURN = "Dallas is a city in Texas . The capital of the state containing Dallas is"


def load(name: str) -> Any:
    """A model by its name here."""
    if name != "smollm2":
        return tnc.load_demo_model(name)
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(smollm2.prepare()), device="cpu")


def prompts(model: Any, name: str) -> dict[str, TokenizedPairs]:
    """The five prompts; answers are the model's own next tokens where nothing else is asked for."""
    if name == "smollm2":
        cities, answers = ("Dallas", "Oakland"), (" Austin", " Sacramento")
        agreement, fact = ("The keys to the cabinet", " are", " is"), ("The capital of France is", " Paris")
        passage = PASSAGE
        turn = tnc.tasks.apply_chat_template(
            model, "What is the capital of Italy?", answer_start="The capital of Italy is"
        )
    else:
        cities, answers = ("Dallas", "Cormouth"), (" Austin", " Tallahassee")
        agreement, fact, turn = ("The boys near the girl", " are", " is"), ("The capital of Texas is", " Austin"), TURN
        chance = Chance(11)
        passage = " ".join(sentence(chance) for _ in range(12))
    two_hop = PromptPairs(
        clean=[TWO_HOP.format(city) for city in cities], corrupt=[TWO_HOP.format(city) for city in cities[::-1]],
        answer=list(answers), wrong_answer=list(answers[::-1]),
    )  # fmt: skip
    text, right, wrong = agreement
    return {
        "two-hop, with its contrast": tnc.tasks.tokenize(model, two_hop),
        "agreement": tnc.tasks.tokenize(model, PromptPairs(clean=[text], answer=[right], wrong_answer=[wrong])),
        "fact": tnc.tasks.tokenize(model, PromptPairs(clean=[fact[0]], answer=[fact[1]])),
        "passage of 50 tokens": _continued(model, model.to_tokens(passage)[:, :50]),
        "chat turn": _continued(model, read_prompts(model, turn).tokens[0][None]),
    }


def _continued(model: Any, tokens: Tensor) -> TokenizedPairs:
    with torch.no_grad():
        return TokenizedPairs.from_tokens(tokens, model(tokens)[:, -1].argmax(-1))


def trace_and_steer(model: Any, pairs: TokenizedPairs) -> dict[str, Any]:
    """One row of the table."""
    target, prompt = None, pairs
    if pairs.corrupt is None:  # a single prompt
        prompt = pairs.clean[0]
        answer = int(pairs.answer[0])
        target = answer if pairs.wrong_answer is None else (answer, int(pairs.wrong_answer[0]))
    circuit, traced = timed(lambda: tnc.trace(model, prompt, target))
    groups = {"circuit": circuit}
    swept, steered = timed(lambda: tnc.sweep(model, pairs, groups, scales=(0,), controls=DRAWS))
    effects = swept.effects().set_index("read")
    read = "logit difference" if pairs.wrong_answer is not None else "log p"
    result = swept.results[0]
    probability = result.before.double().softmax(-1)[torch.arange(len(pairs)), pairs.answer.cpu()]
    row = effects.loc[read]
    return {
        "prompt": model.tokenizer.decode(pairs.clean[0].tolist()[-12:]).strip(),
        "tokens": len(pairs.clean[0]), "answer": model.tokenizer.decode([int(pairs.answer[0])]),
        "wrong": None if pairs.wrong_answer is None else model.tokenizer.decode([int(pairs.wrong_answer[0])]),
        "probability": float(probability.mean()), "top": result.top_before[0], "after": result.top_after[0],
        "nodes": len(circuit), "edges": len(circuit.edges), "explained": 1 - circuit.unexplained, "trace_s": traced,
        "read": read, "effect": float(row["mean"]), "control": float(row["control"]),
        "control_low": float(row["control_low"]), "control_high": float(row["control_high"]), "p": float(row["p"]),
        "control_size": float(row["control_size"]), "kl": float(effects.loc["kl", "mean"]),
        "kl_control": float(effects.loc["kl", "control"]), "steer_s": steered,
    }  # fmt: skip


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What the work returns, and its CPU seconds."""
    start = time.process_time()
    return work(), time.process_time() - start


# --- the walk ---


def walk(name: str) -> dict[str, Any]:
    """Agreement across a phrase: a circuit of half of the nouns, and every claim tested on the other half."""
    model = load(name)
    pairs = tnc.tasks.subject_verb_agreement("nounpp", n=96, seed=0, model=model)
    train, test = pairs.split(0.5, by="label")
    train, test = (part[range(n)] for part, n in zip((train, test), WALKED[name], strict=True))
    circuit, seconds = timed(lambda: tnc.trace(model, train, nodes=150))
    groups = groups_of(model, circuit)
    everything = [node for nodes in groups.values() for node in nodes]
    swept = tnc.sweep(model, test, {**groups, "whole circuit": everything}, scales=(0,), controls=DRAWS)
    rest = tnc.sweep(model, test, groups, scales=(0,), complement=everything)
    best = str(circuit.nodes[circuit.nodes["kind"] == "neuron"].sort_values("score").iloc[-1]["node"])
    single = tnc.sweep(model, test, {best: [best]}, scales=(-4, 0), controls=DRAWS)
    text = tnc.steer(model, test.clean[:2], groups["noun, early"] + groups["noun, late"], scale=-1, generate=8)
    return {
        "model": name, "train": len(train), "test": len(test), "trace_s": seconds, "target": circuit.target_value,
        "example": list(pairs.clean[:2]), "answers": list(pairs.answer[:2]), "unexplained": circuit.unexplained,
        "groups": {name: _size(circuit, nodes) for name, nodes in groups.items()},
        "ablated": _records(swept.effects()), "complement": _records(rest.effects()),
        "moved": moved(model, test, {**groups, "whole circuit": everything}, groups),
        "best": best, "single": _records(single.effects()),
        "text": [list(texts) for texts in text.continuations or ()],
    }  # fmt: skip


def groups_of(model: Any, circuit: Circuit) -> dict[str, list[str]]:
    """The circuit's neurons by place, those at the noun in two halves of the layers."""
    nodes = circuit.nodes[circuit.nodes["kind"] == "neuron"]
    last, half = int(nodes["position"].max()), int(model.cfg.n_layers) // 2
    noun, early = nodes["position"] == 2, nodes["layer"] < half
    parts = {
        "noun, early": nodes[noun & early], "noun, late": nodes[noun & ~early],
        "between": nodes[~noun & (nodes["position"] < last)], "last": nodes[nodes["position"] == last],
    }  # fmt: skip
    return {name: list(rows["node"]) for name, rows in parts.items() if len(rows)}


def moved(
    model: Any, pairs: PromptPairs, moves: Mapping[str, list[str]], watch: Mapping[str, list[str]]
) -> dict[str, Any]:  # fmt: skip
    """What becomes of the verb, and of the groups, when nodes take their values from the noun's other number."""
    columns = ["hook", "unit", "position"]
    frames = {name: find_nodes(model, nodes, features=True) for name, nodes in moves.items()}
    drawn = draw_matched(model, read_prompts(model, pairs), frames, DRAWS, 1, 32)
    union = pd.concat([*frames.values(), *(draw.nodes for draws in drawn.values() for draw in draws)])
    union = union[columns].drop_duplicates().reset_index(drop=True)
    places = {tuple(row): place for place, row in enumerate(union.itertuples(index=False))}
    values = tnc.node_values(model, list(pairs.corrupt or []), union)

    def run(nodes: pd.DataFrame, watch: Mapping[str, list[str]] | None = None) -> tnc.SteeringResult:
        own = [places[tuple(row)] for row in nodes[columns].itertuples(index=False)]
        return tnc.steer(model, pairs, nodes[columns], value=values[:, own], watch=watch)

    out = {}
    for name, frame in frames.items():
        result, controls = run(frame, watch), [difference(run(draw.nodes)) for draw in drawn[name]]
        own = difference(result)
        out[name] = own | {
            "groups": {group: float(change.mean()) for group, change in result.watched.items()},
            "control": sum(c["mean"] for c in controls) / len(controls),
            "control_flips": sum(c["flips"] for c in controls) / len(controls),
            "p": (1 + sum(c["mean"] <= own["mean"] for c in controls)) / (1 + len(controls)),
        }
    return out


def difference(result: tnc.SteeringResult) -> dict[str, float]:
    """The logit difference after steering, with its interval over nouns, and how many prompts take the other verb."""
    rows, answers, wrong = range(len(result)), result.settings["answers"], result.settings["wrong_answers"]
    after = result.after[rows, answers] - result.after[rows, wrong]
    before = result.before[rows, answers] - result.before[rows, wrong]
    low, high = bootstrap_interval(after.double(), result.settings["labels"])
    flips = float(((before > 0) & (after < 0)).float().sum() / (before > 0).float().sum())
    return {"before": float(before.mean()), "mean": float(after.mean()), "low": low, "high": high, "flips": flips}


def _size(circuit: Circuit, nodes: list[str]) -> dict[str, float]:
    rows = circuit.nodes[circuit.nodes["node"].isin(nodes)]
    return {"neurons": len(rows), "score": float(rows["score"].sum())}


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return json.loads(frame.to_json(orient="records"))


# --- the page ---


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """Markdown by the name that marks its place on the page."""
    out = {"traces": _traces_table(results)}
    if "walk" in results:
        out |= _walk_tables(results["walk"])
    return out


def _traces_table(results: Mapping[str, Any]) -> str:
    rows = []
    for name in MODELS:
        for kind, row in results.get(name, {}).items():
            unit = "logits" if row["read"] == "logit difference" else "nats"
            target = row["answer"] if row["wrong"] is None else f"{row['answer']} against {row['wrong']}"
            low, high = row["control_low"], row["control_high"]
            rows.append(
                {
                    "model": "SmolLM2" if name == "smollm2" else name, "prompt": kind, "tokens": row["tokens"],
                    "target": f"“{target.strip()}”", "its probability": f"{row['probability']:.2f}",
                    "neurons": row["nodes"], "edges": f"{row['edges']:,}", "explained": f"{row['explained']:.0%}",
                    "ablated": f"{row['effect']:+.2f} {unit}", "matched (95 %)": f"{low:+.2f} to {high:+.2f}",
                    "p": f"{row['p']:.2f}", "size of matched": f"{row['control_size']:.2f}",
                    "trace, s": f"{row['trace_s']:.1f}", "steering, s": f"{row['steer_s']:.1f}",
                }
            )  # fmt: skip
    return _markdown(rows)


def _walk_tables(walk: Mapping[str, Any]) -> dict[str, str]:
    ablated = {(row["steered"], row["read"]): row for row in walk["ablated"]}
    names = list(walk["groups"])
    groups = [{"group": n, "neurons": g["neurons"], "score": f"{g['score']:+.2f}"} for n, g in walk["groups"].items()]
    matrix = [{"ablated": name, **{read: f"{ablated[name, read]['mean']:+.2f}" for read in names}} for name in names]
    output = []
    for name in [*names, "whole circuit"]:
        row = ablated[name, "logit difference"]
        output.append(
            {
                "ablated": name, "logit difference": f"{row['mean']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})",
                "matched": f"{row['control']:+.2f} ({row['control_low']:+.2f} to {row['control_high']:+.2f})",
                "p": f"{row['p']:.2f}", "size of matched": f"{row['control_size']:.2f}",
                "KL, nats": f"{ablated[name, 'kl']['mean']:.3f}",
            }
        )  # fmt: skip
    rest = {(row["steered"], row["read"]): row for row in walk["complement"]}
    others = []
    for name in names:
        row = rest[f"all but {name}", "logit difference"]
        interval = f"{row['mean']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})"
        others.append({"circuit ablated but": name, "logit difference": interval})
    moved = [
        {
            "moved": name, "logit difference after": f"{row['mean']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})",
            "verbs flipped": f"{row['flips']:.0%}", "matched: difference": f"{row['control']:+.2f}",
            "matched: flipped": f"{row['control_flips']:.1%}", "p": f"{row['p']:.2f}",
            **{f"change of {other}": f"{change:+.2f}" for other, change in row["groups"].items()},
        }
        for name, row in walk["moved"].items()
    ]  # fmt: skip
    single = [
        {
            "multiplier": f"{row['scale']:g}",
            "logit difference": f"{row['mean']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})",
            "matched": f"{row['control']:+.2f} ({row['control_low']:+.2f} to {row['control_high']:+.2f})",
            "p": f"{row['p']:.2f}",
        }
        for row in walk["single"] if row["read"] == "logit difference"
    ]  # fmt: skip
    named = {"groups": groups, "matrix": matrix, "output": output, "complement": others, "moved": moved}
    return {name: _markdown(rows) for name, rows in (named | {"single": single}).items()}


def _markdown(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fill(page: str, results: Mapping[str, Any]) -> str:
    """The page with every table between its marks, `<!-- traces: NAME -->` and `<!-- end -->`."""
    for name, table in tables(results).items():
        mark = f"<!-- traces: {name} -->"
        if mark not in page:
            raise ValueError(f"expected {mark} on the page")
        before, _, rest = page.partition(mark)
        page = f"{before}{mark}\n\n{table}\n\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return page


def main() -> None:
    """Measure what is asked for, and write it into the file of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="whose prompts are traced")
    parser.add_argument("--walk", choices=MODELS, help="the model whose circuit is walked through")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models:
        model, rows = load(name), {}
        tnc.check_model(model)  # the first trace on a model checks conservation, which is no part of its time
        for kind, pairs in prompts(model, name).items():
            rows[kind] = trace_and_steer(model, pairs)
            print(name, kind, json.dumps(rows[kind]), flush=True)
        save(name, rows)
    if options.walk:
        save("walk", walk(options.walk))
    if options.write:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


def save(name: str, part: Mapping[str, Any]) -> None:
    """Put one part into the file of results."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results |= {"label": smollm2.LABEL, name: part}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
