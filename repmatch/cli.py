"""The command line: thin commands that parse, call one library function and render."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import NoReturn

import click

from repmatch import __version__
from repmatch.commands.adapter import adapter
from repmatch.commands.compact import compact
from repmatch.commands.compare import compare
from repmatch.commands.completion import completion
from repmatch.commands.delete import delete
from repmatch.commands.demo import demo
from repmatch.commands.evaluate import evaluate
from repmatch.commands.export import export
from repmatch.commands.info import info
from repmatch.commands.ingest import ingest
from repmatch.commands.inspect import inspect
from repmatch.commands.merge import merge
from repmatch.commands.nearest import nearest
from repmatch.commands.plan import plan
from repmatch.commands.repair import repair
from repmatch.commands.report import report
from repmatch.commands.score import score
from repmatch.commands.select import select
from repmatch.commands.sql import sql
from repmatch.commands.study import study
from repmatch.commands.suspects import suspects
from repmatch.commands.verify import verify
from repmatch.config import origin, read_config
from repmatch.context import DEFAULT_STORE, Context, examples
from repmatch.errors import RepMatchError, UsageError
from repmatch.output import Output, shorten

_NO_DEFECTS = {
    errno.ENAMETOOLONG: "the path {} is too long for this system, which takes 255 bytes between two '/'; choose a "
    "shorter one.",
    errno.ENOSPC: "{} cannot be written: the disk is full; make room and run the command again.",
    errno.EDQUOT: "{} cannot be written: the quota is used up; make room and run the command again.",
    errno.EFBIG: "{} cannot be written: a file may not be as large here; see ulimit -f.",
}
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
    context.call_on_close(context.obj.close)


_COMMANDS = (
    *(ingest, plan, score, compare, nearest, inspect, select, suspects, evaluate, study),
    *(export, report, adapter, sql, merge, delete, compact, verify, repair, info, completion, demo),
)
for command in _COMMANDS:
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code: 0 ok, 1 failure, 2 usage, 130 interrupted.

    Args:
        arguments: in place of the process's own.
    """
    debug = os.environ.get("REPMATCH_DEBUG") == "1"
    _occupy_closed()
    err = Output()
    try:
        _check_text(sys.argv[1:] if arguments is None else arguments, os.environ)
        code = cli.main(args=arguments, prog_name="repmatch", standalone_mode=False, default_map=read_config(cli))
        if sys.stdout is not None:
            sys.stdout.flush()
    except click.ClickException as error:
        shown = StringIO()
        error.show(file=shown)  # with values of a configuration file in it
        err.say(shown.getvalue().rstrip("\n") + origin(error))
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        err.error("interrupted; what was committed stays. Run the same command again to go on.")
        code = 130
    except RepMatchError as error:
        if debug:
            raise
        err.error(str(error) + error.origin)
        code = error.exit_code
    except BrokenPipeError:
        # The reader left (| head): not our failure, but what was not written cannot be called written either.
        _drop_output()
        code = 1
    except BaseException as error:  # a panic of polars is no Exception
        if debug or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        code = _report(error, err)
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: BaseException, err: Output) -> int:
    """Say what went wrong where no error of ours says it, and return the exit code."""
    code = 1
    if isinstance(error, OSError) and error.errno in _NO_DEFECTS:
        err.error(_NO_DEFECTS[error.errno].format(shorten(str(error.filename or "the output"), 80)))
        code = 2 if error.errno == errno.ENAMETOOLONG else 1
    else:
        err.error(
            f"{type(error).__name__}: {error}\nThis is a defect of repmatch; set REPMATCH_DEBUG=1 for the traceback."
        )
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _drop_output()
    return code


def _occupy_closed() -> None:
    """Open the null device where a standard stream is closed, so that no file gets its number and its output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _drop_output() -> None:
    """Let go of output that cannot be written, or the interpreter would try it again as it ends."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_text(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Refuse what is no text before it reaches a library that cannot take it.

    Args:
        words: of the command line.
        environment: the variables.

    Raises:
        UsageError: an argument or a variable of repmatch's is not UTF-8.
    """
    given = [(f"argument {at}", word) for at, word in enumerate(words, start=1)]
    for at in range(1, len(words)):
        if words[at - 1].startswith("-") and "=" not in words[at - 1]:
            given[at] = f"{given[at][0]} after {words[at - 1]}", words[at]
    given += [(f"the variable {name}", value) for name, value in environment.items() if name.startswith("REPMATCH_")]
    for name, value in given:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            text = shorten(value[max(0, error.start - 20) :]).encode("utf-8", "backslashreplace").decode()
            shown = text.replace("\\udc", "\\x")  # the bytes that Python keeps so
            raise UsageError(
                f"{name} is not UTF-8 at character {error.start + 1}: '{shown}'. Convert the text, or give the file "
                "another name."
            ) from None
