"""Subset adapters on demand: found in the store, or trained and kept there."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from repmatch.curator.ingest import Progress
from repmatch.curator.settings import Settings
from repmatch.datamodels import Adapter, Space, digest
from repmatch.errors import InputError, StoreError

if TYPE_CHECKING:
    from repmatch.curator.training import Recipe
    from repmatch.store import Store, Subset

logger = logging.getLogger(__name__)


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

    def adapter(self, name: str, *, where: str | None = None) -> Adapter:
        """Return the adapter of a subset, trained if it is not in the store yet.

        It is found again by what it was trained on (ids and contents), in which space and how: rename a subset and
        it is reused, change a row and it is trained anew.

        Args:
            name: a dataset, subset, coreset or DATASET[SQL].
            where: an SQL condition on its dataset's rows that narrows it further.

        Returns:
            The adapter.
        """
        subset = self.store.resolve(name)
        return self.adapter_of(subset if where is None else self.store.narrow(subset, where))

    def adapter_of(self, subset: Subset) -> Adapter:
        """Return the adapter of a subset that may have no name in the store; see `adapter`.

        Args:
            subset: the subset.

        Returns:
            The adapter.

        Raises:
            InputError: it has no instances.
        """
        space = self.space_of(subset.dataset)
        members = self.store.members(subset)
        if not members.ids:
            raise InputError(f"the subset {subset.name} has no instances; an adapter is trained on one or more.")
        recipe = self.recipe.as_json()
        adapter_id = digest({"space": space.id, "members": members.digest, "recipe": recipe})
        found = self.store.adapter(adapter_id)
        return found if found is not None else self._train(adapter_id, subset, space, members.ids, members.digest)

    def _train(self, adapter_id: str, subset: Subset, space: Space, ids: tuple[str, ...], members: str) -> Adapter:
        from repmatch.curator import start, training
        from repmatch.curator.workbench import Workbench

        bench = Workbench.of_space(space, self.settings, self.store)
        dataset, recipe = self.store.dataset(subset.dataset), self.recipe
        task = bench.task(dataset.labels, dataset.fields)
        most = recipe.max_steps * recipe.batch_size
        if len(ids) > most:
            order = start.generator(recipe.seed, "sample").permutation(len(ids))[:most]
            ids = tuple(ids[i] for i in sorted(order.tolist()))
            logger.warning(
                "%s: training on %d instances drawn at random (%d steps of %d)",
                *(subset.name, most, recipe.max_steps, recipe.batch_size),
            )
        examples = task.encode(list(self.store.tasks(subset.dataset, ids=ids)))
        tell = self.progress
        trained = training.train(
            bench.start(dataset.labels),
            space,
            task,
            examples,
            recipe,
            None if tell is None else lambda done, total: tell(f"training on {subset.name}", done, total),
        )
        adapter = Adapter(
            adapter_id, space.id, subset.name, members, recipe.as_json(), trained.record, trained.a, trained.b
        )
        self.store.save_adapter(adapter)
        return adapter
