"""Factors: encodings, order, views, errors."""

from __future__ import annotations

import mmap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from store_worker import filled, make_batch, make_dataset, make_row, make_rows, make_space, prepare, values_of

from repmatch import store as stores
from repmatch.errors import InputError, UnknownNameError, UsageError


def test_float32_comes_back_bit_for_bit(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s")
    factors = store.factors("d")
    rows = make_rows(*range(6))
    assert factors.ids == tuple(row.id for row in rows)
    assert factors.flat is not None
    np.testing.assert_array_equal(factors.flat, np.stack([values_of(row, space) for row in rows]))
    np.testing.assert_array_equal(factors.norms, np.tile(np.arange(1, 7, dtype="f4").reshape(3, 2), (2, 1)))
    assert factors.cores is None
    assert factors.bits is None
    assert factors.space_id == space.id


def test_float16_comes_back_rounded(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s", encoding="float16")
    factors = store.factors("d")
    assert factors.flat is not None
    assert factors.flat.dtype == np.float16
    expected = np.stack([values_of(row, space) for row in make_rows(*range(6))]).astype(np.float16)
    np.testing.assert_array_equal(factors.flat, expected)


def test_sign_codes_are_exact(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s", encoding="sign")
    factors = store.factors("d")
    assert factors.flat is None
    assert factors.bits is not None
    assert factors.bits.shape == (6, 2 + 1)
    for i, row in enumerate(make_rows(*range(6))):
        values = values_of(row, space)
        for lo, hi, word in ((0, 70, 0), (70, 134, 2)):
            for j in range(hi - lo):
                bit = int(factors.bits[i, word + j // 64]) >> (j % 64) & 1
                assert bit == (values[lo + j] < 0)
        assert int(factors.bits[i, 1]) >> 6 == 0  # padding


def test_rank_above_one_keeps_cores(tmp_path: Path) -> None:
    store, space = stores.open(tmp_path / "s"), make_space(rank=3, dims=(5, 7))
    prepare(store, space, "float16")
    batch = make_batch(make_rows(0, 1), space)
    store.append("d", space.id, "float16", batch)
    factors = store.factors("d")
    assert batch.cores is not None
    np.testing.assert_array_equal(factors.cores, batch.cores)
    np.testing.assert_array_equal(factors.norms, batch.norms)
    assert factors.matrix(1).shape == (2, 7, 3)


def test_sign_codes_need_rank_one(tmp_path: Path) -> None:
    store, space = stores.open(tmp_path / "s"), make_space(rank=2)
    prepare(store, space, "sign")
    with pytest.raises(UsageError, match="--encoding float16"):
        store.append("d", space.id, "sign", make_batch(make_rows(0), space))


def test_contiguous_rows_are_a_view_of_the_file(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s")
    factors = store.factors("d")
    assert factors.flat is not None
    assert not factors.flat.flags.owndata
    assert not factors.flat.flags.writeable
    assert np.shares_memory(factors.values, factors.flat.reshape(6, -1)) if len(set(factors.layout.dims)) == 1 else True
    assert np.shares_memory(factors.matrix(0), factors.flat)
    base = factors.flat
    while isinstance(base.base, np.ndarray):
        base = base.base
    held = base.base
    assert isinstance(held.obj if isinstance(held, memoryview) else held, mmap.mmap)


def test_given_order_is_gathered(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s")
    factors = store.factors("d", ids=["r4", "r0", "r4"])
    assert factors.ids == ("r4", "r0", "r4")
    rows = {row.id: values_of(row, space) for row in make_rows(0, 4)}
    np.testing.assert_array_equal(factors.flat, np.stack([rows["r4"], rows["r0"], rows["r4"]]))


def test_streaming_equals_reading(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s", count=7, batch=3)
    parts = list(store.iter_factors("d", size=3))
    assert [len(part) for part in parts] == [3, 3, 1]
    whole = store.factors("d")
    assert sum((part.ids for part in parts), ()) == whole.ids
    np.testing.assert_array_equal(np.concatenate([part.flat for part in parts]), whole.flat)


def test_segments_are_sealed_and_read_across(tmp_path: Path) -> None:
    store, space = stores.open(tmp_path / "s"), make_space()
    store.segment_bytes = 4096 + 1000
    prepare(store, space)
    for i in range(4):
        store.append("d", space.id, "float32", make_batch(make_rows(2 * i, 2 * i + 1), space))
    assert len(list((tmp_path / "s" / "segments").glob("*.bin"))) == 4
    rows = make_rows(*range(8))
    np.testing.assert_array_equal(store.factors("d").flat, np.stack([values_of(row, space) for row in rows]))
    picked = store.factors("d", ids=["r7", "r0", "r3"])
    np.testing.assert_array_equal(picked.flat, np.stack([values_of(rows[i], space) for i in (7, 0, 3)]))
    assert store.sql("SELECT count(*) AS n FROM registry.segments WHERE sealed AND sha256 IS NOT NULL")["n"][0] == 3
    assert store.verify() == []


def test_a_changed_task_replaces_the_factor_everywhere(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s")
    other = make_space(seed=1)
    store.save_space(other)
    store.append("d", other.id, "float32", make_batch(make_rows(0, 1), other))
    assert store.factors("d", space_id=other.id).ids == ("r0", "r1")
    changed = make_row("r1", text="another text", n=1)
    store.append("d", space.id, "float32", make_batch([changed], space))
    assert store.factors("d", space_id=other.id).ids == ("r0",)
    factors = store.factors("d")
    assert factors.ids == tuple(f"r{i}" for i in range(6))
    assert factors.flat is not None
    np.testing.assert_array_equal(factors.flat[1], values_of(changed, space))
    assert dict(store.rows("d"))["r1"] == changed.json
    assert store.verify() == []


def test_instances_without_factor_are_left_out_or_named(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s")
    store.save_dataset(replace(make_dataset(space), encoding="float16"))
    store.append("d", space.id, "float16", make_batch(make_rows(2, 3), space))
    assert store.factors("d").ids == ("r2", "r3")
    with pytest.raises(UnknownNameError, match="'r0' of 'd' has no factor"):
        store.factors("d", ids=["r2", "r0"])
    with pytest.raises(UnknownNameError, match="no instance 'nope'"):
        store.factors("d", ids=["nope"])


def test_empty_dataset_and_empty_batch(tmp_path: Path) -> None:
    store, space = stores.open(tmp_path / "s"), make_space()
    prepare(store, space)
    store.append("d", space.id, "float32", make_batch([], space))
    factors = store.factors("d")
    assert len(factors) == 0
    assert factors.flat is not None
    assert factors.flat.shape == (0, 134)
    assert list(store.iter_factors("d")) == []
    assert store.ids("d") == []
    assert list(store.rows("d")) == []


@pytest.mark.parametrize("name", ["values", "norms"])
def test_nan_is_refused(tmp_path: Path, name: str) -> None:
    store, space = filled(tmp_path / "s")
    batch = make_batch(make_rows(8, 9), space)
    getattr(batch, name)[1, 0] = np.nan
    with pytest.raises(UsageError, match="'r9' holds NaN"):
        store.append("d", space.id, "float32", batch)
    assert len(store.ids("d")) == 6


def test_wrong_shapes_and_repeats_are_refused(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s")
    batch = make_batch(make_rows(8, 9), space)
    with pytest.raises(UsageError, match=r"norms have shape \(2, 1\)"):
        store.append("d", space.id, "float32", replace(batch, norms=batch.norms[:, :1]))
    with pytest.raises(UsageError, match="'r8' twice"):
        store.append("d", space.id, "float32", make_batch(make_rows(8, 8), space))
    with pytest.raises(InputError, match="surrogate"):
        store.append("d", space.id, "float32", make_batch([make_row("r8", text="\ud800")], space))
    assert store.verify() == []


ODD = [
    "it's",
    'say "hi"',
    "a\0b",
    "0012",
    "",
    " ",
    "日本語 🙂",
    "x" * 10_000,
    "a\nb",
    "%",
    "r[1]",
    "'; DROP TABLE x; --",
]


def test_ids_can_be_anything(tmp_path: Path) -> None:
    store, space = stores.open(tmp_path / "s"), make_space()
    prepare(store, space)
    store.append("d", space.id, "float32", make_batch([make_row(i) for i in ODD], space))
    assert store.ids("d") == ODD
    backwards = ODD[::-1]
    assert store.factors("d", ids=backwards).ids == tuple(backwards)
    assert [i for i, _ in store.rows("d", ids=backwards)] == backwards
    assert store.column("d", "id") == ODD
    store.save_subset("odd", "d", ODD[3:7])
    assert store.resolve("odd").ids == tuple(ODD[3:7])
    assert store.verify() == []
