"""Every path beside what a user would pick instead: one table of ratios, each measured in one run.

    python -m tests.benchmarks [--rows relp curve ...] [--quick] [--json FILE] [--update-docs] [--note TEXT]

Each row runs in a process of its own: a warm-up, then work and reference in turn, CPU seconds of that process, so that
a busy machine slows both alike. Shown are the median of the rounds' ratios and their range. A ratio with a limit is
measured until the median's standard error is below 1%, for five rounds at least and four times the row's at most. Peaks
are resident memory above the model's (`VmHWM`, reset through /proc/self/clear_refs), measured in further processes, one
for each side, in which malloc gives freed blocks back; Linux only. `--update-docs` writes docs/benchmarks.json and
docs/benchmarks.md. Exit code 1 where a limit is exceeded (not with --quick).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import textwrap
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks.json"
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
_KEEP = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def measure(name: str, quick: bool) -> dict[str, Any]:
    """In this process: ratios of CPU seconds, round by round."""
    from tests.benchmarks.rows import ROWS

    row = ROWS[name]
    pair, ratios, seconds = row.build(quick), [], ([], [])
    most = 1 if quick else row.rounds if row.limit is None else max(5, 4 * row.rounds)
    for number in range(1 + most):
        if number > max(5, row.rounds) and _error_of_median(ratios) < 0.01:  # the spread of fewer says nothing
            break
        took = [0.0, 0.0]
        for side in (0, 1) if number % 2 else (1, 0):  # a machine that grows slower favors neither
            start = time.process_time()
            (pair.work, pair.reference)[side]()
            took[side] = time.process_time() - start
        if number:
            ratios.append(took[0] / max(took[1], 1e-9) / pair.per)
            for column, value in zip(seconds, took, strict=True):
                column.append(value)
    return {
        "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "rounds": len(ratios),
        "seconds": statistics.median(seconds[0]), "reference_seconds": statistics.median(seconds[1]), "note": pair.note,
    }  # fmt: skip


def _error_of_median(ratios: list[float]) -> float:
    """As a share of the median, from the median deviation: for normal noise 1.25 * 1.48 * MAD / sqrt(n)."""
    middle = statistics.median(ratios)
    spread = statistics.median(abs(ratio - middle) for ratio in ratios)
    return 1.25 * 1.48 * spread / len(ratios) ** 0.5 / middle


def peak(name: str, side: str, quick: bool) -> float:
    """In this process: megabytes above the model's of one side."""
    from tests.benchmarks.relp_cost import _status
    from tests.benchmarks.rows import ROWS

    pair = ROWS[name].build(quick)
    work = pair.work if side == "work" else pair.reference
    if name != "streaming":
        work()  # what is loaded and cached on first use
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / 1024


def child(options: argparse.Namespace, name: str, what: str) -> Any:
    """Measure in a process of its own.

    Raises:
        RuntimeError: with the last lines of what it said.
    """
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks", "--child", name, what]
    command += ["--threads", str(options.threads)] + (["--quick"] if options.quick else [])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(options.threads)}
    environment |= _KEEP if what == "time" else _GIVE_BACK
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"row {name} ({what}) failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All rows, and the machine they ran on. A row that fails is reported and does not stop the others."""
    from tests.benchmarks.rows import ROWS

    found: dict[str, Any] = {}
    for name in options.rows or list(ROWS):
        row = ROWS[name]
        try:
            result = child(options, name, "time")
            if row.memory and sys.platform == "linux":
                result["mb"], result["reference_mb"] = (child(options, name, side) for side in ("work", "reference"))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            result = {"error": str(error).splitlines()[-1]}
        found[name] = result | {"work": row.work, "reference": row.reference, "limit": row.limit,
                                "memory_limit": row.memory_limit}  # fmt: skip
        print(line(found[name]), flush=True)
    return {"machine": machine(options.threads), "quick": options.quick, "rows": found}


def machine(threads: int) -> dict[str, Any]:
    from tl_neuron_circuits._files import versions

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [
            text.split(":", 1)[1].strip() for text in info.read_text().splitlines() if text.startswith("model name")
        ]
        cpu = models[0] if models else cpu
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": threads, "system": platform.system(),
        "python": platform.python_version(), "date": f"{datetime.now(timezone.utc):%Y-%m-%d}", **versions(),
    }  # fmt: skip


COLUMNS = ("work", "compared with", "ratio", "range", "limit", "CPU s", "memory, MB", "memory ratio")
HEAD = "| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS)


def line(row: dict[str, Any]) -> str:
    """One row of the table, in Markdown."""
    if "error" in row:
        return f"| {row['work']} | {row['reference']} | failed: {row['error']} | | | | | |"
    work = row["work"] + (f" ({row['note']})" if row["note"] else "")
    numbers = f"{row['ratio']:.3g} | {row['low']:.3g} to {row['high']:.3g} | {row['limit'] or ''}"
    memory = share = ""
    if "mb" in row:
        memory = f"{row['mb']:.0f} / {row['reference_mb']:.0f}"
        share = f"{row['mb'] / max(row['reference_mb'], 1):.2f}"
        share += f" (limit {row['memory_limit']})" if row["memory_limit"] else ""
    seconds = f"{row['seconds']:.3g} / {row['reference_seconds']:.3g}"
    return f"| {work} | {row['reference']} | {numbers} | {seconds} | {memory} | {share} |"


def exceeded(results: dict[str, Any]) -> list[str]:
    """Rows that failed or are beyond a limit."""
    over = []
    for name, row in results["rows"].items():
        if "error" in row or (row["limit"] and row["ratio"] > row["limit"]):
            over.append(name)
        elif row.get("memory_limit") and "mb" in row and row["mb"] > row["memory_limit"] * row["reference_mb"]:
            over.append(f"{name} (memory)")
    return over


def page(results: dict[str, Any]) -> str:
    """docs/benchmarks.md, from the JSON alone."""
    m, over = results["machine"], exceeded(results)
    threads = f"{m['threads']} thread{'s' if m['threads'] > 1 else ''}"
    names = "; ".join(results["rows"][name.split()[0]]["work"] for name in over)
    verdict = f"Over their limit, or failed: {names}." if over else "Every limit is met."
    note = f" {results['note']}" if results.get("note") else ""
    paragraphs = [
        "# Benchmarks",
        "Each call alternates with a reference. Ratios of CPU seconds are medians, with the range over rounds; where "
        "there is a limit, over as many rounds as bring the median's standard error below 1%, at most 36. "
        f"{verdict}{note}",
        "CPU seconds and peak memory (above the model's) are given as call / reference. Models are demo-gelu or random "
        "ones of GPT-2's shape: 12 x 768 and 8 prompts of 32 tokens for RelP and `attribute`, 6 x 256 for integrated "
        "gradients, 12 x 256 for edges. What limits each call: "
        "[Save memory](how-to/large-models.md#what-each-call-costs).",
        f"{m['cpu']}, {threads} of {m['cores']} cores, {m['system']}, Python {m['python']}, torch {m['torch']}, "
        f"TransformerLens {m['transformer-lens']}, {m['date']}. Written by `python -m tests.benchmarks --update-docs` "
        "from [benchmarks.json](benchmarks.json).",
    ]
    wrapped = [textwrap.fill(text, 160, break_long_words=False, break_on_hyphens=False) for text in paragraphs]
    table = "\n".join([HEAD, *(line(row) for row in results["rows"].values())])
    return "\n\n".join([*wrapped, table]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", help="only these; an unknown name lists them all")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: does every row still run?")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    parser.add_argument("--update-docs", action="store_true", help="write docs/benchmarks.json and docs/benchmarks.md")
    parser.add_argument("--note", help="what to know of the machine, on the page")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        name, what = options.child
        print(json.dumps(measure(name, options.quick) if what == "time" else peak(name, what, options.quick)))
        return
    from tests.benchmarks.rows import ROWS

    if unknown := set(options.rows or ()) - set(ROWS):
        parser.error(f"no such rows: {sorted(unknown)}; there are {list(ROWS)}")
    print(HEAD)
    results = run(options) | ({"note": options.note} if options.note else {})
    for file in ([options.json] if options.json else []) + ([RESULTS] if options.update_docs else []):
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if options.update_docs:
        PAGE.write_text(page(results), encoding="utf-8")
    if over := exceeded(results):
        print("beyond their limit or failed: " + ", ".join(over), file=sys.stderr)
        raise SystemExit(any("error" in row for row in results["rows"].values()) or not options.quick)


if __name__ == "__main__":
    main()
