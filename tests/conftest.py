"""Fixtures that every room's tests share."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what tests start, too: waiting threads spin

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import smollm2 as smollm2_cache
from tests.model_state import unchanged
from tests.real_models import (
    BACKENDS,
    TRACR_PROGRAMS,
    TransformerBridge,
    boot_folder,
    load_hooked_form,
    load_stories260K,
)

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it gives


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Return the folder of real models (`TNC_SHARED_MODELS` or `../shared/models`), or skip."""
    default = Path(__file__).resolve().parents[2] / "shared" / "models"
    folder = Path(os.environ.get("TNC_SHARED_MODELS", default))
    if not folder.is_dir():
        pytest.skip(f"the real models are not on this machine (looked at {folder}; set TNC_SHARED_MODELS)")
    return folder


@pytest.fixture
def untouched() -> Callable[[Any], AbstractContextManager[None]]:
    """Return a context manager that asserts that its block leaves no trace on a model."""
    return unchanged


@pytest.fixture(scope="session", params=BACKENDS, ids=[f"stories260K-{backend}" for backend in BACKENDS])
def stories260K(request: pytest.FixtureRequest, shared_models: Path) -> Any:
    """Return the TinyLlamas 260K with its tokenizer, once per model class that is installed."""
    return load_stories260K(shared_models, request.param)


@pytest.fixture(scope="session")
def toy_nano_sort(shared_models: Path) -> Any:
    """Return the minGPT that sorts six symbols of {0, 1, 2}."""
    return load_hooked_form(shared_models / "toy_nano_sort")


@pytest.fixture(scope="session", params=TRACR_PROGRAMS)
def tracr(request: pytest.FixtureRequest, shared_models: Path) -> tuple[Any, Path]:
    """Return each compiled program as (model, its folder, which holds ground_truth.json and io.json)."""
    folder = shared_models / f"tracr_{request.param}"
    return load_hooked_form(folder), folder


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, or skip: no test downloads it (with TNC_REQUIRE_SMOLLM2=1: fail)."""
    if TransformerBridge is None:
        pytest.skip("SmolLM2 is loaded as a TransformerBridge, which needs TransformerLens 3 or later")
    folder = smollm2_cache.prepared()
    if folder is None:
        reason = (
            f"SmolLM2-135M-Instruct is not in {smollm2_cache.cache()}: `python -m tests.smollm2` makes it "
            "(93 MB to download; TNC_MODEL_CACHE moves it)"
        )
        if os.environ.get("TNC_REQUIRE_SMOLLM2") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> Any:
    """Return a real language model: SmolLM2-135M-Instruct as a TransformerBridge, `smollm2.LABEL` in full."""
    model = boot_folder(smollm2_folder)
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))  # TransformerBridge arranges hooks of its own on its first run
    return model


def pytest_collection_finish() -> None:
    """Keep what was imported out of every later garbage collection, which would walk through it again and again."""
    gc.collect()
    gc.freeze()
