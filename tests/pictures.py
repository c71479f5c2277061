"""Make the pictures of the README and the documentation: `python -m tests.pictures [name ...]`.

Needs `pip install -e ".[dev,pictures]"` and Chromium; those marked * need SmolLM2.

    circuit_page            docs/images/circuit_page.png            the page of the Dallas circuit
    agreement_smollm2*      docs/images/agreement_smollm2.png       the page of the walk-through's circuit
    circuit_page_deep*      docs/images/circuit_page_deep.png       the page of a circuit of many layers and tokens
    circuit_page_described* docs/images/circuit_page_described.png  the page of a circuit with labels
    notebook                docs/images/notebook.png                outputs of notebooks/01_quickstart.ipynb

They are screenshots of headless Chromium; look at them before you commit them.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbconvert
import nbformat
from playwright.sync_api import Page, sync_playwright

import tl_neuron_circuits as tnc
from tl_neuron_circuits.demo import capitals

from .evidence import descriptions, traces
from .notebooks import CHROMIUM, PLOTLY, ROOT, outputs

IMAGES = ROOT / "docs" / "images"
PROMPT = "The capital of the state containing Dallas is"
LONG_PROMPT = (
    "Alice has lived in Berlin for ten years and works as an engineer at a small company that builds bicycles. Her "
    "brother Tom moved from London to Madrid last spring because he wanted to learn Spanish and to be closer to the "
    "sea. When people ask Alice which city she lives in, she answers that she lives in"
)


def circuit_page(page: Page, scratch: Path) -> None:
    """The Dallas circuit, with the strongest neuron at the town selected."""
    model = tnc.load_demo_model()
    circuit = tnc.trace(model, PROMPT, " Austin")
    neurons = circuit.to_dataframe().query("kind == 'neuron'")
    town = neurons.query("position == 8")["node"]
    last = neurons.query("layer == 3")["node"]
    circuit = circuit.group({"state of the town": list(town), "say a capital": list(last)})
    prompts = capitals(n=256, phrasing=0).clean
    circuit.to_html(scratch / "circuit.html", details=tnc.node_details(model, circuit, prompts))
    page.set_viewport_size({"width": 1400, "height": 820})
    page.goto((scratch / "circuit.html").as_uri())
    page.click("#all-groups")
    page.locator(f'[data-key="{town.iloc[0]}"]').first.click()
    page.mouse.move(600, 20)
    page.wait_for_timeout(500)
    page.screenshot(path=IMAGES / "circuit_page.png")


def agreement_smollm2(page: Page, scratch: Path) -> None:
    """The circuit of docs/walk-through.md, in its groups."""
    model = traces.load("smollm2")
    _, train, _ = traces.walk_pairs(model)
    circuit = tnc.trace(model, train, nodes=150)
    named = traces.groups_of(model, circuit)
    circuit = circuit.group(named)
    circuit.to_html(scratch / "circuit.html", details=tnc.node_details(model, circuit, train.clean))
    page.set_viewport_size({"width": 1280, "height": 760})
    page.goto((scratch / "circuit.html").as_uri())
    page.wait_for_timeout(500)
    page.screenshot(path=IMAGES / "agreement_smollm2.png")


def circuit_page_deep(page: Page, scratch: Path) -> None:
    """300 neurons over 62 tokens, as the page opens."""
    model = traces.load("smollm2")
    _open(page, tnc.trace(model, LONG_PROMPT, " Berlin", nodes=300).describe(), scratch)
    page.screenshot(path=IMAGES / "circuit_page_deep.png")


def circuit_page_described(page: Page, scratch: Path) -> None:
    """Labels from 20,000 tokens of the prose that the evidence on labels is measured on, a labeled neuron selected."""
    model = traces.load("smollm2")
    circuit = tnc.trace(model, "When Mary and John went to the store, John gave a drink to", " Mary", nodes=300)
    texts, held_out, _ = descriptions.halves(model, 20_000)
    circuit = circuit.describe(texts, held_out=held_out)
    _open(page, circuit, scratch)
    shown = page.locator(".node").evaluate_all("nodes => nodes.map((node) => node.dataset.key)")
    neurons = circuit.to_dataframe().query("kind == 'neuron' and label != node")
    page.locator(f'.node[data-key="{neurons["node"][neurons["node"].isin(shown)].iloc[0]}"]').click()
    page.mouse.move(600, 20)
    page.wait_for_timeout(500)
    page.screenshot(path=IMAGES / "circuit_page_described.png")


def _open(page: Page, circuit: tnc.Circuit, scratch: Path) -> None:
    circuit.to_html(scratch / "circuit.html")
    page.set_viewport_size({"width": 1440, "height": 900})
    page.goto((scratch / "circuit.html").as_uri())
    page.wait_for_timeout(500)


def notebook(page: Page, scratch: Path) -> None:
    """Outputs of the first notebook: the map of the scores and the curve."""
    content = nbformat.read(ROOT / "notebooks" / "01_quickstart.ipynb", as_version=4)
    for output in outputs(content):
        output.get("data", {}).pop(PLOTLY, None)  # its script would come from the network; the picture stays
    html, _ = nbconvert.HTMLExporter().from_notebook_node(content)
    (scratch / "notebook.html").write_text(html, encoding="utf-8")
    page.set_viewport_size({"width": 960, "height": 1345})
    page.goto((scratch / "notebook.html").as_uri())
    page.get_by_text("3. Score every neuron").first.scroll_into_view_if_needed()
    page.evaluate("window.scrollBy(0, document.querySelectorAll('h2')[2].getBoundingClientRect().top - 20)")
    page.wait_for_timeout(500)
    page.screenshot(path=IMAGES / "notebook.png")


PICTURES: dict[str, Callable[[Page, Path], None]] = {
    "circuit_page": circuit_page,
    "agreement_smollm2": agreement_smollm2,
    "circuit_page_deep": circuit_page_deep,
    "circuit_page_described": circuit_page_described,
    "notebook": notebook,
}


def main(names: list[str]) -> None:
    """Make the pictures named, all of them without names."""
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as scratch:
        browser: Any = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name in names or PICTURES:
            PICTURES[name](browser.new_page(), Path(scratch))
            path = IMAGES / f"{name}.png"
            print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
