"""Small tokenizers that treat spaces and unknown words in different ways, and tiny models with them."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.families import build_bridge_from_module, hooked_transformer, hugging_face

END = "<|endoftext|>"
SENTENCES = (
    "The keys on the table are here. The key on the table is here. The boys that the girl admires were late. "
    "The boy was late. The capital of the state containing Dallas is Austin."
)


def word_level(folder: Path) -> Any:
    """Whole words, `<unk>` for any other, `<s>` put first by the tokenizer itself."""
    words = sorted(set(SENTENCES.replace(".", " .").split()))
    vocab = {word: i for i, word in enumerate(["<s>", "</s>", "<pad>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return _saved(tokenizer, folder, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def byte_level(folder: Path) -> Any:
    """Like GPT-2: byte-level merges, one special token that is BOS, EOS and unknown, no BOS by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([SENTENCES] * 4, trainer)
    return _saved(tokenizer, folder, bos_token=END, eos_token=END, unk_token=END)


def word_piece(folder: Path) -> Any:
    """Like the demo models': a piece that continues a word is another token (`##32`) than one that begins a word."""
    pieces = ["<s>", "</s>", "<pad>", "<unk>", "The", "year", ",", "17", "18", "32", "##17", "##32"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return _saved(tokenizer, folder, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def _saved(tokenizer: Tokenizer, folder: Path, **special: str) -> Any:
    """Go through a folder: HookedTransformer reloads its tokenizer from where it came."""
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(str(folder))


def model_with(tokenizer: Any, backend: str, n_ctx: int = 32) -> Any:
    """A tiny random GPT-2 with this tokenizer."""
    if backend == "HookedTransformer":
        model = hooked_transformer("gpt2", d_vocab=len(tokenizer), n_ctx=n_ctx, default_prepend_bos=True)
        model.set_tokenizer(tokenizer)
        return model
    source = hugging_face("gpt2", vocab_size=len(tokenizer), n_positions=n_ctx)
    return build_bridge_from_module(source, "GPT2LMHeadModel", hf_config=source.config, tokenizer=tokenizer).eval()
