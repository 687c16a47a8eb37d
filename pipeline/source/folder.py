"""A folder of images: which of its files are samples, under which keys, of which classes.

Each image is a sample; sidecar files of its stem or name (`cat.txt`, `cat.jpg.txt` of `cat.jpg`)
belong to it. Its key is the path without the extension, unless that were the key of two: `cat.jpg`
and `cat.png` are the keys of those two, and `cat.txt` belongs to both.

Classes are the folders directly below, whether or not they hold an image, if no image lies beside
them; a label is the position of its name among the sorted ones. So two splits with the same folders
have the same numbers. Folders whose names are digits, two or more and of one length, are shards of
img2dataset and no classes, nor are splits (`train`, `val2017`) or a folder of all (`images`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from unicodedata import normalize

from splatshard.pipeline.source.sample import BESIDE_EXTENSIONS, IMAGE_EXTENSIONS, MEMBER_FIELDS
from splatshard.pipeline.source.values import storable
from splatshard.schemas.errors import UsageError
from splatshard.schemas.shard import ShardRef

SPLIT = re.compile(
    "([a-z]+[-_])?"
    "(train|training|trainval|val|valid|validation|dev|eval|test|testing|extra|unlabell?ed)"
    "[-_]?(set|data|images?|imgs?|masks?|labels?|annotations?)?[-_]?[0-9]*"
)
CONTAINERS = frozenset(
    (
        *("images", "image", "imgs", "img", "jpegimages", "photos", "pictures"),
        *("masks", "mask", "labels", "annotations", "segmentationclass", "segmentationobject"),
    )
)
"""Folders of images of any class, and of what belongs to them, as COCO, YOLO, Pascal VOC and Tiny
ImageNet have them."""

IMAGEFOLDER_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""What Hugging Face's imagefolder keeps beside images."""


def split_stem(path: str) -> tuple[str, str]:
    """Stem and extension of a file in a folder, parted at the last dot: names there hold dates."""
    folder, slash, base = path.rpartition("/")
    stem, dot, extension = base.rpartition(".")
    return (folder + slash + stem, extension) if dot else (path, "")


def is_image(path: str) -> bool:
    """By its extension."""
    return split_stem(path)[1].lower() in IMAGE_EXTENSIONS


def is_sidecar(path: str) -> bool:
    """Whether a file belongs to the image of its stem or name, if there is one."""
    return split_stem(path)[1].lower() in BESIDE_EXTENSIONS


def stem_of_image(paths: Iterable[str]) -> dict[str, str]:
    """Of images and sidecars, the stem of the image that each belongs to: its own, or that of its
    own (`cat` for `cat.jpg.txt`) where this alone is an image."""
    paths = list(paths)
    images = set(filter(is_image, paths))
    stems = {path: split_stem(path)[0] for path in paths}
    own = {stems[image] for image in images}
    named = (p for p, stem in stems.items() if stem in images and stem not in own)
    return stems | {path: stems[stems[path]] for path in named}


def with_images(paths: Iterable[str]) -> dict[str, list[str]]:
    """Images and their sidecars by stem, sorted; stems without an image are left out."""
    files: dict[str, list[str]] = {}
    for path, stem in stem_of_image(p for p in paths if is_image(p) or is_sidecar(p)).items():
        files.setdefault(stem, []).append(path)
    return {stem: files[stem] for stem in sorted(files) if any(map(is_image, files[stem]))}


def cut(stems: Mapping[str, Sequence[str]], samples_per_shard: int) -> list[list[str]]:
    """Their files in pieces of `samples_per_shard` images, the last one smaller. Images of one stem
    stay together."""
    pieces: list[list[str]] = []
    room = 0
    for files in stems.values():
        images = sum(map(is_image, files))
        if images > room:
            pieces.append([])
            room = max(samples_per_shard, images)
        pieces[-1] += files
        room -= images
    return pieces


def image_keys(images: Collection[str]) -> dict[str, str]:
    """The key of each image by its path, no two alike."""
    keys = {path: split_stem(path)[0] for path in images}
    while True:
        wanted = Counter(keys.values())
        clashing = [path for path, key in keys.items() if wanted[key] > 1 and key != path]
        if not clashing:
            return keys
        keys |= {path: path for path in clashing}


def folder_samples(ref: ShardRef) -> Iterator[tuple[str, dict[str, str]]]:
    """The key of each sample, and its files by extension: what their names have behind its stem."""
    urls = {url[len(ref.root) :].lstrip("/"): url for url in ref.urls}
    stems = stem_of_image(urls)
    keys = image_keys(list(filter(is_image, urls)))
    for stem, group in groupby(urls, stems.__getitem__):
        paths = list(group)
        images = list(filter(is_image, paths))
        for image in images:
            others = {f"{other}." for other in images if other != image}
            own = [
                p for p in paths if p == image or not (is_image(p) or p.startswith(tuple(others)))
            ]
            yield keys[image], {p[len(stem) + 1 :]: urls[p] for p in own}


def class_of(path: str) -> str:
    """The class folder of an image, empty where it lies in none."""
    return path.partition("/")[0] if "/" in path else ""


def classes_in(
    root: str, images: Collection[str], folders: Collection[str], wanted: tuple[str, ...]
) -> tuple[tuple[str, ...], list[str]]:
    """The classes of the folder `root` in the order of their numbers, and what to say of them.

    `images` are paths below `root`, `folders` the names directly below it, empty ones too; `wanted`
    are the classes that were asked for, if they were. Raises UsageError for a folder of images that
    is none of these.
    """
    held = {class_of(path) for path in images} - {""}
    beside = [path for path in images if not class_of(path)]
    names = wanted or tuple(sorted(folders))
    if unknown := sorted(held - set(names)):
        raise UsageError(
            f"{root} has images in {few(unknown)}, which the given classes (--classes) do not "
            "name: add them there, or move these folders away"
        )
    lie = f"{len(beside):,} of the images of {root} lie beside its folders ({few(beside, 2)})"
    if not held:
        return (), []
    if beside and not wanted:
        return (), [f"no labels: {lie}; move them, or name the classes with --classes"]
    within = [] if wanted else folders_within(root, images)
    if not wanted and (what := what_else(names, held)):
        text = f"are {what} and taken for no classes; if they are, name them with --classes"
        return (), [f"no labels: the folders {few(names)} of {root} {text}", *within]
    notes = [f"without a label: {lie}", *within] if beside else within
    if empty := [name for name in names if name not in held]:
        notes.append(f"no image in {len(empty):,} of the class folders of {root}: {few(empty)}")
    return names, notes


def folders_within(root: str, images: Collection[str]) -> list[str]:
    """What to say of class folders that hold several folders with images, at any depth."""
    inner: dict[str, set[str]] = {}
    for folder in sorted({path.rpartition("/")[0] for path in images}):
        while "/" in folder:
            folder, _, name = folder.rpartition("/")
            inner.setdefault(folder, set()).add(name)
    for outer in sorted(name for name, found in inner.items() if len(found) > 1):
        some = " and ".join(f"{outer}/{name}" for name in sorted(inner[outer])[:2])
        return [
            f"{storable(some)} are not told apart by their labels, which are those of the folders "
            f"directly below {root}: give {root}/{storable(outer)} if they are the classes"
        ]
    return []


def side_by_side(refs: Iterable[ShardRef], wanted: Sequence[str] = ()) -> list[str]:
    """What to say of folders of SRC that lie side by side, with all images directly in them and no
    labels beside these: they may be classes, which are the folders below one of SRC."""
    urls: dict[str, list[str]] = {}
    for ref in refs:
        if ref.kind == "folder" and not ref.labels:
            urls.setdefault(ref.root, []).extend(ref.urls)
    beside: dict[str, list[str]] = {}
    for root in sorted(urls):
        beside.setdefault(root.rpartition("/")[0], []).append(root)
    notes = []
    for parent, roots in beside.items():
        flat = [root for root in roots if len(roots) > 1 and _is_flat(root, urls[root])]
        names = [root.rpartition("/")[2] for root in flat]
        if len(names) > 1 and (wanted or not what_else(names, set(names))):
            notes.append(
                f"no labels by folder: {few(names)} of {storable(parent)} are given one by one, "
                "and classes are the folders directly below SRC; if they are classes, give "
                f"{storable(parent)}, or a folder with links to these alone"
            )
    return notes


def _is_flat(root: str, urls: Iterable[str]) -> bool:
    """Whether all files of a folder lie directly in it, and none is a label."""
    return all(
        url.rpartition("/")[0] == root and MEMBER_FIELDS.get(split_stem(url)[1].lower()) != "label"
        for url in urls
    )


def of_imagefolder(root: str, paths: Iterable[str]) -> list[str]:
    """What to say of metadata of Hugging Face's imagefolder among `paths`, which no image takes."""
    found = sorted(path for path in paths if path.rpartition("/")[2] in IMAGEFOLDER_METADATA)
    return [
        f"{path} of {root} is not read, so its captions and labels are missing: write the "
        "dataset as Parquet (to_parquet of Hugging Face's datasets), or a .txt per image"
        for path in found[:1]
    ]


def what_else(folders: Collection[str], held: Collection[str]) -> str:
    """What folders are that are hardly classes: `00000`, `00001` as img2dataset names its shards,
    the splits of a dataset, or the place of all images, if only these are `held`; empty where they
    may be classes."""
    alike = len({len(name) for name in folders}) == 1
    if alike and all(re.fullmatch("[0-9]{2,}", name) for name in folders):
        return "numbers of one length"
    if {name.lower() for name in held} <= CONTAINERS:
        return "places of all images"
    return "splits" if all(SPLIT.fullmatch(name.lower()) for name in held) else ""


def doubts(classes: Sequence[str]) -> list[str]:
    """What to say of labels that may not be what is meant, by the class folders in their order."""
    if len(classes) == 1:
        return [f"all images have the label 0, since {storable(classes[0])} is the only folder"]
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(normalize("NFC", name).casefold().strip(), []).append(name)
    if same := next((names for names in alike.values() if len(names) > 1), None):
        some = " and ".join(map(ascii, same))
        return [
            f"{some} are classes of their own, though they look alike: if they are one, join them"
        ]
    numbers = [float(name) for name in classes if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", name)]
    if len(numbers) < len(classes) or numbers == list(range(len(classes))):
        return []
    label = next(i for i, number in enumerate(numbers) if i != number)
    return [
        f"folders that are numbers are sorted as texts, and their label is their place: {label} "
        f"for the folder {classes[label]}; for others list them in order with --classes"
    ]


def few(names: Sequence[str], number: int = 10) -> str:
    """The first of them in a line."""
    return ", ".join(map(storable, names[:number])) + (", ..." if len(names) > number else "")
