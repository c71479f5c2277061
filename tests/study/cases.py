"""What the methods are asked: tasks on real models, and models whose circuit is known.

Pairs of a task are those that the model gets right in both directions, in three parts that share no noun (or state):
for scores, for choosing when to stop, and for judging.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tl_neuron_circuits as tnc
from tests.evidence.splits import agreement
from tests.smollm2 import prepared
from tl_neuron_circuits import PromptPairs, TokenizedPairs
from tl_neuron_circuits.tasks._tokenized import Batch

LEARN, DEVELOP, JUDGE = 20, 12, 24
"""Pairs of each part at most."""
SHARED = Path(__file__).resolve().parents[3] / "shared" / "models"
MODELS = {"smollm2": "SmolLM2-135M-Instruct", "demo-gelu": "demo-gelu", "demo-swiglu": "demo-swiglu"}
SIZES = {
    "smollm2": (3, 10, 30, 100, 300, 1000, 10_000),
    "demo-gelu": (1, 3, 10, 30, 100, 300, 1000, 3000),
    "demo-swiglu": (1, 3, 10, 30, 100, 300, 1000, 3000),
}
TASKS = ("nounpp", "rc", "two_hop")


@dataclass(frozen=True)
class Parts:
    """Three sets of pairs without a noun in common."""

    learn: PromptPairs
    develop: PromptPairs
    judge: PromptPairs


@cache
def load(name: str) -> Any:
    """A model of `MODELS`.

    Raises:
        FileNotFoundError: SmolLM2 was not prepared.
    """
    if name != "smollm2":
        return tnc.load_demo_model(name)
    from transformer_lens.model_bridge import TransformerBridge

    if (folder := prepared()) is None:
        raise FileNotFoundError("SmolLM2 is not there: run `python -m tests.smollm2` first")
    return TransformerBridge.boot_transformers(str(folder), device="cpu").eval()


@cache
def parts_of(name: str, task: str) -> Parts:
    """Right pairs of a task in three parts without common nouns."""
    model, structure = load(name), task
    if name == "smollm2" and task != "two_hop":  # half of the pairs to judge on ask for verbs that the others have not
        sizes: Any = {"learning": 48, "development": 24, "evaluation": 60}
        right = agreement(model, structure, prepend_bos=True, sizes=sizes).right  # pyright: ignore[reportArgumentType]
        learn, develop, judge = right["learning"], right["development"], right["evaluation"]
    else:
        if task != "two_hop":
            drawn = tnc.tasks.subject_verb_agreement(structure, n=128, model=model, prepend_bos=True)  # pyright: ignore[reportArgumentType]
        elif name == "smollm2":
            drawn = tnc.tasks.capitals(128, model=model, prepend_bos=True)
        else:
            drawn = tnc.demo.capitals(96)
        learn, rest = drawn.where_model_is_right(model).split(0.4, seed=0, by="label")
        develop, judge = rest.split(0.3, seed=0, by="label")
    found = Parts(*(_at_most(part, n) for part, n in ((learn, LEARN), (develop, DEVELOP), (judge, JUDGE))))
    three = (found.learn, found.develop, found.judge)
    nouns = [{noun for pair in part for word in words_of(pair, task) for noun in word.split(" and ")} for part in three]
    assert not (nouns[0] & nouns[1] or nouns[0] & nouns[2] or nouns[1] & nouns[2]), "parts share nouns"
    return found


def _at_most(pairs: PromptPairs, n: int) -> PromptPairs:
    """The first n pairs, both directions of a contrast together, from as many clusters as there are."""
    clusters: dict[str, dict[frozenset[str], list[int]]] = {}
    for index, pair in enumerate(pairs):
        contrast = frozenset((pair.clean, pair.corrupt or ""))
        name = " ".join(sorted({pair.answer, pair.wrong_answer or ""})) if _asks_capital(pair.clean) else pair.label
        clusters.setdefault(str(name), {}).setdefault(contrast, []).append(index)
    queues = [list(contrasts.values()) for contrasts in clusters.values()]
    chosen: list[int] = []
    while len(chosen) < n and any(queues):
        for queue in queues:
            if queue and len(chosen) < n:
                chosen += queue.pop(0)
    return pairs[sorted(chosen)]


def _asks_capital(prompt: str) -> bool:
    return "capital" in prompt


def words_of(pair: Any, task: str) -> tuple[str, ...]:
    """The words by which pairs are drawn together: a couple of nouns that meet each other only, or two states."""
    if task == "two_hop":
        return tuple(sorted((pair.answer.strip(), pair.wrong_answer.strip())))
    return (pair.label,)


@dataclass(frozen=True)
class Known:
    """A model whose circuit is known, and how to see from nodes' scores what they say of its parts."""

    name: str
    model: Any
    pairs: TokenizedPairs
    metric: Callable[[Tensor, Batch], Tensor]
    bases: tuple[Any, ...]
    truth: dict[str, bool]
    """Whether a part belongs to the circuit."""
    part_of: Callable[[str], str]
    """The part that a node's label belongs to."""


def planted(seed: int) -> Known:
    """Heads and MLPs of a planted circuit; a part is as high as its best node."""
    from tests.planted.load import load_planted

    case = load_planted(seed)
    inside = {name for edge in case.truth.edges for name in edge}
    pairs = case.pairs(48, seed=3)
    truth = {name: name in inside for name in case.case.nodes if name not in ("embedding", "logits")}
    bases = (tnc.bases.HeadOutputs(), tnc.bases.Neurons())
    width = case.model.cfg.d_head

    def part_of(label: str) -> str:
        layer, letter, unit = _read(label)
        return f"L{layer}/MLP" if letter == "N" else f"L{layer}/H{unit // width}"

    return Known(case.case.name, case.model, pairs, case.metric(pairs), bases, truth, part_of)


def tracr(program: str) -> Known:
    """Neurons of a compiled program that are more than padding; those on a path to the output are its circuit."""
    from tests.benchmarks.ground_truth import all_outputs
    from tests.real_models import load_hooked_form

    path = SHARED / f"tracr_{program}"
    model = load_hooked_form(path)
    graph = tnc.components.GroundTruth.from_tracr(path, granularity="neurons")
    on_a_path = {name for edge in graph.edges for name in edge}
    layers = json.loads((path / "ground_truth.json").read_text())["layers"]
    active = [f"L{layer}/N{unit}" for layer, content in enumerate(layers) for unit in content["active_neurons"]]
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, model.cfg.d_vocab, (96, model.cfg.n_ctx), generator=generator)
    tokens[:, 0] = 0
    pairs = TokenizedPairs.from_tokens(tokens[:48], torch.arange(48) % model.cfg.d_vocab_out, tokens[48:])
    truth = {name: name in on_a_path for name in active}
    return Known(program, model, pairs, all_outputs, (tnc.bases.Neurons(),), truth, lambda label: label.split("@")[0])


def _read(label: str) -> tuple[int, str, int]:
    found = re.fullmatch(r"L(\d+)/([A-Z])(\d+)(?:@\d+)?", label)
    assert found is not None, label
    return int(found[1]), found[2], int(found[3])
