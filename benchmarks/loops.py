"""The engine beside two loops over single instances, in alternating rounds in one process."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from machine import QUIET, Patience, say, watching
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from repmatch.curator import start
from repmatch.curator.batches import Batches, batches_by_tokens
from repmatch.curator.classification import Example, SequenceClassification
from repmatch.curator.engine import FactorEngine
from repmatch.curator.settings import Settings
from repmatch.curator.workbench import Workbench
from repmatch.datamodels import Row, Space

PADDED = 128
_PEAK_SIZES = {1024: 8, 2048: 4, 4096: 2}
# Within a round the three take turns this often, so that a drift of the machine meets all of them.
_TURNS = 4
_SPARE_ROUNDS = 4

Batch = Mapping[str, Tensor]


class _Adapted:
    """The model with peft's LoRA layers at the space's start; A and B alone require gradients."""

    def __init__(self, module: nn.Module, space: Space) -> None:
        names = [m.name for m in space.matrices]
        config = LoraConfig(r=space.rank, lora_alpha=space.alpha, lora_dropout=0.0, target_modules=names, bias="none")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft reads an attribute that transformers renames
            self.model = get_peft_model(copy.deepcopy(module), config).eval()
        layers = dict(self.model.base_model.model.named_modules())
        self.a = [layers[name].lora_A["default"].weight for name in names]
        self.b = [layers[name].lora_B["default"].weight for name in names]
        with torch.no_grad():
            for weight, matrix in zip(self.a, space.matrices, strict=True):
                weight.copy_(torch.from_numpy(start.draw_a(space.seed, matrix.name, space.rank, matrix.d_in)))
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        lr, eps = space.optimizer["lr"], space.optimizer["eps"]
        self.optimizer = torch.optim.AdamW([*self.a, *self.b], lr=lr, eps=eps)

    def _step(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        self.model(**batch).loss.backward()
        self.optimizer.step()


class LiteralLoop(_Adapted):
    """The reference procedure as published: for each instance reload everything, one step, full SVD of every ΔW."""

    def __init__(self, module: nn.Module, space: Space) -> None:
        super().__init__(module, space)
        self._kept = {name: value.clone() for name, value in self.model.state_dict().items()}
        self._kept_optimizer = self.optimizer.state_dict()

    def __call__(self, batch: Batch) -> list[Tensor]:
        """Return the first left singular vector of each matrix' ΔW, after one step on one instance."""
        self.model.load_state_dict(self._kept)
        self.optimizer.load_state_dict(self._kept_optimizer)
        self._step(batch)
        with torch.inference_mode():
            deltas = [b @ a for a, b in zip(self.a, self.b, strict=True)]
            return [torch.linalg.svd(delta)[0][:, 0].clone() for delta in deltas]


class PlainLoop(_Adapted):
    """What a careful user of peft writes: only A and B are put back, no padding, no SVD."""

    def __init__(self, module: nn.Module, space: Space) -> None:
        super().__init__(module, space)
        lr, eps = space.optimizer["lr"], space.optimizer["eps"]
        self.optimizer = torch.optim.AdamW([*self.a, *self.b], lr=lr, eps=eps, fused=True)  # the fastest variant
        self._kept = [weight.detach().clone() for weight in self.a]

    def __call__(self, batch: Batch, steps: int = 1) -> list[Tensor]:
        """Return B of each matrix after one step, or some, on one instance."""
        with torch.no_grad():
            for weight, kept in zip(self.a, self._kept, strict=True):
                weight.copy_(kept)
            for weight in self.b:
                weight.zero_()
        self.optimizer.state.clear()
        for _ in range(steps):
            self._step(batch)
        return [weight.detach()[:, 0].clone() for weight in self.b]


def pad(batch: Batch, length: int, token: int) -> dict[str, Tensor]:
    """Pad a batch of one to a fixed length.

    Args:
        batch: from `SequenceClassification.collate`.
        length: tokens, at least as many as the instance has.
        token: the padding token.

    Returns:
        The padded batch.
    """
    out = {}
    for name, value in batch.items():
        filler = token if name == "input_ids" else 0
        out[name] = value if name == "labels" else functional.pad(value, (0, length - value.shape[1]), value=filler)
    return out


def peak() -> tuple[float, float]:
    """Measure the float32 matrix-product peak.

    Returns:
        FLOP/s, and FLOP a processor second of all cores; the best of several square sizes and several runs of each.
    """
    best = best_cpu = 0.0
    for size, runs in _PEAK_SIZES.items():
        a, b = torch.rand(size, size), torch.rand(size, size)
        out = torch.empty(size, size)
        for _ in range(runs):
            began, used = time.perf_counter(), time.process_time()
            torch.mm(a, b, out=out)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
            best_cpu = max(best_cpu, 2 * size**3 / (time.process_time() - used))
    return best, best_cpu


def _linear_flop(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Count a linear layer by oneDNN, which torch's counter does not know."""
    return 2 * math.prod(x) * weight[0]


def computed_flops(engine: FactorEngine, batches: Sequence[Batch]) -> int:
    """Count the FLOP of the matrix products that the engine computes, padding and attention included.

    Args:
        engine: the engine.
        batches: what it is given.

    Returns:
        FLOP: two a multiplication.
    """
    known = {torch.ops.mkldnn._linear_pointwise: _linear_flop}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        for batch in batches:
            engine.compute(batch)
    return int(counter.get_total_flops())


class Contest:
    """Times the engine, the plain loop and the literal loop on random rows.

    Args:
        rows: rows to draw from.
        labels: their labels.
        engine_rows: rows a round for the engine, as many as an ingest sorts by length together.
        loop_rows: rows a round for the loops: of the engine's rows every so many by length, so that their lengths are
            distributed alike.
        model: the base model; None: the embedded one.
    """

    def __init__(
        self, rows: Sequence[Row], labels: Sequence[str], engine_rows: int, loop_rows: int, model: str | None = None
    ) -> None:
        bench = Workbench.build(Settings(model=model, device="cpu"))
        self.batch_tokens = bench.batch_tokens
        self.task: SequenceClassification = bench.task(labels)
        self.engine: FactorEngine = bench.engine(len(labels))
        self.batches = Batches(self.engine, self.task, self.batch_tokens)
        self._rows = rows
        self.literal = LiteralLoop(self.engine.module, bench.space)
        self.plain = PlainLoop(self.engine.module, bench.space)
        self._examples = self.task.encode(rows)
        self._counts = min(engine_rows, len(rows)), min(loop_rows, len(rows))
        named = self.engine.module.named_parameters()
        self.parameters = sum(p.numel() for name, p in named if "embed" not in name)

    def batch_of_one(self, example: Example) -> dict[str, Tensor]:
        """Return one instance as the plain loop takes it."""
        return self.task.collate([example])

    def padded_of_one(self, example: Example) -> dict[str, Tensor]:
        """Return one instance as the literal loop takes it."""
        token = int(self.task.tokenizer.pad_token_id)
        return pad(self.task.collate([example]), max(PADDED, example.tokens), token)

    def warm_up(self) -> None:
        """Let every path allocate and choose its kernels once."""
        for example in self._examples[:3]:
            self.plain(self.batch_of_one(example))
            self.literal(self.padded_of_one(example))
        self.batches.factors(self._rows[:64], self._examples[:64])

    def _turn(
        self, loop: Callable[[Batch], list[Tensor]], batches: Sequence[Batch]
    ) -> tuple[float, float, list[list[Tensor]]]:
        began, used = time.perf_counter(), time.process_time()
        out = [loop(batch) for batch in batches]
        return time.perf_counter() - began, time.process_time() - used, out

    def computed_share(self) -> float:
        """Return the FLOP that the engine computes over 4 x parameters x real tokens, on some of the batches."""
        examples = self._examples[: self._counts[0]]
        lengths = [example.tokens for example in examples]
        batches = batches_by_tokens(lengths, self.batch_tokens)[::4]
        collated = [self.task.collate([examples[i] for i in batch]) for batch in batches]
        tokens = sum(lengths[i] for batch in batches for i in batch)
        return computed_flops(self.engine, collated) / (4 * self.parameters * tokens)

    def round(self, seed: int) -> dict[str, Any]:
        """Time one round.

        Args:
            seed: of the draw of rows.

        Returns:
            Seconds, rows and tokens of each contestant, the peak, and the squared cosines between them.
        """
        many, few = self._counts
        drawn = np.random.default_rng(seed).choice(len(self._examples), many, replace=False).tolist()
        drawn.sort(key=lambda i: self._examples[i].tokens)
        examples = [self._examples[i] for i in drawn]
        chosen = [int((i + 0.5) * many / few) for i in range(few)]
        batches = batches_by_tokens([e.tokens for e in examples], self.batch_tokens)
        ones = [self.batch_of_one(examples[i]) for i in chosen]
        padded = [self.padded_of_one(examples[i]) for i in chosen]
        factors: dict[int, NDArray[np.float32]] = {}
        singles: dict[str, dict[int, list[Tensor]]] = {"plain": {}, "literal": {}}
        spent = {"engine": 0.0, "plain": 0.0, "literal": 0.0}
        cpu = dict(spent)
        best: Sequence[float] = peak()
        for turn in range(_TURNS):
            at = [i for batch in batches[turn::_TURNS] for i in batch]
            began, used = time.perf_counter(), time.process_time()
            found, _ = self.batches.factors([self._rows[drawn[i]] for i in at], [examples[i] for i in at])
            spent["engine"] += time.perf_counter() - began
            cpu["engine"] += time.process_time() - used
            factors.update(zip(at, found.values, strict=True))
            for name, loop, given in (("plain", self.plain, ones), ("literal", self.literal, padded)):
                seconds, worked, out = self._turn(loop, given[turn::_TURNS])
                spent[name] += seconds
                cpu[name] += worked
                singles[name].update(zip(chosen[turn::_TURNS], out, strict=True))
        best = [max(pair) for pair in zip(best, peak(), strict=True)]
        tokens = sum(e.tokens for e in examples)
        counts = {"engine": many, "plain": few, "literal": few}
        per, worked_per = ({name: held[name] / counts[name] for name in counts} for held in (spent, cpu))
        return {
            "rows": {"engine": many, "loops": few},
            "tokens": {"engine": tokens, "loops": sum(examples[i].tokens for i in chosen)},
            "seconds_per_instance": per,
            "cpu_per_instance": worked_per,
            "peak_flops": best[0],
            "peak_flops_cpu": best[1],
            "engine_flops_cpu": 4 * self.parameters * tokens / cpu["engine"],
            "engine_flops": 4 * self.parameters * tokens / spent["engine"],
            "cosines": {name: self._cosines(factors, found) for name, found in singles.items()},
        }

    def _cosines(self, factors: Mapping[int, NDArray[np.float32]], found: Mapping[int, list[Tensor]]) -> list[float]:
        offsets = self.engine.layout.offsets
        out = []
        for i, vectors in found.items():
            for m, vector in enumerate(vectors):
                u = factors[i][offsets[m] : offsets[m + 1]].astype(np.float64)
                v = vector.double().numpy()
                out.append(float((u @ v) ** 2 / ((u @ u) * (v @ v))))
        return out


def contest(
    rows: Sequence[Row],
    labels: Sequence[str],
    *,
    rounds: int,
    engine_rows: int,
    loop_rows: int,
    patience: Patience,
    model: str | None = None,
) -> dict[str, Any]:
    """Time the engine against the loops; a round that other processes disturbed is repeated.

    Args:
        rows: rows to draw from.
        labels: their labels.
        rounds: undisturbed rounds wanted.
        engine_rows: rows a round for the engine.
        loop_rows: rows a round for each loop.
        patience: waits for a quiet machine.
        model: the base model; None: the embedded one.

    Returns:
        Every round, and the model's facts.
    """
    patience.wait()
    field = Contest(rows, labels, engine_rows, loop_rows, model)
    field.warm_up()
    out: list[dict[str, Any]] = []
    spare = _SPARE_ROUNDS
    while sum(not r["disturbed"] for r in out) < rounds:
        with watching() as watch:
            result = field.round(len(out))
        result |= {"others": watch.others, "disturbed": watch.others > QUIET}
        out.append(result)
        per = result["seconds_per_instance"]
        say(f"round {len(out)}: " + ", ".join(f"{n} {1000 * s:.2f} ms" for n, s in per.items()))
        if result["disturbed"]:
            say(f"other processes used {watch.others:.2f} cores in this round")
            if spare == 0:
                break
            spare -= 1
            patience.wait()
    return {
        "parameters": field.parameters,
        "computed_share": field.computed_share(),
        "batch_tokens": field.batch_tokens,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "model": field.engine.space.model,
        "matrices": len(field.engine.space.matrices),
        "rank": field.engine.space.rank,
        "rounds": out,
    }
