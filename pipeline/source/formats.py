"""Which kind of file the bytes of an image are: one that is read, or one that can be named.

Read are the formats whose pixels tests compare with another decoder. All others end as a row that
says what they are and what to do; docs/images.md has both lists.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from splatshard.schemas.errors import SampleError

SNIFFED_BYTES = 4096
"""So much of a file's beginning decides what it is."""

HEAD_BYTES = 512
"""And so much, what is no tar or Parquet file."""


class NotSupported(Exception):
    """A good file of a kind whose pixels would be read wrongly: what it is, and the remedy."""

    def __init__(self, what: str, remedy: str = "convert it to a PNG of 8-bit grey or RGB") -> None:
        super().__init__(f"not supported: {what}: {remedy}")


class Format(NamedTuple):
    """`begins` matches the first bytes; `extensions` are lower case."""

    name: str
    begins: re.Pattern[bytes]
    extensions: str
    remedy: str = ""


def _format(name: str, begins: bytes, extensions: str, remedy: str = "") -> Format:
    return Format(name, re.compile(begins, re.DOTALL), extensions, remedy)


READ = (
    _format("JPEG", rb"\xff\xd8\xff", "jpg jpeg jpe jfif mpo"),
    _format("PNG", rb"\x89PNG\r\n\x1a\n", "png apng"),
    _format("WEBP", rb"RIFF....WEBP", "webp"),
    _format("GIF", rb"GIF8[79]a", "gif"),
    _format("BMP", rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0", "bmp"),
    _format("TIFF", rb"II[*+]\0(?!....CR)|MM\0[*+]", "tif tiff"),
    _format("PPM", rb"P[1-6f][\s#]", "ppm pgm pbm pnm pfm"),
    _format("AVIF", rb"....ftyp(?:avi[fs]|(?:mi|ms)f1.{4}(?:.{4})*?avi[fs])", "avif"),
)
"""By Pillow's names."""

WEAK_MAGIC = ("PPM",)
"""What a text can begin with by chance: a bad header then means "not an image"."""

CONVERT = "convert it to PNG or JPEG"
DEVELOP = "develop it to JPEG or 16-bit TIFF, for instance with RawTherapee or darktable"
TONE_MAP = "map its range to 8 bits and save it as PNG"
RENDER = "render it to PNG"
FRAMES = "extract its frames, for instance with ffmpeg"
FETCH = "download it again"
OPEN = "open the address in a browser: it may ask for a login, or tell what is wrong"
UNPACK = "unpack it"
DECODE = "decode it to the bytes that it stands for"
PULL = "fetch its file: git lfs pull"
FTYP = rb"....ftyp(?:%b)"
RAW = rb"II\*\0....CR|....ftypcrx |FUJIFILMCCD-RAW|IIR[OS]|MMOR|IIU\0|FOVb|\0MRM"
OTHER_VIDEO = rb"FLV\x01|OggS|\x30\x26\xb2\x75|....[\x11\x12]\xaf"

NAMED = (
    _format("HEIC", FTYP % rb"he[iv][cxms]|(?:mi|ms)f1|heif", "heic heif hif", CONVERT),
    _format("RAW photograph", RAW, "dng cr2 cr3 nef arw raf orf rw2 x3f mrw", DEVELOP),
    _format("video (MP4, MOV)", rb"....(?:ftyp|moov|mdat|wide)", "", FRAMES),
    _format("JPEG XL", rb"\xff\x0a|\0\0\0\x0cJXL \r\n", "jxl", CONVERT),
    _format("JPEG 2000", rb"\0\0\0\x0cjP  \r\n|\xff\x4f\xff\x51", "jp2 j2k jpf jpx", CONVERT),
    _format("JPEG XR", rb"II\xbc", "jxr wdp", CONVERT),
    _format("OpenEXR", rb"\x76\x2f\x31\x01", "exr", TONE_MAP),
    _format("Radiance HDR", rb"#\?(?:RADIANCE|RGBE)", "", TONE_MAP),
    _format("PFM in colour", rb"PF\s", "", TONE_MAP),
    _format("PAM", rb"P7\s", "pam", CONVERT),
    _format("Photoshop", rb"8BPS", "psd psb", CONVERT),
    _format("GIMP", rb"gimp xcf", "xcf", CONVERT),
    _format("icon (ICO, CUR)", rb"\0\0[\x01\x02]\0[^\0]\0", "ico cur", CONVERT),
    _format("icon (ICNS)", rb"icns", "icns", CONVERT),
    _format("BLP", rb"BLP[12]", "blp", CONVERT),
    _format("DDS", rb"DDS ", "dds", CONVERT),
    _format("QOI", rb"qoif", "qoi", CONVERT),
    _format("PCX", rb"\x0a[\0\x02-\x05]\x01[\x01\x02\x04\x08]", "pcx", CONVERT),
    _format("SGI", rb"\x01\xda[\0\x01][\x01\x02]", "", CONVERT),
    _format("Sun raster", rb"\x59\xa6\x6a\x95", "", CONVERT),
    _format("MNG or JNG", rb"[\x8a\x8b][MJ]NG\r\n", "mng jng", CONVERT),
    _format("FLIF", rb"FLIF", "flif", CONVERT),
    _format("BPG", rb"BPG\xfb", "bpg", CONVERT),
    _format("ILBM", rb"FORM....ILBM", "", CONVERT),
    _format("XPM", rb"/\* XPM \*/", "", CONVERT),
    _format("XBM", rb"#define \w+_width ", "", CONVERT),
    _format("Windows metafile", rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF", "wmf emf", RENDER),
    _format("DjVu", rb"AT&TFORM", "djvu", RENDER),
    _format("PDF", rb".{0,1023}?%PDF-", "", RENDER),
    _format("PostScript", rb"%!PS|\xc5\xd0\xd3\xc6", "", RENDER),
    _format("SVG", rb"(?i:(?:\xef\xbb\xbf)?\s*<(?:svg|[?!][^\0]*<svg)\b)", "svg", RENDER),
    _format("DICOM", rb".{128}DICM", "dcm", "export it as PNG, with the window that you want"),
    _format("FITS", rb"SIMPLE  =", "fits", TONE_MAP),
    _format("video (AVI)", rb"RIFF....AVI ", "", FRAMES),
    _format("video (Matroska, WebM)", rb"\x1aE\xdf\xa3", "", FRAMES),
    _format("video (MPEG)", rb"\0\0\x01[\xba\xb3]", "", FRAMES),
    _format("video (Flash, Ogg, WMV, FLI)", OTHER_VIDEO, "", FRAMES),
    _format("NumPy array", rb"\x93NUMPY", "", "save it as an image"),
    _format("HDF5", rb"\x89HDF\r\n", "", "save its arrays as images"),
    _format("base64 text", rb"/9j/|iVBORw0KGgo|R0lGOD|UklGR|data:image/", "", DECODE),
    _format("ZIP archive", rb"PK\x03\x04", "", UNPACK),
    _format("gzip file", rb"\x1f\x8b", "", UNPACK),
    _format("bzip2 file", rb"BZh[1-9]", "", UNPACK),
    _format("compressed file (xz)", rb"\xfd7zXZ\0", "", UNPACK),
    _format("Zstandard file", rb"\x28\xb5\x2f\xfd", "", UNPACK),
    _format("Git LFS pointer", rb"version https://git-lfs", "", PULL),
    _format("web page", rb"(?i:(?:\xef\xbb\xbf)?\s*<(?:!doctype )?html)", "", FETCH),
    _format(
        "TGA",  # nothing at its beginning is certain
        rb".[\0\x01][\x01-\x03\x09-\x0b].{9}(?!\0\0)..(?!\0\0)..[\x08\x0f\x10\x18\x20]",
        "tga",
        CONVERT,
    ),
)
"""Known, and not read. The first that matches gives the name."""

EXTENSIONS = tuple(" ".join(format.extensions for format in READ).split())
NAMED_EXTENSIONS = tuple(" ".join(format.extensions for format in NAMED).split())


def format_of(image: bytes, name: str) -> str:
    """Pillow's name of the format. Raises SampleError not_an_image for what is not read."""
    start = image[:SNIFFED_BYTES]
    for format in (*READ, *NAMED):
        if format.begins.match(start):
            if format.remedy:
                raise not_read(name, format.name, format.remedy)
            return format.name
    raise SampleError("not_an_image", f"{name} begins with {image[:12]!r}, no known image format")


def disguised(url: str, start: bytes) -> str:
    """What the file at `url` is that begins with `start` and is none of the tars or Parquet files
    that its name says, and the remedy; empty where that is not known."""
    found = (f for f in NAMED if f.remedy in (FETCH, UNPACK, PULL) and f.begins.match(start))
    named = next(found, None)
    if named is None:
        return ""
    on_the_web = named.remedy == FETCH and url.startswith(("http://", "https://"))
    return f"a {named.name}: {OPEN if on_the_web else named.remedy}"


def not_read(name: str, what: str, remedy: str) -> SampleError:
    return SampleError("not_an_image", f"{name}: {NotSupported(what, remedy)}")
