#!/usr/bin/env bash
# DataFusion 55.0.0: length() of bytes counts letters. It takes the bytes for UTF-8, so that a column of files, hashes or
# embeddings fails with "non-UTF-8 data" as soon as one value is no text, and where all happen to be text the number
# is that of the letters: 4 for the 5 bytes of "café". octet_length() and bit_length(), which count bytes of texts,
# refuse bytes. length(encode(x, 'hex')) / 2 is right. DuckDB 2.0.0 has octet_length() for bytes.
#
# Seen 2026-11-30 with pyarrow 26.0.1, Python 3.11: length of b"cat" and "café" as bytes: 3, 4; with b"\xff\xd8" an error
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datafusion==55.0.0 pyarrow==26.0.1 duckdb==2.0.0
cat > "$folder/length.py" <<'PY'
import sys

import datafusion
import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

path = sys.argv[1]


def measured(values, function):
    """What `function` gives for a column of bytes, or the error."""
    pq.write_table(pa.table({"x": pa.array(values, pa.binary())}), path)
    try:
        rows = datafusion.SessionContext().read_parquet(path).select_exprs(f"{function} as n").to_pylist()
    except Exception as error:
        found = str(error).partition("\n")[0]
    else:
        found = [row["n"] for row in rows]
    print(f"{function} of {values}: {found}")
    return found


texts = [b"cat", "café".encode()]
assert measured(texts, "length(x)") == [3, 4]
assert measured(texts, "length(encode(x, 'hex')) / 2") == [3, 5]
assert duckdb.sql(f"select octet_length(x) from '{path}'").fetchall() == [(3,), (5,)]
assert "requires String, but received Binary" in measured(texts, "octet_length(x)")
assert "requires String, but received Binary" in measured(texts, "bit_length(x)")
assert "non-UTF-8 data" in measured([*texts, b"\xff\xd8"], "length(x)")
assert measured([*texts, b"\xff\xd8"], "length(encode(x, 'hex')) / 2") == [3, 5, 2]
PY
"$folder/venv/bin/python" "$folder/length.py" "$folder/a.parquet"
