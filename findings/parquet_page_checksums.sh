#!/usr/bin/env bash
# Checksums of Parquet's pages (parquet.thrift, PageHeader.crc): pyarrow writes them with write_page_checksum=True, and
# looks at them only with page_checksum_verification=True. DuckDB 2.0.0, Polars 2.1.0, DataFusion 55.0.0 and
# fastparquet 2026.9.0 do not: a bit that a disk or a network flipped in an uncompressed page is a value like any
# other, without a word. chDB 4.4.0 (ClickHouse) refuses the file.
#
# Seen 2026-11-30 with pyarrow 26.0.1, Python 3.11, for "a cat" with one bit flipped: "a bat" from all but pyarrow with the
# option and chDB
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1 duckdb==2.0.0 polars==2.1.0 \
  datafusion==55.0.0 fastparquet==2026.9.0 chdb==4.4.0 pandas==3.1.1 numpy==2.4.6
cat > "$folder/checksums.py" <<'PY'
import sys

import chdb
import datafusion
import duckdb
import fastparquet
import polars
import pyarrow as pa
import pyarrow.parquet as pq

path = sys.argv[1]
options = {"use_dictionary": False, "write_statistics": False, "compression": "none"}
pq.write_table(pa.table({"a": ["a cat"]}), path, write_page_checksum=True, **options)


def of_chdb():
    return chdb.query(f"select a from file('{path}', Parquet)", "DataFrame")["a"][0]


readers = {
    "pyarrow": lambda: pq.read_table(path)["a"][0].as_py(),
    "DuckDB": lambda: duckdb.sql(f"select a from '{path}'").fetchall()[0][0],
    "Polars": lambda: polars.read_parquet(path)["a"][0],
    "DataFusion": lambda: datafusion.SessionContext().read_parquet(path).to_pylist()[0]["a"],
    "fastparquet": lambda: fastparquet.ParquetFile(path).to_pandas()["a"][0],
}
for name, read in (readers | {"chDB": of_chdb}).items():
    assert read() == "a cat", name

with open(path, "r+b") as file:
    data = file.read()
    file.seek(data.index(b"a cat") + 2)
    file.write(b"b")  # "c" with its lowest bit flipped
for name, read in readers.items():
    print(f"{name}: {read()}")
    assert read() == "a bat", name
for name, read in {
    "pyarrow, checked": lambda: pq.read_table(path, page_checksum_verification=True),
    "chDB": of_chdb,
}.items():
    try:
        read()
    except (OSError, RuntimeError) as error:
        print(f"{name}: {error}")
        assert "crc" in str(error).lower()
    else:
        raise AssertionError(f"{name}: no error")
PY
"$folder/venv/bin/python" "$folder/checksums.py" "$folder/a.parquet"
