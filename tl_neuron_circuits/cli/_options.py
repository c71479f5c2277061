"""Arguments and options that several commands share, with their help."""

from pathlib import Path
from typing import Annotated

import typer

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
BatchSize = Annotated[int, typer.Option(help="Prompts in one pass.", min=1)]
Seed = Annotated[int, typer.Option(help="Of everything drawn by chance.")]
