"""What results call the model: its name, and of a folder only the last part."""

from pathlib import Path
from typing import Any

import pytest

import tl_neuron_circuits as tnc
from tests.loops import for_each
from tl_neuron_circuits.models._protocol import model_name


@for_each(
    ("given", "name"),
    [
        ("gpt2", "gpt2"),
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("/home/someone/models/mine", "mine"),
        ("/home/someone/models/mine/", "mine"),
        ("./mine", "mine"),
        ("~/mine", "mine"),
        (r"C:\models\mine", "mine"),
        ("here/mine", "mine"),
        ("", "unknown"),
        (None, "unknown"),
    ],
)
def test_a_folder_is_named_by_its_last_part(
    given: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model = tnc.load_demo_model()
    monkeypatch.setattr(model.cfg, "model_name", given)
    assert model_name(model) == name
