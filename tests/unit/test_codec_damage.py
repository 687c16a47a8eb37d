"""Payloads of the codecs that are not what they should be: corrupt, or what the twin says."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from splatshard.pipeline.codec import planes, split_member
from splatshard.pipeline.codec.pack import unpack
from splatshard.schemas.errors import CorruptShardError
from splatshard.schemas.splats import MAX_PAYLOAD_GAUSSIANS, PLANES
from tests.rows import HEIGHT, WIDTH, packed, random_splats, values_of
from tests.unit.codes import SIGNALLING_NAN, assert_values_close, grid, plausible, twin


def sample_payloads() -> list[dict[str, bytes]]:
    found = [payload["splats"] for payload in packed(random_splats(3, 12), "compact")]
    extreme = plausible(2, 9, HEIGHT, WIDTH)
    return found + planes.encode(grid(extreme, 1e-6)) + planes.encode(grid(extreme, 10.0))


SAMPLES = sample_payloads()


def mutated(data: st.DataObject) -> dict[str, bytes]:
    """A payload with some bytes changed, and planes cut or grown, all alike or not."""
    payload = dict(data.draw(st.sampled_from(SAMPLES)))
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from(PLANES))
        plane = bytearray(payload[name])
        change = data.draw(st.sampled_from(["byte", "byte", "byte", "cut", "grow", "all"]))
        if change == "byte" and plane:
            plane[data.draw(st.integers(0, len(plane) - 1))] = data.draw(st.integers(0, 255))
            payload[name] = bytes(plane)
        elif change == "cut":
            payload[name] = bytes(plane[: data.draw(st.integers(0, len(plane)))])
        elif change == "grow":
            payload[name] += data.draw(st.binary(min_size=1, max_size=9))
        elif change == "all":
            n = data.draw(st.integers(0, len(payload["gap"]) + 2))
            for plane_name in PLANES[:-1]:
                payload[plane_name] = (payload[plane_name] + b"\x41" * n)[:n]
    return payload


@given(st.data())
@settings(max_examples=300)
def test_damaged_planes_are_corrupt_or_what_the_twin_says(data: st.DataObject) -> None:
    payload = mutated(data)
    try:
        wanted = twin(planes.decode([payload]), HEIGHT, WIDTH)[0]
    except CorruptShardError:
        wanted = None
    try:
        found = values_of(unpack([{"splats": payload}], HEIGHT, WIDTH, "compact"))[0]
    except CorruptShardError:
        assert wanted is None
        return
    assert wanted is not None
    inside = (wanted.abs() < 1e37).all(-1)
    assert_values_close(found[inside], wanted[inside], max(HEIGHT, WIDTH))


@given(st.lists(st.binary(max_size=12), min_size=8, max_size=8), st.integers(0, 12))
@settings(max_examples=200)
@example([b""] * 7 + [SIGNALLING_NAN + bytes(2)], 1)
def test_garbage_planes_are_corrupt_or_gaussians(parts: list[bytes], n: int) -> None:
    parts = [(part + bytes(12))[:n] for part in parts[:7]] + parts[7:]
    payload = dict(zip(PLANES, parts, strict=True))
    try:
        found = unpack([{"splats": payload}], HEIGHT, WIDTH, "balanced")
    except CorruptShardError:
        return
    assert found.num_gaussians.tolist() == [n]


@given(st.data())
@settings(max_examples=200)
def test_damaged_members_are_corrupt_or_planes(data: st.DataObject) -> None:
    member = bytearray(planes.join(data.draw(st.sampled_from(SAMPLES))))
    for _ in range(data.draw(st.integers(1, 3))):
        member[data.draw(st.integers(0, len(member) - 1))] = data.draw(st.integers(0, 255))
    member = member[: data.draw(st.integers(0, len(member)))] + data.draw(st.binary(max_size=4))
    try:
        parts = split_member("balanced", bytes(member))
        assert {len(parts[name]) for name in PLANES[:-1]} == {planes.count(parts)}
        unpack([{"splats": parts}], HEIGHT, WIDTH, "balanced")
    except CorruptShardError:
        pass


def member_of(count: int, symbols: bytes, bits: bytes = bytes(9)) -> bytes:
    stream = planes.BROTLI.compress(symbols, asbytes=True)
    return struct.pack("<II", count, len(stream)) + stream + bits


@pytest.mark.parametrize("symbols", [0, 69, 71, 1 << 20])
def test_a_member_whose_stream_is_not_as_long_as_it_says_is_corrupt(symbols: int) -> None:
    """A shorter one would be filled up with whatever lies in memory."""
    assert planes.count(split_member("compact", member_of(10, bytes(70)))) == 10
    with pytest.raises(CorruptShardError, match="cannot be taken apart"):
        split_member("compact", member_of(10, bytes(symbols)))


@pytest.mark.parametrize("count", [0, MAX_PAYLOAD_GAUSSIANS + 1, 2**31, 2**32 - 1])
def test_a_huge_count_takes_no_memory(count: int) -> None:
    member = member_of(count, bytes(70))
    tracemalloc.start()
    with pytest.raises(CorruptShardError, match="cannot be taken apart"):
        split_member("compact", member)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_signalling_nan_in_q11_is_no_warning() -> None:
    """Which would be an error here."""
    found = values_of(unpack([{"splats": SIGNALLING_NAN + bytes(11)}], 8, 16, "q11"))[0]
    assert found[..., 5:].isnan().all()
    assert found[..., :5].isfinite().all()


def test_fixed_bytes_of_q11() -> None:
    """Format version 1; schemas/FORMAT.md has them too."""
    payload = bytes.fromhex(
        "0000803f 00ff6093 00ff60a3 605950 49855df0 655a7f40 00d320".replace(" ", "")
    )
    wanted = [
        [4.000183, 2.000092, 2.0, 0.499854, 1.0, 0.502201, 0.253953, -0.12555],
        [10.499794, 6.249912, 1.492908, -2.982722, 0.746454, 1.0, 0.0, 0.063488],
    ]
    found = values_of(unpack([{"splats": payload}], 8, 16, "q11"))[0]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=6e-7)


CHECKED = """
import sys
import numpy as np
from splatshard.pipeline.codec.pack import unpack
from splatshard.pipeline.codec.planes import split
from splatshard.schemas.errors import CorruptShardError
from splatshard.schemas.splats import PLANES

rng = np.random.default_rng(0)
samples = [split(bytes.fromhex(line)) for line in sys.stdin.read().split()]
accepted = 0
for number in range(3000):
    payload = {name: bytearray(plane) for name, plane in samples[number % len(samples)].items()}
    n = len(payload["gap"])
    for name in rng.choice(PLANES, 2):
        for _ in range(rng.integers(1, 4)):
            payload[name][rng.integers(len(payload[name]))] = rng.integers(256)
    if number % 3 == 0:
        payload["bits"] = payload["bits"][: rng.integers(6, len(payload["bits"]) + 1)]
    try:
        unpack([{"splats": {k: bytes(v) for k, v in payload.items()}}], 48, 64, "compact")
        accepted += 1
    except CorruptShardError:
        pass
print(accepted)
"""


def test_the_kernel_never_indexes_out_of_range(tmp_path: Any) -> None:
    """Compiled with numba's own checks, which raise IndexError."""
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    members = "\n".join(planes.join(one).hex() for one in SAMPLES)
    result = subprocess.run(
        [sys.executable, "-c", CHECKED],
        input=members,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert 0 < int(result.stdout) < 3000
