"""The command line: thin commands that parse, call one library function and render."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from repmatch import __version__
from repmatch.context import (
    DEFAULT_STORE,
    Context,
    device_option,
    epochs_option,
    examples,
    json_option,
    model_option,
    pass_context,
    wait_option,
)
from repmatch.errors import RepMatchError, UsageError
from repmatch.output import Output

DETAILED = {"max_content_width": 110, "help_option_names": ["-h", "--help"]}


@click.group(context_settings=DETAILED)
@click.option(
    "--store",
    type=click.Path(path_type=Path, file_okay=True),
    default=DEFAULT_STORE,
    show_default=True,
    envvar="REPMATCH_STORE",
    show_envvar=True,
    help="Folder of the adapter store.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress and no hints on standard error.")
@click.version_option(__version__, prog_name="repmatch", message="%(prog)s %(version)s")
@click.pass_context
@examples(
    """
    repmatch ingest reviews.jsonl --dataset reviews
    repmatch select reviews -k 5% --name core
    repmatch export core -o core.jsonl
    """
)
def cli(context: click.Context, store: Path, quiet: bool) -> None:
    """Choose training data by what a model learns from it.

    Every instance becomes a LoRA adapter of one training step, kept in a store; RepMatch scores compare them; coresets
    represent a dataset by a few of its rows. Data goes to standard output, everything else to standard error.
    """
    context.obj = Context(store, quiet)


@cli.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--dataset", required=True, help="Name of the dataset to make or extend.")
@click.option("--id-field", help="Column with the id.  [default: id, where rows have it; else a digest of the row]")
@click.option("--text-field", help="Column with the text.  [default: text]")
@click.option("--text-pair-field", help="Column with a second text.  [default: text_pair, where rows have it]")
@click.option("--label-field", help="Column with the label.  [default: label]")
@model_option
@click.option("--rank", type=int, help="LoRA rank.  [default: the dataset's own; 1 for a new one]")
@click.option(
    "--targets",
    help="Matrices to adapt: endings of module names or regular expressions, comma between.  "
    "[default: query and value of every layer]",
)
@click.option("--max-length", type=int, help="Tokens kept of an instance.  [default: 256, or what the model reads]")
@click.option("--batch-tokens", type=int, help="Padded tokens a batch may hold.  [default: by device]")
@device_option
@click.option(
    "--encoding",
    type=click.Choice(["float16", "float32", "sign"]),
    help="How factors are kept; sign takes 1 bit a number (rank 1).  [default: float16]",
)
@click.option("--seed", type=int, help="Of the head and of every A.  [default: 0]")
@click.option("--strict", is_flag=True, help="Refuse everything when one row is bad.")
@wait_option
@json_option
@pass_context
@examples(
    """
    repmatch ingest reviews.jsonl --dataset reviews
    repmatch ingest pairs.csv --dataset pairs --text-field premise --text-pair-field hypothesis
    cat more.jsonl | repmatch ingest - --dataset reviews
    """
)
def ingest(context: Context, /, files: tuple[str, ...], dataset: str, as_json: bool, **given: Any) -> None:
    """Put rows and their instance factors into the store.

    FILE is JSON lines, CSV, TSV or Parquet, '-' for JSON lines on standard input, or hf:NAME for a dataset of the
    Hugging Face hub. Run it again after an interruption and it goes on; unchanged rows cost nothing, changed ones are
    computed again, new ones are added. Bad rows are listed with their reasons and left out, and the exit code is 1.
    """
    from repmatch.curator.rows import FieldChoice

    targets = given.pop("targets")
    fields = FieldChoice(**{name: given.pop(name) for name in _FIELDS})
    encoding, strict, wait = given.pop("encoding"), given.pop("strict"), given.pop("wait")
    with context.open(as_json=as_json, wait=wait) as store:
        curator = context.curator(store, targets=_names(targets), **given)
        report = curator.ingest(list(files), dataset, fields=fields, encoding=encoding, strict=strict)
    output = context.output
    output.close()
    for row in report.bad:
        output.warn(f"{row.source}:{row.line}: {row.reason}")
    if report.quarantined > len(report.bad):
        output.warn(f"and {report.quarantined - len(report.bad)} bad rows more; repmatch info lists counts")
    if report.truncated:
        output.hint(f"{report.truncated} instances were longer than the maximum length and cut there.")
    if as_json:
        output.json(report.as_json())
    else:
        output.line(
            f"{dataset}: {report.rows} rows read: {report.new} new, {report.unchanged} unchanged, {report.changed} "
            f"changed, {report.quarantined} quarantined; {report.computed} factors in {report.seconds:.1f} s"
        )
    if report.quarantined:
        raise SystemExit(1)


_FIELDS = ("id_field", "text_field", "text_pair_field", "label_field")


def _names(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise UsageError(f"--targets {text!r} names nothing; expected endings of module names such as query,value.")
    return names


@cli.command()
@click.argument("dataset")
@click.option("--against", metavar="SUBSET", help="A dataset, subset, coreset or 'DATASET[SQL]'.  [default: DATASET]")
@click.option(
    "--where", metavar="SQL", help="Train the subset adapter on the rows that match, such as \"label = 'x'\"."
)
@click.option("--limit", type=click.IntRange(min=1), default=10, show_default=True, help="Rows of the table.")
@epochs_option
@model_option
@device_option
@wait_option
@json_option
@pass_context
@examples(
    """
    repmatch score reviews
    repmatch score reviews --where "label = 'positive'" --json > scores.jsonl
    """
)
def score(context: Context, /, dataset: str, against: str | None, where: str | None, limit: int, **given: Any) -> None:
    """Score instances of DATASET against a subset adapter, best first.

    The subset adapter (the whole dataset's by default) is trained on demand, kept and used again.
    """
    as_json, wait = given.pop("as_json"), given.pop("wait")
    with context.open(as_json=as_json, wait=wait) as store:
        found = context.curator(store, **given).score(dataset, against=against, where=where)
    output = context.output
    if as_json:
        for name, value in zip(found.ids, found.scores.tolist(), strict=True):
            output.json({"id": name, "score": value})
        return
    record = found.adapter.record
    output.line(f"{len(found.ids)} instances of {dataset} against {found.against}, best first")
    output.table(
        ["rank", "id", "score"],
        [(i + 1, found.ids[i], float(found.scores[i])) for i in range(min(limit, len(found.ids)))],
    )
    output.line("")
    means = found.per_matrix.mean(axis=0)
    output.table(["matrix", "mean score"], [(n, float(v)) for n, v in zip(found.matrices, means, strict=True)])
    output.line(f"mean {float(found.scores.mean()):.4f}; unrelated directions would score {found.chance:.4f}")
    output.hint(
        f"adapter: {record['steps']} steps on {record['instances']} instances, loss {record['first_loss']:.3f} to "
        f"{record['last_loss']:.3f}, {record['seconds']:.0f} s when it was trained"
    )


@cli.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME NAME...")
@epochs_option
@model_option
@device_option
@wait_option
@json_option
@pass_context
@examples(
    """
    repmatch compare reviews tweets
    repmatch compare "reviews[label = 'positive']" "reviews[label = 'negative']" --json
    """
)
def compare(context: Context, /, names: tuple[str, ...], as_json: bool, wait: float, **given: Any) -> None:
    """Compare datasets, subsets or coresets by the RepMatch scores of their adapters.

    NAME is a dataset, a named subset, a coreset, or 'DATASET[SQL]' for the rows that match. --json adds every layer.
    """
    with context.open(as_json=as_json, wait=wait) as store:
        found = context.curator(store, **given).compare(*names)
    if as_json:
        context.output.json(found.as_json())
        return
    rows = [[name, *map(float, row)] for name, row in zip(found.names, found.scores, strict=True)]
    context.output.table(["", *found.names], rows)
    context.output.line(f"unrelated directions would score {found.chance:.4f}")


@cli.command()
@click.argument("dataset")
@click.argument("instance", required=False, metavar="[ID]")
@click.option("--text", help="A new text, in place of an id.")
@click.option("--text-pair", help="Its second text, for a dataset of pairs.")
@click.option("--label", help="Its label.  [default: each label is tried and the best counts]")
@click.option("-k", "count", type=click.IntRange(min=1), default=10, show_default=True, help="How many.")
@click.option("--signed", is_flag=True, help="By the cosine of the two ΔW, which sees labels, from -1 to 1.")
@model_option
@device_option
@json_option
@pass_context
@examples(
    """
    repmatch nearest reviews review-17 -k 5
    repmatch nearest reviews --text "a dull , endless film" --label negative
    """
)
def nearest(context: Context, /, dataset: str, instance: str | None, count: int, as_json: bool, **given: Any) -> None:
    """Find the nearest instances of DATASET to one of its own by ID, or to a new text."""
    query = {name: given.pop(name) for name in ("text", "text_pair", "label", "signed")}
    with context.open(as_json=as_json) as store:
        found = context.curator(store, **given).nearest(dataset, instance, k=count, **query)
        texts = {} if as_json else {row.id: row for row in store.tasks(dataset, ids=list(found.ids))}
    rows = [(i + 1, name, float(s)) for i, (name, s) in enumerate(zip(found.ids, found.scores, strict=True))]
    if as_json:
        for rank, name, value in rows:
            context.output.json({"rank": rank, "id": name, "score": value})
        return
    header = ["rank", "id", "cosine" if found.signed else "score", "label", "text"]
    context.output.table(header, [(*row, texts[row[1]].label, _short(texts[row[1]].text)) for row in rows])
    context.output.line(f"unrelated directions would score {found.chance:.4f}")


def _short(text: str, width: int = 60) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


@cli.command()
@click.argument("dataset")
@click.option("-k", "size", required=True, metavar="N|P%", help="Picks, or a share of the dataset such as 5%.")
@click.option("--strategy", default="facility-location", show_default=True, help="How to choose; see below.")
@click.option("--balance", metavar="FIELD", help="Equal counts for every value of this column.")
@click.option("--stratify", metavar="FIELD", help="Keep the dataset's proportions of this column.")
@click.option("--name", help="Name of the coreset.  [default: made from the arguments]")
@click.option("--replace", is_flag=True, help="Replace a coreset of that name.")
@click.option("--seed", type=int, default=0, show_default=True, help="For strategies that draw.")
@model_option
@device_option
@wait_option
@json_option
@pass_context
@examples(
    """
    repmatch select reviews -k 100 --balance label --name core
    repmatch select reviews -k 5% --strategy random --seed 7
    """
)
def select(context: Context, /, dataset: str, size: str, as_json: bool, wait: float, **given: Any) -> None:
    """Choose a coreset of DATASET and keep it under a name.

    \b
    Strategies:
      facility-location   picks that together resemble every instance (exact greedy, with a certificate)
      k-medoids           the same, improved by swaps
      partitioned         the same in parts, for very many instances; without --balance or --stratify
      graph-cut           picks that resemble all and differ from each other
      saturated-coverage  all picks together cover every instance up to a limit
      herding             picks whose mean is that of all
      k-center            no instance is far from a pick
      dpp                 picks that span a large volume
      top                 highest score against the whole dataset's adapter, trained on demand
      random              by chance
    """  # noqa: D301 -- click reads the backspace: keep these lines apart
    from repmatch.curator.selection import composition

    settings = {name: given.pop(name) for name in ("model", "device")}
    output = context.output
    with context.open(as_json=as_json, wait=wait) as store:
        found = context.curator(store, **settings).select(dataset, size, **given)
        labels = composition(store, dataset, found.ids)
        rows = list(found.to_polars().iter_rows())
        texts = {} if as_json else {row.id: row for row in store.tasks(dataset, ids=[row[1] for row in rows[:10]])}
    for note in found.selection.notes:
        output.warn(note)
    if as_json:
        for rank, name, gain, _ in rows:
            output.json({"rank": rank, "id": name, "gain": gain})
        return
    shown = [(*row, texts[row[1]].label, _short(texts[row[1]].text, 48)) for row in rows[:10]]
    output.table(["rank", "id", "gain", "represents", "label", "text"], shown)
    if len(rows) > 10:
        output.line(f"and {len(rows) - 10} more")
    output.line("labels: " + ", ".join(f"{label} {picked} of {whole}" for label, (picked, whole) in labels.items()))
    certainty = found.selection.certainty
    if certainty is not None:
        output.line(f"objective {found.selection.value:.4f}: at least {certainty:.1%} of the best possible")
    output.line(f"kept as {found.name}")
    output.hint(f"next: repmatch export {found.name} -o {found.name}.jsonl")


@cli.command()
@click.argument("name", metavar="C|D")
@click.option(
    "-o", "--output", "path", type=click.Path(path_type=Path), help="File to write.  [default: standard output]"
)
@click.option("--with-scores", is_flag=True, help='Add one object, "repmatch", with rank, gain and score to each row.')
@pass_context
@examples(
    """
    repmatch export core -o core.jsonl
    repmatch export reviews > all.jsonl
    """
)
def export(context: Context, /, name: str, path: Path | None, with_scores: bool) -> None:
    """Write the user's rows of a coreset (best pick first) or a dataset as JSON lines.

    Each row has every column as it came. With -o a manifest is written beside the file: arguments, model fingerprint,
    seeds, versions, digests.
    """
    from repmatch.curator.export import export_lines, write_export

    with context.open() as store:
        if path is None or str(path) == "-":
            for line in export_lines(store, name, with_scores=with_scores):
                context.output.line(line)
            return
        manifest = write_export(store, name, path, with_scores=with_scores)
    context.output.hint(f"{manifest['file']['rows']} rows in {path}, manifest in {path}.manifest.json")


@cli.command()
@json_option
@pass_context
@examples("repmatch info --json")
def info(context: Context, /, as_json: bool) -> None:
    """Show versions, devices, and what the store holds."""
    from repmatch.curator.overview import overview, render

    context.output.as_json = as_json
    found = overview(context.path)
    if as_json:
        context.output.json(found)
    else:
        render(found, context.output)


@cli.command()
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    default="repmatch-demo",
    show_default=True,
    help="Folder for the demo's store and files.",
)
@device_option
@pass_context
@examples("repmatch demo --dir /tmp/repmatch-demo")
def demo(context: Context, /, folder: Path, device: str) -> None:
    """Run the main job on the docstrings of Python's standard library.

    Gathers them from this Python, builds their factors, scores, compares two areas, selects a coreset, tests it against
    a random one by training on both, asks for neighbours and exports: about three minutes on two cores.
    """
    from repmatch.curator.demo import run

    run(folder, context.output, device=device)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code: 0 ok, 1 failure, 2 usage, 130 interrupted.

    Args:
        arguments: in place of the process's own.
    """
    debug = os.environ.get("REPMATCH_DEBUG") == "1"
    err = Output()
    try:
        code = cli.main(args=arguments, prog_name="repmatch", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        err.error("interrupted; what was committed stays. Run the same command again to go on.")
        code = 130
    except RepMatchError as error:
        if debug:
            raise
        err.error(str(error))
        code = error.exit_code
    except BrokenPipeError:
        # The reader left (| head): not our failure, but what was not written cannot be called written either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if debug:
            raise
        err.error(
            f"{type(error).__name__}: {error}\nThis is a defect of repmatch; set REPMATCH_DEBUG=1 for the traceback."
        )
        code = 1
    sys.exit(code if isinstance(code, int) else 0)
