"""What the model says next, and where the explained tokens stand among it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..tasks._tokenized import TokenizedPairs
from ._direct_effects import DirectEffects
from ._targets import goal_positions, token_text


def prediction(model: Any, effects: DirectEffects, end: int, *, single: bool) -> dict[str, Any]:
    """What the model itself says next: its likeliest tokens, and of each target token rank and likelier twin.

    Over several prompts probabilities are means, and ranks are not given: prompts have answers of their own. With
    targets at several positions `predicted` is of the last, and `predicted_at` of every target's.
    """
    goals = goal_positions(effects.targets, end)
    said = [likeliest(model, probabilities) for probabilities in effects.totals.probabilities]
    ranks, twins, at = {}, {}, {}
    for target in effects.targets if single else ():
        if len(target.tokens) == 1:
            (token,) = target.tokens
            goal = goals.index(target.at(end))
            probabilities, at[target.name] = effects.totals.probabilities[goal], said[goal]
            ranks[target.name] = 1 + int((probabilities > probabilities[token]).sum())
            twin = _spaced_twin(model, token)
            if twin is not None and probabilities[twin] > probabilities[token]:
                twins[target.name] = [token_text(model, twin), round(float(probabilities[twin]), 6)]
    return {
        "predicted": said[-1], "predicted_at": at if len(goals) > 1 else {}, "target_ranks": ranks, "twins": twins,
    }  # fmt: skip


def likeliest(model: Any, probabilities: Tensor, count: int = 5) -> list[list[Any]]:
    """The likeliest tokens and their probabilities."""
    best = probabilities.topk(min(count, len(probabilities)))
    pairs = zip(best.values, best.indices.tolist(), strict=True)
    return [[token_text(model, token), round(float(p), 6)] for p, token in pairs]


def predicted_by_prompt(
    model: Any, effects: DirectEffects, pairs: TokenizedPairs, texts: Sequence[str]
) -> list[dict[str, Any]]:
    """Of each prompt: its text, its target token and that one's value, probability and rank, and the likeliest token.

    Rank and probability are None where the target is not a token. Of a rollout the target is all of its tokens, and the
    probability is their product.
    """
    found, (first, *others) = [], effects.targets
    by_answer = first.name in ("answer_logit", "logit_difference") and not others
    for row, (part, text) in enumerate(zip(effects.by_prompt, texts, strict=True)):
        probabilities = part.probabilities[-1]
        token = int(pairs.answer[row]) if by_answer else first.tokens[0] if first.tokens and not others else None
        ((best, chance),) = likeliest(model, probabilities, 1)
        if first.by_prompt:
            own = [target.by_prompt[row] for target in effects.targets]
            found.append(
                {
                    "prompt": str(text), "target": "".join(token_text(model, one) for one in own),
                    "value": float(part.target_changes.sum()),
                    "probability": round(float(part.probabilities[range(len(own)), own].prod()), 6), "rank": None,
                    "predicted": best, "predicted_probability": chance,
                }
            )  # fmt: skip
            continue
        found.append(
            {
                "prompt": str(text), "target": None if token is None else token_text(model, token),
                "value": float(part.target_changes.sum()),
                "probability": None if token is None else round(float(probabilities[token]), 6),
                "rank": None if token is None else 1 + int((probabilities > probabilities[token]).sum()),
                "predicted": best, "predicted_probability": chance,
            }
        )  # fmt: skip
    return found


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
