"""docs/which-method.md, its tables page, JSON and figure, from the cells alone: no number is typed by hand."""

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
TABLES = ROOT / "docs" / "which-method-tables.md"
FIGURE = ROOT / "docs" / "images" / "which-method.png"
RANKED = {"abs": "by absolute score", "signed": "by sign"}
SHORT = {"abs": "size", "signed": "sign"}
NAMES = {"nounpp": "nounpp", "rc": "rc", "two_hop": "two-hop capitals"}


def write_page(folder: Path) -> None:
    """Summarize the cells and write everything; what they lack, and an earlier run on the same pairs had, is kept."""
    found = {"machine": machine(1)} | summarize(folder)
    if RESULTS.exists():
        keep_earlier(found, json.loads(RESULTS.read_text(encoding="utf-8")))
    RESULTS.write_text(json.dumps(_rounded(found), indent=1) + "\n", encoding="utf-8")
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(page(content), encoding="utf-8")
    TABLES.write_text(tables(content), encoding="utf-8")
    draw(content)


def keep_earlier(found: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Put an earlier run's rows where there are none, marked as such."""
    for name, model in found["models"].items():
        old = earlier["models"].get(name, {"equal": [], "pairs": {}})
        same = all(list(model["pairs"][task]) == old["pairs"].get(task) for task in model["pairs"])
        there = {(row["method"], row["ranking"]) for row in model["equal"] if row["endpoint"]}
        kept = [
            row for row in old["equal"] if same and row["endpoint"] and (row["method"], row["ranking"]) not in there
        ]
        names = {(row["method"], row["ranking"]) for row in kept}
        model["equal"] = [row for row in model["equal"] if (row["method"], row["ranking"]) not in names]
        model["equal"] += [row | {"earlier": True} for row in kept]
        model["pairs"] = model["pairs"] or old["pairs"]
    count = lambda known: sum(len(cases) for cases in known["cases"].values()) if known else 0  # noqa: E731
    lacking = {"known": count(found["known"]) < count(earlier.get("known")), "reliability": not found["reliability"]}
    for part, lacks in lacking.items():
        if lacks and earlier.get(part):
            found[part] = earlier[part]
            found["kept"] = [*found.get("kept", []), part]


def page(found: dict[str, Any]) -> str:
    """The page, from the JSON alone."""
    main = found["models"]["smollm2"]
    whole = [row for row in main["equal"] if row["endpoint"]]
    m = found["machine"]
    versions = f"{m['cpu']}, torch {m['torch']}, TransformerLens {m['transformer-lens']}, {m['date']}"
    assert whole, "no method has all three tasks"
    parts = [
        "# Which method?",
        *_advice(found),
        _wrap(
            "`python -m tests.study --page` writes every number of this page from "
            "[which-method.json](which-method.json), and a rule that was fixed before makes the recommendation. [All "
            "tables](which-method-tables.md)."
        ),
        "## The measure",
        _wrap(
            f"{LABEL}; MLP neurons at every position (276,480 at six tokens). Three tasks: agreement across a "
            "prepositional phrase (nounpp) and across a relative clause (rc), and the capital of the state that "
            "contains a city. The model gets every contrast right both ways. Nodes are scored on 20 pairs; the pairs "
            f"for scores, for development and for judging share no noun or state. Judged on {_pairs(main['pairs'])}."
        ),
        _wrap(
            "**Compactness** is the primary endpoint, fixed before the first run: the mean of two areas over the log "
            "of circuit size, from 1 node to all. One is the share of pairs that the best nodes alone still answer "
            "right, the other the share answered wrong when they alone take the corrupt prompt's values. 1 is a single "
            "node that does everything. Nodes are scored and judged under interchange, and tasks are averaged. "
            "Intervals are 95%, over words drawn with replacement (both words of a pair together), and differences are "
            "paired. Everything else is secondary and not corrected for multiple tests."
        ),
        _wrap(
            "**Price** is in forward passes per scored pair; a backward pass counts as one. Settings are the package's "
            "defaults (IG with 5 steps, the mask gradient with 10). Development pairs only choose among the "
            "checkpoints of a learned mask."
        ),
        "## SmolLM2",
        f"![Endpoint against price](images/{FIGURE.name})",
        equal(_better(main["equal"])),
        _wrap(
            "Each method in its better ranking, RelP in both ([all](which-method-tables.md)). *Ranked*: by the score's "
            "size or sign. *Difference*: to RelP by size, the default. *Error*: the distance of faithfulness from 1, "
            "averaged over log size."
        ),
        _wrap(
            "**Look at the error if the circuit's logit difference should be the model's.** Compactness asks only "
            "whether the answer is right. A ranking by sign leaves out nodes that work against the answer, so it gains "
            "compactness and overshoots."
        ),
        *_notes(found),
        "## Scored with one ablation, judged with another",
        crossed(main["crossed"]),
        "## Known circuits",
        *_known(found["known"]),
        "## False discoveries where the truth is known",
        *_fdr(found["stability"]),
        "## How far a gradient can be trusted",
        *_reliability(found["reliability"]),
        *_screened(found["screened"]),
        "## What this does not say",
        _wrap(
            "One small model, three tasks, one draw of pairs, neurons only. On SmolLM2, "
            f"{_left_out(main['equal'])}{_earlier(found)}The SmolLM2 and demo cells took {found['minutes']:.0f} CPU "
            f"minutes of one thread ({versions}). `python -m tests.study` resumes from the cells that exist."
        ),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def tables(found: dict[str, Any]) -> str:
    """The page of all tables."""
    main = found["models"]["smollm2"]
    demos = [name for name in MODELS if found["models"][name]["equal"] and name != "smollm2"]
    sizes = ", ".join(f"{n:,}" for n in SIZES["smollm2"])
    parts = [
        "# Which method? All tables",
        _wrap("[Which method?](which-method.md) is made from these tables and explains their words."),
        "## SmolLM2, every ranking",
        equal(main["equal"]),
        "## SmolLM2, by task",
        _wrap(f"Sizes measured: {sizes}. Empty: not computed."),
        by_task(main["equal"]),
        "## SmolLM2, circuits by size",
        by_size(main["equal"]),
        "## Demo models",
        _wrap(
            "The same methods on the demo models' own tasks, with intervals over their words; sizes 1 to 3,000. Exact "
            "patching of every neuron was run on nounpp only."
        ),
        *[
            text
            for name in demos
            for text in (f"### {name}", equal(found["models"][name]["equal"]), by_task(found["models"][name]["equal"]))
        ],
        *[
            text
            for name in demos
            if found["models"][name]["crossed"]
            for text in (f"### {name}, ablations crossed", crossed(found["models"][name]["crossed"]))
        ],
        "## Known circuits, every method",
        *_known(found["known"], every=True),
        "## False discoveries, every rate",
        *_fdr(found["stability"], every=True),
        "## Groups by decile of the ratio",
        *_reliability(found["reliability"], every=True),
    ]
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
            "RelP stays the default method: none at its price is better. If the circuit should answer right, rank its "
            'scores by sign: `scores.top(k, by="signed")`, `evaluate(..., ranking="signed")`.'
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
    notes = [f'Most compact by task: {", ".join(best)}. CP-LRP (`rules="cp"`) is RelP here.']
    chosen = {task: name for task, name in found["stopped"].items() if name}
    if chosen:
        steps = ", ".join(f"{name.removeprefix('learned, ')} on {NAMES[task]}" for task, name in chosen.items())
        notes.append(f"For the learned mask, development pairs chose {steps}.")
    return [_wrap(" ".join(notes))]


def _left_out(rows: list[dict[str, Any]]) -> str:
    whole = {row["method"] for row in rows if row["endpoint"]}
    missing = [name for name in [*ENTRIES, STOPPED] if name not in whole]
    return f"not finished within the time: {'; '.join(missing)}. " if missing else "nothing is missing. "


def equal(rows: list[dict[str, Any]]) -> str:
    """Endpoint, difference and error by method; sorted by the endpoint."""
    head = ["method", "ranked", "price", "compactness", "difference", "error"]
    table = []
    for row in sorted(rows, key=lambda row: -(row["endpoint"] or [-1])[0]):
        if row["endpoint"]:
            first = [_marked(row), SHORT[row["ranking"]], f"{row['cost']:.3g}"]
            error = f"{row['curve']['log area of |1 - faithfulness|']:.2f}"
            table.append([*first, _interval(row["endpoint"]), _signed(row["difference"]), error])
    return _table(head, table) if table else "No method has all three tasks yet."


def _better(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The better ranking of each method, and the default."""
    whole = sorted((row for row in rows if row["endpoint"]), key=lambda row: -row["endpoint"][0])
    first = {row["method"]: row for row in reversed(whole)}
    return [row for row in whole if first[row["method"]] is row or (row["method"], row["ranking"]) == DEFAULT]


def by_task(rows: list[dict[str, Any]]) -> str:
    """Compactness by task."""
    table = [
        [_marked(row), SHORT[row["ranking"]], *(_interval(row["tasks"][task]) for task in TASKS)]
        for row in sorted(rows, key=lambda row: -(row["endpoint"] or [-1])[0])
    ]
    return _table(["method", "ranked", *(NAMES[task] for task in TASKS)], table)


def by_size(rows: list[dict[str, Any]]) -> str:
    """Faithfulness and completeness of small circuits, as means over the tasks that are there."""
    head = ["method", "ranked", "faithfulness at 10", "at 100", "completeness at 10", "at 100", "overshoot"]
    table = []
    for row in sorted(rows, key=lambda row: -(row["endpoint"] or [-1])[0]):
        curve, first = row["curve"], [_marked(row), SHORT[row["ranking"]]]
        place = [curve["sizes"].index(n) for n in (10, 100)]
        ends = [f"{curve[name][p]:.2f}" for name in ("faithfulness", "completeness") for p in place]
        table += [[*first, *ends, f"{curve['overshoot']:.2f}"]] if row["endpoint"] else []
    text = "Means over the three tasks. Overshoot: how far faithfulness exceeds 1 at some size."
    return text + "\n\n" + _table(head, table)


def crossed(rows: list[dict[str, Any]]) -> str:
    """Endpoints by what was used to score and to judge, and what a method gains or loses by the crossing."""
    if not rows:
        return "Not computed within the time."
    ways = {"corrupt": "interchange", "mean": "mean"}
    pairs = [(a, b) for b in ways for a in ways]
    head = ["method", "ranked", *(f"{ways[a]}, judged by {ways[b]}" for a, b in pairs)]
    table = [[row["method"], SHORT[row["ranking"]], *(_interval(row[f"{a}/{b}"]) for a, b in pairs)] for row in rows]
    text = _wrap(
        "Compactness when nodes are scored, and judged, with interchange (the pair's corrupt prompt) or with the mean "
        "over prompts. Empty: not computed on all tasks."
    )
    best = []
    for a, b in pairs:
        there = [row for row in rows if row[f"{a}/{b} difference"]]
        row = max(there, key=lambda row: row[f"{a}/{b} difference"][0]) if there else None
        best.append(f"{_short(row)} {_signed(row[f'{a}/{b} difference'])}" if row else "")
    return "\n\n".join([text, _table(head, [*table, ["**best minus RelP by size**", "", *best]])])


_SHOWN_KNOWN = ("RelP", "IG over inputs", "mask gradient", "learned, 150 steps", "exact patching")


def _same(one: str, other: str) -> bool:
    return one.split("|")[0] == other.split("|")[0]


def _known(found: dict[str, Any], *, every: bool = False) -> list[str]:
    if not found["auroc"]:
        return ["Not computed within the time."]
    kinds = [kind for kind in ("planted", "tracr") if kind in found["auroc"]]
    names = list(dict.fromkeys(name for kind in kinds for name in found["auroc"][kind]))
    if not every:
        both = [name for name in names if name.split("|")[0] in _SHOWN_KNOWN]
        planted = found["auroc"][kinds[0]]
        names = [name for name in both if planted[name][0] == max(planted[n][0] for n in both if _same(n, name))]
        names = list({name.split("|")[0]: name for name in reversed(names)}.values())[::-1]

    def cell(kind: str, name: str) -> str:
        values = found["auroc"][kind].get(name)
        return "" if values is None else f"{values[0]:.3f} (least {values[1]:.2f})"

    judged = {kind: sum(true < parts for _, parts, true in found["cases"][kind]) for kind in kinds}
    table = [[name.split("|")[0], SHORT[name.split("|")[1]], *(cell(kind, name) for kind in kinds)] for name in names]
    text = (
        "Area under the ROC curve, mean over cases. *Planted* circuits: do heads and MLPs that do the task rank above "
        f"those that distract, each as high as its best node ({judged.get('planted', 0)} cases)? *Compiled* programs "
        "(tracr): do neurons on a path to the output rank above other neurons that are not padding "
        f"({judged.get('tracr', 0)} programs, most with one such neuron)? RelP freezes attention patterns, through "
        "which much of these programs runs, and gives no neuron a score on some."
    )
    return [*([] if every else [_wrap(text)]), _table(["method", "ranked", *kinds], table)]


def _fdr(found: dict[str, Any] | None, *, every: bool = False) -> list[str]:
    if found is None:
        return ["Not computed within the time."]
    f, cases = found["frequencies"], found["cases"]
    head = ["circuits", "null", "nominal", "nodes named", "outside", "without effect", "effect under .1%"]
    head += ["under 1%", "part of scores outside", "named", "named, 1%"] if every else []
    rows = []
    for row in found["rates"]:
        without = [f"{row['without_effect'][x]:.2f}" for x in ("0.0", "0.001", "0.01")]
        first = [row["kind"], row["null"], f"{row['nominal']:.2f}", f"{row['nodes']:.0f}", f"{row['outside']:.2f}"]
        if every or row["nominal"] != 0.1:
            named = [f"{row['effects_named'][x]:.0%}" for x in ("0.0", "0.01")]
            rows.append([*first, *without, f"{row['outside_mass']:.2f}", *named][: len(head)])
    if every:
        text = "*Named*: of all nodes with an effect, and of those with 1% of the strongest, the share that is named."
        return [_wrap(text), _table(head, rows)]
    plain, compiled = f["planted"], f["tracr"]
    text = (
        f"`tnc.stability(...).at_fdr(rate, null=...)` on {cases['planted']} chains of the planted circuits (RelP) and "
        f"{cases['tracr']} compiled programs (gradient), one question at a time, 64 pairs. Two truths: a node is "
        "*outside* if it is not one of the chain's heads and MLPs, or not on a path to the program's output; it has an "
        "*effect* if patching it alone, exactly, moves the metric. The last column counts effects under .1% of the "
        "strongest node's."
    )
    frequency = (
        f"Selection frequency: {plain['true_share_of_draws']:.0%} of a draw's 10 best nodes belong to the planted "
        f"chain, and {plain['core_true']:.1f} of the {plain['core']:.1f} nodes in nine draws out of ten (a node of the "
        f"chain is in {plain['mean_true']:.1%} of draws, another in {plain['mean_false']:.2%}); in compiled programs "
        f"{compiled['true_share_of_draws']:.0%} and {compiled['core_true']:.1f} of {compiled['core']:.1f}."
    )
    planted = [row for row in found["rates"] if row["kind"] == "planted"]
    outside = max(row["outside"] / row["nominal"] for row in planted)
    kept = all(row["without_effect"]["0.0"] <= row["nominal"] for row in found["rates"])
    broken = [row for row in found["rates"] if row["without_effect"]["0.0"] > row["nominal"]]
    worst = max(broken, key=lambda row: row["without_effect"]["0.0"]) if broken else None
    effects = (
        "by effect both nulls keep their rates in every row"
        if kept or worst is None
        else f"by effect they keep their rates in all except {len(broken)} of {len(found['rates'])} rows "
        f"({worst['kind']}, {worst['null']}: {worst['without_effect']['0.0']:.2f} at a nominal {worst['nominal']})"
    )
    after = (
        f"**Neither null bounds how many nodes lie outside a planted circuit** (up to {outside:.0f} times the nominal "
        f"share). These are not false alarms: {effects}. Training leaves heads and MLPs outside a chain with small "
        "effects "
        'of one sign, which a test of scores rightly finds. So `at_fdr` says "this score is no accident of the words"; '
        "faithfulness and completeness say whether it matters."
        if outside > 1.2
        else "Both nulls keep their rates here."
    )
    return [_wrap(text), _table(head, rows), _wrap(frequency), _wrap(after)]


def _reliability(rows: list[dict[str, float]] | None, *, every: bool = False) -> list[str]:
    if rows is None:
        return ["Not computed within the time."]
    names = ("first_order", "corrected", "trapezoid")
    head = ["ratio", "groups", "mean exact effect", "first order", "corrected", "trapezoid"]
    table = [
        [f"{r['low']:.2g} to {r['high']:.2g}", f"{r['groups']}", *(f"{r[n]:.3f}" for n in ("exact", *names))]
        for r in (rows if every else rows[1::4])
    ]
    text = (
        "All (layer, position) groups of SmolLM2's neurons on nounpp, 8 pairs, by decile of the ratio of second to "
        "first order (three deciles shown): mean |estimate - exact| in logits, exact by patching the group. Correction "
        "and trapezoid (gradients at both ends) cost the same."
    )
    middle = [r for r in rows if r["high"] >= 0.1 and r["low"] <= 1]
    after = ""
    if middle:
        count = sum(r["groups"] for r in middle)
        mean = {n: sum(r[n] * r["groups"] for r in middle) / count for n in names}
        verb = "lowers" if mean["corrected"] < mean["first_order"] else "does **not** lower"
        after = (
            f"Where the ratio is between .1 and 1, the correction {verb} the error: {mean['first_order']:.3f} at first "
            f"order, {mean['corrected']:.3f} corrected, {mean['trapezoid']:.3f} by the trapezoid."
        )
    return [_table(head, table)] if every else [_wrap(after), _wrap(text), _table(head, table)]


def _screened(found: dict[str, dict[str, float]]) -> list[str]:
    """What exact patching of the best nodes says of their scores."""
    if not found:
        return []
    head = ["task", "another sign", "more than twice off in size", "correlation"]
    table = [
        [NAMES[task], f"{row['other sign']}", f"{row['twice off']}", f"{row['correlation']:.2f}"]
        for task, row in found.items()
    ]
    text = "Single nodes can be patched instead (`evaluation.screen`). RelP's best 100 against their exact effects:"
    return [text, _table(head, table)]


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


def _short(row: dict[str, Any]) -> str:
    return f"{row['method']} by {SHORT[row['ranking']]}"


def _marked(row: dict[str, Any]) -> str:
    return row["method"] + (" *" if row.get("earlier") else "")


def _earlier(found: dict[str, Any]) -> str:
    """What the stars mean, if there are any."""
    rows = [row for model in found["models"].values() for row in model["equal"] if row.get("earlier")]
    names = {"known": "the known circuits' table", "reliability": "the table of groups"}
    parts = [names[part] for part in found.get("kept", [])]
    starred = ["rows with a star"] if rows else []
    kept = " and ".join([*starred, *parts])
    return f"From an earlier run of the same cells on the same pairs: {kept}. " if kept else ""


def _pairs(counts: dict[str, list[int]]) -> str:
    kinds = {task: "states" if task == "two_hop" else "couples of nouns" for task in TASKS}
    return ", ".join(f"{pairs} pairs of {n} {kinds[task]} ({NAMES[task]})" for task, (pairs, n) in counts.items())


def _interval(values: list[float] | None) -> str:
    return "" if values is None else f"{_bare(values[0])} [{_bare(values[1])}, {_bare(values[2])}]"


def _signed(values: list[float] | None) -> str:
    return "" if values is None else f"{_bare(values[0], '+')} [{_bare(values[1], '+')}, {_bare(values[2], '+')}]"


def _bare(value: float, sign: str = "") -> str:
    """Three decimals without the zero before the point, so that tables are narrow."""
    return f"{value:{sign}.3f}".replace("0.", ".", 1)


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
