"""The CUDA part of bench_engine.py: every input is made on the spot; `small` runs the same lines in miniature."""

from __future__ import annotations

import argparse
import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import say

# Tokens of the 6,920 training sentences of SST-2 (sst2.train.jsonl), quantiles in tenths; the phrases of GLUE's SST-2,
# which are 67,349, are shorter.
SENTENCE_TOKENS = (4, 11, 15, 18, 21, 24, 27, 31, 35, 41, 80)
PROMPT_WORDS, ANSWER_WORDS = 120, 80


def _words() -> list[str]:
    """Whole words of the embedded model's vocabulary: a word is a token."""
    from repmatch.curator import base_models

    reader = base_models.load_tokenizer(base_models.find_model(None))
    return [word for word in sorted(reader.get_vocab()) if word.isascii() and word.isalpha() and word.islower()]


def _text(draw: np.random.Generator, words: list[str], count: int) -> str:
    return " ".join(words[int(i)] for i in draw.integers(0, len(words), count))


def peak(device: str, dtype: torch.dtype, size: int) -> float:
    """Measure the matrix-product peak in FLOP/s."""
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(10):
        began = time.perf_counter()
        for _ in range(10):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 10 * 2 * size**3 / (time.perf_counter() - began))
    return best


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the CUDA part.

    Args:
        options: the command line; `small` for a miniature on any device.
        folder: for models, rows and stores.

    Returns:
        The numbers, and lines of the table.
    """
    if not options.small and not torch.cuda.is_available():
        return {"lines": ["no CUDA device: the CUDA part was not measured (--small tries it in miniature)"]}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu, in miniature"}
    found |= _bert(device, folder, options.small) | _llama(device, folder, options.small)
    ratio = found["plain_ms"] * found["bert_rows"] / 1e3 / found["bert_seconds"]
    found["lines"] = [
        f"CUDA part on {found['device']}",
        f"  BERT-base size: {found['bert_rows']:,} rows of SST-2's sentence lengths ingested in "
        f"{found['bert_seconds']:.1f} s, in {found['bert_precision']}",
        f"  plain peft loop {found['plain_ms']:.1f} ms an instance: {ratio:.1f}x",
        f"  LLaMA-like, {found['llama_parameters'] / 1e9:.2f} billion parameters: {found['llama_per_second']:.1f} rows "
        f"of {found['llama_tokens']:.0f} tokens a second, in {found['llama_precision']}",
        f"  {found['llama_share']:.0%} of the matrix-product peak in it ({found['llama_peak'] / 1e12:.2f} TFLOP/s)",
    ]
    return found


def _bert(device: str, folder: Path, small: bool) -> dict[str, Any]:
    from bench_engine import bert_checkpoint
    from loops import PlainLoop

    import repmatch
    from repmatch.curator.workbench import Workbench
    from repmatch.datamodels import Row

    count = 200 if small else 67_349
    model = bert_checkpoint(folder / "cuda-bert", *((2, 128) if small else (12, 768)))
    draw, words = np.random.default_rng(0), _words()
    lengths = np.interp(draw.random(count), np.linspace(0, 1, len(SENTENCE_TOKENS)), SENTENCE_TOKENS).round()
    texts = [_text(draw, words, max(1, int(n) - 2)) for n in lengths]
    file = folder / "cuda.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for i, text in enumerate(texts):
            out.write(json.dumps({"id": str(i), "text": text, "label": ("no", "yes")[i % 2]}) + "\n")
    settings = repmatch.Settings(model=str(model), device=device)
    bench = Workbench.build(settings)
    bench.engine(2)  # loaded, and the device woken
    with repmatch.open(folder / "cuda-store") as store:
        began = time.perf_counter()
        report = repmatch.Curator(store, settings=settings).ingest(file, "d")
        seconds = time.perf_counter() - began
    say(f"BERT-base size: {seconds:.1f} s, {report.detail}")
    task = bench.task(("no", "yes"))
    some = [Row(str(i), "{}", texts[i], None, "no", "", "", "", 0) for i in range(8 if small else 40)]
    loop = PlainLoop(bench.engine(2).module, bench.space)
    ones = [{k: v.to(device) for k, v in task.collate([e]).items()} for e in task.encode(some)]
    loop(ones[0])
    began = time.perf_counter()
    for one in ones:
        loop(one)[0].cpu()
    plain = (time.perf_counter() - began) / len(ones)
    detail = report.detail
    return {
        "bert_rows": count,
        "bert_seconds": seconds,
        "bert_precision": detail["precision"],
        "plain_ms": 1e3 * plain,
        "bert_agreement": dict(detail.get("agreement_with_float32", {})),
    }


def _llama(device: str, folder: Path, small: bool) -> dict[str, Any]:
    from bench_engine import llama_checkpoint

    import repmatch
    from repmatch.curator import precision
    from repmatch.curator.batches import Batches
    from repmatch.curator.overlap import ahead
    from repmatch.curator.windows import window_tokens, windows
    from repmatch.curator.work import LOOK, look
    from repmatch.curator.workbench import Workbench
    from repmatch.datamodels import Row

    shape = (128, 2, 256) if small else (2048, 16, 8192)
    model = llama_checkpoint(folder / "cuda-llama", *shape)
    count = 16 if small else 512
    draw, words = np.random.default_rng(1), _words()
    rows = [
        Row(str(i), "{}", _text(draw, words, PROMPT_WORDS), _text(draw, words, ANSWER_WORDS), "", "", "", "", 0)
        for i in range(count)
    ]
    settings = repmatch.Settings(model=str(model), task="causal-lm", device=device)
    bench = Workbench.build(settings, "completion")
    task = bench.task(())
    engine = bench.engine((), task)
    examples = task.encode(rows)
    # As an ingest does it, but for storing: precision and batch size by the first rows, windows tokenized ahead.
    batches = Batches(engine, task, bench.batch_tokens)
    detail = look(batches, bench, examples[:LOOK])
    chosen, agreement = detail["precision"], detail.get("agreement_with_float32", {})
    batches.factors(rows[:LOOK], examples[:LOOK])
    began = time.perf_counter()
    cut = windows(iter([rows[at : at + 64] for at in range(0, count, 64)]), task, window_tokens(bench, engine))
    with closing(ahead(((some, made, [len(some)]) for some, made in cut), device == "cuda")) as coming:
        for _ in batches.stream(coming):
            pass
    seconds = time.perf_counter() - began
    named = engine.module.named_parameters()
    parameters = sum(p.numel() for name, p in named if "embed" not in name and "lm_head" not in name)
    # The head works at the completion's positions only.
    head = sum(p.numel() for p in engine.module.get_output_embeddings().parameters())
    tokens = sum(e.tokens for e in examples)
    answers = sum(e.tokens - e.features["prompt"] for e in examples)
    dtype = torch.bfloat16 if chosen in ("bf16", "bf16x3") else torch.float32
    with precision.computing("tf32" if chosen == "tf32" else "float32", torch.device(device)):
        # Three products of bfloat16 make one: a third of their peak is what there is to reach.
        best = peak(device, dtype, 512 if small else 8192) / (3 if chosen == "bf16x3" else 1)
    say(f"LLaMA-like: {seconds:.1f} s, agreement with float32 {agreement}")
    return {
        "llama_parameters": sum(p.numel() for p in engine.module.parameters()),
        "llama_tokens": tokens / count,
        "llama_per_second": count / seconds,
        "llama_precision": chosen,
        "llama_peak": best,
        "llama_share": 4 * (parameters * tokens + head * answers) / seconds / best,
        "llama_agreement": dict(agreement),
    }
