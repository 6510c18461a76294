"""What the engine does on an accelerator, as far as that shows on the CPU; see pretend_device.py."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_engine import build, make_rows
from test_engine_ingest import windows_of
from test_engine_tasks import Case, causal_case, encoder_case, masked_case
from test_store_search import stored
from tiny_models import checkpoint
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from repmatch.curator import batches, device_scores, directions, layers, precision, split, workbench
from repmatch.curator.batches import Batches
from repmatch.curator.engine import FactorEngine
from repmatch.curator.tasks import head_loss
from repmatch.datamodels import FactorBatch, Layout, Matrix
from repmatch.errors import UsageError
from repmatch.store import encoding
from repmatch.store.encoding import RowFormat

# Their results depend on the order in which an accelerator's threads come.
UNORDERED = ("index_add", "scatter_add", "embedding_dense_backward", "cumsum", "bincount")


def seen_away(*arguments: str) -> list[dict[str, Any]]:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no backends written in Python")
    script = Path(__file__).with_name("pretend_device.py")
    ran = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line.removeprefix("SEEN ")) for line in ran.stdout.splitlines() if line.startswith("SEEN ")]


def test_nothing_is_left_on_the_cpu_and_nothing_depends_on_the_order_of_threads() -> None:
    found = seen_away()
    assert [case["options"] for case in found] == [
        {},
        {"task": "causal-lm"},
        {"rank": "3"},
        {"steps": "2"},
        {"rank": "2", "steps": "2"},
    ]
    for case in found:
        assert case["agreement"] > 0.9999, case["options"]
        assert case["loss"] < 1e-5
        assert not [name for name in case["seen"] if any(part in name for part in UNORDERED)]
        assert case["seen"]["from the device"] == (4 if "rank" in case["options"] else 3)  # whole arrays, once a batch
        assert case["seen"]["to the device"] == 3 + 4 * ("steps" in case["options"])  # inputs; A of four matrices


def test_a_device_without_float64_will_do_at_rank_1() -> None:
    assert len(seen_away("no-float64")) == 2


def test_the_backward_pass_is_not_under_autocast(tmp_path: Path) -> None:
    engine, task = build(checkpoint(tmp_path), 1)
    real, states = engine._loss, list[bool]()

    def watched(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        losses = real(module, inputs)
        if losses.requires_grad:
            losses.register_hook(lambda _: states.append(torch.is_autocast_enabled("cpu")))  # type: ignore[no-untyped-call]
        return losses

    engine._loss = watched
    engine.precision = "bf16"
    engine.compute(task.collate(task.encode(make_rows(4))))
    assert states
    assert not any(states)


@pytest.mark.parametrize("case", [causal_case("llama"), masked_case])
@pytest.mark.parametrize("steps", [1, 2])
def test_language_models_compute_in_bf16(tmp_path: Path, case: Callable[[Path], Case], steps: int) -> None:
    bench, task, rows = case(tmp_path)
    engine = bench.engine((), task)
    engine.space.optimizer["steps"] = steps  # type: ignore[index]
    batch = task.collate(task.encode(rows))
    exact = engine.compute(batch)
    engine.precision = "bf16"
    rough = engine.compute(batch)
    assert 0.5 < precision.agreement(exact, rough, engine.layout).mean() < 1
    np.testing.assert_allclose(rough.losses, exact.losses, rtol=0.05)


class Casts(TorchDispatchMode):
    """Counts the casts of tensors of one shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._to_copy.default and tuple(args[0].shape) == self.shape
        return function(*args, **(kwargs or {}))


def test_a_frozen_head_is_cast_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "_sizes", lambda *_: (10, 64))
    draw = torch.Generator().manual_seed(0)
    head = nn.Linear(16, 64).requires_grad_(False)
    hidden = torch.randn(40, 16, generator=draw).requires_grad_(True)
    targets = torch.randint(0, 64, (40,), generator=draw)
    with Casts((64, 16)) as casts, torch.autocast("cpu", dtype=torch.bfloat16):
        found = head_loss.linear_cross_entropy(hidden, head, targets)
    assert casts.count == 1
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    expected = functional.cross_entropy(head(hidden), targets, reduction="none")
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), hidden)[0], rtol=5e-2, atol=5e-2)


def test_columns_are_made_orthonormal_for_all_matrices_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    m = torch.randn(6, 20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m[1, :, 3] = m[1, :, 0] + 1e-3 * m[1, :, 3]  # nearly parallel
    q, r = directions.gram_schmidt(m)
    torch.testing.assert_close(q.mT @ q, torch.eye(4, dtype=torch.float64).expand(6, 4, 4), rtol=0, atol=1e-14)
    torch.testing.assert_close(q @ r, m)
    torch.testing.assert_close(q, torch.linalg.qr(m).Q * torch.linalg.qr(m).R.diagonal(dim1=1, dim2=2).sign()[:, None])
    m[2, :, 1] = 0.0
    assert (directions.gram_schmidt(m)[0][2, :, 1] == 0).all()
    m[3, :, 2] = m[3, :, 1]  # rank 3
    m[4] = torch.nan
    expected = directions.left_singular(m)
    monkeypatch.setattr(directions, "thin_qr", directions.gram_schmidt)
    for one, other in zip(directions.left_singular(m), expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_a_library_of_cuda_without_room_for_its_workspace_is_out_of_memory() -> None:
    error = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert precision.is_out_of_memory(error)
    assert not precision.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))


def test_a_device_is_one_of_those_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert workbench.pick_device("cuda:1") == "cuda:1"
    with pytest.raises(UsageError, match="no device 'cuda:2': this machine has 2"):
        workbench.pick_device("cuda:2")


@contextmanager
def put_back() -> Iterator[None]:
    """Leave torch's flags as they were."""
    backends: Any = torch.backends
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if hasattr(backends.cudnn, "conv"):
            backends.cuda.matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = True


def test_float32_is_float32_whatever_a_program_has_asked_for() -> None:
    cuda = torch.device("cuda")
    with put_back():
        torch.set_float32_matmul_precision("high")
        assert torch.backends.cudnn.allow_tf32  # convolutions are in tf32 unless torch is told otherwise
        assert precision.rounds_products(cuda)
        with precision.computing("float32", cuda):
            assert not torch.backends.cudnn.allow_tf32
            assert not precision.rounds_products(cuda)
            with precision.computing("tf32", cuda):
                assert torch.backends.cudnn.allow_tf32
                assert precision.rounds_products(cuda)
        assert torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"


def test_flags_of_the_newer_kind_are_kept() -> None:
    backends: Any = torch.backends
    if not hasattr(backends.cudnn, "conv"):
        pytest.skip("this torch has the older flags alone")
    with put_back():
        backends.cuda.matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        assert precision.rounds_products(torch.device("cuda"))
        with precision.computing("float32", torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
        assert backends.cuda.matmul.fp32_precision == "tf32"


def test_gradients_are_collected_in_float32_where_the_model_computes_in_tf32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, task = build(checkpoint(tmp_path), 1)
    assert isinstance(engine, FactorEngine)
    collected, computed = list[str](), list[str]()

    def seen(given: Any, into: list[str]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            into.append(torch.get_float32_matmul_precision())
            return given(*args)

        return call

    monkeypatch.setattr(layers, "project", seen(layers.project, collected))
    batch = task.collate(task.encode(make_rows(3)))
    engine.try_shortcut(batch)
    engine._loss = seen(engine._loss, computed)
    engine.precision = "tf32"
    engine.compute(batch)
    assert set(collected) == {"highest"}
    assert set(computed) == {"high"}
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_search_on_a_device_is_in_float32(tmp_path: Path) -> None:
    found = list[str]()

    class Scores(device_scores.DeviceScores):
        def _block(self, *given: Any) -> Tensor:
            found.append(torch.get_float32_matmul_precision())
            return super()._block(*given)

    factors = stored(tmp_path / "s", "float32", 1).factors("d")
    with put_back():
        torch.set_float32_matmul_precision("high")
        Scores("cpu")(factors, factors)
    assert found == ["highest"]


@pytest.mark.parametrize("case", [causal_case("llama"), masked_case, encoder_case])
def test_three_products_of_bfloat16_are_as_good_as_float32(tmp_path: Path, case: Callable[[Path], Case]) -> None:
    bench, task, rows = case(tmp_path)
    engine = bench.engine(("no", "perhaps", "yes"), task)
    batch = task.collate(task.encode(rows))
    exact = engine.compute(batch)
    engine.precision = "bf16x3"
    split = engine.compute(batch)
    assert split.values.tobytes() != exact.values.tobytes()
    assert precision.agreement(exact, split, engine.layout).min() > 0.9999
    np.testing.assert_allclose(split.losses, exact.losses, rtol=1e-4)
    assert not [layer for layer in engine.module.modules() if "forward" in vars(layer)]
    engine.precision = "float32"
    assert engine.compute(batch).values.tobytes() == exact.values.tobytes()
    assert engine._split is None  # the second set of weights is gone


def test_a_split_layer_is_linear_and_splits_an_input_once(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64), nn.Linear(96, 32, bias=False)).requires_grad_(False)
    x = torch.randn(3, 5, 96, generator=draw).requires_grad_(True)
    calls = list[int]()
    real = split.parts
    monkeypatch.setattr(split, "parts", lambda x: calls.append(x.shape[-1]) or real(x))
    with split.Split().attached(model):
        found = [layer(x) for layer in model]
        found[0] += 1.0  # models change what a layer gave them
        (gradient,) = torch.autograd.grad((found[0] ** 2).sum() + (found[1] ** 2).sum(), x)
        assert calls == [96, 32, 64]  # the input once for both layers, and a gradient each
        with torch.no_grad():
            x *= 2.0  # the same tensor with other numbers
            torch.testing.assert_close(model[1](x), x @ model[1].weight.t(), rtol=1e-4, atol=1e-4)
            x /= 2.0
        assert model[0](x[:0]).shape == (0, 5, 64)
    expected = [layer(x) for layer in model]
    expected[0] = expected[0] + 1.0
    # Rounding to bfloat16 alone would be off by 2e-3 of the largest.
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-5)
    (other_gradient,) = torch.autograd.grad(sum((y**2).sum() for y in expected), x)
    torch.testing.assert_close(gradient, other_gradient, rtol=0, atol=2e-4)


def test_a_precision_that_cannot_be_had_is_passed_over(tmp_path: Path) -> None:
    engine, task = build(checkpoint(tmp_path), 1)
    batch = task.collate(task.encode(make_rows(8)))
    real = engine.compute

    def refused(inputs: dict[str, Tensor]) -> Any:
        if engine.precision != "float32":
            raise RuntimeError("CUDA out of memory: a second set of weights")
        return real(inputs)

    engine.compute = refused  # type: ignore[assignment,method-assign]
    assert precision.choose(engine, batch, ("bf16", "bf16x3")) == ("float32", {})
    assert engine.precision == "float32"


@pytest.mark.parametrize("chosen", ["float32", "tf32", "bf16x3"])
def test_threads_take_turns_on_a_device_and_compute_the_same_bytes(tmp_path: Path, chosen: precision.Precision) -> None:
    engine, task = build(checkpoint(tmp_path), 2)
    engine.precision = chosen
    rows, threads = make_rows(40), torch.get_num_threads()
    torch.set_num_threads(1)  # the other threads have one anyway, and a product by several is rounded otherwise
    try:
        expected = list(Batches(engine, task, 60, 1).stream(windows_of(rows, task, 20, 20)))
    finally:
        torch.set_num_threads(threads)
    beside = Batches(engine, task, 60, 3)
    beside._turn = threading.Lock()  # as on CUDA
    real, at_once = engine.compute, list[bool]()

    def watched(inputs: Mapping[str, Tensor]) -> Any:
        assert beside._turn is not None
        at_once.append(beside._turn.acquire(blocking=False))
        return real(inputs)

    engine.compute = watched  # type: ignore[method-assign]
    found = list(beside.stream(windows_of(rows, task, 20, 20)))
    assert len(at_once) > 3
    assert not any(at_once)
    assert set(beside._twins) == {engine}  # with one set of weights, however they are split
    assert torch.get_float32_matmul_precision() == "highest"
    for (one, _), (other, _) in zip(found, expected, strict=True):
        assert one.values.tobytes() == other.values.tobytes()
        assert one.rows == other.rows


def test_many_rows_are_put_in_their_places_by_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPMATCH_THREADS", "3")
    monkeypatch.setattr(batches, "_PIECE", 8)
    part = np.arange(40, dtype=np.float32).reshape(10, 4)
    values = np.zeros((12, 4), np.float32)
    batches._put(values, [11, 3, 0, 1, 2, 10, 4, 5, 6, 9], part)
    assert values[[11, 3, 0, 1, 2, 10, 4, 5, 6, 9]].tolist() == part.tolist()
    assert not values[[7, 8]].any()


def test_rows_are_encoded_by_several_threads_as_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout((Matrix("m", 8, 4),), 1)
    values = np.random.default_rng(0).standard_normal((30, 8)).astype(np.float32)
    rows = tuple(make_rows(30))
    counts = {"tokens": np.ones(30, np.int32), "truncated": np.zeros(30, np.bool_)}
    batch = FactorBatch(rows, values, None, np.ones((30, 1), np.float32), np.ones(30, np.float32), **counts)
    expected = RowFormat(layout, "float16").encode(batch)
    monkeypatch.setenv("REPMATCH_THREADS", "3")
    monkeypatch.setattr(encoding, "_PIECE", 16)
    np.testing.assert_array_equal(RowFormat(layout, "float16").encode(batch), expected)
    np.testing.assert_array_equal(expected[:, :16].view("<f2"), values.astype("<f2"))
    values[21, 3] = np.nan
    with pytest.raises(UsageError, match=rows[21].id):
        RowFormat(layout, "float16").encode(batch)
