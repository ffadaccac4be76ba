"""What a model can do, before and after: perplexity, sentence similarity, classification, and lm-eval's tasks.

Each function states its protocol in what it returns, and `as_dict` gives it as JSON knows values.
"""

from bisparse.evaluation.classification import Agreement, Classification, agreement, classification
from bisparse.evaluation.harness import TaskResults, run_tasks
from bisparse.evaluation.perplexity import Perplexity, perplexity, text_perplexity
from bisparse.evaluation.similarity import Similarity, read_pairs, similarity

__all__ = [
    "Agreement",
    "Classification",
    "Perplexity",
    "Similarity",
    "TaskResults",
    "agreement",
    "classification",
    "perplexity",
    "read_pairs",
    "run_tasks",
    "similarity",
    "text_perplexity",
]
