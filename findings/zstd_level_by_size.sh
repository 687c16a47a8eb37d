#!/usr/bin/env bash
# A level of zstd is not one setting but four, chosen by the size of the input: up to 16 KiB, 128 KiB, 256 KiB and
# above. Levels 13 to 15 search up to 256 KiB as level 16 does above. On bytes with a skewed distribution and no repetitions
# (rounded normals: residuals, quantised weights, coefficients) it pays to find no matches, and so level 15 makes 1 MiB
# 4 % larger than the same bytes in four pieces, each compressed alone, and larger than level 1 does; level 16 is as good
# in one piece. For Parquet the input is a page, so smaller pages can give a smaller file at the same level:
# max_rows_per_page, since data_page_size is not kept for large values (pyarrow_data_page_size.sh). A level measured on
# other sizes than those it will meet says little.
#
# Seen 2026-11-30 with pyarrow 26.0.1, normals of standard deviation 5 rounded to int8, bytes of 1 MiB:
#   level 1: 578,414 in one piece, 578,461 in pieces of 256 KiB    level 3: 587,667, 634,490
#   level 15: 604,948, 579,385    level 16: 578,972, 579,522
#   a column of 4,096 values of 3,000 bytes, pages of 1,024 values or of 64: level 1: 6,790,974, 6,795,123
#   level 15: 7,216,007, 6,806,577    level 16: 6,791,427, 6,806,448
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1 numpy==2.4.6
cat > "$folder/levels.py" <<'PY'
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PIECE = 256 << 10
draws = np.random.default_rng(0).normal(0, 5, 4096 * 3000).round().astype(np.int8).tobytes()


def in_buffers(level):
    codec = pa.Codec("zstd", compression_level=level)
    pieces = [draws[i : i + PIECE] for i in range(0, 4 * PIECE, PIECE)]
    return len(codec.compress(b"".join(pieces))), sum(len(codec.compress(piece)) for piece in pieces)


def in_parquet(level):
    table = pa.table({"a": [draws[i : i + 3000] for i in range(0, len(draws), 3000)]})
    for rows in (1024, 64):
        options = {"write_statistics": False, "max_rows_per_page": rows}
        pq.write_table(
            table, sys.argv[1], compression="zstd", compression_level=level, use_dictionary=False, **options
        )
        yield pq.read_metadata(sys.argv[1]).row_group(0).column(0).total_compressed_size


for sizes in (in_buffers, in_parquet):
    one, fifteen, sixteen = (tuple(sizes(level)) for level in (1, 15, 16))
    print(f"{sizes.__name__}: large and small: level 1: {one}, level 15: {fifteen}, level 16: {sixteen}")
    assert fifteen[0] > 1.03 * fifteen[1]
    assert fifteen[0] > 1.03 * one[0]
    assert sixteen[0] < sixteen[1] < 1.01 * sixteen[0]
    assert abs(fifteen[1] - sixteen[1]) < 0.001 * sixteen[1]
PY
"$folder/venv/bin/python" "$folder/levels.py" "$folder/draws.parquet"
