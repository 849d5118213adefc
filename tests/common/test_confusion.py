"""The confusion matrix as a file, and the scores that it holds."""

import json

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

from common.run.confusion import CONFUSION, Confusion, confused, read_confusion, write_confusion
from common.run.errors import UserError

LABELS = np.array([0, 0, 0, 1, 1, 3, 3, 3, 3])
PREDICTIONS = np.array([0, 0, 1, 1, 4, 3, 3, 0, 3])
CLASSES = ("a", "b", "unseen", "d", "only predicted")


def confusion(labels=LABELS, predictions=PREDICTIONS) -> Confusion:
    return Confusion(CLASSES, confused(labels, predictions), 20, "dev")


def test_cells_count_pairs_of_class_and_prediction():
    assert confusion().cells.tolist() == [[0, 0, 2], [0, 1, 1], [1, 1, 1], [1, 4, 1], [3, 0, 1], [3, 3, 3]]


def test_margins_are_examples_predictions_and_hits_of_every_class():
    found = confusion()
    assert found.examples.tolist() == [3, 2, 0, 4, 0]
    assert found.predicted.tolist() == [3, 2, 0, 3, 1]
    assert found.hits.tolist() == [2, 1, 0, 3, 0]


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_scores_are_those_of_scikit_learn():
    expected = balanced_accuracy_score(LABELS, PREDICTIONS), f1_score(LABELS, PREDICTIONS, average="macro")
    assert tuple(confusion().scores().values()) == pytest.approx(expected)
    assert expected[0] == pytest.approx((2 / 3 + 1 / 2 + 3 / 4) / 3)


def test_it_comes_back_from_its_file(tmp_path):
    write_confusion(tmp_path, confusion())
    found = read_confusion(tmp_path)
    assert (found.classes, found.step, found.evaluated_on) == (CLASSES, 20, "dev")
    assert np.array_equal(found.cells, confusion().cells)


def test_a_folder_without_one_has_none(tmp_path):
    assert read_confusion(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": "ab"}, "a list of names"),
        ({"step": "20"}, "a number step"),
        ({"cells": []}, "cells are to be lists"),
        ({"cells": [[0, 5, 1]]}, "cells are to be lists"),
        ({"cells": [[0, 1]]}, "cells are to be lists"),
        ({"cells": [[0, 1, 0]]}, "cells are to be lists"),
        ({"cells": [[0, True, 1]]}, "cells are to be lists"),
        ({"cells": None}, "cells are to be lists"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, change, message):
    write_confusion(tmp_path, confusion())
    path = tmp_path / CONFUSION
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as raised:
        read_confusion(tmp_path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
