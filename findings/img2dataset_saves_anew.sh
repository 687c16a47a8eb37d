#!/usr/bin/env bash
# img2dataset 1.47.0, which downloads LAION and DataComp, saves every picture anew as JPEG through OpenCV, also with
# resize_mode="no": photographs lie on their side, for the EXIF orientation is neither applied nor kept (the JSON has
# it in words, under "exif"); PNGs of 16 bits are clipped at 255 of 65535, and count as success; and "sha256" in the
# JSON is that of the file on the web, not of the .jpg beside it. disable_all_reencoding=True keeps the bytes,
# whatever they are, as .jpg.
#
# Seen 2026-11-30 with OpenCV 4.14.0, pillow 13.0.0, Python 3.11:
#   48 x 32 JPEG of orientation 6, shown as 32 x 48: 48 x 32 without EXIF, "Image Orientation": "Rotated 90 CW"
#   16-bit grey PNG of 20000: 255    sha256: the source's    with disable_all_reencoding: the sources' bytes
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check img2dataset==1.47.0 albumentations==1.4.24 \
  opencv-python-headless==4.14.0.94 pandas==2.3.3 pyarrow==26.0.1 pillow==13.0.0 numpy==2.4.6
cat > "$folder/download.py" <<'PY'
import functools
import hashlib
import http.server
import json
import sys
import threading
from pathlib import Path

import numpy as np
from img2dataset import download
from PIL import Image

ORIENTATION = 0x112


class Server(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def downloaded(folder, url, **options):
    """The files of each source, by its name: bytes and JSON."""
    urls = folder / "urls.txt"
    urls.write_text("\n".join(f"{url}/{path.name}" for path in sorted((folder / "web").iterdir())))
    out = folder / f"out{len(options)}"
    options |= {"resize_mode": "no", "processes_count": 1, "thread_count": 1}
    download(url_list=str(urls), output_folder=str(out), output_format="files", **options)
    found = {}
    for path in out.glob("00000/*.json"):
        said = json.loads(path.read_text())
        assert said["status"] == "success"
        found[said["url"].rsplit("/", 1)[1]] = path.with_suffix(".jpg"), said
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    web = folder / "web"
    web.mkdir(parents=True)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (48, 32), "red").save(web / "photo.jpg", exif=exif)
    Image.fromarray(np.full((32, 48), 20000, np.uint16)).save(web / "grey.png")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=web))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"

    found = downloaded(folder, url)
    (photo, said), (grey, _) = found["photo.jpg"], found["grey.png"]
    image = Image.open(photo)
    print(f"photo: {image.size}, orientation {image.getexif().get(ORIENTATION)}, exif {said['exif']}")
    assert image.size == (48, 32) and not image.getexif()
    assert json.loads(said["exif"])["Image Orientation"] == "Rotated 90 CW"
    print(f"grey of 20000: {Image.open(grey).getextrema()}")
    assert Image.open(grey).getextrema() == (255, 255)
    for name, (path, said) in found.items():
        assert said["sha256"] == hashlib.sha256((web / name).read_bytes()).hexdigest()
        assert path.read_bytes() != (web / name).read_bytes()
    for name, (path, _) in downloaded(folder, url, disable_all_reencoding=True).items():
        assert path.read_bytes() == (web / name).read_bytes()
PY
NO_ALBUMENTATIONS_UPDATE=1 "$folder/venv/bin/python" -W ignore "$folder/download.py" "$folder/made"
