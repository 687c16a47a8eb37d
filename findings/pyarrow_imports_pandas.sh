#!/usr/bin/env bash
# pyarrow imports pandas, where it is installed, with the first value made of anything in Python or numpy: pa.array([1]),
# pa.scalar(1), pa.table({...}), Table.from_pylist, and with `import pyarrow.dataset`; not with `import pyarrow` itself,
# and though nothing of pandas is there. from_pandas=False makes no difference. So each worker of a pool or a DataLoader
# that makes one array takes 0.3 s and 55 MB more to start. pq.ParquetFile (not pq.read_table) and to_pylist leave pandas
# alone, and so do arrays made of buffers, pa.Array.from_buffers.
#
# Seen 2026-11-30 with pyarrow 26.0.1 and pandas 3.1.1, Python 3.11, a process each, whether pandas is imported:
#   yes: pa.array of a list or of numpy, pa.scalar, pa.table, pq.read_table, import pyarrow.dataset
#   no: import pyarrow.parquet, pq.ParquetFile(...).read().to_pylist(), pa.Array.from_buffers
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
cat > "$folder/imported.py" <<'PY'
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

expected, statement, path = sys.argv[1] == "yes", *sys.argv[2:]
assert "pandas" not in sys.modules
exec(statement)
imported = sys.modules.get("pandas") is not None
print(f"{statement}: {imported}")
assert imported == expected
PY
imported() { "$folder/venv/bin/python" "$folder/imported.py" "$@" "$folder/one.parquet"; }
imported yes 'pa.array([1])'
imported yes 'pa.array([1], pa.int64(), from_pandas=False)'
imported yes 'pa.array(np.array([1]))'
imported yes 'pa.scalar(1)'
imported yes 'pq.write_table(pa.table({"a": [1]}), path)'
imported yes 'import pyarrow.dataset'
imported yes 'pq.read_table(path)'
imported no 'assert pq.ParquetFile(path).read().to_pylist() == [{"a": 1}]'
imported no 'a = np.array([1]); assert pa.Array.from_buffers(pa.int64(), 1, [None, pa.py_buffer(a)]).to_pylist() == [1]'
