"""Features against the vocabulary, without a prompt: which tokens they read, and which tokens they write.

    deembed          value(token) = W_E[token] . r(f),            r the encoder pulled back to the residual stream
    through a head   value(token) = W_E[token] . W_V W_O r(f)     (what the head would carry over from that token)
    logit_weights    value(token) = N_final(W_dec[f]) . W_U[:, token], minus its mean over the vocabulary

Norms are linear, with their scale set to one. Source: Dunefsky et al. 2024, arXiv 2406.11944; METHODS.md 4.3.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from .._errors import SettingsError, UnsupportedModelError
from .._typing import checked
from ..bases._dictionary import Dictionary
from ..interventions._steering_prompts import token_names
from ..models._protocol import TransformerLensModel, submodule
from ._connections import Head, probe_run, read_vectors, units_by_layer, write_vectors
from ._residual_run import ResidualRun, norm_map

_PRODUCTS_AT_ONCE = 2**26


@checked
def deembed(
    model: TransformerLensModel,
    dictionaries: Sequence[Dictionary],
    features: str | Sequence[str],
    *,
    head: Head | None = None,
    k: int = 10,
) -> pd.DataFrame:
    """The tokens whose embeddings excite and inhibit a feature most.

    Directly, it says which tokens the feature fires on by the embedding alone, without earlier layers; through a head,
    which tokens excite it from where that head attends. Positional embeddings are left out.

    Args:
        model: a HookedTransformer or TransformerBridge.
        dictionaries: transcoders, those of the features among them.
        features: one label or several, such as "L3/F17".
        head: (layer, head) to read through, at or before the feature's layer.
        k: tokens each way.

    Returns:
        Columns label, direction ("top" or "bottom"), rank (from 0), token, token_id, value.

    Raises:
        SettingsError: a feature or head that does not exist; k below 1.
        DictionaryError: a dictionary that does not fit; see `contributions`.
        UnsupportedModelError: the model normalizes its embeddings (BLOOM), or has no W_E.

    Source: Dunefsky, Chlenski and Nanda 2024, arXiv 2406.11944; METHODS.md 4.3.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, transcoders = tnc.load_demo_model(), tnc.load_demo_dictionaries("transcoder")
        >>> len(tnc.transcoders.deembed(model, transcoders, "L1/F7", head=(0, 1), k=3))
        6
    """
    run = probe_run(model, dictionaries)
    embedding = token_embeddings(model)
    tables = []
    for layer, units in units_by_layer(run, features).items():
        reads = read_vectors(run, layer, units, head)
        tables.append(strongest_tokens(model, reads.labels, embedding, reads.vectors, k))
    return pd.concat(tables, ignore_index=True)


@checked
def logit_weights(
    model: TransformerLensModel, dictionaries: Sequence[Dictionary], features: str | Sequence[str], *, k: int = 10
) -> pd.DataFrame:
    """The tokens whose logits a feature raises and lowers directly, through the residual stream alone.

    Args:
        model: a HookedTransformer or TransformerBridge.
        dictionaries: transcoders, or SAEs on MLP outputs.
        features: one label or several, such as "L3/F17".
        k: tokens each way.

    Returns:
        Columns label, direction ("top" or "bottom"), rank (from 0), token, token_id, value.

    Raises:
        SettingsError: a feature that does not exist; k below 1.
        DictionaryError: a dictionary that does not fit; see `contributions`.

    Example:
        >>> import tl_neuron_circuits as tnc
        >>> model, transcoders = tnc.load_demo_model(), tnc.load_demo_dictionaries("transcoder")
        >>> len(tnc.transcoders.logit_weights(model, transcoders, ["L3/F7", "L3/F8"], k=5))
        20
    """
    run = probe_run(model, dictionaries)
    unembedding: Any = getattr(submodule(model, "unembed"), "W_U", None)
    if not isinstance(unembedding, Tensor):
        raise UnsupportedModelError(
            f"expected unembed.W_U on this {type(model).__name__}; it has none. Use contributions to features instead."
        )
    tables = []
    for layer, units in units_by_layer(run, features).items():
        written = norm_map(model, "ln_final").along(write_vectors(run, layer, units))
        labels = [f"L{layer}/F{unit}" for unit in units]
        tables.append(strongest_tokens(model, labels, unembedding.detach().mT, written, k, centered=True))
    return pd.concat(tables, ignore_index=True)


def head_norms(run: ResidualRun, layer: int, unit: int) -> pd.DataFrame:
    """The norm of a feature's read vector after each head's W_V W_O: columns layer, head, norm, largest first."""
    direct = read_vectors(run, layer, [unit])
    rows = []
    for head_layer in range(direct.attentions):
        weights = run.attentions[head_layer]
        reads = weights.norm.back(weights.back(weights.post.back(direct.vectors[0]))[0])
        rows += [(head_layer, head, norm) for head, norm in enumerate(reads.norm(dim=-1).tolist())]
    frame = pd.DataFrame(rows, columns=["layer", "head", "norm"])
    return frame.sort_values("norm", ascending=False, kind="stable", ignore_index=True)


def token_embeddings(model: TransformerLensModel) -> Float[Tensor, "d_vocab d_model"]:
    """W_E.

    Raises:
        UnsupportedModelError: there is none of the model's width, or a norm follows it.
    """
    embedding: Any = getattr(submodule(model, "embed"), "W_E", None)
    width = int(model.cfg.d_model)
    if not isinstance(embedding, Tensor) or embedding.dim() != 2 or embedding.shape[1] != width:
        raise UnsupportedModelError(f"expected embed.W_E of [d_vocab, {width}] on this {type(model).__name__}.")
    if getattr(model.cfg, "post_embedding_ln", False) or norm_map(model, "embed_ln").normalizes:
        raise UnsupportedModelError(
            "this model normalizes its embeddings, token by token, so W_E alone says nothing. Use contributions(...) "
            "on prompts."
        )
    return embedding.detach()


def strongest_tokens(
    model: TransformerLensModel,
    labels: Sequence[str],
    tokens: Float[Tensor, "d_vocab d_model"],
    vectors: Float[Tensor, "feature d_model"],
    k: int,
    *,
    centered: bool = False,
) -> pd.DataFrame:
    """The largest and smallest products of every vector with the vocabulary, in chunks of features.

    Raises:
        SettingsError: k below 1.
    """
    if k < 1:
        raise SettingsError(f"expected k of at least 1; got {k}.")
    rows, step = [], max(1, _PRODUCTS_AT_ONCE // len(tokens))
    for start in range(0, len(vectors), step):
        part = vectors[start : start + step].to(tokens.device)
        values = part @ tokens.to(part).mT
        values = values - values.mean(1, keepdim=True) if centered else values
        for label, row in zip(labels[start : start + step], values, strict=True):
            for direction, largest in (("top", True), ("bottom", False)):
                best = row.topk(min(k, len(row)), largest=largest)
                ids = best.indices.tolist()
                entries = zip(token_names(model, ids), ids, best.values.tolist(), strict=True)
                rows += [(label, direction, rank, *entry) for rank, entry in enumerate(entries)]
    return pd.DataFrame(rows, columns=["label", "direction", "rank", "token", "token_id", "value"])
