"""Relevance propagation as TransformerLens hooks: the rules, the context that installs them, and `check_model`."""

from ._check_model import ModelReport as ModelReport
from ._check_model import check_model as check_model
from ._relp import relp as relp
from .rules import RULE_SETS as RULE_SETS
from .rules import AttentionRule as AttentionRule
from .rules import HalfRule as HalfRule
from .rules import IdentityRule as IdentityRule
from .rules import LnRule as LnRule
from .rules import RuleSet as RuleSet
from .rules import SplitAttentionRule as SplitAttentionRule
