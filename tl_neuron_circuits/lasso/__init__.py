"""CircuitLasso: circuits by sparse regression of every component on those before it."""

from .._lazy import explain_old_names
from ._circuit_lasso import CircuitLasso as CircuitLasso
from ._circuit_lasso import HeldOut as HeldOut
from ._circuit_lasso import MostEdges as MostEdges
from ._circuit_lasso import Share as Share
from ._feature_ranking import pooled_features as pooled_features
from ._feature_ranking import rank_features as rank_features
from ._generalization import generalize as generalize
from ._labeled_texts import LabeledTexts as LabeledTexts
from ._lasso_circuit import LassoCircuit as LassoCircuit
from ._observations import Components as Components

explain_old_names(__name__)
