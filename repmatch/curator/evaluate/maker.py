"""Runs the trainings of an evaluation that the store does not have yet, and keeps each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from repmatch.curator.evaluate.candidates import Pool, imbalance
from repmatch.curator.evaluate.results import Trial
from repmatch.datamodels import digest
from repmatch.store.records import stored_object

if TYPE_CHECKING:
    from repmatch.curator.curator import Curator
    from repmatch.curator.evaluate.evaluation import Held
    from repmatch.curator.evaluate.retraining import Outcome, RetrainRecipe
    from repmatch.curator.workbench import Workbench


@dataclass
class Maker:
    """Runs trainings that the store does not have yet, and keeps each.

    Attributes:
        curator: the curator.
        bench: the base model.
        pool: what is chosen from.
        held: the test rows.
        recipe: how selections are trained on.
        labels: every label.
        together: trainings side by side.
        reused: trainings that the store had.
    """

    curator: Curator
    bench: Workbench
    pool: Pool
    held: Held
    recipe: RetrainRecipe
    labels: tuple[str, ...]
    together: int
    reused: int = field(default=0, init=False)

    def run(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the trials with accuracies, in order.

        Args:
            trials: what is to be trained.

        Returns:
            The same, done.
        """
        place = {name: at for at, name in enumerate(self.pool.ids)}
        trials = [replace(t, ids=tuple(sorted(t.ids, key=place.__getitem__))) for t in trials]
        keyed = [replace(t, key=self._key(t)) for t in trials]
        found = self._stored()
        todo: dict[str, Trial] = {t.key: t for t in keyed if t.key not in found}
        self.reused = len({t.key for t in keyed} & set(found))
        if todo:
            self._train(list(todo.values()), found)
        labels = dict(zip(self.pool.ids, self.pool.labels, strict=True))
        tokens = dict(zip(self.pool.ids, self.pool.tokens.tolist(), strict=True))
        return [
            replace(
                t,
                accuracy=float(found[t.key]["accuracy"]),
                tokens=sum(tokens[i] for i in t.ids),
                steps=int(found[t.key]["steps"]),
                imbalance=imbalance([labels[i] for i in t.ids], self.pool.labels),
            )
            for t in keyed
        ]

    def _key(self, trial: Trial) -> str:
        space = self.bench.space
        about = {
            "model": [space.model_fingerprint, space.tokenizer_fingerprint, space.template, space.max_length],
            "matrices": list(space.layout.names),
            "labels": list(self.labels),
            "rows": [self._task_hashes[i] for i in trial.ids],
            "test": self._test_digest,
            "recipe": self.recipe.as_json(),
            "seed": trial.seed,
        }
        return digest(about)

    @property
    def _test_digest(self) -> str:
        return digest([row.task_hash for row in self.held.rows])

    @property
    def _task_hashes(self) -> dict[str, str]:
        if not self._hashes:
            self._hashes.update((row.id, row.task_hash) for row in self.curator.store.tasks(self.pool.dataset))
        return self._hashes

    _hashes: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def _stored(self) -> dict[str, dict[str, Any]]:
        frame = self.curator.store.sql("SELECT arguments, detail FROM runs WHERE command = 'retrain' AND status = 'ok'")
        out = {}
        for arguments, detail in frame.iter_rows():
            out[str(_value(arguments)["key"])] = _value(detail)
        return out

    def _train(self, todo: list[Trial], found: dict[str, dict[str, Any]]) -> None:
        from repmatch.curator.evaluate.retraining import Job, Retrainer

        store, tell = self.curator.store, self.curator.progress
        trainer = Retrainer(self.bench, self.labels, self.recipe)
        task = trainer.task
        wanted = sorted({i for trial in todo for i in trial.ids})
        rows = {row.id: row for row in store.tasks(self.pool.dataset, ids=wanted)}
        examples = dict(zip(rows, task.encode(list(rows.values())), strict=True))
        test = task.encode(list(self.held.rows))
        # Equal seeds and sizes side by side read texts of similar length at the same time.
        todo.sort(key=lambda t: (t.seed, t.size, t.candidate))
        steps, total = self.recipe.steps, self.recipe.steps * len(todo)
        for at in range(0, len(todo), self.together):
            group = todo[at : at + self.together]
            jobs = [Job([examples[i] for i in trial.ids], trial.seed) for trial in group]

            def show(done: int, _: int, at: int = at, count: int = len(group)) -> None:
                if tell is not None:
                    tell("retraining", at * steps + done * count, total)

            outcomes = trainer.retrain(jobs, test, show)
            for trial, outcome in zip(group, outcomes, strict=True):
                found[trial.key] = self._keep(trial, outcome)

    def _keep(self, trial: Trial, outcome: Outcome) -> dict[str, Any]:
        arguments = {
            "key": trial.key,
            "dataset": self.pool.dataset,
            "candidate": trial.candidate,
            "size": trial.size,
            "seed": trial.seed,
            "test_rows": len(self.held.rows),
        }
        detail = {
            "accuracy": outcome.accuracy,
            "steps": outcome.steps,
            "instances_read": outcome.instances_read,
            "tokens_read": outcome.tokens_read,
            "last_loss": outcome.last_loss,
            "seconds": outcome.seconds,
        }
        with self.curator.store.run("retrain", arguments) as run:
            run.detail.update(detail)
        return detail


def _value(held: Any) -> dict[str, Any]:
    value: dict[str, Any] = stored_object(held, "the record of a run") if isinstance(held, str) else dict(held)
    return value
