"""Slow, obvious transformers in plain torch, with each rule of relevance propagation as a switch.

They share no code with the package: weights and architecture are read from the model, everything else is written out.
"""

from tests.replicas._architecture import ALL_RULES as ALL_RULES
from tests.replicas._architecture import RULE_SETS as RULE_SETS
from tests.replicas._architecture import Architecture as Architecture
from tests.replicas._architecture import Replica as Replica
from tests.replicas._architecture import switches_of as switches_of
from tests.replicas._from_hooked import from_hooked_transformer as from_hooked_transformer
from tests.replicas._from_hugging_face import from_hugging_face as from_hugging_face
from tests.replicas._gradients import Conservation as Conservation
from tests.replicas._gradients import measure_conservation as measure_conservation
from tests.replicas._gradients import relevance_of as relevance_of
from tests.replicas._gradients import replica_gradients as replica_gradients
from tests.replicas._gradients import replica_of as replica_of
