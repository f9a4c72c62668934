"""The metrics by name."""

from __future__ import annotations

from types import MappingProxyType
from typing import get_args

from flamingo_export.errors import EvaluationError
from flamingo_export.evaluation.metrics.base import Metric
from flamingo_export.evaluation.metrics.caption import Cider
from flamingo_export.evaluation.metrics.ranking import Choice, Mwap, Ndcg, RocAuc
from flamingo_export.evaluation.metrics.text import Exact, IvqaAccuracy, Top1
from flamingo_export.evaluation.metrics.vqa import VqaAccuracy
from flamingo_export.evaluation.metrics.wups import Wups
from flamingo_export.evaluation.task import MetricName

METRICS: MappingProxyType[str, Metric] = MappingProxyType(
    {
        "exact": Exact(),
        "top1": Top1(),
        "vqa_accuracy": VqaAccuracy(),
        "ivqa_accuracy": IvqaAccuracy(),
        "cider": Cider(),
        "wups": Wups(),
        "choice": Choice(),
        "ndcg": Ndcg(),
        "roc_auc": RocAuc(),
        "mwap": Mwap(),
    }
)
CLOSED = frozenset({"choice", "ndcg", "roc_auc", "mwap"})
"""Metrics that rank candidates; the others compare a text with references."""


def metric_of(name: MetricName) -> Metric:
    """The metric of that name. Raises EvaluationError listing the names there are."""
    if name not in METRICS:
        raise EvaluationError(f"there is no metric {name!r}. Choose one of: {', '.join(get_args(MetricName))}.")
    return METRICS[name]
