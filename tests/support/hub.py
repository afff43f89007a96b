"""A hub of one dataset on this machine, as much of it as huggingface_hub asks for; and its cache, as it leaves it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "1234567890abcdef1234567890abcdef12345678"


def cached_dataset(cache: Path, dataset: str, files: Mapping[str, str], revision: str = "main") -> None:
    """What a download leaves in the hub's cache."""
    folder = cache / f"datasets--{dataset.replace('/', '--')}"
    for name, content in {f"snapshots/{COMMIT}/{name}": text for name, text in files.items()}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / revision).write_text(COMMIT)


@contextmanager
def serving(dataset: str, files: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub with one dataset at revision main, and the files that have been fetched from it."""
    fetched: list[str] = []
    contents = {name: text.encode() for name, text in files.items()}
    tree = [
        {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        for name, content in contents.items()
    ]
    told = {
        f"/api/datasets/{dataset}/revision/main": {"id": dataset, "sha": COMMIT, "siblings": []},
        f"/api/datasets/{dataset}/revision/{COMMIT}": {
            "id": dataset, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files],
        },
        f"/api/datasets/{dataset}/tree/{COMMIT}": tree,
    }  # fmt: skip

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, format: str, *args: object) -> None:
            """No word on the terminal."""

        def _answer(self, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            name = path.removeprefix(f"/datasets/{dataset}/resolve/{COMMIT}/")
            body = json.dumps(told[path]).encode() if path in told else contents.get(name)
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.send_header("ETag", f'"{hashlib.sha1(body or b"").hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if with_body and body is not None:
                self.wfile.write(body)
                fetched.extend([name] if name in contents else [])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
