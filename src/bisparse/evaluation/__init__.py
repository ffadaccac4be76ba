"""Evaluation of models: perplexity, sentence similarity, classification, and lm-eval's tasks.

Each result includes its protocol, and `as_dict` returns it as JSON values.
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
