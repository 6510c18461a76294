"""The report's map: how well layouts keep neighbours, what they cost, and how a browser draws the page.

    python benchmarks/bench_report.py STORE DATASET            layouts, UMAP too where umap-learn is installed
    python benchmarks/bench_report.py --page report.html       load, redraw and pan in headless Chromium

Kept neighbours: the share of each instance's 15 nearest by the RepMatch kernel that are among its 15 nearest in the
plane.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import repmatch
from repmatch.curator.report.kernel import nearest, plane

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


def kept(places: Any, xy: Any) -> float:
    from sklearn.neighbors import NearestNeighbors

    k = places.shape[1]
    near = NearestNeighbors(n_neighbors=k + 1).fit(xy).kneighbors(return_distance=False)[:, 1:]
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(places.tolist(), near.tolist(), strict=True)]))


def layouts(path: str, dataset: str) -> None:
    with repmatch.open(path, mode="r") as store:
        factors = store.factors(dataset)
        began = time.perf_counter()
        places, scores = nearest(factors, 15)
        print(f"{len(factors)} instances, neighbours {time.perf_counter() - began:.1f} s")
        for name in ("tsne", "pca"):
            began = time.perf_counter()
            xy, _ = plane(factors, places, scores, layout=name, seed=0)  # type: ignore[arg-type]
            print(f"{name}: {time.perf_counter() - began:.1f} s, kept {kept(places, xy):.3f}")
        if importlib.util.find_spec("umap") is not None:
            began = time.perf_counter()
            print(f"umap: kept {kept(places, umap_layout(places, scores)):.3f}, {time.perf_counter() - began:.1f} s")
        began = time.perf_counter()
        xy = spectral(places, scores)
        print(f"spectral: {time.perf_counter() - began:.1f} s, kept {kept(places, xy):.3f}")


def umap_layout(places: Any, scores: Any) -> Any:
    import umap

    n = len(places)
    index = np.concatenate([np.arange(n)[:, None], places], axis=1)
    distances = np.concatenate([np.zeros((n, 1)), 1.0 - scores], axis=1).astype(np.float32)
    model = umap.UMAP(n_neighbors=index.shape[1], random_state=0, precomputed_knn=(index, distances, None))
    return model.fit_transform(np.random.default_rng(0).standard_normal((n, 2)).astype(np.float32))


def spectral(places: Any, scores: Any) -> Any:
    import scipy.sparse as sparse
    from scipy.sparse.linalg import eigsh

    n, k = places.shape
    graph = sparse.csr_matrix((scores.ravel(), (np.repeat(np.arange(n), k), places.ravel())), (n, n))
    graph = graph.maximum(graph.T)
    scale = sparse.diags(1 / np.sqrt(np.maximum(np.asarray(graph.sum(axis=1)).ravel(), 1e-9)))
    _, vectors = eigsh(scale @ graph @ scale, 3, which="LA", tol=1e-3)
    return vectors[:, :2]


def browse(path: Path) -> None:
    from browser import chromium

    with chromium() as browser:
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        began = time.perf_counter()
        tab.goto(path.resolve().as_uri())
        tab.wait_for_selector("#map[data-wired]", timeout=120_000)
        print(f"load {time.perf_counter() - began:.1f} s, {path.stat().st_size / 1e6:.1f} MB")
        script = """async () => {
          const map = document.getElementById('map'), select = document.getElementById('colour');
          const frame = () => new Promise((done) => requestAnimationFrame(done));
          const time = async (count, act) => {
            const start = performance.now();
            for (let i = 0; i < count; i++) { await act(i); await frame(); }
            return (performance.now() - start) / count;
          };
          const range = map._fullLayout.xaxis.range.slice(), wide = range[1] - range[0];
          const moved = (i) => ({ 'xaxis.range': range.map((v) => v + wide * i / 100) });
          const pan = await time(20, (i) => Plotly.relayout(map, moved(i)));
          const colours = await time(6, async (i) => { select.value = String(i % select.options.length);
            select.dispatchEvent(new Event('change')); });
          return [pan, colours, JSON.parse(document.getElementById('data').textContent).sections[0].map.ids.length];
        }"""
        pan, colours, points = tab.evaluate(script)
        print(f"{points} points, software rendering: pan {pan:.0f} ms a frame, change of colour {colours:.0f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?")
    parser.add_argument("dataset", nargs="?")
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    if given.page:
        browse(given.page)
    elif given.store and given.dataset:
        layouts(given.store, given.dataset)
    else:
        parser.error("give a store and a dataset, or --page")
