"""A storage of every kind: a path, fsspec's memory, and a real FTP server."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ftp_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a directory on an FTP server of this process."""
    authorizers = pytest.importorskip("pyftpdlib.authorizers")
    handlers = pytest.importorskip("pyftpdlib.handlers")
    servers = pytest.importorskip("pyftpdlib.servers")
    root = tmp_path_factory.mktemp("ftp")
    authorizer = authorizers.DummyAuthorizer()
    authorizer.add_user("user", "secret", str(root), perm="elradfmwMT")
    handler = type("Handler", (handlers.FTPHandler,), {"authorizer": authorizer})
    server = servers.ThreadedFTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"ftp://user:secret@127.0.0.1:{server.address[1]}"
    server.close_all()


@pytest.fixture(params=["path", "file", "memory", "ftp"])
def storage_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place for files."""
    name = uuid.uuid4().hex
    match request.param:
        case "path":
            return str(tmp_path / name)
        case "file":
            return f"file://{tmp_path / name}"
        case "memory":
            return f"memory://{name}"
    return f"{request.getfixturevalue('ftp_url')}/{name}"
