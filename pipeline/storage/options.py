"""How remote stores are reached (`--storage-options`), and which of it must never be shown.

Options are those of the fsspec driver of a scheme; what the user gives goes over the defaults here.
Credentials, endpoint and region that are not given come from the usual AWS environment, and so do
retries (AWS_MAX_ATTEMPTS, AWS_RETRY_MODE).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

ALIASES = {"s3a": "s3", "https": "http", "gcs": "gs", "abfss": "abfs"}
PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "http": "aiohttp",
    "hf": "huggingface_hub",
    **dict.fromkeys(("abfs", "az", "adl"), "adlfs"),
}
"""What to install for a scheme."""

_options: dict[str, Any] = {}


def set_options(options: Mapping[str, Any]) -> None:
    """See `pipeline.storage.fs.use_options`."""
    global _options, _secrets
    _options = dict(options)
    _secrets = tuple(sorted(set(_secret_values(options)), key=len, reverse=True))


def scheme_of(url: str) -> str:
    """The scheme of a remote URL, by its usual name."""
    given = url.partition("://")[0]
    return ALIASES.get(given, given)


def options_of(scheme: str) -> dict[str, Any]:
    """All options of that scheme's driver."""
    own: dict[str, Any] = {}
    general: dict[str, Any] = {}
    for name, value in _options.items():
        if isinstance(value, Mapping) and (name in ALIASES or name in PACKAGES):
            own |= value if ALIASES.get(name, name) == scheme else {}
        elif scheme != "http":  # its driver would send them
            general[name] = value
    return _merged(_merged(_defaults(scheme), general), own)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**below, **above}
    for name in below.keys() & above.keys():
        if isinstance(below[name], Mapping) and isinstance(above[name], Mapping):
            merged[name] = _merged(below[name], above[name])
    return merged


def _defaults(scheme: str) -> dict[str, Any]:
    if scheme == "s3":
        retries: dict[str, Any] = {}
        if "AWS_RETRY_MODE" not in os.environ:
            retries["mode"] = "adaptive"
        if "AWS_MAX_ATTEMPTS" not in os.environ:
            retries["total_max_attempts"] = 10  # about a minute
        config = {"connect_timeout": 10, "read_timeout": 30, "max_pool_connections": 64}
        return {
            "config_kwargs": config | ({"retries": retries} if retries else {}),
            "default_block_size": 16 << 20,
            "max_concurrency": 1,  # else a HEAD precedes every small read
        }
    if scheme == "http":
        import aiohttp

        # the driver's own limit is five minutes for a whole file
        limits = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)
        return {"client_kwargs": {"timeout": limits}}
    return {}


# Secrets

SECRET_NAME = re.compile(
    r"key|secret|token|passw|credential|signature|auth|connection_string|^sig$|^sas|header|cookie|jwt",
    re.I,
)
"""Names of options; below one of them everything is a secret."""
WEB = re.compile(r"(?:https?://|\burl: /).*", re.I)
"""A line from an address of a web server on, as people and urllib3 write it."""
QUERY = re.compile(r"""\?(?:(?!::(?:\w+:/|[./~]))(?:[^\s'"<>]|['"](?=[^\s'"<>,)\]}:;.])))+""")
"""To its end; that is also a quote before white space or punctuation, or another's `::`."""
SIGNED = re.compile(
    r"(://[^\s?'\"<>]*)\?[^\s'\"<>]*"
    r"\b(x-amz-|x-goog-|awsaccesskey|sig=|signature|\w*token|\w*key=|secret|passw)[^\s'\"<>]*",
    re.I,
)
"""Elsewhere `?` may be part of a pattern, or name a version."""
USER_INFO = re.compile(
    r"(?<=https://)[^\s/?#'\"]+@|(?<=http://)[^\s/?#'\"]+@|(?<=://)[^\s/?#'\"]*:[^\s/?#'\"]*@", re.I
)
"""Names without a password mean something else elsewhere, such as `abfs://container@account`."""

_secrets: tuple[str, ...] = ()


def _secret_values(options: Mapping[str, Any], secret: bool = False) -> Iterator[str]:
    for name, value in options.items():
        hidden = secret or bool(SECRET_NAME.search(str(name)))
        if isinstance(value, Mapping):
            yield from _secret_values(value, hidden)
        elif hidden and isinstance(value, str) and len(value) > 3:
            yield value


def redact(text: str) -> str:
    """`text` without secrets: those of the storage options and the environment, and what
    `redact_urls` strikes out."""
    known = (os.environ.get(n, "") for n in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"))
    for secret in (*_secrets, *known):
        if len(secret) > 3:
            text = text.replace(secret, "***")
    return redact_urls(text)


def redact_urls(text: str) -> str:
    """`text` without user and password in URLs, without queries of http(s), whose names for a
    secret are endless, and without the queries of other URLs that are signed."""
    if "://" in text:
        text = SIGNED.sub(r"\1?***", USER_INFO.sub("***@", text))
    return WEB.sub(lambda line: QUERY.sub("?***", line[0]), text) if "?" in text else text


def redact_url(url: str) -> str:
    """The whole of `url` without what is secret in it, for files, and to compare places.

    What has none stays as it is, whatever the storage options are: it can be read again.
    """
    place, query, _ = url.partition("?") if re.match(r"https?://", url, re.I) else (url, "", "")
    return redact_urls(f"{place}?***" if query else place)


def redact_src(src: str) -> str:
    """`redact_url` of several sources, joined by `::`."""
    return "::".join(map(redact_url, src.split("::")))


def is_redacted(url: str) -> bool:
    """Whether `redact_url` has taken something from `url`, so that it cannot be read."""
    return "://***@" in url or url.endswith("?***")
