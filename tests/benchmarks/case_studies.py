"""The numbers and pictures of the two case studies in the documentation.

    python -m tests.benchmarks.case_studies [capitals] [agreement] [--images docs/images]

Capitals: a circuit traced over pairs of 48 states is grouped by place; the state group is then moved from a prompt
about every other state, which asks for the nickname, into the Dallas prompt. Texas and Florida took no part in the
choice. Agreement: neurons are chosen on half of the nouns and judged on the other half; then one number neuron is
steered. The pictures need playwright and chromium.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import tl_neuron_circuits as tnc
from tl_neuron_circuits import Circuit
from tl_neuron_circuits.demo import _states as states
from tl_neuron_circuits.demo import capitals
from tl_neuron_circuits.demo._models import DEMO_MODELS

PROMPT = "The capital of the state containing Dallas is"
SCALES = (-4, -2, -1, 0, 0.5, 1, 2)


def grouped(model: Any) -> Circuit:
    """The circuit of the two-hop capitals without Texas and Florida, in three groups."""
    names = [state.name for state in states.STATES if state.name not in ("Texas", "Florida")]
    circuit = tnc.trace(model, capitals(n=256, words=names), nodes=400)
    neurons = circuit.nodes[circuit.nodes["kind"] == "neuron"]
    last, early = neurons["position"] == 9, neurons["layer"] <= 1
    groups = {"state": neurons[~last], "reading": neurons[last & early], "say the capital": neurons[last & ~early]}
    return circuit.group({name: list(rows["node"]) for name, rows in groups.items() if len(rows)})


def members(circuit: Circuit) -> dict[str, list[str]]:
    """Nodes by group."""
    named = circuit.nodes[circuit.nodes["group"] != ""]
    return {str(group): list(rows["node"]) for group, rows in named.groupby("group", sort=False)}


def donors() -> tuple[list[str], list[str]]:
    """A nickname prompt about a town of every state but Texas, and that state's capital."""
    towns = {city.state.name: city for city in states.CITIES if city.state.name != "Texas"}
    prompts = [f"The nickname of the state containing {city.name} is" for city in towns.values()]
    return prompts, [city.state.capital for city in towns.values()]


def capitals_study(name: str, images: Path | None) -> None:
    """Groups of the circuit, and what moving or scaling each does to the Dallas prompt."""
    model = tnc.load_demo_model(name)
    circuit = grouped(model)
    groups = members(circuit)
    print(f"\n{name}: {circuit!r}; " + ", ".join(f"{group} {len(nodes)}" for group, nodes in groups.items()))
    supernodes = circuit.collapse()
    print(supernodes.to_dataframe()[["node", "kind", "score", "share", "flow"]].head(9).round(3).to_string(index=False))
    print(supernodes.edges.head(8).round(3).to_string(index=False))
    prompts, answers = donors()
    rows = []
    for group, nodes in groups.items():
        moved = tnc.interchange(model, [PROMPT] * len(prompts), prompts, nodes, watch=groups)
        hits = sum(top.strip() == answer for top, answer in zip(moved.top_after, answers, strict=True))
        kept = sum(top.strip() == "Austin" for top in moved.top_after)
        row: dict[str, Any] = {"group": group, "neurons": len(nodes), "donor's capital": hits, "still Austin": kept}
        row |= {f"change of {other}": float(change.mean()) for other, change in moved.watched.items()}
        swept = tnc.sweep(model, PROMPT, nodes, scales=(-1, 0, 2))
        row |= {f"x {scale:g}": one.top_after[0] for scale, one in zip(swept.scales, swept.results, strict=True)}
        rows.append(row)
    print(pd.DataFrame(rows).round(2).to_string(index=False))
    donor = "The nickname of the state containing Cormouth is"
    print(
        tnc.interchange(model, PROMPT, donor, groups["state"], watch=groups).summary().round(2).to_string(index=False)
    )
    if images:
        screenshot(circuit.prune(count=150), images / f"circuit_capitals_{name}.png")


def agreement(name: str, images: Path | None) -> None:
    """Neurons of agreement across a phrase, held-out nouns, and one number neuron."""
    model = tnc.load_demo_model(name)
    train, test = tnc.tasks.subject_verb_agreement("nounpp", n=256).split(0.5, by="label")
    scores = tnc.attribute(model, train)
    best = scores.top(8)
    print(f"\n{name}: {len(train)} pairs to choose, {len(test)} to judge\n{best.drop(columns='hook').to_string()}")
    curve = tnc.evaluate(model, test, scores, sizes=[1, 5, 10, 20, 50, 100, 200])
    print(curve.to_dataframe().round(2).to_string(index=False), f"\nmetric {curve.metric_full:.2f}")
    last = best[best["position"] == 5].head(1)
    neuron = last["label"].iloc[0].partition("@")[0]
    print(tnc.direct_logit_effects(model, [neuron], k=6).summary().to_string(index=False))
    examples = tnc.max_activating_examples(model, test.clean, [neuron], k=3)
    print(examples.to_dataframe()[["text", "token", "activation"]].to_string(index=False))
    print(steered(model, test, last).to_string(index=False))
    print(moved(model, test, scores.top(400)).to_string(index=False))
    circuit = tnc.trace(model, train.split(0.25, by="label")[0], nodes=60)
    print(circuit)
    if images:
        screenshot(circuit, images / f"circuit_agreement_{name}.png", click=last["label"].iloc[0])


def steered(model: Any, test: tnc.PromptPairs, node: pd.DataFrame) -> pd.DataFrame:
    """Per multiplier: how often the verb's number is right, and the mean logit difference, by the subject's number."""
    tokens = tnc.tasks.tokenize(model, test)
    rows, singular = torch.arange(len(test)), torch.tensor([answer.endswith("s") for answer in test.answer])
    values = tnc.node_values(model, test.clean, node)
    print("activation", {k: f"{values[m].mean():.2f}" for k, m in (("singular", singular), ("plural", ~singular))})
    assert tokens.wrong_answer is not None
    out = []
    for scale in SCALES:
        logits = tnc.steer(model, test.clean, node, scale=scale).after
        apart = logits[rows, tokens.answer] - logits[rows, tokens.wrong_answer]
        row: dict[str, Any] = {"multiplier": scale}
        for label, mask in (("singular", singular), ("plural", ~singular)):
            row |= {f"{label}: right": float((apart[mask] > 0).float().mean()), label: float(apart[mask].mean())}
        out.append(row)
    return pd.DataFrame(out).round(2)


def moved(model: Any, test: tnc.PromptPairs, ranked: pd.DataFrame) -> pd.DataFrame:
    """How often the best neurons of one position, set to their values on the other number's prompt, flip the verb."""
    tokens = tnc.tasks.tokenize(model, test)
    assert tokens.wrong_answer is not None
    rows, out = torch.arange(len(test)), []
    for place, position, sizes in (("noun", 2, (3, 10, 20, 40)), ("last", 5, (1, 3, 5, 10))):
        for size in sizes:
            best = ranked[ranked["position"] == position].head(size)
            logits = tnc.interchange(model, test.clean, test.corrupt or [], best).after
            flips = logits[rows, tokens.answer] < logits[rows, tokens.wrong_answer]
            out.append({"position": place, "neurons": len(best), "flips": round(float(flips.float().mean()), 2)})
    return pd.DataFrame(out)


def screenshot(circuit: Circuit, path: Path, click: str | None = None) -> None:
    """The page of a circuit in headless chromium, a node selected if named."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = Path(folder) / "circuit.html"
        circuit.to_html(page_file)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 860}, color_scheme="light")
        page.goto(page_file.as_uri())
        page.wait_for_selector("#counts[data-nodes]")
        if click:
            page.locator(f'.node[data-key="{click}"]').click()
            page.mouse.move(600, 4)
        page.screenshot(path=path)
        browser.close()


def main() -> None:
    """Print the numbers of the studies that are named, or of both."""
    parser = argparse.ArgumentParser(description="The case studies' numbers")
    parser.add_argument("studies", nargs="*", default=["capitals", "agreement"])
    parser.add_argument("--images", type=Path, default=None)
    options = parser.parse_args()
    for study in options.studies:
        for name in DEMO_MODELS:
            {"capitals": capitals_study, "agreement": agreement}[study](name, options.images)


if __name__ == "__main__":
    main()
