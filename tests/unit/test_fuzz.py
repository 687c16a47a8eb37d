"""Random and damaged bytes into the shard readers: clear errors, no crash, no hang, no unbounded
memory; and nothing that comes from a file is ever unpickled or evaluated.

More of it by hand: `python -m tests.fuzzing mutated parquet 0 100000`.
"""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splatshard.pipeline.shards.rows import read_rows
from splatshard.schemas.errors import CorruptShardError
from tests.fuzzing import DATA
from tests.rows import FORMATS, make_rows, write_shard

ROOT = Path(__file__).resolve().parents[2]


def fuzz(*arguments: object) -> dict[str, Any]:
    """What `python -m tests.fuzzing` found; fails with the last case if it did not get through."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzzing", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"exit code {done.returncode}:\n{done.stderr[-3000:]}"
    return json.loads(done.stdout)


# Shards


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_shards_are_read_or_refused(format: str) -> None:
    found = fuzz("all", format, 0, 120)
    assert found.keys() <= {"ok", "problems", "CorruptShardError", "FormatVersionError"}
    assert sum(found.values()) == 360
    for kind in ("ok", "problems", "CorruptShardError"):
        assert found[kind] > 20, "so light or so heavy a damage tests little"


@given(st.binary(max_size=2000), st.sampled_from(["parquet", "tar"]))
@settings(max_examples=50)
def test_random_bytes_are_no_shard(tmp_path_factory: Any, data: bytes, extension: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"random.{extension}"
    path.write_bytes(data)
    with pytest.raises(CorruptShardError, match="random"):
        list(read_rows(str(path)))


Members = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Members:
    """The members of a good tar shard of two samples."""
    path = write_shard(tmp_path_factory.mktemp("good") / "a.tar", make_rows(2), "webdataset")
    with tarfile.open(path) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]


def tar_of(members: Members, **extras: bytes) -> bytes:
    """A tar; `extras` maps numbers of members (`at1`) to bytes that go before their headers."""
    data = b""
    for i, (name, content) in enumerate(members):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        data += extras.get(f"at{i}", b"") + info.tobuf(tarfile.PAX_FORMAT)
        data += content + bytes(-len(content) % 512)
    return data + bytes(1024)


def patched(members: Members, start: int, field: bytes, number: int = 1) -> bytes:
    """A tar whose `number`th header has `field` at `start`, with a checksum that fits."""
    data = bytearray(tar_of(members))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        at = tar.getmembers()[number].offset_data - 512
    header = data[at : at + 512]
    header[start : start + len(field)] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[at : at + 512] = header
    return bytes(data)


def pax(kind: bytes = b"x", body: bytes = b"", size: int | None = None) -> bytes:
    """A header extension that says it is `size` bytes long."""
    info = tarfile.TarInfo("pax")
    info.type, info.size = kind, len(body) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512)


def record(name: str, value: str, kind: bytes = b"x") -> bytes:
    """A header extension with one record."""
    text = f" {name}={value}\n".encode()
    length = len(text)
    while len(str(length)) + len(text) != length:
        length = len(str(length)) + len(text)
    return pax(kind, str(length).encode() + text)


def sparse(**values: str) -> bytes:
    return b"".join(record(f"GNU.sparse.{name}", value) for name, value in values.items())


def document(members: Members, values: dict[str, Any]) -> bytes:
    """A tar whose first sample's JSON has other values."""
    name, text = members[1]
    changed = json.dumps(json.loads(text) | values).encode()
    return tar_of([members[0], (name, changed), *members[2:]])


def crafted(members: Members) -> Iterator[tuple[str, bytes, str]]:
    """Name, bytes, and what the reader must say (`any`: whatever, but say it)."""
    bad, whatever = "CorruptShardError", "any"
    sizes = {
        "base256_exabytes": b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7,
        "base256_gigabyte": b"\x80" + bytes(3) + struct.pack(">Q", 1 << 30),
        "base256_minus_one": b"\xff" * 12,
        "base256_minus_512": b"\xff" * 10 + b"\xfe\0",
        "base256_minus_1024": b"\xff" * 10 + b"\xfc\0",
        "octal_gigabytes": b"77777777777\0",
        "octal_minus": b"-0000000512\0",
    }
    for name, field in sizes.items():
        yield name, patched(members, 124, field), bad
    yield "no_number", patched(members, 124, b"zzz" + bytes(9)), whatever  # ends there: counts tell
    lenient = b"" if hasattr(tarfile, "data_filter") else b"Xg"  # Python 3.11.2 passes over these
    for kind in b"123456SLKVMNDXgZ":
        verdict = whatever if kind in lenient else bad
        yield f"type_{kind:c}", patched(members, 156, bytes([kind])), verdict
    for i, (size, offset) in enumerate([("99999999999", "0"), ("9" * 30, "9" * 30)]):
        holes = {
            "map": sparse(size=size, map=f"0,1,{offset},1"),
            "new": sparse(major="1", minor="0", realsize=size),
            "old": sparse(numblocks="1", offset=offset, numbytes="1", size=size),
        }
        for name, extension in holes.items():
            yield f"sparse_{name}_{i}", tar_of(members, at1=extension), bad
    for size in ("9" * 30, "-1", "-512", "-99999", "nan", "1e9", ""):
        yield (
            f"pax_size_{size}",
            tar_of(members, at1=record("size", size)),
            whatever,
        )
    yield "pax_for_all", tar_of(members, at1=record("size", "1" + "0" * 15, b"g")), bad
    yield "pax_of_gigabytes", tar_of(members, at1=pax(size=8 << 30)), whatever
    yield "name_of_gigabytes", tar_of(members, at1=pax(b"L", size=8 << 30)), whatever
    yield "many_extensions", tar_of(members, at1=pax() * 3000), bad
    yield "many_long_names", tar_of(members, at1=pax(b"L") * 3000), bad
    for name, text in {
        "deep_list": b"[" * 200_000,
        "deep_object": b'{"a":' * 200_000,
        "version_of_100000_digits": b'{"format_version":' + b"9" * 100_000 + b"}",
        "version_nan": b'{"format_version":NaN,"codec":"fp16"}',
        "version_float": b'{"format_version":1.0,"codec":"fp16"}',
        "version_true": b'{"format_version":true,"codec":"fp16"}',
        "codec_list": b'{"format_version":1,"codec":["fp16"]}',
        "list": b"[1]",
        "not_utf8": b'{"format_version":1,"codec":"\xff"}',
    }.items():
        yield f"metadata_{name}", tar_of([(members[0][0], text), *members[1:]]), bad
    yield "deep_row", tar_of([members[0], (members[1][0], b"[" * 200_000), *members[2:]]), bad
    for name, value in [
        *(("psnr", v) for v in (7 * 10**400, -1e308, 1e39, "1", True, [])),
        *(("width", v) for v in (2**31, -(2**40), 1.5, None.__class__.__name__)),
        *(("key", v) for v in (None, 5, "\ud800", ["a"])),
        *(("caption", v) for v in ("\udfff", {}, 1)),
        *(("label", v) for v in (2**63, True, 0.5)),
        *(("members", v) for v in ("abc", [{}], ["\ud800"], ["a"] * 10**6, None)),
        *(("status", v) for v in (None, ["ok"])),
        *(("unknown", v) for v in (1, None)),
    ]:
        yield f"{name}_{str(value)[:12]!a}", document(members, {name: value}), bad
    for name, value in [
        *(("psnr", v) for v in (float("nan"), float("inf"), None)),
        *(("width", v) for v in (-5, 0, None)),
        *(("num_gaussians", v) for v in (10**9, -1, 0)),
        ("status", "fine"),
    ]:
        yield f"{name}_{value}", document(members, {name: value}), "problems"


def test_crafted_tars_are_refused(members: Members, tmp_path: Path) -> None:
    wanted: dict[str, str] = {}
    for number, (name, data, verdict) in enumerate(crafted(members)):
        file = f"{number:03d}_" + "".join(c if c.isalnum() else "_" for c in name)
        (tmp_path / f"{file}.tar").write_bytes(data)
        wanted[file] = verdict
    found = fuzz("files", *sorted(tmp_path.glob("*.tar")))
    assert found.keys() == wanted.keys()
    wrong = {n: found[n] for n, verdict in wanted.items() if verdict not in (found[n], "any")}
    assert wrong == {}


def test_files_that_are_hard_on_pyarrow(tmp_path: Path) -> None:
    """30 rows of 32 MiB in a file of kilobytes, read in a process that may take 768 MiB; and levels
    of a column that do not fit its type, by which metadata.row_group(0).column(i) aborts."""
    row = pq.read_table(write_shard(tmp_path / "good.parquet", make_rows(1)))
    large = bytes(32 << 20)
    wanted = {"damaged-levels": "CorruptShardError"}
    for column, value, dictionary in (
        ("members", [{"name": "x", "data": large}], True),
        ("metadata", large.decode(), False),
    ):
        values = row.to_pylist()[0] | {column: value}
        pq.write_table(
            pa.concat_tables([pa.Table.from_pylist([values], row.schema)] * 30),
            tmp_path / f"{column}.parquet",
            compression="zstd",
            use_dictionary=dictionary,
            dictionary_pagesize_limit=1 << 30,
            write_statistics=False,
        )
        assert (tmp_path / f"{column}.parquet").stat().st_size < 200_000
        wanted[column] = "ok"
    files = [tmp_path / "members.parquet", tmp_path / "metadata.parquet"]
    assert fuzz("files", *files, DATA / "damaged-levels.parquet") == wanted


def test_pickles_in_a_shard_stay_bytes(tmp_path: Path) -> None:
    """webdataset unpickles members of these names unless told otherwise; we never do."""

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    bomb = pickle.dumps(Bomb())
    row = make_rows(1)[0] | {"metadata": None}
    row["members"] = [{"name": name, "data": bomb} for name in ("pyd", "pickle", "pth", "npy")]
    for format, extension in (("parquet", "parquet"), ("webdataset", "tar")):
        path = write_shard(tmp_path / f"a.{extension}", [row], format)
        (found,) = read_rows(str(path))
        assert found["members"] == row["members"]
    assert not (tmp_path / "exploded").exists()


# Nothing is unpickled or evaluated


MODULES = sorted(
    p for floor in ("schemas", "pipeline", "jobs") for p in (ROOT / floor).rglob("*.py")
)
FORBIDDEN_MODULES = {
    *("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"),
    *("jsonpickle", "pickletools", "copyreg", "imp"),
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def unsafe(source: str) -> Iterator[str]:
    """What in `source` could run code that comes from a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom) and not all(n.endswith("Error") for n in names):
                names.append(node.module or "")  # what errors are called runs nothing
            for name in names:
                if name.partition(".")[0] in FORBIDDEN_MODULES:
                    yield f"line {node.lineno}: import of {name}"
        if not isinstance(node, ast.Call):
            continue
        keywords = {k.arg: k.value for k in node.keywords}
        called = ast.unparse(node.func)
        if called in FORBIDDEN_CALLS:
            yield f"line {node.lineno}: {called}()"
        if called == "torch.load" and not _is(keywords.get("weights_only"), True):
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if "allow_pickle" in keywords and not _is(keywords["allow_pickle"], False):
            yield f"line {node.lineno}: allow_pickle"
        if called.endswith((".read_pickle", ".extractall", ".unsafe_load", "yaml.load")):
            yield f"line {node.lineno}: {called}()"


def _is(value: ast.expr | None, wanted: bool) -> bool:
    return isinstance(value, ast.Constant) and value.value is wanted


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    assert list(unsafe(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "from pickle import UnpicklingError, loads",
        "import dill.source",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "eval(text)",
        "pd.read_pickle(path)",
        "tar.extractall(path)",
    ],
)
def test_the_check_above_sees(line: str) -> None:
    assert list(unsafe(line))
