#!/usr/bin/env bash
# pyarrow 26.0.1: write_table and ParquetWriter with store_schema=False, which leaves out ARROW:schema so that a file
# is small or plain, also leave out the schema's own key-value metadata, without a word: "huggingface" with its
# features, "pandas" with its index, one's own. Fields' metadata goes too, but field ids stay. add_key_value_metadata
# of an open ParquetWriter is written all the same.
#
# Seen 2026-11-30, Python 3.11, a schema with {"made-by": "me"}: True: ARROW:schema, made-by; False: none
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1
cat > "$folder/metadata.py" <<'PY'
import io

import pyarrow as pa
import pyarrow.parquet as pq

field = pa.field("x", pa.int64(), metadata={"PARQUET:field_id": "7", "unit": "px"})
table = pa.table([[1]], schema=pa.schema([field], metadata={"made-by": "me"}))


def written(added, **options):
    file = io.BytesIO()
    with pq.ParquetWriter(file, table.schema, **options) as writer:
        writer.write_table(table)
        if added:
            writer.add_key_value_metadata(added)
    return io.BytesIO(file.getvalue())


def keys(file):
    return sorted(pq.read_metadata(file).metadata or {})


for added in ({}, {"later": "me"}):
    kept, left_out = written(added), written(added, store_schema=False)
    print(f"added {added}: {keys(kept)}, with store_schema=False: {keys(left_out)}")
    later = [name.encode() for name in added]
    assert keys(kept) == sorted([b"ARROW:schema", b"made-by", *later])
    assert keys(left_out) == later
    assert pq.read_schema(kept).field("x").metadata[b"unit"] == b"px"
    assert pq.read_schema(left_out).field("x").metadata == {b"PARQUET:field_id": b"7"}

file = io.BytesIO()
pq.write_table(table, file, store_schema=False)
assert keys(io.BytesIO(file.getvalue())) == []
PY
"$folder/venv/bin/python" "$folder/metadata.py"
