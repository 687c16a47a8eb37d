"""The fault proxy itself: each fault as boto3 sees it, and the plan that draws them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from tests.integration import chaos
from tests.integration.faults import FAULTS, FaultPlan, Proxy, evenly
from tests.integration.stores import Store

pytestmark = pytest.mark.integration

KEY = {"Bucket": "proxy", "Key": "folder/key"}
DATA = bytes(range(256)) * 40


@pytest.fixture
def client(moto: Store, proxy: Proxy) -> Any:
    """Asks the proxy once, without retries."""
    moto.put("proxy", {})
    for key in moto.objects("s3://proxy"):
        moto.client().delete_object(Bucket="proxy", Key=key)
    proxy.begin(FaultPlan())
    return moto.client(proxy.endpoint, retries={"total_max_attempts": 1}, read_timeout=10)


def always(kind: str) -> FaultPlan:
    return FaultPlan(rates={kind: 1.0})


def code(call: Callable[..., Any], **arguments: Any) -> str:
    """The S3 error code that `call` fails with."""
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    return caught.value.response["Error"]["Code"]


def test_what_passes_is_not_changed(client: Any, moto: Store, proxy: Proxy) -> None:
    client.put_object(**KEY, Body=DATA, IfNoneMatch="*")
    assert code(client.put_object, **KEY, Body=b"", IfNoneMatch="*") == "PreconditionFailed"
    assert client.get_object(**KEY)["Body"].read() == DATA
    assert client.get_object(**KEY, Range="bytes=10-19")["Body"].read() == DATA[10:20]
    assert client.head_object(**KEY)["ContentLength"] == len(DATA)
    listed = client.list_objects_v2(Bucket="proxy", Prefix="folder/")["Contents"]
    assert [entry["Key"] for entry in listed] == ["folder/key"]
    upload = client.create_multipart_upload(**KEY)["UploadId"]
    tag = client.upload_part(**KEY, UploadId=upload, PartNumber=1, Body=b"new")["ETag"]
    parts = {"Parts": [{"ETag": tag, "PartNumber": 1}]}
    client.complete_multipart_upload(**KEY, UploadId=upload, MultipartUpload=parts)
    assert moto.objects("s3://proxy/folder") == {"key": b"new"}
    client.delete_object(**KEY)
    assert moto.objects("s3://proxy") == {}
    assert proxy.counts == {"pass": 10}


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("error_500", "InternalError"), ("slow_down", "SlowDown"), ("skewed", "RequestTimeTooSkewed")],
)
def test_an_error_is_answered_and_nothing_done(
    client: Any, moto: Store, proxy: Proxy, kind: str, wanted: str
) -> None:
    proxy.begin(always(kind))
    assert code(client.put_object, **KEY, Body=DATA) == wanted
    assert proxy.faults() == {kind: 1}
    assert moto.objects("s3://proxy") == {}


@pytest.mark.parametrize(("kind", "done"), [("cut_before", False), ("cut_after", True)])
def test_a_cut_connection_leaves_the_client_in_doubt(
    client: Any, moto: Store, proxy: Proxy, kind: str, done: bool
) -> None:
    proxy.begin(always(kind))
    with pytest.raises(ConnectionClosedError):
        client.put_object(**KEY, Body=DATA)
    assert moto.objects("s3://proxy") == ({"folder/key": DATA} if done else {})


def test_a_body_is_cut_in_the_middle(client: Any, proxy: Proxy) -> None:
    client.put_object(**KEY, Body=DATA)
    proxy.begin(always("cut_body"))
    body = client.get_object(**KEY)["Body"]
    with pytest.raises(ResponseStreamingError):
        body.read()
    with pytest.raises(ConnectionClosedError):  # an empty answer has no middle
        client.put_object(**KEY, Body=b"other")


def test_slow_bytes_arrive_whole(client: Any, moto: Store, proxy: Proxy) -> None:
    proxy.begin(always("slow"))
    begun = time.monotonic()
    client.put_object(**KEY, Body=DATA)
    assert client.get_object(**KEY)["Body"].read() == DATA
    assert time.monotonic() - begun > 1.5  # a second in each direction, not less
    impatient = moto.client(proxy.endpoint, retries={"total_max_attempts": 1}, read_timeout=0.01)
    with pytest.raises(ReadTimeoutError):
        impatient.put_object(**KEY, Body=DATA)


def test_a_plan_depends_on_seed_and_request_alone() -> None:
    plan = evenly(7, 0.3)
    requests = [("GET", f"/bucket/{i}", n) for i in range(2000) for n in range(2)]
    kinds = [plan.kind(*request) for request in requests]
    assert kinds == [evenly(7, 0.3).kind(*request) for request in requests]
    assert kinds != [evenly(8, 0.3).kind(*request) for request in requests]
    shares = {kind: n / len(kinds) for kind, n in Counter(kinds).items()}
    assert shares["pass"] == pytest.approx(0.7, abs=0.03)
    assert all(shares[kind] == pytest.approx(0.05, abs=0.02) for kind in FAULTS)


def test_a_plan_may_mean_some_requests_only(client: Any, moto: Store, proxy: Proxy) -> None:
    proxy.begin(FaultPlan(rates={"slow_down": 1.0}, only="PUT .*[0-9]", times=1))
    client.put_object(Bucket="proxy", Key="marker", Body=b"")
    names = [f"{KEY['Key']}-12345678-{attempt}.parquet" for attempt in ("0a1b2c3d1", "ffffffff12")]
    assert code(client.put_object, Bucket="proxy", Key=names[0], Body=b"") == "SlowDown"
    client.put_object(Bucket="proxy", Key=names[1], Body=b"")  # the same but for the attempt
    assert set(moto.objects("s3://proxy")) == {"marker", names[1]}
    assert proxy.counts == {"pass": 2, "slow_down": 1}


def test_the_tally_goes_from_one_process_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = chaos.Moment(
        what="worker", seed=1, store="moto", exits=[0], retries=Counter(crash=2), ok=True
    )
    monkeypatch.setattr(chaos, "TALLY", [killed])
    told = chaos.tally_to_json()
    monkeypatch.setattr(chaos, "TALLY", [])
    chaos.add_to_tally(told)
    assert [killed] == chaos.TALLY
    assert "2 crash" in "\n".join(chaos.tally_lines())
