"""How good a model is, by the definitions published numbers use."""

from perception_encoder.evaluation.metrics import (
    average_precision,
    mean_average_precision,
    mean_per_class_recall,
    positives_of,
    retrieval_recall,
    reweight,
    top_k_accuracy,
    wilson_interval,
)

__all__ = [
    "average_precision",
    "mean_average_precision",
    "mean_per_class_recall",
    "positives_of",
    "retrieval_recall",
    "reweight",
    "top_k_accuracy",
    "wilson_interval",
]
