"""Five prompts on each of three models, traced and steered; and a circuit in which every claim was tested.

    python -m tests.evidence.traces [--models demo-gelu demo-swiglu smollm2] [--walk smollm2|none] [--write]

Traces: a two-hop prompt and an agreement with their contrasts, a fact, a passage of 50 tokens, and a chat turn (in the
chat template where the model has one). Each circuit, of the default size, is then ablated, and so are nineteen groups
of matched neurons. Walk: neurons of agreement across a phrase, chosen on some nouns, every number on others; groups of
them are set to zero, or to their values on the sentence with the noun's other number. Figures go to
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
from tl_neuron_circuits.interventions._steering_prompts import read_prompts
from tl_neuron_circuits.interventions._sweep import SteeringSweep

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "docs" / "evidence" / "traces.json", ROOT / "docs" / "walk-through.md"
MODELS = ("demo-gelu", "demo-swiglu", "smollm2")
DRAWS = 19
WALKED = (48, 24)
"""Pairs of the walk that neurons are chosen on, and that claims are tested on."""
FIRST, FEW = "noun, early", (1, 3, 10, 30)
"""The group of the walk of which ever fewer neurons are moved."""
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
        agreement = PromptPairs(
            clean=["The pictures on the wall"], corrupt=["The picture on the wall"],
            answer=[" are"], wrong_answer=[" is"],
        )  # fmt: skip
        fact = ("The capital of France is", " Paris")
        passage = PASSAGE
        turn = tnc.tasks.apply_chat_template(
            model, "What is the capital of Italy?", answer_start="The capital of Italy is"
        )
    else:
        cities, answers = ("Dallas", "Cormouth"), (" Austin", " Tallahassee")
        agreement = PromptPairs(
            clean=["The boys near the girl"], corrupt=["The boy near the girl"], answer=[" are"], wrong_answer=[" is"]
        )
        fact, turn = ("The capital of Texas is", " Austin"), TURN
        chance = Chance(11)
        passage = " ".join(sentence(chance) for _ in range(12))
    two_hop = PromptPairs(
        clean=[TWO_HOP.format(city) for city in cities], corrupt=[TWO_HOP.format(city) for city in cities[::-1]],
        answer=list(answers), wrong_answer=list(answers[::-1]),
    )  # fmt: skip
    return {
        "two-hop, with its contrast": tnc.tasks.tokenize(model, two_hop),
        "agreement, with its contrast": tnc.tasks.tokenize(model, agreement),
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
    """Agreement across a phrase: a circuit of some nouns, and every claim tested on others."""
    model = load(name)
    pairs, train, test = walk_pairs(model)
    circuit, seconds = timed(lambda: tnc.trace(model, train, nodes=150))
    groups = groups_of(model, circuit)
    everything = [node for nodes in groups.values() for node in nodes]
    donors = list(test.corrupt or [])
    moves = {**groups, "whole circuit": everything}
    proof = tnc.sweep(model, test, moves, scales=(0,), donor=donors, controls=DRAWS)
    rest = tnc.sweep(model, test, groups, scales=(0,), donor=donors, complement=everything)
    first = circuit.nodes[circuit.nodes["node"].isin(groups[FIRST])].sort_values("score", key=abs, ascending=False)
    sizes = {f"strongest {k}": list(first["node"][:k]) for k in FEW}
    few = tnc.sweep(model, test, sizes, scales=(), donor=donors, controls=DRAWS)
    before = differences(proof.results[0])[0]
    return {
        "model": name, "train": len(train), "test": len(test), "trace_s": seconds, "target": circuit.target_value,
        "examples": [list(pair) for pair in zip(test.clean, test.corrupt or (), test.answer, strict=False)][:4],
        "kept": pairs.selection.share if pairs.selection else 1.0,
        "nouns": [len(set(part.labels or ())) for part in (train, test)], "before": float(before.mean()),
        "unexplained": circuit.unexplained, "strongest": list(first["node"][: max(FEW)]),
        "groups": {name: _size(circuit, nodes) for name, nodes in groups.items()},
        "proof": _records(proof.effects()), "rest": _records(rest.effects()), "few": _records(few.effects()),
        "flips": flips(proof) | flips(rest) | flips(few),
    }  # fmt: skip


def walk_pairs(model: Any) -> tuple[PromptPairs, PromptPairs, PromptPairs]:
    """All pairs of the walk, and those to choose neurons on and to test claims on."""
    pairs = tnc.tasks.subject_verb_agreement("nounpp", n=192, seed=0, model=model).where_model_is_right(model)
    train, test = (part[range(n)] for part, n in zip(pairs.split(0.5, by="label"), WALKED, strict=True))
    return pairs, train, test


def groups_of(model: Any, circuit: Circuit) -> dict[str, list[str]]:
    """The circuit's neurons by place, those at the noun and at the last word in two halves of the layers."""
    nodes = circuit.nodes[circuit.nodes["kind"] == "neuron"]
    last, half = int(nodes["position"].max()), int(model.cfg.n_layers) // 2
    noun, end, early = nodes["position"] == 2, nodes["position"] == last, nodes["layer"] < half
    parts = {
        "noun, early": nodes[noun & early], "noun, late": nodes[noun & ~early],
        "between": nodes[~noun & ~end], "last, early": nodes[end & early], "last, late": nodes[end & ~early],
    }  # fmt: skip
    return {name: list(rows["node"]) for name, rows in parts.items() if len(rows)}


def differences(result: tnc.SteeringResult) -> tuple[Tensor, Tensor]:
    """Logit differences of every prompt before and after steering."""
    rows, answers, wrong = range(len(result)), result.settings["answers"], result.settings["wrong_answers"]
    before, after = (logits[rows, answers] - logits[rows, wrong] for logits in (result.before, result.after))
    return before, after


def flips(swept: SteeringSweep) -> dict[str, float]:
    """By group and scale: the share of prompts that take the other verb."""
    names = [f"{name} {scale}" for name in swept.steered for scale in swept.scales]
    return {
        name: float((differences(result)[1] < 0).double().mean())
        for name, result in zip(names, swept.results, strict=True)
    }


def _size(circuit: Circuit, nodes: list[str]) -> dict[str, float]:
    rows = circuit.nodes[circuit.nodes["node"].isin(nodes)]
    return {"neurons": len(rows), "score": float(rows["score"].sum())}


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return json.loads(frame.to_json(orient="records"))


# --- the page ---


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """Markdown by the name that marks its place on the page."""
    out = {name: _traces_table(results[name]) for name in MODELS if name in results}
    return out | (_walk_tables(results["walk"]) if "walk" in results else {})


def _traces_table(rows: Mapping[str, Any]) -> str:
    table = []
    for kind, row in rows.items():
        unit = "logits" if row["read"] == "logit difference" else "nats"
        answer, wrong = row["answer"].strip(), (row["wrong"] or "").strip()
        low, high = row["control_low"], row["control_high"]
        table.append(
            {
                "prompt": kind if "tokens" in kind else f"{kind} ({row['tokens']} tokens)",
                "target (its probability)": f"{answer}{wrong and f', not {wrong}'} ({row['probability']:.2f})",
                "neurons": f"{row['nodes']:,}", "edges": f"{row['edges']:,}", "explained": f"{row['explained']:.0%}",
                "ablated": f"{row['effect']:+.1f} {unit}",
                "matched (size)": f"{low:+.1f} to {high:+.1f} ({row['control_size']:.2f})",
                "trace": f"{row['trace_s']:.1f} s",
            }
        )  # fmt: skip
    return _markdown(table)


def _walk_tables(walk: Mapping[str, Any]) -> dict[str, str]:
    proof, rest = (
        {(row["steered"], row["scale"], row["read"]): row for row in walk[part]} for part in ("proof", "rest")
    )
    names, read = list(walk["groups"]), "logit difference"
    flips = walk["flips"]
    groups = [{"group": n, "neurons": g["neurons"], "score": f"{g['score']:+.2f}"} for n, g in walk["groups"].items()]

    def tested(name: str, scale: float | str) -> dict[str, str]:
        row = proof[name, scale, read]
        return {
            "change": _interval(row), "matched": f"{row['control']:+.2f} ({row['control_size']:.2f})",
            "p": f"{row['p']:.2f}", "other verb": f"{flips[f'{name} {scale}']:.0%}",
        }  # fmt: skip

    tables: dict[str, list[dict[str, Any]]] = {"groups": groups}
    for title, scale in (("ablated", 0.0), ("moved", "donor")):
        tables[title] = [{title: name, **tested(name, scale)} for name in [*names, "whole circuit"]]
    tables["moved matrix"] = [
        {"moved": name, **{other: f"{proof[name, 'donor', other]['mean']:+.2f}" for other in names}} for name in names
    ]
    tables["rest"] = [
        {
            "all but": name, "ablated: change": _interval(rest[f"all but {name}", 0.0, read]),
            "moved: change": _interval(rest[f"all but {name}", "donor", read]),
            "moved: other verb": f"{flips[f'all but {name} donor']:.0%}",
        }
        for name in names
    ]  # fmt: skip
    tables["few"] = [
        {
            "moved": row["steered"], "change": _interval(row),
            "matched": f"{row['control']:+.2f} ({row['control_size']:.2f})", "p": f"{row['p']:.2f}",
            "other verb": f"{flips[row['steered'] + ' donor']:.0%}",
        }
        for row in walk["few"] if row["read"] == read
    ]  # fmt: skip
    return {name: _markdown(rows) for name, rows in tables.items()}


def _interval(row: Mapping[str, Any]) -> str:
    return f"{row['mean']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})"


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
    parser.add_argument("--walk", choices=(*MODELS, "none"), default="smollm2", help="whose circuit is walked through")
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
    if options.walk != "none":
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
