"""Everything a selection can be asked, from the command line and from Curator.select, on a store."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run, toy_rows, write_rows
from oracle_selectors import coverage
from oracle_similarity import make_factors

import repmatch
from repmatch.cli import cli
from repmatch.curator.select_options import SelectArguments, SelectOptions
from repmatch.errors import UsageError
from repmatch.output import Output
from repmatch.selectors import FactorKernel, facility_location, represent, strategies

ROWS = {str(row["id"]): row for row in toy_rows()}


@pytest.fixture
def ask(run: Run, toy_store: Path) -> Any:
    """Select from the toy dataset; returns the picked ids."""

    def call(*arguments: object, code: int = 0) -> list[str]:
        result = run("--store", toy_store, "select", "toy", *arguments, "--json")
        assert result.code == code, result.err
        return [str(row["id"]) for row in result.objects]

    return call


@pytest.fixture
def dev_store(toy_store: Path, tmp_path: Path) -> Path:
    """The toy store with a second dataset of the same space."""
    rows = [{**row, "id": f"dev-{i}"} for i, row in enumerate(toy_rows(75)[60:])]
    with repmatch.open(toy_store) as store:
        model = store.space(store.dataset("toy").space_id or "").model
        repmatch.Curator(store, model).ingest(write_rows(tmp_path / "dev.jsonl", rows), "dev")
    return toy_store


def counts(ids: list[str], field: str) -> dict[object, int]:
    values = [ROWS[i][field] for i in ids]
    return {value: values.count(value) for value in values}


def test_json_tells_what_each_pick_adds(run: Run, toy_store: Path) -> None:
    rows = run("--store", toy_store, "select", "toy", "-k", 6, "--json").objects
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5, 6]
    gains = [float(str(row["gain"])) for row in rows]
    assert [row["value"] for row in rows] == pytest.approx(np.cumsum(gains).tolist())
    assert sum(int(str(row["represents"])) for row in rows) == 60


def test_the_algorithm_and_its_reason_are_named(run: Run, toy_store: Path) -> None:
    text = run("--store", toy_store, "select", "toy", "-k", 6).out
    assert "found by facility-location, incremental: the whole kernel of 60 × 60 fits in memory" in text
    lazy = run("--store", toy_store, "select", "toy", "-k", 6, "--algorithm", "lazy").out
    assert "found by facility-location, lazy\n" in lazy


def test_quotas(ask: Any) -> None:
    picks = ask("-k", 12, "--at-least", "group=a:4", "--at-most", "group=c:3")
    found = counts(picks, "group")
    assert found["a"] >= 4
    assert found["c"] <= 3
    assert len(picks) == 12


def test_a_coreset_is_extended_in_its_order(ask: Any) -> None:
    first = ask("-k", 5, "--name", "first")
    assert ask("-k", 9, "--include", "first", "--name", "second")[:5] == first
    assert not set(ask("-k", 9, "--exclude", "first")) & set(first)


def test_what_a_set_does_not_represent(ask: Any) -> None:
    first = ask("-k", 5, "--name", "first")
    more = ask("-k", 4, "--given", "first")
    assert first + more == ask("-k", 9)  # greedy goes on where it ended


@pytest.mark.parametrize(
    "wrong", [("--strategy", "herdin"), ("--kernel", "gradient"), ("--strategy", "top", "--algorithm", "lasy")]
)
def test_a_name_that_no_option_takes_is_wrong_usage(wrong: tuple[str, ...], run: Any, toy_store: Path) -> None:
    result = run("--store", toy_store, "select", "toy", "-k", 3, *wrong)
    assert result.code == 2
    assert repr(wrong[-1]) in result.err


def test_budgets_in_tokens_and_in_a_column(ask: Any, toy_store: Path) -> None:
    with repmatch.open(toy_store, mode="r") as store:
        frame = store.sql("SELECT id, tokens FROM instances")
    tokens = dict(zip(frame["id"], frame["tokens"], strict=True))
    picks = ask("--budget", 70)
    assert 60 < sum(tokens[i] for i in picks) <= 70
    assert ask("-k", 2, "--budget", 70) != []
    stars = ask("--budget", 9, "--cost", "stars", "--exclude", "toy[stars = 0]", code=1)
    assert stars == []


def test_a_cost_that_is_no_number_names_the_row(run: Run, toy_store: Path) -> None:
    result = run("--store", toy_store, "select", "toy[stars > 0]", "--budget", 9, "--cost", "stars", "--json")
    assert sum(int(str(ROWS[str(row["id"])]["stars"])) for row in result.objects) <= 9
    result = run("--store", toy_store, "select", "toy", "--budget", 9, "--cost", "text")
    assert result.code == 1
    assert "'text' can't be a cost" in result.err
    assert "'toy-0'" in result.err


def test_stops_and_spacing(ask: Any, run: Run, toy_store: Path) -> None:
    whole = ask("-k", 60)
    assert ask("--coverage", 0.6) == whole[: len(ask("--coverage", 0.6))]
    assert len(ask("--min-gain", 1.0)) < 10
    apart = run("--store", toy_store, "select", "toy", "-k", 40, "--apart", 0.35)
    assert "picks: every other instance is more similar than 0.35" in apart.err
    thin = ask("-k", 5, "--strategy", "thin", "--apart", 0.4)
    assert thin[0] == "toy-0"


def test_layers_sign_and_parameters_change_the_picks(ask: Any, toy_store: Path) -> None:
    usual = ask("-k", 8)
    assert ask("-k", 8, "--matrices", "*.value") != usual
    assert ask("-k", 8, "--signed") != usual
    cut = ask("-k", 8, "--strategy", "graph-cut")
    assert ask("-k", 8, "--strategy", "graph-cut", "--param", "trade=0.5") != cut
    assert ask("-k", 8, "--mix", "facility-location=1", "--mix", "graph-cut=0") == usual
    drawn = ask("-k", 8, "--strategy", "random", "--stratify", "group", "--seed", 3)
    assert counts(drawn, "group") == {"a": 1, "b": 3, "c": 4}


def test_a_part_of_a_dataset(run: Run, toy_store: Path) -> None:
    picks = run("--store", toy_store, "select", "toy[stars > 2]", "-k", 5, "--name", "few", "--json").objects
    assert {ROWS[str(row["id"])]["stars"] for row in picks} <= {3, 4}
    with repmatch.open(toy_store, mode="r") as store:
        kept = store.coreset("few")
    assert kept.dataset == "toy"
    assert len(kept.all_ids) == 24
    assert kept.arguments["source"] == "toy[stars > 2]"


def test_another_dataset_is_represented(run: Run, dev_store: Path) -> None:
    picks = run("--store", dev_store, "select", "toy", "-k", 4, "--represent", "dev", "--name", "c", "--json").objects
    with repmatch.open(dev_store, mode="r") as store:
        toy, dev, kept = store.factors("toy"), store.factors("dev"), store.coreset("c")
    expected = facility_location(toy, 4, represented=dev)
    assert [row["id"] for row in picks] == [toy.ids[i] for i in expected.indices]
    assert len(kept.representative) == 60
    assert np.array_equal(kept.representative, represent(FactorKernel(toy), expected.indices, 60)[0])
    refused = run("--store", dev_store, "select", "toy", "-k", 4, "--represent", "dev", "--strategy", "dpp")
    assert "dpp compares the dataset with itself" in refused.err


def test_what_another_dataset_covers_already(run: Run, dev_store: Path) -> None:
    rules = ("-k", 4, "--given", "dev", "--balance", "label")
    picks = run("--store", dev_store, "select", "toy", *rules, "--json").objects
    ids = [str(row["id"]) for row in picks]
    assert counts(ids, "label") == {"yes": 2, "no": 2}
    with repmatch.open(dev_store, mode="r") as store:
        toy, dev = store.factors("toy"), store.factors("dev")
    covered = np.asarray(FactorKernel(dev, represented=toy).dense(), np.float64)
    kernel = np.hstack((np.asarray(FactorKernel(toy).dense(), np.float64), covered))
    everyone, before = list(range(60, 75)), coverage(kernel, range(60, 75))
    for row, pick in zip(picks, ids, strict=True):
        everyone.append(toy.ids.index(pick))
        reached = coverage(kernel, everyone)
        assert row["gain"] == pytest.approx(reached - before, abs=1e-4)
        before = reached


def test_the_manifest_repeats_the_selection(run: Run, toy_store: Path, tmp_path: Path) -> None:
    asked = ("-k", 7, "--at-least", "group=a:3", "--apart", 0.9, "--matrices", "*.value", "--seed", 4, "--signed")
    ids = run("--store", toy_store, "select", "toy[stars > 0]", *asked, "--name", "one", "--json").objects
    target = tmp_path / "one.jsonl"
    assert run("--store", toy_store, "export", "one", "-o", target).code == 0
    selection = json.loads(Path(f"{target}.manifest.json").read_text())["selection"]
    assert selection["arguments"]["algorithm"] == "incremental"
    assert 0 < selection["arguments"]["certainty"] <= 1
    words = shlex.split(selection["command"])
    assert words[:3] == ["repmatch", "select", "toy[stars > 0]"]
    again = run("--store", toy_store, *words[1:], "--replace", "--json").objects
    assert again == ids


def test_an_interrupted_selection_is_kept(run: Run, toy_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [row["id"] for row in run("--store", toy_store, "select", "toy", "-k", 20, "--json").objects]

    def stop(self: Output, stage: str, done: int, total: int | None) -> None:
        if done == 7 and stage == "selecting from toy":
            raise KeyboardInterrupt

    monkeypatch.setattr(Output, "progress", stop)
    result = run("--store", toy_store, "select", "toy", "-k", 20, "--name", "part", "--json")
    assert result.code == 130
    assert "interrupted after 7 of 20 picks" in result.err
    assert [row["id"] for row in result.objects] == whole[:7]
    with repmatch.open(toy_store, mode="r") as store:
        kept = store.coreset("part")
    assert list(kept.ids) == whole[:7]
    assert kept.arguments["complete"] is False


@pytest.mark.parametrize("algorithm", ["incremental", "pruned", "sparse"])
def test_an_interruption_while_instances_are_compared(
    run: Run, toy_store: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    command = ("--store", toy_store, "select", "toy", "-k", 20, "--algorithm", algorithm, "--name", "core")
    seen: list[tuple[str, int, int | None]] = []
    with monkeypatch.context() as patched:
        patched.setattr(Output, "progress", lambda self, *told: seen.append(told))
        assert run(*command).code == 0
    assert ("comparing toy", 60, 60) in seen
    assert ("selecting from toy", 20, 20) in seen

    def stop(self: Output, stage: str, done: int, total: int | None) -> None:
        if stage == "comparing toy":
            raise KeyboardInterrupt

    monkeypatch.setattr(Output, "progress", stop)
    early = run(*command, "--replace", "--exclude", "core")
    monkeypatch.undo()
    if algorithm == "pruned":  # its picks before the pass over all pairs are kept
        assert "interrupted after 8 of 20 picks" in early.err
    else:
        assert "core" in run("--store", toy_store, "info").out
    assert early.code == 130
    assert run("--store", toy_store, "verify").code == 0
    assert run(*command, "--replace").code == 0


def test_a_kernel_of_many_blocks_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FactorKernel(make_factors(2500, (64,), 1, "sign"))
    seen: list[tuple[str, int, int]] = []
    kernel.progress = lambda *told: seen.append(told)
    kernel.dense()
    assert seen == [("comparing", 1024, 2500), ("comparing", 2048, 2500), ("comparing", 2500, 2500)]

    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    broken = FactorKernel(kernel.factors)
    broken.progress = stop
    with pytest.raises(KeyboardInterrupt):
        broken.dense()
    broken.progress = None  # nothing half made was kept
    assert np.array_equal(broken.dense(), kernel.dense())  # type: ignore[arg-type]


WRONG = [
    ((), 2, "say how many to pick with -k"),
    (("-k", 3, "--at-least", "group=a"), 2, "is not FIELD=VALUE:N"),
    (("-k", 3, "--at-least", "group=a:1", "--at-most", "label=yes:1"), 2, "speak of one column; got group and label"),
    (("-k", 3, "--at-least", "group=z:1"), 2, "no instance has group 'z'; its values: a, b, c"),
    (("-k", 3, "--at-least", "group=a:9"), 1, "minimums sum to 9"),
    (("-k", 3, "--mix", "x"), 2, "is not NAME=NUMBER"),
    (("-k", 3, "--mix", "magic=1"), 2, "'magic' can't be mixed"),
    (("-k", 3, "--param", "trade=1"), 2, "has no parameter 'trade'"),
    (("-k", 3, "--algorithm", "magic"), 2, "has no algorithm 'magic'"),
    (("-k", 3, "--matrices", "*.nothing"), 2, "no matrix matches '*.nothing'"),
    (("-k", 3, "--include", "nobody"), 1, "there is no dataset, subset or coreset 'nobody'"),
    (("-k", 3, "--coverage", 7), 2, "expected a share from 0 to 1"),
    (("-k", 3, "--represent", "toy", "--strategy", "herding"), 2, "herding represents the whole dataset"),
    (("-k", 3, "--include", "toy[stars = 1]"), 1, "12 instances must be included, more than k = 3"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), WRONG, ids=[w[2][:20] for w in WRONG])
def test_what_can_not_be_meant_is_told(
    run: Run, toy_store: Path, arguments: tuple[object, ...], code: int, message: str
) -> None:
    result = run("--store", toy_store, "select", "toy", *arguments)
    assert (result.code, result.out) == (code, "")
    assert message in result.err


def test_sets_of_other_datasets_can_not_be_picked(run: Run, dev_store: Path) -> None:
    result = run("--store", dev_store, "select", "toy", "-k", 3, "--include", "dev")
    assert result.code == 2
    assert "expected instances of 'toy'" in result.err


def test_python_takes_options_and_keywords(toy_store: Path) -> None:
    assert set(SelectArguments.__annotations__) == {f.name for f in fields(SelectOptions)} - {"k"}
    with repmatch.open(toy_store) as store:
        curator = repmatch.Curator(store)
        options = SelectOptions(strategy="graph-cut", balance="group", name="core")
        chosen = curator.select("toy", 6, options, replace=True, include=["toy-3"], parameters={"trade": 3.0})
        assert chosen.ids[0] == "toy-3"
        assert counts(list(chosen.ids), "group") == {"a": 2, "b": 2, "c": 2}
        assert chosen.coreset.arguments["parameters"] == {"trade": 3.0}
        frame = chosen.represented()
        assert frame.columns == ["id", "pick", "similarity"]
        assert set(frame["pick"]) <= {*chosen.ids, None}
        assert chosen.weights.sum() == frame["pick"].is_not_null().sum()
        with pytest.raises(UsageError, match="names 'nobody', which has no factors"):
            curator.select("toy", 3, include=["nobody"])
        with pytest.raises(UsageError, match="name it with quota_field"):
            curator.select("toy", 3, at_least={"a": 1})


def test_made_up_names_tell_selections_apart() -> None:
    names = {
        SelectOptions(**more).default_name("d")  # type: ignore[arg-type]
        for more in (
            {"k": 5},
            {"k": "5%"},
            {"k": 5, "seed": 1},
            {"k": 5, "balance": "label"},
            {"k": 5, "at_least": {"a": 1}, "quota_field": "x"},
            {"k": 5, "matrices": ["*" * 200]},
            {"k": 5, "matrices": ["*" * 201]},
            {"budget": 2.5},
            {"k": 5, "signed": True},
        )
    }
    assert len(names) == 9
    assert max(map(len, names)) <= 100
    assert "d-facility-location-all-budget-2.5" in names


def test_the_guide_names_every_option_and_its_code_runs() -> None:
    text = (Path(__file__).parent.parent / "docs" / "selection.md").read_text(encoding="utf-8")
    command = cli.commands["select"]
    options = {o for p in command.params for o in p.opts if o.startswith("--")}
    shared = {"--name", "--replace", "--seed", "--model", "--device", "--wait", "--json"}
    others = re.sub(r"^\$ repmatch (?!select ).*$", "", text, flags=re.MULTILINE)
    mentioned = set(re.findall(r"--[a-z][a-z-]+", others))
    assert mentioned - {"--param"} <= options | {"--param"}
    assert options - shared <= mentioned
    for name in strategies():
        if strategies()[name].solve.__module__.startswith("repmatch."):
            assert f"| `{name}`" in text
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "selection.md", "exec"), {})


def test_the_guides_commands_run(run: Run, toy_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "docs" / "selection.md").read_text(encoding="utf-8")
    lines = [line[2:] for line in text.splitlines() if line.startswith("$ repmatch select")]
    printed = [shlex.split(line) for line in lines if "--ensemble" not in line]  # of which the guide makes more stores
    assert len(printed) == 3
    for words in printed:
        told = [w.replace("docs", "toy").replace("label=text", "label=no").replace("'text'", "'no'") for w in words[1:]]
        result = run("--store", toy_store, *told)
        assert result.code == 0, (told, result.err)
