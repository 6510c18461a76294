"""Tools and calls of tools, as users keep them, made into what a chat template reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from repmatch.curator.records import RowProblem, parse, shown

TOOLS = "tools"
"""Column with the tools of a conversation."""

TOOL = "tool"
"""Role of a tool's answer."""

_FUNCTIONS = "functions"  # what OpenAI called them before
_A_CALL = '{"type": "function", "function": {"name": "...", "arguments": {...}}}'
_A_TOOL = '{"type": "function", "function": {"name": "...", "description": "...", "parameters": {...}}}'


def without_nulls(value: Any) -> Any:
    """Leave out keys whose value is null: tables fill them in wherever one row has the key.

    Args:
        value: plain JSON values.

    Returns:
        The same, in its lists and objects too; elements of a list stay.
    """
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def calls_of(message: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    """Read the calls of tools in a message.

    Args:
        message: the message as it came: with `tool_calls`, a list or its JSON text, or the older `function_call`.
        column: its column, for messages.

    Returns:
        Calls, maybe none: {"id"?, "type": "function", "function": {"name", "arguments"}}, the arguments an object.

    Raises:
        RowProblem: they are no list of calls, or arguments are no object or JSON text of one.
    """
    given = listed(message.get("tool_calls")) or None  # tables write none as an empty list too
    if given is None and message.get("function_call") is not None:
        given = [message["function_call"]]
    if given is None:
        return []
    if not isinstance(given, list):
        raise RowProblem(
            f"column {column!r} holds a message whose tool_calls are {shown(given)}; expected a list of calls such as "
            f"{_A_CALL}. Fix the row."
        )
    return [_call(call, column) for call in given]


def _function(value: Any) -> dict[str, Any] | None:
    """The object that names the function of a call or a tool, which may be the value itself; None: there is none."""
    inner = value.get("function") if isinstance(value, dict) and value.get("function") is not None else value
    name = inner.get("name") if isinstance(inner, dict) else None
    return inner if isinstance(inner, dict) and isinstance(name, str) and name.strip() else None


def _call(call: Any, column: str) -> dict[str, Any]:
    inner = _function(call)
    if inner is None:
        raise RowProblem(
            f"column {column!r} holds a message with the call {shown(call)}, which names no function; expected one "
            f"such as {_A_CALL}. Fix the row."
        )
    name = inner["name"]
    found: dict[str, Any] = {"id": str(call["id"])} if call.get("id") is not None else {}
    arguments = _arguments(inner.get("arguments"), name, column)
    return {**found, "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(value: Any, name: str, column: str) -> dict[str, Any]:
    if value is None or value == "":
        return {}
    reason = ""
    if isinstance(value, str):  # as OpenAI has them; nulls in it are meant
        try:
            return parse(value.strip())
        except RowProblem as problem:
            reason = f" ({str(problem).partition(';')[0]})"
    if isinstance(value, dict):
        found: dict[str, Any] = without_nulls(value)
        return found
    raise RowProblem(
        f"column {column!r} holds a call of {name!r} with the arguments {shown(value)}{reason}; expected an object, "
        "or JSON text of one. Fix the row."
    )


def tools_of(row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Read the tools of a row.

    Args:
        row: the row: `tools`, a list or its JSON text; the older `functions` counts where a message has a call.
        messages: its messages, checked.

    Returns:
        Tools, maybe none: {"type": "function", "function": {"name", ...}}.

    Raises:
        RowProblem: they are no list of tools.
    """
    column = TOOLS
    if row.get(TOOLS) is None and any("tool_calls" in message for message in messages):
        column = _FUNCTIONS
    given = listed(row.get(column))
    if given in (None, "", "null"):  # the last is what JSON text has for none
        return []
    if not isinstance(given, list):
        raise RowProblem(
            f"column {column!r} holds {shown(given)}; expected a list of tools such as {_A_TOOL}, or its JSON text. "
            "Fix the row, or rename the column where it holds no tools."
        )
    return [_tool(listed(tool, "{"), column) for tool in given]


def _tool(tool: Any, column: str) -> dict[str, Any]:
    inner = _function(tool)
    if inner is None:
        raise RowProblem(
            f"column {column!r} holds the tool {shown(tool)}, which names no function; expected one such as {_A_TOOL}. "
            "Fix the row, or rename the column where it holds no tools."
        )
    function = {key: value for key, value in inner.items() if inner is not tool or key != "type"}
    around = {key: value for key, value in tool.items() if key not in ("type", "function") and inner is not tool}
    found: dict[str, Any] = without_nulls({"type": "function", **around, "function": function})
    return found


def listed(value: Any, opening: str = "[") -> Any:
    """Return what JSON text of a list (or an object) holds.

    Args:
        value: what a column or key holds.
        opening: "[" for a list, "{" for an object.

    Returns:
        The list or object; the value itself where it is no such text.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(opening):
        return value
    try:
        return parse(f'{{"value": {value}}}')["value"]
    except RowProblem:
        return value


def call_text(call: Mapping[str, Any]) -> str:
    """Return a call as readable text.

    Args:
        call: as `calls_of` gives it.

    Returns:
        `name({"key": value})`.
    """
    function = call["function"]
    return f"{function['name']}({json.dumps(function['arguments'], ensure_ascii=False)})"
