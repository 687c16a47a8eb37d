#!/usr/bin/env bash
# DuckDB 2.0.0 guesses the types of a CSV or JSON Lines file from its first 20480 rows. Where a score is 0 or 1 in all of
# them, and so a BIGINT, the fractions of later rows are rounded without a word, in CSV and JSON each in its way.
# Polars 2.1.0 raises, pyarrow 26.0.1 reads a double. sample_size=-1 looks at the whole file.
#
# Seen 2026-11-30, Python 3.11, 30000 rows with score 1, but 0.3, 0.5 and 0.75 in the last three:
#   read_csv: BIGINT, 0, 1, 1    read_json: BIGINT, 0, 0, 1    both with sample_size=-1: DOUBLE, 0.3, 0.5, 0.75
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check duckdb==2.0.0 polars==2.1.0 pyarrow==26.0.1
cat > "$folder/scores.py" <<'PY'
import json
import sys

import duckdb
import polars as pl
import pyarrow.csv
import pyarrow.json

stem = sys.argv[1]
scores = [1] * 29997 + [0.3, 0.5, 0.75]
with open(f"{stem}.csv", "w") as file:
    file.writelines(["score\n", *(f"{score}\n" for score in scores)])
with open(f"{stem}.jsonl", "w") as file:
    file.writelines(json.dumps({"score": score}) + "\n" for score in scores)


def read(source):
    found = duckdb.sql(f"select * from {source}")
    last = [row[0] for row in found.fetchall()[-3:]]
    print(f"{source.replace(stem, '')}: {found.types[0]}, {last}")
    return str(found.types[0]), last


for name, reader, rounded in (("csv", "read_csv", [0, 1, 1]), ("jsonl", "read_json", [0, 0, 1])):
    assert read(f"'{stem}.{name}'") == ("BIGINT", rounded)
    assert read(f"{reader}('{stem}.{name}', sample_size=-1)") == ("DOUBLE", [0.3, 0.5, 0.75])

for polars in (lambda: pl.read_csv(f"{stem}.csv"), lambda: pl.read_ndjson(f"{stem}.jsonl")):
    try:
        polars()
    except pl.exceptions.ComputeError as error:
        print(f"Polars: {str(error)[:60]}")
    else:
        raise AssertionError("Polars raises nothing")
for table in (pyarrow.csv.read_csv(f"{stem}.csv"), pyarrow.json.read_json(f"{stem}.jsonl")):
    assert table["score"].to_pylist()[-3:] == [0.3, 0.5, 0.75]
PY
"$folder/venv/bin/python" "$folder/scores.py" "$folder/a"
