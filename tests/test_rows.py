"""The reader: fields, ids, columns, hashes, chunks, memory."""

import hashlib
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repmatch.curator.rowmaker import Occurrences
from repmatch.curator.rows import FieldChoice, RowReader, open_rows
from repmatch.datamodels import BadRow, Fields, Row, digest
from repmatch.errors import InputError, RepMatchError, UsageError


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(reader: RowReader) -> list[Row | BadRow]:
    return [row for chunk in reader for row in chunk]


def rows_of(path: str, choice: FieldChoice | None = None) -> list[Row]:
    rows = read(open_rows([path], choice or FieldChoice()))
    assert all(isinstance(row, Row) for row in rows), rows
    return [row for row in rows if isinstance(row, Row)]


def test_a_row_has_the_user_s_values_and_canonical_hashes(tmp_path: Path) -> None:
    value = {"id": "a", "text": "héllo", "label": "x", "n": 1.0}
    path = write(tmp_path / "in.jsonl", value)
    (row,) = rows_of(path)
    assert row == Row(
        id="a",
        json='{"id": "a", "text": "h\\u00e9llo", "label": "x", "n": 1.0}',
        text="héllo",
        text_pair=None,
        label="x",
        row_hash=digest(value),
        task_hash=digest(["héllo", None, "x"]),
        source=path,
        line=1,
    )


def test_pair_decides_the_task_hash(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", {"text": "p", "text_pair": 'q"', "label": "x"}, {"text": "p", "label": "x"})
    first, second = rows_of(path)
    assert (first.text_pair, first.task_hash) == ('q"', digest(["p", 'q"', "x"]))
    assert (second.text_pair, second.task_hash) == (None, digest(["p", None, "x"]))


def test_fields_default_to_the_columns_that_are_there(tmp_path: Path) -> None:
    reader = open_rows([write(tmp_path / "a.jsonl", {"text": "t", "label": "l"})], FieldChoice())
    assert reader.fields == Fields(None, "text", None, "label")
    read(reader)
    assert reader.fields == Fields(None, "text", None, "label")
    reader = open_rows(
        [write(tmp_path / "b.jsonl", {"id": 1, "text": "t", "label": "l", "text_pair": None})], FieldChoice()
    )
    next(iter(reader))
    assert reader.fields == Fields("id", "text", "text_pair", "label")


def test_the_first_readable_row_decides_the_id(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('nonsense\n{"text": "t", "label": "l"}\n{"id": "x", "text": "t", "label": "l"}\n')
    reader = open_rows([str(path)], FieldChoice())
    bad, first, second = read(reader)
    assert reader.fields.id_field is None
    assert isinstance(bad, BadRow)
    assert isinstance(first, Row)
    assert first.id == first.row_hash
    assert isinstance(second, Row)
    assert second.id == second.row_hash


def test_named_fields_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", {"key": 7, "s1": "one", "s2": "two", "gold": True})
    (row,) = rows_of(path, FieldChoice("key", "s1", "s2", "gold"))
    assert (row.id, row.text, row.text_pair, row.label) == ("7", "one", "two", "true")


def test_an_empty_pair_field_means_single_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", {"text": "a", "text_pair": "b", "label": "l"})
    reader = open_rows([path], FieldChoice(text_pair_field=""))
    (row,) = read(reader)
    assert isinstance(row, Row)
    assert row.text_pair is None
    assert reader.fields.text_pair_field is None


def test_a_pair_that_turns_up_late_is_not_dropped_in_silence(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": "l"} for i in range(1000)]
    path = write(tmp_path / "in.jsonl", *rows, {"text": "t", "text_pair": "late", "label": "l"})
    found = read(open_rows([path], FieldChoice()))
    assert isinstance(found[-1], BadRow)
    assert "--text-pair-field text_pair" in found[-1].reason
    assert "'late'" in found[-1].reason
    assert [type(row) for row in found[:-1]] == [Row] * 1000


def test_resolved_fields_win(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", {"id": "a", "body": "t", "label": "l", "text_pair": "p"})
    fields = Fields(None, "body", None, "label")
    reader = open_rows([path], FieldChoice(text_field="body"), resolved=fields)
    (row,) = read(reader)
    assert reader.fields == fields
    assert isinstance(row, Row)
    assert (row.id, row.text_pair) == (row.row_hash, None)


def test_a_choice_against_the_resolved_fields_names_both(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", {"text": "t", "label": "l"})
    with pytest.raises(UsageError, match=r"--text-field is 'body', but the dataset was ingested with 'text'"):
        open_rows([path], FieldChoice(text_field="body"), resolved=Fields(None, "text", None, "label"))
    with pytest.raises(UsageError, match=r"--id-field is 'key', but the dataset was ingested with None"):
        open_rows([path], FieldChoice(id_field="key"), resolved=Fields(None, "text", None, "label"))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (FieldChoice(text_field="label"), "the text and the label are both column 'label'"),
        (FieldChoice(text_pair_field="text"), "names column 'text', which is the text or the label"),
        (FieldChoice(label_field=""), "--label-field is empty"),
    ],
)
def test_choices_that_cannot_be_meant(tmp_path: Path, choice: FieldChoice, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_rows([write(tmp_path / "in.jsonl")], choice)


def test_sources_that_cannot_be_meant(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl")
    for sources in ([], path):
        with pytest.raises(UsageError, match="at least one source"):
            open_rows(sources, FieldChoice())
    with pytest.raises(UsageError, match="is named twice"):
        open_rows([path, path], FieldChoice())


def test_exact_duplicates_are_kept_under_numbered_digests(tmp_path: Path) -> None:
    a, b = {"text": "a", "label": "l"}, {"text": "b", "label": "l"}
    path = write(tmp_path / "in.jsonl", a, b, a, {"label": "l", "text": "a"}, b)
    da, db = digest(a), digest(b)
    assert [row.id for row in rows_of(path)] == [da, db, f"{da}-2", f"{da}-3", f"{db}-2"]


def test_duplicates_of_the_user_s_id_are_left_alone(tmp_path: Path) -> None:
    row = {"id": "a", "text": "a", "label": "l"}
    assert [r.id for r in rows_of(write(tmp_path / "in.jsonl", row, row))] == ["a", "a"]


@given(st.lists(st.integers(0, 40), max_size=300))
def test_occurrences_count_like_a_dict(numbers: list[int]) -> None:
    occurrences = Occurrences()
    counts: dict[str, int] = {}
    for number in numbers:
        name = digest(number)
        counts[name] = counts.get(name, 0) + 1
        expected = name if counts[name] == 1 else f"{name}-{counts[name]}"
        assert occurrences.name(name) == expected


def test_occurrences_survive_growth_and_stay_small() -> None:
    names = [hashlib.blake2b(str(i).encode(), digest_size=16).hexdigest() for i in range(20_000)]
    tracemalloc.start()
    occurrences = Occurrences()
    assert [occurrences.name(name) for name in names] == names
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 20_000 * 40
    assert [occurrences.name(name) for name in names[::7]] == [f"{name}-2" for name in names[::7]]


def test_columns_are_the_union_with_their_kinds(tmp_path: Path) -> None:
    path = write(
        tmp_path / "in.jsonl",
        {"text": "t", "label": 1, "n": 1, "b": True, "mixed": 1, "nothing": None, "tags": ["x"], "later": None},
        {"text": "t", "label": 2, "n": 2.5, "b": None, "mixed": "one", "o": {"k": 1}, "later": False},
        {"text": None, "label": 1, "only_in_a_bad_row": 1},
    )
    reader = open_rows([path], FieldChoice())
    read(reader)
    assert reader.columns == {
        "text": "string",
        "label": "number",
        "n": "number",
        "b": "boolean",
        "mixed": "json",
        "nothing": "string",
        "tags": "json",
        "later": "boolean",
        "o": "json",
    }


def test_counts_and_hash_of_each_source(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", {"text": "t", "label": "l"}, {"text": "", "label": "l"})
    b = write(tmp_path / "b.jsonl", {"text": "u", "label": "l"})
    reader = open_rows([a, b], FieldChoice())
    with pytest.raises(UsageError, match="known at its end"):
        _ = reader.input_hash
    read(reader)
    hashes = [hashlib.blake2b(Path(p).read_bytes(), digest_size=32).hexdigest() for p in (a, b)]
    assert [(c.name, c.rows, c.bad, c.hash) for c in reader.counts] == [(a, 1, 1, hashes[0]), (b, 1, 0, hashes[1])]
    assert reader.input_hash == digest(hashes, size=32)


def test_rows_are_read_once(tmp_path: Path) -> None:
    reader = open_rows([write(tmp_path / "in.jsonl", {"text": "t", "label": "l"})], FieldChoice())
    assert len(read(reader)) == 1
    with pytest.raises(UsageError, match="call open_rows again"):
        iter(reader)


def test_an_empty_file_yields_nothing(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.csv", "a.unknown"):
        (tmp_path / name).write_bytes(b"")
        reader = open_rows([str(tmp_path / name)], FieldChoice())
        assert list(reader) == []
        assert (reader.fields, reader.columns) == (Fields(None, "text", None, "label"), {})
        assert reader.counts[0].rows == 0


def test_chunks_end_at_a_thousand_rows_or_eight_million_characters(tmp_path: Path) -> None:
    small = [{"id": i, "text": "t", "label": "l"} for i in range(2500)]
    assert [len(c) for c in open_rows([write(tmp_path / "a.jsonl", *small)], FieldChoice())] == [1000, 1000, 500]
    large = [{"id": i, "text": "t", "label": "l", "blob": "x" * 3_000_000} for i in range(4)]
    assert [len(c) for c in open_rows([write(tmp_path / "b.jsonl", *large)], FieldChoice())] == [3, 1]


def test_memory_stays_flat(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        path = write(tmp_path / f"{count}.jsonl", *({"text": f"text {i}", "label": "l"} for i in range(count)))
        tracemalloc.start()
        assert sum(len(chunk) for chunk in open_rows([path], FieldChoice())) == count
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    peak(10)
    assert peak(16_000) - peak(4_000) < 12_000 * 40  # the packed digests, and nothing else, grow


def test_a_very_long_line_is_skipped_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a", "label": "l"}\n{"text": "')
        for _ in range(96):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n{"text": "b", "label": "l"}\n')
    tracemalloc.start()
    first, long, last = read(open_rows([str(path)], FieldChoice()))
    _, highest = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert highest < 48 << 20
    assert isinstance(long, BadRow)
    assert (first.line, long.line, last.line) == (1, 2, 3)
    assert long.reason.startswith("the row has more than 16,777,216 bytes and was skipped")
    assert isinstance(last, Row)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(TEXT, JSON, max_size=5), st.booleans())
def test_any_object_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, extra: dict[str, object], ascii_: bool
) -> None:
    value = {**extra, "id": "i", "text": "t", "label": "l", "text_pair": None}
    line = json.dumps(value, ensure_ascii=ascii_)
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(line.encode() + b"\n")
    (row,) = rows_of(str(path))
    assert row.json == line
    assert json.loads(row.json) == value
    assert row.row_hash == digest(value)


def test_export_can_equal_the_input_byte_for_byte(tmp_path: Path) -> None:
    raw = (
        '{"text":"caf\u00e9 \\u00e9 \\ud83d\\ude00","label" : 1.10, "z": 1E5}\n'
        '{ "label": "l",\t"text": "\u2028 x\\n", "big": 123456789012345678901234567890 }\n'
    ).encode()
    path = tmp_path / "in.jsonl"
    path.write_bytes(raw)
    assert "".join(row.json + "\n" for row in rows_of(str(path))).encode() == raw


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz", ".bin"])
@given(data=st.binary(max_size=300) | st.text('[]{}",:0 \\uD8\n\r\tteabl', max_size=80).map(str.encode))
def test_random_bytes_raise_nothing_else(tmp_path_factory: pytest.TempPathFactory, suffix: str, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(data)
    try:
        rows = read(open_rows([str(path)], FieldChoice()))
    except RepMatchError as error:
        assert str(path) in str(error)
    else:
        assert len(rows) <= len(data)


def test_a_source_that_breaks_midway_gives_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    rows = ",".join(json.dumps({"text": f"t{i}", "label": "l"}) for i in range(1000))
    path.write_text(f"[{rows}, oops]")
    reader = open_rows([str(path)], FieldChoice())
    chunks = iter(reader)
    assert len(next(chunks)) == 1000
    with pytest.raises(InputError, match="element 1001 of the JSON array is not JSON"):
        next(chunks)
