"""Metrics of predictions against labels, by scikit-learn and scipy, under GLUE's names."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        print(text)


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The share of right class ids."""
    from sklearn.metrics import accuracy_score

    return {"accuracy": float(accuracy_score(labels, predictions))}


def accuracy_and_f1(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, and F1 of class 1 (0 where it is neither there nor predicted)."""
    from sklearn.metrics import f1_score

    f1 = f1_score(labels, predictions, zero_division=0.0)  # type: ignore[arg-type]
    return {**accuracy(predictions, labels), "f1": float(f1)}


def accuracy_and_macro_f1(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes without weights."""
    from sklearn.metrics import f1_score

    f1 = f1_score(labels, predictions, average="macro", zero_division=0.0)  # type: ignore[arg-type]
    return {**accuracy(predictions, labels), "f1": float(f1)}


def matthews_and_accuracy(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Matthews correlation (0 where one class is predicted throughout) and accuracy."""
    from sklearn.metrics import matthews_corrcoef

    if len(set(predictions)) == 1:
        _say_once(
            "one class was predicted throughout: its Matthews correlation is undefined, and counts "
            "as 0"
        )
    matthews = float(matthews_corrcoef(labels, predictions))
    return {"matthews_correlation": matthews, **accuracy(predictions, labels)}


def pearson_and_spearman(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's correlation of numbers (0 where all predictions are the same)."""
    from scipy.stats import pearsonr, spearmanr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant input; said below in plain words
        found = {
            "pearson": float(pearsonr(predictions, labels)[0]),  # type: ignore[arg-type]
            "spearman": float(spearmanr(predictions, labels)[0]),  # type: ignore[arg-type]
        }
    if any(value != value for value in found.values()):
        _say_once("all predictions are the same: their correlation is undefined, and counts as 0")
    return {name: 0.0 if value != value else value for name, value in found.items()}
