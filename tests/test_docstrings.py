"""The demo's corpus from the standard library."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from repmatch.curator.docstrings import AREAS, clean, gather, split, write_jsonl
from repmatch.curator.rows import FieldChoice, open_rows
from repmatch.datamodels import Row
from repmatch.errors import InputError, UsageError


@pytest.fixture(scope="module")
def corpus() -> list[dict[str, object]]:
    return gather()


def test_the_corpus_is_balanced_unique_and_clean(corpus: list[dict[str, object]]) -> None:
    counts = Counter(str(row["label"]) for row in corpus)
    assert set(counts) == set(AREAS)
    assert min(counts.values()) >= 100
    assert 1_000 <= len(corpus) <= 1_600
    assert len({row["id"] for row in corpus}) == len(corpus)
    assert len({row["text"] for row in corpus}) == len(corpus)
    for row in corpus:
        text = str(row["text"])
        assert 40 <= len(text) <= 600
        assert text == " ".join(text.split())
        assert ">>>" not in text
        assert row["id"] == f"{row['module']}.{row['qualname']}"
    assert {row["kind"] for row in corpus} == {"function", "class", "method"}


def test_a_known_docstring_is_labelled_by_its_chapter() -> None:
    rows = {row["id"]: row for row in gather(100_000)}
    shuffle = rows["random.Random.shuffle"]
    assert shuffle["label"] == "numeric"
    assert shuffle["text"] == "Shuffle list x in place, and return None."
    assert shuffle["kind"] == "method"
    assert rows["textwrap.dedent"]["kind"] == "function"
    assert rows["textwrap.dedent"]["label"] == "text"
    assert rows["asyncio.queues.Queue"]["kind"] == "class"
    assert rows["asyncio.queues.Queue"]["label"] == "concurrency"


def test_equal_seeds_give_equal_rows_in_another_process(corpus: list[dict[str, object]]) -> None:
    code = "from repmatch.curator.docstrings import gather; print([row['id'] for row in gather()])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([row["id"] for row in corpus])


def test_the_seed_and_the_limit_decide(corpus: list[dict[str, object]]) -> None:
    few = gather(81)
    counts = Counter(row["label"] for row in few)
    assert len(few) == 81
    assert sorted(counts.values()) == [10] * 7 + [11]
    ids = {row["id"] for row in corpus}
    assert all(row["id"] in ids for row in few)  # a smaller limit takes the first of a larger one
    assert [row["id"] for row in gather(81, seed=1)] != [row["id"] for row in few]
    with pytest.raises(UsageError, match="limit is 0"):
        gather(0)


def test_split_is_stratified_and_keeps_the_order(corpus: list[dict[str, object]]) -> None:
    train, test = split(corpus, 0.25, seed=3)
    assert [row["id"] for row in corpus if row in train] == [row["id"] for row in train]
    assert {row["id"] for row in train} | {row["id"] for row in test} == {row["id"] for row in corpus}
    assert len(train) + len(test) == len(corpus)
    whole, part = (Counter(row["label"] for row in rows) for rows in (corpus, test))
    assert all(part[label] == round(0.25 * whole[label]) for label in whole)
    assert split(corpus, 0.25, seed=3) == (train, test)
    assert split(corpus, 0.25, seed=4) != (train, test)


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.5, 2), (0.99, 2)])
def test_split_leaves_something_on_both_sides(share: float, count: int) -> None:
    rows = [{"id": str(i), "label": "a"} for i in range(3)]
    train, test = split(rows, share)
    assert (len(train), len(test)) == (3 - count, count)


def test_split_refuses_a_share_that_is_none() -> None:
    for share in (0.0, 1.0, 20):
        with pytest.raises(UsageError, match="between 0 and 1"):
            split([], share)


def test_the_written_file_is_read_back(tmp_path: Path) -> None:
    rows = gather(40)
    write_jsonl(tmp_path / "out.jsonl", rows)
    reader = open_rows([str(tmp_path / "out.jsonl")], FieldChoice())
    found = [row for chunk in reader for row in chunk]
    assert all(isinstance(row, Row) for row in found)
    assert [json.loads(row.json) for row in found if isinstance(row, Row)] == rows
    assert reader.columns["line"] == "number"


@pytest.mark.parametrize(
    ("docstring", "text"),
    [
        ("Too short.", ""),
        ("=" * 60, ""),
        ("Return the number of\n  items in the whole queue.", "Return the number of items in the whole queue."),
        ("Return the sum of all numbers that are given.\n\n>>> f(1)", "Return the sum of all numbers that are given."),
        ("First paragraph of the two.\n\nSecond paragraph.", "First paragraph of the two. Second paragraph."),
        ("First sentence is forty characters long so.\n\n" + "x " * 300, "First sentence is forty characters long so."),
        ("A sentence that is long enough to be kept. " + "word " * 200, "A sentence that is long enough to be kept."),
        ("word " * 200, ("word " * 120).strip()),
    ],
)  # fmt: skip
def test_cleaning(docstring: str, text: str) -> None:
    assert clean(docstring) == text


def test_an_interpreter_without_sources_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(InputError, match="no Python sources of the standard library"):
        gather()


def test_broken_and_odd_sources_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "queue.py").write_text(
        "if True:\n    def one():\n        'Do the first of the many things there are to do.'\nelse:\n"
        "    def one():\n        'Do the other of the many things there are to do.'\n"
        "class K:\n    def m(self):\n        'Do the first of the many things there are to do.'\n"
        "    def p(self):\n        def inner():\n            'This docstring of an inner function is not read.'\n"
    )
    (tmp_path / "random.py").write_text("def broken(:")
    (tmp_path / "heapq.py").write_bytes(b"\x00\xff")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert gather() == [
        {
            "id": "queue.one",
            "text": "Do the first of the many things there are to do.",
            "label": "concurrency",
            "module": "queue",
            "qualname": "one",
            "kind": "function",
            "line": 2,
        }
    ]
