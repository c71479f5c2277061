"""docs/which-method.md, its JSON and its figure, from the cells alone: no number on the page is typed by hand."""

import json
import math
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.__main__ import machine
from tests.smollm2 import LABEL
from tests.study.cases import MODELS, SIZES, TASKS
from tests.study.methods import ENTRIES
from tests.study.summary import DEFAULT, STOPPED, summarize

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = ROOT / "docs" / "which-method.md", ROOT / "docs" / "which-method.json"
FIGURE = ROOT / "docs" / "images" / "which-method.png"
RANKED = {"abs": "by absolute score", "signed": "by sign"}
NAMES = {"nounpp": "nounpp", "rc": "rc", "two_hop": "two-hop capitals"}


def write_page(folder: Path) -> None:
    """Summarize the cells and write all three."""
    found = {"machine": machine(1)} | summarize(folder)
    RESULTS.write_text(json.dumps(_rounded(found), indent=1) + "\n", encoding="utf-8")
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(page(content), encoding="utf-8")
    draw(content)


def page(found: dict[str, Any]) -> str:
    """The page, from the JSON alone."""
    main = found["models"]["smollm2"]
    whole = [row for row in main["equal"] if row["endpoint"]]
    m = found["machine"]
    demos = [name for name in MODELS if found["models"][name]["equal"] and name != "smollm2"]
    sizes = ", ".join(f"{n:,}" for n in SIZES["smollm2"])
    versions = f"{m['cpu']}, torch {m['torch']}, TransformerLens {m['transformer-lens']}, {m['date']}"
    parts = [
        "# Which method?",
        _wrap(
            "Which method finds the neurons of a task, and what does it cost? Written by `python -m tests.study "
            "--page` from [which-method.json](which-method.json); "
            "no number is typed by hand, and the recommendation is made from the table by a rule that was fixed before."
        ),
        "## What to use",
        *_advice(found),
        "## The measure",
        _wrap(
            f"Model: {LABEL}. Nodes: MLP neurons at every position (276,480 at six tokens). Tasks: agreement across a "
            "prepositional phrase (nounpp) and a relative clause (rc), "
            "and the capital of the state that contains a city. Only contrasts that the model gets right both ways. "
            "Parts for scores, for development and for judging share no noun (no state). "
            f"Pairs to judge on: {_pairs(main['pairs'])}; 20 pairs for scores."
        ),
        _wrap(
            "**Primary endpoint**, fixed before the first run: *compactness* under interchange, scored with "
            "interchange too, averaged over the three tasks. It is the mean of two areas over the logarithm of "
            "circuit size, from 1 node to all: the share of pairs that the best nodes alone still answer right, and "
            "the share that is answered wrong when the best nodes alone take the corrupt prompt's values. "
            f"1 is a circuit of one node that does everything. Sizes measured: {sizes}. Intervals are 95 %, over words "
            "drawn with replacement (both nouns, or both "
            "states, of a pair together); differences are paired. Everything else on this page is secondary, and its "
            "intervals are not corrected for their number."
        ),
        _wrap(
            "**Price**: forward passes per pair that is scored, counted at the first block; a backward pass counts as "
            "one. Settings are the package's defaults (IG and IG over inputs with 5 steps); "
            "nothing was tuned, and development pairs choose among the checkpoints of a learned mask alone."
        ),
        "## SmolLM2",
        f"![Endpoint against price](images/{FIGURE.name})",
        equal(main["equal"]),
        _wrap(
            "Difference is to RelP by absolute score, the default. *Error* is the mean of |1 - faithfulness| over log "
            "size, lower is better, and *overshoot* how far faithfulness exceeds 1: compactness asks "
            "only whether the answer is right, so a ranking by sign, which leaves out nodes that work against the "
            "answer, gains on it and overshoots. Who wants the circuit's logit difference to be the "
            "model's looks at the error."
        ),
        *_notes(found),
        "## Scored with one ablation, judged with another",
        crossed(main["crossed"]),
        "## Demo models",
        _wrap(
            "The same methods on the two demo models and their own tasks, with intervals over their words; sizes 1 to "
            "3,000. Exact patching of every neuron is for nounpp alone."
        ),
        *[text for name in demos for text in (f"### {name}", equal(found["models"][name]["equal"]))],
        "## Known circuits",
        *_known(found["known"]),
        "## False discoveries where the truth is known",
        *_fdr(found["stability"]),
        "## How far a gradient can be trusted",
        *_reliability(found["reliability"]),
        "## What this does not say",
        _wrap(
            "One small model, three tasks, one draw of pairs, neurons alone. On SmolLM2, "
            f"{_left_out(main['equal'])}All SmolLM2 "
            f"and demo cells together took {found['minutes']:.0f} CPU minutes of one thread "
            f"({versions}). Run it again, or go on from where it stopped: `python -m tests.study`."
        ),
    ]  # fmt: skip
    assert whole, "no method has all three tasks"
    return "\n\n".join(part for part in parts if part) + "\n"


def _advice(found: dict[str, Any]) -> list[str]:
    rows = {(row["method"], row["ranking"]): row for row in found["models"]["smollm2"]["equal"]}
    default, steps = rows[DEFAULT], found["recommended"]
    value = _interval(default["endpoint"])
    lines = [
        f"- **{_name(DEFAULT)}**, the default: compactness {value} at {default['cost']:.3g} forward passes per pair."
    ]
    for step in steps:
        over, key = tuple(step["over"]), tuple(step["method"])
        same = rows[key]["cost"] <= rows[over]["cost"] * 1.02
        price = "at the same price" if same else f"for {step['cost']:.3g} forward passes per pair"
        values = f"{_interval(rows[key]['endpoint'])}, {_signed(step['difference'])}"
        lines.append(f"- **{_name(key)}** {price}: {values} against {_name(over)}.")
    if not steps:
        lines.append("- No other method is better by an interval that excludes 0: RelP is as good as anything here.")
    free = [key for step in steps for key in [tuple(step["method"])] if rows[key]["cost"] <= default["cost"] * 1.02]
    if not free:
        verdict = "RelP by absolute score stays the default: nothing at its price is better."
    elif free[-1] == ("RelP", "signed"):
        verdict = (
            "RelP stays the default method: none at its price is better. For circuits that are to answer right, rank "
            'its scores by sign: `scores.top(k, by="signed")`, '
            '`evaluate(..., ranking="signed")`.'
        )
    else:
        verdict = f"At RelP's price {_name(free[-1])} is better on this endpoint: use it where the answer alone counts."
    dearer = [tuple(step["method"]) for step in steps if rows[tuple(step["method"])]["cost"] > default["cost"] * 1.02]
    if dearer:
        ratio = rows[dearer[-1]]["cost"] / default["cost"]
        verdict += (
            f" Where {ratio:.0f} times the price does not matter, {_name(dearer[-1])} finds the most compact circuits."
        )
    return [_wrap(verdict), "\n".join(lines)]


def _notes(found: dict[str, Any]) -> list[str]:
    best = []
    for task in TASKS:
        rows = [row for row in found["models"]["smollm2"]["equal"] if row["tasks"][task]]
        row = max(rows, key=lambda row: row["tasks"][task][0])
        best.append(f"{_name((row['method'], row['ranking']))} on {NAMES[task]} ({row['tasks'][task][0]:.2f})")
    notes = [
        f"The most compact on each task: {', '.join(best)}.",
        'CP-LRP (`rules="cp"`) has the same rules as RelP, so the same scores. Second order is the gradient\'s score '
        "plus the node's share of its group's second order (`tnc.reliability`).",
    ]
    chosen = {task: name for task, name in found["stopped"].items() if name}
    if chosen:
        steps = ", ".join(f"{name.removeprefix('learned, ')} on {NAMES[task]}" for task, name in chosen.items())
        notes.append(f"Of the checkpoints of the learned mask development pairs chose {steps}.")
    return [_wrap(" ".join(notes))]


def _left_out(rows: list[dict[str, Any]]) -> str:
    missing = []
    for row in rows:
        tasks = ", ".join(NAMES[task] for task in TASKS if not row["tasks"][task])
        missing += [f"{_name((row['method'], row['ranking']))} ({tasks})"] if tasks else []
    there = {row["method"] for row in rows}
    missing += [f"{name} (every task)" for name in [*ENTRIES, STOPPED] if name not in there]
    return f"not computed on all tasks within the time: {'; '.join(missing)}. " if missing else ""


def equal(rows: list[dict[str, Any]]) -> str:
    """Endpoint, difference and secondary measures by method; sorted by the endpoint."""
    head = ["method", "ranked", "price", "compactness", "difference", *(NAMES[task] for task in TASKS)]
    head += ["faithfulness at 10 / 100", "completeness at 10 / 100", "error", "overshoot"]
    table = []
    for row in sorted(rows, key=lambda row: -(row["endpoint"] or [-1])[0]):
        curve = row["curve"]
        place = [curve["sizes"].index(n) for n in (10, 100)]
        ends = [" / ".join(f"{curve[name][p]:.2f}" for p in place) for name in ("faithfulness", "completeness")]
        more = [*ends, f"{curve['log area of |1 - faithfulness|']:.2f}", f"{curve['overshoot']:.2f}"]
        by_task = ["" if row["tasks"][t] is None else f"{row['tasks'][t][0]:.2f}" for t in TASKS]
        first = [row["method"], RANKED[row["ranking"]], f"{row['cost']:.3g}"]
        both = [_interval(row["endpoint"]), _signed(row["difference"])]
        table.append([*first, *both, *by_task, *(more if row["endpoint"] else [""] * 4)])
    return _table(head, table)


def crossed(rows: list[dict[str, Any]]) -> str:
    """Endpoints by what was used to score and to judge."""
    if not rows:
        return "Not computed within the time."
    names = {"corrupt": "interchange", "mean": "mean"}
    pairs = [(a, b) for a in names for b in names]
    head = ["method", "ranked", *(f"scored {names[a]}, judged {names[b]}" for a, b in pairs)]
    table = [[row["method"], RANKED[row["ranking"]], *(_interval(row[f"{a}/{b}"]) for a, b in pairs)] for row in rows]
    text = _wrap(
        "The endpoint when nodes are scored and judged with interchange (the pair's corrupt prompt) or with the mean "
        "over prompts. Empty: not computed on all tasks."
    )
    return text + "\n\n" + _table(head, table)


def _known(found: dict[str, Any]) -> list[str]:
    if not found["auroc"]:
        return ["Not computed within the time."]
    kinds = [kind for kind in ("planted", "tracr") if kind in found["auroc"]]
    names = list(dict.fromkeys(name for kind in kinds for name in found["auroc"][kind]))

    def cell(kind: str, name: str) -> str:
        values = found["auroc"][kind].get(name)
        return "" if values is None else f"{values[0]:.3f} (least {values[1]:.2f})"

    judged = {kind: sum(true < parts for _, parts, true in found["cases"][kind]) for kind in kinds}
    table = [[name.split("|")[0], RANKED[name.split("|")[1]], *(cell(kind, name) for kind in kinds)] for name in names]
    text = (
        "Area under the ROC curve, mean over cases. Planted circuits (tests/planted): heads and MLPs that do the task "
        "against those that distract, each as high as its best node; "
        f"{judged.get('planted', 0)} of {len(found['cases'].get('planted', []))} cases have both kinds. Compiled "
        "programs (tracr): neurons on a path to the output against other neurons that are no padding; "
        f"{judged.get('tracr', 0)} of {len(found['cases'].get('tracr', []))} programs have both kinds, most of them "
        "one false neuron. 48 pairs each. RelP freezes attention patterns, through which much of these programs runs: "
        "on some it gives no neuron a score."
    )
    return [_wrap(text), _table(["method", "ranked", *kinds], table)]


def _fdr(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["Not computed within the time."]
    f = found["frequencies"]
    plain, compiled = f["planted"], f["tracr"]
    text = (
        f"`tnc.stability(...).at_fdr(rate, null=...)` on {found['chains']} chains of the planted circuits, one "
        "question at a time (RelP, 64 pairs, each a cluster). False are all nodes outside the chain's heads and MLPs. "
        f"Of the 10 best nodes of a draw {plain['true_share_of_draws']:.0%} are true ones on average, and "
        f"{plain['core_true']:.1f} of the {plain['core']:.1f} nodes in at least nine draws out of ten; "
        f"in {found['programs']} compiled programs {compiled['true_share_of_draws']:.0%} and "
        f"{compiled['core_true']:.1f} of {compiled['core']:.1f}."
    )
    head = ["null", "nominal rate", "nodes named (median)", "false among them", "their share of the scores"]
    rows = []
    for row in found["rates"]:
        numbers = [f"{row['nominal']:.2f}", f"{row['nodes']:.0f}", f"{row['false']:.2f}", f"{row['false_mass']:.3f}"]
        rows.append([row["null"], *numbers])
    worst = max(row["false"] / row["nominal"] for row in found["rates"])
    kept = all(row["false"] <= 1.2 * row["nominal"] for row in found["rates"])
    after = (
        "Both nulls keep their rates here."
        if kept
        else f"**Neither null bounds how many nodes lie outside a circuit**: up to {worst:.0f} times the nominal share "
        "do. What they test is what they say: that a score has one sign over words, or exceeds what an irrelevant "
        "change does. Nodes outside a planted chain have such scores too; the last column has their share of what all "
        "named nodes score. Read `at_fdr` as \"this sign is no accident of the words\", and leave membership to "
        "faithfulness and completeness."
    )  # fmt: skip
    return [_wrap(text), _table(head, rows), _wrap(after)]


def _reliability(rows: list[dict[str, float]] | None) -> list[str]:
    if rows is None:
        return ["Not computed within the time."]
    text = (
        "All (layer, position) groups of SmolLM2's neurons on nounpp, 8 pairs, by decile of the ratio of second to "
        "first order: mean |estimate - exact| in logits, with the exact effect by patching the "
        "group. The second order costs one more backward pass per group; the trapezoid (gradients at both ends) the "
        "same."
    )
    head = ["ratio", "groups", "mean exact effect", "first order", "corrected", "trapezoid"]
    names = ("first_order", "corrected", "trapezoid")
    table = [
        [f"{r['low']:.2g} to {r['high']:.2g}", f"{r['groups']}", *(f"{r[n]:.3f}" for n in ("exact", *names))]
        for r in rows
    ]
    middle = [r for r in rows if r["high"] >= 0.1 and r["low"] <= 1]
    after = ""
    if middle:
        count = sum(r["groups"] for r in middle)
        mean = {n: sum(r[n] * r["groups"] for r in middle) / count for n in names}
        verb = "lowers" if mean["corrected"] < mean["first_order"] else "does **not** lower"
        after = (
            f"In the deciles that reach between .1 and 1 the correction {verb} the error: {mean['first_order']:.3f} at "
            f"first order, {mean['corrected']:.3f} corrected, "
            f"{mean['trapezoid']:.3f} by the trapezoid, which costs as much."
        )
    return [_wrap(text), _table(head, table), _wrap(after)]


def draw(found: dict[str, Any]) -> None:
    """The endpoint against the price, as a picture of headless Chromium."""
    import plotly.graph_objects as go
    from playwright.sync_api import sync_playwright

    from tests.notebooks import CHROMIUM

    rows = [row for row in found["models"]["smollm2"]["equal"] if row["endpoint"] and row["method"] != STOPPED]
    for column in _columns(rows):  # side by side, or their intervals would cover each other
        for place, index in enumerate(column):
            rows[index]["at"] = max(rows[index]["cost"], 1.0) * 1.05 ** (place - (len(column) - 1) / 2)
    figure = go.Figure()
    styles = {"abs": ("#8a8a8a", "circle-open"), "signed": ("#2b5fad", "circle")}
    for ranking, (color, symbol) in styles.items():
        some = [row for row in rows if row["ranking"] == ranking]
        y, low, high = zip(*(row["endpoint"] for row in some), strict=True)
        band = {"array": np.subtract(high, y), "arrayminus": np.subtract(y, low), "symmetric": False, "thickness": 1}
        figure.add_scatter(
            x=[row["at"] for row in some], y=y, mode="markers", name=RANKED[ranking], error_y=band,
            marker={"color": color, "symbol": symbol, "size": 10},
        )  # fmt: skip
    for row, (across, up) in zip(rows, _places(rows), strict=True):
        figure.add_annotation(
            x=math.log10(row["at"]), y=row["endpoint"][0], text=row["method"], ax=across, ay=-up, xanchor="left",
            arrowwidth=0.6, arrowhead=0, arrowcolor="#bbbbbb", font={"size": 11, "color": styles[row["ranking"]][0]},
        )  # fmt: skip
    last = math.log10(max(row["cost"] for row in rows)) + 0.8
    figure.update_layout(
        template="plotly_white", width=1000, height=620, margin={"l": 70, "r": 40, "t": 20, "b": 60},
        legend={"x": 0.01, "y": 0.99}, yaxis={"title": "compactness, mean of three tasks (SmolLM2)"},
        xaxis={"type": "log", "title": "price: forward passes per pair", "range": [-0.2, last],
               "tickvals": [1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000]},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        path = Path(name) / "figure.html"
        figure.write_html(path, include_plotlyjs=True, config={"displayModeBar": False})
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        shown = browser.new_page(viewport={"width": 1010, "height": 630})
        shown.goto(path.as_uri())
        shown.wait_for_selector(".main-svg")
        shown.screenshot(path=FIGURE, clip={"x": 0, "y": 0, "width": 1010, "height": 630})
        browser.close()


def _columns(rows: list[dict[str, Any]]) -> list[list[int]]:
    """Indices of rows at about one price, lowest endpoint first."""
    columns: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        columns.setdefault(round(math.log10(max(row["cost"], 1.0)) * 3), []).append(index)
    return [sorted(column, key=lambda index: rows[index]["endpoint"][0]) for column in columns.values()]


def _places(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """By how many pixels each label stands beside its point, so that labels of points at one price are all seen."""
    values = [row["endpoint"][0] for row in rows]
    pixels = 440 / max(max(values) - min(values), 1e-9)
    ups = [0.0] * len(rows)
    for column in _columns(rows):
        put = [values[index] * pixels for index in column]
        for _ in range(300):
            for i in range(len(put) - 1):
                gap = max(0.0, 15 - (put[i + 1] - put[i])) / 2
                put[i], put[i + 1] = put[i] - gap, put[i + 1] + gap
        for index, new in zip(column, put, strict=True):
            ups[index] = new - values[index] * pixels
    across = [math.log10(max(row["cost"], 1.0)) * 360 for row in rows]  # pixels
    for index, here in enumerate(across):
        near = [k for k, there in enumerate(across) if 20 < there - here < 140]
        if any(abs((values[k] - values[index]) * pixels - ups[index]) < 10 for k in near):
            ups[index] += 20  # or the label would cross the next point
    return [(30.0, up) for up in ups]


def _name(key: tuple[str, str]) -> str:
    if key[0].startswith(("learned", "mask")):
        return f"the {key[0]}" if key[0].startswith("mask") else f"the mask {key[0]}"
    return f"{key[0]} ranked {RANKED[key[1]]}"


def _pairs(counts: dict[str, list[int]]) -> str:
    kinds = {task: "states" if task == "two_hop" else "couples of nouns" for task in TASKS}
    return ", ".join(f"{pairs} of {n} {kinds[task]} ({NAMES[task]})" for task, (pairs, n) in counts.items())


def _interval(values: list[float] | None) -> str:
    return "" if values is None else f"{values[0]:.3f} [{values[1]:.3f}, {values[2]:.3f}]"


def _signed(values: list[float] | None) -> str:
    return "" if values is None else f"{values[0]:+.3f} [{values[1]:+.3f}, {values[2]:+.3f}]"


def _table(head: list[str], rows: list[list[str]]) -> str:
    first, *rest = ("| " + " | ".join(row) + " |" for row in [head, *rows])
    return "\n".join([first, "|" + "---|" * len(head), *rest])


def _wrap(text: str) -> str:
    return textwrap.fill(text, 180, break_long_words=False, break_on_hyphens=False)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4) if value == value else None
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
