from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest
from conftest import Run, write_rows
from tiny_more import image_checkpoint, write_images

import repmatch
from repmatch.curator.pictures import Picture, eight_bits, image_digest, picture_of
from repmatch.curator.records import RowProblem
from repmatch.curator.rows import FieldChoice, open_rows
from repmatch.curator.tables import read_hub
from repmatch.curator.tasks.images import Pixels
from repmatch.errors import InputError, ModelError, RepMatchError, UsageError

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (the extra 'images')")

TASK = ("--task", "image-classification")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_checkpoint(tmp_path_factory.mktemp("image-model") / "vit", "vit")


def png(image: Any) -> bytes:
    held = io.BytesIO()
    image.save(held, "PNG")
    return held.getvalue()


def curator(store: Any, model: Path) -> repmatch.Curator:
    return repmatch.Curator(store, str(model), settings=repmatch.Settings(task="image-classification", device="cpu"))


def factors(store: Any, dataset: str) -> Any:
    return store.factors(dataset).norms


def test_an_image_comes_as_path_bytes_or_both(tmp_path: Path, vit: Path) -> None:
    rows = write_images(tmp_path, 6)
    held = [(tmp_path / str(row["image"])).read_bytes() for row in rows]
    data = ["data:image/png;base64," + base64.b64encode(raw).decode() for raw in held]
    given: dict[str, list[Any]] = {
        "structs": [{"bytes": raw, "path": f"{i}.png"} for i, raw in enumerate(held)],
        "nameless": [{"bytes": raw, "path": None} for raw in held],
        "paths": [{"bytes": None, "path": f"{i}.png"} for i in range(6)],
        "raw": list(held),
    }
    with repmatch.open(tmp_path / "s") as store:
        curator(store, vit).ingest(write_rows(tmp_path / "r.jsonl", rows), "files")
        for name, images in given.items():
            pl.DataFrame([row | {"image": image} for row, image in zip(rows, images, strict=True)]).write_parquet(
                tmp_path / f"{name}.parquet"
            )
            report = curator(store, vit).ingest(tmp_path / f"{name}.parquet", name)
            assert (report.new, report.quarantined) == (6, 0), report.bad
        uris = [row | {"image": uri} for row, uri in zip(rows, data, strict=True)]
        curator(store, vit).ingest(write_rows(tmp_path / "u.jsonl", uris), "uris")
        for name in (*given, "uris"):
            assert factors(store, name).tolist() == factors(store, "files").tolist()
        assert [row.text for row in store.tasks("structs", ids=["i0"])] == ["0.png"]
        (nameless,) = store.tasks("nameless", ids=["i0"])
        assert nameless.text == f"image:{image_digest(Picture('0.png'), str(tmp_path / 'r.jsonl'), 'image')}"
        near = curator(store, vit).nearest("structs", text=str(tmp_path / "2.png"), label="owl", k=1)
        assert near.ids == ("i2",)


def test_what_is_no_image() -> None:
    for nothing in (None, 3, "", " ", {}, {"bytes": None, "path": None}, {"bytes": 3}, [1]):
        assert picture_of(nothing) is None
    assert picture_of("a.png") == Picture("a.png")
    assert picture_of({"bytes": "BM\0\1", "path": "a.bmp"}) == Picture("a.bmp", b"BM\0\1")
    assert picture_of("BM\0\1") == Picture("image:" + picture_of("BM\0\1").name[6:], b"BM\0\1")  # type: ignore[union-attr]
    for broken in ("data:image/png;base64,!", "data:image/png,abc"):
        with pytest.raises(RowProblem, match="is no data URI in base64"):
            picture_of(broken)


def test_a_folder_with_a_class_a_subfolder(
    run: Run, tmp_path: Path, vit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pets"
    rows = write_images(tmp_path, 6)
    for row in rows:
        place = folder / str(row["label"]) / str(row["image"])
        place.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / str(row["image"])).rename(place)
    (folder / "cat" / ".hidden").write_text("x")
    (folder / "cat" / "gone.png").symlink_to(tmp_path / "nothing")
    (folder / "notes.txt").write_text("x")
    monkeypatch.chdir(folder)
    given = ("--dataset", "d", *TASK, "--model", vit, "--json")
    result = run("--store", tmp_path / "s", "ingest", ".", *given)
    assert (result.objects[0]["new"], result.objects[0]["quarantined"]) == (6, 2)
    assert "'notes.txt' lies in no subfolder" in result.err
    assert "gone.png" in result.err
    again = run("--store", tmp_path / "s", "ingest", folder, "--dataset", "d", "--json")
    assert again.objects[0]["unchanged"] == 6
    with repmatch.open(tmp_path / "s", mode="r") as store:
        assert store.ids("d") == ["cat/0.png", "cat/3.png", "dog/1.png", "dog/4.png", "owl/2.png", "owl/5.png"]
        assert store.dataset("d").labels == ("cat", "dog", "owl")
    texts = run("--store", tmp_path / "t", "ingest", folder, "--dataset", "d")
    assert "A folder of images goes with --task image-classification" in texts.err


def test_folders_that_are_not_classes(tmp_path: Path, vit: Path) -> None:
    (tmp_path / "data" / "train" / "cat").mkdir(parents=True)
    with repmatch.open(tmp_path / "s") as store:
        with pytest.raises(InputError, match="'train/cat' is a folder within a class"):
            curator(store, vit).ingest(tmp_path / "data", "d")
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError, match="the folder has no subfolders"):
            curator(store, vit).ingest(tmp_path / "empty", "d")


def test_a_folders_hash_is_of_its_names_and_bytes(tmp_path: Path) -> None:
    from repmatch.curator.forms import TASKS

    def found() -> str:
        reader = open_rows([str(tmp_path / "f")], FieldChoice(), kind=TASKS["image-classification"])
        list(reader)
        return reader.input_hash

    (tmp_path / "f" / "cat").mkdir(parents=True)
    (tmp_path / "f" / "cat" / "1.png").write_bytes(png(Image.new("RGB", (4, 4))))
    first = found()
    assert found() == first
    (tmp_path / "f" / "cat" / "1.png").write_bytes(png(Image.new("RGB", (4, 4), (9, 9, 9))))
    assert found() != first


def test_relative_paths_of_a_frame_start_at_the_working_directory(
    tmp_path: Path, vit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_images(tmp_path, 4)
    monkeypatch.chdir(tmp_path)
    with repmatch.open(tmp_path / "s") as store:
        report = curator(store, vit).ingest(pl.DataFrame([*rows, rows[0] | {"id": "no", "image": "no.png"}]), "d")
        assert (report.new, report.quarantined) == (4, 1)
        assert report.bad[0].source == "frame.parquet"
        assert str(tmp_path / "no.png") in report.bad[0].reason
        near = curator(store, vit).nearest("d", text="1.png", label="dog", k=1)
        assert near.ids == ("i1",)
        (tmp_path / "1.png").unlink()
        with pytest.raises(InputError, match=r"'1\.png' of .* cannot be read any more"):
            curator(store, vit).nearest("d", text="1.png", label="dog", k=1)


def test_an_image_of_too_many_pixels_is_set_aside(tmp_path: Path, vit: Path) -> None:
    rows = write_images(tmp_path, 4)
    Image.new("1", (14000, 14000)).save(tmp_path / "bomb.png")
    rows.append({"id": "bomb", "image": "bomb.png", "label": "cat"})
    with repmatch.open(tmp_path / "s") as store:
        report = curator(store, vit).ingest(write_rows(tmp_path / "r.jsonl", rows), "d")
    assert (report.new, [bad.id for bad in report.bad]) == (4, ["bomb"])
    assert "exceeds limit" in report.bad[0].reason


def test_grey_values_of_sixteen_bits_are_scaled() -> None:
    wide = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for raw in (png(Image.fromarray(wide)), _tiff(Image.fromarray(wide)), _tiff(Image.fromarray(wide.astype(">u2")))):
        with Image.open(io.BytesIO(raw)) as image:
            assert np.asarray(eight_bits(image, "L")).tolist() == [[0, 1, 128, 255]]
        with Image.open(io.BytesIO(raw)) as image:
            assert np.asarray(eight_bits(image, "RGB"))[0, 2].tolist() == [128, 128, 128]
    for kind in (np.float32, np.int32):
        raw = _tiff(Image.fromarray(wide.astype(kind)))
        with pytest.raises(RowProblem, match="its pixels have 32 bits"):
            image_digest(Picture("x", raw), "", "image")


def _tiff(image: Any) -> bytes:
    held = io.BytesIO()
    image.save(held, "TIFF")
    return held.getvalue()


def test_a_model_reads_as_many_channels_as_it_has(tmp_path: Path) -> None:
    from transformers import AutoModel, ViTConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    AutoModel.from_config(ViTConfig(image_size=32, patch_size=8, num_channels=1, **sizes)).save_pretrained(
        tmp_path / "m"
    )
    with repmatch.open(tmp_path / "s") as store:
        report = curator(store, tmp_path / "m").ingest(write_rows(tmp_path / "r.jsonl", write_images(tmp_path, 4)), "d")
    assert (report.new, report.quarantined) == (4, 0)

    grey = Pixels.of_model({"num_channels": 1, "image_size": 2}, {"image_mean": [0.5] * 3, "image_std": [0.25]})
    white = grey.read(Picture("", png(Image.new("RGB", (3, 3), (255, 255, 255)))), "")
    assert white.tolist() == [[[2.0, 2.0], [2.0, 2.0]]]
    assert grey.template.endswith(",mode:L")
    assert Pixels.of_model({"image_size": 2}, {}).template == "resize:2x2,mean:[0.5, 0.5, 0.5],std:[0.5, 0.5, 0.5]"
    with pytest.raises(ModelError, match="images of 2 channels; expected 1"):
        Pixels.of_model({"num_channels": 2}, {})
    with pytest.raises(ModelError, match="has 3 values in image_mean, but the model reads 1 channels"):
        Pixels.of_model({"num_channels": 1}, {"image_mean": [0.1, 0.2, 0.3]})


def test_options_for_texts_are_refused(run: Run, tmp_path: Path, vit: Path) -> None:
    file = write_rows(tmp_path / "r.jsonl", write_images(tmp_path, 4))
    start = ("--store", tmp_path / "s", "ingest", file, "--dataset", "d")
    asked = [("--max-length", "5"), ("--template", "chat"), ("--text-pair-field", "x")]
    for option in asked:
        result = run(*start, *TASK, "--model", vit, *option)
        assert result.code == 2
        assert f"{option[0]} {option[1]}" in result.err.replace("'", "")
    assert run(*start, *TASK, "--model", vit).code == 0
    for option in asked[:2]:  # the dataset's own task
        assert run(*start, *option).code == 2
    with pytest.raises(UsageError, match="goes with texts"):
        repmatch.Settings(task="image-classification", max_length=5)


def test_images_of_the_hub_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Image:
        def __init__(self, decode: bool = True) -> None:
            self.decode = decode

    class Rows:
        def __init__(self) -> None:
            self.features = {"image": Image(), "label": object()}

        def cast_column(self, column: str, feature: Image) -> Rows:
            self.features[column] = feature
            return self

        def __iter__(self) -> Iterator[dict[str, Any]]:
            kind = self.features["image"]
            assert isinstance(kind, Image)
            yield {"image": object() if kind.decode else {"bytes": b"\x89PNG", "path": None}, "label": "a"}

    module = ModuleType("datasets")
    module.load_dataset = lambda *_, **__: {"train": Rows()}  # type: ignore[attr-defined]
    module.Image = Image  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    (record,) = read_hub("x", None, None)
    assert json.loads(record[1])["image"] == {"bytes": "data:;base64,iVBORw==", "path": None}


def test_without_pillow_the_extra_is_named(tmp_path: Path, vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_rows(tmp_path / "r.jsonl", write_images(tmp_path, 4))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with repmatch.open(tmp_path / "s") as store:
        with pytest.raises(RepMatchError, match=r"repmatch\[images\]"):
            curator(store, vit).ingest(file, "d")
