"""One model on the CPU and once more on two fake devices, and the comparison of what they give."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from tests.bases.site_dictionaries import pairs
from tests.fake_devices import FIRST, SECOND, fake_devices
from tests.families import FAMILIES, N_LAYERS, ModelCase, build_bridge_from_module, hugging_face
from tl_neuron_circuits import NodeScores
from tl_neuron_circuits.tasks import TokenizedPairs

_BEFORE_THE_LAYERS = ("wte", "wpe", "drop", "embed_tokens", "rotary_emb")


def home(layer: int) -> torch.device:
    """Where a layer lives: the first half on one device, the second half on the other."""
    return FIRST if layer < N_LAYERS // 2 else SECOND


def spread_hooked(case: ModelCase) -> Any:
    """As TransformerLens with `n_devices=2`: its own forward moves the residual stream to each block's device."""
    model = case.build()
    model.cfg.device, model.cfg.n_devices = FIRST.type, 2
    for part in filter(None, (model.embed, getattr(model, "pos_embed", None))):
        part.to(FIRST)
    for layer, block in enumerate(model.blocks):
        block.to(home(layer))
    for part in (model.ln_final, model.unembed):
        part.to(SECOND)
    return model


def spread_bridge(case: ModelCase) -> Any:
    """As `device_map`: accelerate puts hooks on the parts of a Hugging Face model, and the Bridge is built over it."""
    accelerate = pytest.importorskip("accelerate")
    source = hugging_face(case.family, tie_word_embeddings=False)
    name, body = next(iter(source.named_children()))
    places: dict[str, torch.device] = {"lm_head": SECOND}
    for part, module in body.named_children():
        if isinstance(module, torch.nn.ModuleList):
            places |= {f"{name}.{part}.{layer}": home(layer) for layer in range(N_LAYERS)}
        else:
            places[f"{name}.{part}"] = FIRST if part in _BEFORE_THE_LAYERS else SECOND
    accelerate.dispatch_model(source, {part: str(device) for part, device in places.items()}, main_device=str(FIRST))
    model = build_bridge_from_module(source, FAMILIES[case.family].architecture or "", hf_config=source.config).eval()
    model.cfg.device, model.cfg.n_devices = str(FIRST), 2  # as boot_transformers reads them from the map
    return model


class TwoDevices:
    """One model, plain and spread."""

    def __init__(self, case: ModelCase) -> None:
        hooked = case.backend == "HookedTransformer"
        self.plain = case.build() if hooked else case.build(tie_word_embeddings=False)
        self.pairs = pairs(self.plain, 3)  # on the CPU
        with fake_devices():
            self.spread = spread_hooked(case) if hooked else spread_bridge(case)

    def agree(self, run: Callable[[Any, TokenizedPairs], Any], n: int = 3) -> Any:
        """Run on both with `n` pairs, compare every number to 1e-6 of the largest of its kind, and return what the
        devices gave. Their pairs are where `tokenize` puts them, on `cfg.device`.
        """
        given = pairs(self.plain, n)
        expected = dict(_numbers(run(self.plain, given), ""))
        with fake_devices():
            result = run(self.spread, _moved(given, FIRST))
            found = dict(_numbers(result, ""))
        assert found and found.keys() == expected.keys()
        for name, value in found.items():
            known = expected[name]
            assert value.shape == known.shape and torch.equal(value.isnan(), known.isnan()), name
            off = float((value - known).nan_to_num().abs().max()) if len(value) else 0.0
            size = float(known.nan_to_num().abs().max()) if len(value) else 0.0
            assert off <= 1e-6 * size, f"{name}: off by {off:.2g} of {size:.2g}"
        return result


def _moved(given: TokenizedPairs, device: torch.device) -> TokenizedPairs:
    assert given.corrupt is not None and given.wrong_answer is not None
    return TokenizedPairs.from_tokens(
        [prompt.to(device) for prompt in given.clean],
        given.answer.to(device),
        [prompt.to(device) for prompt in given.corrupt],
        given.wrong_answer.to(device),
        labels=given.labels,
    )


def _numbers(result: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every number in a result with the path to it; texts are part of the path."""
    if isinstance(result, NodeScores):
        parts: Any = {f"{kind}/{hook}": scores for hook, kind, scores in result.blocks()}
        result = {**parts, "top": result.top(20)}
    elif is_dataclass(result):
        others = ("settings", "traced")  # what the result is of, not its numbers
        result = {field.name: getattr(result, field.name) for field in fields(result) if field.name not in others}
    if isinstance(result, Tensor):
        yield name, result.detach().cpu().double().flatten()
    elif isinstance(result, (int, float)):
        yield name, torch.tensor([float(result)], dtype=torch.float64)
    elif isinstance(result, pd.DataFrame):
        for column in result:
            if pd.api.types.is_numeric_dtype(result[column]):
                yield f"{name}.{column}", torch.tensor(result[column].to_numpy(dtype="float64"))
            else:
                yield f"{name}.{column} {result[column].tolist()}", torch.zeros(0, dtype=torch.float64)
    elif isinstance(result, Mapping):
        for key, value in result.items():
            yield from _numbers(value, f"{name}.{key}")
    elif isinstance(result, (list, tuple)):
        for index, value in enumerate(result):
            yield from _numbers(value, f"{name}[{index}]")
    elif isinstance(result, str):
        yield f"{name} {result}", torch.zeros(0, dtype=torch.float64)
    elif hasattr(result, "nodes") and hasattr(result, "edges"):
        yield from _numbers({"nodes": result.nodes, "edges": result.edges}, name)
    elif hasattr(result, "to_dataframe"):
        yield from _numbers(result.to_dataframe(), name)
    elif result is not None:
        raise TypeError(f"{name}: nothing is compared of a {type(result).__name__}")
