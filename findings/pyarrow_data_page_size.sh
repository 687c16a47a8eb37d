#!/usr/bin/env bash
# pyarrow's Parquet writer looks at data_page_size only after each write_batch_size values, 1,024 by default: a column of
# 3 KB values (images, embeddings, documents) has pages of 3 MB whatever is asked, and a file with data_page_size=1 is
# the same, byte for byte, as with 1 MiB. The documentation of write_batch_size hints at it, that of data_page_size
# does not. Whoever reads one row through the page index decompresses 1,024. max_rows_per_page is kept, and
# data_page_size is with a small write_batch_size.
#
# Seen 2026-11-30 with pyarrow 26.0.1, 8,192 times the same random 3,000 bytes, so that zstd leaves them once a page:
#   data_page_size=1, 65,536 or 1,048,576: 8 pages, the same bytes    65,536 and write_batch_size=1: 373 pages
#   max_rows_per_page=16: 512 pages
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1 numpy==2.4.6
cat > "$folder/pages.py" <<'PY'
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

value = np.random.default_rng(0).bytes(3000)
table = pa.table({"a": [value] * 8192})


def written(**options):
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd", use_dictionary=False, write_statistics=False, **options)
    return file.getvalue()


default = written()
print(f"default: {len(default):,} bytes, with the value in {default.count(value)} pages")
for options, pages in (
    ({"data_page_size": 1}, 8),
    ({"data_page_size": 65536}, 8),
    ({"data_page_size": 1048576}, 8),
    ({"data_page_size": 65536, "write_batch_size": 1}, 373),
    ({"max_rows_per_page": 16}, 512),
):
    file = written(**options)
    print(f"{options}: {len(file):,} bytes, the same as the default: {file == default}; {file.count(value)} pages")
    assert file.count(value) == pages
    assert (file == default) == (pages == 8)
PY
"$folder/venv/bin/python" "$folder/pages.py"
