"""Instance factors on a cluster: windows go out, encoded factors come back, one writer stores them in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repmatch.curator.batches import Batches
from repmatch.curator.cluster.connection import ClusterOptions, connected
from repmatch.curator.cluster.crew import Crew, check_in
from repmatch.curator.settings import Settings
from repmatch.curator.windows import window_tokens, windows
from repmatch.curator.work import LOOK, SIGN_SAMPLE, Work, look, sign_error
from repmatch.datamodels import Adapter, BadRow, Dataset, Encoding, Row, Space
from repmatch.errors import UsageError
from repmatch.store.encoding import RowFormat
from repmatch.store.factors import RawBatch

if TYPE_CHECKING:
    from repmatch.curator.tasks import Example


@dataclass(frozen=True)
class WindowFactors:
    """What comes back of a window.

    Attributes:
        kept: (k,) positions in the window of the rows with a finite factor.
        values: (k, row bytes) uint8, as a segment keeps them.
        losses: (k,) float64.
        tokens: (k,) int32.
        truncated: (k,) bool.
        bad: the other rows.
        detail: what was chosen and measured.
    """

    kept: NDArray[np.int64]
    values: NDArray[np.uint8]
    losses: NDArray[np.float64]
    tokens: NDArray[np.int32]
    truncated: NDArray[np.bool_]
    bad: list[BadRow]
    detail: dict[str, Any]


@dataclass(frozen=True)
class Order:
    """What a worker is told once.

    Attributes:
        space: of the factors.
        settings: where the base model is, and the device.
        dataset: labels, columns, encoding.
        warm: the adapter the space starts from.
        first: the first rows of the ingest, made ready: all workers choose precision and batch size on them.
        threads: of a worker on the CPU.
    """

    space: Space
    settings: Settings
    dataset: Dataset
    warm: Adapter | None
    first: Sequence[Example]
    threads: int


class FactorWorker:
    """Holds the base model on a node and computes windows.

    Args:
        order: what to compute with.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._encoding: Encoding = order.dataset.encoding
        self._form = RowFormat(order.space.layout, self._encoding)

    def hello(self) -> tuple[str, str]:
        """Load the model; return version and node."""
        import torch

        from repmatch.curator.workbench import Workbench

        order = self._order
        bench = Workbench.of_space(order.space, order.settings)
        bench = replace(bench, warm=order.warm, fits_memory=order.settings.batch_tokens is None)
        torch.set_num_threads(order.threads)
        task = bench.task(order.dataset.labels, order.dataset.fields)
        self._batches = Batches(bench.engine(order.dataset.labels, task), task, bench.batch_tokens)
        self._detail = look(self._batches, bench, order.first)
        return check_in()

    def work(self, rows: Sequence[Row], examples: Sequence[Example]) -> WindowFactors:
        """Compute a window.

        Args:
            rows: its rows.
            examples: the same, made ready.

        Returns:
            The factors.
        """
        batch, bad = self._batches.factors(rows, examples)
        places = {row.id: place for place, row in enumerate(rows)}
        detail = dict(self._detail)
        if self._encoding == "sign":
            detail["sign_error"] = sign_error(batch.values[:SIGN_SAMPLE], self._batches.engine.layout)
        return WindowFactors(
            kept=np.array([places[row.id] for row in batch.rows], np.int64),
            values=self._form.encode(batch),
            losses=np.asarray(batch.losses, np.float64),
            tokens=batch.tokens,
            truncated=batch.truncated,
            bad=bad,
            detail=detail,
        )


class ClusterWork(Work):
    """One ingest's factors, computed on a cluster.

    Windows are cut and stored here, in input order, so that the store is what one process makes of it.
    """

    def __init__(self, *given: Any, settings: Settings, options: ClusterOptions) -> None:
        super().__init__(*given)
        if settings.own is not None:
            raise UsageError("--engine ray takes base models; a module of one's own is computed in one process.")
        self._settings = settings
        self._options = options

    @property
    def device(self) -> str:
        """Where workers compute: as asked, and on auto on a GPU only where each is given one."""
        asked = self._settings.device
        if asked != "auto":
            return asked
        gpus = self._options.worker_gpus
        return "cuda" if (gpus or (gpus is None and self._bench.device == "cuda")) else "cpu"

    @property
    def tokens(self) -> int:
        """Tokens of a window, by the workers' kind of device."""
        return window_tokens(replace(self._bench, device=self.device), self.engine)

    def compute(self, total: int) -> tuple[int, int, list[BadRow]]:
        """Compute and store every factor that is missing.

        Args:
            total: how many they are.

        Returns:
            Factors stored, instances among them that were cut, and the rows without a finite factor, or that the task
            refuses.
        """
        refused: list[BadRow] = []
        cut = windows(self._stage.todo(), self.task, self.tokens, refused) if total else iter(())
        foremost = next(cut, None)
        if foremost is None:
            return 0, 0, refused
        self._tell("factors", 0, total)
        done = truncated = 0
        lost: list[BadRow] = []
        form = RowFormat(self._bench.space.layout, self._dataset.encoding)
        gpus = 1.0 if self.device.startswith("cuda") else 0.0
        with connected(self._options) as ray:
            with Crew(ray, FactorWorker, (self._order(foremost[1]),), self._options, gpus) as crew:
                for (rows, _), found in crew.run((window, len(window[0])) for window in chain([foremost], cut)):
                    if len(found.kept):
                        self._store.append_encoded(
                            self._dataset.name, self._bench.space.id, self._dataset.encoding, _raw(rows, found, form)
                        )
                    self.detail = {**found.detail, **self.detail}
                    lost += found.bad
                    truncated += int(found.truncated.sum())
                    done += len(rows)
                    self._tell("factors", done, total)
                self._options.say(crew.summary())
                self.detail["cluster"] = {
                    "died": crew.died,
                    "nodes": {
                        name: {"instances": node.instances, "seconds": round(node.seconds, 3)}
                        for name, node in crew.nodes.items()
                    },
                }
        return done - len(lost), truncated, [*lost, *refused]

    def _order(self, examples: Sequence[Example]) -> Order:
        bench = self._bench
        settings = Settings(model=self._settings.model, device=self.device, batch_tokens=self._settings.batch_tokens)
        first = examples[:LOOK]
        return Order(bench.space, settings, self._dataset, bench.warm, first, self._options.worker_cpus)


def _raw(rows: Sequence[Row], found: WindowFactors, form: RowFormat) -> RawBatch:
    return RawBatch(
        rows=tuple(rows[place] for place in found.kept.tolist()),
        values=np.ascontiguousarray(found.values).reshape(len(found.kept), form.row_bytes),
        losses=tuple(found.losses.tolist()),
        tokens=tuple(found.tokens.tolist()),
        truncated=tuple(found.truncated.tolist()),
    )
