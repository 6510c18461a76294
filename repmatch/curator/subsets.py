"""Subset adapters on demand: found in the store, or trained and kept there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from repmatch.curator.ingest import Progress
from repmatch.curator.settings import Settings
from repmatch.datamodels import Adapter, Space, digest
from repmatch.errors import InputError, StoreError

if TYPE_CHECKING:
    from repmatch.curator.training import Recipe, Trained
    from repmatch.curator.workbench import Workbench
    from repmatch.store import Store, Subset

logger = logging.getLogger(__name__)


# Subset adapters trained in one pass: a batch each is in memory.
_SIDE_BY_SIDE = 8


@dataclass(frozen=True)
class _Wanted:
    """An adapter that is asked for: its id, the subset, its space, ids and the digest of its members."""

    id: str
    subset: Subset
    space: Space
    ids: tuple[str, ...]
    members: str


@dataclass(frozen=True)
class Trainer:
    """Gives the subset adapter of any name: a dataset, a subset, a coreset or DATASET[SQL].

    Attributes:
        store: where adapters are kept.
        settings: where to find the model, the device, the batch size.
        recipe: how adapters are trained.
        progress: called with (stage, done, total or None).
    """

    store: Store
    settings: Settings
    recipe: Recipe
    progress: Progress | None = None

    def space_of(self, dataset: str) -> Space:
        """Return the space of a dataset's factors.

        Args:
            dataset: its name.

        Returns:
            The space.

        Raises:
            StoreError: it has no factors yet.
        """
        space_id = self.store.dataset(dataset).space_id
        if space_id is None:
            raise StoreError(
                f"the dataset {dataset!r} has no factors yet; run: repmatch ingest FILE --dataset {dataset}"
            )
        return self.store.space(space_id)

    def adapter(self, name: str, *, where: str | None = None, space: Space | None = None) -> Adapter:
        """Return the adapter of a subset, trained if it is not in the store yet.

        It is found again by what it was trained on (ids and contents), in which space and how: rename a subset and
        it is reused, change a row and it is trained anew.

        Args:
            name: a dataset, subset, coreset or DATASET[SQL].
            where: an SQL condition on its dataset's rows that narrows it further.
            space: another space than that of the dataset's factors, which the store must know.

        Returns:
            The adapter.
        """
        subset = self.store.resolve(name)
        return self.adapter_of(subset if where is None else self.store.narrow(subset, where), space)

    def adapter_of(self, subset: Subset, space: Space | None = None) -> Adapter:
        """Return the adapter of a subset that may have no name in the store; see `adapter`.

        Args:
            subset: the subset.
            space: see `adapter`.

        Returns:
            The adapter.

        Raises:
            InputError: it has no instances.
        """
        wanted = self._wanted(subset, space)
        found = self.store.adapter(wanted.id)
        return found if found is not None else self._train(wanted)

    def adapters(self, names: Sequence[str]) -> list[Adapter]:
        """Return the adapters of several subsets; those that are missing are trained side by side, in one pass.

        Args:
            names: datasets, subsets, coresets or DATASET[SQL]s.

        Returns:
            The adapters, in order.
        """
        wanted = [self._wanted(self.store.resolve(name)) for name in names]
        missing = {w.id: w for w in wanted if self.store.adapter(w.id) is None}
        alike: dict[tuple[str, str], list[_Wanted]] = {}
        for w in missing.values():
            alike.setdefault((w.space.id, w.subset.dataset), []).append(w)
        for group in alike.values():
            for at in range(0, len(group), _SIDE_BY_SIDE):
                self._train_group(group[at : at + _SIDE_BY_SIDE])
        found = [self.store.adapter(w.id) for w in wanted]
        return [adapter for adapter in found if adapter is not None]

    def _wanted(self, subset: Subset, space: Space | None = None) -> _Wanted:
        space = space or self.space_of(subset.dataset)
        members = self.store.members(subset)
        if not members.ids:
            raise InputError(f"the subset {subset.name} has no instances; an adapter is trained on one or more.")
        adapter_id = digest({"space": space.id, "members": members.digest, "recipe": self.recipe.as_json()})
        return _Wanted(adapter_id, subset, space, members.ids, members.digest)

    def _examples(self, wanted: _Wanted, task: Any) -> list[Any]:
        """The subset made ready, or as much of it as the recipe will read."""
        ids, recipe = wanted.ids, self.recipe
        most = recipe.max_steps * recipe.batch_size
        if len(ids) > most:
            from repmatch.curator import start

            order = start.generator(recipe.seed, "sample").permutation(len(ids))[:most]
            ids = tuple(ids[i] for i in sorted(order.tolist()))
            logger.warning(
                "%s: training on %d instances drawn at random (%d steps of %d)",
                *(wanted.subset.name, most, recipe.max_steps, recipe.batch_size),
            )
        encoded: list[Any] = task.encode(list(self.store.tasks(wanted.subset.dataset, ids=ids)))
        return encoded

    def _bench(self, wanted: _Wanted) -> tuple[Workbench, Any, tuple[str, ...]]:
        from repmatch.curator.workbench import Workbench

        bench = Workbench.of_space(wanted.space, self.settings, self.store)
        dataset = self.store.dataset(wanted.subset.dataset)
        return bench, bench.task(dataset.labels, dataset.fields), dataset.labels

    def _tick(self, name: str) -> Callable[[int, int], None] | None:
        return None if self.progress is None else partial(self.progress, f"training on {name}")

    def _train(self, wanted: _Wanted) -> Adapter:
        from repmatch.curator import training

        bench, task, labels = self._bench(wanted)
        examples = self._examples(wanted, task)
        trained = training.train(
            bench.start(labels), wanted.space, task, examples, self.recipe, self._tick(wanted.subset.name)
        )
        return self._keep(wanted, trained)

    def _train_group(self, group: Sequence[_Wanted]) -> None:
        from repmatch.curator.side_by_side import Job, train_side_by_side

        if len(group) == 1:
            self._train(group[0])
            return
        bench, task, labels = self._bench(group[0])
        jobs = [Job(self._examples(wanted, task), self.recipe) for wanted in group]
        tick = self._tick(f"{len(group)} subsets")
        found = train_side_by_side(bench.start(labels), group[0].space, task, jobs, tick)
        for wanted, trained in zip(group, found, strict=True):
            self._keep(wanted, trained)

    def _keep(self, wanted: _Wanted, trained: Trained) -> Adapter:
        adapter = Adapter(
            *(wanted.id, wanted.space.id, wanted.subset.name, wanted.members),
            *(self.recipe.as_json(), trained.record, trained.a, trained.b),
        )
        self.store.save_adapter(adapter)
        return adapter
