"""Requests to the Hugging Face Hub that end, whose names and bytes are checked.

huggingface_hub waits for some answers without a limit, takes what arrives for what was asked for,
and makes paths of names that a server chooses. Its requests pass through the hooks of this file.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import _http

from nanoalign.distributed import environment_ranks
from nanoalign.errors import RunError
from nanoalign.files.checksums import blob_of, digest_of_file

httpx = getattr(_http, "httpx2", None) or _http.httpx  # huggingface_hub 2, and 1
SECONDS, BYTES_PER_SECOND = 60.0, 1000  # an answer that brings less for so long is given up


@cache
def limit_requests() -> None:
    """Lets the requests of huggingface_hub, and so of datasets, pass through the hooks below."""
    huggingface_hub.set_client_factory(client)


def client() -> "httpx.Client":
    """Returns a client as huggingface_hub makes it, with the hooks."""
    made = _http.default_client_factory()
    made.event_hooks["request"].append(set_timeouts)
    made.event_hooks["response"] += [watch, check_names]
    return made


def set_timeouts(request: "httpx.Request") -> None:
    """Lowers timeouts to $HF_HUB_DOWNLOAD_TIMEOUT, by default 10 s; some are not set at all.

    They hold for a connection, and for the wait between two parts of an answer.
    """
    most, timeouts = huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT, request.extensions
    timeouts["timeout"] = {
        name: min(timeouts.get("timeout", {}).get(name) or most, most)
        for name in ("connect", "read", "write", "pool")
    }


def watch(response: "httpx.Response") -> None:
    """Lets the body of an answer end if it is too slow."""
    response.stream = Watched(response.stream, response.request.url.path)


class Watched(httpx.SyncByteStream):
    """The body of an answer, which raises RunError if it is too slow. path: of its address."""

    def __init__(self, stream: "httpx.SyncByteStream", path: str):
        self.stream, self.path = stream, path

    def __iter__(self) -> Iterator[bytes]:
        since, received = time.monotonic(), 0
        for part in self.stream:
            received += len(part)
            seconds = time.monotonic() - since
            if seconds > SECONDS:
                if received < BYTES_PER_SECOND * seconds:
                    raise RunError(
                        f"{self.path[-200:]}: the Hub sent {received:,} bytes in {seconds:.0f} s; "
                        "try again later, or give a local folder or file"
                    )
                since, received = time.monotonic(), 0
            yield part

    def close(self) -> None:
        self.stream.close()


def check_names(response: "httpx.Response") -> None:
    """Raises RunError for a commit or an ETag that is no name: the cache makes paths of them."""
    values = [response.headers.get(name, "") for name in ("X-Repo-Commit", "X-Linked-Etag", "ETag")]
    if response.request.url.path.startswith("/api/") and response.is_success:
        response.read()
        try:
            about = json.loads(response.content or "null")
        except (ValueError, RecursionError):  # huggingface_hub reports it
            about = None
        if isinstance(about, dict):
            values.append(str(about.get("sha") or ""))
    for value in values:
        name = value.removeprefix("W/").strip('"')
        if re.search(r"[/\\\0]", name) or name in (".", ".."):
            raise RunError(
                f"{response.request.url.host} names a commit or a file {name[:80]!r}, which is a "
                "path; it is no Hugging Face Hub: correct HF_ENDPOINT"
            )


def check_content(paths: Iterable[Path]) -> None:
    """Raises RunError for a file of the Hub's cache that is not what the Hub has.

    The cache names the blob of a large file by its SHA-256, as the Hub does. One rank of a host
    reads the files, once after their download: see checksums.digest_of_file.
    """
    if environment_ranks()[2] != 0:
        return
    blobs = {path: blob.name for path in paths if (blob := blob_of(path))}
    with ThreadPoolExecutor() as pool:
        digests = dict(zip(blobs, pool.map(digest_of_file, blobs), strict=True))
    bad = [path.resolve() for path, name in blobs.items() if digests[path].hex() != name]
    if bad:
        raise RunError(
            f"{bad[0]} is not the file that the Hub has (its SHA-256 differs); remove it: the "
            "next run downloads it again"
        )
