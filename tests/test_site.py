"""The documentation as built: `TNC_SITE=folder pytest tests/test_site.py` after `mkdocs build --site-dir folder`."""

import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.notebooks import CHROMIUM

SITE = os.environ.get("TNC_SITE", "")
pytestmark = pytest.mark.skipif(
    not SITE or not Path(CHROMIUM).exists(), reason="needs a built site (TNC_SITE) and Chromium"
)
WIDE = """[...document.querySelectorAll('.md-typeset__scrollwrap, .md-content .language-bash pre > code')]
  .filter(box => box.scrollWidth > box.clientWidth + 1).map(box => box.innerText.slice(0, 60))"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_search_finds_what_people_ask(address: str, browser) -> None:
    expected = {
        "cite": "cite/",
        "chat template": "how-to/chat-models/",
        "GPU": "how-to/gpu/",
        "steer": "how-to/steering/",
    }
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    for query, where in expected.items():
        page.goto(address)
        page.fill(".md-search__input", query)
        page.wait_for_selector(".md-search-result__link")
        links = page.eval_on_selector_all(".md-search-result__link", "links => links.map(link => link.href)")
        first = list(dict.fromkeys(link.partition("#")[0].partition("?")[0] for link in links))[:3]
        assert f"{address}{where}" in first, (query, first)
    page.close()


def test_tables_and_commands_fit_at_1280_pixels(address: str, browser) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    wide = {}
    for file in sorted(Path(SITE).rglob("index.html")):
        name = file.relative_to(SITE).parent.as_posix()
        page.goto(f"{address}{name}/")
        if found := page.evaluate(WIDE):
            wide[name] = found
    page.close()
    assert wide == {}
