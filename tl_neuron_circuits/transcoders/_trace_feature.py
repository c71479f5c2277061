"""`trace_feature`: the circuit behind one feature on one prompt, from weights."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from .._errors import DictionaryError, SettingsError
from .._files import versions
from .._typing import checked
from ..bases._dictionary import Dictionary
from ..bases._dictionary_basis import Dictionaries
from ..circuits._circuit import Circuit
from ..circuits._from_tables import from_tables
from ..models._protocol import TransformerLensModel
from ._explained import Explained, Target, explained, taken_apart, token_texts
from ._graph import graph_rows
from ._paths import Node, Path, Rank, greedy_paths
from ._residual_run import Prompt, ResidualRun, one_prompt, residual_run


@checked
def trace_feature(
    model: TransformerLensModel,
    dictionaries: Sequence[Dictionary],
    prompt: Prompt,
    feature: Target,
    *,
    num_iters: int = 4,
    num_branches: int = 20,
    rank: Rank = "positive",
    cap: bool = False,
    keep_bos: bool = False,
    prepend_bos: bool | None = None,
) -> Circuit:
    """The features and heads that make a feature fire on a prompt, from weights.

    The greedy paths of METHODS.md 4.3, joined to one graph. Its nodes are features, heads between two positions
    ("L1/H3@2→5" reads at 2 and writes at 5), skip paths, embeddings, the errors of MLPs, biases, and per position a
    remainder: whatever the paths left out. What comes into a node sums to it exactly: into a feature to its activation,
    into a head or a skip path to its part of the target.

    Args:
        model: a HookedTransformer or TransformerBridge.
        dictionaries: transcoders, at most one a layer; MLPs without one appear as errors.
        prompt: one prompt, text or tokens.
        feature: "L3/F17@5" (-1 is the last position); or what else `contributions` explains, such as a next token.
        num_iters: how many nodes a path may have.
        num_branches: how many paths are followed at a time.
        rank: follow the largest contributions, or the largest in size, negative ones included.
        cap: let no source count for more than its reader's activation, as zero ablation would see it. It steers the
            search; edges say the full contributions.
        keep_bos: let nodes at the BOS position be chosen, on which many heads rest.
        prepend_bos: None means the model's default.

    Returns:
        A `Circuit`: page, export, pruning, evaluation and steering work. The target stands where `trace` has the
        logits. `settings["paths"]` lists the paths, strongest first: their nodes from the target on, and their
        contribution.

    Raises:
        DictionaryError: a dictionary is no transcoder from an MLP's input to its output.
        SettingsError: the target is not there, num_iters or num_branches below 1, or nothing contributes.
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
    tokens = one_prompt(model, prompt, prepend_bos)
    run = residual_run(model, dictionaries, tokens)
    _require_transcoders(run)
    target = explained(run, feature, prompt if isinstance(prompt, str) else None)
    taken_apart(run, target)
    bos = [] if keep_bos else _bos(model, run)
    paths = greedy_paths(
        run, target, num_iters=num_iters, num_branches=num_branches, rank=rank, cap=cap, excluded=bos
    )  # fmt: skip
    if not paths:
        raise SettingsError(
            f"no feature, head or embedding contributes to {target.label} = {target.value:.4g}. Try rank='absolute', "
            "or keep_bos=True."
        )
    texts = token_texts(model, run.tokens)
    nodes = {node for path in paths for node in path.nodes if node.kind != "embedding"}
    rows, edges = graph_rows(run, target, _ordered(nodes), texts)
    settings = {
        "model": str(getattr(model.cfg, "model_name", "unknown")), "n_layers": run.n_layers, "d_mlp": None,
        "n_prompts": 1, "prompt": prompt if isinstance(prompt, str) else "".join(texts), "tokens": texts,
        "token_ids": run.tokens.tolist(), "pairs_hash": hashlib.sha256(str(run.tokens.tolist()).encode()).hexdigest(),
        "target": [target.text or target.label], "position": target.position, "baseline": "zero",
        "method": "weights", "basis": Dictionaries(dictionaries).name, "rules": ["frozen patterns", "frozen scales"],
        "sites": _sites(run),
        "num_iters": num_iters, "num_branches": num_branches, "rank": rank, "cap": cap, "skipped_positions": bos,
        "paths": _listed(target, paths), "versions": versions(),
    }  # fmt: skip
    return from_tables(rows, edges, target.value, settings, basis=Dictionaries(dictionaries))


def _require_transcoders(run: ResidualRun) -> None:
    for layer, writes in enumerate(run.mlps):
        if writes.dictionary is not None and layer not in run.readings:
            raise DictionaryError(
                f"{writes.dictionary.name} is an SAE on an MLP's output: weights do not connect its features with what "
                "stands before the MLP, so paths would end at it. Give transcoders; contributions(...) takes SAEs as "
                "sources, and trace(...) goes through MLPs by gradients."
            )


def _sites(run: ResidualRun) -> list[dict[str, Any]]:
    """Where the features are, as `trace` says it of its nodes."""
    return [
        {"hook": reading.site.hook, "layer": layer, "letter": "F", "width": reading.dictionary.d_dict, "errors": True}
        for layer, reading in run.readings.items()
    ]


def _bos(model: Any, run: ResidualRun) -> list[int]:
    bos = getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
    return [0] if bos is not None and len(run.tokens) > 1 and int(run.tokens[0]) == bos else []


def _ordered(nodes: Iterable[Node]) -> list[Node]:
    """From late to early, so that a node comes after all that read it."""
    early_first = sorted(nodes, key=lambda node: (node.depth, node.kind, node.unit, node.position, node.to))
    return early_first[::-1]


def _listed(target: Explained, paths: Sequence[Path]) -> list[dict[str, Any]]:
    listed = [
        {"nodes": [target.label, *(node.name for node in path.nodes)], "contribution": path.contribution}
        for path in paths
    ]
    return sorted(listed, key=lambda path: -abs(path["contribution"]))
