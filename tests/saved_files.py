"""Saved files, edited so that their checksum still holds: what only a schema can refuse."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tl_neuron_circuits._files import read_tensors, write_tensors


def edit(file: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
    """Let `change` alter the content of the header and the tensors in place."""
    tensors, content, _ = read_tensors(file)
    head = json.loads(content or "null")
    change(head, tensors)
    write_tensors(file, {name: tensor.clone() for name, tensor in tensors.items()}, json.dumps(head))
