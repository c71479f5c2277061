"""Tables and the figure of docs/real-model.md, from docs/evidence/*.json alone.

`python -m tests.evidence.tables` writes them all again; each script does it for its own part with --update-docs.
"""

from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tests.evidence import cells, splits

IMAGE = cells.ROOT / "docs" / "images" / "real_model_curves.png"
STRUCTURES = list(splits.STRUCTURES)
BASES = {
    "neurons": "neurons", "mlp_outputs": "MLP outputs", "rotated": "neurons, randomly rotated",
    "pca": "neurons, PCA", "heads": "head outputs", "residual": "residual stream",
    "mean_difference": "difference of means (skyline)",
}  # fmt: skip
METHODS = {
    ("relp", "abs"): "RelP, four rules", ("relp", "signed"): "RelP, four rules, by score",
    ("relp3", "abs"): "RelP, three rules", ("atp", "abs"): "AtP", ("atp", "signed"): "AtP, by score",
    ("ig_inputs", "abs"): "IG over inputs", ("ig", "abs"): "IG, one layer at a time*",
    ("relp_few", "abs"): "RelP, four rules*", ("difference", "abs"): "activation difference",
    ("random", "abs"): "random",
}  # fmt: skip
CONTRASTS = {
    "neurons_relp_abs minus mlp_outputs_relp_abs": "**neurons minus MLP outputs** (primary)",
    "neurons_relp_abs minus rotated_relp_abs": "neurons minus rotated neurons",
    "neurons_relp_abs minus neurons_atp_abs": "RelP minus AtP",
    "neurons_relp_signed minus neurons_atp_signed": "RelP minus AtP, both by score",
    "neurons_relp_signed minus neurons_relp_abs": "RelP by score minus by |score|",
    "neurons_relp_abs minus neurons_relp3_abs": "RelP, four rules minus three",
    "neurons_relp_abs minus neurons_ig_inputs_abs": "RelP minus IG over inputs",
    "neurons_relp_abs minus pca_relp_abs": "neurons minus principal components",
    "neurons_relp_abs minus heads_relp_abs": "neurons minus head outputs",
    "neurons_relp_few_abs minus neurons_ig_abs": "RelP minus IG, one layer at a time*",
}
Json = dict[str, Any]


def at(curve: Json | None, key: str, size: int) -> float | None:
    """One number of a curve at a size; None where it was not measured."""
    if curve is None or size not in curve["sizes"]:
        return None
    return curve[key][curve["sizes"].index(size)]


def within(low_high: list[float]) -> str:
    """An interval."""
    return f"{low_high[0]:+.2f} to {low_high[1]:+.2f}"


def agreement_tables() -> dict[str, str]:
    """Everything about agreement."""
    found = cells.read_results("agreement")
    curves: Json = found["curves"]

    def per(name: str, key: str, size: int | None = None) -> list[Any]:
        each = [curves.get(f"{structure}_{name}") for structure in STRUCTURES]
        return [None if curve is None else curve[key] if size is None else at(curve, key, size) for curve in each]

    contrasts = []
    for key, title in CONTRASTS.items():
        row = found["contrasts"].get(key)
        if row is not None:
            by_name = row["structures"]
            each = [f"{by_name[name]['difference']:+.2f}" if name in by_name else None for name in STRUCTURES]
            title = (
                title.replace("*", f" ({found['settings']['ig pairs']} learning pairs)") if "_few_" in key else title
            )
            contrasts.append([title, *each, f"{row['mean']:+.2f}", within(row["interval"])])
    bases = [(name, title) for name, title in BASES.items() if any(per(f"{name}_relp_abs", "nodes"))]
    methods = [(f"neurons_{method}_{ranking}", title) for (method, ranking), title in METHODS.items()]
    methods = [(name, title) for name, title in methods if any(per(name, "nodes"))]
    variants = {
        "": "mean ablation, no BOS, right pairs", "_corrupt": "interchange", "_all": "all pairs", "_bos": "with BOS",
    }  # fmt: skip
    other = [(f"{basis}_relp_abs{kind}", f"{BASES[basis]}, {title}") for kind, title in variants.items()
             for basis in ("neurons", "mlp_outputs") if any(per(f"{basis}_relp_abs{kind}", "nodes"))]  # fmt: skip
    live = found["live"]
    draw_curves(curves)
    return {
        "agreement-contrasts": cells.table(["difference of E", *STRUCTURES, "mean", "95%"], contrasts),
        "agreement-bases": cells.table(
            ["basis, by RelP", *(f"{structure}: 10 / 100 / 1,000" for structure in STRUCTURES)],
            [[title, *(" / ".join(cells.show(value) for value in row) for row in zip(
                *(per(f"{name}_relp_abs", "faithfulness", size) for size in (10, 100, 1000)), strict=True))]
             for name, title in bases],
        ),
        "agreement-within": cells.table(
            ["stays within .2 of 1 from", *STRUCTURES],
            [[title, *per(f"{name}_relp_abs", "within .2 from")] for name, title in bases],
        ),
        "agreement-methods": cells.table(
            ["neurons, by |score| unless said", *(f"{structure}: 10 / 100 / E" for structure in STRUCTURES)],
            [[title, *(" / ".join(cells.show(value) for value in row) for row in zip(
                per(name, "faithfulness", 10), per(name, "faithfulness", 100), per(name, "error"), strict=True))]
             for name, title in methods],
        ),
        "agreement-completeness": cells.table(
            ["completeness (0 is ideal)", *(f"{structure}: 1 / 10 / 100" for structure in STRUCTURES)],
            [[title, *(" / ".join(cells.show(value) for value in row) for row in zip(
                *(per(name, "completeness", size) for size in (1, 10, 100)), strict=True))]
             for name, title in (
                 ("neurons_relp_abs", "neurons, RelP"), ("neurons_relp_signed", "neurons, RelP by score"),
                 ("neurons_atp_abs", "neurons, AtP"), ("mlp_outputs_relp_abs", "MLP outputs, RelP"),
                 ("rotated_relp_abs", "rotated neurons, RelP"))],
        ),
        "agreement-areas": cells.table(
            ["area of overshoot / signed / accuracy", *STRUCTURES],
            [[title, *(" / ".join(cells.show(value) for value in row) for row in zip(
                *(per(name, f"{what} area") for what in ("overshoot", "signed overshoot", "accuracy")), strict=True))]
             for name, title in [*((f"{name}_relp_abs", title) for name, title in bases),
                                 ("neurons_relp_signed", "neurons, by score")]],
        ),
        "agreement-raw": cells.table(
            ["logits", *(f"{structure}: F(M) / F(0) / right at F(0)" for structure in STRUCTURES)],
            [[title, *(" / ".join(cells.show(value) for value in row) for row in zip(
                per(name, "F(M)"), per(name, "F(0)"), per(name, "accuracy empty"), strict=True))]
             for name, title in other],
        ),
        "agreement-variants": cells.table(
            ["RelP by |score|", *(f"{structure}: 10 / 100 / 1,000" for structure in STRUCTURES)],
            [[title, *(" / ".join(cells.show(value) for value in row) for row in zip(
                *(per(name, "faithfulness", size) for size in (10, 100, 1000)), strict=True))]
             for name, title in other],
        ),
        "agreement-live": cells.table(
            ["neurons", *STRUCTURES],
            [
                ["nodes (layer, position, neuron)", *(live[structure]["nodes"] for structure in STRUCTURES)],
                ["live: score not zero", *(live[structure]["live"] for structure in STRUCTURES)],
                *([f"different neurons among the best {k:,}", *(live[structure]["unique"][str(k)] for structure in
                   STRUCTURES)] for k in (30, 100, 1000)),
                ["layers that hold one of the best 100",
                 *(len(live[structure]["layers of the best 100"]) for structure in STRUCTURES)],
            ],
        ),
    }  # fmt: skip


def flips_tables() -> dict[str, str]:
    """Everything about interchange in agreement."""
    found = cells.read_results("flips")
    get = lambda name, key: found.get(name, {}).get(key)  # noqa: E731
    verdict = {True: "yes", False: "**no**", None: "–"}
    return {
        "flips": cells.table(
            ["best 100 neurons", "flips, known verbs", "new verbs", "100 matched", "right number: before / after",
             "other number: before / after", "reproduced"],
            [[name, get(f"{name}-100", "flips, known verbs"), get(f"{name}-100", "flips, new verbs"),
              get(f"{name}-100-matched", "flips"),
              " / ".join(cells.show(get(f"{name}-100", f"right number {when}")) for when in ("before", "after")),
              " / ".join(cells.show(get(f"{name}-100", f"other number {when}")) for when in ("before", "after")),
              verdict[found["reproduced"].get(name)]] for name in STRUCTURES],
        ),
        "flips-sizes": cells.table(
            ["flips by the best", "10", "30", "100", "300", "100, by score"],
            [[name, *(get(f"{name}-{k}", "flips") for k in (10, 30, 100, 300)), get(f"{name}-100-signed", "flips")]
             for name in STRUCTURES],
        ),
        "flips-transfer": cells.table(
            ["flips: 100 neurons found on", *(f"on {name}" for name in STRUCTURES)],
            [*([one, *(get(f"transfer-{one}-{other}", "flips") for other in STRUCTURES)] for one in STRUCTURES),
             ["matched to the structure's own", *(get(f"transfer-{name}-matched", "flips") for name in STRUCTURES)]],
        ),
        "flips-shared": cells.table(
            ["neurons shared by the best 100", *STRUCTURES],
            [[one, *(found.get("shared", {}).get(one, {}).get(other) for other in STRUCTURES)] for one in STRUCTURES],
        ),
        "flips-neutral": cells.table(
            ["KL in nats, neurons at zero", "chosen", "matched", "random"],
            [[name, *(get(f"neutral-{name}-{what}", "mean kl") for what in ("chosen", "matched", "random"))]
             for name in STRUCTURES],
        ),
    }  # fmt: skip


def dictionary_tables() -> dict[str, str]:
    """Everything about dictionaries."""
    found = cells.read_results("dictionaries")
    curves: Json = found["curves"]
    layers = found["layers"]["layers"] if "layers" in found else []
    rows = []
    titles = {
        ("neurons", "all", "rank"): "neurons", ("mlp_outputs", "all", "rank"): "MLP outputs",
        **{(kind, "all", how): f"{'SAE' if kind == 'sae' else kind} features, errors {how}{'e' * (how == 'ablat')}"
           .replace("rank", "ranked").replace("keep", "kept").replace("ablate", "ablated")
           for kind in ("sae", "transcoder") for how in ("rank", "keep", "ablate")},
    }  # fmt: skip
    structures = [name for name in STRUCTURES if any(key.startswith(f"{name}_") for key in curves)]
    for (basis, share, how), title in titles.items():
        each = [curves.get(f"{structure}_{basis}_{share}_{how}") for structure in structures]
        if any(each):
            rows.append([title, *(" / ".join(cells.show(at(curve, "lift", size)) for size in (1, 10, 100, 1000))
                                  if curve else None for curve in each)])  # fmt: skip
    raw = []
    for structure in structures:
        curve = curves.get(f"{structure}_neurons_all_rank")
        if curve is not None:
            effect = curve["F(M)"] - curve["F(0)"]
            share = effect / (2 * curve["F(M)"])
            raw.append([structure, curve["F(M)"], curve["F(0)"], effect, share, "yes" if share >= 0.1 else "no"])
    training = []
    for kind in ("sae", "transcoder"):
        for share in ("quarter", "half", "all"):
            made, measured = found.get(f"training-{kind}-{share}"), found.get(f"fidelity-{kind}-{share}")
            if made is None:
                continue
            each = [row for row in measured or () if row["replacement"] == kind and row["layer"] != "all"]
            recovered = " / ".join(cells.show(row["recovered_mean"]) for row in each) or None
            fvu = " / ".join(cells.show(row["fvu"]) for row in each) or None
            dead = " / ".join(cells.show(row["dead_share"]) for row in each) or None
            lifts = [at(curves.get(f"{structure}_{kind}_{share}_rank"), "lift", 100) for structure in structures]
            on_pairs = [curves.get(f"{structure}_{kind}_{share}_rank") for structure in structures]
            unexplained = " / ".join(cells.show(sum(curve["unexplained"].values()) / max(1, len(curve["unexplained"])))
                                     for curve in on_pairs if curve) or None  # fmt: skip
            name = "SAE" if kind == "sae" else kind
            training.append([f"{name}, {share}", made["tokens"], round(made["cpu"]), recovered, fvu, dead, unexplained,
                             " / ".join(map(cells.show, lifts))])  # fmt: skip
    errors = []
    for kind in ("sae", "transcoder"):
        each = [found.get(f"errors-{structure}_{kind}_all_rank") for structure in structures]
        if any(each):
            errors.append(["SAE" if kind == "sae" else kind, *(
                f"{row['errors among the best 10']} / {row['errors among the best 100']}" if row else None
                for row in each)])  # fmt: skip
    return {
        "dictionaries-raw": cells.table(
            [f"layers {', '.join(map(str, layers))}", "F(M)", "F(0)", "effect", "share of clean minus corrupt",
             "a ratio is given"], raw,
        ),
        "dictionaries-lift": cells.table(
            ["F(C) - F(0) in logits, by RelP", *(f"{name}: 1 / 10 / 100 / 1,000" for name in structures)], rows,
        ),
        "dictionaries-training": cells.table(
            ["dictionary, tokens", "positions", "CPU s", "loss recovered", "FVU, text", "dead",
             f"FVU, prompts ({', '.join(structures)})", f"lift of 100 ({', '.join(structures)})"], training,
        ),
        "dictionaries-errors": cells.table(
            ["error nodes among the best 10 / 100", *structures], errors,
        ),
    }  # fmt: skip


def hops_tables() -> dict[str, str]:
    """Everything about cities."""
    found = cells.read_results("hops")
    curves: Json = found["curves"]
    titles = {
        "neurons_relp_abs": "RelP, four rules", "neurons_atp_abs": "AtP",
        "neurons_without attention_abs": "RelP without the attention rule",
        "neurons_without ln_abs": "RelP without the norm rule",
        "neurons_without half_abs": "RelP without the half rule",
        "neurons_without identity_abs": "RelP without the identity rule",
        "neurons_attention alone_abs": "the attention rule alone",
        "neurons_relp_signed": "RelP, by score", "neurons_atp_signed": "AtP, by score",
        "mlp_outputs_relp_abs": "MLP outputs, RelP", "mlp_outputs_atp_abs": "MLP outputs, AtP",
    }  # fmt: skip
    sizes = (30, 100, 300, 1000, 3000)

    def against(name: str) -> str | None:
        method = name.removeprefix("neurons_").removesuffix("_abs")
        key = "atp, by score minus relp, by score" if name == "neurons_atp_signed" else f"{method} minus relp"
        row = found["contrasts"].get(key) if name.startswith("neurons_") else None
        return row and f"{row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"

    conditions = ("another state", "another attribute", "same state", "matched neurons")
    rows = []
    for which, k in ((which, k) for which in ("", "later-") for k in (100, 300, 1000)):
        cell = [found.get(f"interchange-{which}{k}-{name}") for name in conditions]
        if any(cell):
            title = f"{k:,}" + (" after layer 0" if which else "")
            rows.append([title, *(None if c is None else " / ".join(map(cells.show, (
                c["shift"], c["other capital higher"]))) for c in cell)])  # fmt: skip
    steered = []
    for k in (100, 300, 1000):
        for times in (1, 2, 4):
            each = [found.get(f"steer-{k}-{times}{which}") for which in ("", "-matched")]
            if all(each):
                keys = ("target capital first of all capitals", "own capital first of all capitals", "kl")
                steered.append([f"{k:,}, {times} x", *(each[0][key] for key in keys), each[1][keys[0]]])
    placed = [[{"relp": "RelP, four rules", "atp": "AtP"}.get(method, "RelP without the attention rule"),
               *values.values()] for method, values in found.get("placed", {}).items()]  # fmt: skip
    heads = list(next(iter(found["placed"].values()))) if found.get("placed") else []
    placed = placed if heads else []
    chosen = found.get("chosen-100", {}).get("layers", {})
    return {
        "hops-rules": cells.table(
            ["faithfulness, neurons by |score|", *(f"{size:,}" for size in sizes), "E", "E minus RelP's"],
            [[title, *(at(curves[name], "faithfulness", size) for size in sizes), curves[name]["error"], against(name)]
             for name, title in titles.items() if name in curves],
        ),
        "hops-steering": cells.table(
            ["neurons after layer 0, times the way", "the other state's capital first", "its own first", "KL (nats)",
             "matched: the other state's first"], steered,
        ),
        "hops-placed": cells.table(["share of |score|", *heads], placed),
        "hops-interchange": cells.table(["best neurons at the city", *conditions], rows),
        "hops-layers": cells.table(
            ["layer", *chosen], [["neurons of the best 100 at the city", *chosen.values()]] if chosen else [],
        ),
    }  # fmt: skip


def other_tables() -> dict[str, str]:
    """Greater-than and IOI."""
    found = cells.read_results("other_tasks")
    rows = []
    for task in ("ioi", "greater_than"):
        for key, title in (("neurons_relp", "neurons, RelP"), ("neurons_gradient", "neurons, AtP"),
                           ("mlp_outputs_relp", "MLP outputs, RelP"), ("heads_relp", "head outputs, RelP"),
                           ("heads_gradient", "head outputs, AtP")):  # fmt: skip
            curve = found["curves"].get(f"{task}_{key}")
            if curve is not None:
                rows.append([f"{'IOI' if task == 'ioi' else 'greater-than'}: {title}",
                             *(at(curve, "faithfulness", size) for size in (10, 100, 1000, 3000)),
                             at(curve, "completeness", 100), curve["F(M)"], curve["F(0)"],
                             curve["accuracy empty"]])  # fmt: skip
    head = ["faithfulness", "10", "100", "1,000", "3,000", "completeness, 100", "F(M)", "F(0)", "right at F(0)"]
    return {"other-tasks": cells.table(head, rows)}


def draw_curves(curves: Json, path: Path = IMAGE) -> None:
    """Faithfulness by number of nodes, one panel per structure."""
    from tests.benchmarks.compare_bases import write_png

    colors = {"neurons": "#2a6fbb", "mlp_outputs": "#d9822b", "rotated": "#8e44ad", "pca": "#1a9850",
              "heads": "#b2182b", "residual": "#555555", "mean_difference": "#999999"}  # fmt: skip
    figure = make_subplots(1, 4, subplot_titles=STRUCTURES, shared_yaxes=True, horizontal_spacing=0.02)
    for column, structure in enumerate(STRUCTURES, 1):
        for basis, color in colors.items():
            curve = curves.get(f"{structure}_{basis}_relp_abs")
            if curve is None:
                continue
            line = {"color": color, "width": 3 if basis == "neurons" else 1.8,
                    "dash": "dot" if basis == "mean_difference" else "solid"}  # fmt: skip
            figure.add_trace(
                go.Scatter(x=curve["sizes"], y=curve["faithfulness"], mode="lines+markers", line=line,
                           marker={"size": 5}, name=BASES[basis], legendgroup=basis, showlegend=column == 1),
                1, column,
            )  # fmt: skip
        figure.add_hline(y=1, line={"color": "#bbbbbb", "width": 1}, row=1, col=column)  # pyright: ignore[reportArgumentType]
    figure.update_xaxes(type="log", title="nodes kept", dtick=1)
    figure.update_yaxes(range=[-0.3, 1.7])
    figure.update_yaxes(title="faithfulness", col=1)
    figure.update_layout(
        template="plotly_white", margin={"t": 40, "b": 10, "l": 60, "r": 10}, font={"size": 13},
        legend={"orientation": "h", "y": -0.22},
    )  # fmt: skip
    write_png(figure, path, 1200, 460)


def decided(low_high: list[float]) -> str:
    """What an interval of a difference of errors says of what is named first."""
    return "yes" if low_high[1] < 0 else "no, worse" if low_high[0] > 0 else "undecided"


def between(values: list[float | None]) -> str:
    """The smallest to the largest of what was measured."""
    there = [value for value in values if value is not None]
    low, high = cells.show(min(there)), cells.show(max(there))
    return low if low == high else f"{low} to {high}"


def in_short() -> dict[str, str]:
    """The questions of the page, their answers, and the figures that they rest on."""
    rows: list[list[Any]] = []
    agreement = cells.read_results("agreement")
    curves = agreement["curves"]

    def spread(key: str, size: int) -> str:
        each = [at(curves.get(f"{structure}_{key}"), "faithfulness", size) for structure in STRUCTURES]
        return between(each)

    for key, question, one, other in (
        ("neurons_relp_abs minus mlp_outputs_relp_abs", "Neurons sparser than MLPs?", "neurons", "MLPs"),
        ("neurons_relp_abs minus rotated_relp_abs", "Do their own axes matter?", "neurons", "rotated"),
        ("neurons_relp_abs minus neurons_atp_abs", "RelP better than AtP?", "RelP", "AtP"),
        ("neurons_relp_abs minus neurons_ig_inputs_abs", "... than IG over inputs?", "RelP", "IG over inputs"),
    ):
        row = agreement["contrasts"].get(key)
        if row is not None:
            first, second = key.split(" minus ")
            missing = len(STRUCTURES) - len(row["structures"])
            rows.append([question, decided(row["interval"]) + (f" (structures missing: {missing})" if missing else ""),
                         f"{one} {spread(first, 100)}, {other} {spread(second, 100)}; "
                         f"E {row['mean']:+.2f} ({within(row['interval'])})"])  # fmt: skip
    both = [(curves[f"{name}_neurons_relp_abs"], curves[f"{name}_heads_relp_abs"]) for name in STRUCTURES
            if f"{name}_heads_relp_abs" in curves]  # fmt: skip
    if both:
        lower = sum(neurons["error"] < heads["error"] for neurons, heads in both)
        rows.append(["Neurons sparser than heads?", f"in {lower} of {len(both)}",
                     "; ".join(f"{size} nodes: neurons {spread('neurons_relp_abs', size)}, heads "
                               f"{spread('heads_relp_abs', size)}" for size in (10, 100))])  # fmt: skip
    other = cells.read_results("other_tasks")["curves"] if (cells.RESULTS / "other_tasks.json").exists() else {}
    if {"ioi_neurons_relp", "ioi_heads_relp"} <= set(other):
        neurons, heads = other["ioi_neurons_relp"], other["ioi_heads_relp"]
        rows.append(["... on IOI?", "yes" if neurons["error"] < heads["error"] else "no",
                     f"neurons {cells.show(at(neurons, 'faithfulness', 100))}, heads "
                     f"{cells.show(at(heads, 'faithfulness', 100))}"])  # fmt: skip
    flips = cells.read_results("flips") if (cells.RESULTS / "flips.json").exists() else {}
    if flips.get("reproduced"):
        yes = [name for name, value in flips["reproduced"].items() if value]
        no = [name for name, value in flips["reproduced"].items() if not value]
        known, fresh, matched = (
            between([flips[f"{name}-100{kind}"][key] for name in flips["reproduced"]])
            for kind, key in (("", "flips, known verbs"), ("", "flips, new verbs"), ("-matched", "flips"))
        )
        rows.append(
            [
                "Do 100 control the answer?",
                f"in {len(yes)} of {len(yes) + len(no)}" + (f": not in {', '.join(no)}" if no else ""),
                f"answers flipped {known} (new verbs {fresh}), by matched neurons {matched}",
            ]
        )
    hops = cells.read_results("hops") if (cells.RESULTS / "hops.json").exists() else {}
    if "atp minus relp" in hops.get("contrasts", {}):
        relp, atp = (hops["curves"][f"neurons_{name}_abs"] for name in ("relp", "atp"))
        values = [f"{cells.show(at(relp, 'faithfulness', size))}, {cells.show(at(atp, 'faithfulness', size))}"
                  f" ({size:,} nodes)" for size in (100, 1000)]  # fmt: skip
        row = hops["contrasts"]["atp minus relp"]
        low_high = [-row["high"], -row["low"]]
        values.append(f"E {-row['difference']:+.2f} ({within(low_high)})")
        rows.append(["RelP over AtP, two hops?", decided(low_high), f"RelP, AtP: {'; '.join(values)}"])
    return {"in-short": cells.table(["question", "answer", "figures"], rows).replace("---: |", "--- |")}


def main() -> None:
    for make, name in ((agreement_tables, "agreement"), (flips_tables, "flips"), (dictionary_tables, "dictionaries"),
                       (hops_tables, "hops"), (other_tables, "other_tasks")):  # fmt: skip
        if (cells.RESULTS / f"{name}.json").exists():
            cells.update_page(make())
    cells.update_page(in_short())


if __name__ == "__main__":
    main()
