"""Relevance propagation as TransformerLens hooks: the rules, the context that installs them, and `check_model`."""

from ._biases import biases_in_graph as biases_in_graph
from ._check_model import ModelReport as ModelReport
from ._check_model import check_model as check_model
from ._norms import is_opaque as is_opaque
from ._norms import read_norm as read_norm
from ._relp import frozen as frozen
from ._relp import relp as relp
from ._rules import ALL_RULES as ALL_RULES
from ._rules import RULES as RULES
from ._rules import AttentionRule as AttentionRule
from ._rules import HalfRule as HalfRule
from ._rules import IdentityRule as IdentityRule
from ._rules import LnRule as LnRule
from ._rules import Rule as Rule
