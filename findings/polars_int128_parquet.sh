#!/usr/bin/env bash
# Polars 2.1.0 writes Int128 columns to Parquet with an annotation of its own, and pyarrow 26.0.1 then opens nothing
# of the file: neither another column, nor its schema, nor with a schema of one's own; so neither does anything
# that reads through it. Nothing warns at writing. DuckDB 2.0.0 reads the file, and the column as 16 bytes,
# little-endian. Parquet's LogicalTypes.md, Numeric Types, knows integers of 8, 16, 32 and 64 bits.
# Who writes for others casts 128-bit ids to pl.Decimal(38, 0), which all read, or to text.
#
# Seen 2026-11-30, Python 3.11: ArrowNotImplementedError: Integers with more than 64 bits not implemented
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check polars==2.1.0 pyarrow==26.0.1 duckdb==2.0.0
cat > "$folder/int128.py" <<'PY'
import sys

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

path = sys.argv[1]
big = 2**100 + 1
frame = pl.DataFrame({"caption": ["a cat"], "id": pl.Series([big], dtype=pl.Int128)})
frame.write_parquet(path)
assert pl.read_parquet(path).equals(frame)
assert duckdb.sql(f"select * from '{path}'").fetchall() == [("a cat", big.to_bytes(16, "little"))]
for name, read in (
    ("all", lambda: pq.read_table(path)),
    ("another column", lambda: pq.read_table(path, columns=["caption"])),
    ("a schema of one's own", lambda: ds.dataset(path, schema=pa.schema({"caption": pa.string()})).to_table()),
    ("the schema", lambda: pq.read_schema(path)),
    ("the metadata", lambda: pq.read_metadata(path).schema),
):
    try:
        read()
    except pa.ArrowNotImplementedError as error:
        print(f"{name}: {error}")
        assert "more than 64 bits" in str(error)
    else:
        raise AssertionError(f"{name}: no error")

frame.with_columns(pl.col("id").cast(pl.Decimal(38, 0))).write_parquet(path)
assert int(pq.read_table(path)["id"][0].as_py()) == big
PY
"$folder/venv/bin/python" "$folder/int128.py" "$folder/a.parquet"
