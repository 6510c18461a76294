"""The curator: the main job in a few lines of Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from repmatch.curator import neighbours, scoring, selection
from repmatch.curator.export import write_export
from repmatch.curator.frames import as_sources, dataset_of, frame_of
from repmatch.curator.ingest import IngestOptions, IngestReport, Progress, check_name, ingest
from repmatch.curator.rows import FieldChoice
from repmatch.curator.settings import Settings
from repmatch.curator.shards import Shard
from repmatch.curator.subsets import Trainer
from repmatch.datamodels import Adapter, Encoding, Row
from repmatch.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from numpy.typing import NDArray

    from repmatch.curator.adapter_comparison import AdapterComparison
    from repmatch.curator.adapter_files import ExportedAdapter
    from repmatch.curator.cluster.connection import ClusterOptions
    from repmatch.curator.inspection import Inspection
    from repmatch.curator.planning import Plan
    from repmatch.curator.training import Recipe
    from repmatch.store import Store


class Curator:
    """Ingests, scores, compares, selects and exports on one store.

    Args:
        store: an open store, or the path of one.
        model: base model: a folder, a hub name, or "embedded"; None: the dataset's own, or "embedded" for a new one.
        rank: LoRA rank; None: the dataset's own, or 1.
        targets: endings of the names of the matrices to adapt; None: query and value.
        seed: of the head and of every A; None: the dataset's own, or 0.
        settings: every other setting of the space and the machine.
        recipe: how subset adapters are trained; None: `repmatch.curator.training.Recipe()`.
        progress: called with (stage, done, total or None).
    """

    def __init__(
        self,
        store: Store | str | Path,
        model: str | None = None,
        rank: int | None = None,
        targets: Sequence[str] | None = None,
        seed: int | None = None,
        *,
        settings: Settings | None = None,
        recipe: Recipe | None = None,
        progress: Progress | None = None,
    ) -> None:
        if isinstance(store, str | Path):
            from repmatch.store import open as open_store

            store = open_store(store)
        given = {"model": model, "rank": rank, "targets": None if targets is None else tuple(targets), "seed": seed}
        fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        self.store = store
        self.settings = replace(settings or Settings(), **fields)
        self.progress = progress
        self._recipe = recipe

    @property
    def recipe(self) -> Recipe:
        """How subset adapters are trained."""
        if self._recipe is None:
            from repmatch.curator.training import Recipe

            self._recipe = Recipe()
        return self._recipe

    @property
    def trainer(self) -> Trainer:
        """Gives subset adapters, trained on demand."""
        return Trainer(self.store, self.settings, self.recipe, self.progress)

    def ingest(
        self,
        source: Any,
        dataset: str,
        *,
        fields: FieldChoice | None = None,
        encoding: Encoding | None = None,
        strict: bool = False,
        shard: Shard | str | None = None,
        cluster: ClusterOptions | None = None,
    ) -> IngestReport:
        """Read rows and compute the instance factors that are missing.

        Args:
            source: a file (JSON lines, CSV, Parquet), "-" for standard input, "hf:NAME", or several of them; or a
                frame: polars, pandas, a `datasets.Dataset`, or anything with Arrow's C stream. Of images also a folder
                with a subfolder for each class.
            dataset: name of the dataset to make or extend.
            fields: columns to read; None: id, text, text_pair and label.
            encoding: "float16" (default), "float32" or "sign".
            strict: refuse everything when one row is bad.
            shard: compute this part of the input only, such as "3/8"; see `repmatch.curator.shards`.
            cluster: compute on a Ray cluster, see `repmatch.curator.cluster.connection`; None: in this process.

        Returns:
            Counts, and the rows that were set aside with reasons.
        """
        part = Shard.parse(shard) if isinstance(shard, str) else shard
        options = IngestOptions(fields or FieldChoice(), encoding, strict, part, cluster)
        with as_sources(source) as sources:
            return ingest(self.store, sources, dataset, self.settings, options, self.progress)

    def plan(self, source: Any, *, fields: FieldChoice | None = None, encoding: Encoding | None = None) -> Plan:
        """Predict what an ingest into a new dataset takes; nothing is kept.

        Args:
            source: as for `ingest`.
            fields: columns to read; None: id, text, text_pair and label.
            encoding: "float16" (default), "float32" or "sign".

        Returns:
            Instances a second, time, memory and size of a new store; see `repmatch.curator.planning.Plan`.
        """
        from repmatch.curator.planning import plan

        options = IngestOptions(fields or FieldChoice(), encoding)
        with as_sources(source) as sources:
            return plan(sources, self.settings, options, self.progress, self.store)

    def subset(self, name: str, dataset: str, *, where: str | None = None, ids: Sequence[str] | None = None) -> None:
        """Give a set of a dataset's ids a name.

        Args:
            name: the subset's name.
            dataset: the dataset's name.
            where: an SQL condition on the rows.
            ids: the ids themselves.

        Raises:
            UsageError: neither or both are given, or nothing matches.
        """
        check_name(name)
        if (where is None) == (ids is None):
            raise UsageError("a subset is given by where=... or by ids=..., one of the two.")
        found = list(ids) if ids is not None else self.store.ids(dataset, where=where)
        if not found:
            raise UsageError(f"no instance of {dataset!r} matches {where!r}; a subset needs one or more.")
        self.store.save_subset(name, dataset, found)

    def adapter(self, subset: str) -> Adapter:
        """Return the adapter of a subset, trained if it is not in the store yet."""
        return self.trainer.adapter(subset)

    def export_adapter(self, subset: str, folder: str | Path, *, replace: bool = False) -> ExportedAdapter:
        """Write a subset's adapter as a peft checkpoint; see `repmatch.curator.adapter_files.export_adapter`."""
        from repmatch.curator.adapter_files import export_adapter

        return export_adapter(self.trainer, subset, Path(folder), replace=replace)

    def import_adapter(self, path: str | Path, name: str, *, dataset: str | None = None) -> Adapter:
        """Keep a LoRA checkpoint in the store; see `repmatch.curator.adapter_files.import_adapter`."""
        from repmatch.curator.adapter_files import import_adapter

        return import_adapter(self.store, path, name, dataset=dataset)

    def score(self, dataset: str, *, against: str | None = None, where: str | None = None) -> scoring.Scores:
        """Score a dataset's instances against a subset adapter; see `repmatch.curator.scoring.score`."""
        return scoring.score(self.trainer, dataset, against=against, where=where)

    def compare(self, *names: str) -> scoring.Comparison | AdapterComparison:
        """Compare subsets by their adapters; see `repmatch.curator.scoring.compare`."""
        return scoring.compare(self.trainer, names)

    def nearest(
        self,
        dataset: str,
        instance: str | None = None,
        *,
        text: str | None = None,
        text_pair: str | None = None,
        label: str | None = None,
        k: int = 10,
        signed: bool = False,
        where: str | None = None,
        ensemble: Sequence[str] = (),
    ) -> neighbours.Neighbours:
        """Find the nearest instances to a stored one by id, or to a new text.

        Args:
            dataset: the dataset's name.
            instance: the user's id.
            text: a new text, in place of an id; for a dataset of conversations also the messages as JSON text.
            text_pair: its second text, for a dataset of pairs; not needed behind a whole conversation.
            label: its label; None: each of the dataset's labels is tried and the best counts.
            k: how many.
            signed: by the cosine of the two ΔW in place of the RepMatch score.
            where: an SQL condition that the found instances meet.
            ensemble: datasets that hold the same ids from other starts, for stored instances: scores are means.

        Returns:
            The neighbours, best first.
        """
        if (instance is None) == (text is None):
            raise UsageError("give the id of an instance, or a text: one of the two.")
        if instance is not None:
            if text_pair is not None or label is not None:
                raise UsageError("--text-pair and --label go with --text, not with an id.")
            return self.nearest_all(dataset, [instance], k=k, signed=signed, where=where, ensemble=ensemble)[0]
        if ensemble:
            raise UsageError("--ensemble goes with ids, not with --text.")
        row = Row("", "{}", text or "", text_pair, label or "", "", "", "", 0)
        return neighbours.nearest_to_text(self.store, dataset, row, self.settings, k=k, signed=signed, where=where)

    def nearest_all(
        self,
        dataset: str,
        ids: Sequence[str],
        *,
        k: int = 10,
        signed: bool = False,
        where: str | None = None,
        ensemble: Sequence[str] = (),
        **no: Any,
    ) -> list[neighbours.Neighbours]:
        """Find the nearest instances to each of many stored ones in one pass; see `nearest`."""
        if any(value is not None for value in no.values()):
            raise UsageError("--text, --text-pair and --label go with no id; give ids or a text, not both.")
        device = self.settings.device
        return neighbours.nearest_to_ids(
            self.store, dataset, ids, k=k, signed=signed, where=where, device=device, ensemble=ensemble
        )

    def select(
        self,
        dataset: str,
        k: int | str | None = None,
        options: selection.SelectOptions | None = None,
        *,
        cluster: ClusterOptions | None = None,
        **changes: Unpack[selection.SelectArguments],
    ) -> selection.Selected:
        """Choose a coreset and keep it in the store.

        Args:
            dataset: the dataset's name, or a part of it such as "reviews[stars > 2]".
            k: picks, or a share such as "5%"; None: what `options` say, or as many as the rules allow.
            options: everything that can be asked of a selection; None: the defaults.
            cluster: do the first of two rounds on a Ray cluster (facility-location, herding); None: in this process.
            **changes: fields of `SelectOptions` that differ from `options`, such as strategy, balance, name or budget.

        Returns:
            The coreset, which can be exported.
        """
        chosen = replace(options or selection.SelectOptions(), **changes)
        if k is not None:
            chosen = replace(chosen, k=k)
        if chosen.name is not None:
            check_name(chosen.name)
        return selection.select(self.store, dataset, chosen, self._scores_of, self._embed, self.progress, cluster)

    def _scores_of(self, dataset: str) -> dict[str, float]:
        scores = self.score(dataset)
        return dict(zip(scores.ids, scores.scores.tolist(), strict=True))

    def _embed(self, dataset: str, ids: Sequence[str]) -> NDArray[np.float32]:
        from repmatch.curator.embeddings import embeddings

        return embeddings(self, dataset, ids)

    def inspect(self, dataset: str, instance: str, *, k: int = 5) -> Inspection:
        """Explain one instance; see `repmatch.curator.inspection.inspect`."""
        from repmatch.curator.inspection import inspect

        return inspect(self.store, dataset, instance, k=k)

    def frame(self, name: str, *, with_scores: bool = False) -> pl.DataFrame:
        """Return a coreset's or dataset's rows as a polars frame; see `repmatch.curator.frames.frame_of`."""
        return frame_of(self.store, name, with_scores=with_scores)

    def to_dataset(self, name: str, *, with_scores: bool = False) -> Any:
        """Return a coreset's or dataset's rows as a `datasets.Dataset`; see `repmatch.curator.frames.dataset_of`."""
        return dataset_of(self.store, name, with_scores=with_scores)

    def report(self, path: str | Path, *datasets: str, force: bool = False, **options: Any) -> dict[str, Any]:
        """Write a report; see `repmatch.curator.report.page.write_report`; `options` are fields of `ReportOptions`."""
        from repmatch.curator.report.gather import ReportOptions
        from repmatch.curator.report.page import write_report

        return write_report(self.store, Path(path), ReportOptions(datasets, **options), self.progress, force=force)

    def export(
        self, name: str, path: str | Path, *, with_scores: bool = False, card: bool = False, force: bool = False
    ) -> dict[str, Any]:
        """Write a coreset's or dataset's rows and a manifest; see `repmatch.curator.export.write_export`."""
        return write_export(self.store, name, Path(path), with_scores=with_scores, card=card, force=force)
