"""What the user asks of a space and of the machine, before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from repmatch.curator.forms import TaskKind, task_kind
from repmatch.errors import UsageError

if TYPE_CHECKING:
    from repmatch.curator.tasks import OwnModel
    from repmatch.datamodels import Space

DEFAULT_RANK = 1
DEFAULT_ALPHA = 4.0
DEFAULT_MAX_LENGTH = 256
DEFAULT_MAX_LENGTHS = {"causal-lm": 1024}
# How many instances a warm start is trained on: a number or a share.
START_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)(%?)\s*")


@dataclass(frozen=True)
class Settings:
    """Settings of a space and of where to compute; None: a stored space's own value, or the default for a new space.

    Attributes:
        model: folder, hub name or "embedded", which is the default; or a module and task of the user's own.
        task: name of a built-in task; default "sequence-classification".
        template: of causal-lm: "plain" or "chat"; default: chat for messages, plain for prompt and completion.
        rank: LoRA rank, 1 to 64; default 1.
        alpha: LoRA alpha; default 4.
        targets: endings of module names or regular expressions; default: the architecture's query and value matrices.
        layers: numbers of the layers to adapt, such as "0,8-11"; default: all.
        max_length: tokens kept of an instance; default 256 (causal-lm: 1024), or fewer where the model reads fewer.
        seed: of the head and of every A; default 0.
        optimizer: of the instance step: "adamw" (default), "adam" or "sgd".
        learning_rate: of the instance step; default 1e-3 (sgd: 0.1).
        steps: of the instance step; default 1, which has a closed form.
        warm_start: train the start first: on this many random instances ("640"), on this share of them ("5%"), on a
            third of them and 640 at most ("auto"; cold below 1,000 instances and for tasks without a head drawn at
            random), or as a dataset of the store did (its name; what was not asked for is then that dataset's own);
            "none": from the base model as it is, the default.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        batch_tokens: padded tokens a batch may hold; None: the measured default of the device.
    """

    model: str | OwnModel | None = None
    task: str | None = None
    template: str | None = None
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    layers: str | None = None
    max_length: int | None = None
    seed: int | None = None
    optimizer: str | None = None
    learning_rate: float | None = None
    steps: int | None = None
    warm_start: str | None = None
    device: str = "auto"
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: a value is out of range.
        """
        if self.rank is not None and not 1 <= self.rank <= 64:
            raise UsageError(f"--rank {self.rank} is out of range; expected 1 to 64 (the paper uses 1).")
        if self.batch_tokens is not None and self.batch_tokens < 16:
            raise UsageError(f"--batch-tokens {self.batch_tokens} is too small; expected 16 or more.")
        if self.alpha is not None and not self.alpha > 0:
            raise UsageError(f"alpha {self.alpha} is out of range; expected a positive number.")
        if self.steps is not None and not 1 <= self.steps <= 1000:
            raise UsageError(f"--steps {self.steps} is out of range; expected 1 to 1000.")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise UsageError(f"--learning-rate {self.learning_rate} is out of range; expected a positive number.")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise UsageError(f"the device {self.device!r} is unknown; expected auto, cpu, cuda, cuda:N or mps.")
        if self.template not in (None, "plain", "chat"):
            raise UsageError(f"--template {self.template!r} is unknown; expected plain or chat.")
        if self.task is not None:
            if self.own is not None:
                raise UsageError(f"task={self.task!r} goes with a base model; a model of one's own brings its task.")
            task_kind(self.task)
        if self.own is None and self.kind.form == "images" and (self.max_length or self.template):
            option = f"--max-length {self.max_length}" if self.max_length else f"--template {self.template}"
            raise UsageError(f"{option} goes with texts, not with --task image-classification; leave it out.")

    @property
    def own(self) -> OwnModel | None:
        """The user's own module and task, where there are any."""
        return None if self.model is None or isinstance(self.model, str) else self.model

    @property
    def kind(self) -> TaskKind:
        """The task, as far as its rows go."""
        if self.own is not None:
            task = self.own.task
            return TaskKind(task.name, task.form, "text", "text_pair", "")
        return task_kind(self.task)

    @property
    def start_dataset(self) -> str | None:
        """The dataset whose warm start is asked for, where one is."""
        asked = self.warm_start
        return None if asked in (None, "none", "auto") or START_SIZE.fullmatch(str(asked)) else asked

    @property
    def asks_nothing(self) -> bool:
        """Whether every field that decides the space was left to its default."""
        elsewhere = ("device", "batch_tokens")
        return all(getattr(self, f.name) is None for f in fields(self) if f.name not in elsewhere)

    def like(self, space: Space) -> Settings:
        """Fill in what was not asked for from a stored space.

        Args:
            space: the stored space.

        Returns:
            Settings that make that space again, but for what was asked. A warm start is left as it was asked for.
        """
        step = space.optimizer
        stored: dict[str, Any] = {
            "model": space.model,
            "task": None if self.own is not None or space.model.startswith("own:") else space.task,
            "template": "chat" if space.template == "chat" else None,
            "rank": space.rank,
            "alpha": space.alpha,
            # Layers that are asked for narrow the stored targets: another space, which is then refused.
            "targets": space.layout.names,
            "max_length": space.max_length,
            "seed": space.seed,
            "optimizer": step["name"],
            "learning_rate": step["lr"],
            "steps": int(step.get("steps", 1)),
        }
        return replace(self, **{name: value for name, value in stored.items() if getattr(self, name) is None})
