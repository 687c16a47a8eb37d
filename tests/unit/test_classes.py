"""Class folders: their numbers are those of the folders that exist, named, kept and comparable."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from splatshard.jobs.destination.class_texts import lines_of, place_texts, read_classes
from splatshard.jobs.destination.plan import make_plan, planned
from splatshard.jobs.destination.plan_file import write_plan
from splatshard.pipeline.evaluation.class_texts import CLASSNAMES
from splatshard.pipeline.source.listing import list_source
from splatshard.pipeline.source.read import read, scan
from splatshard.schemas.config import class_list, source_of
from splatshard.schemas.errors import UsageError
from splatshard.schemas.shard import ShardRef
from tests.make import image_folder, imagenet_tar, jpeg, write_parquet
from tests.rows import config_of

Capsys = pytest.CaptureFixture[str]
ANIMALS = ("ant", "bee", "cat", "dog")


def labels(refs: list[ShardRef]) -> dict[str, int | None]:
    """By key; the same with and without the images."""
    found = {s.key: s.label for ref in refs for s in read(ref, hashlib.sha256())}
    assert found == {s.key: s.label for ref in refs for s in scan(ref)}
    return found


@pytest.fixture
def val(tmp_path: Path) -> Path:
    """Four class folders: one is empty, one holds a file of an unknown kind only."""
    root = image_folder(tmp_path / "val", ("ant", "dog"), per_class=1)
    (root / "bee").mkdir()
    (root / "cat").mkdir()
    (root / "cat" / "0.xyz").write_bytes(jpeg())
    return root


def test_folders_without_images_have_numbers_too(val: Path, tmp_path: Path) -> None:
    train = list_source(str(image_folder(tmp_path / "train", ANIMALS, per_class=1)))
    found = list_source(str(val))
    assert labels(train.refs) == {f"{name}/0000": i for i, name in enumerate(ANIMALS)}
    assert labels(found.refs) == {"ant/0000": 0, "dog/0000": 3}
    assert found.classes == train.classes == ANIMALS
    assert train.notes == ["4 classes by folder: ant, bee, cat, dog"]
    assert found.notes[0] == train.notes[0]
    assert found.notes[1] == f"no image in 2 of the class folders of {val}: bee, cat"
    assert found.left_out == {"other": {"xyz": 1}}


def test_hidden_folders_are_no_classes(val: Path) -> None:
    for name in (".git", ".ipynb_checkpoints", "__MACOSX"):
        (val / name).mkdir()
    assert list_source(str(val)).classes == ANIMALS


def test_folders_of_systems_are_no_classes(val: Path) -> None:
    """Thumbnails of a NAS, what was deleted, what a disk had lost: none is between the classes."""
    thumb = val / "ant" / "@eaDir" / "0000.jpg" / "SYNOPHOTO_THUMB_M.jpg"
    others = [val / name / "x.jpg" for name in ("lost+found", "$RECYCLE.BIN", "@eaDir", "#recycle")]
    for path in (thumb, *others):
        path.parent.mkdir(parents=True)
        path.write_bytes(jpeg())
    found = list_source(str(val))
    assert (found.classes, labels(found.refs)) == (ANIMALS, {"ant/0000": 0, "dog/0000": 3})


@pytest.mark.parametrize(
    "names",
    [("Cat", "cat"), ("cat", "cat "), ("caf\xe9", "cafe\u0301")],
    ids=["case", "space", "NFD"],
)
def test_classes_that_look_alike_are_told(tmp_path: Path, names: tuple[str, ...]) -> None:
    root = image_folder(tmp_path / "in", names, per_class=1)
    found = list_source(str(root))
    assert found.classes == tuple(sorted(names))
    some = " and ".join(map(ascii, found.classes))
    assert any(note.startswith(f"{some} are classes of their own") for note in found.notes)


@pytest.mark.parametrize(
    "folders",
    [
        ("test_set", "training_set"),
        ("seg_train", "seg_test"),
        ("train_images", "test_images"),
        ("train2017", "val2017", "annotations/"),
        ("training-data", "unlabeled"),
    ],
)
def test_splits_under_other_names(tmp_path: Path, folders: tuple[str, ...]) -> None:
    """By whatever name, and beside folders that hold no image."""
    held = [name for name in folders if not name.endswith("/")]
    root = image_folder(tmp_path / "in", held, per_class=1)
    for name in folders:
        (root / name).mkdir(exist_ok=True)
    found = list_source(str(root))
    assert (found.classes, set(labels(found.refs).values())) == ((), {None})
    assert "are splits and taken for no classes" in found.notes[0]


def test_classes_further_within_are_told(tmp_path: Path) -> None:
    for name in ("Cat", "Dog"):
        image_folder(tmp_path / "in" / "unzipped" / "PetImages", (name,), per_class=1)
    notes = list_source(f"{tmp_path}/in").notes
    assert f"give {tmp_path}/in/unzipped/PetImages if they are the classes" in notes[1]
    image_folder(tmp_path / "tiny" / "n01443537", ("images",), per_class=1)
    image_folder(tmp_path / "tiny" / "n01629819", ("images",), per_class=1)
    assert list_source(f"{tmp_path}/tiny").notes == ["2 classes by folder: n01443537, n01629819"]


def test_empty_folders_elsewhere(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/val/ant/0.jpg", jpeg())
    fs.makedirs("/val/bee")
    fs.pipe("/val/cat/0.jpg", jpeg())
    try:
        assert labels(list_source("memory://val").refs) == {"ant/0": 0, "cat/0": 2}
    finally:
        fs.rm("/", recursive=True)


def test_several_folders_share_their_numbers(tmp_path: Path) -> None:
    first = image_folder(tmp_path / "first", ("bee", "cat"), per_class=1)
    second = image_folder(tmp_path / "second", ("ant", "cat"), per_class=1)
    found = list_source(f"{first}::{second}")
    assert found.notes[0] == "3 classes by folder: ant, bee, cat"
    assert [labels([ref]) for ref in found.refs] == [
        {"bee/0000": 1, "cat/0000": 2},
        {"ant/0000": 0, "cat/0000": 2},
    ]


def test_images_beside_the_folders_are_told(val: Path) -> None:
    (val / "top.jpg").write_bytes(jpeg())
    found = list_source(str(val))
    assert set(labels(found.refs).values()) == {None}
    (note,) = found.notes
    assert note.startswith(f"no labels: 1 of the images of {val} lie beside its folders (top.jpg)")
    found = list_source(str(val), classes=ANIMALS)
    assert labels(found.refs) == {"ant/0000": 0, "dog/0000": 3, "top": None}
    assert "without a label: 1 of the images" in found.notes[1]


@pytest.mark.parametrize(
    ("folders", "are_classes"),
    [
        (("00000", "00001"), False),
        (("07", "42"), False),
        (("0", "1", "2"), True),  # digits
        (("9", "10"), True),
        (("00000", "cat"), True),
        (("n01440764", "n01443537"), True),
    ],
)
def test_numbers_of_shards_are_no_classes(
    folders: tuple[str, ...], are_classes: bool, tmp_path: Path
) -> None:
    root = image_folder(tmp_path / "files", folders, per_class=1)
    found = list_source(str(root))
    assert found.classes == (tuple(sorted(folders)) if are_classes else ())
    assert any("numbers of one length" in note for note in found.notes) != are_classes
    assert list_source(str(root), classes=folders).classes == folders


def test_a_list_of_classes_is_followed(val: Path) -> None:
    found = list_source(str(val), classes=("dog", "owl", "ant"))
    assert labels(found.refs) == {"ant/0000": 2, "dog/0000": 0}
    assert found.notes == [
        "3 classes by folder: dog, owl, ant",
        f"no image in 1 of the class folders of {val}: owl",
    ]
    assert source_of(found.refs[0]) != source_of(list_source(str(val)).refs[0])
    with pytest.raises(UsageError, match=r"images in dog, which the given classes \(--c"):
        list_source(str(val), classes=("ant", "bee"))


def test_a_list_of_classes_needs_class_folders(tmp_path: Path) -> None:
    tar = imagenet_tar(tmp_path / "tars" / "a.tar")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "0.jpg").write_bytes(jpeg())
    for src in (tar, tmp_path / "flat"):
        with pytest.raises(UsageError, match="--classes is for folders of images"):
            list_source(str(src), classes=("ant",))


def test_labels_that_contradict_their_folder_are_told(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "in", ("ant", "bee"), per_class=2)
    (root / "bee" / "0000.cls").write_text("1")  # says the same
    (root / "bee" / "0001.cls").write_text("7")
    (root / "bee" / "0001.json").write_text('{"label": 8}')
    (root / "ant" / "0001.json").write_text('{"label": 9}')
    (ref,) = list_source(str(root)).refs
    samples = {s.key: s for s in read(ref, hashlib.sha256())}
    assert {key: s.label for key, s in samples.items()} == {
        "ant/0000": 0, "ant/0001": 9, "bee/0000": 1, "bee/0001": 7
    }  # fmt: skip
    assert {key: dict(s.unused) for key, s in samples.items() if s.unused} == {
        "ant/0001": {"the label of the class folder": "it is 0, and the JSON has another"},
        "bee/0001": {
            "the label of the JSON": "it is 8, and a member has another",
            "the label of the class folder": "it is 1, and a member has another",
        },
    }


# Kept beside the shards


def write_plan_of(refs: list[ShardRef], dst: Path) -> None:
    dst.mkdir(exist_ok=True)
    write_plan(str(dst), planned(refs, make_plan(refs, {}, config_of(), str), config_of()))


def test_names_are_kept_beside_the_shards(val: Path, tmp_path: Path, capsys: Capsys) -> None:
    refs, dst = list_source(str(val)).refs, tmp_path / "out"
    write_plan_of(refs, dst)
    place_texts(refs, str(dst))
    assert (dst / CLASSNAMES).read_text() == "ant\nbee\ncat\ndog\n"
    assert lines_of("", CLASSNAMES, str(dst)) == list(ANIMALS)
    (dst / CLASSNAMES).write_text("an ant\na bee\na cat\na dog\n")  # edited: stays
    place_texts(refs, str(dst))
    assert (dst / CLASSNAMES).read_text().startswith("an ant\n")
    assert "warning" not in capsys.readouterr().err


def test_names_that_do_not_fit_are_told(val: Path, tmp_path: Path, capsys: Capsys) -> None:
    refs, dst = list_source(str(val)).refs, tmp_path / "out"
    write_plan_of(refs, dst)
    (dst / CLASSNAMES).write_text("ant\nbee\n")
    place_texts(refs, str(dst))
    err = capsys.readouterr().err
    assert f"{dst}/{CLASSNAMES} has 2 names for 4 classes: delete it" in err
    assert "numbered by other classes" not in err
    write_plan_of([replace(refs[0], name="other", labels=("ant", "dog"))], dst)
    place_texts(refs, str(dst))
    assert "numbered by other classes" in capsys.readouterr().err


def test_the_classes_of_another_split(val: Path, tmp_path: Path) -> None:
    train = list_source(str(image_folder(tmp_path / "train", ("ant", "dog", "bee"))))
    dst = tmp_path / "splats"
    write_plan_of(train.refs, dst)
    (dst / CLASSNAMES).write_text("names\nfor\npeople\n")
    assert read_classes(str(dst)) == ("ant", "bee", "dog")
    found = list_source(str(val), classes=read_classes(str(dst)))
    assert labels(found.refs) == {"ant/0000": 0, "dog/0000": 2}
    write_plan_of([replace(train.refs[0], name="other", labels=("ant",))], dst)
    with pytest.raises(UsageError, match=r"--classes \S+: its shards are numbered by 2 lists"):
        read_classes(str(dst))


@pytest.mark.parametrize(
    ("folders", "are_splits"),
    [
        (("train", "Val"), True),
        (("dev", "eval_1", "extra"), True),
        (("train2017", "val2017"), True),
        (("train_images", "train_masks", "val-labels"), True),
        (("test", "train", "tram"), False),
    ],
)
def test_splits_are_no_classes(tmp_path: Path, folders: tuple[str, ...], are_splits: bool) -> None:
    found = list_source(str(image_folder(tmp_path / "in", folders, per_class=1)))
    assert found.classes == (() if are_splits else folders)
    assert any("are splits and taken for no classes" in n for n in found.notes) == are_splits
    assert list_source(f"{tmp_path}/in", classes=folders).classes == folders


def test_a_folder_of_all_images_is_no_class(tmp_path: Path) -> None:
    """Of Tiny ImageNet's `val`, and of YOLO's data; all of its images had the label 0."""
    for folders in (("images",), ("JPEGImages", "labels"), ("imgs", "masks")):
        held = folders if "masks" in folders else folders[:1]
        root = image_folder(tmp_path / folders[0], held, per_class=1)
        for name in folders[1:]:
            (root / name).mkdir(exist_ok=True)
        found = list_source(str(root))
        assert (found.classes, set(labels(found.refs).values())) == ((), {None})
        assert "are places of all images and taken for no classes" in found.notes[0]
    assert list_source(str(image_folder(tmp_path / "in", ("images", "cat")))).classes


def test_labels_that_may_not_be_meant_are_told(tmp_path: Path) -> None:
    found = list_source(str(image_folder(tmp_path / "numbers", map(str, range(12)), per_class=1)))
    assert labels(found.refs)["10/0000"] == 2
    (note,) = found.notes[1:]
    assert note.startswith("folders that are numbers are sorted as texts, and their label is their")
    assert "place: 2 for the folder 10; " in note
    in_order = [str(i) for i in range(12)]
    found = list_source(f"{tmp_path}/numbers", classes=in_order)
    assert (labels(found.refs)["10/0000"], len(found.notes)) == (10, 1)
    found = list_source(str(image_folder(tmp_path / "from_one", ("1", "2"), per_class=1)))
    assert "place: 0 for the folder 1; " in found.notes[1]
    for names, place in (
        (("-1", "0"), "0 for the folder -1"),
        (("0.5", "1.5"), "0 for the folder"),
    ):
        found = list_source(str(image_folder(tmp_path / names[0], names, per_class=1)))
        assert f"place: {place}" in found.notes[1]
    found = list_source(str(image_folder(tmp_path / "digits", ("0", "1"), per_class=1)))
    assert len(found.notes) == 1
    found = list_source(str(image_folder(tmp_path / "one", ("cat",), per_class=1)))
    assert found.notes[1:] == ["all images have the label 0, since cat is the only folder"]


def test_folders_within_class_folders_are_told(tmp_path: Path) -> None:
    for outer in ("minitrain", "minival"):
        image_folder(tmp_path / "in" / outer, ("ant", "bee"), per_class=1)
    found = list_source(f"{tmp_path}/in")
    assert found.classes == ("minitrain", "minival")
    (note,) = found.notes[1:]
    assert note.startswith("minitrain/ant and minitrain/bee are not told apart by their labels")
    assert note.endswith(f"give {tmp_path}/in/minitrain if they are the classes")
    for name in ("n01", "n02"):  # Tiny ImageNet
        image_folder(tmp_path / "tiny" / name, ("images",), per_class=1)
    assert len(list_source(f"{tmp_path}/tiny").notes) == 1


def test_names_in_another_order_are_told(val: Path, tmp_path: Path, capsys: Capsys) -> None:
    """A file beside the images, of a tool that numbers them otherwise."""
    (val / CLASSNAMES).write_text("dog\ncat\nbee\nant\n")
    refs, dst = list_source(str(val)).refs, tmp_path / "out"
    write_plan_of(refs, dst)
    place_texts(refs, str(dst))
    assert f"{CLASSNAMES} has dog in line 1, and its label is 3: " in capsys.readouterr().err
    found = list_source(str(val), classes=read_classes(str(val / CLASSNAMES)))
    place_texts(found.refs, str(dst))
    assert "in line" not in capsys.readouterr().err


# Hugging Face's ClassLabel


def class_label_table(path: Path, names: list[str] | None, column: str = "label") -> Path:
    features: dict[str, object] = {"image": {"_type": "Image"}}
    features[column] = {"names": names, "_type": "ClassLabel"}
    table = pa.table({"image": [jpeg()] * 2, column: [0, 1]})
    info = json.dumps({"info": {"features": features}})
    return write_parquet(path, table.replace_schema_metadata({"huggingface": info}))


def test_names_of_a_class_label_are_told_and_kept(tmp_path: Path, capsys: Capsys) -> None:
    for name in ("train-0", "train-1"):
        class_label_table(tmp_path / "in" / f"{name}.parquet", ["cat", "dog"], "fine_label")
    found, dst = list_source(f"{tmp_path}/in"), tmp_path / "out"
    assert (found.classes, found.notes) == (("cat", "dog"), ["2 classes by ClassLabel: cat, dog"])
    assert [ref.labels for ref in found.refs] == [("cat", "dog")] * 2
    assert source_of(found.refs[0])["labels"] == class_list(("cat", "dog"))
    write_plan_of(found.refs, dst)
    place_texts(found.refs, str(dst))
    assert lines_of("", CLASSNAMES, str(dst)) == ["cat", "dog"]
    assert read_classes(str(dst)) == ("cat", "dog")
    assert list_source(str(class_label_table(tmp_path / "a.parquet", None))).notes == []


def test_several_class_labels_are_told(tmp_path: Path) -> None:
    one = class_label_table(tmp_path / "a.parquet", ["cat", "dog"])
    two = class_label_table(tmp_path / "b.parquet", ["ant", "cat"])
    found = list_source(f"{one}::{two}")
    assert found.classes == ()
    (note,) = found.notes
    assert note.startswith(f"the labels of {one} (cat, dog) and {two} (ant, cat) are numbered by")
    folder = image_folder(tmp_path / "in", ("ant", "bee"), per_class=1)
    note, _ = list_source(f"{folder}::{two}").notes
    assert note.startswith(f"the labels of {folder} (ant, bee) and {two} (ant, cat) are numbered")


def test_a_file_of_classes(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    for coding in ("utf-8-sig", "utf-16"):
        path.write_text("bee\nänt\n", encoding=coding)
        assert read_classes(str(path)) == ("bee", "änt")
    path.write_text("bee\nbee\n")
    with pytest.raises(UsageError, match="bee is there twice"):
        read_classes(str(path))
    with pytest.raises(UsageError, match="no list of classes"):
        read_classes(str(tmp_path))
    with pytest.raises(UsageError, match=r"nothing: no such file.* a class folder.s name per line"):
        read_classes(str(tmp_path / "nothing"))
