from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Run, toy_rows, write_rows

import repmatch
from repmatch.curator.destination import check_destination, source_files, whole_file
from repmatch.curator.report.page import MARK
from repmatch.errors import RepMatchError, UsageError


@pytest.fixture
def own(run: Run, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a.jsonl, ingested from there by its relative name, and the store "s" with a coreset."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "a.jsonl", toy_rows(20))
    assert run("--store", "s", "ingest", "a.jsonl", "--dataset", "docs", "--model", tiny_model).code == 0
    assert run("--store", "s", "select", "docs", "-k", 3, "--name", "core").code == 0
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextmanager
def files_of_at_most(count: int) -> Iterator[None]:
    """Let the system refuse larger files, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("path", ["s/catalog.duckdb", "s/segments/000001.bin", "s/new", "link", "folder/new"])
def test_nothing_is_written_into_a_store(run: Run, own: Path, path: str, force: tuple[str, ...]) -> None:
    (own / "link").symlink_to("s/catalog.duckdb")
    (own / "folder").symlink_to("s/segments")
    before = contents(own)
    shutil.copytree(own / "s", own / "other")
    for command in (("export", "core"), ("report", "docs", "--layout", "pca")):
        for store in ("s", "other"):  # a store that is not at hand is one, too
            result = run("--store", store, *command, "-o", path, *force)
            assert (result.code, "lies in the store" in result.err) == (2, True), result.err
            assert str(own / "s") in result.err
    shutil.rmtree(own / "other")
    assert contents(own) == before
    assert run("--store", "s", "verify").code == 0


def test_an_adapter_is_not_written_into_a_store(run: Run, own: Path) -> None:
    before = contents(own / "s" / "adapters")
    result = run("--store", "s", "adapter", "export", "docs", "-o", "s/adapters/mine", "--epochs", 1)
    assert (result.code, "lies in the store" in result.err) == (2, True)
    assert contents(own / "s" / "adapters") == before


def test_the_demo_is_not_run_in_a_store(run: Run, own: Path) -> None:
    result = run("demo", "--dir", "s/segments/demo")
    assert (result.code, "lies in the store" in result.err) == (2, True)
    assert not (own / "s" / "segments" / "demo").exists()


def test_a_lost_catalog_leaves_a_store(own: Path) -> None:
    (own / "s" / "catalog.duckdb").unlink()
    with repmatch.open(own / "s") as store, pytest.raises(UsageError, match="lies in the store"):
        check_destination(own / "s" / "catalog.duckdb", store)


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_rows_that_were_read_are_not_written_over(
    run: Run, own: Path, monkeypatch: pytest.MonkeyPatch, force: tuple[str, ...]
) -> None:
    before = (own / "a.jsonl").read_bytes()
    (own / "link.jsonl").symlink_to("a.jsonl")
    os.link(own / "a.jsonl", own / "hard.jsonl")
    (own / "elsewhere" / "deep").mkdir(parents=True)
    monkeypatch.chdir(own / "elsewhere" / "deep")
    for name in ("a.jsonl", "link.jsonl", "hard.jsonl"):
        for command in (("export", "core"), ("report", "docs", "--layout", "pca")):
            result = run("--store", "../../s", *command, "-o", f"../../{name}", *force)
            assert (result.code, "that rows of the store were read from" in result.err) == (2, True), result.err
    assert (own / "a.jsonl").read_bytes() == before


def test_a_name_counts_from_where_it_was_read(run: Run, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own / "elsewhere").mkdir()
    monkeypatch.chdir(own / "elsewhere")
    for _ in range(2):  # the same relative name, another file
        assert run("--store", "../s", "export", "core", "-o", "a.jsonl").code == 0
    with repmatch.open(own / "s", mode="r") as store:
        assert source_files(store) == {own / "a.jsonl"}


def test_sources_of_a_store_that_did_not_note_the_folder(run: Run, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repmatch.curator.ingest.working_folder", dict)
    write_rows(own / "b.jsonl", toy_rows(24))
    assert run("--store", "s", "ingest", "b.jsonl", "--dataset", "docs").code == 0
    (own / "elsewhere").mkdir()
    monkeypatch.chdir(own / "elsewhere")
    assert run("--store", "../s", "export", "core", "-o", "../b.jsonl", "--force").code == 2


def test_an_export_again_is_no_question(run: Run, own: Path) -> None:
    asked = ("--store", "s", "export", "core", "-o", "core.jsonl")
    assert run(*asked).code == 0
    assert run(*asked, "--with-scores").code == 0
    assert run("--store", "s", "export", "docs", "-o", "core.jsonl").code == 0
    assert len((own / "core.jsonl").read_text().splitlines()) == 20


@pytest.mark.parametrize("name", ["README.md", "notes.jsonl"])
def test_a_file_of_somebody_elses_is_replaced_by_force_alone(run: Run, own: Path, name: str) -> None:
    (own / name).write_text("mine\n")
    asked = ("--store", "s", "export", "core", "-o", name)
    for more in ((), ("--dry-run",)):
        result = run(*asked, *more)
        assert (result.code, "is there already" in result.err, "--force" in result.err) == (2, True, True)
    assert (own / name).read_text() == "mine\n"
    assert not (own / f"{name}.manifest.json").exists()
    assert run(*asked, "--force").code == 0
    assert len((own / name).read_text().splitlines()) == 3
    assert run(*asked).code == 0


@pytest.mark.parametrize("name", ["core.parquet", "core.CSV", "core.tsv", "core.jsonl.gz"])
def test_json_lines_have_no_other_formats_name(run: Run, own: Path, name: str) -> None:
    for more in ((), ("--dry-run",), ("--force",)):
        result = run("--store", "s", "export", "core", "-o", name, *more)
        assert (result.code, "JSON lines are written; expected a name such as core.jsonl." in result.err) == (2, True)
    assert not [*own.glob("core*")]
    for usual in ("core.json", "core.ndjson", "core"):
        assert run("--store", "s", "export", "core", "-o", usual).code == 0


def test_an_export_that_was_changed_since_is_the_users(run: Run, own: Path) -> None:
    asked = ("--store", "s", "export", "core", "-o", "core.jsonl")
    assert run(*asked).code == 0
    with (own / "core.jsonl").open("a") as file:
        file.write('{"text": "one more by hand"}\n')
    changed = (own / "core.jsonl").read_bytes()
    assert run(*asked).code == 2
    assert (own / "core.jsonl").read_bytes() == changed
    assert run(*asked, "--force").code == 0


KILLED = """
import os, pathlib, signal, sys
from repmatch.cli import main
left, replace = int(sys.argv[1]), pathlib.Path.replace
def renamed(part, target):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(part, target)
pathlib.Path.replace = renamed
main(sys.argv[2:])
"""


@pytest.mark.parametrize("earlier", [None, "export", "mine"])
@pytest.mark.parametrize("renames", [0, 1, 2])
def test_an_export_that_was_killed_is_made_again_without_force(
    run: Run, own: Path, earlier: str | None, renames: int
) -> None:
    asked = ("--store", "s", "export", "core", "-o", "core.jsonl")
    if earlier == "export":
        assert run("--store", "s", "export", "docs", "-o", "core.jsonl").code == 0
    elif earlier == "mine":
        (own / "core.jsonl").write_text("mine\n")
    before = (own / "core.jsonl").read_bytes() if earlier else None
    more = ("--force",) if earlier == "mine" else ()
    command = [sys.executable, "-c", KILLED, str(renames), *asked, "--card", *more]
    assert subprocess.run(command, capture_output=True, timeout=100, check=False).returncode == -signal.SIGKILL
    there = (own / "core.jsonl").read_bytes() if (own / "core.jsonl").exists() else None
    assert (there == before) == (renames < 2)
    again = run(*asked, "--card")
    if earlier == "mine" and renames < 2:  # what is the user's stays so until it is replaced
        assert (again.code, (own / "core.jsonl").read_bytes()) == (2, before)
        return
    assert again.code == 0, again.err
    described = json.loads((own / "core.jsonl.manifest.json").read_text())["file"]
    assert described["sha256"] == hashlib.sha256((own / "core.jsonl").read_bytes()).hexdigest()
    assert described.get("replaces") == (
        hashlib.sha256(before).hexdigest() if before and earlier == "export" and renames < 2 else None
    )
    with (own / "core.jsonl").open("a") as file:
        file.write("{}\n")
    assert run(*asked).code == 2


@pytest.mark.parametrize("text", ["{}", "[1]", "no json", '{"format": "repmatch-manifest-1", "file": 3}'])
def test_a_manifest_of_somebody_elses_is_kept(run: Run, own: Path, text: str) -> None:
    (own / "core.jsonl.manifest.json").write_text(text)
    asked = ("--store", "s", "export", "core", "-o", "core.jsonl")
    result = run(*asked)
    assert (result.code, "core.jsonl.manifest.json is there already" in result.err) == (2, True)
    assert not (own / "core.jsonl").exists()
    assert (own / "core.jsonl.manifest.json").read_text() == text
    assert run(*asked, "--force").code == 0


def test_a_card_that_is_a_source_or_in_the_way(run: Run, own: Path) -> None:
    asked = ("--store", "s", "export", "core", "--card", "-o")
    result = run(*asked, "README.md")
    assert (result.code, "where the card goes" in result.err) == (2, True)
    (own / "README.md").write_text("mine\n")
    result = run(*asked, "core.jsonl", "--force")
    assert (result.code, "is no card of repmatch" in result.err) == (2, True)
    assert (own / "README.md").read_text() == "mine\n"
    assert not (own / "core.jsonl").exists()


def test_a_report_is_told_by_its_mark(run: Run, own: Path) -> None:
    pytest.importorskip("plotly")
    (own / "page.html").write_text("<p>mine</p>")
    asked = ("--store", "s", "report", "docs", "--layout", "pca", "-o", "page.html")
    result = run(*asked)
    assert (result.code, "--force" in result.err) == (2, True)
    assert (own / "page.html").read_text() == "<p>mine</p>"
    assert run(*asked, "--force").code == 0
    assert MARK in (own / "page.html").read_text()
    assert run(*asked).code == 0


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_plot_is_told_by_its_mark(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    from repmatch.curator.evaluate.plot import plot
    from repmatch.curator.evaluate.results import Evaluation, Trial, summarise

    trials = [Trial(name, size, 0, ("x",), accuracy=0.5) for name in ("a", "random") for size in (5, 9)]
    found = Evaluation("d", tuple(summarise(trials, ["a", "random"])), 9, (), (), (), 0)
    path = tmp_path / f"curves.{ending}"
    path.write_text("mine")
    with pytest.raises(UsageError, match="is there already"):
        plot(found, path)
    assert path.read_text() == "mine"
    plot(found, path, force=True)
    first = path.read_bytes()
    plot(found, path)
    assert len(first) > 1000
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(UsageError, match="there is no folder"):
        plot(found, tmp_path / "none" / f"curves.{ending}")


def test_a_plot_is_refused_before_anything_is_trained(run: Run, own: Path) -> None:
    pytest.importorskip("matplotlib")
    (own / "curves.png").write_text("mine")
    asked = ("--store", "s", "evaluate", "docs", "--test", "none.jsonl", "--plot")
    for path, message in (("curves.png", "--force"), ("s/curves.png", "lies in the store"), ("x/c.png", "no folder")):
        result = run(*asked, path)
        assert (result.code, message in result.err) == (2, True), result.err
    assert (own / "curves.png").read_text() == "mine"


def test_python_has_the_same_protection(own: Path) -> None:
    (own / "mine.html").write_text("mine")
    before = (own / "a.jsonl").read_bytes()
    with repmatch.open("s") as store:
        curator = repmatch.Curator(store)
        coreset = curator.select("docs", k=3, name="again")
        for path in ("a.jsonl", "s/catalog.duckdb"):
            for write in (
                lambda path: curator.export("core", path, force=True),
                lambda path: coreset.export(path, force=True),
                lambda path: curator.report(path, "docs", force=True),
            ):
                with pytest.raises(UsageError):
                    write(path)
        for write in (
            lambda: curator.export("core", "mine.html"),
            lambda: coreset.export("mine.html"),
            lambda: curator.report("mine.html", "docs"),
        ):
            with pytest.raises(UsageError, match="--force"):
                write()
        assert (own / "mine.html").read_text() == "mine"
        curator.export("core", "mine.html", force=True)
        coreset.export("mine.html")
    assert (own / "a.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["x\udcff.jsonl", "a" * 300, "a" * 246])
def test_a_name_that_cannot_be_written_leaves_nothing(own: Path, name: str) -> None:
    before = contents(own)
    with repmatch.open("s") as store, pytest.raises(UsageError, match=r"choose another (name|place)"):
        repmatch.Curator(store).export("core", name)
    assert contents(own).keys() == before.keys()


def test_devices_and_pipes_stay_what_they_are(run: Run, own: Path) -> None:
    os.mkfifo(own / "pipe")
    for path in ("/dev/null", "pipe"):
        for more in ((), ("--force",)):
            result = run("--store", "s", "export", "core", "-o", path, *more)
            assert (result.code, "is a pipe or a device" in result.err) == (2, True), result.err
    assert not Path("/dev/null").is_file()
    assert (own / "pipe").is_fifo()


def test_a_folder_with_more_than_an_adapter_is_not_replaced(run: Run, own: Path) -> None:
    asked = ("--store", "s", "adapter", "export", "docs", "-o", "lora", "--epochs", 1, "--replace")
    assert run(*asked).code == 0
    assert run(*asked).code == 0
    (own / "lora" / "notes.txt").write_text("mine")
    result = run(*asked)
    assert (result.code, "is there already" in result.err) == (2, True)
    assert (own / "lora" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("count", [2_000, 2_000_000])  # found out when the buffer is flushed, and while writing
def test_a_full_disk_leaves_no_part(tmp_path: Path, count: int) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("as it was")
    with files_of_at_most(1024), pytest.raises(OSError, match="too large"), whole_file(path) as write:
        write(b"x" * count)
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
    assert path.read_text() == "as it was"


def test_a_failure_of_the_writer_leaves_no_part(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "out") as write:
        write(b"x")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_an_export_onto_a_full_disk_says_so(own: Path) -> None:
    before = contents(own).keys()
    with repmatch.open("s", mode="r") as store:
        with files_of_at_most(1024), pytest.raises(RepMatchError, match="cannot be written: File too large"):
            repmatch.Curator(store).export("docs", "out.jsonl")
    assert contents(own).keys() == before
