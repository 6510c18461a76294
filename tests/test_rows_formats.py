"""Each kind of source: arrays, CSV, gzip, standard input, and what is none of them."""

import gzip
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repmatch.curator import textfiles
from repmatch.curator.rows import FieldChoice, open_rows
from repmatch.datamodels import BadRow, Row, digest
from repmatch.errors import InputError, UsageError

LINE = b'{"id": "a", "text": "t", "label": "l"}\n'


def read(path: object, choice: FieldChoice | None = None) -> list[Row | BadRow]:
    return [row for chunk in open_rows([str(path)], choice or FieldChoice()) for row in chunk]


def good(path: object) -> list[Row]:
    rows = read(path)
    assert all(isinstance(row, Row) for row in rows), rows
    return [row for row in rows if isinstance(row, Row)]


def reasons(rows: list[Row | BadRow]) -> dict[int, str]:
    return {row.line: row.reason for row in rows if isinstance(row, BadRow)}


# ------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b""])
@pytest.mark.parametrize("name", ["in.jsonl", "in.ndjson", "in.json", "IN.JSONL", "in.dat", "in"])
def test_json_lines_by_any_name(tmp_path: Path, name: str, ending: bytes) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + LINE + b"\n \t\n" + LINE.strip() + ending)
    first, second = good(tmp_path / name)
    assert (first.line, second.line) == (1, 4)
    assert first.json == second.json == LINE.decode().strip()


@pytest.mark.parametrize("head", [b"", b"\xef\xbb\xbf", b" \r\n\t"])
def test_one_array(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "in.json"
    path.write_bytes(
        head + b'[ {"text": "a", "label": "l", "n": 1.10} ,\n\n {\r\n  "text": "two  spaces",\n  "label": "l"\n }\n]\n'
    )
    first, second = good(path)
    assert first.json == '{"text": "a", "label": "l", "n": 1.10}'
    assert second.json == '{ "text": "two  spaces", "label": "l" }'
    assert (first.line, second.line) == (1, 2)


def test_an_empty_array(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(" [ ] ")
    assert read(tmp_path / "in.json") == []


def test_bad_elements_do_not_end_the_array(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    ok = LINE.strip()
    parts = [ok, b"3", b'{"a": NaN}', b'{"a": 1, "a": 2}', b'{"text": "caf\xe9", "label": "l"}', b'{"a": "\\ud800"}']
    parts += [b'{"a": 1e999, "id": 1, "text": "t", "label": "l"}', b"9" * 5000, ok]
    path.write_bytes(b"[" + b", ".join(parts) + b"]")
    rows = read(path)
    found = reasons(rows)
    assert [row.line for row in rows] == list(range(1, 10))
    assert sorted(found) == [2, 3, 4, 5, 6, 7, 8]
    assert "3 is JSON but not an object" in found[2]
    assert "NaN is not JSON" in found[3]
    assert "key twice: 'a'" in found[4]
    assert "invalid UTF-8: byte 0xe9 at character 14 of the element" in found[5]
    assert "lone surrogate" in found[6]
    assert "not finite" in found[7]
    assert "too many digits" in found[8]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[{}", "expected ',' or ']' after element 1 of the JSON array, found ''"),
        (b"[{},]", "element 2 of the JSON array is not JSON"),
        (b"[{} {}]", "expected ',' or ']' after element 1"),
        (b"[{}] x", "ends after 1 elements, but 'x' follows"),
        (b"[", "element 1 of the JSON array is not JSON"),
        (b'[{"a": "', "element 1 of the JSON array is not JSON"),
        (b"[" * 100_000, "element 1 of the JSON array is nested too deeply"),
    ],
)
def test_arrays_that_cannot_be_read_on(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "in.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read(tmp_path / "in.json")
    assert message in str(caught.value)
    assert str(tmp_path / "in.json") in str(caught.value)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda t: not t.isspace())))
def test_arrays_are_the_same_in_pieces_of_any_size(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "pieces.json"
    rows = [{"text": text, "label": 12, "o": [1.5, {"k": None}]} for text in texts]
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for size in (1, 7, 1 << 20):
            patch.setattr(textfiles, "_PIECE", size)
            assert [json.loads(row.json) for row in good(path)] == rows


def test_json_lines_that_end_in_cr_alone_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(LINE.strip() + b"\r" + LINE.strip() + b"\r")
    with pytest.raises(InputError, match=r"lines end in CR alone.*tr '\\r' '\\n'"):
        read(path)
    monkeypatch.setattr(textfiles, "MAX_ROW_BYTES", len(LINE) + 20)  # the whole file is one long row
    with pytest.raises(InputError, match="lines end in CR alone"):
        read(path)
    path.write_bytes(b'{"text": "}\\r{", "label": "x"}')  # an escape in a text is no line end
    assert [row.text for row in good(path)] == ["}\r{"]


def test_one_object_over_several_lines_is_named(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps({"rows": [{"text": "t", "label": "l"}]}, indent=2))
    with pytest.raises(InputError, match=r"one JSON object over several lines.*jq -c"):
        read(tmp_path / "in.json")


# -------------------------------------------------------------------------------------------------------- CSV


def test_csv_keeps_strings_columns_and_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(
        b'\xef\xbb\xbfid,text,label,n\r\n1,"two\r\nlines, ""quoted""",pos,01\r\n\r\n2,short\r\n3,plain 5" disk,neg,\r\n'
    )
    first, short, last = read(path)
    assert isinstance(first, Row)
    assert json.loads(first.json) == {"id": "1", "text": 'two\r\nlines, "quoted"', "label": "pos", "n": "01"}
    assert first.json.startswith('{"id": "1", "text": ')
    assert first.row_hash == digest(json.loads(first.json))
    assert isinstance(short, BadRow)
    assert "the row has 2 columns, the first '2'; expected 4" in short.reason
    assert isinstance(last, Row)
    assert (last.text, last.label, json.loads(last.json)["n"]) == ('plain 5" disk', "neg", "")
    assert (first.line, short.line, last.line) == (2, 5, 6)


def test_tsv_and_old_line_ends(tmp_path: Path) -> None:
    (tmp_path / "in.tsv").write_bytes(b"text\tlabel\ra, b\tx\rc\ty")
    assert [(row.text, row.label, row.line) for row in good(tmp_path / "in.tsv")] == [("a, b", "x", 2), ("c", "y", 3)]


def test_csv_with_quotes_that_never_close(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text('text,label\na,x\n"b,x\nc,x\n')
    rows = read(tmp_path / "in.csv")
    assert [type(row) for row in rows] == [Row, BadRow]
    assert "not readable as CSV from line 3 to 4: unexpected end of data" in reasons(rows)[3]


def test_csv_reads_on_after_a_field_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("text,label\n" + "y" * 190_000 + ",x\n" + "y" * 250_000 + ",x\n" + "y" * 1_100_000 + ",x\nlast,x\n")
    rows = read(path)
    assert [type(row) for row in rows] == [Row, BadRow, BadRow, Row]
    found = reasons(rows)
    assert "250,000 characters" in found[3]
    assert "field larger than field limit" in found[4]
    assert rows[3].line == 5


def test_csv_bounds_what_one_row_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfiles, "MAX_ROW_BYTES", 50)
    path = tmp_path / "in.csv"
    path.write_text("text,label\n" + "y" * 60 + ",x\n" + '"a\n' + "b,x\n" * 15 + "last,x\n")
    rows = read(path)
    assert "more than 50 bytes and was skipped" in reasons(rows)[2]
    assert "more than 50 bytes and was skipped" in reasons(rows)[3]  # 13 lines: the quote never closes
    assert [(row.line, row.text) for row in rows if isinstance(row, Row)] == [
        (16, "b"),
        (17, "b"),
        (18, "b"),
        (19, "last"),
    ]


def test_csv_with_invalid_utf8(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(b"text,label\ncaf\xe9,x\nfine,x\n")
    rows = read(tmp_path / "in.csv")
    assert "invalid UTF-8: byte 0xe9 in column 'text', character 4" in reasons(rows)[2]
    assert isinstance(rows[1], Row)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,label,text\n", "the header has the column 'text' twice"),
        (b"te\x00xt,label\n", "names that are not printable"),
        (b'"text,label\n', "the header cannot be read"),
    ],
)
def test_headers_that_cannot_be_used(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "in.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "in.csv")


def test_an_unnamed_column_gets_its_position_as_name(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text(",text,label\n0,t,l\n")
    assert json.loads(good(tmp_path / "in.csv")[0].json) == {"column_1": "0", "text": "t", "label": "l"}


def test_a_csv_without_the_columns_says_which_it_has(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text;label\na;b\n")
    assert "there is no column 'text'; the row has 'text;label'" in reasons(read(tmp_path / "in.csv"))[2]


CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=6)


@given(st.lists(st.tuples(CELL, CELL), max_size=6))
def test_any_csv_comes_back(tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]]) -> None:
    import csv

    path = tmp_path_factory.getbasetemp() / "any.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(["text", "label", "x", "y"])
        writer.writerows(["t", "l", *pair] for pair in cells)
    assert [tuple(json.loads(row.json).values())[2:] for row in good(path)] == cells


# ------------------------------------------------------------------------------------------------ gzip and others


def test_gzip(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINE) + gzip.compress(LINE))
    assert len(good(tmp_path / "a.jsonl.gz")) == 2
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"text\tlabel\na\tb\n"))
    assert good(tmp_path / "a.tsv.gz")[0].label == "b"
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"[" + LINE + b"]"))
    reader = open_rows([str(tmp_path / "a.gz")], FieldChoice())
    assert [len(chunk) for chunk in reader] == [1]
    (tmp_path / "b.json.gz").write_bytes((tmp_path / "a.gz").read_bytes())
    other = open_rows([str(tmp_path / "b.json.gz")], FieldChoice())
    list(other)
    assert other.input_hash == reader.input_hash


@pytest.mark.parametrize("damage", ["cut", "flip", "plain", "tail"])
def test_corrupt_gzip(tmp_path: Path, damage: str) -> None:
    packed = bytearray(gzip.compress(b"".join(b'{"text": "%d", "label": "l"}\n' % (i * i) for i in range(5000))))
    if damage == "flip":
        packed[len(packed) // 2] ^= 255
    content = {"cut": packed[:-20], "plain": LINE, "tail": packed + b"junk"}.get(damage, packed)
    (tmp_path / "in.jsonl.gz").write_bytes(content)
    with pytest.raises(InputError, match=r"in\.jsonl\.gz' is not complete gzip data .*gzip -t"):
        read(tmp_path / "in.jsonl.gz")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (gzip.compress(LINE), "gzip data"),
        (b"PK\x03\x04rest", "a zip archive or an Office file"),
        (b"PAR1rest", "Parquet data"),
        ("id,text".encode("utf-16"), "UTF-16 text"),
        ("id,text".encode("utf-16-le"), "UTF-16LE text without a byte order mark.*iconv -f UTF-16LE -t UTF-8"),
        ('{"text": "t"}'.encode("utf-16-be"), "UTF-16BE text without a byte order mark.*iconv -f UTF-16BE -t UTF-8"),
        ('[{"text": "t"}]'.encode("utf-32-le"), "UTF-32LE text without a byte order mark.*iconv -f UTF-32LE"),
    ],
)
@pytest.mark.parametrize("name", ["in.jsonl", "in.csv"])
def test_other_data_under_a_text_name(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}': the file holds {what}"):
        read(tmp_path / name)


def test_an_unknown_format_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "in.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(UsageError, match=r"in\.xlsx.*\.jsonl, \.ndjson, \.json, \.csv, \.tsv .*\.parquet"):
        open_rows([str(tmp_path / "in.xlsx")], FieldChoice())
    (tmp_path / "in.parquet.gz").write_bytes(b"")
    with pytest.raises(UsageError, match="gunzip"):
        open_rows([str(tmp_path / "in.parquet.gz")], FieldChoice())


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(LINE)
    with pytest.raises(UsageError) as caught:
        open_rows([str(tmp_path / "trian.jsonl")], FieldChoice())
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert f"there is no file {str(tmp_path / 'trian.jsonl')!r}; did you mean" in message
    assert repr(str(tmp_path / "train.jsonl")) in message
    assert "hf:NAME[@CONFIG][:SPLIT]" in message
    for name in ("", str(tmp_path / "no" / "such.csv"), "a\0b", "x" * 5000):
        with pytest.raises(UsageError):
            open_rows([name], FieldChoice())


def test_a_directory(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(LINE)
    with pytest.raises(InputError, match=r"is a directory; expected a file .*It holds 'train\.jsonl'"):
        open_rows([str(tmp_path)], FieldChoice())


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(LINE)
    reader = open_rows([str(path)], FieldChoice())

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"in\.jsonl' cannot be read: Permission denied"):
        list(reader)


def test_a_pipe_is_read_as_it_comes(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    threading.Thread(target=path.write_bytes, args=(LINE * 3,), daemon=True).start()
    assert len(good(path)) == 3


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINE + b"bad\n")))
    rows = read("-")
    assert [(type(row), row.source, row.line) for row in rows] == [(Row, "-", 1), (BadRow, "-", 2)]


def test_links_that_lead_nowhere_are_called_so(tmp_path: Path) -> None:
    (tmp_path / "loop.jsonl").symlink_to("round.jsonl")
    (tmp_path / "round.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "gone.jsonl").symlink_to("nowhere.jsonl")
    with pytest.raises(UsageError, match=r"loop\.jsonl' is a link to 'round\.jsonl' and leads round in a circle"):
        open_rows([str(tmp_path / "loop.jsonl")], FieldChoice())
    with pytest.raises(UsageError, match=r"gone\.jsonl' is a link to .* and leads to nothing that exists"):
        open_rows([str(tmp_path / "gone.jsonl")], FieldChoice())


def test_a_link_to_rows_is_read(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(LINE * 2)
    (tmp_path / "link.jsonl").symlink_to("in.jsonl")
    assert len(good(tmp_path / "link.jsonl")) == 2


def test_a_device_is_refused_and_standard_input_is_none(tmp_path: Path) -> None:
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for path in (tmp_path / "zero.jsonl", Path("/dev/zero")):
        with pytest.raises(UsageError, match="is a device, which may never end"):
            open_rows([str(path)], FieldChoice())
    code = (
        "from repmatch.curator.rows import FieldChoice, open_rows\n"
        "print([len(chunk) for chunk in open_rows(['/dev/stdin'], FieldChoice())])"
    )
    (tmp_path / "in.jsonl").write_bytes(LINE * 3)
    with (tmp_path / "in.jsonl").open("rb") as file, Path("/dev/null").open("rb") as null:
        for given, read in (({"input": LINE * 3}, "[3]"), ({"stdin": file}, "[3]"), ({"stdin": null}, "[]")):
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, **given)  # type: ignore[call-overload]
            assert done.stdout.decode().strip() == read
