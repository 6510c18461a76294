"""Every task and architecture against the literal procedure: one padded batch here, one instance at a time there."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle_reference import literal_adapters
from test_engine import make_rows
from tiny_models import WORDS, checkpoint, sentences
from tiny_more import (
    GatedLstm,
    causal_checkpoint,
    image_checkpoint,
    masked_checkpoint,
    odd_encoder,
    write_images,
)
from torch import nn
from torch.nn import functional

from repmatch.curator import apart
from repmatch.curator.apart import Way
from repmatch.curator.conversations import dialogue
from repmatch.curator.engine import FactorEngine
from repmatch.curator.settings import Settings
from repmatch.curator.tasks import Example, OwnModel, RowTask, causal
from repmatch.curator.workbench import Workbench
from repmatch.datamodels import Fields, Row
from repmatch.errors import InputError, ModelError

Case = tuple[Workbench, Any, list[Row]]


def rows_of(texts: Sequence[tuple[str, str | None, str]], raw: Sequence[str] = ()) -> list[Row]:
    return [
        Row(f"r{i}", raw[i] if raw else "{}", text, pair, label, f"h{i}", f"t{i}", "here", i + 1)
        for i, (text, pair, label) in enumerate(texts)
    ]


def prompts(count: int = 7) -> list[Row]:
    first, second = sentences(count, 3), sentences(count, 4)
    return rows_of([(p, " ".join(c.split()[:6]), "") for p, c in zip(first, second, strict=True)])


def conversations(count: int = 5) -> list[Row]:
    asked, told = sentences(2 * count, 5), sentences(2 * count, 6)
    raw, texts = [], []
    for i in range(count):
        messages = [{"role": "user", "content": asked[i]}, {"role": "assistant", "content": told[i]}]
        if i % 2:
            messages += [{"role": "user", "content": asked[-i]}, {"role": "assistant", "content": told[-i]}]
        raw.append(json.dumps({"messages": messages}))
        texts.append((dialogue(messages[:-1]), messages[-1]["content"], ""))
    return rows_of(texts, raw)


def causal_case(architecture: str, chat: bool = False) -> Callable[[Path], Case]:
    def make(folder: Path) -> Case:
        model = causal_checkpoint(folder, architecture)
        settings = Settings(model=str(model), task="causal-lm", device="cpu", rank=2)
        bench = Workbench.build(settings, "messages" if chat else "completion")
        fields = Fields("id", "messages", None, "label", "messages") if chat else None
        return bench, bench.task((), fields), conversations() if chat else prompts()

    return make


def regression_case(folder: Path) -> Case:
    bench = Workbench.build(Settings(model=str(checkpoint(folder)), task="text-regression", device="cpu"))
    pairs = sentences(8, 7)
    return bench, bench.task(()), rows_of([(t, None, str(i / 3 - 1)) for i, t in enumerate(pairs)])


def masked_case(folder: Path) -> Case:
    bench = Workbench.build(Settings(model=str(masked_checkpoint(folder)), task="masked-lm", device="cpu"))
    return bench, bench.task(()), rows_of([(t, None, "") for t in sentences(8, 8)])


def decoder_classification(folder: Path) -> Case:
    bench = Workbench.build(Settings(model=str(causal_checkpoint(folder, "gpt2")), device="cpu"))
    return bench, bench.task(("no", "perhaps", "yes")), make_rows(8)


def odd_case(architecture: str, targets: tuple[str, ...] | None = None) -> Callable[[Path], Case]:
    def make(folder: Path) -> Case:
        model = odd_encoder(folder, architecture)
        bench = Workbench.build(Settings(model=str(model), targets=targets, device="cpu", rank=2))
        task = bench.task(("no", "perhaps", "yes"))
        if architecture == "xlnet":
            task.tokenizer.padding_side = "left"  # as its own tokenizer does: the last token is read
        return bench, task, make_rows(7)

    return make


def image_case(architecture: str) -> Callable[[Path], Case]:
    def make(folder: Path) -> Case:
        pytest.importorskip("PIL", reason="Pillow is not installed (the extra 'images')")
        model = image_checkpoint(folder, architecture)
        bench = Workbench.build(Settings(model=str(model), task="image-classification", device="cpu", rank=2))
        rows = [
            Row(str(r["id"]), "{}", str(r["image"]), None, str(r["label"]), "", "", str(folder / "rows.jsonl"), i)
            for i, r in enumerate(write_images(folder, 5))
        ]
        return bench, bench.task(("cat", "dog", "owl")), rows

    return make


class WordTask(RowTask):
    """Words to ids by a fixed list; the loss of a small LSTM."""

    name = "lstm-words"

    def batch(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        ids = [[WORDS.index(word) + 1 for word in row.text.split()] for row in rows]
        longest = max(map(len, ids))
        return {
            "ids": torch.tensor([row + [0] * (longest - len(row)) for row in ids]),
            "mask": torch.tensor([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in ids]),
            "labels": torch.tensor([self.label_index(row.label) for row in rows]),
        }

    def losses(self, module: nn.Module, inputs: Any) -> torch.Tensor:
        return functional.cross_entropy(module(inputs["ids"], inputs["mask"]), inputs["labels"], reduction="none")


class Encoder(nn.Module):
    """Torch's own encoder, which packs padded rows where nothing is trained."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(len(WORDS) + 1, 16)
            layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
            self.head = nn.Linear(16, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        embedded = self.embedding(ids)
        given = embedded if self.batch_first else embedded.transpose(0, 1)
        hidden = self.encoder(given, src_key_padding_mask=mask == 0)
        hidden = hidden if self.batch_first else hidden.transpose(0, 1)
        logits: torch.Tensor = self.head((hidden * mask[:, :, None]).sum(dim=1))
        return logits


def encoder_case(_: Path, batch_first: bool = True) -> Case:
    own = OwnModel(Encoder(batch_first), WordTask(), "encoder")
    bench = Workbench.build(Settings(model=own, targets=("linear1", "linear2"), device="cpu", rank=2))
    return bench, bench.task(("no", "perhaps", "yes")), make_rows(7)


def own_case(_: Path) -> Case:
    own = OwnModel(GatedLstm(len(WORDS) + 1, 3), WordTask(), "gates")
    bench = Workbench.build(Settings(model=own, targets=("input", "recurrent"), device="cpu", rank=2))
    return bench, bench.task(("no", "perhaps", "yes")), make_rows(7)


CASES: dict[str, Callable[[Path], Case]] = {
    "causal llama": causal_case("llama"),
    "causal qwen2, tied": causal_case("qwen2"),
    "causal gpt2, Conv1D": causal_case("gpt2"),
    "chat llama": causal_case("llama", chat=True),
    "regression bert": regression_case,
    "masked bert": masked_case,
    "classification gpt2": decoder_classification,
    "vit": image_case("vit"),
    "resnet, Conv2d": image_case("resnet"),
    "own lstm": own_case,
    "own encoder, padded": encoder_case,
    "deberta-v2, positions shared by the batch": odd_case("deberta-v2"),
    "longformer, in place": odd_case("longformer", ("output.dense",)),
    "xlnet, tokens first": odd_case("xlnet", ("layer_1", "layer_2")),
    "own encoder, tokens first": partial(encoder_case, batch_first=False),
}


def deltas_of(engine: FactorEngine, found: Any, position: int) -> list[np.ndarray]:
    """ΔW of one instance, up to scale, from its factors."""
    out = []
    for m, matrix in enumerate(engine.layout.matrices):
        lo, hi = engine.layout.offsets[m : m + 2]
        u = found.values[position, lo:hi].reshape(matrix.d_out, -1).astype(np.float64)
        core = np.ones((1, 1)) if found.cores is None else found.cores[position, m].astype(np.float64)
        q = np.linalg.qr(engine._a[matrix.name].double().numpy().T)[0]
        if engine.layout.rank == 1:
            q = engine._a[matrix.name].double().numpy().T
        out.append(u @ core @ q.T)
    return out


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Signed squared cosine."""
    inner = float(np.sum(one * other))
    return inner * abs(inner) / float(np.sum(one**2) * np.sum(other**2))


@pytest.mark.parametrize("name", list(CASES))
def test_factors_of_every_task_equal_the_literal_procedure(tmp_path: Path, name: str) -> None:
    bench, task, rows = CASES[name](tmp_path)
    examples: list[Example] = task.encode(rows)
    engine = bench.engine(task.labels if isinstance(task, RowTask) else 3, task)
    found = engine.compute(task.collate(examples))
    truth = literal_adapters(engine.module, bench.space, task.losses, [task.collate([e]) for e in examples])
    worst = 1.0
    for i, adapters in enumerate(truth):
        for mine, matrix in zip(deltas_of(engine, found, i), bench.space.matrices, strict=True):
            a, b = adapters[matrix.name]
            if not b.any():
                assert not mine.any()
                continue
            worst = min(worst, agreement(mine, b @ a))
    assert worst >= 0.9999, worst
    again = engine.compute(task.collate(examples))
    assert again.values.tobytes() == found.values.tobytes()
    if name.startswith("resnet"):
        assert bench.space.matrices[0].d_in == 8 * 9
        assert {m.name.rsplit(".", 1)[-1] for m in bench.space.matrices} == {"convolution"}


STEPPED = ("causal llama", "causal gpt2, Conv1D", "resnet, Conv2d", "own lstm", "masked bert", "xlnet, tokens first")


@pytest.mark.parametrize("name", [*STEPPED, "own encoder, padded", "deberta-v2, positions shared by the batch"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_many_steps_at_once_equal_training_each_alone(tmp_path: Path, name: str, optimizer: str) -> None:
    from dataclasses import replace

    bench, task, rows = CASES[name](tmp_path)
    step = {"name": optimizer, "lr": 0.05 if optimizer == "sgd" else 1e-3, "steps": 5}
    if optimizer != "sgd":
        step["eps"] = 1e-4  # a gradient near zero has no safe sign: eps keeps its step small on both sides
    bench = replace(bench, space=replace(bench.space, optimizer=step))
    examples = task.encode(rows[:4])
    engine = bench.engine(3, task)
    stack, _, losses = engine.train(task.collate(examples))
    truth = literal_adapters(engine.module, bench.space, task.losses, [task.collate([e]) for e in examples])
    for i, adapters in enumerate(truth):
        mine_a, mine_b = stack.arrays(i)
        for matrix in bench.space.matrices:
            a, b = adapters[matrix.name]
            assert np.linalg.norm(mine_a[matrix.name] - a) <= 1e-4 * np.linalg.norm(a)
            assert np.linalg.norm(mine_b[matrix.name] - b) <= 1e-4 * np.linalg.norm(b)
    found = engine.compute(task.collate(examples))
    np.testing.assert_allclose(found.losses, losses.numpy())
    for i, adapters in enumerate(truth):
        for m, matrix in enumerate(bench.space.matrices):
            lo, hi = engine.layout.offsets[m : m + 2]
            u = found.values[i, lo:hi].reshape(matrix.d_out, -1)
            a, b = adapters[matrix.name]
            expected, sizes, _ = np.linalg.svd(b @ a, full_matrices=False)
            kept = int((sizes > 1e-4 * sizes[0]).sum()) if sizes[0] else 0
            kept = min(kept, u.shape[1])
            assert np.linalg.norm(expected[:, :kept].T @ u[:, :kept]) ** 2 >= 0.999 * kept


WAYS = {
    "deberta-v2, positions shared by the batch": (Way.APART, True),
    "xlnet, tokens first": (Way.APART, False),
    "own encoder, tokens first": (Way.APART, False),
    "own encoder, padded": (Way.TOGETHER, True),
    "causal gpt2, Conv1D": (Way.TOGETHER, True),
}


@pytest.mark.parametrize("name", list(WAYS))
def test_instances_that_cannot_be_told_apart_in_a_batch_are_computed_apart(tmp_path: Path, name: str) -> None:
    bench, task, rows = CASES[name](tmp_path)
    engine = bench.engine(3, task)
    engine.compute(task.collate(task.encode(rows)))
    assert (engine.way, engine.batch_first) == WAYS[name]


@pytest.mark.parametrize("name", ["deberta-v2, positions shared by the batch", "xlnet, tokens first"])
@pytest.mark.parametrize("steps", [1, 3])
def test_what_vmap_cannot_follow_is_computed_one_by_one(
    tmp_path: Path, name: str, steps: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dataclasses import replace

    bench, task, rows = CASES[name](tmp_path)
    bench = replace(bench, space=replace(bench.space, optimizer={**bench.space.optimizer, "steps": steps, "eps": 1e-4}))
    batch = task.collate(task.encode(rows))
    expected = bench.engine(3, task).compute(batch)

    def fail(*_: Any) -> None:
        raise RuntimeError("vmap: It looks like you're calling .item() on a Tensor.\nmore")

    monkeypatch.setattr(apart, "gradients", fail)
    engine = bench.engine(3, task)
    with caplog.at_level(logging.WARNING, "repmatch"):
        found = engine.compute(batch)
        engine.compute(batch)
    assert engine.way is Way.ONE_BY_ONE
    (record,) = caplog.records
    assert "one by one, which is slow (vmap: It looks like you're calling .item() on a Tensor.)" in record.getMessage()
    np.testing.assert_allclose(found.values, expected.values, atol=1e-3)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-3)


def test_a_batch_too_large_is_no_reason_to_go_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, task, rows = CASES["xlnet, tokens first"](tmp_path)
    engine = bench.engine(3, task)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(apart, "gradients", fail)
    with pytest.raises(torch.OutOfMemoryError):
        engine.compute(task.collate(task.encode(rows)))
    assert engine.way is Way.APART


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_the_closed_form_is_the_first_of_many_steps(tmp_path: Path, optimizer: str) -> None:
    from dataclasses import replace

    bench, task, rows = causal_case("llama")(tmp_path)
    step = {"name": optimizer, "lr": 1e-3} | ({"eps": 1e-8} if optimizer != "sgd" else {})
    bench = replace(bench, space=replace(bench.space, optimizer=step, rank=1))
    engine, batch = bench.engine(0, task), task.collate(task.encode(rows))
    stack, gradients, _ = engine.train(batch)
    found = engine.compute(batch)
    for m, matrix in enumerate(bench.space.matrices):
        lo, hi = engine.layout.offsets[m : m + 2]
        b = stack.b[matrix.name].detach()[:, :, 0]
        cosine = functional.cosine_similarity(b, torch.from_numpy(found.values[:, lo:hi]), dim=1)
        assert float(cosine.min()) >= 0.9999
        np.testing.assert_allclose(gradients[matrix.name].flatten(1).norm(dim=1), found.norms[:, m], rtol=1e-4)


def test_the_loss_is_on_the_completion_only(tmp_path: Path) -> None:
    bench, task, rows = causal_case("llama")(tmp_path)
    example = task.encode(rows[:1])[0]
    module = bench.module(0)
    ids = torch.tensor([example.features["input_ids"]])
    prompt = example.features["prompt"]
    assert ids[0, -1] == 3  # the end-of-text token closes the completion
    logits = module(input_ids=ids).logits[0]
    wanted = ids[0, prompt:]
    expected = functional.cross_entropy(logits[prompt - 1 : -1], wanted)
    torch.testing.assert_close(task.losses(module, task.collate([example]))[0], expected)
    labels = task.collate(task.encode(rows[:2]))["labels"]
    assert (labels[0, :prompt] == causal.IGNORED).all()


@pytest.mark.parametrize("bias", [True, False])
def test_the_loss_behind_a_head_is_cross_entropy_piece_by_piece(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from repmatch.curator.tasks import head_loss

    draw = torch.Generator().manual_seed(0)
    head = nn.Linear(6, 200, bias=bias).requires_grad_(False)
    hidden = torch.randn(7, 6, generator=draw).requires_grad_(True)
    targets = torch.randint(0, 200, (7,), generator=draw)
    weights = torch.randn(7, generator=draw)
    with torch.no_grad():
        head.weight[:64] *= 1e-3  # the largest logits come late: what was summed before is scaled down
        head.weight[128:] *= 30
        if head.bias is not None:
            head.bias[:70] = -torch.inf  # words that are never there, a whole piece of them and more
            targets.clamp_(min=70)
    expected = functional.cross_entropy(head(hidden), targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected @ weights, hidden)
    for piece, rows in ((1, 1), (1, 3), (700, 7), (1 << 19, 1024)):
        monkeypatch.setattr(head_loss, "_CPU_PIECE", piece)
        monkeypatch.setattr(head_loss, "_CPU_ROWS", rows)
        found = head_loss.linear_cross_entropy(hidden, head, targets)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)  # logits reach 100
        torch.testing.assert_close(torch.autograd.grad(found @ weights, hidden)[0], gradient, rtol=1e-4, atol=1e-3)
    for broken in (torch.nan, torch.inf):
        with torch.no_grad():
            found = head_loss.linear_cross_entropy(hidden.masked_fill(torch.eye(7, 6) == 1, broken), head, targets)
        assert (found.isfinite() == (torch.arange(7) == 6)).all()
    assert head_loss.linear_cross_entropy(hidden[:0], head, targets[:0]).shape == (0,)


def test_the_chat_template_is_the_models_own(tmp_path: Path) -> None:
    _, task, rows = causal_case("llama", chat=True)(tmp_path)
    example = task.encode(rows[1:2])[0]
    messages = json.loads(rows[1].json)["messages"]
    whole = task.tokenizer.apply_chat_template(messages, tokenize=False)
    assert example.features["input_ids"] == task.tokenizer(whole, add_special_tokens=False)["input_ids"]
    answer = task.tokenizer(messages[-1]["content"] + " [SEP] ", add_special_tokens=False)["input_ids"]
    assert example.features["input_ids"][example.features["prompt"] :] == answer


def test_a_long_prompt_loses_its_start_and_a_long_completion_its_end(tmp_path: Path) -> None:
    _, task, _ = causal_case("llama")(tmp_path)
    task.max_length = 8
    words = "the film was good and funny but not very slow"
    long_prompt, long_completion = task.encode(rows_of([(words, "great plot", ""), ("dull", words, "")]))
    ids = task.tokenizer(words, add_special_tokens=False)["input_ids"]
    end = task.tokenizer("great plot", add_special_tokens=False)["input_ids"] + [3]
    assert long_prompt.features["input_ids"] == ids[-5:] + end
    assert long_completion.features["input_ids"][1:] == ids[:7]
    assert long_prompt.truncated
    assert long_completion.truncated


def test_a_conversation_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    _, task, _ = causal_case("llama")(tmp_path)
    task.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        causal.CausalLanguage(task.tokenizer, causal.CHAT, 60)


def test_hidden_tokens_depend_on_seed_and_text_only(tmp_path: Path) -> None:
    _, task, rows = masked_case(tmp_path)
    alone = [task.encode([row])[0] for row in rows]
    together = task.encode(rows)
    assert [e.features["input_ids"] for e in alone] == [e.features["input_ids"] for e in together]
    hidden = [sum(label != causal.IGNORED for label in e.label) for e in together]
    assert all(count == max(1, round(0.15 * (e.tokens - 2))) for count, e in zip(hidden, together, strict=True))


@pytest.mark.parametrize("name", ["masked bert", "causal llama", "causal gpt2, Conv1D"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_head_works_on_the_positions_that_count_alone(
    tmp_path: Path, name: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    bench, task, rows = CASES[name](tmp_path)
    bench = replace(bench, space=replace(bench.space, optimizer={**bench.space.optimizer, "steps": steps}))
    engine, batch = bench.engine(0, task), task.collate(task.encode(rows))
    whole = []
    engine.module.register_forward_hook(lambda *_: whole.append(1))
    short = engine.compute(batch)
    assert len(whole) == 1  # the trial
    engine.compute(batch)
    assert len(whole) == 1
    monkeypatch.setattr(task._short, "is_right", lambda *_: False)
    long = engine.compute(batch)
    assert len(whole) == 1 + steps
    np.testing.assert_allclose(short.losses, long.losses, rtol=1e-5)
    inner = np.abs(np.sum(short.values.astype(np.float64) * long.values, axis=1))
    np.testing.assert_allclose(inner, np.sum(long.values.astype(np.float64) ** 2, axis=1), rtol=1e-3)


def test_a_head_is_tried_for_every_model_that_a_task_meets(tmp_path: Path) -> None:
    bench, task, rows = causal_case("llama")(tmp_path)
    batch, module = task.collate(task.encode(rows)), bench.module(0)
    expected = task.losses(module, batch)

    class Capped(type(module)):  # type: ignore[misc]
        def forward(self, *args: Any, **options: Any) -> Any:
            found = super().forward(*args, **options)
            found.logits = 2 * torch.tanh(found.logits / 2)
            return found

    capped = copy.deepcopy(module)
    capped.__class__ = Capped
    given = {name: value for name, value in batch.items() if name != "labels"}
    found = task.losses(capped, batch)
    assert not torch.allclose(found, expected, rtol=1e-2)
    assert (task._short.is_right(module, given), task._short.is_right(capped, given)) == (True, False)
    broken = copy.deepcopy(module)
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
        assert not task._short.is_right(broken, given)
        broken.lm_head.weight.copy_(module.lm_head.weight)
        assert task._short.is_right(broken, given)


def test_a_label_that_is_no_number_is_refused(tmp_path: Path) -> None:
    _, task, _ = regression_case(tmp_path)
    with pytest.raises(InputError, match="'good' is no number"):
        task.encode(rows_of([("film", None, "good")]))
