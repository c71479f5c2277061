"""Models with tiny tokenizers, in every model class that the installed TransformerLens has."""

from typing import Any

import pytest

from tests.real_models import BACKENDS
from tests.tasks.tiny_tokenizers import byte_level, model_with, word_level, word_piece

KINDS = {"word_level": word_level, "byte_level": byte_level}


def _model(kind: str, backend: str, folders: pytest.TempPathFactory) -> Any:
    return model_with(KINDS[kind](folders.mktemp(kind)), backend)


@pytest.fixture(scope="session", params=BACKENDS)
def word_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a model whose tokenizer knows whole words only."""
    return _model("word_level", request.param, tmp_path_factory)


@pytest.fixture(scope="session", params=BACKENDS)
def byte_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a model whose tokenizer works like GPT-2's."""
    return _model("byte_level", request.param, tmp_path_factory)


@pytest.fixture(scope="session", params=BACKENDS)
def piece_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a model whose tokenizer marks the pieces that continue a word."""
    return model_with(word_piece(tmp_path_factory.mktemp("word_piece")), request.param)


@pytest.fixture(scope="session", params=[(kind, backend) for kind in KINDS for backend in BACKENDS], ids="-".join)
def tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a model of either kind of tokenizer."""
    return _model(*request.param, tmp_path_factory)
