"""Damaged shards by the thousand, read in a process of its own that must neither crash nor hang,
nor take much memory.

    python -m tests.fuzzing mutated parquet FIRST COUNT    mutations number FIRST to FIRST + COUNT
    python -m tests.fuzzing payloads webdataset FIRST COUNT   whole files, damaged payloads in them
    python -m tests.fuzzing training parquet FIRST COUNT   read by SplatDataset, too
    python -m tests.fuzzing all parquet FIRST COUNT        all of that
    python -m tests.fuzzing files A B ...                  these files

A mutation is decided by its number. Exit code 0: all were read, or refused by CorruptShardError or
FormatVersionError; one JSON line says how many. Anything else ends the process, and standard error
then says last how to do that one again. Memory is limited to LIMIT_BYTES beyond what the imports
take, so that a reader that believes every size it is told does not get far.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import random
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from splatshard.pipeline.codec.planes import join
from splatshard.pipeline.data import SplatDataset
from splatshard.pipeline.shards.commit import publish, staged_file
from splatshard.pipeline.shards.rows import read_rows
from splatshard.pipeline.shards.verify import survey
from splatshard.schemas.errors import CorruptShardError, FormatVersionError
from splatshard.schemas.shard import to_json
from splatshard.schemas.splats import CODECS, EXTENSIONS
from tests.rows import config_of, make_ref, make_rows, write_shard

DATA = Path(__file__).parent / "data"
LIMIT_BYTES = 768 << 20
HANG_S = 60

TELLING = [
    *(b"\0", b"\x01", b"\x7f", b"\x80", b"\xff", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"),
    *(b"\0\0\0\x80", b"\xfe\xff\xff\xff\x0f", b"\xff" * 9 + b"\x01", b"77777777777\0", b"[" * 999),
]
"""What counts and lengths are most likely to be misread as, also as Thrift's and tar's numbers."""


def budgets_of(codec: str) -> tuple[int, ...]:
    return (5, 12) if codec == "balanced" else ()


def seeds(format: str, folder: Path) -> list[bytes]:
    """Golden shards of all versions, and a fresh one of each codec."""
    extension = EXTENSIONS[format]
    found = [path.read_bytes() for path in sorted(DATA.rglob(f"*.{extension}"))]
    assert found
    for codec in CODECS:
        path = folder / f"{codec}.{extension}"
        rows = make_rows(6, 12, codec, budgets_of(codec))
        found.append(write_shard(path, rows, format, codec, budgets_of(codec)).read_bytes())
    return found


def mutated(data: bytes, rng: random.Random, format: str = "") -> bytes:
    """`data` with a few things wrong; of Parquet files mostly in the footer, since pages have
    checksums."""
    changed = bytearray(data)
    start = 0
    if format == "parquet" and rng.random() < 0.7:
        start = max(0, len(data) - 8 - int.from_bytes(data[-8:-4], "little"))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8, 30))):
        changed = changed or bytearray(b"x")
        at = rng.randrange(min(start, len(changed) - 1), len(changed))
        other, size = rng.randrange(len(changed)), rng.randrange(1, 600)
        telling = rng.choice(TELLING)
        match rng.randrange(16):
            case 0 | 1 | 2 | 3 | 4:
                changed[at] ^= 1 << rng.randrange(8)
            case 5 | 6 | 7:
                changed[at] = rng.randrange(256)
            case 8 | 9 | 10:
                changed[at : at + len(telling)] = telling
            case 11:
                changed[at:at] = telling
            case 12:
                del changed[at : at + size // 10 + 1]
            case 13:
                changed[at : at + 64] = changed[other : other + 64]
            case 14:
                changed[at:at] = changed[other : other + size]
            case _:
                del changed[at:]
    return bytes(changed)


def mutated_files(format: str, first: int, count: int, folder: Path) -> Iterator[tuple[str, Path]]:
    """Mutations `first` and following of the seeds, one file after the other at the same place."""
    originals = seeds(format, folder)
    path = folder / f"mutated.{EXTENSIONS[format]}"
    for number in range(first, first + count):
        rng = random.Random(number)
        path.write_bytes(mutated(rng.choice(originals), rng, format))
        yield f"mutated {format} {number} 1", path


def payload_files(format: str, first: int, count: int, folder: Path) -> Iterator[tuple[str, Path]]:
    """Files that are whole but for their payloads: what only the codec can find."""
    path = folder / f"payload.{EXTENSIONS[format]}"
    originals = {codec: make_rows(4, 40, codec, budgets_of(codec)) for codec in CODECS}
    for number in range(first, first + count):
        rng = random.Random(number)
        codec = rng.choice(CODECS)
        rows = [
            {n: damaged(v, rng, format) if n.startswith("splats") else v for n, v in row.items()}
            for row in originals[codec]
        ]
        write_shard(path, rows, format, codec, budgets_of(codec))
        yield f"payloads {format} {number} 1", path


def damaged(payload: Any, rng: random.Random, format: str) -> Any:
    """A payload of bytes, or of planes by name, mutated; most often all of the same length."""
    if isinstance(payload, dict) and format == "webdataset" and rng.random() < 0.5:
        payload = join(payload)
    planes = payload if isinstance(payload, dict) else {"": payload}
    cut = format == "parquet" and rng.random() < 0.2
    changed = {
        name: data if rng.random() < 0.6 else mutated(data, rng) if cut else overwritten(data, rng)
        for name, data in planes.items()
    }
    return changed if isinstance(payload, dict) else changed[""]


def overwritten(data: bytes, rng: random.Random) -> bytes:
    """`data` with other bytes in some places."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, len(data)))):
        at = rng.randrange(len(changed))
        changed[at] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(changed)


def training_files(format: str, first: int, count: int, folder: Path) -> Iterator[tuple[str, Path]]:
    """Mutations of a shard whose marker fits all that its size and digest can say."""
    shards = []
    for codec in CODECS:
        config = config_of(format, codec, budgets_of(codec))
        with staged_file(str(folder), codec) as path:
            rows = make_rows(6, 12, codec, budgets_of(codec))
            write_shard(path, rows, format, codec, budgets_of(codec))
            data = path.read_bytes()
            shards.append((data, publish(str(folder), path, make_ref(codec), config, "cd" * 32)))
        (folder / f"{codec}.json").unlink()
    for number in range(first, first + count):
        rng = random.Random(number)
        data, manifest = rng.choice(shards)
        changed = mutated(data, rng, format)
        place = folder / "training" / manifest.data_file
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(changed)
        marker = dataclasses.replace(manifest, size_bytes=len(changed))
        (place.parent / f"{manifest.name}.json").write_text(to_json(marker))
        yield f"training {format} {number} 1", place
        (place.parent / f"{manifest.name}.json").unlink()


def outcome(path: Path) -> str:
    """`ok`, `problems` or the error's class; raises what nobody should have to expect."""
    try:
        found = survey(str(path))
        for _ in read_rows(str(path)):
            pass
        if path.parent.name == "training":
            for batch in SplatDataset(
                str(path.parent), batch_size=3, checksum=False, drop_last=False, prefetch_windows=0
            ):
                batch.splats.num_gaussians.tolist()
    except (CorruptShardError, FormatVersionError) as e:
        str(e).encode()
        return type(e).__name__
    return "problems" if found.problems else "ok"


def limit_memory() -> None:
    """LIMIT_BYTES more than now, for this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


KINDS = {"mutated": mutated_files, "payloads": payload_files, "training": training_files}


def main(arguments: list[str]) -> None:
    """See the module."""
    kind, *rest = arguments
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for codec in CODECS[:1] if kind == "files" else CODECS:  # loads and compiles all there is
            survey(str(write_shard(folder / "a.parquet", make_rows(4, 3, codec), "parquet", codec)))
        limit_memory()
        if kind == "files":
            cases = ((Path(file).stem, Path(file)) for file in rest)
        else:
            chosen = KINDS.values() if kind == "all" else [KINDS[kind]]
            format, first, count = rest[0], int(rest[1]), int(rest[2])
            cases = chain.from_iterable(files(format, first, count, folder) for files in chosen)
        found: dict[str, str] = {}
        for case, path in cases:
            print(case, file=sys.stderr, flush=True)
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            found[case] = outcome(path)
            faulthandler.cancel_dump_traceback_later()
    print(json.dumps(found if kind == "files" else Counter(found.values())))


if __name__ == "__main__":
    main(sys.argv[1:])
