"""Progress bars appear by themselves: after two seconds, where somebody watches."""

import io
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

import tl_neuron_circuits as tnc
from tests.loops import for_each
from tl_neuron_circuits import _progress
from tl_neuron_circuits._progress import progress, show_batches


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def watch(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal in stderr's place, whose bars wait a tenth of a second; pytest puts its own there before a test."""
    stderr = Terminal()
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(_progress, "_DELAY", 0.1)
    return stderr


def work(seconds: float, verbose: bool | None) -> None:
    for _ in progress(range(4), desc="work", verbose=verbose):
        time.sleep(seconds / 4)


def test_a_bar_appears_by_itself_after_the_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watch(monkeypatch)
    work(0.0, None)
    assert terminal.getvalue() == ""
    work(0.4, None)
    assert "work" in terminal.getvalue()


def test_no_bar_without_a_watcher_or_against_the_users_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watch(monkeypatch)
    work(0.4, False)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    work(0.4, None)
    assert terminal.getvalue() == ""
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    work(0.4, None)
    assert log.getvalue() == ""
    work(0.0, True)
    assert "4/4" in log.getvalue()


def test_batches_count_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watch(monkeypatch)
    assert list(show_batches([([0, 1], "a"), ([2], "b")], 3, desc="read", verbose=True)) == [([0, 1], "a"), ([2], "b")]
    assert "3/3" in terminal.getvalue()
    assert "prompt" in terminal.getvalue()


LABELS = ["L2/N5", "L3/N7"]


def train(model: Any, pairs: Any, verbose: bool | None) -> None:
    config = tnc.transcoders.TrainingConfig(layers=(0,), d_dict=8, k=2, steps=2, batch_size=8, buffer_size=16)
    tnc.transcoders.train(model, model.to_tokens(pairs.clean), config, verbose=verbose)


def measure_fidelity(model: Any, pairs: Any, verbose: bool | None) -> None:
    dictionaries, tokens = tnc.load_demo_dictionaries("sae")[:1], model.to_tokens(pairs.clean)
    tnc.transcoders.fidelity(model, dictionaries, tokens, baselines=False, verbose=verbose)


def patch(model: Any, pairs: Any, verbose: bool | None) -> None:
    nodes = tnc.attribute(model, pairs, verbose=False).top(2)
    tnc.attribute(model, pairs, method=tnc.Patching(nodes), verbose=verbose)


def draw_curve(model: Any, pairs: Any, verbose: bool | None) -> None:
    tnc.evaluate(model, pairs, tnc.attribute(model, pairs, verbose=False), sizes=[4], verbose=verbose)


def fit_lasso(model: Any, pairs: Any, verbose: bool | None) -> None:
    tnc.lasso.CircuitLasso(penalty=tnc.lasso.Share(0.5), nodes=tnc.bases.Neurons(layers=[3]), blocks=2).fit(
        model, pairs, verbose=verbose
    )


CALLS: dict[str, Callable[[Any, Any, bool | None], object]] = {
    "attribute": lambda m, p, v: tnc.attribute(m, p, verbose=v),
    "estimate_memory": lambda m, p, v: tnc.estimate_memory(m, p, verbose=v),
    "patching": patch,
    "evaluate": draw_curve,
    "compare": lambda m, p, v: tnc.compare(m, p, p, methods=["relp"], sizes=[4], bootstrap=1, verbose=v),
    "trace": lambda m, p, v: tnc.trace(m, p, nodes=3, verbose=v),
    "edges": lambda m, p, v: tnc.components.component_edges(m, p, method="eap", verbose=v),
    "steer": lambda m, p, v: tnc.steer(m, p.clean, LABELS, scale=0, verbose=v),
    "sweep": lambda m, p, v: tnc.sweep(m, p.clean, LABELS, scales=(0, 1), verbose=v),
    "examples": lambda m, p, v: tnc.max_activating_examples(m, p.clean, LABELS, verbose=v),
    "right": lambda m, p, v: p.where_model_is_right(m, verbose=v),
    "fidelity": measure_fidelity,
    "train": train,
    "lasso": fit_lasso,
}


@for_each("name", CALLS)
def test_a_long_call_shows_itself_and_is_silent_when_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[bool] = []

    def begin(bar: Any, *arguments: Any, disable: bool, **options: Any) -> None:
        shown.append(not disable)
        initialize(bar, *arguments, disable=True, **options)

    initialize = _progress.Bar.__init__
    monkeypatch.setattr(_progress.Bar, "__init__", begin)
    monkeypatch.setattr(_progress, "_watched", lambda: True)
    model, pairs = tnc.load_demo_model(), tnc.tasks.subject_verb_agreement("simple", n=4)
    CALLS[name](model, pairs, False)
    assert shown, f"{name} has no bar"
    assert not any(shown), f"{name} is not silent"
    CALLS[name](model, pairs, None)
    assert any(shown), f"{name} does not show itself"
