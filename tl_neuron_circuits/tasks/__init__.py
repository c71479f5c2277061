"""Prompts, clean and corrupt pairs, their tokens, and metrics; one file per task."""

from .._lazy import explain_old_names
from ._agreement import subject_verb_agreement as subject_verb_agreement
from ._capitals import capitals as capitals
from ._chat import apply_chat_template as apply_chat_template
from ._greater_than import greater_than as greater_than
from ._ioi import ioi as ioi
from ._metrics import ProbabilityDifference as ProbabilityDifference
from ._metrics import answer_log_probability as answer_log_probability
from ._metrics import answer_logit as answer_logit
from ._metrics import logit_difference as logit_difference
from ._pairs import PromptPair as PromptPair
from ._pairs import PromptPairs as PromptPairs
from ._tokenize import keep_fitting as keep_fitting
from ._tokenize import tokenize as tokenize
from ._tokenized import TokenizedPairs as TokenizedPairs

explain_old_names(__name__)
