#!/usr/bin/env bash
# Rows as dictionaries, of which some have more fields than others, as captions and scores of scraped images do:
# pyarrow's Table.from_pylist and Hugging Face's Dataset.from_list take the fields of the first row, Polars'
# from_dicts, read_ndjson and scan_ndjson those of the first 100, and drop all others without a word. JSON Lines
# through pyarrow, DuckDB and datasets, and rows through pandas keep them. Remedies: schema=... for from_pylist,
# infer_schema_length=None for Polars; from_list with features=... raises, so the first row gets all fields.
#
# Seen 2026-11-30, Python 3.11, 300 rows, "late" in the second, or in the 251st: dropped, as told
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 polars==2.1.0 duckdb==2.0.0 numpy==2.4.6
cat > "$folder/rows.py" <<'PY'
import json
import sys

import datasets
import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.json

datasets.disable_progress_bars()
path = sys.argv[1]
schema = pa.schema({"key": pa.int64(), "late": pa.string()})
features = datasets.Features({"key": datasets.Value("int64"), "late": datasets.Value("string")})
whole = {"key": 0, "late": None}
for late, dropping in (
    (1, {"pyarrow from_pylist", "datasets from_list"}),
    (250, {"pyarrow from_pylist", "datasets from_list", "polars from_dicts", "polars read_ndjson", "polars scan_ndjson"}),
):
    rows = [{"key": i, **({"late": "a cat"} if i == late else {})} for i in range(300)]
    with open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    columns = {
        "pyarrow from_pylist": pa.Table.from_pylist(rows).column_names,
        "pyarrow from_pylist, schema": pa.Table.from_pylist(rows, schema).column_names,
        "datasets from_list": datasets.Dataset.from_list(rows).column_names,
        "datasets from_list, first row whole": datasets.Dataset.from_list([whole, *rows[1:]]).column_names,
        "polars from_dicts": pl.from_dicts(rows).columns,
        "pandas DataFrame": list(pd.DataFrame(rows).columns),
        "polars from_dicts, all": pl.from_dicts(rows, infer_schema_length=None).columns,
        "polars read_ndjson": pl.read_ndjson(path).columns,
        "polars scan_ndjson": pl.scan_ndjson(path).collect().columns,
        "polars read_ndjson, all": pl.read_ndjson(path, infer_schema_length=None).columns,
        "polars scan_ndjson, all": pl.scan_ndjson(path, infer_schema_length=None).collect().columns,
        "pyarrow read_json": pyarrow.json.read_json(path).column_names,
        "datasets json": datasets.load_dataset("json", data_files=path, split="train").column_names,
        "duckdb": duckdb.sql(f"select * from '{path}'").columns,
    }
    dropped = {name for name, found in columns.items() if found != ["key", "late"]}
    print(f"in row {late + 1}: dropped by {sorted(dropped)}")
    assert dropped == dropping
    try:
        datasets.Dataset.from_list(rows, features=features)
    except ValueError as error:
        assert "Keys mismatch" in str(error)
    else:
        raise AssertionError("from_list takes features")
PY
HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/rows.py" "$folder/a.jsonl"
