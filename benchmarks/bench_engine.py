"""Measure the factor engine beside loops and peers on the CPU, and on a CUDA machine; see README.md beside this file.

Prints one table; `--json FILE` keeps the raw numbers. The CUDA part makes its inputs on the spot:

    python benchmarks/bench_engine.py --only cuda
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import Patience, describe, say, watching

PARTS = ("embedded", "bert", "steps", "trak", "bergson", "bergson-short", "cuda")
CPU_PARTS = PARTS[:-1]
FILES = {"sst2": "sst2.train.jsonl", "gsm8k": "gsm8k.train.jsonl", "imdb": "imdb.train.jsonl"}


class Bench:
    """One run: options, a folder for models and stores, and what was measured."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.patience = Patience(options.wait)
        self.result: dict[str, Any] = {"machine": describe()}

    def lines(self, name: str, count: int) -> list[dict[str, Any]]:
        """Return the first rows of a dataset, or stop with how to give it."""
        path = self.options.data / FILES[name]
        if not path.is_file():
            sys.exit(f"{path} is no file; set REPMATCH_DATA or --data to a folder that holds {FILES[name]}.")
        with path.open(encoding="utf-8") as handle:
            return [json.loads(line) for line, _ in zip(handle, range(count), strict=False)]

    def loops(self, name: str, model: str | None, engine_rows: int, loop_rows: int) -> None:
        """The engine beside the plain and the literal loop."""
        from loops import contest

        from repmatch.datamodels import Row

        rows = [
            Row(str(i), "{}", v["text"], v.get("text_pair"), str(v["label"]), "", "", "data", i + 1)
            for i, v in enumerate(self.lines("sst2", 6920))
        ]
        labels = sorted({row.label for row in rows})
        sizes = {"rounds": self.options.rounds, "engine_rows": engine_rows, "loop_rows": loop_rows}
        self.result[name] = contest(rows, labels, patience=self.patience, model=model, **sizes)

    def embedded(self) -> None:
        """The embedded model."""
        self.loops("embedded", None, self.options.rows, self.options.loop_rows)

    def bert(self) -> None:
        """BERT-base's size, random weights, the embedded model's tokenizer."""
        model = bert_checkpoint(self.folder / "bert")
        self.loops("bert", str(model), max(64, self.options.rows // 8), max(2, self.options.loop_rows // 8))

    def steps(self) -> None:
        """K steps: many at once against one instance at a time with peft and torch's optimiser."""
        import torch
        from loops import PlainLoop

        from repmatch.curator.batches import Batches, batches_by_tokens
        from repmatch.curator.settings import Settings
        from repmatch.curator.workbench import Workbench
        from repmatch.datamodels import Row

        count, few, steps = self.options.rows // 16, self.options.loop_rows // 4, 10
        lines = self.lines("sst2", count)
        rows = [Row(str(i), "{}", v["text"], None, str(v["label"]), "", "", "", i) for i, v in enumerate(lines)]
        labels = sorted({row.label for row in rows})
        bench = Workbench.build(Settings(device="cpu", steps=steps))
        task = bench.task(labels)
        examples = task.encode(rows)
        engine = bench.engine(labels, task)
        batches = Batches(engine, task, bench.batch_tokens)
        order = [i for batch in batches_by_tokens([e.tokens for e in examples], 10**9) for i in batch]
        chosen = [order[int((k + 0.5) * count / few)] for k in range(few)]
        loop = PlainLoop(engine.module, replace(bench.space, optimizer={**bench.space.optimizer}))
        batches.factors(rows[:16], examples[:16])
        rounds = []
        for _ in range(self.options.rounds):
            self.patience.wait()
            with watching() as watch:
                began, used = time.perf_counter(), time.process_time()
                found, _ = batches.factors(rows, examples)
                many, many_cpu = (time.perf_counter() - began) / count, (time.process_time() - used) / count
                began, used = time.perf_counter(), time.process_time()
                alone = [loop(task.collate([examples[i]]), steps) for i in chosen]
                one, one_cpu = (time.perf_counter() - began) / few, (time.process_time() - used) / few
            each = {"many": many, "one": one, "many_cpu": many_cpu, "one_cpu": one_cpu}
            rounds.append(each | {"others": watch.others})
            say(f"steps: {1e3 * many:.1f} ms at once, {1e3 * one:.1f} ms alone")
        cosines = []
        for i, vectors in zip(chosen, alone, strict=True):
            for m, vector in enumerate(vectors):
                lo, hi = engine.layout.offsets[m : m + 2]
                u = torch.from_numpy(found.values[i, lo:hi]).double()
                cosines.append(float(torch.nn.functional.cosine_similarity(u, vector.double(), dim=0) ** 2))
        self.result["steps"] = {"steps": steps, "rows": count, "alone": few, "rounds": rounds, "cosine": min(cosines)}

    def trak(self) -> None:
        """TRAK beside an ingest: the embedded model, sequence classification, the same matrices."""
        from repmatch.curator import base_models

        embedded = base_models.find_model(None)
        reader = base_models.load_tokenizer(embedded)
        lines = self.lines("sst2", self.options.peer_rows)
        folder = self.folder / "trak"
        shutil.copytree(embedded.folder, folder / "model")
        given = {
            "ids": reader([line["text"] for line in lines])["input_ids"],
            "labels": [int(line["label"] == "positive") for line in lines],
            "classes": 2,
            "targets": ["query", "value"],
            "trak_dim": 512,
            "batch": 16,
        }
        rows = [{"id": str(i), "text": line["text"], "label": line["label"]} for i, line in enumerate(lines)]
        self._peer("trak", folder, given, rows, {})

    def bergson(self) -> None:
        """Bergson beside an ingest: questions and long answers."""
        lines = self.lines("gsm8k", self._causal_rows)
        self._bergson("bergson", [(line["prompt"], line["response"]) for line in lines])

    def bergson_short(self) -> None:
        """Bergson beside an ingest: long texts and answers of a word."""
        lines = self.lines("imdb", self._causal_rows)
        self._bergson("bergson-short", [(line["text"], line["label"]) for line in lines])

    @property
    def _causal_rows(self) -> int:
        return max(8, self.options.peer_rows // 4)

    def _bergson(self, name: str, pairs: Sequence[tuple[str, str]]) -> None:
        """A LLaMA-like model, prompts and completions, the same matrices."""
        folder = self.folder / name
        model = llama_checkpoint(folder / "model", 384, 6, 1024)
        rows = [{"id": str(i), "prompt": asked, "completion": told} for i, (asked, told) in enumerate(pairs)]
        from repmatch.curator.settings import Settings
        from repmatch.curator.workbench import Workbench
        from repmatch.datamodels import Row

        task = Workbench.build(Settings(model=str(model), task="causal-lm")).task(())
        examples = task.encode([Row(r["id"], "{}", r["prompt"], r["completion"], "", "", "", "", 0) for r in rows])
        given = {
            "ids": [e.features["input_ids"] for e in examples],
            "prompts": [e.features["prompt"] for e in examples],
            "targets": ["q_proj", "v_proj"],
            "bergson_dim": 16,
        }
        self._peer(name, folder, given, rows, {"model": str(model), "task": "causal-lm"})

    def _peer(
        self, name: str, folder: Path, given: dict[str, Any], rows: list[dict[str, Any]], space: dict[str, Any]
    ) -> None:
        import torch

        from repmatch.curator.workbench import limit_threads

        python = self.options.peers
        if python is None:
            say(f"{name}: left out; give --peers PYTHON, an interpreter that has it (make bench-engine makes one)")
            return
        limit_threads()
        given |= {"threads": torch.get_num_threads(), "tokens": 1024}
        (folder / "rows.json").write_text(json.dumps(given))
        script = Path(__file__).with_name("peers.py")
        rounds = []
        for number in range(self.options.peer_rounds):
            self.patience.wait()
            with watching() as watch:
                ours = {e: self._ingest(rows, space, e, f"{name}-{number}-{e}") for e in ("float16", "sign")}
                ran = subprocess.run(
                    [str(python), str(script), name.partition("-")[0], str(folder)],
                    capture_output=True,
                    text=True,
                    check=False,
                )
            found = [line for line in ran.stdout.splitlines() if line.startswith("RESULT ")]
            if ran.returncode or not found:
                say(f"{name} failed:\n{ran.stderr[-2000:]}")
                self.result[name] = {"failed": ran.stderr.strip().splitlines()[-1:]}
                return
            peer = json.loads(found[-1].removeprefix("RESULT "))
            rounds.append({"ours": ours, "peer": peer, "others": watch.others})
            say(f"{name}: {peer['seconds']:.1f} s; ingest {ours['float16']['seconds']:.1f} s")
        tokens = sum(len(ids) for ids in given["ids"])
        self.result[name] = {"rows": len(rows), "tokens": tokens, "rounds": rounds}

    def _ingest(self, rows: list[dict[str, Any]], space: dict[str, Any], encoding: Any, name: str) -> dict[str, float]:
        import repmatch
        from repmatch.curator.workbench import Workbench

        file = self.folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings = repmatch.Settings(device="cpu", **space)
        form = "completion" if "task" in space else None
        Workbench.build(settings, form).engine(2)  # loaded beforehand, as it is for the peer
        with repmatch.open(self.folder / name) as store:
            began, used = time.perf_counter(), time.process_time()
            repmatch.Curator(store, settings=settings).ingest(file, "d", encoding=encoding)
            seconds, cpu = time.perf_counter() - began, time.process_time() - used
            width = store.factors("d")
            size = store.info()["bytes"]["segments"] / len(width.ids)
        return {"seconds": seconds, "cpu": cpu, "bytes": size}

    def cuda(self) -> None:
        """What a CUDA machine does: BERT-base's size, and a LLaMA-like model of a billion parameters."""
        from on_cuda import measure

        self.result["cuda"] = measure(self.options, self.folder)


def bert_checkpoint(folder: Path, layers: int = 12, hidden: int = 768) -> Path:
    """Write a BERT with random weights and the embedded model's tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    from repmatch.curator import base_models

    embedded = base_models.find_model(None)
    heads = hidden // 64
    config = BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * hidden
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    base_models.load_tokenizer(embedded).save_pretrained(folder)
    return folder


def llama_checkpoint(folder: Path, hidden: int, layers: int, intermediate: int, vocabulary: int = 30522) -> Path:
    """Write a LLaMA-like model with random weights and the embedded model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from repmatch.curator import base_models

    embedded = base_models.find_model(None)
    heads = max(1, hidden // 64)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    reader: Any = base_models.load_tokenizer(embedded)
    reader.eos_token = reader.sep_token
    reader.save_pretrained(folder)
    return folder


def render(result: dict[str, Any]) -> str:
    """Return what was measured as one table."""
    lines = [f"repmatch factor engine; {result['machine']}", result["versions"], ""]
    lines.append(f"{'':<58}{'ours':>12} {'other':>12} {'ratio':>8}")
    for name, title in (("embedded", "embedded model (12 matrices)"), ("bert", "BERT-base size (24 matrices)")):
        if name in result:
            lines += _loop_lines(result[name], title)
    if "steps" in result:
        found = result["steps"]
        pairs = [(1e3 * r["many"], 1e3 * r["one"]) for r in found["rounds"]]
        lines.append(_row(f"{found['steps']} steps, ms an instance; other: peft, one by one", pairs))
        used = [(1e3 * r["many_cpu"], 1e3 * r["one_cpu"]) for r in found["rounds"]]
        lines.append(_row("  the same in processor time", used))
        lines.append(f"  smallest squared cosine with training alone {found['cosine']:.6f}")
    for name in ("trak", "bergson", "bergson-short"):
        if "rounds" in result.get(name, {}):
            lines += _peer_lines(name, result[name])
    if "cuda" in result:
        lines += ["", *result["cuda"]["lines"]]
    return "\n".join(lines)


def _row(title: str, pairs: Sequence[tuple[float, float]]) -> str:
    ours, other, ratio = (statistics.median(v) for v in zip(*[(a, b, b / a) for a, b in pairs], strict=True))
    return f"{title:<58}{ours:>12.2f} {other:>12.2f} {ratio:>7.1f}x"


def _loop_lines(found: dict[str, Any], title: str) -> list[str]:
    rounds = [r for r in found["rounds"] if not r["disturbed"]] or found["rounds"]
    per = [r["seconds_per_instance"] for r in rounds]
    out = [
        _row(f"{title}, ms an instance; other: {name} loop", [(1e3 * p["engine"], 1e3 * p[name]) for p in per])
        for name in ("plain", "literal")
    ]
    share = statistics.median(r["engine_flops"] / r["peak_flops"] for r in rounds)
    flops = statistics.median(r["engine_flops"] for r in rounds) / 1e9
    peak = statistics.median(r["peak_flops"] for r in rounds) / 1e9
    least = min(c for r in found["rounds"] for name in ("literal", "plain") for c in r["cosines"][name])
    mark = "" if any(not r["disturbed"] for r in found["rounds"]) else "  (every round disturbed by other processes)"
    used = [r["cpu_per_instance"] for r in rounds]
    out += [
        _row(f"  the same in processor time; other: {name} loop", [(1e3 * p["engine"], 1e3 * p[name]) for p in used])
        for name in ("plain", "literal")
    ]
    out.append(f"  {flops:.0f} of {peak:.0f} GFLOP/s: {share:.0%} of the peak, on real tokens{mark}")
    done = found["computed_share"]
    out.append(f"  of these {done:.0%} are computed, padding included: {done * share:.0%} of the peak")
    shares = [(r["engine_flops_cpu"], r["peak_flops_cpu"]) for r in rounds]
    mine, best = (statistics.median(values) / 1e9 for values in zip(*shares, strict=True))
    out.append(f"  {mine:.0f} of {best:.0f} GFLOP a processor second: {mine / best:.0%}")
    out.append(f"  least squared cosine with either loop {least:.6f}")
    return out


def _peer_lines(name: str, found: dict[str, Any]) -> list[str]:
    rows = found["rows"]
    out = []
    for encoding in ("float16", "sign"):
        each = [(r["ours"][encoding], r["peer"]) for r in found["rounds"]]
        wall, used = (
            [(1e3 * mine[kind] / rows, 1e3 * peer[kind] / rows) for mine, peer in each] for kind in ("seconds", "cpu")
        )
        out.append(_row(f"ingest as {encoding}, stored, ms an instance; other: {name}", wall))
        out.append(_row("  the same in processor time", used))
    last = found["rounds"][-1]
    sizes = ", ".join(f"{e} {last['ours'][e]['bytes']:,.0f}" for e in ("float16", "sign"))
    out.append(
        f"  bytes an instance: {sizes}; {name} {last['peer']['bytes']:,.0f} ({last['peer']['features']:,} features)"
    )
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(CPU_PARTS), help="what to measure")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("REPMATCH_DATA", ".")), help="datasets")
    parser.add_argument("--rows", type=int, default=4000, help="rows a round for the engine")
    parser.add_argument("--loop-rows", type=int, default=40, help="rows a round for each loop")
    parser.add_argument("--rounds", type=int, default=3, help="rounds")
    parser.add_argument("--peers", type=Path, help="Python with traker and bergson")
    parser.add_argument("--peer-rows", type=int, default=512, help="rows for the peers")
    parser.add_argument("--peer-rounds", type=int, default=2, help="rounds with the peers")
    parser.add_argument("--wait", type=float, default=300.0, help="seconds to wait for a quiet machine, in all")
    parser.add_argument("--small", action="store_true", help="the CUDA part in miniature, on any device")
    parser.add_argument("--json", type=Path, dest="json_file", help="write the raw numbers to this file")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        from importlib.metadata import version

        names = ("torch", "transformers", "peft")
        bench.result["versions"] = ", ".join(f"{name} {version(name)}" for name in names)
        for part in options.only:
            say(part)
            getattr(bench, part.replace("-", "_"))()
        if options.json_file:
            options.json_file.write_text(json.dumps(bench.result, indent=1))
        print(render(bench.result))


if __name__ == "__main__":
    main()
