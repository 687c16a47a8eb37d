#!/usr/bin/env bash
# fsspec 2026.9.0: exists(URL) over HTTP is False whenever the server does not answer with success: busy (503, 429),
# broken (500), not allowed (403), or not there at all. So what asks before it reads or converts takes a
# shard for missing because a server restarts. info(URL) raises FileNotFoundError for each of these statuses too,
# but its __cause__ has the status: only 404 and 410 say that nothing is there.
#
# Seen 2026-11-30 with aiohttp 3.14.5, Python 3.11: 200: True; 403, 404, 429, 500, 503, no server: False
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check fsspec==2026.9.0 aiohttp==3.14.5
cat > "$folder/exists.py" <<'PY'
import http.server
import threading

import fsspec


class Answers(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(int(self.path[1:]))
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}"
fs = fsspec.filesystem("http")
for status in (200, 403, 404, 429, 500, 503):
    found = fs.exists(f"{url}/{status}")
    print(f"{status}: {found}")
    assert found == (status == 200)
    if status != 200:
        try:
            fs.info(f"{url}/{status}")
        except Exception as error:
            assert isinstance(error, FileNotFoundError) and error.__cause__.status == status
        else:
            raise AssertionError("info raises nothing")
server.shutdown()
server.server_close()
print(f"no server: {fs.exists(f'{url}/200')}")
assert not fs.exists(f"{url}/200")
PY
"$folder/venv/bin/python" "$folder/exists.py"
