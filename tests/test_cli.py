from __future__ import annotations

import json
import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from conftest import Run, toy_rows, write_rows

import repmatch
from repmatch.cli import cli


def test_ingest_reports_and_does_nothing_the_second_time(
    run: Run, tmp_path: Path, tiny_model: Path, toy_file: Path
) -> None:
    store = tmp_path / "store"
    first = run("--store", store, "ingest", toy_file, "--dataset", "toy", "--model", tiny_model, "--json")
    assert first.code == 0
    (report,) = first.objects
    counts = {"dataset", "rows", "new", "unchanged", "changed", "quarantined", "seconds"}
    assert set(report) == counts | {"device", "precision", "agreement", "sign_error"}
    assert (report["rows"], report["new"], report["quarantined"]) == (60, 60, 0)
    second = run("--store", store, "ingest", toy_file, "--dataset", "toy", "--json")
    assert (second.objects[0]["new"], second.objects[0]["unchanged"]) == (0, 60)


def test_a_command_leaves_the_log_as_it_was(run: Run, tmp_path: Path) -> None:
    before = list(logging.getLogger("repmatch").handlers)
    assert run("--store", tmp_path / "none", "export", "nothing").code != 0
    assert run("--help").code == 0
    assert logging.getLogger("repmatch").handlers == before
    logging.getLogger("repmatch.store").warning("after the command's streams are closed")


def test_score_prints_every_instance_best_first(run: Run, toy_store: Path) -> None:
    result = run("--store", toy_store, "score", "toy", "--epochs", 1, "--json")
    rows = result.objects
    assert result.code == 0
    assert {row["id"] for row in rows} == {row["id"] for row in toy_rows()}
    scores = [float(str(row["score"])) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    assert set(rows[0]) == {"id", "score"}


def test_score_reuses_the_adapter_and_says_chance(run: Run, toy_store: Path) -> None:
    run("--store", toy_store, "score", "toy", "--epochs", 1)
    result = run("--store", toy_store, "score", "toy", "--epochs", 1)
    with repmatch.open(toy_store, mode="r") as store:
        assert len(store.adapters()) == 1
    assert "unrelated directions would score 0.0312" in result.out  # 1 / 32, the tiny model's d_out
    assert "adapter: 2 steps on 60 instances" in result.err


def test_score_against_a_filter_trains_on_the_matching_rows(run: Run, toy_store: Path) -> None:
    result = run("--store", toy_store, "score", "toy", "--where", "stars > 2 AND \"group\" = 'c'", "--epochs", 1)
    expected = sum(int(str(row["stars"])) > 2 and row["group"] == "c" for row in toy_rows())
    assert f"on {expected} instances" in result.err
    assert result.out.startswith("60 instances of toy against toy[stars > 2")


def test_compare_is_symmetric_and_one_on_itself(run: Run, toy_store: Path) -> None:
    names = ("toy", "toy[label = 'yes']", "toy[label = 'no']")
    (found,) = run("--store", toy_store, "compare", *names, "--epochs", 2, "--json").objects
    assert found["names"] == list(names)
    scores = found["scores"]
    assert isinstance(scores, list)
    for i in range(3):
        assert scores[i][i] == pytest.approx(1.0)
        assert scores[i] == pytest.approx([row[i] for row in scores])
    layers = found["layers"]
    assert isinstance(layers, dict)
    assert len(layers) == 4
    assert scores[0][1] == pytest.approx(sum(layer[0][1] for layer in layers.values()) / 4, abs=1e-5)
    assert found["chance"] == pytest.approx(1 / 32)


def test_nearest_by_id_and_by_the_same_text_agree(run: Run, toy_store: Path) -> None:
    row = toy_rows()[4]
    by_id = run("--store", toy_store, "nearest", "toy", row["id"], "-k", 5, "--json").objects
    by_text = run(
        *("--store", toy_store, "nearest", "toy", "--text", row["text"], "--label", row["label"], "-k", 6, "--json")
    ).objects
    assert by_text[0]["id"] == row["id"]
    assert float(str(by_text[0]["score"])) == pytest.approx(1.0, abs=1e-3)
    assert [found["id"] for found in by_text[1:]] == [found["id"] for found in by_id]
    assert [found["rank"] for found in by_id] == [1, 2, 3, 4, 5]


def test_nearest_signed_tells_labels_apart(run: Run, toy_store: Path) -> None:
    # With two labels the gradients of one text under either label are opposite: unsigned alike, signed not.
    row = toy_rows()[4]
    other = "yes" if row["label"] == "no" else "no"
    asked = ("--store", toy_store, "nearest", "toy", "--text", row["text"], "--label", other, "-k", 60, "--json")
    unsigned = {str(found["id"]): float(str(found["score"])) for found in run(*asked).objects}
    signed = {str(found["id"]): float(str(found["score"])) for found in run(*asked, "--signed").objects}
    assert unsigned[str(row["id"])] == pytest.approx(1.0, abs=2e-2)
    assert signed[str(row["id"])] == pytest.approx(-1.0, abs=2e-2)


def test_nearest_without_a_label_takes_the_best_label(run: Run, toy_store: Path) -> None:
    text = toy_rows()[4]["text"]
    found = run("--store", toy_store, "nearest", "toy", "--text", text, "-k", 1, "--json").objects
    assert found[0]["id"] == "toy-4"


def test_the_help_lists_every_strategy(run: Run) -> None:
    from repmatch.selectors import strategies

    help_text = run("select", "--help").out
    built_in = [name for name, entry in strategies().items() if (entry.solve.__module__ or "").startswith("repmatch.")]
    assert len(built_in) >= 3
    for name in built_in:
        assert f"  {name} " in help_text


@pytest.mark.parametrize(
    "strategy",
    [
        *("facility-location", "k-medoids", "graph-cut", "saturated-coverage", "herding", "k-center", "dpp"),
        *("top", "random"),
    ],
)
def test_select_keeps_a_balanced_coreset(run: Run, toy_store: Path, strategy: str) -> None:
    result = run(
        *("--store", toy_store, "select", "toy", "-k", 9, "--strategy", strategy),
        *("--balance", "group", "--name", "core", "--json"),
    )
    assert result.code == 0
    ids = [str(row["id"]) for row in result.objects]
    assert len(set(ids)) == 9
    groups = {str(row["id"]): row["group"] for row in toy_rows()}
    assert sorted(str(groups[i]) for i in ids) == list("aaabbbccc")
    with repmatch.open(toy_store, mode="r") as store:
        kept = store.coreset("core")
    assert list(kept.ids) == ids
    assert len(kept.all_ids) == 60
    for position, pick in enumerate(kept.ids):  # every pick stands for itself
        assert kept.representative[kept.all_ids.index(pick)] == position


def test_select_stratified_by_percentage_keeps_proportions(run: Run, toy_store: Path) -> None:
    result = run("--store", toy_store, "select", "toy", "-k", "20%", "--stratify", "group", "--json")
    groups = {str(row["id"]): row["group"] for row in toy_rows()}
    assert sorted(str(groups[str(row["id"])]) for row in result.objects) == list("aabbbbcccccc")


def test_select_refuses_to_replace_a_named_coreset(run: Run, toy_store: Path) -> None:
    asked = ("--store", toy_store, "select", "toy", "-k", 3, "--strategy", "random", "--name", "core")
    assert run(*asked).code == 0
    again = run(*asked, "--seed", 1)
    assert again.code == 2
    assert "--replace" in again.err
    assert run(*asked, "--seed", 1, "--replace").code == 0


def test_export_of_everything_equals_the_input(run: Run, toy_store: Path, toy_file: Path) -> None:
    result = run("--store", toy_store, "export", "toy")
    assert (result.code, result.err) == (0, "")
    assert result.out == toy_file.read_text()


def test_export_writes_picks_in_order_and_a_manifest(run: Run, toy_store: Path, tmp_path: Path) -> None:
    picks = run("--store", toy_store, "select", "toy", "-k", 4, "--name", "core", "--json").objects
    target = tmp_path / "core.jsonl"
    result = run("--store", toy_store, "export", "core", "-o", target, "--with-scores")
    assert (result.code, result.out) == (0, "")
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["id"] for row in rows] == [pick["id"] for pick in picks]
    originals = {str(row["id"]): row for row in toy_rows()}
    for rank, row in enumerate(rows, start=1):
        extra = row.pop("repmatch")
        assert row == originals[row["id"]]
        assert extra["rank"] == rank
        assert extra["gain"] == pytest.approx(picks[rank - 1]["gain"])
    manifest = json.loads((tmp_path / "core.jsonl.manifest.json").read_text())
    assert manifest["selection"]["strategy"] == "facility-location"
    assert manifest["selection"]["command"].startswith("repmatch select toy -k 4")
    assert len(manifest["space"]["model_fingerprint"]) == 64
    assert manifest["file"]["rows"] == 4


def test_info_without_a_store(run: Run, tmp_path: Path) -> None:
    result = run("--store", tmp_path / "none", "info", "--json")
    assert result.code == 0
    assert result.objects[0]["store"] is None
    assert not (tmp_path / "none").exists()


def test_info_shows_datasets(run: Run, toy_store: Path) -> None:
    (found,) = run("--store", toy_store, "info", "--json").objects
    store = found["store"]
    assert isinstance(store, dict)
    assert [(d["name"], d["rows"], d["factors"]) for d in store["datasets"]] == [("toy", 60, 60)]
    assert "toy" in run("--store", toy_store, "info").out


BAD = [
    (("score", "nope"), 1, "there is no dataset 'nope'; known: 'toy'"),
    (("nearest", "toy", "toy-999"), 1, "there is no instance 'toy-999'"),
    (("nearest", "toy"), 2, "give the id of an instance, or a text"),
    (("nearest", "toy", "--text", " "), 2, "the text is empty"),
    (("nearest", "toy", "--text", "good", "--label", "maybe"), 1, "there is no label 'maybe'; known: 'no', 'yes'"),
    (("nearest", "toy", "--text", "good", "--text-pair", "bad"), 2, "are single texts"),
    (("select", "toy", "-k", "0"), 2, "-k 0 is out of range"),
    (("select", "toy", "-k", "61"), 2, "the dataset has 60 instances"),
    (("select", "toy", "-k", "many"), 2, "expected a number of picks such as 100, or a share such as 5%"),
    (("select", "toy", "-k", "101%"), 2, "expected a share above 0% and up to 100%"),
    (("select", "toy", "-k", "3", "--strategy", "best"), 2, "there is no strategy 'best'"),
    (("select", "toy", "-k", "3", "--balance", "size"), 1, "there is no column 'size'"),
    (("select", "toy", "-k", "3", "--balance", "group", "--stratify", "label"), 2, "give one of them"),
    (("select", "toy", "-k", "3", "--name", "a/b"), 2, "is no usable name"),
    (("select", "toy", "-k", "3", "--name", "toy"), 2, "'toy' is a dataset already"),
    (("compare", "toy"), 2, "compare takes two or more names, not 1"),
    (("compare", "toy", "toy[label ="), 1, "there is no dataset, subset or coreset"),
    (("compare", "toy", "toy[stars > ]"), 2, "is not one SQL expression"),
    (("compare", "toy", "toy[stars > 9]"), 1, "has no instances"),
    (("score", "toy", "--where", "1=1) UNION SELECT 1 --"), 2, "is not one SQL expression"),
    (("export", "core"), 1, "there is no dataset, subset or coreset 'core'"),
    (("export", "toy", "-o", "/nowhere/at/all.jsonl"), 2, "there is no folder /nowhere/at"),
    (("ingest", "missing.jsonl", "--dataset", "toy"), 2, "there is no file 'missing.jsonl'"),
    (("ingest", "missing.jsonl", "--dataset", "-x"), 2, "is no usable name"),
    (("nearest", "toy", "--text", "good", "--device", "tpu"), 2, "the device 'tpu' is unknown"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), BAD)
def test_bad_arguments_get_a_message_and_an_exit_code(
    run: Run, toy_store: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = run("--store", toy_store, *arguments)
    assert message in result.err
    assert result.code == code
    assert result.out == ""
    assert "Traceback" not in result.err


def test_good_rows_are_kept_and_bad_ones_listed(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", toy_rows(10))
    bad = ["not json", '{"id": "u", "label": "no"}', '{"id": "v", "text": " ", "label": "no"}']
    bad.append('{"id": "toy-0", "text": "another text", "label": "no"}')
    bad.append(json.dumps({"id": "w", "text": "x" * 1_000_000, "label": "no"}))
    rows.write_text(rows.read_text() + "".join(line + "\n" for line in bad))
    store = tmp_path / "store"
    strict = run("--store", store, "ingest", rows, "--dataset", "d", "--model", tiny_model, "--strict")
    assert strict.code == 1
    assert "5 of 15 rows are bad" in strict.err
    assert "no datasets" not in run("--store", store, "info").out
    kept = run("--store", store, "ingest", rows, "--dataset", "d", "--model", tiny_model, "--json")
    assert kept.code == 1
    assert (kept.objects[0]["new"], kept.objects[0]["quarantined"]) == (10, 5)
    for line, reason in ((11, "not JSON"), (12, "no column 'text'"), (13, "empty"), (14, "toy-0"), (15, "1,000,000")):
        assert re.search(rf"rows\.jsonl:{line}: .*{re.escape(reason)}", kept.err), reason
    more = write_rows(tmp_path / "more.jsonl", [{"id": "n", "text": "good film", "label": "perhaps"}])
    unseen = run("--store", store, "ingest", more, "--dataset", "d")
    assert unseen.code == 1
    assert "the label 'perhaps' was not seen" in unseen.err


def test_datasets_of_different_spaces_are_not_compared(
    run: Run, toy_store: Path, toy_file: Path, tiny_model: Path
) -> None:
    run("--store", toy_store, "ingest", toy_file, "--dataset", "two", "--model", tiny_model, "--rank", 2, "--seed", 5)
    for command in (("compare", "toy", "two"), ("score", "toy", "--against", "two")):
        result = run("--store", toy_store, *command)
        assert result.code == 1
        assert "different spaces" in result.err
        assert "rank: 1 against 2; seed: 0 against 5" in result.err


def test_a_model_that_moved_and_changed_is_refused(run: Run, toy_store: Path, tmp_path: Path) -> None:
    from tiny_models import checkpoint

    other = checkpoint(tmp_path / "other", seed=1)
    result = run("--store", toy_store, "score", "toy", "--model", other)
    assert result.code == 1
    assert "is not the one this space was made with" in result.err
    assert "model_fingerprint" in result.err


def test_a_store_that_is_no_database(run: Run, toy_store: Path) -> None:
    (toy_store / "catalog.duckdb").write_bytes(b"this is no database, but it is long enough to look like one" * 100)
    result = run("--store", toy_store, "info")
    assert result.code == 1
    assert "catalog.duckdb" in result.err
    assert "Traceback" not in result.err


def test_a_folder_that_is_no_store_is_not_touched(run: Run, tmp_path: Path, toy_file: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "precious.txt").write_text("keep me")
    result = run("--store", folder, "ingest", toy_file, "--dataset", "toy")
    assert result.code == 1
    assert "is no store" in result.err
    assert sorted(path.name for path in folder.iterdir()) == ["precious.txt"]


def test_a_locked_store_names_the_writer(run: Run, toy_store: Path, toy_file: Path) -> None:
    script = (
        "import sys, repmatch; s = repmatch.open(sys.argv[1], mode='w'); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(toy_store)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        result = run("--store", toy_store, "ingest", toy_file, "--dataset", "toy")
        assert result.code == 1
        assert str(holder.pid) in result.err
        assert run("--store", toy_store, "nearest", "toy", "toy-1").code == 0  # readers go on
        holder.communicate("")


LIGHT = [
    ("--help",),
    ("--version",),
    ("info",),
    ("nearest", "toy", "toy-1"),
    ("inspect", "toy", "toy-1"),
    ("sql", "SELECT count(*) FROM instances"),
    ("export", "toy"),
    ("select", "toy", "-k", "3", "--strategy", "random"),
]


@pytest.mark.parametrize("arguments", LIGHT)
def test_light_commands_do_not_load_torch(toy_store: Path, arguments: tuple[str, ...]) -> None:
    script = (
        "import sys\nfrom repmatch.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as left:\n    code = left.code\n"
        "heavy = sorted({'torch', 'transformers', 'peft'} & set(sys.modules))\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--store", str(toy_store), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def every_command() -> list[str]:
    return sorted(cli.commands)


def test_the_commands_are_the_contract() -> None:
    contract = {"ingest", "score", "compare", "nearest", "select", "export", "info", "demo"}
    assert contract <= set(every_command())


@pytest.mark.parametrize("name", every_command())
def test_every_help_has_a_sentence_and_an_example(name: str) -> None:
    command = cli.commands[name]
    text = command.get_help(click.Context(command, info_name=f"repmatch {name}"))
    assert "Example:\n" in text
    assert f"repmatch {name}" in text.split("Example:")[1]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
    # Paragraphs begin at one margin and are filled: no indentation of the source shows in them.
    description = text.split("Options:")[0].split("Example:")[0]
    blocks = [block for block in description.split("\n\n")[1:] if block.strip()]
    for block in (b for b in blocks if not b.strip().splitlines()[0].endswith(":")):  # lists keep their own columns
        assert not re.search(r"\S {2,}\S|^ {3,}\S", block, re.MULTILINE), block


def test_readers_that_leave_are_no_failure_with_a_traceback(toy_store: Path) -> None:
    command = f"{sys.executable} -m repmatch --store {toy_store} export toy | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["id"] == "toy-0"
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_it_does_not_run_by_path() -> None:
    main = Path(repmatch.__file__).parent / "__main__.py"
    done = subprocess.run([sys.executable, str(main)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "python -m repmatch" in done.stderr


NO_TEXT = "caf\udce9"
NOT_UTF8 = [
    (("nearest", "toy", "--text", NO_TEXT), "argument 6 after --text"),
    (("report", f"--title={NO_TEXT}"), "argument 4"),
    (("export", "toy", "-o", f"{NO_TEXT}.jsonl"), "argument 6 after -o"),
    (("merge", NO_TEXT, "x"), "argument 4"),
    (("--store", NO_TEXT, "info"), "argument 4 after --store"),
    ((NO_TEXT,), "argument 3"),
]


@pytest.mark.parametrize(("arguments", "named"), NOT_UTF8)
def test_arguments_that_are_not_utf8_are_named(
    run: Run, toy_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    result = run("--store", toy_store, *arguments)
    assert (result.code, result.out) == (2, "")
    assert re.search(rf"^error: {named} is not UTF-8 at character \d+: '.*caf\\xe9", result.err), result.err
    assert sorted(tmp_path.iterdir()) == before


def test_variables_that_are_not_utf8_are_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPMATCH_STORE", NO_TEXT)
    result = run("info")
    assert (result.code, "the variable REPMATCH_STORE is not UTF-8" in result.err) == (2, True)


def test_paths_that_are_too_long_are_named(run: Run, toy_store: Path, tmp_path: Path) -> None:
    long = "x" * 300
    for arguments in (
        ("--store", long, "info"),
        ("--store", long, "ingest", "a.jsonl", "--dataset", "d"),
        ("--store", toy_store, "merge", tmp_path / long, toy_store),
        ("--store", toy_store, "export", "toy", "-o", tmp_path / long),
        ("--store", toy_store, "adapter", "export", "toy", "-o", tmp_path / long),
        ("demo", "--dir", tmp_path / long),
    ):
        result = run(*arguments)
        assert (result.code, "xxx" in result.err, "too long" in result.err) == (2, True, True), result.err
        assert "defect" not in result.err


CLOSED = [
    ("info --json >&-", 1, "standard output is closed"),
    ("export toy -o out.jsonl >&-", 0, "60 rows in out.jsonl"),
    ("info 2>&-", 0, ""),
    ("nope 2>&-", 2, ""),
    ("ingest - --dataset d <&-", 2, "standard input, which is closed"),
    ("info >/dev/full", 1, "the output cannot be written: the disk is full"),
    ("verify >&- 2>&- <&-", 1, ""),
]


@pytest.mark.parametrize(("line", "code", "message"), CLOSED)
def test_closed_streams_are_no_defects(toy_store: Path, tmp_path: Path, line: str, code: int, message: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m repmatch --store {shlex.quote(str(toy_store))} {line}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr
    assert "defect" not in done.stderr and "Exception" not in done.stderr
    with repmatch.open(toy_store, mode="r") as store:
        assert len(store.ids("toy")) == 60


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    script = (
        "import os\nfrom repmatch.cli import main\n"
        "try:\n    main(['--version'])\nexcept SystemExit:\n    pass\n"
        "print(os.open('x', os.O_CREAT), file=open('number', 'w'))"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(script)} >&- 2>&- <&-"
    subprocess.run(["sh", "-c", command], check=True, cwd=tmp_path)
    assert int((tmp_path / "number").read_text()) > 2
