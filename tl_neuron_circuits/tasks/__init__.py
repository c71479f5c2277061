"""Prompts, clean and corrupt pairs, their tokens, and metrics; one file a task."""

from ._agreement import subject_verb_agreement as subject_verb_agreement
from ._capitals import capitals as capitals
from ._greater_than import greater_than as greater_than
from ._ioi import ioi as ioi
from ._metrics import METRICS as METRICS
from ._metrics import Metric as Metric
from ._metrics import ProbabilityDifference as ProbabilityDifference
from ._metrics import answer_log_probability as answer_log_probability
from ._metrics import answer_logit as answer_logit
from ._metrics import logit_difference as logit_difference
from ._metrics import measure as measure
from ._metrics import metric_name as metric_name
from ._metrics import reads_answers_only as reads_answers_only
from ._pairs import PromptPair as PromptPair
from ._pairs import PromptPairs as PromptPairs
from ._token_rows import TokenRows as TokenRows
from ._tokenize import keep_fitting as keep_fitting
from ._tokenize import tokenize as tokenize
from ._tokenized import Batch as Batch
from ._tokenized import TokenizedPairs as TokenizedPairs
