#!/usr/bin/env bash
# chDB 4.4.0 (ClickHouse in Python) has one type for texts and bytes. Of a Parquet column of bytes a DataFrame has bytes
# where the value is no UTF-8 and text where it is, row by row; within a struct, as Hugging Face keeps images, the
# query fails with UnicodeDecodeError; and as an Arrow table all of them are called text, so that reading a value
# fails. output_format_arrow_string_as_string=0 gives bytes, for texts too. A null struct becomes a struct of nulls.
#
# Seen 2026-11-30 with pandas 3.1.1, pyarrow 26.0.1, Python 3.11, for b"\xff\xd8" and b"cat":
#   DataFrame: [bytearray(b'\xff\xd8'), 'cat']; in a struct: UnicodeDecodeError    None of struct<x>: {'x': None}
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  chdb==4.4.0 pandas==3.1.1 pyarrow==26.0.1 numpy==2.4.6
cat > "$folder/bytes.py" <<'PY'
import sys

import chdb
import pyarrow as pa
import pyarrow.parquet as pq

path = sys.argv[1]
values = [b"\xff\xd8", b"cat"]
images = [{"bytes": value} for value in values]
pq.write_table(pa.table({"data": values, "image": images, "size": [None, {"x": 1}]}), path)


def read(column, form, settings=""):
    rows = chdb.query(f"select {column} from file('{path}', Parquet) {settings}", form)
    return rows[column].to_pylist() if form == "ArrowTable" else rows[column].tolist()


def error(column, form):
    try:
        read(column, form)
    except (RuntimeError, UnicodeDecodeError) as failed:
        print(f"{column}, {form}: {type(failed).__name__}: {failed}")
        return "'utf-8' codec can't decode byte 0xff" in str(failed)
    return False


print(f"data, DataFrame: {read('data', 'DataFrame')}")
assert read("data", "DataFrame") == [bytearray(b"\xff\xd8"), "cat"]
assert error("image", "DataFrame") and error("data", "ArrowTable") and error("image", "ArrowTable")
as_bytes = "settings output_format_arrow_string_as_string = 0"
assert read("data", "ArrowTable", as_bytes) == values
assert read("image", "ArrowTable", as_bytes) == images
print(f"size, ArrowTable: {read('size', 'ArrowTable')}")
assert read("size", "ArrowTable") == [{"x": None}, {"x": 1}]
PY
"$folder/venv/bin/python" "$folder/bytes.py" "$folder/a.parquet"
