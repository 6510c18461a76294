"""What the documentation site makes for itself: the order of its pages, the command reference, API pages, the notebook.

`mkdocs build` calls the functions named `on_...`. What can be made is not kept in the repository, so it cannot drift.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

# Pages in order; one that is not there is left out.
PAGES: dict[str, list[tuple[str, str]]] = {
    "Guides": [
        ("Quick start", "index.md"),
        ("What a score means", "scores.md"),
        ("Picking a coreset", "coresets.md"),
        ("Instruction tuning", "instruction-tuning.md"),
        ("Does it choose better data?", "evaluation.md"),
        ("What works: findings", "findings.md"),
        ("Tasks, matrices, steps, warm starts", "tasks.md"),
        ("Hunting label errors", "label-errors.md"),
        ("Comparing adapters", "adapters.md"),
        ("The report", "report.md"),
        ("From a laptop to a cluster", "scale.md"),
        ("Extending it", "extending.md"),
        ("A notebook", "notebook.md"),
    ],
    "Reference": [
        ("Commands", "commands.md"),
        ("Configuration", "configuration.md"),
        ("SQL and the store's views", "sql.md"),
        ("The store", "store.md"),
        ("Selection", "selection.md"),
        ("Changes", "changelog.md"),
    ],
}
API = {
    "repmatch": ("The package", "repmatch"),
    "selectors": ("Selectors", "repmatch.selectors"),
    "similarity": ("Similarity", "repmatch.similarity"),
    "results": ("Results and words", "repmatch.curator"),
}
RESULTS = (
    "repmatch.curator.scoring.Scores",
    "repmatch.curator.scoring.Comparison",
    "repmatch.curator.adapter_comparison.AdapterComparison",
    "repmatch.curator.adapter_comparison.compare_adapters",
    "repmatch.curator.lora.read_lora",
    "repmatch.curator.lora.Lora",
    "repmatch.curator.neighbours.Neighbours",
    "repmatch.curator.selection.Selected",
    "repmatch.curator.inspection.Inspection",
    "repmatch.curator.ingest.IngestReport",
    "repmatch.curator.training.Recipe",
    "repmatch.curator.report.gather.ReportOptions",
    "repmatch.datamodels.Space",
    "repmatch.datamodels.Factors",
    "repmatch.datamodels.Adapter",
    "repmatch.datamodels.Coreset",
)


def public_names() -> dict[str, list[str]]:
    """Return the public objects of each API page, as dotted paths of where they are defined."""
    import repmatch
    import repmatch.selectors
    import repmatch.similarity

    def home(module: Any, name: str) -> str:
        value = getattr(module, name)
        return f"{getattr(value, '__module__', module.__name__)}.{getattr(value, '__qualname__', name)}"

    functions = [name for name in repmatch.similarity.__all__ if callable(getattr(repmatch.similarity, name))]
    classes = [name for name in repmatch.selectors.__all__ if callable(getattr(repmatch.selectors, name))]
    return {
        "repmatch": [home(repmatch, name) for name in repmatch.__all__ if name != "__version__"],
        "selectors": [home(repmatch.selectors, name) for name in classes],
        "similarity": [home(repmatch.similarity, name) for name in functions if name not in ("Blocks", "Floats")],
        "results": list(RESULTS),
    }


def api_page(key: str) -> str:
    """Return an API page: one directive an object."""
    title, _ = API[key]
    return f"# {title}\n\n" + "\n".join(f"::: {name}\n" for name in dict.fromkeys(public_names()[key]))


def commands_page() -> str:
    """Return the command reference, made from the commands' own help."""
    from repmatch.cli import cli

    parts = [
        "# Commands",
        "",
        "Every command's own help, as `repmatch COMMAND --help` prints it. Exit codes: 0 ok, 1 failure, 2 usage, 130",
        "interrupted.",
        "",
    ]
    for name, command in [("", cli), *cli.commands.items()]:
        parts += _command(f"repmatch {name}".strip(), command, 2)
    return "\n".join(parts).rstrip() + "\n"


def _command(name: str, command: click.Command, level: int) -> list[str]:
    context = click.Context(command, info_name=name, terminal_width=100, max_content_width=100)
    parts = [f"{'#' * level} {name}", "", "```text", command.get_help(context).rstrip(), "```", ""]
    if isinstance(command, click.Group) and name != "repmatch":
        for inner, child in command.commands.items():
            parts += _command(f"{name} {inner}", child, level + 1)
    return parts


def notebook_page(path: Path) -> str:
    """Return a notebook as Markdown, its stored outputs included."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/html" in data:
                parts.append("".join(data["text/html"]))
            else:
                text = "".join(data.get("text/plain", output.get("text", "")))
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def generated() -> dict[str, str]:
    """Return the pages that are made when the site is built."""
    pages = {f"api/{key}.md": api_page(key) for key in API}
    pages["commands.md"] = commands_page()
    pages["notebook.md"] = notebook_page(HERE / "example.ipynb")
    pages["changelog.md"] = (HERE.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    return pages


def on_config(config: Any) -> Any:
    """Put the pages that are there in order."""
    made = set(generated())
    nav: list[Any] = []
    for section, pages in PAGES.items():
        kept = [{title: path} for title, path in pages if path in made or (HERE / path).is_file()]
        nav.append({section: kept})
    nav.append({"Python": [{title: f"api/{key}.md"} for key, (title, _) in API.items()]})
    config.nav = nav
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made."""
    from mkdocs.structure.files import File

    for path, content in generated().items():
        files.append(File.generated(config, path, content=content))
    return files
