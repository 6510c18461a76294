"""Tasks: how rows become model input, and model output a loss per instance."""

from repmatch.curator.tasks.task import Example, OwnModel, RowTask, Task

__all__ = ["Example", "OwnModel", "RowTask", "Task"]
