"""What a router must beat: predictors that cost nothing, fitted on the training texts and judged like a router.

    majority        the most frequent class of the training labels
    random          a coin with their mix
    length          a small decision tree on the numbers of characters and words
    tf-idf + lr     logistic regression on TF-IDF of word and character n-grams
    tf-idf + knn    the nearest training texts by cosine of the same vectors
    linear probe    logistic regression on standardised features that the caller brings (a frozen model's states)

Every knob is chosen by cross-validation on the training rows alone, so that no baseline is weak for want of tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

FOLDS = 5
# Chinese, Japanese and Korean write without blanks: there a character is the word.
_WORD = r"(?u)[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
# Above this many rows their inner products take longer than they save.
_ROTATE_UP_TO = 2000


@dataclass(frozen=True)
class Judged:
    """A predictor's answers: class numbers (rows), probabilities (rows, classes), and what to know about its fit."""

    name: str
    labels: Array
    probabilities: Array
    note: str = ""


def fit_baselines(
    train_texts: Sequence[str],
    train_y: Sequence[int],
    test_texts: Sequence[str],
    classes: Sequence[str],
    seed: int,
    features: tuple[Array, Array] | None = None,
) -> list[Judged]:
    """Fit every baseline on the training rows and predict the test rows.

    `train_y` holds numbers of `classes`; `features` are the linear probe's matrices (rows, columns) of the training
    and the test texts. Deterministic for a seed. Where the training rows are too few or of one class for a fit, the
    majority class stands in and the note says so. Raises ValueError without any training row.
    """
    import numpy as np
    import sklearn.linear_model  # noqa: F401  # brings the libraries whose threads are limited below
    from threadpoolctl import threadpool_limits

    if not len(train_y):
        raise ValueError("baselines need at least one training row")
    y, rows = np.asarray(train_y, dtype=int), len(test_texts)
    share = np.bincount(y, minlength=len(classes)) / len(y)
    mix, top = np.tile(share, (rows, 1)), int(share.argmax())
    majority = Judged("majority", np.full(rows, top), mix, f"always {classes[top]}")
    coin = np.random.default_rng(seed).choice(len(classes), size=rows, p=share)

    def fit(name: str, vectors: Callable[[], tuple[Array, Array]], family: _Family) -> Judged:
        if (share > 0).sum() < 2:
            note = "majority instead: the training rows are all of one class"
            return Judged(name, majority.labels, mix, note)
        try:
            train, test = vectors()
        except ValueError:  # scikit-learn's way to say that no n-gram occurs twice, and _rotated's
            return Judged(name, majority.labels, mix, "majority instead: the training rows have no feature in common")
        knob, how = _choose(family, train, y, len(classes), seed)
        probabilities = _predict(family.make(knob, len(y)), train, y, test, len(classes))
        return Judged(name, probabilities.argmax(1), probabilities, f"{family.knob} = {knob:g}, {how}")

    words: dict[str, tuple[Array, Array]] = {}

    def tf_idf() -> tuple[Array, Array]:
        if not words:
            words["both"] = _tf_idf(train_texts, test_texts)
        return words["both"]

    # The matrices are small: threads only wait for each other, ten times longer where other work runs beside.
    with threadpool_limits(limits=1):
        found = [
            majority,
            Judged("random", coin, mix, "a coin with the training labels' mix"),
            fit("length", lambda: (_lengths(train_texts), _lengths(test_texts)), _tree(seed)),
            fit("tf-idf + lr", tf_idf, _logistic((0.1, 1, 3, 10, 30, 100))),
            fit("tf-idf + knn", tf_idf, _neighbours()),
        ]
        if features is not None:
            found.append(
                fit("linear probe", lambda: _standardised(*features), _logistic((1e-4, 1e-3, 0.01, 0.1, 1, 10)))
            )
    return found


def out_of_fold(
    texts: Sequence[str], y: Sequence[int], classes: Sequence[str], seed: int, features: Array | None = None
) -> list[Judged]:
    """Every baseline's predictions for rows that it was not fitted on, by 5-fold cross-validation over all of them.

    For when there are no training rows beside the judged ones. Raises ValueError with fewer than two rows.
    """
    import numpy as np

    labels = np.asarray(y, dtype=int)
    if len(labels) < 2:
        raise ValueError("cross-validation needs at least two rows")
    place = _places(labels, min(FOLDS, len(labels)), seed)
    merged: dict[str, tuple[Array, Array]] = {}
    notes: dict[str, list[str]] = {}
    for fold in range(place.max() + 1):
        train, test = np.flatnonzero(place != fold), np.flatnonzero(place == fold)
        pair = None if features is None else (features[train], features[test])
        fitted = fit_baselines(
            [texts[int(i)] for i in train],
            labels[train].tolist(),
            [texts[int(i)] for i in test],
            classes,
            seed + fold,
            pair,
        )
        for judged in fitted:
            into = merged.setdefault(
                judged.name, (np.zeros(len(labels), dtype=int), np.zeros((len(labels), len(classes))))
            )
            into[0][test], into[1][test] = judged.labels, judged.probabilities
            notes.setdefault(judged.name, []).append(judged.note)
    return [
        Judged(name, *merged[name], note="; ".join(dict.fromkeys(notes[name])) + " (out of fold)") for name in merged
    ]


# -- vectors ----------------------------------------------------------------------------------------------------


def _lengths(texts: Sequence[str]) -> Array:
    import numpy as np

    return np.array([[len(text), len(text.split())] for text in texts], dtype=float).reshape(-1, 2)


def _tf_idf(train: Sequence[str], test: Sequence[str]) -> tuple[Array, Array]:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import FeatureUnion

    # An n-gram of one training text alone says nothing about others, but a handful of texts may share none.
    least = 2 if len(train) >= 20 else 1
    vectors = FeatureUnion(
        [
            ("words", TfidfVectorizer(token_pattern=_WORD, ngram_range=(1, 2), sublinear_tf=True, min_df=least)),
            ("characters", TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, min_df=least)),
        ]
    )
    return _rotated(vectors.fit_transform(train), vectors.transform(test))


def _standardised(train: Array, test: Array) -> tuple[Array, Array]:
    from sklearn.preprocessing import StandardScaler

    scale = StandardScaler().fit(train)
    return _rotated(scale.transform(train), scale.transform(test))


def _rotated(train: Any, test: Any) -> tuple[Any, Any]:
    """The same vectors in the training rows' own coordinates, at most as many columns as rows.

    Ridge-penalised regression and cosines see nothing but inner products with training rows, so every fit stays what
    it is (the representer theorem), and 35,000 n-gram columns become 300: sixty times faster.
    """
    import numpy as np

    rows, columns = train.shape
    if columns <= rows or rows > _ROTATE_UP_TO:
        return train, test
    inner, across = train @ train.T, test @ train.T
    inner, across = (np.asarray(part.todense() if hasattr(part, "todense") else part) for part in (inner, across))
    values, axes = np.linalg.eigh(inner)
    kept = values > max(values.max(), 1e-12) * 1e-10
    if not kept.any():
        raise ValueError("all training vectors are zero")
    scale, axes = np.sqrt(values[kept]), axes[:, kept]
    return axes * scale, across @ (axes / scale)


# -- models and the choice of their knob -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Family:
    """Models that differ in one knob; `make` takes the knob and the number of training rows."""

    knob: str
    values: tuple[float, ...]
    make: Callable[[float, int], Any]


def _logistic(values: tuple[float, ...]) -> _Family:
    from sklearn.linear_model import LogisticRegression

    return _Family("C", values, lambda c, rows: LogisticRegression(C=c, max_iter=5000))


def _neighbours() -> _Family:
    from sklearn.neighbors import KNeighborsClassifier

    def make(k: float, rows: int) -> Any:
        return KNeighborsClassifier(n_neighbors=min(int(k), rows), metric="cosine", algorithm="brute")

    return _Family("k", (1, 3, 5, 9, 15, 25), make)


def _tree(seed: int) -> _Family:
    from sklearn.tree import DecisionTreeClassifier

    def make(leaves: float, rows: int) -> Any:
        return DecisionTreeClassifier(
            max_leaf_nodes=int(leaves), min_samples_leaf=max(1, rows // 40), random_state=seed
        )

    return _Family("leaves", (2, 3, 4, 6, 8), make)


def _predict(model: Any, train: Any, y: Array, test: Any, classes: int) -> Array:
    """Probabilities (rows, classes); a class that the training rows lack gets 0."""
    import numpy as np

    probabilities = np.zeros((test.shape[0], classes))
    if test.shape[0]:
        probabilities[:, np.unique(y)] = model.fit(train, y).predict_proba(test)
    return probabilities


def _choose(family: _Family, vectors: Any, y: Array, classes: int, seed: int) -> tuple[float, str]:
    """The knob with the best accuracy on held-out folds of the training rows, and how it was found.

    The log-likelihood breaks ties.
    """
    import numpy as np

    held = [(train, test) for train, test in _folds(y, seed) if len(np.unique(y[train])) > 1]
    if not held:
        return family.values[len(family.values) // 2], "too few rows to choose it"

    def quality(knob: float) -> tuple[float, float]:
        right, likelihood = 0.0, 0.0
        for train, test in held:
            model = family.make(knob, len(train))
            probabilities = _predict(model, vectors[train], y[train], vectors[test], classes)
            right += float((probabilities.argmax(1) == y[test]).sum())
            likelihood += float(np.log(np.maximum(probabilities[np.arange(len(test)), y[test]], 1e-6)).sum())
        return right, likelihood

    return max(family.values, key=quality), "by cross-validation"


def _folds(y: Array, seed: int) -> Iterator[tuple[Array, Array]]:
    import numpy as np

    place = _places(y, min(FOLDS, len(y)), seed)
    for fold in range(place.max() + 1):
        yield np.flatnonzero(place != fold), np.flatnonzero(place == fold)


def _places(y: Array, folds: int, seed: int) -> Array:
    """Each row's fold: every class is shuffled and dealt out in turn, so that rare classes need no special case."""
    import numpy as np

    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(np.flatnonzero(y == kind)) for kind in np.unique(y)])
    place = np.empty(len(y), dtype=int)
    place[order] = np.arange(len(y)) % folds
    return place
