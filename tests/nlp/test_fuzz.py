"""Whatever is in a text file, it gives data or one UserError that names the file."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nlp_fixtures import tiny_tokenizer

from bert_of_theseus.data import load_task_data, tokenize
from bert_of_theseus.tables import read_table
from bert_of_theseus.tasks import custom_task
from common.run.errors import UserError
from common.run.reading import read_json, read_json_lines, read_yaml

ENDINGS = (".tsv", ".csv", ".jsonl", ".json")
FUZZ = settings(
    derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TOKENIZER = tiny_tokenizer()

ODD_CHARACTERS = ["\t", "\r", "\n", "\r\n", '"', ",", "'", "\0", "\u2028", "\x85", "\ufeff", "é", "𝄞", "{", "["]
ODD_WORDS = ["", "text", "label", "nan", "inf", "1e999", "1" * 5000, "-0", "0.5", "the cat", "null", "\\ud800"]
ODD = st.sampled_from([*ODD_CHARACTERS, *ODD_WORDS, '{"text": "a", "label": 1}'])
TEXTS = st.lists(ODD, max_size=40).map("".join) | st.text(max_size=200)
FIELDS = st.text(max_size=8) | ODD.filter(lambda word: not set(word) & set("\t\n\r"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.tuples(FIELDS, FIELDS) | st.lists(FIELDS, max_size=4).map(tuple), max_size=8)
OBJECTS = st.lists(
    st.fixed_dictionaries({}, optional={"text": VALUES | FIELDS, "label": VALUES | FIELDS}) | VALUES, max_size=8
)
DEEP = st.sampled_from([900, 990, 5_000, 200_000]).map(lambda depth: '{"text": ' + "[" * depth + "]" * depth + "}\n")


def separated(mark: str):
    return ROWS.map(lambda rows: "\n".join(mark.join(row) for row in [("text", "label"), *rows]))


CONTENTS = (
    st.binary(max_size=300)
    | (TEXTS | separated("\t") | separated(",") | DEEP).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | OBJECTS.map(lambda objects: "\n".join(map(json.dumps, objects)).encode())
)


def data_or_refusal(path, read):
    """What was read, or None where one error with the file's name says what is wrong."""
    try:
        return read()
    except UserError as error:
        refusal = str(error)
    assert str(path.parent) in refusal
    return None


@FUZZ
@given(CONTENTS)
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_table_is_rows_of_text_or_one_error(tmp_path, ending, content):
    path = tmp_path / f"file{ending}"
    path.write_bytes(content)
    rows = data_or_refusal(path, lambda: list(read_table(path, ["text", "label"])))
    for row in rows or ():
        assert len(row.values) == 2
        assert all(isinstance(value, str) for value in row.values)
        assert 1 <= row.line <= content.count(b"\n") + content.count(b"\r") + 1


@FUZZ
@given(content=CONTENTS, more=CONTENTS)
@pytest.mark.parametrize("regression", [False, True])
def test_a_task_of_ones_own_is_examples_that_tokenise_or_one_error(tmp_path, regression, content, more):
    train, dev = tmp_path / "train.tsv", tmp_path / "dev.jsonl"
    train.write_bytes(b"text\tlabel\n" + content)
    dev.write_bytes(b'{"text": "the cat", "label": "1"}\n' + more)
    task = custom_task(["text"], "label", regression)
    data = data_or_refusal(train, lambda: load_task_data(task, train_file=train, dev_file=dev))
    for examples in (data or {}).values():
        assert len(examples.labels) == len(examples) > 0
        assert all(math.isfinite(label) for label in examples.labels)
        assert len(tokenize(examples, TOKENIZER, 16)) == len(examples)


@FUZZ
@given(CONTENTS)
@pytest.mark.parametrize(("read", "ending"), [(read_json, "json"), (read_json_lines, "jsonl"), (read_yaml, "yaml")])
def test_a_file_of_settings_is_a_value_or_one_error(tmp_path, read, ending, content):
    path = tmp_path / f"file.{ending}"
    path.write_bytes(content)
    data_or_refusal(path, lambda: read(path))
