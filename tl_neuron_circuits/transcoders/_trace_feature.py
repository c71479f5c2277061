"""`trace_feature`: the circuit behind one feature on one prompt, from weights.

1. Greedy search for the paths that contribute most to the target. Every iteration extends each of the best paths by
   the `num_branches` largest contributions to its last node, and keeps the `num_branches` best of all extensions. A
   path counts what it contributes to the target: the last node's one-step contribution to the next one, times what one
   unit of that one contributes. With `cap` a node passes on at most all of what it is read for: a source may contribute
   more than its reader's activation where others work against it, and setting it to zero could not take away more than
   there is.
2. The nodes of all paths form one graph. Nodes are taken apart from late to early, each as all its readers together
   read it. So there are edges between all nodes, whichever path they are on, every node's incoming edges sum to it, and
   nothing is lost: what the paths left out becomes the "unselected" node of its position.

Source: Dunefsky, Chlenski and Nanda 2024, arXiv 2406.11944; METHODS.md 4.3.
"""

import logging
import weakref
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .._errors import DictionaryError, SettingsError
from .._files import versions
from .._typing import checked
from ..bases._dictionary import Dictionary
from ..bases._dictionary_basis import Dictionaries
from ..circuits._circuit import Circuit
from ..circuits._edge_heads import Traced
from ..circuits._from_tables import from_tables
from ..circuits._table import unselected_row
from ..interventions._steering_prompts import token_names
from ..models._protocol import TransformerLensModel, model_name
from ..models._threads import holding
from ..nodes._scores import label
from ..tasks._tokenized import unanswered
from ._contributions import (
    OneStep,
    Read,
    Target,
    before_heads,
    decompose,
    feature_read,
    find_target,
    head_label,
    one_step,
    read_through_norm,
)
from ._residual_run import Prompt, ResidualRun, one_prompt, residual_run

_logger = logging.getLogger(__name__)

Rank = Literal["positive", "absolute"]
Rows = list[dict[str, Any]]


@holding
@checked
def trace_feature(
    model: TransformerLensModel,
    dictionaries: Sequence[Dictionary],
    prompt: Prompt,
    feature: str | int,
    *,
    num_iters: int = 4,
    num_branches: int = 20,
    rank: Rank = "positive",
    cap: bool = False,
    keep_bos: bool = False,
    prepend_bos: bool | None = None,
) -> Circuit:
    """The features and heads that make a feature fire on a prompt, from weights.

    Greedy paths (METHODS.md 4.3), joined into one graph. Its nodes are features, heads between two positions
    ("L1/H3@2→5" reads at 2 and writes at 5), skip paths, embeddings, the errors of MLPs, biases, and per position an
    "unselected" node: whatever the paths left out. What comes into a node sums to it exactly: into a feature to its
    activation, into a head or a skip path to its part of the target.

    Args:
        model: a HookedTransformer or TransformerBridge.
        dictionaries: transcoders, at most one per layer; MLPs without one appear as errors.
        prompt: one prompt, text or tokens.
        feature: "L3/F17@5" (-1 is the last position), or any other target of `contributions`, such as a next token.
        num_iters: how many nodes a path may have.
        num_branches: how many paths are followed at a time.
        rank: follow the largest contributions, or the largest in size, negative ones included.
        cap: let no source count for more than its reader's activation, as zero ablation would see it. It steers the
            search; edges give the full contributions.
        keep_bos: let nodes at the BOS position be chosen, to which many heads attend by default.
        prepend_bos: None means the model's default.

    Returns:
        A `Circuit`: page, export, pruning, evaluation and steering work. The target takes the place of `trace`'s
        logits. `settings["paths"]` lists the paths, strongest first: their nodes from the target on, and their
        contribution.

    Raises:
        DictionaryError: a dictionary is not a transcoder from an MLP's input to its output.
        SettingsError: the target does not exist, num_iters or num_branches is below 1, or nothing contributes.
        NumericalError: the target is exactly zero, or its sources do not add up to it.
        UnsupportedModelError: the model lacks hook points or weights.

    Source: Dunefsky, Chlenski and Nanda 2024, arXiv 2406.11944; METHODS.md 4.3.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, transcoders = tnc.load_demo_model(), tnc.load_demo_dictionaries("transcoder")
        >>> prompt = "The capital of the state containing Dallas is"
        >>> circuit = tnc.transcoders.trace_feature(model, transcoders, prompt, " Austin", num_iters=2)
        >>> len(circuit) > 0
        True
    """
    if num_iters < 1 or num_branches < 1:
        raise SettingsError(f"expected num_iters and num_branches of at least 1; got {num_iters} and {num_branches}.")
    run = residual_run(model, dictionaries, one_prompt(model, prompt, prepend_bos))
    for layer, writes in enumerate(run.mlps):
        if writes.dictionary is not None and layer not in run.readings:
            raise DictionaryError(
                f"{writes.dictionary.name} is an SAE on an MLP's output: weights do not connect its features with what "
                "stands before the MLP, so paths would end at it. Pass transcoders; contributions(...) takes SAEs as "
                "sources, and trace(...) goes through MLPs by gradients."
            )
    target = find_target(run, feature, prompt if isinstance(prompt, str) else None)
    decompose(run, target)  # raises where the target's sources do not add up to it
    bos = getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
    begins_with_bos = bos is not None and len(run.tokens) > 1 and int(run.tokens[0]) == bos
    excluded = [0] if begins_with_bos and not keep_bos else []
    paths = _greedy_paths(run, target, num_iters, num_branches, rank, cap, excluded)
    if not paths:
        raise SettingsError(
            f"no feature, head or embedding contributes to {target.label} = {target.value:.4g}. Try rank='absolute', "
            "or keep_bos=True."
        )
    texts = token_names(model, run.tokens.tolist())
    # From late to early, so that a node comes after all that read it: a layer's heads write before its MLP.
    nodes = sorted(
        {node for path in paths for node in path.nodes if node.kind != "embedding"},
        key=lambda n: (n.layer, n.kind != "head", n.kind, n.unit, n.position, n.to),
        reverse=True,
    )
    rows, edges = _graph_rows(run, target, nodes, texts)
    listed = [{"nodes": [target.label, *(n.name for n in p.nodes)], "contribution": p.contribution} for p in paths]
    sites = [
        {"hook": r.site.hook, "layer": layer, "letter": "F", "width": r.dictionary.d_dict, "errors": True}
        for layer, r in run.readings.items()
    ]
    pairs = unanswered([run.tokens])
    settings = {
        "model": model_name(model), "n_layers": run.n_layers, "d_mlp": None,
        "n_prompts": 1, "prompt": prompt if isinstance(prompt, str) else "".join(texts), "tokens": texts,
        "token_ids": run.tokens.tolist(), "pairs_hash": pairs.hash,
        "target": [target.text or target.label], "position": target.position, "baseline": "zero",
        "method": "weights", "basis": Dictionaries(dictionaries).name, "rules": ["frozen patterns", "frozen scales"],
        "sites": sites, "num_iters": num_iters, "num_branches": num_branches, "rank": rank, "cap": cap,
        "skipped_positions": excluded, "paths": sorted(listed, key=lambda path: -abs(path["contribution"])),
        "versions": versions(),
    }  # fmt: skip
    traced = Traced(weakref.ref(model), pairs)
    circuit = from_tables(rows, edges, target.value, settings, basis=Dictionaries(dictionaries), traced=traced)
    for note in circuit.notes:
        _logger.warning(note)
    return circuit


@dataclass(frozen=True)
class Node:
    """A node that reads the residual stream itself: a feature, a skip path, or a head from `position` to `to`.

    An embedding is a node that reads nothing.
    """

    kind: Literal["feature", "skip", "head", "embedding"]
    layer: int
    unit: int
    position: int
    to: int = -1

    @property
    def name(self) -> str:
        """Its label in the circuit."""
        if self.kind == "head":
            return head_label(self.layer, self.unit, self.position, self.to)
        if self.kind == "embedding":
            return f"embed@{self.position}"
        return label(self.layer, "F", self.unit, self.position, "node" if self.kind == "feature" else "skip")


@dataclass(frozen=True, eq=False)
class Path:
    """From its last node back to the target; `read` reads the part of the target that runs along the path."""

    nodes: tuple[Node, ...]
    read: Read
    contribution: float


def _greedy_paths(
    run: ResidualRun,
    target: Target,
    num_iters: int,
    num_branches: int,
    rank: Rank,
    cap: bool,
    excluded: Collection[int],
) -> list[Path]:
    """The best paths of every iteration, in the order found; nodes at `excluded` positions are never taken."""
    live, every = [Path((), target.read, abs(target.value))], []
    for _ in range(num_iters):
        longer = []
        for path in live:
            for node, contribution in _sources(one_step(run, path.read), num_branches, rank, excluded):
                factor = min(1.0, abs(path.contribution) / abs(contribution)) if cap else 1.0
                longer.append((path, node, factor * contribution, factor))
        longer.sort(key=lambda each: -each[2] if rank == "positive" else -abs(each[2]))
        best = []
        for path, node, contribution, factor in longer[:num_branches]:
            read = path.read if node.kind == "embedding" else node_read(run, node, path.read).times(factor)
            best.append(Path((*path.nodes, node), read, contribution))
        every += best
        live = [path for path in best if path.nodes[-1].kind != "embedding"]
    return every


def _sources(step: OneStep, count: int, rank: Rank, excluded: Collection[int]) -> Iterator[tuple[Node, float]]:
    """The largest sources that are not biases or errors."""
    t = step.read.position
    blocks: list[tuple[Tensor, Literal["feature", "skip", "head", "embedding"], int, Tensor | None]] = []
    if t not in excluded:
        for features in step.features:
            blocks.append((features.contributions, "feature", features.layer, features.units))
        for layer, value in step.skips.items():
            blocks.append((torch.tensor([value]), "skip", layer, None))
        blocks.append((torch.tensor([step.embedding]), "embedding", -1, None))
    for layer, heads in step.heads.items():
        heads = heads.clone()
        heads[:, [position for position in excluded if position < heads.shape[1]]] = 0.0
        heads[:, t + 1 :] = 0.0
        blocks.append((heads.flatten(), "head", layer, None))
    sizes = [(values if rank == "positive" else values.abs()).cpu().double() for values, *_ in blocks]
    if not sizes:
        return
    flat = torch.cat(sizes)
    starts = torch.tensor([0, *(len(size) for size in sizes)]).cumsum(0)
    top = flat.topk(min(count, len(flat)))
    for size, index in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        if size <= 0:
            break
        block = int(torch.searchsorted(starts, index, right=True)) - 1
        values, kind, layer, units = blocks[block]
        place = index - int(starts[block])
        if kind == "head":
            head, source = divmod(place, step.heads[layer].shape[1])
            node = Node("head", layer, head, source, to=t)
        else:
            node = Node(kind, layer, -1 if units is None else int(units[place]), t)
        yield node, float(values[place])


def node_read(run: ResidualRun, node: Node, read: Read) -> Read:
    """How a node reads further down when `read` reads it."""
    if node.kind == "head":
        return head_read(run, node.layer, node.unit, node.position, read.position, read.vector)
    if node.kind == "skip":
        return skip_read(run, node.layer, read.position, read.vector)
    u = run.before_post_norm(node.layer, read.position, read.vector)
    weight = float(run.readings[node.layer].dictionary.W_dec[node.unit].to(u) @ u)
    return feature_read(run, node.layer, node.unit, node.position).times(weight)


def skip_read(run: ResidualRun, layer: int, position: int, v: Tensor) -> Read:
    """A vector that reads a skip path's output, as one that reads the residual stream before that MLP."""
    reading = run.readings[layer]
    assert reading.dictionary.W_skip is not None
    v = reading.dictionary.W_skip.to(v).mT @ run.before_post_norm(layer, position, v)
    return read_through_norm(run, reading.stream, reading.norm, position, reading.layer, v, {})


def head_read(run: ResidualRun, layer: int, head: int, source: int, position: int, v: Tensor) -> Read:
    """A vector that reads a head's output at `position`, as one that reads the stream at the source; without b_V."""
    weights, pattern = run.attentions[layer], run.values[f"blocks.{layer}.attn.hook_pattern"]
    u, _ = before_heads(run, layer, position, v)
    reads = weights.back(u)[0][head] * pattern[head, position, source].to(u)
    back = weights.norm.back(reads) / run.attention_scales[layer][source].to(u)
    constants = {} if weights.norm.bias is None else {f"L{layer}/ln1": float(weights.norm.constant(reads))}
    return Read(source, layer, layer, back, constants)


def _graph_rows(run: ResidualRun, target: Target, nodes: Sequence[Node], texts: Sequence[str]) -> tuple[Rows, Rows]:
    """Rows of nodes and of edges, from the nodes on the paths, late to early."""
    graph = _Graph(run, nodes)
    graph.expand(target.label, target.read, 1.0)
    rows = []
    for node in nodes:
        score = graph.scores[node]
        row = {
            "node": node.name, "kind": node.kind, "layer": node.layer, "unit": node.unit, "position": node.position,
            "token": texts[node.position], "score": score, "change": score,
        }  # fmt: skip
        if node.kind == "feature":
            writes = run.mlps[node.layer]
            at = writes.units[node.position] == node.unit
            activation = float(writes.activations[node.position][at][0])
            row |= {"activation": activation, "change": activation, "sign": int(np.sign(activation))}
            # A feature has a read vector of its own, for one unit of its activation; heads and skips pass on others'.
            read, factor = feature_read(run, node.layer, node.unit, node.position), graph.unit_contributions[node]
        else:
            read, factor = graph.reads[node], 1.0
        graph.expand(node.name, read, factor)
        rows.append(row)
    rows += _end_rows(run, graph.edges, texts)
    goal = {
        "node": target.label, "label": target.text or target.label, "kind": "logit", "layer": run.n_layers,
        "unit": target.unit, "position": target.position, "token": target.text or texts[target.position],
        "activation": target.value, "change": target.value, "sign": int(np.sign(target.value)), "score": target.value,
    }  # fmt: skip
    return [*rows, goal], graph.edges


class _Graph:
    """Edges so far, and for every node not yet taken apart its score and what reads it."""

    def __init__(self, run: ResidualRun, nodes: Sequence[Node]) -> None:
        self.edges: Rows = []
        self.scores: dict[Node, float] = defaultdict(float)
        self.unit_contributions: dict[Node, float] = defaultdict(float)
        """Of features: what one unit of activation contributes to the target."""
        self.reads: dict[Node, Read] = {}
        """Of heads and skip paths: everything that reads them, added up."""
        self._run = run
        self._written_at: dict[int, list[Node]] = defaultdict(list)
        for node in nodes:
            self._written_at[node.to if node.kind == "head" else node.position].append(node)

    def expand(self, name: str, read: Read, factor: float) -> None:
        """Add the edges into a node that `read` reads, one unit of which contributes `factor` to the target."""
        step, t = one_step(self._run, read), read.position
        left = torch.zeros(len(self._run.tokens), dtype=torch.float64)
        for heads in step.heads.values():
            left += heads.sum(0).cpu().double()
        left[t] += sum(float(f.contributions.sum()) for f in step.features) + sum(step.skips.values())
        for node in self._written_at[t]:
            source = _contribution(step, node)
            if source is None:
                continue
            value, weight = source
            left[node.position] -= value
            self._edge(node.name, name, value, factor)
            self.scores[node] += factor * value
            if node.kind == "feature":
                self.unit_contributions[node] += factor * weight
            else:
                more = node_read(self._run, node, read).times(factor)
                self.reads[node] = self.reads[node].plus(more) if node in self.reads else more
        self._edge(f"embed@{t}", name, step.embedding, factor)
        if step.positional is not None:
            self._edge("positions", name, step.positional, factor)
        self._edge("bias", name, sum(step.constants.values(), 0.0), factor)
        for layer, value in step.errors.items():
            self._edge(label(layer, "", -1, t, "error"), name, value, factor)
        for position, value in enumerate(left[: t + 1].tolist()):
            self._edge(f"unselected@{position}", name, value, factor)

    def _edge(self, source: str, target: str, weight: float, factor: float) -> None:
        if weight:
            self.edges.append(
                {"source": source, "target": target, "weight": weight, "attribution": factor * weight}
            )  # fmt: skip


def _contribution(step: OneStep, node: Node) -> tuple[float, float] | None:
    """What a node contributes in a step, and its weight; None where it does not write before the step reads."""
    if node.kind == "head":
        heads = step.heads.get(node.layer)
        return None if heads is None else (float(heads[node.unit, node.position]), 1.0)
    if node.kind == "skip":
        return (step.skips[node.layer], 1.0) if node.layer in step.skips else None
    for features in step.features:
        if features.layer == node.layer:
            place = int((features.units == node.unit).nonzero()[0])
            return float(features.contributions[place]), float(features.weights[place])
    return None


def _end_rows(run: ResidualRun, edges: Rows, texts: Sequence[str]) -> Rows:
    """Rows of the ends that edges come from, and of every embedding."""
    sums: dict[str, float] = defaultdict(float)
    for edge in edges:
        sums[edge["source"]] += edge["attribution"]
    rows: Rows = [
        {
            "node": f"embed@{p}", "label": text, "kind": "embedding", "unit": int(run.tokens[p]), "position": p,
            "token": text, "score": sums.get(f"embed@{p}", 0.0),
        }
        for p, text in enumerate(texts)
    ]  # fmt: skip
    rows += [row for p, text in enumerate(texts) if (row := unselected_row(p, text))["node"] in sums]
    for name, text in (("positions", "positional embeddings"), ("bias", "biases")):
        if name in sums:
            rows.append({"node": name, "label": text, "kind": "bias", "score": sums[name]})
    for layer in range(run.n_layers):
        for position, text in enumerate(texts):
            name = label(layer, "", -1, position, "error")
            if name in sums:
                place = {"layer": layer, "position": position, "token": text}
                rows.append({"node": name, "kind": "error", "score": sums[name], **place})
    return rows
