from __future__ import annotations

import html.parser
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import chromium
from conftest import Run, toy_rows, write_rows

import repmatch
from repmatch.blocks import take
from repmatch.curator.report.kernel import _nearly_signs, group_similarities, nearest, plane
from repmatch.curator.report.page import page, safe_json
from repmatch.curator.report.points import encode
from repmatch.datamodels import Factors, Layout, Matrix
from repmatch.similarity import kernel_block

pytest.importorskip("plotly", reason="plotly is not installed")

EVIL = [
    "</script><script>window.pwned = 1</script>",
    '<img src=x onerror="window.pwned = 1">',
    '"><svg onload=window.pwned=1>',
    "<b>bold</b> <a href='javascript:window.pwned=1'>link</a>",
    "<!-- <script> ]]> \u2028 line \u2029 end &lt;i&gt;",
]


def factors(n: int, rank: int = 1, encoding: str = "float32", seed: int = 0) -> Factors:
    draw = np.random.default_rng(seed)
    layout = Layout((Matrix("m.0.q", 64, 8), Matrix("m.0.v", 64, 8), Matrix("m.1.q", 128, 8)), rank)
    flat = np.empty((n, layout.width), np.float32)
    for m, d in enumerate(layout.dims):
        lo, hi = layout.offsets[m : m + 2]
        blocks = np.linalg.qr(draw.standard_normal((n, d, rank)))[0]
        flat[:, lo:hi] = blocks.reshape(n, -1)
    ids = tuple(f"i{i}" for i in range(n))
    cores = None if rank == 1 else np.tile(np.eye(rank, dtype=np.float32), (n, 3, 1, 1))
    return Factors(ids, layout, "float32", flat, None, np.ones((n, 3), np.float32), cores, "space")


@pytest.mark.parametrize(("rank", "signs"), [(1, False), (1, True), (2, False)])
def test_nearest_are_the_true_ones(rank: int, signs: bool) -> None:
    given = factors(300, rank)
    if signs:  # as one AdamW step leaves them
        flat = np.sign(given.flat) * np.random.default_rng(1).uniform(0.9, 1.1, (300, 256)).astype(np.float32)
        for m in range(3):
            lo, hi = given.layout.offsets[m : m + 2]
            flat[:, lo:hi] /= np.linalg.norm(flat[:, lo:hi], axis=1, keepdims=True)
        given = Factors(given.ids, given.layout, "float32", flat, None, given.norms, None, "space")
    if rank == 1:
        assert _nearly_signs(given) == signs
    places, scores = nearest(given, 5)
    whole = kernel_block(given, given)
    np.fill_diagonal(whole, -1)
    expected = np.sort(whole, axis=1)[:, ::-1][:, :5]
    np.testing.assert_allclose(scores, expected, atol=2e-6)
    np.testing.assert_allclose(np.take_along_axis(whole, places, 1), scores, atol=2e-6)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_nearest_of_very_few(count: int) -> None:
    places, _ = nearest(factors(count), 5)
    assert places.shape == (count, count - 1)
    assert all(i not in row for i, row in enumerate(places.tolist()))


def test_group_similarities_are_means_over_pairs() -> None:
    given = factors(9)
    groups = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2])
    found = group_similarities(given, groups, 4)
    one = np.asarray(given.flat)[:, :64].astype(float)
    squares = (one @ one.T) ** 2
    assert found[0, 0, 1] == pytest.approx(squares[:3, 3:7].mean(), abs=1e-6)
    assert found[0, 1, 1] == pytest.approx((squares[3:7, 3:7].sum() - 4) / 12, abs=1e-6)
    assert np.isnan(found[0, 3]).all()


@pytest.mark.parametrize("layout", ["pca", "tsne"])
def test_the_layout_keeps_clusters_together_and_repeats(layout: str) -> None:
    if layout == "tsne" and importlib.util.find_spec("openTSNE") is None:
        pytest.skip("openTSNE is not installed (extra 'report')")
    base, draw = factors(2), np.random.default_rng(0)
    flat = np.repeat(np.asarray(base.flat), 40, axis=0) + 0.02 * draw.standard_normal((80, 256)).astype(np.float32)
    for m in range(3):
        lo, hi = base.layout.offsets[m : m + 2]
        flat[:, lo:hi] /= np.linalg.norm(flat[:, lo:hi], axis=1, keepdims=True)
    given = take(base, np.zeros(80, np.int64))
    given = Factors(given.ids, given.layout, "float32", flat, None, given.norms, None, "space")
    places, scores = nearest(given, 15)
    xy, name = plane(given, places, scores, layout=layout, seed=0)  # type: ignore[arg-type]
    again, _ = plane(given, places, scores, layout=layout, seed=0)  # type: ignore[arg-type]
    assert name == layout
    np.testing.assert_array_equal(xy, again)
    centres = xy[:40].mean(axis=0), xy[40:].mean(axis=0)
    spread = max(np.linalg.norm(xy[:40] - centres[0], axis=1).max(), np.linalg.norm(xy[40:] - centres[1], axis=1).max())
    assert np.linalg.norm(centres[0] - centres[1]) > spread


def test_columns_are_numbers_or_few_names() -> None:
    assert encode("x", [1.5, None, 2]) == {"name": "x", "kind": "number", "values": [1.5, None, 2.0]}
    many = encode("x", [f"v{i}" for i in range(40)] + ["often"] * 3)
    assert many["kind"] == "category"
    assert len(many["names"]) == 25 and many["names"][-1] == "(other)"
    assert many["values"][-1] == many["names"].index("often")
    assert encode("x", ["b", None, "a"])["names"] == ["(none)", "a", "b"]


@pytest.mark.parametrize("text", EVIL)
def test_texts_cannot_end_the_element_that_holds_them(text: str) -> None:
    written = safe_json({"text": text})
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written) == {"text": text}


class Elements(html.parser.HTMLParser):
    """Counts the elements of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[dict[str, str | None]] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "script":
            self.scripts.append(dict(attrs))
        assert not any(name.startswith("on") for name, _ in attrs), (tag, attrs)


@pytest.fixture(scope="module")
def evil_report(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A report on rows whose every text tries to break out, with two datasets, adapters, coresets and a retraining."""
    from repmatch.curator.evaluate.evaluation import EvaluateOptions, evaluate
    from repmatch.curator.evaluate.retraining import RetrainRecipe

    folder = tmp_path_factory.mktemp("report")
    rows = toy_rows(60)
    for i, row in enumerate(rows):
        row["text"] = f"{row['text']} {EVIL[i % len(EVIL)]}"
        row["id"] = f"{row['id']} {EVIL[i % 2]}"
        row["label"] = EVIL[1] if row["label"] == "yes" else "no"
        row["group"] = f"{row['group']}{EVIL[3]}"
    rows[7]["text"] = "needle in the hay"
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "more.jsonl", toy_rows(30))
    with repmatch.open(folder / "store") as store:
        curator = repmatch.Curator(store, str(tiny_model))
        curator.ingest(folder / "rows.jsonl", "evil<b>x</b>".replace("<", "-").replace(">", "-").replace("/", "-"))
        curator.ingest(folder / "more.jsonl", "more")
        name = store.datasets()["name"].to_list()[0]
        curator.score(name)
        curator.compare(name, "more", f"{name}[label <> 'no']")
        curator.select(name, 6, name="core")
        test = write_rows(
            folder / "test.jsonl", [{"id": f"t{i}", "text": f"a fresh {i}", "label": "no"} for i in range(9)]
        )
        asked = EvaluateOptions((), ("core",), (6,), 2, RetrainRecipe(steps=2), baselines=("random",))
        evaluate(curator, name, [str(test)], asked)
    from repmatch.cli import main

    with pytest.raises(SystemExit) as left:
        main(["--store", str(folder / "store"), "report", "-o", str(folder / "report.html"), "--layout", "pca"])
    assert left.value.code in (0, None)
    return folder / "report.html"


def data_of(path: Path) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), flags=re.DOTALL)
    assert found is not None
    loaded: dict[str, Any] = json.loads(found[1])
    return loaded


def test_the_page_has_its_own_three_scripts_and_loads_nothing(evil_report: Path) -> None:
    text = evil_report.read_text()
    found = Elements()
    found.feed(text)
    assert found.scripts == [{"id": "data", "type": "application/json"}, {}, {}]
    assert not found.tags & {"img", "link", "iframe", "object", "base", "form"}
    assert "window.pwned" in json.dumps(data_of(evil_report))  # the texts are there, whole


def test_the_data_are_what_the_store_holds(evil_report: Path) -> None:
    (section,) = data_of(evil_report)["sections"]
    shown = section["map"]
    assert len(shown["ids"]) == 90
    store = repmatch.open(evil_report.parent / "store", mode="r")
    name = section["datasets"][0]["name"]
    own = dict(store.latest_scores(name).select("id", "score").rows())
    score = next(c for c in shown["columns"] if c["name"] == "score")
    for i in range(60):
        assert score["values"][i] == pytest.approx(own[shown["ids"][i]], rel=1e-4)
    assert score["values"][60:] == [None] * 30
    found = repmatch.Curator(store).nearest(name, shown["ids"][3], k=60)
    for place, value in zip(shown["near"][3], shown["near_scores"][3], strict=True):
        if shown["datasets"][place] == name:
            assert value == pytest.approx(float(found.scores[found.ids.index(shown["ids"][place])]), abs=1e-3)
    core = store.coreset("core")
    stands = shown["picks"]["core"]["stands"]
    for row_id, place in zip(core.all_ids, core.representative.tolist(), strict=True):
        assert shown["ids"][stands[shown["ids"].index(row_id)]] == core.ids[place]
    adapters = section["adapters"]
    assert len(adapters["names"]) == 3
    scores = repmatch.Curator(store).compare(name, "more").scores
    order = [adapters["names"].index(n) for n in (name, "more")]
    assert adapters["layers"][0]["values"][order[0]][order[1]] == pytest.approx(scores[0, 1], abs=1e-4)


def test_it_works_in_a_browser(evil_report: Path) -> None:
    data = data_of(evil_report)["sections"][0]["map"]
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": 1280, "height": 1000})
        problems: list[str] = []
        requests: list[str] = []
        tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("dialog", lambda dialog: problems.append(dialog.message))
        tab.goto(evil_report.as_uri())
        tab.wait_for_selector("#map[data-wired]")
        tab.wait_for_timeout(300)
        assert requests == [evil_report.as_uri()]

        def place(point: int) -> list[float]:
            found: list[float] = tab.evaluate(
                "([x, y]) => { const g = document.getElementById('map'), l = g._fullLayout;"
                " const r = g.getBoundingClientRect();"
                " return [r.left + l._size.l + l.xaxis.l2p(x), r.top + l._size.t + l.yaxis.l2p(y)]; }",
                [data["x"][point], data["y"][point]],
            )
            return found

        # Hovering shows the text of a point (another may lie on the same pixel), as text.
        tab.evaluate("document.getElementById('map-section').scrollIntoView()")
        point = 0
        tab.mouse.move(*place(point))
        tab.wait_for_selector("#tip:not([hidden])")
        tip = tab.text_content("#tip .text")
        assert tip in [text[:280] for text in data["texts"]]
        assert tab.query_selector("#tip img, #tip script, #tip b, #tip svg") is None

        # Clicking shows its nearest instances and its pick.
        tab.mouse.click(*place(point))
        tab.wait_for_selector("#detail-text")
        clicked = data["texts"].index(tab.text_content("#detail-text"))
        near = tab.eval_on_selector_all("#near .row", "rows => rows.map(row => row.lastChild.textContent)")
        assert len(near) == len(data["near"][clicked])
        assert all(text.endswith(data["texts"][j]) for text, j in zip(near, data["near"][clicked], strict=True))
        if data["datasets"][clicked] != "more":
            assert "core" in tab.text_content("#stands")
        tab.click("#near .row >> nth=0")
        assert tab.text_content("#detail-text") == data["texts"][data["near"][clicked][0]]

        # Searching finds.
        tab.fill("#search", "NEEDLE hay")
        tab.wait_for_function("document.getElementById('found').textContent === '1 found'")
        assert "needle in the hay" in tab.text_content("#matches")
        tab.fill("#search", "")

        # Colours change: by a number there is a colour scale, by a category a legend.
        def colours() -> str:
            found: str = tab.evaluate("JSON.stringify(document.getElementById('map').data.map(t => t.marker.color))")
            return found

        seen = {colours()}
        for name in ("score", "group", "stars", "dataset", "picked: core"):
            tab.select_option("#colour", label=name)
            tab.wait_for_timeout(100)
            seen.add(colours())
        assert len(seen) == 6
        tab.select_option("#colour", label="label")
        assert tab.locator("#legend button").count() == 3
        before = tab.evaluate("document.getElementById('map').data.map(t => t.x.length)")
        tab.click("#legend button >> nth=0")
        tab.wait_for_timeout(100)
        assert tab.evaluate("document.getElementById('map').data.map(t => t.x.length)") != before

        # The other charts are drawn, and every layer can be shown.
        for chart in ("matrix", "profile", "scores", "retraining", "losses"):
            assert tab.locator(f"#{chart} .main-svg").count() > 0, chart
        for kind in ("0", "1"):
            tab.select_option("#matrix-kind", value=kind)
            tab.select_option("#matrix-layer", index=2)
        tab.wait_for_timeout(200)
        assert tab.evaluate("window.pwned") is None
        assert tab.locator("img, svg[onload], a[href^='javascript']").count() == 0
        assert requests == [evil_report.as_uri()]
        assert problems == []


def test_a_sample_keeps_every_pick(run: Run, toy_store: Path, tmp_path: Path) -> None:
    run("--store", toy_store, "select", "toy", "-k", 5, "--name", "core")
    target = tmp_path / "r.html"
    result = run("--store", toy_store, "report", "toy", "-o", target, "--points", 20, "--layout", "pca", "--json")
    (found,) = result.objects
    assert 20 <= int(str(found["points"])) <= 25
    assert found["instances"] == 60
    shown = data_of(target)["sections"][0]["map"]
    with repmatch.open(toy_store, mode="r") as store:
        assert set(store.coreset("core").ids) <= set(shown["ids"])
    again = tmp_path / "again.html"
    run("--store", toy_store, "report", "toy", "-o", again, "--points", 20, "--layout", "pca")
    assert data_of(again)["sections"] == data_of(target)["sections"]


def test_a_report_of_two_spaces_has_two_sections(
    run: Run, toy_store: Path, toy_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run("--store", toy_store, "ingest", toy_file, "--dataset", "two", "--model", tiny_model, "--rank", 2)
    assert run("--store", toy_store, "report", "-o", tmp_path / "r.html", "--layout", "pca").code == 0
    assert [s["space"]["rank"] for s in data_of(tmp_path / "r.html")["sections"]] == [1, 2]


BAD = [
    (("report", "nope"), 1, "there is no dataset 'nope'"),
    (("report", "-o", "/nowhere/at/all.html"), 2, "there is no folder /nowhere/at"),
    (("report", "-o", "/tmp"), 2, "is a folder"),
    (("report", "--points", "1"), 2, "--points 1 is too small"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), BAD)
def test_a_report_that_cannot_be_made(
    run: Run, toy_store: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = run("--store", toy_store, *arguments)
    assert (result.code, message in result.err) == (code, True)


@pytest.fixture
def unfinished(toy_store: Path, toy_file: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with the dataset "toy", and the rows of "new", whose ingest has not come to the first factor."""

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with repmatch.open(toy_store) as store, monkeypatch.context() as patched:
        patched.setattr("repmatch.curator.work.Work.compute", stopped)
        with pytest.raises(KeyboardInterrupt):
            repmatch.Curator(store, str(tiny_model)).ingest(toy_file, "new")
        assert store.dataset("new").space_id is not None
    return toy_store


@pytest.mark.filterwarnings("error")
def test_a_report_on_a_dataset_without_factors_says_what_to_run(run: Run, unfinished: Path, tmp_path: Path) -> None:
    for names in (("new",), ("toy", "new")):
        result = run("--store", unfinished, "report", *names, "-o", tmp_path / "r.html")
        assert (result.code, "repmatch ingest FILE --dataset new" in result.err) == (1, True), result.err
        assert "defect" not in result.err
    assert not (tmp_path / "r.html").exists()
    with repmatch.open(unfinished) as store:
        store.delete_dataset("toy")
    result = run("--store", unfinished, "report", "-o", tmp_path / "r.html")
    assert (result.code, "there is no dataset with factors" in result.err) == (1, True), result.err


@pytest.mark.filterwarnings("error")
def test_a_report_on_all_leaves_out_what_has_no_factors(run: Run, unfinished: Path, tmp_path: Path) -> None:
    asked = ("--store", unfinished, "report", "-o", tmp_path / "r.html", "--layout", "pca", "--json")
    (found,) = run(*asked).objects
    assert (found["datasets"], found["points"]) == (["toy"], 60)
    assert data_of(tmp_path / "r.html")["title"] == "repmatch: toy"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_report_on_few_instances(run: Run, toy_store: Path, tmp_path: Path, count: int) -> None:
    with repmatch.open(toy_store) as store:
        store.delete("toy", ids=store.ids("toy")[count:])
    (found,) = run("--store", toy_store, "report", "-o", tmp_path / "r.html", "--json").objects
    assert found["points"] == count


def test_a_report_does_not_say_in_which_folder_an_ingest_ran(
    run: Run, toy_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret-folder").mkdir()
    monkeypatch.chdir(tmp_path / "secret-folder")
    write_rows(Path("more.jsonl"), toy_rows(62))
    assert run("--store", toy_store, "ingest", "more.jsonl", "--dataset", "toy").code == 0
    run("--store", toy_store, "report", "-o", tmp_path / "r.html", "--layout", "pca")
    assert data_of(tmp_path / "r.html")["runs"][0]["arguments"]["sources"] == ["more.jsonl"]
    assert "secret-folder" not in (tmp_path / "r.html").read_text()


def test_a_report_without_the_plotting_library_says_what_to_install(
    run: Run, toy_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    result = run("--store", toy_store, "report", "-o", tmp_path / "r.html")
    assert result.code == 1
    assert "pip install 'repmatch[report]'" in result.err
    assert not list(tmp_path.glob("*.html"))


def test_the_title_is_a_text() -> None:
    written = page({"title": EVIL[0], "sections": []})
    assert "<title>&lt;/script&gt;" in written


def test_half_a_character_in_a_title_is_shown_as_a_question(toy_store: Path, tmp_path: Path) -> None:
    with repmatch.open(toy_store) as store:
        repmatch.Curator(store).report(tmp_path / "r.html", "toy", title="a\udcff", layout="pca")
    assert "<title>a?</title>" in (tmp_path / "r.html").read_text()
