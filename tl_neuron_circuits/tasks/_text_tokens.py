"""Text as the tokens of a model, with one BOS where the text brings its own.

A chat template's output begins with BOS, and `to_tokens` puts another before it: the strongest nodes then sit on the
second. So the BOS that the text has are kept, and none is added to them.
"""

import hashlib
import warnings
import weakref
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from ..models._protocol import TransformerLensModel
from ._spans import MarkedText

_SAMPLE = "The 12 boys' mother-in-law (aged 1984) isn't here.\n\tÉcole, naïve: x_1 == 0.5; Dallas, New York…"
_told: "weakref.WeakSet[Any]" = weakref.WeakSet()  # Python's own "once" forgets whenever filters change
_fingerprints: "weakref.WeakKeyDictionary[Any, str]" = weakref.WeakKeyDictionary()


@runtime_checkable
class Tokenizer(Protocol):
    """A Hugging Face tokenizer, as far as it is used here."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def convert_ids_to_tokens(self, *args: Any, **kwargs: Any) -> Any: ...

    def get_vocab(self) -> Any: ...


ModelOrTokenizer = TransformerLensModel | Tokenizer


class ChatPrompt(MarkedText):
    """Text that a chat template rendered: it may begin with BOS. Its spans are the turns."""

    def __add__(self, other: str) -> "ChatPrompt":
        """Go on with other text."""
        longer = ChatPrompt(super().__add__(other))
        longer.spans = self.spans
        return longer


def text_tokens(model: Any, text: str, prepend_bos: bool | None = None, **options: Any) -> Int[Tensor, "1 pos"]:
    """`model.to_tokens(text, ...)`, except that text that begins with BOS gets no other.

    A second BOS that was kept away is a `UserWarning`, once per tokenizer.
    """
    if prepend_bos is not None:
        options["prepend_bos"] = prepend_bos
    tokens = model.to_tokens(text, **options)
    tokenizer = getattr(model, "tokenizer", None)
    sign, bos = getattr(tokenizer, "bos_token", None), getattr(tokenizer, "bos_token_id", None)
    if not sign or bos is None or not text.startswith(sign):
        return tokens
    given = _leading(sign, text)
    there = int((tokens[0] == bos).long().cumprod(0).sum())
    if there < given:  # taken away with prepend_bos=False, as if the tokenizer had put it there
        missing = torch.full((1, given - there), int(bos), dtype=tokens.dtype, device=tokens.device)
        return torch.cat([missing, tokens], dim=1)
    if there > given and not isinstance(text, ChatPrompt) and tokenizer not in _told:
        _told.add(tokenizer)
        warnings.warn(
            f"this text begins with the tokenizer's BOS {sign!r}: no second one is put before it.", UserWarning, 3
        )
    return tokens[:, there - given :]


def _leading(sign: str, text: str) -> int:
    count = 0
    while text.startswith(sign, count * len(sign)):
        count += 1
    return count


class TokenizerAlone:
    """A tokenizer where a model is expected: BOS first where it has one, as TransformerLens does by default."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def to_tokens(self, text: str, prepend_bos: bool | None = None, **_: Any) -> Int[Tensor, "1 pos"]:
        """The tokens of one text."""
        tokens = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        bos = self.tokenizer.bos_token_id
        if prepend_bos is not False and bos is not None:
            tokens = [bos, *tokens]
        return torch.tensor([tokens], dtype=torch.long)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary without added tokens, and of the tokens of a sample of text.

    The same for every copy of a tokenizer, whatever a model class set on it (padding, truncation, BOS).
    """
    if tokenizer not in _fingerprints:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        vocabulary = tokenizer.get_vocab() if backend is None else backend.get_vocab(with_added_tokens=False)
        sample = list(tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"])
        content = repr((sorted(vocabulary.items()), sample))
        _fingerprints[tokenizer] = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
    return _fingerprints[tokenizer]
