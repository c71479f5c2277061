"""The demo models' tokenizer: whole words, names of several words as one token, town names and years in two pieces.

"The capital of the state containing Dallas is" becomes `The capital of the state containing Dal ##las is`.
"""

import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ..tasks import _english as english
from . import _states as states

BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"
CONTEXT_LENGTH = 64
_FRAME_WORDS = (
    "The the of state containing with in it is In Then When After and went to gave handed a was from year lasted that "
    "city , . lives She He drove trip lies has"
)


def _plain_words() -> list[str]:
    words = [*_FRAME_WORDS.split(), *states.ATTRIBUTES, *english.PREPOSITIONS]
    for inflected in (*english.NOUNS, *english.FINITE_VERBS, *english.TRANSITIVE_VERBS):
        words += [inflected.singular, inflected.plural]
    for complements in english.COMPLEMENTS.values():
        words += complements
    return [*words, *english.NAMES, *english.PLACES, *english.OBJECTS, *english.EVENTS, *english.CENTURIES]


def _state_words() -> list[str]:
    return [word for state in states.STATES for word in (state.name, *map(state.attribute, states.ATTRIBUTES))]


def vocabulary() -> list[str]:
    """Every token, in the order of the ids."""
    pieces = [*states.FIRST_PIECES, *(f"##{piece}" for piece in states.SECOND_PIECES)]
    years = [f"##{year}" for year in english.YEARS]
    return list(dict.fromkeys([BOS, EOS, PAD, UNK, *_plain_words(), *_state_words(), *pieces, *years]))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of both demo models, made from the word lists; it puts `<bos>` first unless told otherwise."""
    vocab = {token: i for i, token in enumerate(vocabulary())}
    compound = sorted((w for w in _state_words() if re.search(r"\W", w)), key=len, reverse=True)
    words = "|".join([*map(re.escape, compound), r"\w+", r"[^\w\s]"])
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=UNK))  # pyright: ignore[reportCallIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(words), behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    bos = (BOS, vocab[BOS])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        padding_side="right",
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )
