"""`steer`, `lasso` and `export`, as a person uses them: tables, files, JSON, messages."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

import tl_neuron_circuits as tnc
from tests.loops import for_each
from tests.test_cli import agreement_pairs, run
from tl_neuron_circuits import Circuit
from tl_neuron_circuits.cli._inputs import read_inputs
from tl_neuron_circuits.cli._terminal import in_options, show
from tl_neuron_circuits.tasks import subject_verb_agreement

PROMPT = "The capital of the state containing Dallas is"
N_NODES = 30


@pytest.fixture(scope="module")
def dallas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `trace` writes, with a group."""
    out = tmp_path_factory.mktemp("dallas")
    circuit = tnc.trace(tnc.load_demo_model(), PROMPT, " Austin", nodes=N_NODES)
    names = list(circuit.members)
    circuit.group({"first": names[:2], "second": names[2:5]}).save(out / "circuit")
    return out


def test_trace_takes_several_prompts_and_writes_what_each_adds(tmp_path: Path) -> None:
    prompts = ["The {subject:dogs near the cat} are", "The {subject:dogs} are"]
    options = ["--target", " old", "--target", " here", "--nodes", "12", "--selection", "union", "--json"]
    code, out, err = run("trace", "demo-gelu", *prompts, *options, "--out", tmp_path)
    assert code == 0, err
    content = json.loads(out)
    assert [one["target"].strip() for one in content["prompts"]] == ["old", "here"]
    assert content["spans"][0]["span"] == "subject" and (tmp_path / "neuronpedia.json").exists()
    table = pd.read_csv(tmp_path / "by_prompt.csv")
    assert set(table["prompt"]) == {0, 1} and Circuit.load(tmp_path / "circuit").by_prompt is not None
    summed = ["--positions", "sum", "--nodes", "5", "--out", tmp_path / "summed"]
    code, out, err = run("trace", "demo-gelu", "The dogs near the cat", "The dogs", *summed)
    assert code == 0 and "what the model says on each prompt" in " ".join(out.split()), err
    assert not (tmp_path / "summed" / "neuronpedia.json").exists()


MESSY = [  # two answers of several tokens, one pair of unequal lengths, two that fit as they are
    ("The cat", "The cats", " is near", " are near"),
    ("The cats", "The cat", " are near", " is near"),
    ("The cat near it", "The cats", " is", " are"),
    ("The dog", "The dogs", " is", " are"),
    ("The dogs", "The dog", " are", " is"),
]


@for_each(
    ("command", "options"),
    [("attribute", ()), ("trace", ("--nodes", "5")), ("compare", ("--method", "relp", "--size", "10"))],
)
def test_pairs_that_do_not_fit_are_refused_or_left_out(command: str, options: tuple[str, ...], tmp_path: Path) -> None:
    fields = ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer")
    lines = [json.dumps(dict(zip(fields, row, strict=True))) for row in MESSY]
    (tmp_path / "messy.json").write_text("\n".join(lines), encoding="utf-8")
    call = [command, "demo-gelu", "--pairs", tmp_path / "messy.json", "--out", tmp_path / "out", "--json", *options]
    code, out, err = run(*call)
    assert (code, out) == (2, "") and "--keep-fitting" in err and "keep_fitting(" not in err
    assert "--multi-token first_difference takes the first that differs" in err
    code, out, err = run(*call, "--keep-fitting", "--multi-token", "first_difference")
    assert code == 0 and json.loads(out)["command"] == command, err
    assert "4 of 5 qualified (80%), left out 1 with clean and corrupt of different lengths" in err
    code, _, err = run(*call, "--multi-token", "some")
    assert code == 2 and "expected --multi-token error or first_difference; got 'some'" in err


def test_pairs_are_put_into_chats_without_bos_and_where_the_model_is_right(tmp_path: Path) -> None:
    file = agreement_pairs(tmp_path)
    call = ["attribute", "demo-gelu", "--pairs", file, "--json", "--top", "1000000"]
    code, plain, err = run(*call)
    without, right = run(*call, "--no-bos"), run(*call, "--where-right")
    assert (code, without[0], right[0]) == (0, 0, 0), (err, without[2], right[2])
    model, pairs = tnc.load_demo_model(), tnc.PromptPairs.from_jsonl(file)
    expected = tnc.attribute(model, tnc.tasks.tokenize(model, pairs, prepend_bos=False)).top(10)
    assert [row["label"] for row in json.loads(without[1])["nodes"][:10]] == expected["label"].tolist()
    assert "--where-right: 8 of 8 qualified (100%)" in right[2] and json.loads(right[1]) == json.loads(plain)
    code, out, err = run("trace", "demo-gelu", PROMPT, "--no-bos", "--nodes", "5", "--out", tmp_path / "out")
    assert code == 0 and Circuit.load(tmp_path / "out" / "circuit").settings["tokens"][0] != "<bos>", err
    code, out, err = run("steer", "demo-gelu", PROMPT, "--no-bos", "--node", "L0/N5", "--scale", "1", "--json")
    assert code == 0 and json.loads(out)["tokens"][0].strip() == "The", err
    for options, message in (
        (("--message", "Say it."), "expected --chat beside --message"),
        (("--answer-start", "So"), "expected --chat beside --answer-start"),
        (("--chat", "--no-bos"), "expected no --no-bos beside --chat"),
        (("--where-right", "--multi-token", "first_difference"), "expected --where-right without --multi-token"),
    ):
        code, out, err = run(*call, *options)
        assert (code, out) == (2, "") and message in err


def test_left_out_pairs_change_nothing_for_the_others(tmp_path: Path) -> None:
    fields = ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer")
    lines = [json.dumps(dict(zip(fields, row, strict=True))) for row in MESSY]
    tops = []
    for kept, options in ((lines, ["--keep-fitting"]), (lines[3:], [])):
        (tmp_path / "pairs.json").write_text("\n".join(kept), encoding="utf-8")
        code, out, err = run("attribute", "demo-gelu", "--pairs", tmp_path / "pairs.json", "--json", *options)
        assert code == 0, err
        tops.append(json.loads(out)["nodes"])
    assert tops[0] == tops[1]


def test_trace_chooses_as_many_nodes_as_explain_a_share(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("The dogs near the girl are old.\nThe dog is here.\n", encoding="utf-8")
    call = ["trace", "demo-gelu", PROMPT, "--target", " Austin", "--out", tmp_path / "out", "--json"]
    code, out, err = run(*call, "--explained", "0.5", "--reference", tmp_path / "texts.txt")
    assert code == 0, err
    assert 0.5 <= json.loads(out)["explained"]["share"] <= 1.5
    for options, message in (
        (("--explained", "0.5"), "--explained and --reference together"),
        (("--reference", tmp_path / "texts.txt"), "--explained and --reference together"),
        (("--explained", "0.5", "--nodes", "20", "--reference", tmp_path / "texts.txt"), "either --nodes or"),
        (("--explained", "2", "--reference", tmp_path / "texts.txt"), "share between 0 and 1"),
        (("--positions", "some"), "--positions keep or sum"),
        (("--keep-fitting",), "expected --pairs beside --keep-fitting"),
    ):
        code, out, err = run(*call, *options)
        assert code == 2 and message in " ".join(err.split()) and "Traceback" not in out + err, err


def test_steer_says_what_the_python_call_says() -> None:
    code, out, err = run(
        "steer", "demo-gelu", PROMPT, "--node", "L0/N126", "--node", "L0/N26@9", "--scale", "-2", "--json"
    )
    assert code == 0, err
    content = json.loads(out)
    result = tnc.steer(tnc.load_demo_model(), PROMPT, ["L0/N126", "L0/N26@9"], scale=-2.0)
    assert content["kl"] == pytest.approx(float(result.kl[0]), rel=1e-4)
    assert content["top_after"] == result.top_after[0] and content["nodes"] == ["L0/N126", "L0/N26@9"]
    assert "".join(content["tokens"]).endswith(" is") and len(content["table"]) == len(result.to_dataframe())


def test_steer_shows_tokens_with_their_positions_and_the_next_ones(dallas: Path) -> None:
    call = ["steer", "demo-gelu", PROMPT, "--circuit", dallas, "--scale", "0", "--generate", "2", "--top", "3"]
    code, out, err = run(*call)
    assert code == 0, err
    assert "9:' is'" in out and "continued after:" in out and f"nodes steered: {N_NODES}" in " ".join(out.split())
    assert out.count("\n│") <= 6


@pytest.mark.parametrize("collapsed", [False, True])
def test_steer_takes_groups_of_a_circuit(dallas: Path, tmp_path: Path, collapsed: bool) -> None:
    circuit = Circuit.load(dallas / "circuit")
    (circuit.collapse() if collapsed else circuit).save(tmp_path / "circuit")
    call = ["steer", "demo-gelu", PROMPT, "--circuit", tmp_path / "circuit", "--group", "second", "--value", "0"]
    first = circuit.nodes.loc[circuit.nodes["group"] == "first", "node"]
    call += ["--watch", "second", "--watch", f"mine={','.join(first)}"]
    code, out, err = run(*call, "--json")
    assert code == 0, err
    members = circuit.nodes.loc[circuit.nodes["group"] == "second", "node"]
    assert set(json.loads(out)["nodes"]) == set(members) and len(members) == 3
    read = {"second": list(members), "mine": list(first)}
    changes = tnc.steer(tnc.load_demo_model(), PROMPT, list(members), value=0.0, watch=read).watched
    expected = {name: pytest.approx(float(change[0]), abs=1e-6) for name, change in changes.items()}
    assert json.loads(out)["watched"] == expected and expected["second"] == -1
    if not collapsed:
        assert "watched; -1: gone" in run(*call)[1]


@for_each(
    ("options", "message"),
    [
        ((), "either --node"),
        (("--node", "L0/N1"), "exactly one of scale, value and add"),
        (("--node", "L0/N1", "--scale", "0", "--add", "1"), "exactly one of scale, value and add"),
        (("--node", "L0/N99999", "--scale", "0"), "expected units below 512"),
        (("--node", "neuron five", "--scale", "0"), "neuron five"),
        (("--node", "L0/N1", "--scale", "0", "--positions", "3;4"), "such as 3,7"),
        (("--node", "L0/N1", "--scale", "0", "--positions", "3,77"), "expected positions below 10"),
        (("--node", "L0/N1", "--scale", "much"), "--scale"),
        (("--node", "L0/N1", "--scale", "0", "--group", "first"), "--circuit beside --group"),
        (("--circuit", "no-such-folder", "--scale", "0"), "no such folder"),
        (("--circuit", "{dallas}", "--group", "third", "--scale", "0"), "['first', 'second']"),
        (("--circuit", "{dallas}", "--watch", "third", "--scale", "0"), "['first', 'second']"),
        (("--node", "L0/N1", "--watch", "third", "--scale", "0"), "or a group of --circuit"),
        (("--node", "L0/N1", "--scale", "0", "--dtype", "float8"), "expected --dtype out of"),
        (("--node", "L0/N1", "--scale", "0", "--device", "abacus"), "expected a --device"),
    ],
)
def test_a_mistake_in_steer_is_one_message_and_exit_code_2(
    dallas: Path, options: tuple[str, ...], message: str
) -> None:
    code, out, err = run("steer", "demo-gelu", PROMPT, *(option.format(dallas=dallas) for option in options))
    assert code == 2 and message in " ".join(err.split()) and "Traceback" not in out + err, err


def test_lasso_writes_edges_circuit_and_page(tmp_path: Path) -> None:
    pairs = subject_verb_agreement("simple", n=16)
    pairs.to_jsonl(tmp_path / "pairs.jsonl")
    (tmp_path / "prompts.txt").write_text("\n".join(pairs.clean) + "\n\n", encoding="utf-8")
    options = ["--attention", "layers", "--regressors", "same", "--share", "0.9", "--out", tmp_path / "out"]
    code, out, err = run("lasso", "demo-gelu", "--pairs", tmp_path / "pairs.jsonl", *options)
    assert code == 0, err
    edges = pd.read_csv(tmp_path / "out" / "edges.csv")
    assert len(edges) > 5 and "LassoCircuit" in out and "logits" in set(edges["target"])
    assert len(Circuit.load(tmp_path / "out" / "circuit").edges) == len(edges)
    assert "<svg" in (tmp_path / "out" / "circuit.html").read_text(encoding="utf-8")
    assert read_inputs(None, tmp_path / "prompts.txt") == list(pairs.clean)


def test_a_mistake_in_lasso_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n", encoding="utf-8")
    (tmp_path / "ok.txt").write_text("The dog", encoding="utf-8")
    latin.write_bytes("Zürich".encode("latin-1"))
    for options, message in (
        ((), "either --pairs or --prompts"),
        (("--prompts", empty), "it is empty"),
        (("--prompts", latin), "UTF-8 text"),
        (("--prompts", tmp_path / "missing.txt"), "missing.txt"),
        (("--prompts", empty, "--n-edges", "0"), "--n-edges"),
        (("--prompts", latin.with_name("ok.txt"), "--n-edges", "3", "--share", "0.5"), "share"),
    ):
        code, out, err = run("lasso", "demo-gelu", *options, "--out", tmp_path / "out")
        assert code == 2 and message in " ".join(err.split()) and "Traceback" not in out + err, err


def test_export_writes_a_circuit_in_three_formats(dallas: Path, tmp_path: Path) -> None:
    circuit = Circuit.load(dallas / "circuit")
    code, out, err = run("export", dallas, "--out", tmp_path / "new" / "nodes.csv")
    assert code == 0 and "nodes_edges.csv" in out, err
    assert len(pd.read_csv(tmp_path / "new" / "nodes.csv")) == len(circuit.nodes)
    assert len(pd.read_csv(tmp_path / "new" / "nodes_edges.csv")) == len(circuit.edges)
    code, out, err = run(
        "export", dallas, "--out", tmp_path / "graph.json", "--scan", "demo", "--slug", "dallas", "--json"
    )
    assert code == 0 and json.loads(out)["format"] == "neuronpedia", err
    graph = json.loads((tmp_path / "graph.json").read_text(encoding="utf-8"))
    assert graph["metadata"]["scan"] == "demo" and graph["metadata"]["slug"] == "dallas"
    assert Circuit.from_neuronpedia(tmp_path / "graph.json").members == circuit.members
    code, _, err = run("export", dallas / "circuit", "--out", tmp_path / "page", "--format", "html")
    assert code == 0 and "<svg" in (tmp_path / "page").read_text(encoding="utf-8"), err


def test_export_writes_scores_and_refuses_what_they_have_not(tmp_path: Path) -> None:
    scores = tnc.attribute(tnc.load_demo_model(), subject_verb_agreement("simple", n=4))
    scores.save(tmp_path / "scores")
    code, _, err = run("export", tmp_path / "scores", "--out", tmp_path / "all.csv")
    assert code == 0 and len(pd.read_csv(tmp_path / "all.csv")) == len(scores), err
    code, _, err = run("export", tmp_path / "scores", "--out", tmp_path / "best.html", "--top", "7")
    assert code == 0, err
    page = (tmp_path / "best.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and page.count("<tr>") == 8
    for out, options, message in (
        ("graph.json", (), "Run trace"),
        ("page.pdf", (), "got the name 'page.pdf'"),
        ("page.html", ("--format", "pdf"), "got pdf"),
    ):
        code, _, err = run("export", tmp_path / "scores", "--out", tmp_path / out, *options)
        assert code == 2 and message in " ".join(err.split()), err
    code, _, err = run("export", tmp_path, "--out", tmp_path / "x.csv")
    assert code == 2 and "saved circuit (circuit.safetensors) or saved scores" in " ".join(err.split())
    code, _, err = run("steer", "demo-gelu", "a", "--circuit", tmp_path / "scores", "--scale", "0")
    assert code == 2 and "expected a circuit in" in " ".join(err.split())


def test_running_out_of_memory_or_failing_a_check_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, message in (
        (torch.OutOfMemoryError("CUDA out of memory."), "smaller --batch-size"),
        (tnc.NeuronCircuitsError("wrong"), "wrong"),
    ):

        def fails(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("tl_neuron_circuits.interventions._steer.steer", fails)
        code, _, err = run("steer", "demo-gelu", PROMPT, "--node", "L0/N1", "--scale", "0")
        assert code == (1 if isinstance(error, torch.OutOfMemoryError) else 2) and message in err


def test_messages_name_options_where_the_command_has_them() -> None:
    message = "pass positions='sum', nodes=100 or steps=20, or tasks.keep_fitting(model, pairs, same_length=True)"
    options = {"positions": "--positions", "nodes": "--nodes"}
    kept = ", or tasks.keep_fitting(model, pairs, same_length=True)"
    assert in_options(message, options) == "pass --positions sum, --nodes 100 or steps=20" + kept
    options["keep_fitting"] = "--keep-fitting"
    assert in_options(message, options).endswith("steps=20, or --keep-fitting")
    assert in_options(message, {}) == message


def test_notes_name_options_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    call = ["trace", "demo-gelu", PROMPT, "--target", " Augusta", "--nodes", "5", "--out", tmp_path / "out"]
    code, _, err = run(*call)
    assert code == 0 and "does not predict 'Augusta'" in caplog.text, err
    assert "explain its own token (no --target)" in caplog.text
    right = "those that the model gets right: pairs.where_model_is_right(model)."
    assert in_options(right, {"where_right": "--where-right"}).endswith("gets right: --where-right.")
    assert in_options("give target=' Augusta'", {"target": "--target"}) == "give --target ' Augusta'"


def test_tables_keep_each_row_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    show(pd.DataFrame([("a\nb", 1234.5, 0.0001, float("nan"))], columns=["token", "large", "tiny", "nothing"]), "title")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [cell.strip() for cell in rows[0].strip("│").split("│")] == ["a\\nb", "1234", "1.0e-04", ""]
    assert len(rows) == 1
