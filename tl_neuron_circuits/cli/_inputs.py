"""What several commands take: their common options, and reading what MODEL, pairs, prompts and saved results name."""

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from .._errors import FileFormatError, PairsError, SettingsError
from ._terminal import say, tell

Model = Annotated[
    str,
    typer.Argument(help="demo-gelu, demo-swiglu, a name TransformerLens loads, or a local folder.", metavar="MODEL"),
]
Backend = Annotated[str, typer.Option(help="auto, HookedTransformer or TransformerBridge.", rich_help_panel="Model")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, ...; else cuda where there is one.", rich_help_panel="Model")
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.", rich_help_panel="Model")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables; progress goes to stderr.")]
PairsFile = Annotated[
    Path, typer.Option("--pairs", help="JSON lines: clean_prefix, patch_prefix, clean_answer, patch_answer, case.")
]
KeepFitting = Annotated[
    bool,
    typer.Option(
        "--keep-fitting",
        help="Leave out those that do not fit the tokenizer or have another length than most.",
        rich_help_panel="Pairs",
    ),
]
MultiToken = Annotated[
    str,
    typer.Option(
        help="Answers of several tokens: error, or first_difference, the first that differs.", rich_help_panel="Pairs"
    ),
]
WhereRight = Annotated[
    bool,
    typer.Option(
        "--where-right", help="Leave out contrasts that the model gets wrong either way.", rich_help_panel="Pairs"
    ),
]
NoBos = Annotated[bool, typer.Option("--no-bos", help="Prompts without BOS.", rich_help_panel="Model")]
BatchSize = Annotated[int, typer.Option(help="Prompts per pass.", min=1)]
Seed = Annotated[int, typer.Option(help="Of all random draws.")]

Chat = Annotated[
    bool, typer.Option("--chat", help="Put prompts into the model's chat template.", rich_help_panel="Chat")
]
AnswerStart = Annotated[
    str,
    typer.Option(
        help="With --chat: how the answer begins, such as 'The capital is', or {prompt}.", rich_help_panel="Chat"
    ),
]
ChatMessage = Annotated[
    str,
    typer.Option(
        "--message", help="With --chat: what the user says; {prompt} stands for the prompt.", rich_help_panel="Chat"
    ),
]
SkipSpecial = Annotated[
    bool,
    typer.Option("--skip-special", help="No nodes at special tokens, such as BOS.", rich_help_panel="Chat"),
]

BACKENDS = ("auto", "HookedTransformer", "TransformerBridge")
PROMPT = "{prompt}"
MULTI_TOKEN = ("error", "first_difference")
DTYPES = ("float32", "bfloat16", "float16")


def load_model(name: str, backend: str = "auto", device: str | None = None, dtype: str = "float32") -> Any:
    """A demo model, a local Hugging Face folder (TransformerBridge), or a name that TransformerLens can load.

    Args:
        name: what to load.
        backend: "HookedTransformer", "TransformerBridge", or "auto": the first of them that can.
        device: None is cuda where there is one, else the CPU; demo models stay on the CPU.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        SettingsError: nothing of that name, an unknown setting, or the installed TransformerLens lacks the class.
    """
    import torch

    if backend not in BACKENDS:
        raise SettingsError(f"expected --backend out of {', '.join(BACKENDS)}; got {backend!r}.")
    if dtype not in DTYPES:
        raise SettingsError(f"expected --dtype out of {', '.join(DTYPES)}; got {dtype!r}.")
    _check_device(device)
    from ..models._protocol import without_folders

    say(f"loading {without_folders(name)}")
    options = {"device": device or ("cuda" if torch.cuda.is_available() else "cpu"), "dtype": getattr(torch, dtype)}
    if name.startswith("demo-"):
        from ..demo._models import load_demo_model

        return load_demo_model(name, backend, device=device or "cpu", dtype=options["dtype"])
    loaders = {"HookedTransformer": [_hooked], "TransformerBridge": [_bridge], "auto": [_hooked, _bridge]}[backend]
    from .._memory import is_out_of_memory

    reasons = []
    for load in loaders:
        try:
            return load(name, options)
        except ImportError:
            reasons.append(f"{load.__name__.strip('_')}: not in the installed TransformerLens")
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            reasons.append(f"{load.__name__.strip('_')}: {(str(error).strip() or repr(error)).splitlines()[0][:200]}")
    raise SettingsError(
        f"cannot load {name!r}. Give demo-gelu, demo-swiglu, a name that TransformerLens knows or a local Hugging Face "
        "folder (with TransformerLens 3.9 or later).\n" + "\n".join(reasons)
    )


def _check_device(device: str | None) -> None:
    import torch

    from .._memory import is_out_of_memory

    try:
        torch.empty(0, device=device or "cpu")
    except (RuntimeError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        raise SettingsError(
            f"expected a --device that this torch can use, such as cpu or cuda; {device!r} gives: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _hooked(name: str, options: dict[str, Any]) -> Any:
    from transformer_lens import HookedTransformer

    if Path(name).is_dir():
        raise ValueError("a local folder loads as TransformerBridge")
    with warnings.catch_warnings():  # leaving TransformerLens, and what most users of versions below 4 still hold
        warnings.filterwarnings("ignore", "HookedTransformer", DeprecationWarning)
        return HookedTransformer.from_pretrained(name, **options)


def _bridge(name: str, options: dict[str, Any]) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(name, **options)


def in_chat(model: Any, prompts: Any, chat: bool, message: str, answer_start: str, no_bos: bool) -> Any:
    """A prompt or pairs inside the model's chat template, or as they are.

    Raises:
        SettingsError: no such template, what belongs to a chat without one, or a chat without BOS.
    """
    if not chat:
        for option, given in (("--message", message != PROMPT), ("--answer-start", answer_start)):
            if given:
                raise SettingsError(f"expected --chat beside {option}, which is about chats. Add it.")
        return prompts
    if no_bos:
        raise SettingsError("expected no --no-bos beside --chat: the template writes BOS or not. Leave it out.")
    from ..tasks._chat import apply_chat_template

    return apply_chat_template(model, prompts, message=message, answer_start=answer_start)


def prepare(
    model: Any, pairs: Any, *, no_bos: bool, chat: bool, message: str, answer_start: str, keep_fitting: bool,
    multi_token: str, where_right: bool, same_length: bool = True,
) -> Any:  # fmt: skip
    """Pairs as the options ask for them, still text; stderr says how many were left out.

    Raises:
        SettingsError: an unknown --multi-token, or options that exclude each other.
        PairsError: no pair is left.
    """
    if multi_token not in MULTI_TOKEN:
        raise SettingsError(f"expected --multi-token {' or '.join(MULTI_TOKEN)}; got {multi_token!r}.")
    if where_right and multi_token != "error":
        raise SettingsError("expected --where-right without --multi-token: it compares answers of one token.")
    from ..tasks._tokenize import encoder, made_for
    from ..tasks._tokenize import keep_fitting as only_fitting

    if no_bos:
        pairs = pairs.remember(made_for(encoder(model, False), pairs.clean[0]))
    pairs = in_chat(model, pairs, chat, message, answer_start, no_bos)
    if keep_fitting:
        pairs = only_fitting(model, pairs, multi_token=multi_token, same_length=same_length)  # pyright: ignore[reportArgumentType]
        tell(f"--keep-fitting: {pairs.selection}")
    if where_right:
        pairs = pairs.where_model_is_right(model)
        tell(f"--where-right: {pairs.selection}")
    return pairs


def read_inputs(pairs: Path | None, prompts: Path | None) -> Any:
    """Pairs, or the lines of a text file that are not blank."""
    from .._files import read_text, short
    from ..tasks._pairs import PromptPairs

    if (pairs is None) == (prompts is None):
        raise SettingsError(f"expected either --pairs or --prompts; got {'neither' if pairs is None else 'both'}.")
    if pairs is not None:
        return PromptPairs.from_jsonl(pairs)
    assert prompts is not None
    try:
        lines = [line.removesuffix("\r") for line in read_text(prompts).split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise PairsError(f"expected UTF-8 text, one prompt per line, in {prompts}; got {short(error)}.") from error
    if not lines:
        raise PairsError(f"expected text, one prompt per line, in {prompts}; it is empty.")
    return lines


def load_saved(path: Path) -> Any:
    """The `Circuit` or the `NodeScores` in a folder.

    Raises:
        FileFormatError: there is neither, or it is damaged.
    """
    from ..circuits._circuit import Circuit
    from ..lasso._lasso_circuit import LassoCircuit
    from ..nodes._scores import NodeScores

    for folder in (path, path / "circuit"):
        if (folder / "circuit.safetensors").exists():
            return Circuit.load(folder)
    if (path / "lasso_circuit.safetensors").exists():
        return LassoCircuit.load(path)
    if (path / "scores.safetensors").exists():
        return NodeScores.load(path)
    found = "no such folder" if not path.is_dir() else ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
    raise FileFormatError(
        f"expected a saved circuit (circuit.safetensors) or saved scores (scores.safetensors) in {path}; found: "
        f"{found}. Give a folder that trace, lasso or attribute wrote."
    )


def load_circuit(path: Path) -> Any:
    """The `Circuit` in a folder.

    Raises:
        FileFormatError: there is none, or it is damaged.
        SettingsError: scores were saved there, not a circuit.
    """
    from ..circuits._circuit import Circuit

    saved = load_saved(path)
    if not isinstance(saved, Circuit):
        raise SettingsError(f"expected a circuit in {path}; got {saved!r}. Give a folder that trace or lasso wrote.")
    return saved
