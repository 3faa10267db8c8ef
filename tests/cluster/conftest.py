"""A cluster; and a storage of every kind: a path, fsspec's memory, and a real FTP server."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster.cluster_nodes import TARGET, Nodes, free_port


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


@pytest.fixture
def nodes(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Nodes]:
    """A head and a worker that compute, and a device."""
    for name in ("RAY_ADDRESS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    from equipoise.cluster.connection import label_of, load_ray

    load_ray()
    from ray.cluster_utils import Cluster

    found = Nodes(Cluster(), tmp_path_factory.mktemp("nodes"), {}, free_port())
    try:
        found.add("head", ray_client_server_port=found.client_port)
        found.add("worker")
        found.add("device", resources={label_of(TARGET): 1})
        yield found
    finally:
        found.cluster.shutdown()
