"""A browser that opens pages and reports every error and every request, and a real circuit."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tl_neuron_circuits import Circuit, load_demo_model, trace

PROMPT = "The capital of the state containing Dallas is"


@pytest.fixture(scope="session")
def dallas() -> Circuit:
    """Return the demo model's circuit for Austin."""
    return trace(load_demo_model(), PROMPT, " Austin", nodes=60)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Return a headless Chromium, or skip."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    path = os.environ.get("TNC_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium, or set TNC_CHROMIUM to its path)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Return a function that writes a circuit's page and opens it; at the end nothing must have gone wrong."""
    problems: list[str] = []
    context = chromium.new_context(viewport={"width": 1400, "height": 900}, color_scheme="light")

    def request(one: Any) -> None:
        if one.url != (tmp_path / "circuit.html").as_uri() and not one.url.startswith("data:"):
            problems.append(f"request: {one.url}")

    def opened(circuit: Circuit, **options: Any) -> Any:
        circuit.to_html(tmp_path / "circuit.html", **options)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("request", request)
        page.on("console", lambda message: problems.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.goto((tmp_path / "circuit.html").as_uri())
        page.wait_for_selector("#counts[data-nodes]")
        return page

    yield opened
    context.close()
    assert problems == []
