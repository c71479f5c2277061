"""The command line, as a person uses it: exit codes, messages, files, JSON."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from tests.loops import for_each
from tl_neuron_circuits import Circuit, NodeScores
from tl_neuron_circuits.cli._app import app
from tl_neuron_circuits.cli._inputs import load_model
from tl_neuron_circuits.tasks import subject_verb_agreement

runner = CliRunner()


def run(*arguments: str | Path) -> "tuple[int, str, str]":
    result = runner.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def agreement_file(tmp_path: Path) -> Path:
    return agreement_pairs(tmp_path)


def agreement_pairs(tmp_path: Path) -> Path:
    nouns = ("boy", "girl", "dog", "cat")
    rows = []
    for noun in nouns:
        one, many = (f"The {noun}", " is"), (f"The {noun}s", " are")
        for clean, patch in ((one, many), (many, one)):
            fields = ("clean_prefix", "clean_answer", "patch_prefix", "patch_answer")
            rows.append(dict(zip(fields, (*clean, *patch), strict=True)))
    file = tmp_path / "pairs.json"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def test_check_says_ok_and_lists_the_sites() -> None:
    code, out, err = run("check", "demo-gelu")
    assert code == 0 and "ok" in out and "neurons" in out, err


def test_check_prints_json_alone() -> None:
    code, out, _ = run("check", "demo-gelu", "--json")
    content = json.loads(out)
    assert code == 0 and content["ok"] and abs(content["conservation"] - 1) < 1e-3


def test_attribute_shows_the_best_and_saves_all(agreement_file: Path, tmp_path: Path) -> None:
    where = tmp_path / "scores"
    code, out, err = run("attribute", "demo-gelu", "--pairs", agreement_file, "--out", where, "--top", "5")
    assert code == 0, err
    assert NodeScores.load(where).settings["n_pairs"] == 8
    assert out.count("│ L") == 5


def test_a_method_takes_options_in_parentheses(agreement_file: Path, tmp_path: Path) -> None:
    call = ["attribute", "demo-gelu", "--pairs", agreement_file, "--out", tmp_path / "scores", "--json"]
    code, _, err = run(*call, "--method", "integrated_gradients(steps=2)")
    assert code == 0 and NodeScores.load(tmp_path / "scores").settings["method"] == "integrated_gradients(steps=2)", err
    code, _, err = run(*call, "--method", "integrated_gradients(step=2)")
    assert code == 2 and "expected options of integrated_gradients" in " ".join(err.split())


def test_attribute_prints_json_alone(agreement_file: Path) -> None:
    code, out, _ = run("attribute", "demo-gelu", "--pairs", agreement_file, "--json", "--top", "3")
    assert code == 0 and len(json.loads(out)["nodes"]) == 3


@for_each(
    ("arguments", "message"),
    [
        (("check", "no-such-model-anywhere"), "cannot load"),
        (("attribute", "demo-gelu", "--pairs", "missing.json"), "missing.json"),
        (("demo", "--model", "demo-nothing"), "expected a demo model"),
        (("check", "demo-gelu", "--backend", "Nothing"), "expected --backend"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(*arguments)
    assert code == 2, err
    assert message in " ".join(err.split())
    assert "Traceback" not in out + err


def test_a_wrong_basis_or_method_is_exit_code_2(agreement_file: Path) -> None:
    for option in (("--basis", "nothing"), ("--method", "nothing"), ("--positions", "nothing")):
        code, _, err = run("attribute", "demo-gelu", "--pairs", agreement_file, *option)
        assert code == 2 and "nothing" in err and "Traceback" not in err


def test_trace_writes_the_circuit_its_page_and_its_graph(tmp_path: Path) -> None:
    prompt = "The capital of the state containing Dallas is"
    code, out, err = run("trace", "demo-gelu", prompt, "--target", " Austin", "--nodes", "30", "--out", tmp_path / "c")
    assert code == 0, err
    assert len(Circuit.load(tmp_path / "c" / "circuit")) == 30
    assert "<svg" in (tmp_path / "c" / "circuit.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "c" / "neuronpedia.json").read_text(encoding="utf-8"))["nodes"]
    assert "Austin" in out
    code, _, err = run("trace", "demo-gelu", prompt, "--target", " Nowhere", "--out", tmp_path / "d")
    assert code == 2 and "Traceback" not in err


def test_a_local_hugging_face_folder_loads(shared_models: Path) -> None:
    pytest.importorskip("transformer_lens.model_bridge", reason="TransformerBridge needs TransformerLens 3.9 or later")
    model = load_model(str(shared_models / "stories260K"), "auto")
    assert type(model).__name__ == "TransformerBridge"


@contextmanager
def terminal(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The command in a terminal of its own, 80 columns wide: the process, and the other end to read and type at."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1"}
    environment.pop("COLUMNS", None)
    command = [sys.executable, "-m", "tl_neuron_circuits.cli", *arguments]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
        preexec_fn=_as_a_shell_would,
    )  # fmt: skip
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait(timeout=30)
        os.close(ours)


def _as_a_shell_would() -> None:
    """Own the terminal, and hear Ctrl-C: what runs in the background of a script is started deaf to it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def read_until(terminal_end: int, text: str = "") -> str:
    """What the terminal shows, until it shows `text` or the command ends."""
    shown = b""
    while not (text and text.encode() in shown):
        try:
            part = os.read(terminal_end, 65536)
        except OSError:  # Linux's way to say that nobody writes any more
            break
        if not part:
            break
        shown += part
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode(errors="replace"))


def test_demo_runs_in_a_terminal_and_writes_what_it_names(tmp_path: Path) -> None:
    with terminal("demo", "--out", str(tmp_path / "out")) as (process, end):
        shown = read_until(end)
        assert process.wait(timeout=60) == 0, shown[-2000:]
    assert "loading demo-gelu" in shown and "Dallas" in shown and "faithfulness" in shown and "conservation" in shown
    tables = [line for line in re.split(r"[\r\n]+", shown) if line[:1] in ("┏", "┃", "│", "└")]
    assert len(tables) > 40 and max(map(len, tables)) <= 80
    table = pd.read_csv(tmp_path / "out" / "sparsity.csv")
    assert set(table["method"]) == {"relp", "gradient", "integrated_gradients", "random"}
    assert set(table["size"]) == {10, 30, 100, 300}
    best = table[(table["task"] == "agreement") & (table["method"] == "relp")].set_index("size")
    assert best.loc[300, "faithfulness"] > 0.7 and best.loc[300, "completeness"] < 0.3
    assert (tmp_path / "out" / "sparsity.html").stat().st_size > 100_000


def test_ctrl_c_in_the_midst_of_a_run_leaves_no_traceback(tmp_path: Path) -> None:
    pairs = tmp_path / "many.json"  # enough for seconds of curves, so that the key comes in time on a busy machine too
    fields = ("clean_prefix", "clean_answer", "patch_prefix", "patch_answer")
    task = subject_verb_agreement("within_rc", n=1000)
    rows = [dict(zip(fields, (p.clean, p.answer, p.corrupt, p.wrong_answer), strict=True)) for p in task]
    pairs.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with terminal("compare", "demo-gelu", "--pairs", str(pairs), "--out", str(tmp_path / "o")) as (process, end):
        read_until(end, "1/10")  # the first curve is done: nothing is imported any more
        os.write(end, b"\x03")
        rest = read_until(end)
        assert process.wait(timeout=60) == 130, rest
    assert rest.rstrip().endswith("interrupted") and "Traceback" not in rest


@for_each(
    "module", ["typer", "rich", "numpy", "torch", "transformer_lens", "tl_neuron_circuits.propagation._check_model"]
)
def test_ctrl_c_while_modules_are_imported_leaves_one_line(module: str) -> None:
    program = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
def press(event, what):
    if event == "import" and what[0] == {module!r}:
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(press)
from tl_neuron_circuits.cli import main
main(["check", "demo-gelu"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.split(), done.stdout) == (130, ["interrupted"], "")
