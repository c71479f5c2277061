"""`trace`: from a prompt, or pairs, to a circuit of neurons or dictionary features with all edges between them.

What is explained is read by `_targets.py`, the nodes' homes by `_slots.py`; `_choose.py` chooses nodes by their scores,
and `_direct_effects.py` computes scores and edges. Here they meet, and numbers become the two tables of a circuit.
"""

import logging
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from .._errors import PairsError, SettingsError
from .._files import versions
from .._typing import checked
from ..bases._activations import Neurons
from ..bases._runs import run_logits
from ..bases._site import Basis, basis_name
from ..interventions._steering_prompts import text_pieces
from ..models._protocol import TransformerLensModel, model_name
from ..models._threads import holding
from ..nodes._scores import label
from ..propagation.rules import ALL_RULES
from ..tasks._chat import special_positions
from ..tasks._pairs import PromptPairs
from ..tasks._provenance import require_corrupt
from ..tasks._text_tokens import text_tokens
from ..tasks._tokenize import tokenize
from ..tasks._tokenized import Batch, TokenizedPairs
from ._choose import ByShare, Choice, choose_nodes, rank_nodes
from ._circuit import Circuit
from ._direct_effects import DirectEffects, Targets, Totals, direct_effects, mean_totals
from ._edge_heads import Traced
from ._explained import ByExplained, count_explained
from ._rollout import Rollout, roll_out
from ._slots import Slot, find_slots
from ._table import KIND_OF_LETTER, complete, edge_table, node_table, relative_weights, unselected_row
from ._targets import Target, TargetLike, find_targets, goal_positions, target_label, token_text

logger = logging.getLogger(__name__)

_NEURONS, _BY_SHARE = Neurons(), ByShare()
Prompt = str | Int[Tensor, " pos"] | Int[Tensor, "1 pos"] | PromptPairs | TokenizedPairs


@holding
@checked
def trace(
    model: TransformerLensModel,
    prompt_or_pairs: Prompt,
    target: TargetLike = None,
    *,
    basis: Basis | Sequence[Basis] = _NEURONS,
    nodes: Choice | ByExplained = _BY_SHARE,
    rollout: Rollout = None,
    top_k: int = 5,
    baseline: Literal["auto", "corrupt", "zero"] = "auto",
    center: bool = True,
    keep_bos: bool = False,
    skip_special: bool = False,
    exclude: Sequence[tuple[int, int]] = (),
    reference: Sequence[str] | None = None,
    prepend_bos: bool | None = None,
    max_bytes: int = 2**30,
    verbose: bool | None = None,
) -> Circuit:
    """Find the neurons, or dictionary features, that support a target most, and every edge between them.

    A neuron's score is `(a - a_baseline) * dG/da` under all rules of relevance propagation, G the sum of the target's
    logits: positive supports it. Edges are direct effects, with attention and norms frozen and nodes in between
    stopped; what comes into a node sums to its activation. Nodes that were not chosen stay visible as one remainder
    per position. On the same pairs `attribute` gives the same scores, except that its metrics read logits after a soft
    cap and do not center an answer without a wrong answer.

    With dictionaries the same holds for the local replacement model. Its forward pass is the model's own, bit for bit.
    Its gradient replaces the MLP by the dictionary's features, each frozen as firing or not, its skip, and an error
    node that keeps the difference; `attribute` instead follows the path through the MLP. So a feature's activation,
    its encoder's pre-activation, is the sum of what comes in, and embeddings, biases and errors share the whole target.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompt_or_pairs: one prompt (text or tokens), or pairs of one token length, over which everything is averaged.
        target: a token (text as it follows the prompt, or its number), a list of tokens, a tuple of two tokens (the
            difference of their logits), a direction over the logits or over what the unembedding reads, or a metric.
            By default the `top_k` likeliest next tokens; for pairs the answer against the wrong answer. Logits are
            taken before any soft cap. `{position: target}` reads tokens where they are predicted, counted from 0.
        basis: `Neurons()`, `Dictionaries(...)` (transcoders, or SAEs at any hook point), or several of them that have
            nodes in different layers. Layers without nodes are paths, under the rules of relevance propagation.
        nodes: which nodes to choose by |score|: a number of nodes, `ByShare(0.005)` (of the target) or `ByMass(0.8)`
            (of the sum of all |scores|); or `ByExplained(0.5)`, as many as give half of the target when they are run
            alone.
        rollout: trace what comes after one prompt, every token a target where it is predicted: a number of tokens that
            the model generates greedily, or the continuation as text or tokens.
        top_k: how many tokens the default target has.
        baseline: "zero" for relevance; "corrupt" for the difference to each pair's corrupt prompt; "auto" is "corrupt"
            where pairs have corrupt prompts.
        center: take a token's logit minus the mean over the vocabulary. False takes it raw, as the seed paper's code
            does: nodes that raise all logits alike, which no probability depends on, then have scores too.
        keep_bos: let nodes at the BOS position be chosen.
        skip_special: let no nodes be chosen at special tokens, such as those between the turns of a chat.
        exclude: (layer, unit) of nodes that are never chosen, such as those that are active on everything.
        reference: texts over whose tokens means are taken, for `ByExplained` on a single prompt: what nodes are when
            they are not live.
        prepend_bos: None means the model's default.
        max_bytes: for one chunk of backward passes, on top of the graph of one forward pass.
        verbose: a progress bar. None: after two seconds, in a notebook or a terminal.

    Returns:
        A `Circuit`. Cost: a forward and a backward pass per prompt (twice for several, one forward more for pairs), and
        a vector-Jacobian product per node, through attention alone and only below it.

    Raises:
        UnsupportedModelError: relevance propagation does not apply to this model; `check_model(model)` says why.
        PairsError: prompts of different token lengths, no corrupt prompts, or a target that is not one token.
        SettingsError: arguments that contradict each other, no node that qualifies, two bases in one layer, or a
            dictionary with an encoder of its own.
        NumericalError: the target is zero, or incoming edges do not sum to a node's activation.

    Source: Arora et al. 2026, arXiv 2601.22594; Ameisen et al. 2025 (local replacement); METHODS 1.2, 1.5, 1.6, 4.5.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model = tnc.load_demo_model()
        >>> circuit = tnc.trace(model, "The capital of the state containing Dallas is", " Austin", nodes=50)
        >>> len(circuit)
        50
        >>> story = tnc.trace(model, "The capital of the state containing Dallas is", rollout=2, nodes=50)
        >>> story.nodes.query("kind == 'logit'")["position"].tolist()
        [9, 10]
        >>> transcoders = tnc.bases.Dictionaries(tnc.load_demo_dictionaries("transcoder"))
        >>> circuit = tnc.trace(model, "The capital of the state containing Dallas is", basis=transcoders)
        >>> sorted(circuit.nodes["kind"].unique())
        ['bias', 'embedding', 'error', 'feature', 'logit', 'unselected']
    """
    text = prompt_or_pairs if isinstance(prompt_or_pairs, str) else None
    single = not isinstance(prompt_or_pairs, PromptPairs | TokenizedPairs)
    pairs = _as_pairs(model, prompt_or_pairs, prepend_bos, top_k, answered=callable(target))
    goals: dict[int, int] = {}
    if rollout is not None:
        if not single or target is not None:
            raise SettingsError("rollout= takes one prompt, and is its target: leave target= out, and pairs.")
        longer, goals = roll_out(model, pairs.clean[0][None], text, rollout)
        pairs = TokenizedPairs.from_tokens(list(longer), torch.zeros(1, dtype=torch.long, device=longer.device))
        target, text = goals, None
    paired = _is_paired(pairs, baseline)
    targets = find_targets(model, pairs, target, text, top_k if single else None, center=center)
    slots = find_slots(model, basis)
    skipped = [] if keep_bos else _bos_positions(model, pairs)
    if skip_special:
        skipped = sorted({*skipped, *special_positions(model, pairs)} - ({0} if keep_bos else set()))

    choice = _BY_SHARE if isinstance(nodes, ByExplained) else nodes

    def choose(totals: Totals) -> Int[Tensor, "node 3"]:
        layers = [slot.layer for slot in slots]
        return choose_nodes(
            totals.score, totals.target, layers, choice, skipped_positions=skipped, excluded=list(exclude)
        )

    batches = list(pairs.batches(1))
    chosen, explained = choose, {}
    if isinstance(nodes, ByExplained):
        targets = _known_targets(model, batches, targets)
        totals = mean_totals(model, batches, targets, paired=paired, slots=slots, verbose=verbose)
        layers = [slot.layer for slot in slots]
        ranking = rank_nodes(totals.score, layers, skipped_positions=skipped, excluded=list(exclude))
        texts = None if paired else _reference_tokens(model, reference, prepend_bos)
        count, sizes = count_explained(
            model,
            basis,
            batches,
            targets,
            ranking,
            nodes,
            reference=texts,
            skipped_positions=skipped,
            verbose=verbose,
        )
        chosen, explained = ranking.first(count), {"share": dict(sizes)[count], "sizes": [list(pair) for pair in sizes]}
    effects = direct_effects(
        model, batches, chosen, targets, paired=paired, slots=slots, max_bytes=max_bytes, verbose=verbose
    )
    if single:  # its answer is the likeliest token, which is known now
        pairs = TokenizedPairs.from_tokens(pairs.clean, effects.totals.probabilities[-1:].topk(1).indices[0])
    columns = torch.stack(list(pairs.clean)).T
    ids = [int(column[0]) if bool((column == column[0]).all()) else -1 for column in columns]  # -1: prompts differ
    tokens = ["…" if token < 0 else token_text(model, token) for token in ids]
    position = int(pairs.position[0])
    labels = [target_label(model, target) for target in effects.targets]

    sources = _source_rows(effects, slots, tokens, ids, paired=paired)
    outputs = _target_rows(effects, labels, int(model.cfg.n_layers), position)
    edges = _edges(effects.edges, sources, [*sources[: len(effects.nodes)], *outputs])
    used = set(edges["source"])
    always = ("neuron", "feature", "embedding")
    table = node_table([row for row in sources if row["kind"] in always or row["node"] in used] + outputs)
    edges["relative"] = relative_weights(table, edges)
    table = complete(table, edges, effects.totals.target)
    settings = {
        "model": model_name(model), "n_layers": int(model.cfg.n_layers),
        "basis": basis_name(basis), "n_prompts": len(pairs),
        "sites": [
            {"hook": s.hook, "layer": s.layer, "letter": s.letter, "width": int(score.shape[-1]), "errors": s.has_error}
            for s, score in zip(slots, effects.totals.score, strict=True)
        ],
        "prompt": text if text is not None else _common_text(model, pairs.clean[0], ids), "tokens": tokens,
        "token_ids": pairs.clean[0].tolist() if len(pairs) == 1 else None, "pairs_hash": pairs.hash,
        "target": labels, "target_value": effects.totals.target, "position": position,
        "baseline": "corrupt" if paired else "zero", "nodes": nodes if isinstance(nodes, int) else nodes.label,
        "rollout": [[place, token] for place, token in goals.items()] or None,
        "explained": explained, "center": center, **_prediction(model, effects, position, single=single),
        "layer_scores": _layer_scores(effects, slots),
        "skipped_positions": skipped, "exclude": [list(pair) for pair in exclude], "rules": list(ALL_RULES),
        "largest_residual": effects.largest_residual, "chunk": effects.chunk, "versions": versions(),
    }  # fmt: skip
    traced = Traced(weakref.ref(model), pairs)
    circuit = Circuit(table, edge_table(edges), settings, basis=basis, traced=traced)
    for note in circuit.notes:
        logger.warning(note)
    return circuit


def _known_targets(model: Any, batches: Sequence[Batch], targets: Targets) -> Sequence[Target]:
    """Targets that are found from the model's own next token, found."""
    if not callable(targets):
        return targets
    with torch.no_grad():
        logits = run_logits(model, batches[0].clean, batches[0].attention_mask)
    return targets(logits[0, int(batches[0].position[0])])


def _reference_tokens(model: Any, reference: Sequence[str] | None, prepend_bos: bool | None) -> list[Tensor]:
    if not reference:
        raise SettingsError(
            "ByExplained on a single prompt needs texts over which nodes have their means: reference=[...], a few "
            "dozen sentences; or pairs with corrupt prompts. Zero would be a value that the model never sees."
        )
    options = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
    return [model.to_tokens(text, **options)[0] for text in reference]


def _prediction(model: Any, effects: DirectEffects, end: int, *, single: bool) -> dict[str, Any]:
    """What the model itself says next: its likeliest tokens, and of each target token rank and likelier twin.

    Over several prompts probabilities are means, and ranks are not given: prompts have answers of their own. With
    targets at several positions `predicted` is of the last, and `predicted_at` of every target's.
    """
    goals = goal_positions(effects.targets, end)
    said = [_likeliest(model, probabilities) for probabilities in effects.totals.probabilities]
    ranks, twins, at = {}, {}, {}
    for target in effects.targets if single else ():
        if len(target.tokens) == 1:
            (token,) = target.tokens
            goal = goals.index(end if target.position is None else target.position)
            probabilities, at[target.name] = effects.totals.probabilities[goal], said[goal]
            ranks[target.name] = 1 + int((probabilities > probabilities[token]).sum())
            twin = _spaced_twin(model, token)
            if twin is not None and probabilities[twin] > probabilities[token]:
                twins[target.name] = [token_text(model, twin), round(float(probabilities[twin]), 6)]
    return {
        "predicted": said[-1], "predicted_at": at if len(goals) > 1 else {}, "target_ranks": ranks, "twins": twins,
    }  # fmt: skip


def _likeliest(model: Any, probabilities: Tensor) -> list[list[Any]]:
    best = probabilities.topk(min(5, len(probabilities)))
    pairs = zip(best.values, best.indices.tolist(), strict=True)
    return [[token_text(model, token), round(float(p), 6)] for p, token in pairs]


def _spaced_twin(model: Any, token: int) -> int | None:
    """The token that differs by a leading space alone; None for tokens that have it, and where there is none."""
    tokenizer, text = getattr(model, "tokenizer", None), token_text(model, token)
    if tokenizer is None or not text.strip() or text.startswith(" "):
        return None
    for mark in ("Ġ", "▁"):
        twin = tokenizer.convert_tokens_to_ids(mark + text)
        if isinstance(twin, int) and twin != tokenizer.unk_token_id and twin != token:
            return twin
    return None


def _layer_scores(effects: DirectEffects, slots: Sequence[Slot]) -> list[list[int | float]]:
    """Of each layer: its number, the sum of all its nodes' scores, and of their sizes; chosen or not."""
    scores = effects.totals.score
    return [[s.layer, float(own.sum()), float(own.abs().sum())] for s, own in zip(slots, scores, strict=True)]


def _source_rows(
    effects: DirectEffects, slots: Sequence[Slot], tokens: Sequence[str], token_ids: Sequence[int], *, paired: bool
) -> list[dict]:
    """One row of the nodes per column of the edges, in the order of `Columns`."""
    totals, rows = effects.totals, []
    for index, position, unit in effects.nodes.tolist():
        slot, place = slots[index], (position, unit)
        activation = float(totals.activation[index][place])
        gate, up = (
            0 if values is None else int(torch.sign(values[place])) for values in (totals.gate[index], totals.up[index])
        )
        rows.append(
            {
                "node": label(slot.layer, slot.letter, unit, position, "node"), "kind": KIND_OF_LETTER[slot.letter],
                "layer": slot.layer, "unit": unit, "position": position, "token": tokens[position],
                "activation": activation, "change": float(totals.change[index][place]),
                "sign": int(np.sign(activation)), "gate_sign": gate, "up_sign": up,
                "score": float(totals.score[index][place]),
            }
        )  # fmt: skip
    for position, (token, token_id) in enumerate(zip(tokens, token_ids, strict=True)):
        rows.append(
            {
                "node": f"embed@{position}", "label": token, "kind": "embedding", "unit": token_id,
                "position": position, "token": token, "score": float(totals.embedding[position]),
            }
        )  # fmt: skip
    rows += [unselected_row(position, token) for position, token in enumerate(tokens)]
    for name, text, score in (
        ("positions", "positional embeddings", totals.positional),
        ("bias", "biases", totals.bias),
    ):
        rows.append({"node": name, "label": text, "kind": "bias", "score": 0.0 if paired else score})
    rows.append({"node": "linearization_error", "label": "not linear", "kind": "linearization_error"})
    for index in effects.columns.slots_with_errors:
        layer, scores = slots[index].layer, totals.errors[index]
        assert scores is not None
        rows += [
            {
                "node": label(layer, "F", -1, position, "error"), "label": f"error of layer {layer}", "kind": "error",
                "layer": layer, "position": position, "token": token, "score": float(scores[position]),
            }
            for position, token in enumerate(tokens)
        ]  # fmt: skip
    return rows


def _target_rows(effects: DirectEffects, labels: Sequence[str], n_layers: int, position: int) -> list[dict]:
    """One row per logit node; a probability where it is a single token."""
    totals, rows, goals = effects.totals, [], goal_positions(effects.targets, position)
    for index, (target, text) in enumerate(zip(effects.targets, labels, strict=True)):
        value, change = float(totals.target_values[index]), float(totals.target_changes[index])
        place = position if target.position is None else target.position
        probabilities = totals.probabilities[goals.index(place)]
        rows.append(
            {
                "node": target.name, "label": text, "kind": "logit", "layer": n_layers,
                "unit": target.tokens[0] if target.tokens else -1, "position": place, "token": text,
                "activation": value, "change": change, "sign": int(np.sign(value)), "score": change,
                "probability": float(probabilities[target.tokens[0]]) if len(target.tokens) == 1 else None,
            }
        )  # fmt: skip
    return rows


def _edges(matrix: Tensor, sources: Sequence[dict], receivers: Sequence[dict]) -> pd.DataFrame:
    (receiver, source), values = matrix.indices().numpy(), matrix.values().numpy()
    live = (values != 0).any(1)
    names = [np.array([row["node"] for row in rows], dtype=object) for rows in (sources, receivers)]
    return pd.DataFrame(
        {
            "source": pd.Series(names[0][source[live]], dtype=object),  # plain strings: looked up by the ten thousands
            "target": pd.Series(names[1][receiver[live]], dtype=object),
            "weight": values[live, 0],
            "attribution": values[live, 1],
        }
    )


def _as_pairs(model: Any, prompt: Prompt, prepend_bos: bool | None, top_k: int, *, answered: bool) -> TokenizedPairs:
    """Pairs of one length. The answer of a single prompt is its likeliest next token if `answered`, else unknown."""
    if isinstance(prompt, PromptPairs | TokenizedPairs):
        pairs = tokenize(model, prompt, prepend_bos=prepend_bos)
        lengths = sorted(set(pairs.lengths))
        if len(lengths) > 1:
            raise PairsError(
                f"a circuit has positions, so all prompts need one token length; got {lengths}. Trace the prompts of "
                "each length separately, sum_positions() each circuit, and join them with Circuit.merge([...]); or "
                "keep one length: tasks.keep_fitting(model, pairs, same_length=True)."
            )
        return pairs
    if isinstance(prompt, str):
        tokens = text_tokens(model, prompt, prepend_bos)
    else:
        if prepend_bos is not None:
            raise SettingsError("prepend_bos cannot be applied to tokens: put BOS into them.")
        tokens = prompt.reshape(1, -1).to(model.cfg.device or "cpu")
    if tokens.numel() == 0 or not 1 <= top_k <= int(model.cfg.d_vocab):
        raise SettingsError(f"expected a prompt with tokens, and top_k between 1 and the vocabulary; got {top_k=}.")
    answer = torch.zeros(1, dtype=torch.long, device=tokens.device)
    if answered:
        with torch.no_grad():
            answer = run_logits(model, tokens)[0, -1].topk(1).indices
    return TokenizedPairs.from_tokens(list(tokens), answer)


def _is_paired(pairs: TokenizedPairs, baseline: str) -> bool:
    if baseline == "corrupt" and pairs.corrupt is None:
        raise PairsError("baseline='corrupt' needs pairs with corrupt prompts. Give them, or baseline='zero'.")
    if baseline == "zero" or pairs.corrupt is None:
        return False
    require_corrupt(pairs, "a trace of pairs", instead="baseline='zero'")
    return True


def _bos_positions(model: Any, pairs: TokenizedPairs) -> list[int]:
    """[0] where every prompt starts with BOS and goes on after it."""
    bos = getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
    starts = all(len(prompt) > 1 and int(prompt[0]) == bos for prompt in pairs.clean)
    return [0] if bos is not None and starts else []


def _common_text(model: Any, tokens: Int[Tensor, " pos"], ids: Sequence[int]) -> str:
    """The prompt with its spaces; "…" for the tokens in which the prompts differ."""
    pieces = text_pieces(model, tokens)
    blank = [" …" if piece.startswith(" ") else "…" for piece in pieces]
    return "".join(piece if token >= 0 else gap for piece, gap, token in zip(pieces, blank, ids, strict=True))
