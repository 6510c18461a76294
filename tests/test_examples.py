from __future__ import annotations

import io
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from conftest import Run, toy_rows, write_rows
from tiny_more import causal_checkpoint

import repmatch
from repmatch.cli import cli
from repmatch.output import Output


def examples() -> Iterator[tuple[str, str]]:
    """Every example of every command's help, with the command's name."""

    def walk(name: str, command: click.Command) -> Iterator[tuple[str, str]]:
        text = command.get_help(click.Context(command, info_name=name, max_content_width=400, terminal_width=400))
        for line in text.partition("Example:\n")[2].split("\n\n")[0].splitlines():
            yield name, line.strip()
        if isinstance(command, click.Group):
            for inner, child in command.commands.items():
                yield from walk(f"{name} {inner}", child)

    yield from walk("repmatch", cli)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with the files and names that the examples speak of."""
    folder = tmp_path_factory.mktemp("examples")
    for name, count in (("review", 110), ("tweet", 20)):
        rows = toy_rows(count)
        for i, row in enumerate(rows):
            row |= {"id": f"{name}-{i}", "label": ("negative", "positive")[i % 2]}
        write_rows(folder / f"{name}s.jsonl", rows)
    (folder / "more.jsonl").write_text('{"id": "m", "text": "a good film", "label": "positive"}\n')
    (folder / "pairs.csv").write_text("premise,hypothesis,label\n" + "a film,good film,yes\na plot,bad actor,no\n")
    (folder / "release").mkdir()
    (folder / "path" / "to").mkdir(parents=True)
    held = [{"id": f"h{i}", "text": f"quiet {i} plot", "label": ("negative", "positive")[i % 2]} for i in range(12)]
    write_rows(folder / "held-out.jsonl", held)
    chats = [{"id": f"c{i}", "prompt": "the film was", "completion": ("good", "bad", "dull")[i % 3]} for i in range(9)]
    write_rows(folder / "chats.jsonl", chats)
    causal_checkpoint(folder / "my-llama", "llama")
    with repmatch.open(folder / "repmatch-store") as store:
        curator = repmatch.Curator(store, str(tiny_model))
        for name in ("reviews", "tweets"):
            curator.ingest(folder / f"{name}.jsonl", name)
        for name in ("pool", "dev", "labelled", "questions", "nli", "cold"):
            rows = toy_rows(210 if name == "pool" else 30)
            for row in rows:
                row |= {"heuristic": row["group"], "id": f"{name}-{row['id']}" if name != "cold" else row["id"]}
            write_rows(folder / f"{name}.jsonl", rows)
            curator.ingest(folder / ("reviews.jsonl" if name == "cold" else f"{name}.jsonl"), name)
        repmatch.Curator(store, str(tiny_model), rank=4).ingest(folder / "reviews.jsonl", "reviews-rank-4")
        for name in ("tweets", "nli"):
            again = repmatch.Settings(model=str(tiny_model), seed=1)
            repmatch.Curator(store, settings=again).ingest(folder / f"{name}.jsonl", f"{name}-2")
        curator.select("reviews", 5, name="core")
        curator.score("reviews")
        curator.export_adapter("reviews", folder / "path/to/lora")
        curator.export_adapter("tweets", folder / "path/to/another-lora")
        curator.import_adapter(folder / "path/to/lora", "theirs", dataset="reviews")
    return folder


@pytest.mark.slow
def test_every_example_of_a_help_runs(
    run: Run, workplace: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("REPMATCH_MODEL", str(tiny_model))
    seen = set()
    for name, line in examples():
        if " demo" in line:
            continue  # three minutes; `make demo` runs it
        seen.add(name)
        piped = re.fullmatch(r"cat (\S+) \| (.*)", line)
        if piped:
            source = io.TextIOWrapper(io.BytesIO((workplace / piped[1]).read_bytes()))
            monkeypatch.setattr(sys, "stdin", source)
            line = piped[2]
        line = re.sub(r'^eval "\$\((.*)\)"$', r"\1", line)
        words = shlex.split(re.sub(r" > \S+$", "", line))
        assert words[0] == "repmatch", line
        if "--name" in words and "select" in words:
            words.append("--replace")
        if "delete" in words:
            words.append("--coresets")  # picks of the examples before
        result = run(*words[1:])
        assert result.code == 0, (line, result.err)
    assert seen >= {f"repmatch {name}" for name in cli.commands if name != "demo"}


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("watched", [True, False])
def test_progress_shows_only_where_a_person_watches(watched: bool) -> None:
    err = Screen() if watched else io.StringIO()
    output = Output(out=io.StringIO(), err=err)
    output.progress("ingesting", 5, 10)
    output.progress("ingesting", 10, 10)
    output.close()
    assert ("ingesting" in err.getvalue()) == watched
    assert watched or not err.getvalue()


def test_no_colour_and_no_carriage_returns_in_a_pipe(
    run: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    for words in (("score", "reviews"), ("info",), ("report", "-o", "r.html", "--layout", "pca"), ("nope",)):
        result = run(*words)
        assert not re.search(r"[\x1b\r]", result.out + result.err), words
