"""What is saved loads here and in sae-lens, with equal numbers."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.transcoders.conftest import SMALL
from tl_neuron_circuits.bases import load_dictionary
from tl_neuron_circuits.bases._dictionary import KINDS as SAELENS_KINDS
from tl_neuron_circuits.transcoders import train
from tl_neuron_circuits.transcoders._config import KINDS

each_kind = pytest.mark.parametrize(("target", "activation", "skip"), KINDS)


def trained(model: Any, tokens: Tensor, folder: Path, *kind: Any) -> tuple[Any, Path]:
    target, activation, skip = kind
    config = SMALL.replace(target=target, activation=activation, skip=skip, layers=(1,), penalty=1e-2)
    report = train(model, tokens, config, verbose=False)
    (path,) = report.save(folder)
    return report[1], path


@each_kind
def test_saves_load_here(
    one_tiny: Any, tokens: Tensor, tmp_path: Path, target: str, activation: str, skip: bool
) -> None:
    dictionary, path = trained(one_tiny, tokens, tmp_path, target, activation, skip)
    assert path.name == "layer-01"
    loaded = load_dictionary(path)
    x = torch.randn(5, dictionary.d_in, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(x), dictionary(x))
    assert (loaded.hook_in, loaded.hook_out) == (dictionary.hook_in, dictionary.hook_out)
    assert loaded.metadata["training"]["activation"] == activation


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:sae_lens")
@each_kind
def test_saves_load_in_sae_lens(
    one_tiny: Any, tokens: Tensor, tmp_path: Path, target: str, activation: str, skip: bool
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae_lens = pytest.importorskip("sae_lens")
    if not SAELENS_KINDS[KINDS[target, activation, skip]].in_saelens:
        pytest.skip("sae-lens has no topk transcoders")
    dictionary, path = trained(one_tiny, tokens, tmp_path, target, activation, skip)
    sae = sae_lens.SAE.load_from_disk(path)
    x = torch.randn(50, dictionary.d_in, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = sae.encode(x)
        assert 0 < int(features.count_nonzero()) < features.numel()
        torch.testing.assert_close(dictionary.encode(x), features, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(dictionary(x), sae(x), atol=1e-5, rtol=1e-5)
