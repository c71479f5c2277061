"""Relevance propagation as TransformerLens hooks: the rules, the context that installs them, and `check_model`."""

from ._check_model import ModelReport as ModelReport
from ._check_model import check_model as check_model
from ._relp import relp as relp
