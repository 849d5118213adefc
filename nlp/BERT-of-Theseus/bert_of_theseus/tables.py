"""Strict reading of TSV, CSV and JSONL: every complaint names the file and the line.

TSV is read as GLUE writes it: no quoting, a quotation mark is text, only "\\n" and "\\r\\n" end a line. CSV is quoted
as usual (RFC 4180). All are UTF-8, with or without a byte order mark; blank lines are accepted at the end only.
"""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from common.run.errors import UserError

LARGEST_SCORE = 1e18  # a loss squares it


class Row(NamedTuple):
    """One data row: the number of its (first) line, counted from 1, and the values of the columns asked for."""

    line: int
    values: tuple[str, ...]


def read_table(
    path: str | Path,
    columns: Sequence[str],
    header: Sequence[str] | None = None,
    skipped: list[int] | None = None,
) -> Iterator[Row]:
    """The rows of a `.tsv`, `.csv`, `.jsonl` or `.json` (one object a line) file, reduced to some columns.

    Args:
        path: the file; its ending decides the format.
        columns: names of the wanted columns, in the order of `Row.values`.
        header: column names of a TSV or CSV file that has no header line.
        skipped: for a TSV or CSV file known to have broken rows: rows with a wrong number of columns are left out, and
            their line numbers appended here.

    Values of JSON objects other than text become text as JSON writes them (`1`, `0.5`, `true`).

    Raises:
        UserError: while iterating: no such file, an unknown ending, invalid UTF-8, no data rows, a wrong number of
            columns without `skipped`, a missing or repeated column, invalid CSV or JSON, a JSON value that is null, a
            list or an object.
    """
    path = Path(path)
    reader = {".tsv": _read_tsv, ".csv": _read_csv, ".jsonl": _read_json, ".json": _read_json}.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: unknown file type {path.suffix!r}; use .tsv, .csv or .jsonl")
    records = _without_trailing_blanks(reader(path))
    is_json = reader is _read_json
    rows = _pick_keys(path, records, columns) if is_json else _pick_columns(path, records, columns, header, skipped)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise UserError(f"{path}: no data rows")


def encode_label(path: str | Path, line: int, word: str, labels: Sequence[str]) -> int:
    """The number of a label; one that is not in `labels` raises `UserError` with the file, the line and the list."""
    try:
        return labels.index(word)
    except ValueError:
        raise UserError(f"{path} line {line}: unknown label {word!r}; valid: {', '.join(labels)}") from None


def parse_score(path: str | Path, line: int, word: str) -> float:
    """The score that `word` spells; anything but a finite number raises `UserError` with the file and the line."""
    try:
        score = float(word)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise UserError(f"{path} line {line}: score {word!r} is not a finite number")
    if abs(score) > LARGEST_SCORE:
        raise UserError(
            f"{path} line {line}: score {word} is beyond {LARGEST_SCORE:g}, whose square float32 does not hold; "
            "write the scores in another unit"
        )
    return score


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # Lines are cut as bytes: text mode would also need "\r" decided on, and str.splitlines cuts at U+0085 and U+2028,
    # both of which occur inside GLUE's sentences.
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(f"{path} line {number}: not UTF-8 (byte {error.start + 1} of the line)") from None
                yield number, text
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _read_tsv(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, text in _lines(path):
        text = text.removesuffix("\n").removesuffix("\r")
        yield number, text.split("\t") if text else []


def _read_csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(2**31 - 1)  # texts may be longer than its default, 131,072 characters
    reader = csv.reader((text for _, text in _lines(path)), strict=True)
    first = 1
    try:
        for record in reader:
            yield first, record
            first = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path} line {first}: not valid CSV: {error}") from None


def _read_json(path: Path) -> Iterator[tuple[int, dict]]:
    for number, text in _lines(path):
        try:
            record = json.loads(text) if text.strip() else {}
            if "\\u" in text:  # it can write half a character, which no tokenizer takes
                json.dumps(record, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number}: not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise UserError(f"{path} line {number}: not a JSON object; expected one object on every line")
        yield number, record


def _without_trailing_blanks(records: Iterator[tuple[int, list | dict]]) -> Iterator[tuple[int, list | dict]]:
    blanks = []
    for number, record in records:
        if record:
            yield from blanks
            blanks.clear()
            yield number, record
        else:
            blanks.append((number, record))


def _pick_columns(
    path: Path,
    records: Iterator[tuple[int, list[str]]],
    columns: Sequence[str],
    header: Sequence[str] | None,
    skipped: list[int] | None,
) -> Iterator[Row]:
    if header is None:
        _, header = next(records, (0, None))
        if header is None:
            raise UserError(f"{path}: empty file")
    for column in columns:
        if header.count(column) != 1:
            problem = "no column" if column not in header else "more than one column"
            raise UserError(f"{path}: {problem} {column!r}; its header is {', '.join(header)}")
    places = [header.index(column) for column in columns]
    for number, record in records:
        if len(record) == len(header):
            yield Row(number, tuple(record[place] for place in places))
        elif skipped is None:
            raise UserError(f"{path} line {number}: expected {len(header)} columns, got {len(record)}")
        else:
            skipped.append(number)


def _pick_keys(path: Path, records: Iterator[tuple[int, dict]], columns: Sequence[str]) -> Iterator[Row]:
    for number, record in records:
        values = []
        for column in columns:
            if column not in record:
                raise UserError(f"{path} line {number}: no key {column!r}; its keys are {', '.join(record) or 'none'}")
            value = record[column]
            if value is None or isinstance(value, list | dict):
                raise UserError(f"{path} line {number}: {column!r} is {json.dumps(value)}, expected text or a number")
            values.append(value if isinstance(value, str) else json.dumps(value))
        yield Row(number, tuple(values))
