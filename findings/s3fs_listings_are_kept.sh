#!/usr/bin/env bash
# s3fs 2026.9.0 keeps what it has listed for the life of the process, and believes it: after one ls or glob of a
# folder, an object that another process puts there does not exist, and even cat and open of it raise
# FileNotFoundError without asking the server; one that was deleted exists, one that was replaced has its old
# size. S3FileSystem(...) again gives the same object with the same memory. Who waits for another's files passes
# use_listings_cache=False, or calls invalidate_cache() before each look. S3 itself is consistent.
#
# Seen 2026-11-30 with moto 5.2.5, Python 3.11, after ls of a folder with "old":
#   "new" put by boto3: exists False, cat and open FileNotFoundError    "old" deleted: exists True
#   "old" of 5 bytes: info has 1    use_listings_cache=False, or the listing forgotten: all right
# Exits with 1 if any of this has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  s3fs==2026.9.0 fsspec==2026.9.0 aiobotocore==3.10.0 boto3==1.43.117 botocore==1.43.117 "moto[server]==5.2.5"
cat > "$folder/listings.py" <<'PY'
import boto3
import s3fs
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
url = f"http://{host}:{port}"
secrets = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "region_name": "us-east-1"}
client = boto3.client("s3", endpoint_url=url, **secrets)
client.create_bucket(Bucket="bucket")


def opened(**options):
    return s3fs.S3FileSystem(key="any", secret="any", client_kwargs={"endpoint_url": url}, **options)


def raises(read):
    try:
        read()
    except FileNotFoundError:
        return True
    return False


def put(name, body):
    client.put_object(Bucket="bucket", Key=f"shards/{name}", Body=body)


put("old", b"1")
fs, fresh = opened(), opened(use_listings_cache=False, skip_instance_cache=True)
assert opened() is fs
assert fs.ls("bucket/shards") == fresh.ls("bucket/shards") == ["bucket/shards/old"]
put("new", b"2")
new, old = "bucket/shards/new", "bucket/shards/old"
print(f"new: exists {fs.exists(new)}, cat raises {raises(lambda: fs.cat(new))}")
assert not fs.exists(new) and raises(lambda: fs.cat(new)) and raises(lambda: fs.open(new))
assert fs.glob("bucket/shards/*") == [old]
assert fresh.exists(new) and fresh.cat(new) == b"2"
put("old", b"12345")
print(f"old of 5 bytes: {fs.info(old)['size']}")
assert fs.info(old)["size"] == 1 and fresh.info(old)["size"] == 5
client.delete_object(Bucket="bucket", Key="shards/old")
print(f"old deleted: exists {fs.exists(old)}")
assert fs.exists(old) and not fresh.exists(old)
fs.invalidate_cache()
assert fs.exists(new) and not fs.exists(old)
server.stop()
PY
"$folder/venv/bin/python" "$folder/listings.py" 2>&1 | grep -v -e "HTTP/1.1" -e MotoServer
