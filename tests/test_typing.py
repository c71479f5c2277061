"""A public call that gets a wrong name, type or shape says so in one line: what is expected, and what came."""
# pyright: reportArgumentType=false, reportCallIssue=false

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tl_neuron_circuits as tnc
from tests.loops import for_each
from tl_neuron_circuits._renamed import RENAMED_ARGUMENTS
from tl_neuron_circuits._typing import ArgumentError

ROOT = Path(__file__).parents[1]
MODEL = tnc.load_demo_model()
PAIRS = tnc.tasks.subject_verb_agreement("simple", n=2)
Wrong = Callable[[], Any]


@for_each(
    ("call", "message"),
    [
        (lambda: tnc.attribute(torch.nn.Linear(2, 2), PAIRS), "attribute: expected model to be a TransformerLens"),
        (lambda: tnc.attribute(MODEL, PAIRS, batch_size="8"), "attribute: expected batch_size to be int or Literal"),
        (lambda: tnc.attribute(MODEL, PAIRS, batch_size=True), "to be int or Literal['auto']; got True, a bool."),
        (lambda: tnc.attribute(MODEL, PAIRS, basis=MODEL), f"got a {type(MODEL).__name__}."),
        (lambda: tnc.attribute(MODEL), "attribute: missing a required argument: 'pairs'."),
        (lambda: tnc.attribute(MODEL, PAIRS, batchsize=8), "has no argument 'batchsize'; did you mean 'batch_size'?"),
        (lambda: tnc.attribute(MODEL, PAIRS, steps=8), "write the method's own option, as in method=tnc.Integrated"),
        (lambda: tnc.estimate_memory(MODEL, PAIRS, steps=8), "attribute has no argument 'steps' any longer"),
        (lambda: tnc.evaluate(MODEL, PAIRS, None, error="nodes"), "any longer: write error_nodes=\"rank\""),
        (lambda: tnc.lasso.CircuitLasso(share=0.2), "write penalty=tnc.lasso.Share(0.2); see docs/migration.md."),
        (lambda: tnc.IntegratedGradients(steps="8"), "IntegratedGradients: expected steps to be int; got '8', a str."),
        (lambda: tnc.transcoders.TrainingConfig(k=2.5), "TrainingConfig: expected k to be int; got 2.5, a float."),
        (
            lambda: tnc.tasks.logit_difference(torch.zeros(3, 4), None),
            "to be Float[Tensor, 'batch pos d_vocab']; got a Tensor of torch.float32 with shape [3, 4].",
        ),
        (lambda: tnc.sweep(MODEL, "a", ["L0/N1"], scales="12"), "expected scales to be Sequence[int | float]; got"),
    ],
)  # fmt: skip
def test_the_argument_is_named_in_one_line(call: Wrong, message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        call()
    text = str(error.value)
    assert message in text and "\n" not in text and len(text) < 300
    assert isinstance(error.value, TypeError) and "._" not in text, "no private modules"


def test_sizes_that_two_arguments_share_are_compared() -> None:
    with pytest.raises(ArgumentError, match="expected reconstruction to be .*with shape \\[3, 2\\]"):
        tnc.bases.fraction_variance_unexplained(torch.zeros(4, 2), torch.zeros(3, 2))


def test_arguments_that_were_renamed_are_on_the_migration_page() -> None:
    page = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    for function, argument in RENAMED_ARGUMENTS:
        assert re.search(rf"`?{function}\b.*{argument}=", page), (function, argument)


@for_each(("room", "old", "new"), [("", "transplant", "interchange"), (".tasks", "tokenise", "tasks.tokenize")])
def test_importing_an_old_name_says_the_new_one(room: str, old: str, new: str) -> None:
    script = f"from tl_neuron_circuits{room} import {old}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(rf"ImportError: tnc\..*{old} was renamed to tnc\.{new}", last)
    assert not hasattr(tnc, "transplant")


def test_the_command_line_prints_no_page(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from tl_neuron_circuits.cli import _scores, main

    module = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(50)))
    monkeypatch.setattr(_scores, "load_model", lambda *args: module)
    with pytest.raises(SystemExit) as ended:
        main(["check", "any"])
    assert ended.value.code == 2
    assert len(capfd.readouterr().err.strip().splitlines()) == 1
