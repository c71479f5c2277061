"""Live objects are dictionaries by their structure, or are refused with the reason."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.bases.dictionaries import CASES, D_DICT, D_IN, D_OUT, DictionaryCase
from tests.loops import for_each
from tl_neuron_circuits._errors import DictionaryError
from tl_neuron_circuits.bases import Dictionary, as_dictionary, load_dictionary, save_dictionary

HOOKS = {"hook_in": "blocks.1.ln2.hook_normalized", "hook_out": "blocks.1.hook_mlp_out"}
TENSORS = DictionaryCase("skip", "skip_transcoder").tensors()


class Transcoder(nn.Module):
    """Laid out as circuit-tracer does: `W_enc [d_dict, d_in]`, and a decoder that wants the input for the skip."""

    def __init__(self, tensors: dict[str, Tensor] = TENSORS, threshold: float = 0.2) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(tensors["W_enc"].mT.contiguous())
        self.W_dec, self.b_enc, self.b_dec = (nn.Parameter(tensors[name]) for name in ("W_dec", "b_enc", "b_dec"))
        self.W_skip = nn.Parameter(tensors["W_skip"]) if "W_skip" in tensors else None
        self.threshold = threshold

    def encode(self, input_acts: Tensor) -> Tensor:
        pre = nn.functional.linear(input_acts.to(self.W_enc.dtype), self.W_enc, self.b_enc)
        return pre * (pre > self.threshold)

    def decode(self, acts: Tensor, input_acts: Tensor | None = None) -> Tensor:
        output = acts @ self.W_dec + self.b_dec
        if self.W_skip is None:
            return output
        if input_acts is None:
            raise ValueError("the skip needs the input")
        return output + input_acts @ self.W_skip.mT

    def forward(self, input_acts: Tensor) -> Tensor:
        return self.decode(self.encode(input_acts), input_acts)


class Autoencoder:
    """The least that counts as a dictionary: four names, `W_enc [d_in, d_dict]`, no bias of its own, not callable."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.W_enc, self.W_dec = tensors["W_enc"], tensors["W_dec"]

    def encode(self, x: Tensor) -> Tensor:
        return (x @ self.W_enc - 0.3).relu()

    def decode(self, features: Tensor) -> Tensor:
        return features @ self.W_dec + 0.25


class Changed(Transcoder):
    """A transcoder with one method replaced."""

    def __init__(self, **methods: Any) -> None:
        super().__init__()
        for name, method in methods.items():
            object.__setattr__(self, name, method)


def inputs() -> Tensor:
    return CASES[0].inputs()


@pytest.mark.parametrize("skip", [True, False])
def test_a_circuit_tracer_transcoder_is_transposed_and_keeps_its_skip(skip: bool) -> None:
    """Features, skip and whole equal the object's own."""
    source = Transcoder({name: tensor for name, tensor in TENSORS.items() if skip or name != "W_skip"})
    ours = as_dictionary(source, **HOOKS)
    assert (ours.d_in, ours.d_dict, ours.d_out, ours.layer) == (D_IN, D_DICT, D_OUT, 1)
    assert ours.has_skip == skip and ours.is_transcoder
    x = inputs()
    torch.testing.assert_close(ours.encode(x), source.encode(x))
    torch.testing.assert_close(ours(x), source(x))
    assert not ours(x).requires_grad and ours(x.requires_grad_()).requires_grad


def test_the_least_that_counts_is_enough() -> None:
    """encode, decode, W_enc and W_dec suffice; the constant of decode is measured."""
    source = Autoencoder(CASES[0].tensors())
    ours = as_dictionary(source, hook_in="blocks.0.hook_mlp_out", hook_out="blocks.0.hook_mlp_out")
    torch.testing.assert_close(ours(inputs()), source.decode(source.encode(inputs())))
    assert torch.allclose(ours.b_dec, torch.tensor(0.25)) and not ours.is_transcoder
    with pytest.raises(DictionaryError, match="encoder of its own"):
        save_dictionary(ours, "never")


@pytest.mark.parametrize("transposed", [True, False])
def test_a_square_encoder_is_told_from_its_transpose(transposed: bool) -> None:
    """With d_dict == d_in the shape says nothing; the features do."""
    generator = torch.Generator().manual_seed(3)
    tensors = {"W_enc": torch.randn(6, 6, generator=generator), "W_dec": torch.randn(6, 6, generator=generator)}
    source = Autoencoder(tensors)
    if transposed:
        source.W_enc = tensors["W_enc"].mT
        source.encode = lambda x: (x @ tensors["W_enc"] - 0.3).relu()
    ours = as_dictionary(source, **HOOKS)
    assert torch.equal(ours.W_enc, tensors["W_enc"])


REFUSED = {
    "decode rescales": (
        lambda: Changed(decode=lambda acts: 2 * acts @ TENSORS["W_dec"] + TENSORS["b_dec"]),
        "not features @ W_dec",
    ),
    "a call adds": (lambda: Changed(forward=lambda x: x.sum(-1, keepdim=True) + torch.zeros(D_OUT)), "no feature"),
    "no decode": (lambda: SimpleNamespace(encode=None, W_enc=None, W_dec=None), "it lacks decode"),
    "a module": (lambda: nn.Linear(3, 3), "Linear is not a dictionary: it lacks encode, decode, W_enc, W_dec"),
    "cross-layer": (lambda: Changed(W_dec=torch.zeros(D_DICT, 2, D_OUT)), "cross-layer"),
    "widths differ": (lambda: Changed(W_enc=torch.zeros(D_IN, D_DICT + 1)), r"W_enc \[8, 21\]"),
    "NaN": (lambda: Transcoder(TENSORS | {"W_skip": torch.full((D_OUT, D_IN), float("nan"))}), "NaN"),
    "hooks": (Transcoder, "Name the hooks"),
}


@for_each("what", REFUSED)
def test_what_is_not_a_dictionary_is_refused(what: str) -> None:
    """Each is a DictionaryError that says what is wrong."""
    make, message = REFUSED[what]
    with pytest.raises(DictionaryError, match=message):
        as_dictionary(make(), **({} if what == "hooks" else HOOKS))


def test_hooks_of_a_dictionary_are_overridden(tmp_path: Any) -> None:
    """An SAE's two hooks move together; names of the old place in the metadata are dropped."""
    sae = load_dictionary(CASES[0].write(tmp_path / "sae", metadata={"sae_lens_version": "6.1.0", "hf_hook_name": "x"}))
    with pytest.raises(DictionaryError, match="Name the hooks"):
        as_dictionary(sae)
    moved = as_dictionary(sae, hook_in="blocks.3.hook_mlp_out")
    assert isinstance(moved, Dictionary)
    assert moved.hook_in == moved.hook_out == "blocks.3.hook_mlp_out" and moved.layer == 3
    assert "hf_hook_name" not in moved.metadata and torch.equal(moved.W_enc, sae.W_enc)
    assert as_dictionary(moved) is moved
    assert as_dictionary(moved, hook_out="blocks.4.hook_mlp_out").is_transcoder
