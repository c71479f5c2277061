"""`trace`: from a prompt, or pairs, to a circuit of neurons or dictionary features with all edges between them."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from .._errors import PairsError, SettingsError
from .._files import versions
from .._typing import checked
from ..bases._activations import Neurons
from ..bases._runs import logits_of
from ..bases._site import Basis, name_of
from ..interventions._steering_prompts import text_pieces
from ..models._protocol import TransformerLensModel
from ..propagation.rules import ALL_RULES
from ..tasks._pairs import PromptPairs
from ..tasks._tokenize import tokenize
from ..tasks._tokenized import TokenizedPairs
from ._assemble import Places, assemble
from ._choose import Choice, choose_nodes
from ._circuit import Circuit
from ._direct_effects import direct_effects
from ._slots import slots_of
from ._target import Goal
from ._targets import Target, find_goals, token_text
from ._totals import Totals

_NEURONS = Neurons()
Prompt = str | Int[Tensor, " pos"] | Int[Tensor, "1 pos"] | PromptPairs | TokenizedPairs


@checked
def trace(
    model: TransformerLensModel,
    prompt_or_pairs: Prompt,
    target: Target = None,
    *,
    basis: Basis | Sequence[Basis] = _NEURONS,
    nodes: Choice = "share",
    share: float = 0.005,
    mass: float = 0.8,
    top_k: int = 5,
    baseline: Literal["auto", "corrupt", "zero"] = "auto",
    keep_bos: bool = False,
    exclude: Sequence[tuple[int, int]] = (),
    prepend_bos: bool | None = None,
    max_bytes: int = 2**30,
    verbose: bool = False,
) -> Circuit:
    """The neurons, or features of dictionaries, that support a target most, and every edge between them.

    A neuron's score is `(a - a_baseline) * dG/da` under all rules of relevance propagation, G the sum of the target's
    logits: positive supports it. Edges are direct effects, attention and norms frozen and nodes in between stopped;
    what comes into a node sums to its activation. Nodes that were not chosen stay visible as one remainder a position.

    With dictionaries the same holds of the local replacement model. Its forward pass is the model's own, bit for bit.
    Its gradient takes what a dictionary writes for its features, each frozen as firing or not, its skip, and an error
    node that keeps the difference: not the path through the MLP, which `attribute` follows. So a feature's activation,
    its encoder's pre-activation, is the sum of what comes in, and embeddings, biases and errors share the whole target.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompt_or_pairs: one prompt (text or tokens), or pairs of one token length, over which everything is averaged.
        target: a token (text as it follows the prompt, or its number), a list of tokens, a tuple of two tokens (the
            difference of their logits), a direction over the logits or over what the unembedding reads, or a metric.
            By default the `top_k` likeliest next tokens; for pairs the answer against the wrong answer. Logits are
            taken before any soft cap and minus their mean over the vocabulary.
        basis: `Neurons()`, `Dictionaries(...)` (transcoders, or SAEs at any hook point), or several of them that have
            nodes in different layers. Layers without nodes are paths, under the rules of relevance propagation.
        nodes: "share" takes nodes with |score| of at least `share` of the target; a number takes as many; "mass"
            takes the fewest that make up `mass` of the sum of all |scores|.
        share: see `nodes`.
        mass: see `nodes`.
        top_k: how many tokens the default target has.
        baseline: "zero" for relevance; "corrupt" for the difference to each pair's corrupt prompt; "auto" is "corrupt"
            where pairs have corrupt prompts.
        keep_bos: let nodes at the BOS position be chosen.
        exclude: (layer, unit) of nodes that are never chosen, such as those that are active on everything.
        prepend_bos: None means the model's default.
        max_bytes: for one chunk of backward passes, on top of the graph of one forward pass.
        verbose: show progress.

    Returns:
        A `Circuit`. Cost: a forward and a backward pass a prompt (twice for several, one forward more for pairs), and a
        vector-Jacobian product a node, through attention alone and only below it.

    Raises:
        UnsupportedModelError: relevance propagation does not apply to this model; `check_model(model)` says why.
        PairsError: prompts of several token lengths, no corrupt prompts, or a target that is not one token.
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
        >>> transcoders = tnc.bases.Dictionaries(tnc.load_demo_dictionaries("transcoder"))
        >>> of_features = tnc.trace(model, "The capital of the state containing Dallas is", basis=transcoders)
        >>> sorted(of_features.nodes["kind"].unique())
        ['bias', 'embedding', 'error', 'feature', 'logit', 'unselected']
    """
    text = prompt_or_pairs if isinstance(prompt_or_pairs, str) else None
    single = not isinstance(prompt_or_pairs, PromptPairs | TokenizedPairs)
    pairs = _as_pairs(model, prompt_or_pairs, prepend_bos, top_k, answered=callable(target))
    paired = _is_paired(pairs, baseline)
    batches = list(pairs.batches(1))
    goals = find_goals(model, pairs, target, text, top_k if single else None)
    slots = slots_of(model, basis)
    bos = [] if keep_bos else _bos_positions(model, pairs)
    layers = [slot.layer for slot in slots]

    def choose(found: Totals) -> Int[Tensor, "node 3"]:
        which = {"share": share, "mass": mass, "skipped_positions": bos, "excluded": list(exclude)}
        return choose_nodes(found, layers, nodes, **which)

    effects = direct_effects(
        model, batches, choose, goals, paired=paired, slots=slots, max_bytes=max_bytes, verbose=verbose
    )
    goals = effects.goals
    if single:  # its answer is the likeliest token, which is known now
        pairs = TokenizedPairs.from_tokens(pairs.clean, effects.totals.probabilities.topk(1).indices)
    ids = _common_tokens(pairs)
    tokens = ["…" if one < 0 else token_text(model, one) for one in ids]
    position = int(pairs.position[0])
    labels = _goal_labels(model, goals)
    probabilities = _probabilities(effects.totals, goals)
    places = Places(tokens, ids, position, int(model.cfg.n_layers), slots, labels, probabilities)
    table, edges = assemble(effects, goals, places, paired=paired)
    settings = {
        "model": str(getattr(model.cfg, "model_name", "unknown")), "n_layers": int(model.cfg.n_layers),
        "basis": name_of(basis), "n_prompts": len(pairs),
        "sites": [
            {"hook": s.hook, "layer": s.layer, "letter": s.letter, "width": int(of.shape[-1]), "errors": s.has_error}
            for s, of in zip(slots, effects.totals.score, strict=True)
        ],
        "prompt": text if text is not None else _common_text(model, pairs.clean[0], ids), "tokens": tokens,
        "token_ids": pairs.clean[0].tolist() if len(pairs) == 1 else None, "pairs_hash": pairs.hash,
        "target": labels, "target_value": float(effects.totals.goals.sum()), "position": position,
        "baseline": "corrupt" if paired else "zero", "nodes": nodes, "share": share, "mass": mass,
        "skipped_positions": bos, "exclude": [list(one) for one in exclude], "rules": list(ALL_RULES),
        "largest_residual": effects.largest_residual, "chunk": effects.chunk, "versions": versions(),
    }  # fmt: skip
    return Circuit(table, edges, settings, basis=basis)


def _as_pairs(model: Any, prompt: Prompt, prepend_bos: bool | None, top_k: int, *, answered: bool) -> TokenizedPairs:
    """Pairs of one length. The answer of a single prompt is its likeliest next token if `answered`, else unknown."""
    if isinstance(prompt, PromptPairs | TokenizedPairs):
        pairs = tokenize(model, prompt, prepend_bos=prepend_bos)
        lengths = sorted(set(pairs.lengths))
        if len(lengths) > 1:
            raise PairsError(
                f"a circuit has positions, so all prompts need one token length; got {lengths}. Trace the prompts of "
                "each length, sum_positions() each circuit, and join them with Circuit.merge([...])."
            )
        return pairs
    if isinstance(prompt, str):
        options = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
        tokens = model.to_tokens(prompt, **options)
    else:
        if prepend_bos is not None:
            raise SettingsError("prepend_bos cannot be applied to tokens: put BOS into them.")
        tokens = prompt.reshape(1, -1).to(model.cfg.device or "cpu")
    if tokens.numel() == 0 or not 1 <= top_k <= int(model.cfg.d_vocab):
        raise SettingsError(f"expected a prompt with tokens, and top_k between 1 and the vocabulary; got {top_k=}.")
    answer = torch.zeros(1, dtype=torch.long, device=tokens.device)
    if answered:
        with torch.no_grad():
            answer = logits_of(model, tokens)[0, -1].topk(1).indices
    return TokenizedPairs.from_tokens(list(tokens), answer)


def _is_paired(pairs: TokenizedPairs, baseline: str) -> bool:
    if baseline == "corrupt" and pairs.corrupt is None:
        raise PairsError("baseline='corrupt' needs pairs with corrupt prompts. Give them, or baseline='zero'.")
    if baseline == "zero" or pairs.corrupt is None:
        return False
    for index, (clean, corrupt) in enumerate(zip(pairs.clean, pairs.corrupt, strict=True)):
        if len(clean) != len(corrupt):
            raise PairsError(
                f"pair {index}: clean has {len(clean)} tokens and corrupt {len(corrupt)}; nodes are compared position "
                "by position. Choose prompts of equal token length, or baseline='zero'."
            )
    return True


def _bos_positions(model: Any, pairs: TokenizedPairs) -> list[int]:
    """[0] where every prompt starts with BOS and goes on after it."""
    bos = getattr(getattr(model, "tokenizer", None), "bos_token_id", None)
    starts = all(len(prompt) > 1 and int(prompt[0]) == bos for prompt in pairs.clean)
    return [0] if bos is not None and starts else []


def _common_tokens(pairs: TokenizedPairs) -> list[int]:
    """The token at each position, -1 where prompts differ."""
    columns = torch.stack(list(pairs.clean)).T
    return [int(column[0]) if bool((column == column[0]).all()) else -1 for column in columns]


def _common_text(model: Any, tokens: Int[Tensor, " pos"], ids: Sequence[int]) -> str:
    """The prompt with its spaces; "…" for the tokens in which the prompts differ."""
    pieces = text_pieces(model, tokens)
    blank = [" …" if piece.startswith(" ") else "…" for piece in pieces]
    return "".join(piece if one >= 0 else gap for piece, gap, one in zip(pieces, blank, ids, strict=True))


def _goal_labels(model: Any, goals: Sequence[Goal]) -> list[str]:
    labels = []
    for goal in goals:
        ids = [int(one) for one in goal.name.removeprefix("logit/").split("-")] if goal.token >= 0 else []
        labels.append(" - ".join(repr(token_text(model, one))[1:-1] for one in ids) or goal.name)
    return labels


def _probabilities(totals: Totals, goals: Sequence[Goal]) -> list[float]:
    """Mean probability of each goal that is one token; nan for the others."""
    single = [goal.name == f"logit/{goal.token}" for goal in goals]
    return [
        float(totals.probabilities[goal.token]) if alone else float("nan")
        for goal, alone in zip(goals, single, strict=True)
    ]
