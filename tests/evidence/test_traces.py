"""The page shows the file of results, whole."""

import json

from tests.evidence import traces


def test_the_walks_tables_are_those_of_its_results() -> None:
    page, results = traces.PAGE.read_text(encoding="utf-8"), json.loads(traces.RESULTS.read_text(encoding="utf-8"))
    assert traces.fill(page, results) == page
    assert set(traces.MODELS) <= set(results) and all(len(results[name]) == 5 for name in traces.MODELS)
    results["walk"]["flips"]["noun, early donor"] -= 0.1
    assert traces.fill(page, results) != page
