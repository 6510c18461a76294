from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_rows
from test_engine_tasks import prompts
from tiny_models import WORDS, sentences, tokenizer

import repmatch
from repmatch.curator import precision
from repmatch.curator.engine import FactorEngine
from repmatch.curator.quantised import make_ready
from repmatch.curator.settings import Settings
from repmatch.curator.workbench import Workbench

MISSING = "bitsandbytes is not installed (the extra 'quantised')"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LLaMA of two layers in float32, in 8 and in 4 bits."""
    pytest.importorskip("bitsandbytes", reason=MISSING)
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("quantised")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = AutoConfig.for_model("llama", vocab_size=len(WORDS) + 5, initializer_range=0.2, **sizes, **special)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "float")
    for name, how in (("eight", {"load_in_8bit": True}), ("four", {"load_in_4bit": True})):
        model = AutoModelForCausalLM.from_pretrained(
            folder / "float", quantization_config=BitsAndBytesConfig(**how), device_map="cpu"
        )
        model.save_pretrained(folder / name)
    reader = tokenizer()
    reader.eos_token = "[SEP]"
    for name in ("float", "eight", "four"):
        reader.save_pretrained(folder / name)
    return {name: folder / name for name in ("float", "eight", "four")}


def rows_of(count: int) -> list[dict[str, object]]:
    texts = sentences(count, 3)
    return [{"id": f"p{i}", "prompt": t, "completion": texts[-i - 1]} for i, t in enumerate(texts)]


def in_float(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a quantised model with the numbers its weights stand for, in linear layers of torch."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    whole = copy.deepcopy(module)
    for name, layer in list(whole.named_modules()):
        if not type(layer).__module__.startswith("bitsandbytes."):
            continue
        weight: Any = layer.weight
        if isinstance(layer, Linear4bit):
            values = dequantize_4bit(weight.data, weight.quant_state).float()
        else:
            scales = layer.state.SCB if weight.SCB is None else weight.SCB  # they move at the first pass
            values = weight.data.float() * scales.float()[:, None] / 127
        plain = torch.nn.Linear(values.shape[1], values.shape[0], bias=False).requires_grad_(False)
        plain.weight.copy_(values)
        whole.set_submodule(name, plain)
    return whole


@pytest.mark.parametrize("more", [{}, {"rank": 2, "steps": 3}])
@pytest.mark.parametrize("kind", ["eight", "four"])
def test_a_quantised_model_is_ingested_as_what_its_weights_stand_for(
    tmp_path: Path, checkpoints: dict[str, Path], kind: str, more: dict[str, Any]
) -> None:
    given: dict[str, Any] = {"task": "causal-lm", "device": "cpu", **more}
    bench = Workbench.build(Settings(model=str(checkpoints[kind]), **given))
    task = bench.task(())
    inputs = task.collate(task.encode(prompts(8)))
    engine = bench.engine(0, task)
    whole = FactorEngine(in_float(engine.module), bench.space, task.losses)
    shared = precision.agreement(whole.compute(inputs), engine.compute(inputs), bench.space.layout)
    assert shared.mean() > {"four": 0.999, "eight": 0.5}[kind]  # 8 bits round the inputs too; by chance it were 1 / 64

    settings = repmatch.Settings(model=str(checkpoints[kind]), **given)
    with repmatch.open(tmp_path / "s") as store:
        curator = repmatch.Curator(store, settings=settings)
        report = curator.ingest(write_rows(tmp_path / "p.jsonl", rows_of(10)), "d")
        assert (report.new, report.quarantined) == (10, 0), report.bad
        asked = {name: str(rows_of(10)[3][field]) for name, field in (("text", "prompt"), ("text_pair", "completion"))}
        assert curator.nearest("d", **asked, k=1).ids == ("p3",)
        assert len(curator.score("d").ids) == 10  # trains an adapter on all


@pytest.mark.parametrize("kind", ["eight", "four"])
def test_the_gradient_reaches_the_first_layer(checkpoints: dict[str, Path], kind: str) -> None:
    bench = Workbench.build(Settings(model=str(checkpoints[kind]), task="causal-lm", device="cpu"))
    task = bench.task(())
    engine, examples = bench.engine(0, task), task.encode(prompts(3))
    gradients, losses = engine.gradients(task.collate(examples))
    assert all(float(found.flatten(1).norm(dim=1).min()) > 0 for found in gradients.values())
    alone = [engine.gradients(task.collate([example]))[1] for example in examples]
    np.testing.assert_allclose(torch.cat(alone).numpy(), losses.numpy(), rtol=2e-2)


def test_a_packed_weight_is_unpacked() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason=MISSING)
    layer = bnb.nn.Linear4bit(64, 32).to("cpu").requires_grad_(False).eval()
    if not getattr(layer, "support_avx512bf16_for_cpu", False):
        pytest.skip("this processor has no AVX512-BF16, for which weights are packed")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    before = layer(x)
    assert layer.weight.quant_state.packing_format_for_cpu
    make_ready(layer)
    moving = x.clone().requires_grad_(True)
    after = layer(moving)
    torch.testing.assert_close(after, before, rtol=0.05, atol=0.05)
    after.sum().backward()
    assert moving.grad is not None
    layer(x)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def test_eight_bits_are_quiet(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    file = write_rows(tmp_path / "p.jsonl", rows_of(4))
    command = [sys.executable, "-m", "repmatch", "--store", tmp_path / "s", "ingest", file, "--dataset", "d"]
    more = ["--task", "causal-lm", "--model", checkpoints["eight"], "--device", "cpu"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=True)
    assert "MatMul8bitLt" not in done.stderr


@pytest.fixture
def talker() -> Iterator[logging.Logger]:
    found = logging.getLogger("bitsandbytes.autograd._functions")
    before = list(found.filters)
    found.filters.clear()
    yield found
    found.filters[:] = before


class Odd(torch.nn.Linear):
    """Stands for a layer of bitsandbytes."""


Odd.__module__ = "bitsandbytes.nn.modules"


def test_only_layers_of_bitsandbytes_are_changed(talker: logging.Logger) -> None:
    plain, odd, eight = torch.nn.Linear(2, 2), Odd(2, 2), Odd(2, 2)
    plain.support_avx512bf16_for_cpu = odd.support_avx512bf16_for_cpu = True  # type: ignore[assignment]
    eight.state = object()  # type: ignore[assignment]
    make_ready(torch.nn.Sequential(plain, odd))
    assert (plain.support_avx512bf16_for_cpu, odd.support_avx512bf16_for_cpu) == (True, False)
    assert talker.filters == []
    for _ in range(2):
        make_ready(eight)
    assert len(talker.filters) == 1
    said = [logging.makeLogRecord({"msg": text}) for text in ("MatMul8bitLt: inputs will be cast from %s", "another")]
    assert [bool(talker.filter(record)) for record in said] == [False, True]
