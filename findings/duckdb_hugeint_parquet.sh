#!/usr/bin/env bash
# DuckDB 2.0.0 writes its 128-bit integers (HUGEINT, UHUGEINT) to Parquet as doubles, without a word, so ids that
# differ become equal. Nobody needs to ask for the type: sum() of integers and md5_number() have it. Reading the
# file back in DuckDB gives doubles too. cast(x as decimal(38, 0)) or varchar keeps all digits.
#
# Seen 2026-11-30 with pyarrow 26.0.1, Python 3.11:
#   2**53 + 1 as HUGEINT: double 9007199254740992.0    sum of 2**53 and 1: the same    md5_number: double
#   as decimal(38, 0): 9007199254740993
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check duckdb==2.0.0 pyarrow==26.0.1
cat > "$folder/ids.py" <<'PY'
import sys

import duckdb
import pyarrow.parquet as pq

path = sys.argv[1]


def written(query):
    """The column's type in DuckDB, in the file, and its values as pyarrow reads them."""
    inside = str(duckdb.sql(query).types[0])
    duckdb.sql(f"copy ({query}) to '{path}' (format parquet)")
    column = pq.read_table(path)["id"]
    print(f"{query}: {inside}, {column.type}, {column.to_pylist()}")
    return inside, str(column.type), column.to_pylist()


assert written(f"select {2**53 + 1}::hugeint id") == ("HUGEINT", "double", [float(2**53)])
assert written(f"select sum(x) id from (values ({2**53}), (1)) t(x)") == ("HUGEINT", "double", [float(2**53)])
inside, outside, _ = written("select md5_number('a cat') id")
assert inside in ("HUGEINT", "UHUGEINT") and outside == "double"
_, _, ids = written(f"select x::hugeint id from (values ({2**53}), ({2**53 + 1})) t(x)")
assert ids[0] == ids[1]
_, _, ids = written(f"select {2**100 + 1}::hugeint::decimal(38, 0) id")
assert int(ids[0]) == 2**100 + 1
_, _, ids = written(f"select {2**100 + 1}::hugeint::varchar id")
assert ids == [str(2**100 + 1)]
PY
"$folder/venv/bin/python" "$folder/ids.py" "$folder/a.parquet"
