#!/usr/bin/env bash
# fastparquet 2026.9.0 gives null for every value of columns that it does not understand, without a word: lists of
# structs (boxes, objects, further files of a sample) and lists of lists always, lists of texts where the writer made no
# dictionary (use_dictionary=False). The column is there, the other columns are right. Lists of numbers are read.
# pyarrow 26.0.1, which wrote the files, reads all of it, as does pandas with engine="pyarrow".
#
# Seen 2026-11-30 with pandas 3.1.1, Python 3.11, of three rows, the last of which is null:
#   list<struct>, list<list>: None, None, None    list<string>: as written, without a dictionary None, None, None
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  fastparquet==2026.9.0 pandas==3.1.1 pyarrow==26.0.1 numpy==2.4.6
cat > "$folder/nested.py" <<'PY'
import sys

import fastparquet
import pyarrow as pa
import pyarrow.parquet as pq

path = sys.argv[1]
boxes = [[{"name": "cat", "x": 1.0}], [{"name": "dog", "x": 2.0}, {"name": "ant", "x": 3.0}], None]
words = [["cat"], ["dog", "ant"], None]


def read(column, **options):
    table = pa.table({"key": ["a", "b", "c"], "column": column})
    pq.write_table(table, path, **options)
    assert pq.read_table(path).equals(table)
    rows = fastparquet.ParquetFile(path).to_pandas()
    assert rows["key"].tolist() == ["a", "b", "c"]
    print(f"{table.schema.field('column').type} {options}: {rows['column'].tolist()}")
    return rows["column"].tolist()


nothing = [None, None, None]
assert read([[1], [2, 3], None]) == [[1], [2, 3], None]
assert read(boxes) == nothing
assert read([[[1], [2]], [[3]], None]) == nothing
assert read(words) == words
assert read(words, use_dictionary=False) == nothing
PY
"$folder/venv/bin/python" "$folder/nested.py" "$folder/a.parquet"
