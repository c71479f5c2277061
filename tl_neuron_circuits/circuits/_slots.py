"""Which slots a basis has: the neurons of a layer, or the features of a dictionary."""

from collections.abc import Sequence

from .._errors import SettingsError
from ..bases._activations import ActivationSite, Neurons
from ..bases._dictionary_basis import DictionarySite
from ..bases._site import Basis, name_of, sites_of
from ..models._protocol import TransformerLensModel
from ..models._sites import find_sites
from ._slot import Slot
from ._slot_dictionary import find_reader, linear_encoder
from ._slot_features import DictionarySlot
from ._slot_neurons import neuron_slot


def slots_of(model: TransformerLensModel, basis: Basis | Sequence[Basis]) -> tuple[Slot, ...]:
    """One slot a layer, in the order of the layers.

    Layers without nodes are paths between the others, their MLPs under the rules of relevance propagation.

    Raises:
        SettingsError: a basis other than neurons and dictionaries, two that claim one layer, or a dictionary that is
            not linear once its features are known.
    """
    mlps = {mlp.post: mlp for mlp in find_sites(model).mlps}
    slots: list[Slot] = []
    for site in sites_of(model, basis):
        if isinstance(site, DictionarySite):
            slots.append(DictionarySlot(site, linear_encoder(site.dictionary), find_reader(model, site)))
        elif isinstance(site, ActivationSite) and site.letter == Neurons.letter and site.hook in mlps:
            slots.append(neuron_slot(model, mlps[site.hook]))
        else:
            raise SettingsError(
                f"the nodes of a circuit are neurons or features of dictionaries; got the basis {name_of(basis)}. "
                "attribute(model, pairs, basis=...) scores the components of other activations."
            )
    layers = [slot.layer for slot in slots]
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise SettingsError(
            f"expected one kind of nodes a layer; several bases have nodes in layers {twice}. Restrict one of them, as "
            "in basis=[bases.Neurons(layers=[0, 1]), bases.Dictionaries(of_layers_2_and_3)]."
        )
    return tuple(sorted(slots, key=lambda slot: slot.layer))
