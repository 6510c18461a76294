"""The command `repmatch select`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from repmatch.completion import complete_dataset
from repmatch.context import (
    Context,
    cluster_of,
    cluster_options,
    device_option,
    ensemble_option,
    examples,
    json_option,
    model_option,
    pass_context,
    wait_option,
)
from repmatch.output import Output, shorten

if TYPE_CHECKING:
    from repmatch.curator.selection import Selected

SHOWN = 10  # picks in the table


class Pair(click.ParamType[tuple[str, float]]):
    """NAME=NUMBER."""

    name = "NAME=NUMBER"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """Return the name and the number."""
        name, _, number = str(value).rpartition("=")
        try:
            found = name.strip(), float(number)
        except ValueError:
            found = "", 0.0
        return found if found[0] else self.fail(f"{value!r} is not NAME=NUMBER, such as trade=1.5", param, ctx)


class Quota(click.ParamType[tuple[str, str, int]]):
    """FIELD=VALUE:N."""

    name = "FIELD=VALUE:N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str, int]:
        """Return the column, its value and the count."""
        field, equals, rest = str(value).partition("=")
        wanted, colon, count = rest.rpartition(":")
        if not (field and equals and colon and count.isdecimal()):
            self.fail(f"{value!r} is not FIELD=VALUE:N, such as label=positive:20", param, ctx)
        return field, wanted, int(count)


@click.command()
@click.argument("dataset", shell_complete=complete_dataset)
@click.option("-k", "k", metavar="N|P%", help="Picks, or a share such as 5%; may be left out where a rule ends it.")
@click.option("--strategy", default="facility-location", show_default=True, help="How to choose; see below.")
@click.option("--algorithm", default="auto", show_default=True, help="How a strategy finds its picks; see below.")
@click.option("--balance", metavar="FIELD", help="Equal counts for every value of this column.")
@click.option("--stratify", metavar="FIELD", help="Keep the dataset's proportions of this column.")
@click.option("--at-least", type=Quota(), multiple=True, help="Fewest picks of a value: label=spam:20. Repeatable.")
@click.option("--at-most", type=Quota(), multiple=True, help="Most picks of a value. Repeatable.")
@click.option("--represent", metavar="SET", help="What the picks stand for, such as a dev set.  [default: DATASET]")
@click.option("--given", metavar="SET", help="There already: pick what represents what SET does not.")
@click.option("--include", metavar="SET", help="Picked first; with a coreset and a larger -k, extends it.")
@click.option("--exclude", metavar="SET", help="Never picked.")
@click.option("--budget", type=float, metavar="X", help="What all picks may cost together.")
@click.option("--cost", default="tokens", show_default=True, metavar="tokens|FIELD", help="What a pick costs.")
@click.option("--min-gain", type=float, metavar="X", help="Stop before a pick that gains less.")
@click.option("--coverage", type=float, metavar="SHARE", help="Stop at this share of what the whole dataset reaches.")
@click.option("--apart", type=float, metavar="S", help="No two picks are more similar than this.")
@click.option("--matrices", metavar="PATTERN", multiple=True, help="Matrices that count: '*.value'. Repeatable.")
@click.option(
    "--features", metavar="FIELD", multiple=True, help="Columns for feature-coverage. Repeatable.  [default: texts]"
)
@click.option("--signed", is_flag=True, help="By the cosine of the weight changes: opposite instances differ.")
@click.option(
    "--kernel",
    type=click.Choice(["repmatch", "embeddings", "joined"]),
    default="repmatch",
    show_default=True,
    help="What is alike: what rows teach, what they are about, or both.",
)
@ensemble_option
@click.option("--mix", type=Pair(), multiple=True, help="A weight of --strategy mixture, such as top=0.5. Repeatable.")
@click.option("--param", type=Pair(), multiple=True, help="A strategy's own number, such as trade=1.5. Repeatable.")
@click.option("--name", help="Name of the coreset.  [default: made from the arguments]")
@click.option("--replace", is_flag=True, help="Replace a coreset of that name.")
@cluster_options
@click.option("--seed", type=int, default=0, show_default=True, help="For strategies that draw.")
@model_option
@device_option
@wait_option
@json_option
@pass_context
@examples(
    """
    repmatch select reviews -k 100 --balance label --name core
    repmatch select reviews --budget 20000 --apart 0.5
    repmatch select pool -k 200 --represent dev --given labelled
    repmatch select reviews -k 5% --strategy random --stratify label --seed 7
    repmatch select reviews -k 100 --kernel joined
    repmatch select tweets -k 10 --ensemble tweets-2
    repmatch select reviews -k 100 --engine ray
    """
)
def select(context: Context, /, dataset: str, as_json: bool, wait: float, **given: Any) -> None:
    """Choose a coreset of DATASET and keep it under a name.

    \b
    Strategies:
      facility-location   picks that together resemble every instance (greedy, with a certificate)
      k-medoids           the same, improved by swaps
      graph-cut           picks that resemble all and differ from each other (--param trade=2)
      saturated-coverage  all picks together cover every instance up to a limit (--param saturation=0.1)
      herding             picks whose mean is that of all
      k-center            no instance is far from a pick
      dpp                 picks that span a large volume (--param ridge=1e-6)
      feature-coverage    picks in which every word occurs, rare ones count more (--features)
      mixture             a weighted sum: --mix facility-location=1 --mix top=0.5
      thin                rows in their order, none too similar to an earlier pick (--apart)
      top                 highest score against the whole dataset's adapter, trained on demand
      random              by chance

    \b
    Algorithms of facility-location (auto chooses by size and memory):
      incremental, pruned, lazy   exact, the same picks: whole kernel kept; one pass; columns as needed
      sparse, partitioned         nearest neighbours only; in parts, for very many instances
      stochastic                  a sample of candidates a pick

    Kernels: repmatch compares factors; embeddings compares mean-pooled embeddings of the same model, made when first
    asked for and kept in the store; joined adds both, each with the same weight on average.

    DATASET may be a part of one, "reviews[stars > 2]". A SET is a dataset, a subset, a coreset or "DATASET[SQL]".
    Ctrl-C keeps the picks made so far.
    """  # noqa: D301 -- click reads the backspace: keep these lines apart
    from repmatch.curator.selection import composition

    settings = {name: given.pop(name) for name in ("model", "device")}
    output = context.output
    cluster = cluster_of(given, output)
    with context.open(as_json=as_json, wait=wait) as store:
        found = context.curator(store, **settings).select(dataset, cluster=cluster, **_arguments(given))
        labels = composition(store, found.coreset.dataset, found.ids)
        first = found.ids[:SHOWN]
        texts = {} if as_json else {row.id: row for row in store.tasks(found.coreset.dataset, ids=first)}
    for note in found.selection.notes:
        output.warn(note)
    if as_json:
        for rank, name, gain, represents, value in found.to_polars().iter_rows():
            output.json({"rank": rank, "id": name, "gain": gain, "represents": represents, "value": value})
    else:
        _show(output, found, labels, texts)
    if not found.selection.complete:
        output.hint(f"kept as {found.name}, which is complete as far as it goes")
        raise click.exceptions.Exit(130)


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options as `SelectOptions` wants them."""
    quotas = {name: given.pop(name) for name in ("at_least", "at_most")}
    fields = sorted({field for some in quotas.values() for field, _, _ in some})
    if len(fields) > 1:
        raise click.UsageError(f"--at-least and --at-most speak of one column; got {' and '.join(fields)}.")
    mix, parameters = dict(given.pop("mix")), dict(given.pop("param"))
    if mix and given["strategy"] == "facility-location":
        given["strategy"] = "mixture"
    plain = {name: value for name, value in given.items() if value is not None}
    counts = {kind: {value: count for _, value, count in some} for kind, some in quotas.items()}
    field = {"quota_field": fields[0]} if fields else {}
    return {**plain, **counts, **field, "mix": mix, "parameters": parameters}


def _show(output: Output, found: Selected, labels: dict[str, tuple[int, int]], texts: dict[str, Any]) -> None:
    rows = [row[:4] for row in found.to_polars().iter_rows()]
    shown = [(*row, texts[row[1]].label, shorten(texts[row[1]].text, 48)) for row in rows[:SHOWN]]
    output.table(["rank", "id", "gain", "represents", "label", "text"], shown)
    if len(rows) > SHOWN:
        output.line(f"and {len(rows) - SHOWN} more")
    if any(labels):  # a task may have none
        output.line("labels: " + ", ".join(f"{label} {picked} of {whole}" for label, (picked, whole) in labels.items()))
    selection = found.selection
    if selection.certainty is not None:
        output.line(f"objective {selection.value:.4f}: at least {selection.certainty:.1%} of the best possible")
    if selection.cost is not None:
        output.line(f"cost {selection.cost:g} of {found.coreset.arguments['budget']:g}, {len(rows)} picks")
    because = f": {selection.reason}" if selection.reason else ""
    output.line(f"found by {selection.strategy}, {selection.algorithm}{because}")
    output.line(f"kept as {found.name}")
    output.hint(f"next: repmatch export {found.name} -o {found.name}.jsonl")
