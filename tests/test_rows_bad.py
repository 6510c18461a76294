"""Rows that are set aside: each says what is wrong, the value, what was expected and the remedy."""

from pathlib import Path

import pytest
from conftest import Run

from repmatch.curator.rows import FieldChoice, open_rows
from repmatch.datamodels import BadRow, Row

GOOD = b'{"id": "ok", "text": "t", "label": "l"}'


def one(tmp_path: Path, line: bytes, choice: FieldChoice | None = None) -> Row | BadRow:
    """Read a line between two good ones; the good ones must come through."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    before, row, after = [r for chunk in open_rows([str(path)], choice or FieldChoice()) for r in chunk]
    if choice is None:
        assert isinstance(before, Row)
        assert isinstance(after, Row)
    assert (before.line, row.line, after.line) == (1, 2, 3)
    assert row.source == str(path)
    return row


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (b'{"text": "t", }', ["not JSON", "at character 1", "expected one complete JSON object a line"]),
        (b"text,label", ["not JSON", "at character 1", "'text,label'"]),
        (GOOD + GOOD, ["more data after the first value at character 40"]),
        (b'["a"]', ["['a'] is JSON but not an object", "named .json"]),
        (b"3", ["3 is JSON but not an object"]),
        (b'{"text": "a\tb"}', ["Invalid control character"]),
        (b'{"a": NaN}', ["NaN is not JSON", "Write null"]),
        (b'{"a": [-Infinity]}', ["-Infinity is not JSON"]),
        (b'{"id": "i", "text": "t", "label": "l", "a": {"b": 1e400}}', ["column 'a'", "not finite (inf", "Write null"]),
        (b'{"id": "i", "text": "t", "label": -1e999}', ["column 'label'", "not finite (-inf"]),
        (b'{"text": "caf\xe9"}', ["invalid UTF-8 at byte 14 of the line (0xe9", "iconv"]),
        (b'{"text": "\xed\xa0\x80"}', ["invalid UTF-8 at byte 11 of the line (0xed"]),
        (b'{"text": "ab\\ud800", "label": "l"}', ["lone surrogate \\ud800 in column 'text', character 3"]),
        (b'{"text": "ab", "o": [{"\\uDFFF": 1}]}', ["lone surrogate \\udfff in column 'o'"]),
        (b'{"text": "a", "text": "b"}', ["key twice: 'text'", "Keep one"]),
        (b'{"text": "a", "o": {"k": 1, "k": 1}}', ["key twice: 'k'"]),
        (b'{"a": ' + b"[" * 201 + b"]" * 201 + b"}", ["nested more than 200 levels"]),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, ["nested more than 200 levels"]),
        (b"[" * 500_000, ["nested more than 200 levels"]),
        (b'{"a": ' + b"9" * 5000 + b"}", ["too many digits", "as a string"]),
    ],
)
def test_lines_that_are_no_row(tmp_path: Path, line: bytes, parts: list[str]) -> None:
    row = one(tmp_path, line)
    assert isinstance(row, BadRow)
    for part in parts:
        assert part in row.reason
    assert len(row.reason) < 500


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ('"txt": "t", "label": "l"', ["no column 'text'", "'id', 'txt', 'label'", "--text-field"]),
        ('"text": null, "label": "l"', ["column 'text' holds None (null); expected text"]),
        ('"text": 3, "label": "l"', ["column 'text' holds 3 (a number)"]),
        ('"text": ["a"], "label": "l"', ["column 'text' holds ['a'] (a list)"]),
        ('"text": "", "label": "l"', ["column 'text' is empty or blank ('')"]),
        ('"text": " \\n\\u00a0", "label": "l"', ["column 'text' is empty or blank"]),
        ('"text": "' + "y" * 200_001 + '", "label": "l"', ["holds 200,001 characters", "at most 200,000", "Split"]),
        ('"text": "' + "y" * 1_000_000 + '", "label": "l"', ["holds 1,000,000 characters"]),
        ('"text": "t"', ["no column 'label'", "'id', 'text'", "--label-field"]),
        ('"text": "t", "label": null', ["the label in column 'label' is None (null)"]),
        ('"text": "t", "label": ""', ["the label in column 'label' is empty or blank ('')"]),
        ('"text": "t", "label": "  "', ["the label in column 'label' is empty or blank"]),
        ('"text": "t", "label": ["a"]', ["the label in column 'label' is ['a'] (a list)"]),
        ('"text": "t", "label": {"a": 1}', ["the label in column 'label' is {'a': 1} (an object)"]),
        ('"text": "t", "label": "' + "z" * 1001 + '"', ["the label in column 'label' has 1,001 characters"]),
        ('"text": "t", "label": "l", "text_pair": 3', ["column 'text_pair' holds 3 (a number)", "--text-pair-field"]),
        ('"text": "t", "label": "l", "text_pair": "' + "y" * 200_001 + '"', ["column 'text_pair' holds 200,001"]),
    ],
)
def test_columns_that_cannot_be_read(tmp_path: Path, fields: str, parts: list[str]) -> None:
    row = one(tmp_path, f'{{"id": "u7", {fields}}}'.encode())
    assert isinstance(row, BadRow)
    assert row.id == "u7"
    for part in parts:
        assert part in row.reason
    assert len(row.reason) < 500


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("", "no column 'id'"),
        ('"id": null,', "the id in column 'id' is None (null)"),
        ('"id": [1],', "the id in column 'id' is [1] (a list)"),
        ('"id": {},', "the id in column 'id' is {} (an object)"),
        ('"id": "",', "the id in column 'id' is empty or blank"),
        ('"id": "' + "i" * 1001 + '",', "the id in column 'id' has 1,001 characters"),
    ],
)
def test_ids_that_cannot_be_read(tmp_path: Path, value: str, part: str) -> None:
    row = one(tmp_path, f'{{{value} "text": "t", "label": "l"}}'.encode())
    assert isinstance(row, BadRow)
    assert row.id is None
    assert part in row.reason
    assert "--id-field" in row.reason


def test_a_named_column_must_exist(tmp_path: Path) -> None:
    row = one(tmp_path, GOOD, FieldChoice(text_pair_field="text_pair"))
    assert isinstance(row, BadRow)
    assert "there is no column 'text_pair'" in row.reason
    assert "--text-pair-field" in row.reason
    row = one(tmp_path, GOOD, FieldChoice(id_field="key"))
    assert isinstance(row, BadRow)
    assert "there is no column 'key'; the row has 'id', 'text', 'label'" in row.reason


@pytest.mark.parametrize(
    ("value", "label"),
    [("true", "true"), ("false", "false"), ("3", "3"), ("0.5", "0.5"), ("-0", "0"), ('"a b"', "a b")],
)
def test_labels_in_text_form(tmp_path: Path, value: str, label: str) -> None:
    row = one(tmp_path, f'{{"id": 4, "text": "t", "label": {value}}}'.encode())
    assert isinstance(row, Row)
    assert (row.id, row.label) == ("4", label)


def test_limits_are_inclusive(tmp_path: Path) -> None:
    line = '{"id": "%s", "text": "%s", "label": "%s"}' % ("i" * 1000, "t" * 200_000, "l" * 1000)  # noqa: UP031
    assert isinstance(one(tmp_path, line.encode()), Row)
    deep = b'{"id": 1, "text": "t", "label": "l", "a": ' + b"[" * 199 + b"]" * 199 + b"}"
    assert isinstance(one(tmp_path, deep), Row)


def test_a_blank_pair_is_no_pair(tmp_path: Path) -> None:
    row = one(tmp_path, b'{"id": 1, "text": "t", "label": "l", "text_pair": " "}')
    assert isinstance(row, Row)
    assert row.text_pair is None


def test_only_bad_rows_still_name_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"x\n\n\r\ny")
    reader = open_rows([str(path)], FieldChoice())
    assert [(type(row), row.line) for chunk in reader for row in chunk] == [(BadRow, 1), (BadRow, 4)]
    assert reader.counts[0].bad == 2


def test_bad_rows_are_named_where_the_others_have_one_label(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "in.jsonl"
    rows = ['{"id": "a", "text": "t", "label": "p"}', '{"id": "b", "text": "u", "label": "p"}', '{"id": "c", "te']
    path.write_text("\n".join(rows), encoding="utf-8")
    code, _, err = run("--store", tmp_path / "s", "ingest", path, "--dataset", "d")
    assert code == 1
    assert "every row has the label 'p'" in err
    assert "These rows could not be used:" in err
    assert f"{path}:3: " in err
    assert "not JSON" in err
