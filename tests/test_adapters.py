from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run
from numpy.typing import NDArray
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

import repmatch
from repmatch.curator.adapter_comparison import chance_of, compare_adapters
from repmatch.curator.lora import common_names, is_path, read_lora
from repmatch.errors import InputError

Factors = dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
Q, V = "bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.0.attention.self.value"


def factors(rank: int, names: tuple[str, ...] = (Q, V), seed: int = 0, d_out: int = 24, d_in: int = 16) -> Factors:
    draw = np.random.default_rng(seed)
    return {
        name: (
            draw.standard_normal((rank, d_in)).astype(np.float32),
            draw.standard_normal((d_out, rank)).astype(np.float32),
        )
        for name in names
    }


def write_peft(folder: Path, given: Factors, **config: object) -> Path:
    folder.mkdir()
    tensors = {}
    for name, (a, b) in given.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    save_file(tensors, folder / "adapter_model.safetensors")
    rank = next(iter(given.values()))[0].shape[0]
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "base_model_name_or_path": "org/base"} | config
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


def slow_score(one: NDArray[np.float64], two: NDArray[np.float64]) -> float:
    """max φ(i, j) from the whole decompositions of two ΔW, as the paper writes it."""
    u1, s1, _ = np.linalg.svd(one)
    u2, s2, _ = np.linalg.svd(two)
    r1, r2 = int((s1 > 1e-6).sum()), int((s2 > 1e-6).sum())
    return max(
        float(np.linalg.norm(u1[:, :i].T @ u2[:, :j]) ** 2) / min(i, j)
        for i in range(1, r1 + 1)
        for j in range(1, r2 + 1)
    )


def test_two_checkpoints_of_different_ranks_and_targets(run: Run, tmp_path: Path) -> None:
    third = "bert.encoder.layer.0.attention.self.key"
    one, two = factors(2), factors(5, (third, V, Q), seed=1)
    write_peft(tmp_path / "one", one, use_rslora=True)
    write_peft(tmp_path / "two", two, lora_alpha=16)
    result = run("--store", tmp_path / "no-store", "compare", tmp_path / "one", tmp_path / "two", "--json")
    assert (result.code, result.err) == (0, "")
    (found,) = result.objects
    layers, norms = found["layers"], found["layer_norms"]
    assert isinstance(layers, dict) and isinstance(norms, dict)
    assert sorted(layers) == sorted([Q, V])
    expected = []
    for name in (Q, V):
        (a, b), (c, d) = one[name], two[name]
        left = (4 / np.sqrt(2)) * b.astype(float) @ a.astype(float)
        right = (16 / 5) * d.astype(float) @ c.astype(float)
        expected.append(slow_score(left, right))
        assert layers[name][0][1] == pytest.approx(expected[-1], abs=1e-6)
        assert layers[name][0][0] == pytest.approx(1.0)
        assert norms[name] == pytest.approx([np.linalg.norm(left), np.linalg.norm(right)], rel=1e-5)
        cosines = found["layer_cosines"]
        assert isinstance(cosines, dict)
        cosine = (left * right).sum() / np.linalg.norm(left) / np.linalg.norm(right)
        assert cosines[name][0][1] == pytest.approx(cosine, abs=1e-6)
    scores = found["scores"]
    assert isinstance(scores, list)
    assert scores[0][1] == pytest.approx(np.mean(expected), abs=1e-6)
    assert found["alone"] == {str(tmp_path / "one"): [], str(tmp_path / "two"): [third]}
    assert not (tmp_path / "no-store").exists()


def test_comparing_checkpoints_needs_no_torch(tmp_path: Path) -> None:
    write_peft(tmp_path / "one", factors(2))
    write_peft(tmp_path / "two", factors(2, seed=1))
    script = (
        "import sys\nfrom repmatch.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as left:\n    code = left.code\n"
        "heavy = sorted({'torch', 'transformers', 'peft', 'duckdb'} & set(sys.modules))\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "compare", "./one", "./two"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "over 2 matrices" in done.stdout


@pytest.mark.parametrize("form", ["peft-adapter-name", "kohya", "diffusers", "mlx", "bf16", "no-prefix"])
def test_every_tool_s_names_mean_the_same(tmp_path: Path, form: str) -> None:
    given = factors(2)
    plain = read_lora(write_peft(tmp_path / "plain", given, lora_alpha=2))
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, (a, b) in given.items():
        if form == "peft-adapter-name":
            tensors |= {f"base_model.model.{name}.lora_A.default.weight": a, f"{name}.lora_B.default.weight": b}
        elif form == "kohya":
            tensors |= {f"{name}.lora_down.weight": a[:, :, None, None], f"{name}.lora_up.weight": b[:, :, None, None]}
            tensors[f"{name}.alpha"] = np.array(2.0, np.float32)
        elif form == "diffusers":
            tensors |= {f"{name}.lora.down.weight": a, f"{name}.lora.up.weight": b}
        elif form == "mlx":
            tensors |= {f"{name}.lora_a": a.T.copy(), f"{name}.lora_b": b.T.copy()}
        else:
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    path = tmp_path / "other.safetensors"
    if form == "bf16":
        save_torch({name: torch.from_numpy(value).bfloat16() for name, value in tensors.items()}, path)
    else:
        save_file(tensors, path)
    other = read_lora(path)
    found = compare_adapters([plain, other])
    assert [layer.name for layer in found.layers] == [Q, V]
    tolerance = 1e-4 if form == "bf16" else 1e-9
    assert found.scores[0, 1] == pytest.approx(1.0, abs=tolerance)
    assert found.cosines[0, 1] == pytest.approx(1.0, abs=tolerance)
    for layer in found.layers:
        assert layer.norms[0] == pytest.approx(layer.norms[1], rel=5e-3)


def test_sign_and_scale_show_in_the_cosine_and_the_norm(tmp_path: Path) -> None:
    given = factors(2)
    turned = {name: (a, -3 * b) for name, (a, b) in given.items()}
    found = compare_adapters(
        [read_lora(write_peft(tmp_path / "one", given)), read_lora(write_peft(tmp_path / "two", turned))]
    )
    assert found.scores[0, 1] == pytest.approx(1.0)
    assert found.cosines[0, 1] == pytest.approx(-1.0)
    assert found.layers[0].norms[1] == pytest.approx(3 * found.layers[0].norms[0], rel=1e-5)


def test_an_untrained_matrix_scores_nothing_and_is_named(run: Run, tmp_path: Path) -> None:
    given = factors(2)
    untrained = given | {Q: (given[Q][0], np.zeros_like(given[Q][1]))}
    write_peft(tmp_path / "one", given)
    write_peft(tmp_path / "two", untrained)
    result = run("compare", tmp_path / "one", tmp_path / "two", "--json")
    (found,) = result.objects
    layers, cosines = found["layers"], found["layer_cosines"]
    assert isinstance(layers, dict) and isinstance(cosines, dict)
    assert layers[Q][0][1] == 0.0
    assert cosines[Q][0][1] is None
    assert "is zero in 1 of 2 matrices" in result.err


def test_wrapped_names_are_matched_and_decoders_are_no_encoders() -> None:
    mine = ["bert.encoder.layer.0.query", "bert.encoder.layer.1.query"]
    assert common_names(mine, ["encoder.layer.1.query"]) == {"bert.encoder.layer.1.query": "encoder.layer.1.query"}
    assert common_names(["encoder.block.0.q"], ["decoder.block.0.q"]) == {}


@pytest.mark.parametrize(("d", "r1", "r2"), [(24, 1, 1), (24, 2, 3), (8, 5, 6), (64, 1, 4)])
def test_chance_is_what_random_pairs_score(d: int, r1: int, r2: int) -> None:
    draw = np.random.default_rng(3)
    found = []
    for _ in range(400):
        left = draw.standard_normal((d, r1)) @ np.diag(np.arange(r1, 0, -1.0)) @ draw.standard_normal((r1, r1))
        right = draw.standard_normal((d, r2))
        found.append(slow_score(left, right @ draw.standard_normal((r2, r2))))
    assert chance_of(d, r1, r2) == pytest.approx(np.mean(found), rel=0.06)
    assert chance_of(d, r1, r2) == chance_of(d, r2, r1)


def test_what_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_peft(tmp_path / "here", factors(1))
    monkeypatch.chdir(tmp_path)
    assert is_path("here") and is_path("a/b") and is_path("x.safetensors")
    assert not is_path("toy") and not is_path("toy[path = 'a/b']")


def test_an_adapter_that_is_zero_has_no_cosine(run: Run, tmp_path: Path) -> None:
    given = factors(2)
    one = write_peft(tmp_path / "one", given)
    zero = write_peft(tmp_path / "zero", {name: (a, np.zeros_like(b)) for name, (a, b) in given.items()})
    result = run("compare", one, zero)
    assert result.code == 0
    assert f"score 0.0000 over 2 matrices, no cosine, for {zero} is zero; unrelated" in result.out
    assert "nan" not in result.out.replace(str(tmp_path), "")
    again = write_peft(tmp_path / "again", {name: (a, np.zeros_like(b)) for name, (a, b) in given.items()})
    assert f"no cosine, for {zero} and {again} are zero" in run("compare", zero, again).out


NONSENSE = [
    ({"r": "four"}, "'r' is 'four'; expected a whole number from 1"),
    ({"r": None}, "'r' is None; expected a whole number from 1"),
    ({"r": True}, "'r' is True"),
    ({"r": 0}, "'r' is 0"),
    ({"lora_alpha": None}, "'lora_alpha' is None; expected a number"),
    ({"lora_alpha": "16"}, "'lora_alpha' is '16'; expected a number"),
    ({"lora_alpha": float("inf")}, "'lora_alpha' is inf"),
    ({"use_rslora": "false"}, "'use_rslora' is 'false'; expected true or false"),
    ({"alpha_pattern": {"query": None}}, "alpha_pattern of adapter_config.json has null for 'query'"),
]


@pytest.mark.parametrize(("config", "message"), NONSENSE)
def test_nonsense_in_a_config_is_named(
    run: Run, toy_store: Path, tmp_path: Path, config: dict[str, object], message: str
) -> None:
    one = write_peft(tmp_path / "one", factors(2))
    bad = write_peft(tmp_path / "bad", factors(2), **config)
    for asked in (("compare", one, bad), ("--store", toy_store, "adapter", "import", bad, "--name", "x")):
        result = run(*asked)
        assert (result.code, result.out) == (1, "")
        assert message in result.err
        assert "adapter_config.json" in result.err


def test_what_a_config_leaves_out_has_a_default(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "one", factors(2))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "alpha_pattern": null, "use_rslora": null}')
    assert [layer.scale for layer in read_lora(folder).layers.values()] == [1.0, 1.0]


BAD = [
    ("missing", "there is no file or folder"),
    ("empty", "holds no adapter_model.safetensors"),
    ("pickled", "pickled, which can run code"),
    ("several", "holds several safetensors files"),
    ("model.bin", "is no safetensors file; pickled weights"),
    ("cut.safetensors", "is no sound safetensors file"),
    ("other.safetensors", "holds no LoRA factors"),
    ("half.safetensors", "but no B; the checkpoint is incomplete"),
    ("odd.safetensors", "don't multiply"),
    ("nan.safetensors", "hold NaN or infinity"),
    ("int.safetensors", "is kept as I32"),
    ("ia3", "describes a IA3 adapter"),
    ("config", "cannot be read as JSON"),
    ("elsewhere.safetensors", "have no matrix in common"),
    ("wide.safetensors", "belong to different base models"),
]


@pytest.mark.parametrize(("name", "message"), BAD)
def test_a_checkpoint_that_cannot_be_compared(run: Run, tmp_path: Path, name: str, message: str) -> None:
    good = write_peft(tmp_path / "good", factors(2))
    a, b = factors(2)[Q]
    for folder in ("empty", "pickled", "several"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"x")
    save_file({"x": a}, tmp_path / "several" / "a.safetensors")
    save_file({"x": a}, tmp_path / "several" / "b.safetensors")
    (tmp_path / "model.bin").write_bytes(b"x")
    (tmp_path / "cut.safetensors").write_bytes((good / "adapter_model.safetensors").read_bytes()[:-8])
    down, up = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
    save_file({"x": a}, tmp_path / "other.safetensors")
    save_file({down: a}, tmp_path / "half.safetensors")
    save_file({down: a, up: b[:, :1].copy()}, tmp_path / "odd.safetensors")
    save_file({down: a, up: b * np.float32(np.nan)}, tmp_path / "nan.safetensors")
    save_file({down: a.astype(np.int32), up: b}, tmp_path / "int.safetensors")
    save_file({"gpt.h.0.attn.lora_A.weight": a, "gpt.h.0.attn.lora_B.weight": b}, tmp_path / "elsewhere.safetensors")
    save_file({down: a, up: np.vstack([b, b])}, tmp_path / "wide.safetensors")
    write_peft(tmp_path / "ia3", factors(2), peft_type="IA3")
    write_peft(tmp_path / "config", factors(2))
    (tmp_path / "config" / "adapter_config.json").write_text("{")
    result = run("compare", good, tmp_path / name)
    assert message in result.err
    assert (result.code, result.out) == (1, "")


def logits_here(store_path: Path, name: str, texts: list[str]) -> torch.Tensor:
    """Logits of a stored adapter on the model that trained it, without peft's loading."""
    from repmatch.curator.training import adapted
    from repmatch.curator.workbench import Workbench
    from repmatch.datamodels import Row

    with repmatch.open(store_path) as store:
        curator = repmatch.Curator(store)
        adapter, space = curator.adapter(name), curator.trainer.space_of("toy")
        bench = Workbench.of_space(space, curator.settings, store)
        task = bench.task(("no", "yes"))
        rows = [Row(str(i), "{}", text, None, "no", "", "", "", 0) for i, text in enumerate(texts)]
        batch = task.collate(task.encode(rows))
        batch.pop("labels")
        module = bench.start(("no", "yes"))
        with adapted(module, space) as wrapped, torch.inference_mode():
            layers = dict(module.named_modules())
            for matrix in adapter.a:
                layers[matrix].lora_A["default"].weight.data.copy_(torch.from_numpy(adapter.a[matrix].copy()))
                layers[matrix].lora_B["default"].weight.data.copy_(torch.from_numpy(adapter.b[matrix].copy()))
            return wrapped(**batch).logits.clone()


@pytest.mark.parametrize("architecture", ["bert", "roberta", "electra", "distilbert"])
def test_an_exported_adapter_loads_to_identical_logits(
    run: Run, tmp_path: Path, toy_file: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_models import checkpoint

    model, store = checkpoint(tmp_path / "base", architecture), tmp_path / "store"
    run("--store", store, "ingest", toy_file, "--dataset", "toy", "--model", model)
    name, folder = "toy[label = 'yes']", tmp_path / "out"
    done = run("--store", store, "adapter", "export", name, "-o", folder, "--epochs", 3, "--json")
    assert done.code == 0, done.err
    texts = ["the film was good", "a dull plot and a very loud actor", "bad"]
    expected = logits_here(store, name, texts)

    card = (folder / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)  # as the card says, in the folder
    loaded, tokenizer = names["model"], names["tokenizer"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")  # type: ignore[operator]
    batch.pop("token_type_ids", None)
    with torch.inference_mode():
        found = loaded(**batch).logits  # type: ignore[operator]
    assert torch.equal(found, expected)
    with torch.inference_mode(), loaded.disable_adapter():  # type: ignore[attr-defined]
        assert not torch.allclose(loaded(**batch).logits, expected)  # type: ignore[operator]
    # Reads back to itself.
    both = run("--store", store, "compare", name, folder, "--epochs", 3, "--json").objects[0]
    scores = both["scores"]
    assert isinstance(scores, list)
    assert scores[0][1] == pytest.approx(1.0, abs=1e-6)
    assert json.loads((folder / "repmatch.json").read_text())["labels"] == ["no", "yes"]


def test_an_adapter_of_a_warm_start_brings_the_start_along(
    run: Run, tmp_path: Path, toy_file: Path, tiny_model: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    store, folder, texts = tmp_path / "store", tmp_path / "out", ["the film was good", "a dull plot", "bad"]
    ingested = run("--store", store, "ingest", toy_file, "--dataset", "toy", "--model", tiny_model, "--warm-start", 20)
    assert ingested.code == 0, ingested.err
    done = run("--store", store, "adapter", "export", "toy", "-o", folder, "--epochs", 3, "--json")
    assert done.code == 0, done.err
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 1 + 8
    expected = logits_here(store, "toy", texts)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    loaded = PeftModel.from_pretrained(base, str(folder)).eval()
    batch = AutoTokenizer.from_pretrained(tiny_model)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        assert loaded(**batch).logits == pytest.approx(expected, abs=1e-5)
        assert loaded(**batch).logits.std() > 0.01


def test_export_leaves_the_shared_model_as_it_was(run: Run, toy_store: Path, tmp_path: Path) -> None:
    before = run("--store", toy_store, "nearest", "toy", "--text", "good film", "--label", "yes", "--json").out
    assert run("--store", toy_store, "adapter", "export", "toy", "-o", tmp_path / "a", "--epochs", 1).code == 0
    assert run("--store", toy_store, "nearest", "toy", "--text", "good film", "--label", "yes", "--json").out == before


def test_export_replaces_only_what_it_wrote(run: Run, toy_store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "precious.txt").write_text("keep me")
    for more in ((), ("--replace",)):
        result = run("--store", toy_store, "adapter", "export", "toy", "-o", folder, "--epochs", 1, *more)
        assert (result.code, "is there already" in result.err) == (2, True)
    assert (folder / "precious.txt").read_text() == "keep me"
    shutil.rmtree(folder)
    for more in ((), ("--replace",)):
        assert run("--store", toy_store, "adapter", "export", "toy", "-o", folder, "--epochs", 1, *more).code == 0
    assert run("--store", toy_store, "adapter", "export", "toy", "-o", tmp_path / "x" / "y").code == 2
    assert not list(tmp_path.glob(".a.*"))


def test_an_imported_adapter_scores_and_compares(run: Run, toy_store: Path, tmp_path: Path) -> None:
    asked = ("--store", toy_store)
    assert run(*asked, "adapter", "export", "toy", "-o", tmp_path / "toy-lora", "--epochs", 1).code == 0
    own = {
        str(row["id"]): float(str(row["score"])) for row in run(*asked, "score", "toy", "--epochs", 1, "--json").objects
    }
    imported = run(*asked, "adapter", "import", tmp_path / "toy-lora", "--name", "theirs", "--dataset", "toy", "--json")
    assert imported.objects[0]["layers"] == 4
    for against in ("theirs", tmp_path / "toy-lora"):
        result = run(*asked, "score", "toy", "--against", against, "--json")
        assert result.code == 0, result.err
        for row in result.objects:
            assert float(str(row["score"])) == pytest.approx(own[str(row["id"])], abs=1e-6)
    assert "adapter: imported, 4 matrices" in run(*asked, "score", "toy", "--against", "theirs").err
    mixed = run(*asked, "compare", "theirs", "toy", "--epochs", 1, "--json").objects[0]["scores"]
    assert isinstance(mixed, list)
    assert mixed[0][1] == pytest.approx(1.0, abs=1e-6)
    listed = run(*asked, "adapter", "list", "--json").objects
    assert [(row["subset"], row["from"]) for row in listed][:2] == [("toy", "60 instances"), ("theirs", "imported")]


def test_a_checkpoint_of_part_of_the_matrices_scores_over_those(run: Run, toy_store: Path, tmp_path: Path) -> None:
    name = "bert.encoder.layer.1.attention.self.value"
    write_peft(tmp_path / "part", factors(3, (name, "bert.other"), d_out=32, d_in=32))
    with repmatch.open(toy_store) as store:
        found = repmatch.Curator(store).score("toy", against=str(tmp_path / "part"))
        assert found.matrices == (name,)
        assert found.scores.tolist() == pytest.approx(found.per_matrix[:, 0].tolist())
        assert found.chance > 1 / 32
    write_peft(tmp_path / "none", factors(3, ("bert.other",)))
    write_peft(tmp_path / "wide", factors(3, (name,)))
    for folder, message in (("none", "adapts none of the matrices"), ("wide", "belongs to another base model")):
        result = run("--store", toy_store, "score", "toy", "--against", tmp_path / folder)
        assert (result.code, message in result.err) == (1, True)


def test_names_that_an_import_cannot_take(run: Run, toy_store: Path, tmp_path: Path) -> None:
    write_peft(tmp_path / "one", factors(1))
    write_peft(tmp_path / "two", factors(1, seed=1))
    asked = ("--store", toy_store, "adapter", "import")
    assert "already" in run(*asked, tmp_path / "one", "--name", "toy").err
    assert run(*asked, tmp_path / "one", "--name", "a/b").code == 2
    assert run(*asked, tmp_path / "one", "--name", "mine").code == 0
    assert run(*asked, tmp_path / "one", "--name", "mine").code == 0  # the same again is no change
    assert "another imported adapter" in run(*asked, tmp_path / "two", "--name", "mine").err
    assert "no head" in run("--store", toy_store, "adapter", "export", "mine", "-o", tmp_path / "x").err
    with pytest.raises(InputError):
        read_lora(tmp_path / "nothing")
