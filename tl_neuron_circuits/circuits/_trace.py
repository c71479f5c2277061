"""`trace`: from prompts, or pairs, to a circuit of neurons or dictionary features with all edges between them.

What is asked is read by `_trace_prompts.py` and `_targets.py`, where tokens stand by `_alignment.py`, the nodes' homes
by `_slots.py`. `_total_effects.py` computes scores, `_choose.py` chooses nodes by them, `_direct_effects.py` computes
the edges. Here they meet, and numbers become the tables of a circuit.
"""

import logging
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from .._errors import SettingsError
from .._files import versions
from .._typing import checked
from ..bases._activations import Neurons
from ..bases._runs import run_logits
from ..bases._site import Basis, basis_name
from ..interventions._steering_prompts import text_pieces
from ..models._protocol import TransformerLensModel, model_name
from ..models._threads import holding
from ..propagation.rules import ALL_RULES
from ..tasks._tokenized import Batch, TokenizedPairs
from ._alignment import Places
from ._by_prompt import prompt_table
from ._choose import ByShare, Choice, choose_nodes, rank_nodes
from ._circuit import Circuit
from ._direct_effects import DirectEffects, direct_effects
from ._edge_heads import Traced
from ._explained import ByExplained, count_explained
from ._flow import complete
from ._prediction import predicted_by_prompt, prediction
from ._rollout import Rollout
from ._slots import Slot, find_slots
from ._table import node_table
from ._targets import Target, TargetLike, find_targets, rollout_targets, target_label
from ._total_effects import Targets, Totals, can_share, each_totals, mean_totals
from ._trace_prompts import Prompt, TracedPrompts, find_places, is_paired, read_question
from ._trace_tables import edge_rows, source_rows, target_rows

logger = logging.getLogger(__name__)

_NEURONS, _BY_SHARE = Neurons(), ByShare()


@holding
@checked
def trace(
    model: TransformerLensModel,
    prompt_or_pairs: Prompt,
    target: TargetLike = None,
    *,
    basis: Basis | Sequence[Basis] = _NEURONS,
    nodes: Choice | ByExplained = _BY_SHARE,
    selection: Literal["mean", "union"] = "mean",
    positions: Literal["keep", "sum"] = "keep",
    rollout: Rollout = None,
    top_k: int = 5,
    baseline: Literal["auto", "corrupt", "zero"] = "auto",
    center: bool = True,
    keep_bos: bool = False,
    skip_special: bool = False,
    exclude: Sequence[tuple[int, int]] = (),
    reference: Sequence[str] | None = None,
    by_prompt: bool | None = None,
    profiles: bool = False,
    prepend_bos: bool | None = None,
    batch_size: int = 8,
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
        prompt_or_pairs: one prompt (text or tokens), several, or pairs; over several everything is averaged. Prompts
            need one token length, or marks around what differs, "The capital of the state containing {city:Dallas} is",
            in every prompt: a marked span that has several lengths is one place, over whose tokens numbers are added
            up. Or give `positions="sum"`. Double braces, "{{a:1}}", are plain text.
        target: a token (text as it follows the prompt, or its number), a list of tokens, a tuple of two tokens (the
            difference of their logits), a direction over the logits or over what the unembedding reads, or a metric.
            By default the `top_k` likeliest next tokens; for pairs the answer against the wrong answer. For several
            prompts one target for all, or a list with a token or a tuple for each; by default each one's likeliest
            next token. Logits are taken before any soft cap. `{position: target}` reads tokens where they are
            predicted, counted from 0.
        basis: `Neurons()`, `Dictionaries(...)` (transcoders, or SAEs at any hook point), or several of them that have
            nodes in different layers. Layers without nodes are paths, under the rules of relevance propagation.
        nodes: which nodes to choose by |score|: a number of nodes, `ByShare(0.005)` (of the target) or `ByMass(0.8)`
            (of the sum of all |scores|); or `ByExplained(0.5)`, as many as give half of the target when they are run
            alone.
        selection: of several prompts, choose by the scores' mean, or take every node that is chosen on any prompt by
            itself ("union").
        positions: "sum" adds everything up over positions, one node per neuron, as `Circuit.sum_positions` does.
        rollout: trace what comes after a prompt, every token a target where it is predicted: a number of tokens that
            the model generates greedily, or the continuation as text or tokens. Several prompts go on for equally many
            tokens, each with its own; a list gives one continuation for each.
        top_k: how many tokens the default target has.
        baseline: "zero" for relevance; "corrupt" for the difference to each pair's corrupt prompt; "auto" is "corrupt"
            where pairs have corrupt prompts.
        center: take a token's logit minus the mean over the vocabulary. False takes it raw, as the seed paper's code
            does: nodes that raise all logits alike, which no probability depends on, then have scores too.
        keep_bos: let nodes at the BOS position be chosen.
        skip_special: let no nodes be chosen at special tokens, such as those between the turns of a chat.
        exclude: (layer, unit) of nodes that are never chosen, such as those that are active on everything.
        reference: texts over whose tokens means are taken, for `ByExplained` without corrupt prompts: what nodes are
            when they are not live.
        by_prompt: keep every prompt's scores and edges in `Circuit.by_prompt`. By default for several prompts, but
            not for pairs, which may be hundreds.
        profiles: add what every token brings to every node through all paths, and every node to every target, to that
            table. A backward pass per node.
        prepend_bos: None means the model's default.
        batch_size: prompts of one length that share their passes, on models without biases, and pairs.
        max_bytes: for one chunk of backward passes, on top of the graph of one forward pass.
        verbose: a progress bar. None: after two seconds, in a notebook or a terminal.

    Returns:
        A `Circuit`. Cost: a forward and a backward pass per prompt (twice for several, one forward more for pairs), and
        a vector-Jacobian product per node, through attention alone and only below it.

    Raises:
        UnsupportedModelError: relevance propagation does not apply to this model; `check_model(model)` says why.
        PairsError: prompts of different token lengths without marks, no corrupt prompts, or a target that is not one
            token.
        SettingsError: other marks in other prompts, arguments that contradict each other, no node that qualifies, two
            bases in one layer, a dictionary with an encoder of its own, or more edges than memory holds.
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
        >>> cities = [f"The capital of the state containing {city} is" for city in ("Dallas", "Belgate")]
        >>> both = tnc.trace(model, cities, [" Austin", " Augusta"], nodes=50)
        >>> both.by_prompt.query("kind == 'node'").groupby("prompt")["attribution"].count().tolist()
        [61, 61]
        >>> transcoders = tnc.bases.Dictionaries(tnc.load_demo_dictionaries("transcoder"))
        >>> circuit = tnc.trace(model, "The capital of the state containing Dallas is", basis=transcoders)
        >>> sorted(circuit.nodes["kind"].unique())
        ['bias', 'embedding', 'error', 'feature', 'logit', 'unselected']
    """
    asked = read_question(model, prompt_or_pairs, target, rollout, prepend_bos=prepend_bos, top_k=top_k)
    paired, slots = is_paired(asked.pairs, baseline), find_slots(model, basis)
    places = find_places(model, asked, positions=positions, keep_bos=keep_bos, skip_special=skip_special)
    top = top_k if asked.single else None
    if asked.continued and asked.listed:
        targets = rollout_targets(asked.continued, center=center)
    else:
        targets = find_targets(model, asked.pairs, asked.target, asked.text, top, center=center)
    batches = list(asked.pairs.batches(batch_size if can_share(model, slots, paired=paired) else 1))
    run: dict[str, Any] = {"paired": paired, "slots": slots, "alignments": places.alignments, "verbose": verbose}
    rank: dict[str, Any] = {"skipped_positions": places.skipped, "excluded": list(exclude)}
    layers = [slot.layer for slot in slots]

    def choose(totals: Totals) -> Int[Tensor, "node 3"]:
        assert not isinstance(nodes, ByExplained)
        return choose_nodes(totals.score, totals.change, totals.target, layers, nodes, **rank)

    chosen, explained = choose, {}
    if selection == "union" and not callable(targets):
        if isinstance(nodes, ByExplained):
            raise SettingsError("ByExplained ranks nodes by the mean of all prompts: leave selection='union' out.")
        chosen = torch.cat([choose(own) for own in each_totals(model, batches, targets, **run)]).unique(dim=0)
    elif isinstance(nodes, ByExplained):
        targets = _known_targets(model, batches, targets)
        mean = mean_totals(model, batches, targets, **run)
        ranking = rank_nodes(mean.score, mean.change, layers, **rank)
        texts = None if paired else _reference_tokens(model, reference, prepend_bos)
        one_by_one = list(asked.pairs.batches(1))
        count, sizes = count_explained(
            model, basis, one_by_one, targets, ranking, nodes, reference=texts, places=places, verbose=verbose
        )
        chosen, explained = ranking.first(count), {"share": dict(sizes)[count], "sizes": [list(pair) for pair in sizes]}
    effects = direct_effects(
        model, batches, chosen, targets, **run, keep=asked.listed if by_prompt is None else by_prompt,
        profiles=profiles, max_bytes=max_bytes,
    )  # fmt: skip
    settings = {
        "model": model_name(model), "n_layers": int(model.cfg.n_layers), "basis": basis_name(basis),
        "baseline": "corrupt" if paired else "zero", "nodes": nodes if isinstance(nodes, int) else nodes.label,
        "selection": selection, "explained": explained, "center": center, "exclude": [list(pair) for pair in exclude],
        "rules": list(ALL_RULES), "versions": versions(),
    }  # fmt: skip
    circuit = _to_circuit(model, asked, places, effects, slots, basis, settings, paired=paired)
    for note in circuit.notes:
        logger.warning(note)
    return circuit


def _to_circuit(
    model: Any, asked: TracedPrompts, places: Places, effects: DirectEffects, slots: Sequence[Slot],
    basis: Basis | Sequence[Basis], settings: dict[str, Any], *, paired: bool,
) -> Circuit:  # fmt: skip
    """The circuit's tables, and what was found beside them."""
    pairs, end = asked.pairs, int(asked.pairs.position[0])
    if asked.single:  # its answer is the likeliest token, which is known now
        pairs = TokenizedPairs.from_tokens(pairs.clean, effects.totals.probabilities[-1:].topk(1).indices[0])
    answers = pairs.answer.tolist() if asked.listed and pairs.wrong_answer is None else ()
    labels = [target_label(model, target, answers) for target in effects.targets]
    sources = source_rows(effects, slots, places, paired=paired)
    outputs = target_rows(effects, labels, int(model.cfg.n_layers), places, end)
    edges = edge_rows(effects.edges, sources, [*sources[: len(effects.nodes)], *outputs])
    by_prompt = prompt_table(effects, [row["node"] for row in sources], [row["node"] for row in outputs])
    used = set(edges["source"])
    always = ("neuron", "feature", "embedding")
    table = node_table([row for row in sources if row["kind"] in always or row["node"] in used] + outputs)
    table, edges = complete(table, edges, effects.totals.target)
    settings = settings | {
        "n_prompts": len(pairs), "pairs_hash": pairs.hash,
        "sites": [
            {"hook": s.hook, "layer": s.layer, "letter": s.letter, "width": int(score.shape[-1]), "errors": s.has_error}
            for s, score in zip(slots, effects.totals.score, strict=True)
        ],
        **_prompt_settings(model, asked, places, effects, pairs),
        "target": labels, "target_value": effects.totals.target,
        "position": places.position(int(places.alignments[0].place[end])),
        "rollout": _rollout_settings(asked, places),
        **prediction(model, effects, end, single=asked.single),
        "layer_scores": _layer_scores(effects, slots),
        "largest_residual": effects.largest_residual, "chunk": effects.chunk,
    }  # fmt: skip
    traced = Traced(weakref.ref(model), pairs)
    return Circuit(table, edges, settings, basis=basis, traced=traced, by_prompt=by_prompt)


def _prompt_settings(
    model: Any, asked: TracedPrompts, places: Places, effects: DirectEffects, pairs: TokenizedPairs
) -> dict[str, Any]:
    """The prompts, and where their tokens stand."""
    texts = list(asked.texts) if asked.texts is not None else ["".join(text_pieces(model, one)) for one in pairs.clean]
    if asked.text is not None:
        prompt = str(asked.text)
    elif places.how == "keep":
        prompt = _common_text(model, pairs.clean[0], places.token_ids)
    else:
        shown = list(dict.fromkeys(map(str, texts)))
        prompt = " | ".join(shown[:3]) + (f" | … ({len(shown)} prompts)" if len(shown) > 3 else "")
    several = len(pairs) > 1 and len(effects.by_prompt) > 0
    return {
        "prompt": prompt, "tokens": [] if places.how == "sum" else list(places.texts),
        "token_ids": pairs.clean[0].tolist() if len(pairs) == 1 else None, "positions": places.how,
        "skipped_positions": [] if places.how == "sum" else list(places.skipped),
        "spans": {name: list(ends) for name, ends in places.spans.items()},
        "prompts": predicted_by_prompt(model, effects, pairs, texts) if several else None,
        "places": None if places.how == "keep" else [one.place.tolist() for one in places.alignments],
    }  # fmt: skip


def _rollout_settings(asked: TracedPrompts, places: Places) -> list[list[Any]] | None:
    """The place that predicts it and the token, in order; of several prompts every one's token."""
    if not asked.continued:
        return None
    start = len(asked.pairs.clean[0]) - len(asked.continued[0])
    tokens = list(zip(*asked.continued, strict=True))
    at = places.alignments[0].place[start:].tolist()
    return [[place, own[0] if asked.single else list(own)] for place, own in zip(at, tokens, strict=True)]


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
            "ByExplained without corrupt prompts needs texts over which nodes have their means: reference=[...], a few "
            "dozen sentences; or pairs with corrupt prompts. Zero would be a value that the model never sees."
        )
    options = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
    return [model.to_tokens(text, **options)[0] for text in reference]


def _layer_scores(effects: DirectEffects, slots: Sequence[Slot]) -> list[list[int | float]]:
    """Of each layer: its number, the sum of all its nodes' scores, and of their sizes; chosen or not."""
    scores = effects.totals.score
    return [[s.layer, float(own.sum()), float(own.abs().sum())] for s, own in zip(slots, scores, strict=True)]


def _common_text(model: Any, tokens: Int[Tensor, " pos"], ids: Sequence[int]) -> str:
    """The prompt with its spaces; "…" for the tokens in which the prompts differ."""
    pieces = text_pieces(model, tokens)
    blank = [" …" if piece.startswith(" ") else "…" for piece in pieces]
    return "".join(piece if token >= 0 else gap for piece, gap, token in zip(pieces, blank, ids, strict=True))
