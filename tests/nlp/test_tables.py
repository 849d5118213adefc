"""The table of tasks, and strict reading: what a complaint names, and what is text although it looks like syntax."""

import csv
import json
import pickle

import pytest

from bert_of_theseus.tables import encode_label, parse_score, read_table
from bert_of_theseus.tasks import TASKS, custom_task, get_task
from common.run.errors import UserError

REAL_ROWS = {  # data rows of the original train, dev and test files
    "CoLA": (8551, 1043, 1063),
    "SST-2": (67349, 872, 1821),
    "MRPC": (3667, 408, 1725),
    "STS-B": (5749, 1500, 1379),
    "RTE": (2490, 277, 3000),
    "WNLI": (635, 71, 146),
}


@pytest.fixture
def table(tmp_path):
    """Writes a file and returns its path."""

    def write(name: str, content: str | bytes):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def read(path, *columns, **options):
    return list(read_table(path, columns, **options))


def complaint(path, *columns, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(path, *columns, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("rte", "RTE"),
        ("RTE", "RTE"),
        ("sst-2", "SST-2"),
        ("sst2", "SST-2"),
        ("stsb", "STS-B"),
        ("STS-B", "STS-B"),
        ("Cola", "CoLA"),
        ("mnli", "MNLI"),
    ],
)
def test_a_task_is_found_by_any_usual_spelling(given, name):
    assert get_task(given).name == name


def test_an_unknown_task_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'ax'.*CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE, WNLI, or custom"):
        get_task("ax")


def test_mnli_has_two_sets_of_each_kind_matched_first():
    mnli = get_task("MNLI")
    assert mnli.dev_sets == ("dev_matched", "dev_mismatched")
    assert mnli.test_sets == ("test_matched", "test_mismatched")


def test_only_the_training_file_of_qqp_is_known_to_have_broken_rows():
    assert {task.name: task.broken_rows for task in TASKS if task.broken_rows} == {"QQP": ("train",)}


def test_outputs_are_the_labels_or_one_score():
    assert {task.name: task.num_outputs for task in TASKS} == {
        **dict.fromkeys(("CoLA", "SST-2", "MRPC", "QQP", "QNLI", "RTE", "WNLI"), 2), "MNLI": 3, "STS-B": 1,
    }  # fmt: skip


def test_tasks_survive_pickling():
    assert pickle.loads(pickle.dumps(TASKS)) == TASKS


@pytest.mark.parametrize(
    ("texts", "label", "message"),
    [
        (["a", "b", "c"], "y", "one or two text columns"),
        ([], "y", "one or two text columns"),
        (["a"], "a", "another one for the label"),
    ],
)
def test_a_contradictory_custom_task_is_refused(texts, label, message):
    with pytest.raises(UserError, match=message):
        custom_task(texts, label)


def test_tsv_quotation_marks_are_text(table):
    path = table("a.tsv", 'sentence\tlabel\n"open only\t1\nsay "" twice\t0\n')
    assert read(path, "sentence", "label") == [(2, ('"open only', "1")), (3, ('say "" twice', "0"))]


@pytest.mark.parametrize("inside", ["\u0085", "\u2028", "\x0b", "\x0c", "\r", "\x1c"])
def test_tsv_lines_end_at_newlines_only(table, inside):
    path = table("a.tsv", f"sentence\tlabel\none{inside}two\t1\n")
    assert read(path, "sentence") == [(2, (f"one{inside}two",))]


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
def test_byte_order_mark_and_crlf_leave_no_trace(table, name):
    comma = "\t" if name == "a.tsv" else ","
    path = table(name, f"\ufeffsentence{comma}label\r\ngood{comma}1\r\n")
    assert read(path, "sentence", "label") == [(2, ("good", "1"))]


def test_last_line_needs_no_newline_and_blank_lines_may_follow(table):
    assert read(table("a.tsv", "t\ty\nx\t1"), "y") == read(table("b.tsv", "t\ty\nx\t1\n\n\r\n"), "y") == [(2, ("1",))]


def test_a_blank_line_inside_is_a_wrong_line(table):
    assert complaint(table("a.tsv", "t\ty\nx\t1\n\nz\t0\n"), "y").endswith("a.tsv line 3: expected 2 columns, got 0")


def test_a_headerless_file_starts_with_data(table):
    path = table("a.tsv", "gj04\t1\t\tThey left.\n")
    assert read(path, "sentence", "label", header=("source", "label", "mark", "sentence")) == [(1, ("They left.", "1"))]


def test_csv_quoting_and_line_numbers_of_records_over_two_lines(table):
    path = table("a.csv", 't,y\n"a ""b"",\nc",1\nd,0\n')
    assert read(path, "t", "y") == [(2, ('a "b",\nc', "1")), (4, ("d", "0"))]


def test_json_numbers_become_text(table):
    records = [{"t": "a\tb", "y": 1, "other": None}, {"y": True, "t": "c"}, {"t": "d", "y": 0.5}]
    path = table("a.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    assert [row.values for row in read(path, "t", "y")] == [("a\tb", "1"), ("c", "true"), ("d", "0.5")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "", "a.tsv: empty file"),
        ("a.csv", "", "a.csv: empty file"),
        ("a.jsonl", "", "a.jsonl: no data rows"),
        ("a.tsv", "\n\n", "a.tsv: empty file"),
        ("a.tsv", "t\ty\n", "a.tsv: no data rows"),
        ("a.tsv", "t\ty\nx\t1\nx\t1\t2\n", "a.tsv line 3: expected 2 columns, got 3"),
        ("a.tsv", "t\ty\nx\n", "a.tsv line 2: expected 2 columns, got 1"),
        ("a.csv", "t,y\nx,1\nx\n", "a.csv line 3: expected 2 columns, got 1"),
        ("a.tsv", "t\tlabel\nx\t1\n", "a.tsv: no column 'y'; its header is t, label"),
        ("a.tsv", "t\ty\ty\nx\t1\t1\n", "a.tsv: more than one column 'y'; its header is t, y, y"),
        ("a.tsv", b"t\ty\nx\t1\nab\xff\t0\n", "a.tsv line 3: not UTF-8 (byte 3 of the line)"),
        ("a.csv", b"t,y\nx,1\n\xe9,0\n", "a.csv line 3: not UTF-8 (byte 1 of the line)"),
        ("a.csv", 't,y\nx,1\n"never closed,1\n', "a.csv line 3: not valid CSV: unexpected end of data"),
        ("a.jsonl", '{"t": "x", "y": 1}\n{"t": \n', "a.jsonl line 2: not valid JSON: Expecting value"),
        ("a.jsonl", '["x", 1]\n', "a.jsonl line 1: not a JSON object"),
        ("a.jsonl", '{"t": "x \\ud83d", "y": 1}\n', "a.jsonl line 1: not valid JSON: 'utf-8' codec can't encode"),
        ("a.jsonl", '{"t": ' + 99999 * "[", "a.jsonl line 1: not valid JSON: maximum recursion depth"),
        ("a.jsonl", '{"t": "x", "y": 1}\n{"t": "x", "label": 1}\n', "line 2: no key 'y'; its keys are t, label"),
        ("a.jsonl", '{"t": null, "y": 1}\n', "a.jsonl line 1: 't' is null, expected text or a number"),
        ("a.jsonl", '{"t": ["x"], "y": 1}\n', "a.jsonl line 1: 't' is [\"x\"], expected text or a number"),
        ("a.parquet", "", "a.parquet: unknown file type '.parquet'; use .tsv, .csv or .jsonl"),
    ],
)
def test_a_complaint_names_the_file_the_line_and_what_would_be_right(table, name, content, message):
    assert message in complaint(table(name, content), "t", "y")


def test_a_text_may_be_long(table):
    long = 70_000 * "so "
    assert read(table("a.csv", f"t,y\n{long},1\n"), "t") == [(2, (long,))]


def test_a_character_may_be_written_as_two_halves(table):
    assert read(table("a.jsonl", '{"t": "\\ud83d\\ude00", "y": 1}\n'), "t") == [(1, ("\N{GRINNING FACE}",))]


@pytest.mark.parametrize(("name", "comma"), [("a.tsv", "\t"), ("a.csv", ",")])
def test_rows_of_another_width_are_skipped_and_numbered_where_that_is_asked_for(table, name, comma):
    content = "t,y\na,1\nb\nc,0,2\nd,0\n".replace(",", comma)
    skipped = []
    assert read(table(name, content), "y", skipped=skipped) == [(2, ("1",)), (5, ("0",))]
    assert skipped == [3, 4]


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    assert complaint(tmp_path / "none.tsv", "t") == f"{tmp_path}/none.tsv: No such file or directory"
    (tmp_path / "folder.tsv").mkdir()
    assert complaint(tmp_path / "folder.tsv", "t") == f"{tmp_path}/folder.tsv: Is a directory"


def test_labels_are_numbered_in_the_given_order():
    assert [encode_label("a.tsv", 2, word, ("yes", "no")) for word in ("yes", "no")] == [0, 1]


def test_an_unknown_label_lists_the_valid_ones():
    with pytest.raises(UserError, match=r"^a.tsv line 7: unknown label 'maybe'; valid: yes, no$"):
        encode_label("a.tsv", 7, "maybe", ("yes", "no"))


def test_scores_are_numbers():
    assert [parse_score("a.tsv", 2, word) for word in ("3.800", "-1", "1e-3")] == [3.8, -1.0, 0.001]


@pytest.mark.parametrize("word", ["high", "", "nan", "inf"])
def test_a_score_that_is_not_a_finite_number_is_refused(word):
    with pytest.raises(UserError, match=f"^a.tsv line 7: score '{word}' is not a finite number$"):
        parse_score("a.tsv", 7, word)


@pytest.mark.parametrize("name", REAL_ROWS)
def test_real_files_parse_in_full(real_data, name):
    task = get_task(name)
    for set_name, count in zip(("train", "dev", "test"), REAL_ROWS[name], strict=True):
        columns = task.text_columns if set_name == "test" else (*task.text_columns, task.label_column)
        path = real_data / "glue" / name / f"{set_name}.tsv"
        rows = read(path, *columns, header=task.headerless.get(set_name))
        assert len(rows) == count
        with path.open(encoding="utf-8-sig", newline="\n") as file:  # pulled apart once more, by the csv module
            records = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        names = task.headerless.get(set_name) or records.pop(0)
        assert [row.values for row in rows] == [tuple(record[names.index(c)] for c in columns) for record in records]
