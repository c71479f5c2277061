"""Chat models: prompts inside the tokenizer's chat template, with the beginning of the answer.

    <|im_start|>user
    What is the capital of Texas?<|im_end|>
    <|im_start|>assistant
    The capital is                              the next token is asked for

What comes back is text, or pairs of it, which everything that takes prompts takes. It begins with BOS where the
template writes one, and then gets no second one. It knows where its turns stand: `trace` names them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, overload

from torch import Tensor

from .._errors import SettingsError
from .._typing import checked
from ._pairs import PromptPairs
from ._spans import TextSpan
from ._text_tokens import ChatPrompt, ModelOrTokenizer
from ._tokenize import encoder, made_for
from ._tokenized import TokenizedPairs

_PLACE = "{prompt}"
_SIGN = "\u2063turn\u2063"  # stands where a turn's content goes


@overload
def apply_chat_template(
    model: ModelOrTokenizer,
    prompts: str,
    *,
    message: str = _PLACE,
    answer_start: str = "",
    system: str | None = None,
) -> str: ...
@overload
def apply_chat_template(
    model: ModelOrTokenizer,
    prompts: PromptPairs,
    *,
    message: str = _PLACE,
    answer_start: str = "",
    system: str | None = None,
) -> PromptPairs: ...
@overload
def apply_chat_template(
    model: ModelOrTokenizer,
    prompts: Sequence[str],
    *,
    message: str = _PLACE,
    answer_start: str = "",
    system: str | None = None,
) -> list[str]: ...
@checked
def apply_chat_template(
    model: ModelOrTokenizer,
    prompts: str | PromptPairs | Sequence[str],
    *,
    message: str = _PLACE,
    answer_start: str = "",
    system: str | None = None,
) -> str | PromptPairs | list[str]:
    """Put prompts into the chat template of the model's tokenizer, up to where the answer goes on.

    Pairs keep their answers; where the prompt now ends in white space, answers lose the space that they begin with.
    They are then for this tokenizer alone, as if they had been drawn for it.

    Args:
        model: a model whose tokenizer has a chat template, or the tokenizer.
        prompts: one prompt, several, or pairs.
        message: what the user says, "{prompt}" standing for the prompt.
        answer_start: how the assistant's answer begins; "{prompt}" stands for the prompt here too, so that
            `message="Finish the sentence.", answer_start="{prompt}"` asks a chat model for the next word.
        system: the system message; None leaves it to the template, which may have one of its own.

    Raises:
        SettingsError: there is no template, it refuses these messages, or "{prompt}" stands nowhere.

    Source: Hugging Face's `apply_chat_template`.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> tokenizer = tnc.load_demo_model().tokenizer
        >>> tokenizer.chat_template = "{% for m in messages %}{{ bos_token }}{{ m.content }} {% endfor %}"
        >>> tnc.tasks.apply_chat_template(tokenizer, "The dogs", answer_start="The cats")
        '<bos>The dogs The cats'
    """
    tokenizer = getattr(model, "tokenizer", model)
    if getattr(tokenizer, "chat_template", None) is None:
        raise SettingsError(
            "expected a tokenizer with a chat template; this one has none. Load a model that was trained to chat, or "
            "set model.tokenizer.chat_template."
        )
    if _PLACE not in message + answer_start:
        raise SettingsError(f"expected {_PLACE!r} in message or answer_start; got {message!r} and {answer_start!r}.")
    if isinstance(prompts, PromptPairs):
        return _chat_pairs(model, tokenizer, prompts, (message, answer_start, system))
    if isinstance(prompts, str):
        return _render(tokenizer, prompts, message, answer_start, system)
    return [_render(tokenizer, prompt, message, answer_start, system) for prompt in prompts]


def special_positions(model: Any, tokens: TokenizedPairs) -> list[int]:
    """Positions at which a prompt has a special token (BOS, the marks of a chat's turns), in ascending order."""
    return sorted({place for row in special_by_prompt(model, tokens) for place in row})


def special_by_prompt(model: Any, tokens: TokenizedPairs) -> list[list[int]]:
    """The same for each pair: where its prompt, or its corrupt prompt, has a special token."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise SettingsError("skip_special asks the tokenizer for its special tokens, and this model has none.")
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
    columns = [tokens.clean] if tokens.corrupt is None else [tokens.clean, tokens.corrupt]
    rows = zip(*(map(Tensor.tolist, column) for column in columns), strict=True)
    return [sorted({at for row in pair for at, token in enumerate(row) if token in special}) for pair in rows]


def _chat_pairs(model: Any, tokenizer: Any, pairs: PromptPairs, how: tuple[str, str, str | None]) -> PromptPairs:
    clean = [_render(tokenizer, prompt, *how) for prompt in pairs.clean]
    bare = clean[0][-1].isspace()
    columns: dict[str, Any] = {"clean": clean}
    if pairs.corrupt is not None:
        columns["corrupt"] = [_render(tokenizer, prompt, *how) for prompt in pairs.corrupt]
    for name in ("answer", "wrong_answer"):
        answers = getattr(pairs, name)
        if answers is not None and bare:
            columns[name] = [answer.lstrip() or answer for answer in answers]
    before = pairs.made_for
    mark = made_for(encoder(model, None if before is None else before.prepend_bos), clean[0])
    return replace(pairs, **columns, made_for=mark, selection=None)


def _render(tokenizer: Any, prompt: str, message: str, answer_start: str, system: str | None) -> ChatPrompt:
    turns = [] if system is None else [{"role": "system", "content": system}]
    turns.append({"role": "user", "content": message.replace(_PLACE, prompt)})
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of its own, and may raise anything
        raise SettingsError(
            f"the chat template of {type(tokenizer).__name__} refused the messages {turns!r}: {error}. Some templates "
            "take no system message."
        ) from error
    answer = answer_start.replace(_PLACE, prompt)
    spans = _turns(tokenizer, turns, text)
    if answer.strip():
        spans.append(TextSpan("assistant", len(text), len(text) + len(answer)))
    chat = ChatPrompt(f"{text}{answer}")
    chat.spans = tuple(spans)
    return chat


def _turns(tokenizer: Any, turns: list[dict[str, str]], text: str) -> list[TextSpan]:
    """Where the turns' contents stand in the rendered text; none that the template rewrites."""
    spans = []
    for number, turn in enumerate(turns):
        others = [{**one, "content": _SIGN} if place == number else one for place, one in enumerate(turns)]
        try:
            whole = tokenizer.apply_chat_template(others, tokenize=False, add_generation_prompt=True)
        except Exception:  # noqa: BLE001  a template is a program of its own, and may want other contents
            continue
        before, found, _ = whole.partition(_SIGN)
        content = turn["content"].strip()
        start = len(before) + len(text[len(before) :]) - len(text[len(before) :].lstrip())
        if found and content and text.startswith(before) and text.startswith(content, start):
            spans.append(TextSpan(turn["role"], start, start + len(content)))
    return spans
