"""Known formats that are not read are named with their remedy; the docs list both kinds."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from splatshard.pipeline.source import decode
from splatshard.pipeline.source.formats import EXTENSIONS, NAMED, NAMED_EXTENSIONS, READ
from splatshard.schemas.errors import SampleError
from tests.make import encode, photo
from tests.unit.decoding import pixels_of, reason
from tests.unit.reading import read_members
from tests.unit.test_docs import table_after

BY_PILLOW = {
    "JPEG2000": "JPEG 2000",
    "ICO": "icon (ICO, CUR)",
    "ICNS": "icon (ICNS)",
    "DDS": "DDS",
    "PCX": "PCX",
    "SGI": "SGI",
    "TGA": "TGA",
    "PDF": "PDF",
    "EPS": "PostScript",
}

BY_HAND = {
    b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": "HEIC",
    b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic": "HEIC",
    b"\0\0\0\x14ftypmp42\0\0\0\0isom": "video (MP4, MOV)",
    b"\0\0\0\x14ftypqt  \0\0\0\0": "video (MP4, MOV)",
    b"\0\0\0\x14ftypcrx \0\0\0\0": "RAW photograph",
    b"II*\0\x10\0\0\0CR\2\0": "RAW photograph",
    b"FUJIFILMCCD-RAW 0201": "RAW photograph",
    b"IIRO\x08\0\0\0": "RAW photograph",
    b"IIU\0\x18\0\0\0": "RAW photograph",
    b"\xff\x0a\xfa\x1f": "JPEG XL",
    b"\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL",
    b"\xff\x4f\xff\x51\0\x2f": "JPEG 2000",
    b"II\xbc\1": "JPEG XR",
    b"\x76\x2f\x31\1": "OpenEXR",
    b"#?RADIANCE\n": "Radiance HDR",
    b"PF\n3 2\n-1.0\n": "PFM in colour",
    b"P7\nWIDTH 3\n": "PAM",
    b"8BPS\0\1": "Photoshop",
    b"gimp xcf v011\0": "GIMP",
    b"\0\0\2\0\1\0\x20\x20": "icon (ICO, CUR)",
    b"qoif\0\0\0\1": "QOI",
    b"\x59\xa6\x6a\x95": "Sun raster",
    b"\x8aMNG\r\n\x1a\n": "MNG or JNG",
    b"FLIF44": "FLIF",
    b"BPG\xfb\0": "BPG",
    b"FORM\0\0\0\0ILBMBMHD": "ILBM",
    b"/* XPM */\nstatic": "XPM",
    b"#define a_width 16\n": "XBM",
    b"\xd7\xcd\xc6\x9a\0\0": "Windows metafile",
    b"\1\0\0\0" + bytes(36) + b" EMF": "Windows metafile",
    b"AT&TFORM\0\0": "DjVu",
    b"\r\n%PDF-1.4\n": "PDF",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b'<svg xmlns="http://www.w3.org/2000/svg">': "SVG",
    b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- x -->\n<svg width="1">': "SVG",
    bytes(128) + b"DICM": "DICOM",
    b"SIMPLE  =                    T": "FITS",
    b"RIFF\0\0\0\0AVI LIST": "video (AVI)",
    b"\x1aE\xdf\xa3\1\0": "video (Matroska, WebM)",
    b"\0\0\1\xba\x44": "video (MPEG)",
    b"\xec\x38\0\0\x12\xaf\1\0": "video (Flash, Ogg, WMV, FLI)",
    b"BLP2\1\0\0\0": "BLP",
    b"FLV\1\5": "video (Flash, Ogg, WMV, FLI)",
    b"OggS\0\2": "video (Flash, Ogg, WMV, FLI)",
    b"\x93NUMPY\1\0": "NumPy array",
    b"\x89HDF\r\n\x1a\n": "HDF5",
    b"/9j/4AAQSkZJRgABAQ": "base64 text",
    b"data:image/png;base64,iVBORw0KGgo": "base64 text",
    b"PK\3\4\x14\0": "ZIP archive",
    b"\x1f\x8b\x08\0": "gzip file",
    b"BZh91AY&SY": "bzip2 file",
    b"\xfd7zXZ\0\0\4": "compressed file (xz)",
    b"\x28\xb5\x2f\xfd\4\0": "Zstandard file",
    b"version https://git-lfs.github.com/spec/v1\noid": "Git LFS pointer",
    b"<!DOCTYPE html>\n<html>": "web page",
    b"\n <HTML><head>": "web page",
}


def test_known_formats_are_named() -> None:
    files = {encode(photo(), kind): name for kind, name in BY_PILLOW.items()} | BY_HAND
    remedies = {format.name: format.remedy for format in NAMED}
    for image, name in files.items():
        found = reason(image, "not_an_image")
        assert found == f"a.tif: not supported: {name}: {remedies[name]}"
    assert set(files.values()) == set(remedies)


@pytest.mark.parametrize(
    "image",
    [
        *(
            b"this is a text",
            b"\0" * 64,
            b'{"error": 404}',
            b"a,b\n1,2\n",
            b"<?xml version='1.0'?>",
        ),
        *(b"BM: a text of some length, which tells of bitmaps and of much else besides", b"P"),
        *(
            b"RIFF\0\0\0\0WAVEfmt ",
            struct.pack("<64f", *range(64)),
            b"P5 a text",
            b"\xff\xfb\x90\0",
        ),
    ],
)
def test_others_are_not(image: bytes) -> None:
    with pytest.raises(SampleError, match="no known image format") as caught:
        pixels_of(image)
    assert caught.value.status == "not_an_image"


@pytest.mark.parametrize("kind", ["AVIF", "WEBP"])
def test_a_pillow_without_a_library_is_named(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    image = b"\0\0\0\x1cftypavif\0\0\0\0mif1" if kind == "AVIF" else encode(photo(), kind)
    for plugin in (None, type("Without", (), {"SUPPORTED": False})):
        monkeypatch.setitem(decode.PLUGINS, kind, plugin)
        found = reason(image, "not_an_image")
        assert found == (
            f"a.tif: not supported: {kind}: update Pillow to one that has {kind}, "
            "or convert it to PNG or JPEG"
        )


def test_extensions_make_samples(tmp_path: Path) -> None:
    """Such a file is a row with its name, and gives way to one that is read."""
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    picture = encode(photo(), "AVIF" if decode.readable("AVIF") else "PNG")
    members = [
        ("a.heic", heic),
        ("b.heic", heic),
        ("b.avif", picture),
        ("c.mp4", b""),
        ("d.PGM", picture),
    ]
    samples = {sample.key: sample for sample in read_members(tmp_path, *members)}
    assert {key: sample.image_name for key, sample in samples.items()} == {
        "a": "a.heic",
        "b": "b.avif",
        "c": "",
        "d": "d.PGM",
    }
    assert samples["b"].members == (("heic", heic),)
    assert samples["c"].error.status == "no_image"
    assert "no image (jpg jpeg" in str(samples["c"].error)
    assert pixels_of(samples["b"].image, 48).shape == (48, 48, 3)


def test_extensions_are_unlike() -> None:
    both = (*EXTENSIONS, *NAMED_EXTENSIONS)
    assert len(both) == len(set(both))
    assert not {"txt", "json", "cls", "mp4", "pdf", "zip"} & set(both)
    assert "".join(both) == "".join(both).lower()


def test_docs_list_what_is_read() -> None:
    rows = table_after("docs/images.md", "## Formats that are read")
    assert [row[:2] for row in rows] == [[format.name, format.extensions] for format in READ]


def test_docs_list_what_is_named() -> None:
    rows = table_after("docs/images.md", "## Formats that are named")
    listed = {(remedy, name) for remedy, names, _ in rows for name in names.split("; ")}
    assert listed == {(format.remedy, format.name) for format in NAMED}
    extensions = {(row[0], extension) for row in rows for extension in row[2].split()}
    assert extensions == {(f.remedy, e) for f in NAMED for e in f.extensions.split()}
