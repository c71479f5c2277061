"""`--json`: every command prints what its schema says, no key more and none less."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

import tl_neuron_circuits as tnc
from tests.loops import for_each
from tests.test_cli import run
from tl_neuron_circuits.cli._app import COMMANDS
from tl_neuron_circuits.cli._outputs import OUTPUTS, SCHEMA, json_schema
from tl_neuron_circuits.tasks import subject_verb_agreement

jsonschema = pytest.importorskip("jsonschema", reason="it comes with nbformat")
PROMPT = "The capital of the state containing Dallas is"


def printed(command: str, *arguments: str | Path) -> dict[str, Any]:
    """What the command prints, after both checks."""
    code, out, err = run(command, *arguments, "--json")
    assert code == 0, err
    content = json.loads(out)
    assert (content["command"], content["schema"]) == (command, SCHEMA)
    jsonschema.validate(content, json_schema(command))
    read = msgspec.convert(content, OUTPUTS[command])
    assert msgspec.to_builtins(read) == content  # a key that no description has would be lost on the way
    return content


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pairs") / "pairs.json"
    subject_verb_agreement("simple", n=8).to_jsonl(file)
    return file


def test_every_command_but_schema_has_one() -> None:
    assert [command.__name__ for command in COMMANDS] == [*OUTPUTS, "schema"]


def test_the_page_lists_every_key() -> None:
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "command-line.md").read_text(encoding="utf-8")
    _, table = page.split("| command | keys besides `command` and `schema` |")
    listed = {cells[0]: set(cells[1:]) for cells in (re.findall(r"`(\w+)`", row) for row in table.split("\n")[2:10])}
    described = {name: set(json_schema(name)["$defs"][kind.__name__]["properties"]) for name, kind in OUTPUTS.items()}
    assert listed == {name: keys - {"command", "schema"} for name, keys in described.items()}


def test_scores_and_curves_conform(pairs: Path, tmp_path: Path) -> None:
    printed("check", "demo-gelu")
    content = printed("attribute", "demo-gelu", "--pairs", pairs, "--out", tmp_path / "scores", "--top", "3")
    assert len(content["nodes"]) == 3 and content["files"] == [str(tmp_path / "scores")]
    printed("attribute", "demo-gelu", "--pairs", pairs, "--positions", "sum")
    sizes = ("--size", "10", "--size", "30", "--method", "relp", "--basis", "neurons")
    printed("compare", "demo-gelu", "--pairs", pairs, "--evaluation-pairs", pairs, *sizes, "--out", tmp_path / "c")
    printed("export", tmp_path / "scores", "--out", tmp_path / "scores.csv")


def test_circuits_and_steering_conform(pairs: Path, tmp_path: Path) -> None:
    few = ("--nodes", "10", "--out", tmp_path / "t")
    assert printed("trace", "demo-gelu", PROMPT, *few)["prompts"] == []
    assert len(printed("trace", "demo-gelu", "The {a:dog} is", "The {a:old dog} is", *few)["prompts"]) == 2
    printed("export", tmp_path / "t", "--out", tmp_path / "t.html")
    printed("steer", "demo-gelu", PROMPT, "--node", "L0/N1", "--scale", "0", "--generate", "1")
    printed("steer", "demo-gelu", PROMPT, "--node", "L0/N1", "--scale", "0")
    few_regressors = ("--n-edges", "3", "--attention", "layers", "--regressors", "same")
    regressed = printed("lasso", "demo-gelu", "--pairs", pairs, *few_regressors, "--out", tmp_path / "l")
    assert 0 < len(regressed["edges"]) <= 3
    assert any("readout" in note for note in regressed["notes"]), "three edges of MLPs and heads do not reach it"


def test_the_demo_conforms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import pandas as pd

    class Result:
        report = tnc.check_model(tnc.load_demo_model())
        files = (tmp_path / "sparsity.html",)

        def table(self) -> pd.DataFrame:
            row = {"task": "agreement", "method": "relp", "size": 10, "faithfulness": 0.5, "completeness": float("nan")}
            return pd.DataFrame([row])

    monkeypatch.setattr("tl_neuron_circuits.demo._run.run_demo", lambda *_, **__: Result())
    assert printed("demo", "--out", tmp_path)["table"][0]["completeness"] is None


def test_trace_takes_pairs_dictionaries_and_a_mass(pairs: Path, tmp_path: Path) -> None:
    for sae in tnc.load_demo_dictionaries("sae"):
        tnc.save_dictionary(sae, tmp_path / "saes" / f"layer-{sae.layer}")
    call = ("demo-gelu", "--pairs", pairs, "--out", tmp_path / "t")
    of_neurons = printed("trace", *call, "--mass", "0.2")
    assert {"neuron"} <= {node["kind"] for node in of_neurons["nodes"]}
    traced = tnc.trace(tnc.load_demo_model(), tnc.PromptPairs.from_jsonl(pairs), nodes=tnc.ByMass(0.2))
    assert tnc.Circuit.load(tmp_path / "t" / "circuit").members == traced.members
    of_features = printed("trace", *call, "--dictionaries", tmp_path / "saes", "--share", "0.02")
    assert "feature" in {node["kind"] for node in of_features["nodes"]}


@for_each(
    ("options", "message"),
    [
        ((), "either PROMPT or --pairs; got neither"),
        ((PROMPT, "--pairs", "{pairs}"), "either PROMPT or --pairs; got both"),
        (("--pairs", "{pairs}", "--target", " is"), "no --target beside --pairs"),
        ((PROMPT, "--mass", "0.5", "--share", "0.1"), "got --share 0.1, --mass 0.5"),
        ((PROMPT, "--mass", "2"), "a mass above 0 and up to 1"),
        ((PROMPT, "--dictionaries", "no-such-folder"), "no-such-folder"),
    ],
)
def test_a_mistake_in_what_to_trace_is_exit_code_2(
    options: tuple[str, ...], message: str, pairs: Path, tmp_path: Path
) -> None:
    given = [option.format(pairs=pairs) for option in options]
    code, out, err = run("trace", "demo-gelu", *given, "--out", tmp_path / "t")
    assert code == 2 and message in " ".join(err.split()) and "Traceback" not in out + err, err


def test_schema_prints_what_is_checked() -> None:
    code, out, err = run("schema", "trace")
    assert code == 0 and json.loads(out) == json_schema("trace"), err
    jsonschema.Draft202012Validator.check_schema(json.loads(out))
    code, _, err = run("schema", "nothing")
    assert code == 2 and "expected a command out of demo, check" in " ".join(err.split())
