"""Run the notebooks as a reader would: `python -m tests.notebooks [01 ...]` runs them and stores what they show.

The cell that installs the package is skipped. What is stored has nothing of this machine in it, and every figure is
there both as plotly's own description and as a picture, which is what GitHub and Colab show.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbclient
import nbformat

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
INSTALL = "install"  # the tag of the cell with `%pip install`
PLOTLY = "application/vnd.plotly.v1+json"
CHROMIUM = "/usr/bin/chromium"
PICTURE = """figure => new Promise((done, failed) => {
  const { width = 900, height = 480 } = figure.layout;
  Plotly.toImage(figure, { format: "png", width, height }).then(done, failed);
})"""


def run(path: Path, directory: Path) -> Any:
    """The notebook with fresh outputs, run in `directory` with this copy of the package.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    skipped = [cell for cell in notebook.cells if INSTALL in cell.metadata.get("tags", [])]
    sources = [cell.source for cell in skipped]
    for cell in skipped:
        cell.source = ""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "PLOTLY_RENDERER": "plotly_mimetype",
        "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm, where no browser shows its bars
    }
    client = nbclient.NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(directory)}}
    )
    client.execute(env=environment)
    for cell, source in zip(skipped, sources, strict=True):
        cell.source = source
    return notebook


def outputs(notebook: Any) -> list[Any]:
    """Every output of every cell."""
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


_NOTES = ("flows to what was left out", "large parts of both signs cancel", "the model does not predict")  # by `trace`


def complaints(notebook: Any) -> list[str]:
    """What a reader should not see: errors, and anything on stderr but what `trace` notes about its circuit."""
    texts = [
        str(output.get("text", output.get("evalue")))
        for output in outputs(notebook)
        if output.output_type == "error" or (output.output_type == "stream" and output.name == "stderr")
    ]
    return [
        text for text in texts if not all(any(note in line for note in _NOTES) for line in text.strip().splitlines())
    ]


def tidy(notebook: Any) -> None:
    """Leave out what differs from run to run or from machine to machine."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    for output in outputs(notebook):
        output.get("data", {}).get(PLOTLY, {}).get("config", {}).pop("plotlyServerURL", None)


def add_pictures(notebook: Any) -> None:
    """Give every plotly figure a PNG beside its description."""
    import plotly.offline
    from playwright.sync_api import sync_playwright

    figures = [output.data for output in outputs(notebook) if PLOTLY in output.get("data", {})]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.add_script_tag(content=plotly.offline.get_plotlyjs())
        for data in figures:
            figure = json.loads(json.dumps(data[PLOTLY]))
            data["image/png"] = page.evaluate(PICTURE, figure).removeprefix("data:image/png;base64,")
        browser.close()


def main(names: list[str]) -> None:
    """Run the notebooks whose names begin so (all without names) and store their outputs."""
    for path in NOTEBOOKS:
        if names and not path.name.startswith(tuple(names)):
            continue
        with tempfile.TemporaryDirectory() as directory:
            notebook = run(path, Path(directory))
        if found := complaints(notebook):
            sys.exit(f"{path.name}: {found}")
        tidy(notebook)
        add_pictures(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
