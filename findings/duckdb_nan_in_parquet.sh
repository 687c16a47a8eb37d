#!/usr/bin/env bash
# Scores that are NaN, as those of pictures that could not be scored, in Parquet files of pyarrow or Polars: DuckDB
# 2.0.0 takes a column's statistics for the whole truth, and they say nothing of NaN (parquet.thrift, ColumnOrder:
# "NaNs should not be written to min or max statistics fields"). So isnan(score) is false for NaN, score <= 1
# and score != NaN are true, and score > 0.5, which takes NaN as in Polars, leaves those of a row group whose other
# scores are all below: the rows change with the size of row groups. pyarrow and pandas take no NaN. The same
# rows in memory, or in a file that DuckDB wrote, are right. where isfinite(score) takes the same everywhere.
#
# Seen 2026-11-30 with pyarrow 26.0.1, Python 3.11, scores 0.1, NaN, 0.9, NaN of rows 0 to 3; the rows taken by
#   isnan(score)      in memory 1, 3       file: none
#   score <= 1        in memory 0, 2       file: 0, 1, 2, 3
#   score > 0.5       in memory 1, 2, 3    file: 1, 2, 3    row groups of two: 2, 3
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  duckdb==2.0.0 polars==2.1.0 pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
cat > "$folder/scores.py" <<'PY'
import sys

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

path = sys.argv[1]
scores = pa.table({"key": [0, 1, 2, 3], "score": [0.1, float("nan"), 0.9, float("nan")]})


def taken(source, condition):
    return [key for (key,) in duckdb.sql(f"select key from {source} where {condition} order by key").fetchall()]


def shown(source, **expected):
    conditions = {
        "isnan": "isnan(score)",
        "at_most": "score <= 1",
        "above": "score > 0.5",
        "between": "score > 0.5 and score <= 1",
        "finite": "score > 0.5 and isfinite(score)",
    }
    found = {name: taken(source, condition) for name, condition in conditions.items()}
    print(f"{source.rsplit('/', 1)[-1]}: {found}")
    assert found == expected


def others():
    assert pl.scan_parquet(path).filter(pl.col("score") > 0.5).collect()["key"].to_list() == [1, 2, 3]
    assert pl.scan_parquet(path).filter(pl.col("score").is_nan()).collect()["key"].to_list() == [1, 3]
    assert pq.read_table(path, filters=[("score", ">", 0.5)])["key"].to_pylist() == [2]
    assert pd.read_parquet(path).query("score > 0.5")["key"].to_list() == [2]


right = {"isnan": [1, 3], "at_most": [0, 2], "above": [1, 2, 3], "between": [2], "finite": [2]}
wrong = {"isnan": [], "at_most": [0, 1, 2, 3], "finite": [2]}
shown("scores", **right)
pq.write_table(scores, path)
shown(f"'{path}'", **wrong, above=[1, 2, 3], between=[1, 2, 3])
others()
duckdb.sql(f"copy (select * from scores) to '{path}.duckdb' (format parquet)")
shown(f"read_parquet('{path}.duckdb')", **right)
pq.write_table(scores, path, row_group_size=2)
shown(f"'{path}'", **wrong, above=[2, 3], between=[2, 3])
others()
pl.from_arrow(scores).write_parquet(path)
assert taken(f"'{path}'", "isnan(score)") == []
PY
"$folder/venv/bin/python" "$folder/scores.py" "$folder/a.parquet"
