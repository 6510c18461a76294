"""What the commands share: the store's path, the output sink, options spelled once, examples in the help."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from repmatch.config import origin_of_refused
from repmatch.errors import RepMatchError
from repmatch.output import LogHandler, Output

if TYPE_CHECKING:
    from repmatch.curator.cluster.connection import ClusterOptions
    from repmatch.curator.curator import Curator
    from repmatch.curator.settings import Settings
    from repmatch.store import Store

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

DEFAULT_STORE = "repmatch-store"


class Context:
    """What every command shares: the store's path and the output sink.

    Args:
        store: path of the store.
        quiet: no progress and no hints.
    """

    def __init__(self, store: Path, quiet: bool) -> None:
        self.path = store
        self.output = Output(quiet=quiet)
        self._handler = LogHandler(self.output)
        logging.getLogger("repmatch").addHandler(self._handler)

    def close(self) -> None:
        """End the progress bar and let go of the log, so that a later caller's streams are its own."""
        self.output.close()
        logging.getLogger("repmatch").removeHandler(self._handler)

    def open(self, *, as_json: bool = False, wait: float = 0.0, mode: Literal["r", "w"] | None = None) -> Store:
        """Open the store.

        Args:
            as_json: data as JSON.
            wait: seconds to wait for another writer.
            mode: "r": never write; None: read and write.

        Returns:
            The store.
        """
        from repmatch.store import open as open_store

        self.output.as_json = as_json
        return open_store(self.path, mode=mode, wait=wait)

    def curator(
        self, store: Store, made: Settings | None = None, *, epochs: int | None = None, **settings: Any
    ) -> Curator:
        """Build a curator that shows its progress.

        Args:
            store: an open store.
            made: settings that are made already.
            epochs: of subset training, None: the default.
            settings: fields of `repmatch.curator.settings.Settings`.

        Returns:
            The curator.
        """
        from repmatch.curator.curator import Curator
        from repmatch.curator.settings import Settings

        recipe = None
        if epochs is not None:
            from repmatch.curator.training import Recipe

            recipe = Recipe(epochs=epochs)
        return Curator(store, settings=made or Settings(**settings), recipe=recipe, progress=self.output.progress)


def pass_context(function: Callable[..., T]) -> Callable[..., T]:
    """Give a command what all share as its first argument, and say where a value stands that was not typed.

    Args:
        function: a command's function.

    Returns:
        The function without that argument.
    """

    @wraps(function)
    def call(*arguments: Any, **given: Any) -> T:
        current = click.get_current_context()
        try:
            return current.invoke(function, current.find_object(Context), *arguments, **given)
        except RepMatchError as error:
            error.origin = origin_of_refused(error, current)
            raise

    return call


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON in place of a table.")
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    envvar="REPMATCH_DEVICE",
    show_envvar=True,
    help="Where to compute: auto, cpu, cuda, cuda:N or mps.",
)
model_option = click.option(
    "--model",
    envvar="REPMATCH_MODEL",
    show_envvar=True,
    help="Base model: a folder, a hub name (org/model or org/model@revision), or 'embedded'.  "
    "[default: the dataset's own; 'embedded' for a new one]",
)
wait_option = click.option(
    "--wait", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Seconds to wait for another writer."
)
_CLUSTER: tuple[Callable[[F], F], ...] = (
    click.option(
        "--engine",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Compute in this process, or on a Ray cluster.",
    ),
    click.option(
        "--address",
        metavar="HOST:PORT",
        help="Of the Ray cluster; 'auto' for the one this machine belongs to.  [default: RAY_ADDRESS, or this machine "
        "alone]",
    ),
    click.option("--workers", type=int, help="Processes on the cluster.  [default: as many as there is room for]"),
    click.option("--worker-cpus", type=int, help="Cores of a worker.  [default: 1]"),
    click.option("--worker-gpus", type=float, help="GPUs of a worker.  [default: 1 with --device cuda, else 0]"),
)


def cluster_options(function: F) -> F:
    """Add the options that say where the work is done.

    Args:
        function: a command.

    Returns:
        The command.
    """
    for option in reversed(_CLUSTER):
        function = option(function)
    return function


def cluster_of(given: dict[str, Any], output: Output) -> ClusterOptions | None:
    """Take the options of `cluster_options` out of a command's.

    Args:
        given: values by name; those of the cluster are taken out.
        output: told of throughput and of workers that died.

    Returns:
        The cluster, None: this process.

    Raises:
        UsageError: an option of the cluster without --engine ray.
    """
    from repmatch.errors import UsageError

    names = ("address", "workers", "worker_cpus", "worker_gpus")
    asked = {name: value for name in names if (value := given.pop(name)) is not None}
    if given.pop("engine") == "local":
        if asked:
            raise UsageError(f"--{next(iter(asked)).replace('_', '-')} goes with --engine ray.")
        return None
    from repmatch.curator.cluster.connection import ClusterOptions

    return ClusterOptions(**asked, notice=output.hint)


ensemble_option = click.option(
    "--ensemble",
    metavar="DATASET",
    multiple=True,
    help="The same rows from another start: likeness is the mean over all. Repeatable.",
)

epochs_option = click.option(
    "--epochs",
    type=click.IntRange(min=1),
    help="Passes over a subset when its adapter is trained.  [default: 3, up to 600 steps of 32 instances]",
)


def examples(text: str) -> Callable[[F], F]:
    """Add working examples to a command's help.

    Args:
        text: command lines, one a line.

    Returns:
        A decorator.
    """

    def add(function: F) -> F:
        lines = "\n".join(f"  {line.strip()}" for line in text.strip().splitlines())
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n\b\nExample:\n{lines}\n"
        return function

    return add
