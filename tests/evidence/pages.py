"""Can circuits of a deep model be read and used in a browser? `python -m tests.evidence.pages`.

Nine circuits, five of SmolLM2 (one of 62 tokens, one of 1,000 neurons, one with labels and examples from `describe`)
and two of each demo model, are written as pages and opened in headless Chromium at two window sizes, light and dark; a
mouse and a keyboard use them. Measured are the file, the first paint, and the time from a mouse click to the next frame
(the browser's own event timing), in the view that the page opens with and with every node and edge of the file drawn.
Beside these stand the CPU time of all of the browser's processes, and that of the page's own thread at a click, which
does not grow when others use the machine. First paints and clicks are the best of up to five rounds, for the same
reason. Errors in the console end the run.

Writes `docs/evidence/pages.json` and the table of `docs/how-to/circuits.md`; `--tables` makes the table alone;
`--pictures FOLDER` also keeps screenshots of every page: as it opens, with its strongest node selected, with all drawn.
"""

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, CDPSession, Page, sync_playwright

import tl_neuron_circuits as tnc
from tests import smollm2
from tests.evidence.descriptions import halves
from tests.notebooks import CHROMIUM
from tests.real_models import boot_folder
from tl_neuron_circuits.plots._page import page_data

ROOT = Path(__file__).parents[2]
JSON, PAGE = ROOT / "docs" / "evidence" / "pages.json", ROOT / "docs" / "how-to" / "circuits.md"
SIZES, SCHEMES = ((1440, 900), (1280, 720)), ("light", "dark")
CLICKS, ROUNDS = 6, 5
QUICK_PAINT, QUICK_CLICK = 500, 32
"""Milliseconds after which no other round is made."""
TICK = 1000 / os.sysconf("SC_CLK_TCK")
DALLAS = "The capital of the state containing Dallas is"
BERLIN = (
    "Alice has lived in Berlin for ten years and works as an engineer at a small company that builds bicycles. Her "
    "brother Tom moved from London to Madrid last spring because he wanted to learn Spanish and to be closer to the "
    "sea. When people ask Alice which city she lives in, she answers that she lives in"
)
SMOLLM2 = {
    "paris": ("The capital of France is", " Paris", 150),
    "keys": ("The keys to the old wooden cabinet", " are", 300),
    "names": ("When Mary and John went to the store, John gave a drink to", " Mary", 300),
    "berlin": (BERLIN, " Berlin", 300),
    "thousand": (f"Fact: {DALLAS[0].lower()}{DALLAS[1:]}", " Austin", 1000),
}

DESCRIBED, DESCRIBED_TOKENS = "names", 10_000
"""The circuit whose neurons have labels and examples, out of texts of this many tokens."""

OUTSIDE = """() => {
    const view = document.getElementById("view").getBoundingClientRect();
    return [...document.querySelectorAll(".node .shape")].filter((one) => {
        const box = one.getBoundingClientRect();
        return box.left < view.left - 1 || box.right > view.right + 1
            || box.top < view.top - 1 || box.bottom > view.bottom + 1;
    }).length;
}"""
WATCH = """() => {
    window.clicks = [];
    new PerformanceObserver((list) => window.clicks.push(...list.getEntries().filter((one) => one.name === "click")))
        .observe({ type: "event", durationThreshold: 16, buffered: false });
}"""
FRAME = "() => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 60)))"


def circuits() -> Iterator[tuple[str, tnc.Circuit]]:
    """Names and circuits; each model lives until the next one is asked for, so that its pages have logit effects."""
    for name in ("demo-gelu", "demo-swiglu"):
        model = tnc.load_demo_model(name)
        yield f"{name}, capital", tnc.trace(model, DALLAS, " Austin", nodes=100)
        pairs = tnc.tasks.subject_verb_agreement("nounpp", n=64, seed=0)
        yield f"{name}, agreement", tnc.trace(model, pairs, nodes=100)
    folder = smollm2.prepared()
    if folder is None:
        raise SystemExit("SmolLM2 is not prepared: python -m tests.smollm2")
    model = boot_folder(folder)
    for name, (prompt, target, nodes) in SMOLLM2.items():
        circuit = tnc.trace(model, prompt, target, nodes=nodes)
        if name == DESCRIBED:
            texts = halves(model, DESCRIBED_TOKENS)
            circuit = circuit.describe(texts[0], held_out=texts[1], k=3)
            name = f"{name}, described"
        yield f"SmolLM2, {name}", circuit


def measure(pictures: Path | None) -> list[dict[str, Any]]:
    rows = []
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as scratch:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, circuit in circuits():
            path = Path(scratch) / "circuit.html"
            circuit.to_html(path)
            row: dict[str, Any] = {
                "circuit": name,
                "tokens": len(circuit.settings.get("tokens") or []),
                "layers": int(circuit.settings["n_layers"]),
                "nodes": len(circuit),
                "edges": len(circuit.edges),
                "kept": len(page_data(replace(circuit, traced=None))["edges"]["source"]),
                "megabytes": round(path.stat().st_size / 1e6, 2),
                "views": [],
            }
            for size in SIZES:
                for scheme in SCHEMES:
                    picture = pictures and pictures / f"{name.replace(', ', '_')}_{size[0]}_{scheme}.png"
                    row["views"].append(view(browser, path, size, scheme, picture))
            rows.append(row)
            print(json.dumps(row), flush=True)
        browser.close()
    return rows


def view(browser: Browser, path: Path, size: tuple[int, int], scheme: Any, picture: Path | None) -> dict[str, Any]:
    """Open the page, look, click and type; what was measured.

    Raises:
        SystemExit: the browser reported an error or a request, or the keyboard did not do what it should.
    """
    problems: list[str] = []
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)

    def opened() -> Page:
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_selector("#counts[data-nodes]")
        page.evaluate(FRAME)
        return page

    paints, work = [], []
    for _ in range(ROUNDS):
        begin = cpu()
        page = opened()
        work.append(since(begin))
        paints.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
        if min(paints) < QUICK_PAINT or len(paints) == ROUNDS:
            break
        page.close()
    counts = page.locator("#counts")
    found: dict[str, Any] = {
        "window": f"{size[0]} x {size[1]}",
        "colors": scheme,
        "first paint, ms": round(min(paints)),
        "open, CPU ms": round(min(work)),
        "opens on nodes": int(counts.get_attribute("data-nodes") or 0),
        "opens on edges": int(counts.get_attribute("data-edges") or 0),
        "nodes outside": page.evaluate(OUTSIDE),
        "captions": page.locator(".node:not(.pill) text").count(),
        "target shown": page.locator(".node.pill").count() > 0,
    }
    if picture is not None:
        page.screenshot(path=picture)
        page.keyboard.press("t")
        page.keyboard.press("ArrowDown")
        page.screenshot(path=picture.with_stem(picture.stem + "_node"))
        page.keyboard.press("Escape")
    page.evaluate(WATCH)
    thread = context.new_cdp_session(page)
    thread.send("Performance.enable", {"timeDomain": "threadTicks"})
    found["click, ms"] = clicks(page, thread)
    keyboard(page, problems)
    page.locator("#rest").check()
    for slider in ("node", "edge"):
        page.locator(f"#{slider}-slider").fill("100")
        page.evaluate(FRAME)
    page.keyboard.press("Escape")
    found["all: nodes"], found["all: edges"] = (int(counts.get_attribute(f"data-{a}") or 0) for a in ("nodes", "edges"))
    found["all: nodes outside"] = page.evaluate(OUTSIDE)
    found["all: click, ms"] = clicks(page, thread)
    if picture is not None:
        page.screenshot(path=picture.with_stem(picture.stem + "_all"))
    context.close()
    if problems:
        raise SystemExit(f"{path}: {problems}")
    return found


def clicks(page: Page, thread: CDPSession) -> dict[str, float]:
    """Milliseconds from a click with the mouse to the next frame, over nodes all over the graph: the best round."""
    rounds = []
    nodes = page.locator(".node .shape")
    step = max(1, nodes.count() // CLICKS)
    for _ in range(ROUNDS):
        page.evaluate("window.clicks.length = 0")
        work, own = [], []
        for index in range(0, nodes.count(), step):
            box = nodes.nth(index).bounding_box()
            assert box is not None
            begin, busy = cpu(), task(thread)
            page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            page.evaluate(FRAME)
            work.append(since(begin))
            own.append(task(thread) - busy)
        page.wait_for_timeout(100)
        # The browser reports no event below 16 ms.
        times = page.evaluate("window.clicks.map((one) => one.duration)") or [16]
        rounds.append(
            {
                "median": statistics.median(times), "largest": max(times), "CPU": round(statistics.median(work)),
                "thread": round(statistics.median(own)), "thread, largest": round(max(own)),
            }
        )  # fmt: skip
        page.keyboard.press("Escape")
        if rounds[-1]["median"] <= QUICK_CLICK:
            break
    return min(rounds, key=lambda one: one["median"])


def task(thread: CDPSession) -> float:
    """Milliseconds of CPU that the page's thread has used."""
    metrics = {one["name"]: one["value"] for one in thread.send("Performance.getMetrics")["metrics"]}
    return 1000 * metrics["TaskDuration"]


def since(begin: dict[int, float]) -> float:
    """Milliseconds of CPU that the processes below this one have used since then, but for those that have ended."""
    return sum(used - begin.get(pid, 0) for pid, used in cpu().items())


def cpu() -> dict[int, float]:
    """Milliseconds of CPU by process below this one: the browser's, with all of their threads, and its driver's."""
    parents: dict[int, int] = {}
    used: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            parents[int(entry.name)], used[int(entry.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
    below = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return {pid: TICK * used[pid] for pid in below & used.keys() - {os.getpid()}}


def keyboard(page: Page, problems: list[str]) -> None:
    """From the target down its strongest edge and on; fewer and more nodes; zoom and back."""
    focused: Callable[[], str] = lambda: page.evaluate("document.activeElement.dataset.key || ''")  # noqa: E731
    page.keyboard.press("Escape")
    page.keyboard.press("t")
    seen = [focused()]
    for key in ("ArrowDown", "ArrowRight", "ArrowUp"):
        page.keyboard.press(key)
        seen.append(focused())
    if not all(seen) or not seen[0].startswith("logit") or len(set(seen)) < 3:
        problems.append(f"arrows went {seen}")
    for key in ("]", "[", "+", "+", "0", "Escape"):
        page.keyboard.press(key)
    if page.locator(".node.selected").count() or page.evaluate(OUTSIDE):
        problems.append("the keyboard left a selection, or nodes outside the view")


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| circuit | tokens | nodes | edges (in the file) | MB | opens on | first paint | click (thread) | "
        "click, all drawn (thread) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        views = row["views"]
        opens = sorted({view["opens on nodes"] for view in views})
        times = []
        for name in ("click, ms", "all: click, ms"):
            medians = [view[name]["median"] for view in views]
            work = max(view[name]["thread, largest"] for view in views)
            times.append(f"{statistics.median(medians):.0f} / {max(medians):.0f} ({work})")
        lines.append(
            f"| {row['circuit']} | {row['tokens']} | {row['nodes']:,} | {row['edges']:,} ({row['kept']:,}) | "
            f"{row['megabytes']:.2f} | {' to '.join(map(str, dict.fromkeys((opens[0], opens[-1]))))} | "
            f"{max(view['first paint, ms'] for view in views)} | "
            f"{times[0]} | {times[1]} |"
        )
    return "\n".join(lines)


def write_table() -> None:
    found = json.loads(JSON.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    start, end = "<!-- table: tests.evidence.pages -->\n", "<!-- end of table -->"
    before, _, rest = text.partition(start)
    PAGE.write_text(f"{before}{start}\n{table(found['pages'])}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def main(arguments: list[str]) -> None:
    if "--tables" not in arguments:
        folder = Path(arguments[arguments.index("--pictures") + 1]) if "--pictures" in arguments else None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        rows = measure(folder)
        load = [round(one, 1) for one in os.getloadavg()]
        browser = "headless Chromium, software rendering"
        note = {"model": smollm2.LABEL, "cores": os.cpu_count(), "load": load, "browser": browser}
        JSON.parent.mkdir(parents=True, exist_ok=True)
        JSON.write_text(json.dumps({**note, "pages": rows}, indent=1) + "\n", encoding="utf-8")
    write_table()


if __name__ == "__main__":
    main(sys.argv[1:])
