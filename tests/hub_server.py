"""A Hub of a few files on this machine: what huggingface_hub asks of one, over HTTP."""

import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from unittest.mock import patch

from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ANSWERS = {"deep": 5000 * "[" + 5000 * "]", "empty": "", "html": "<html>", "half": '{"sha": "0'}
# No answers, or none of files; a byte each 2 ms; zeros in the second half; a path as ETag; closed
# connections, redirects for ever, and one of ANSWERS to all requests.
MISHAPS = ("silent", "silent files", "drip", "zeros", "etag", "drop", "redirect", *ANSWERS)
LARGE = (".safetensors", ".parquet", "large.jsonl")  # files that the Hub knows by their SHA-256
DRIP = 1000  # bytes of a smaller body arrive at once
Repositories = dict[str, dict[str, bytes]]  # models/OWNER/NAME or datasets/... -> files


def tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
    """The entries of a folder of a repository; "" is its root."""
    start, entries = f"{folder}/" if folder else "", {}
    for name, body in files.items():
        rest = name.removeprefix(start)
        if name.startswith(start) and (recursive or "/" not in rest):
            oid = hashlib.sha1(body).hexdigest()
            entries[name] = {"type": "file", "path": name, "size": len(body), "oid": oid}
        elif name.startswith(start):
            path = start + rest.partition("/")[0]
            entries[path] = {"type": "directory", "path": path, "oid": "0"}
    return list(entries.values())


@contextmanager
def serving(
    repositories: Repositories, cache: Path, gated: str = "", mishap: str = "", commit: str = COMMIT
) -> Iterator[list[str]]:
    """Yields the list of the files that were fetched, each as OWNER/NAME@REVISION/PATH.

    gated: a repository whose files are refused, as to one who has not accepted its terms.
    mishap: one of MISHAPS. commit: which all revisions are.
    """
    fetched: list[str] = []
    ended = Event()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

        def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            size = len(body) + 9 * (mishap == "half")
            for name, value in {"Content-Length": str(size), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "GET":
                return
            if mishap == "drip" and len(body) > DRIP:
                for n in range(len(body)):
                    if ended.wait(0.002):
                        return
                    self.wfile.write(body[n : n + 1])
                    self.wfile.flush()
            self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            with suppress(ConnectionError):  # of a client that has given up
                self.do()

        def do(self) -> None:
            if mishap == "silent" or (mishap == "silent files" and "/resolve/" in self.path):
                ended.wait()
                return
            if mishap == "drop":
                return self.connection.close()
            if mishap == "redirect":
                return self.answer(b"", 302, Location=f"/{time.monotonic()}")
            if mishap in ANSWERS:
                return self.answer(ANSWERS[mishap].encode())
            path = self.path.partition("?")[0].replace("%2F", "/").lstrip("/")
            if found := re.fullmatch(r"api/((?:models|datasets)/[^/]+/[^/]+)(/revision/.*)?", path):
                files = repositories.get(found[1])
                names = [{"rfilename": name} for name in files or ()]
                body = {"id": found[1].partition("/")[2], "sha": commit, "siblings": names}
                if files is None:
                    return self.answer(b"", 404, X_Error_Code="RepoNotFound")
                return self.answer(json.dumps(body).encode(), Content_Type="application/json")
            if found := re.fullmatch(r"api/((?:models|datasets)/[^/]+/[^/]+)/tree/(.*)", path):
                if found[1] not in repositories:
                    return self.answer(b"", 404, X_Error_Code="RepoNotFound")
                folder = found[2].partition("/")[2].rstrip("/")
                recursive = "recursive=true" in self.path.lower()
                entries = tree(repositories[found[1]], folder, recursive)
                if not entries:
                    return self.answer(b"", 404, X_Error_Code="EntryNotFound")
                return self.answer(json.dumps(entries).encode(), Content_Type="application/json")
            path = path if path.startswith("datasets/") else f"models/{path}"
            repo, _, rest = path.partition("/resolve/")
            revision, _, name = rest.partition("/")
            if repo == gated:
                return self.answer(b"", 403, X_Error_Code="GatedRepo",
                    X_Error_Message="Access to it is restricted")  # fmt: skip
            if repo not in repositories:
                return self.answer(b"", 404, X_Error_Code="RepoNotFound")
            body = repositories[repo].get(name)
            if body is None:
                return self.answer(b"", 404, X_Error_Code="EntryNotFound")
            if self.command == "GET":
                fetched.append(f"{repo.partition('/')[2]}@{revision}/{name}")
            etag = hashlib.sha1(body).hexdigest()
            if name.endswith(LARGE):
                etag = hashlib.sha256(body).hexdigest()
                if mishap == "zeros":
                    body = body[: len(body) // 2] + bytes(len(body) - len(body) // 2)
            etag = "../../../escaped" if mishap == "etag" else etag
            self.answer(body, ETag=f'"{etag}"', X_Repo_Commit=commit)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    changes = {
        "ENDPOINT": place, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(cache),
        "HUGGINGFACE_CO_URL_TEMPLATE": place + "/{repo_id}/resolve/{revision}/{filename}",
    }  # fmt: skip
    try:
        with patch.multiple(constants, **changes):
            yield fetched
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
