"""What neurons are about: descriptions with scores, hypothesis scores, clusters, examples, details for a page."""

from .._lazy import explain_old_names
from ._cluster import cluster as cluster
from ._describe import describe as describe
from ._descriptions import Descriptions as Descriptions
from ._max_activating_examples import max_activating_examples as max_activating_examples
from ._node_details import node_details as node_details
from ._profiles import profiles as profiles
from ._prompt_scores import prompt_scores as prompt_scores
from ._score_features import score_features as score_features

explain_old_names(__name__)
