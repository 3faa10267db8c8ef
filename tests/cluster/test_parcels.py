"""Files that a config names: another machine finds the same under paths of its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from equipoise import record
from equipoise.cluster import parcels
from equipoise.cluster.parcels import pack, unpack
from equipoise.cluster.storage import Storage
from equipoise.content import tree_sha256
from equipoise.data.config import DataConfig
from equipoise.errors import IntegrityError, SourceError
from equipoise.stages import by_content


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    weights: Path
    name: str = "inner"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Paths in every place where a config may have them."""

    model: Path
    inner: Inner
    several: tuple[Path, ...] = ()
    named: dict[str, Path] = dataclasses.field(default_factory=dict)
    absent: Path | None = None
    text: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machines:
    """A driver's folder, a node's folder, and a storage between them."""

    driver: Path
    node: Path
    storage: Storage

    def sent(self, config: object) -> dict:
        """The JSON form of ``config`` as the node has it."""
        found = pack(config, storage=self.storage)
        other = Storage(self.storage.url)
        text = unpack(record.dumps(config), found, storage=other, inputs=self.node)
        return json.loads(text)


@pytest.fixture
def machines(tmp_path: Path) -> Machines:
    for name in ("driver", "node"):
        (tmp_path / name).mkdir()
    storage = Storage(str(tmp_path / "storage"))
    return Machines(driver=tmp_path / "driver", node=tmp_path / "node", storage=storage)


def write(path: Path, data: bytes = b"content") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_every_path_of_a_config_is_found_again(machines: Machines) -> None:
    """In fields, nested configs, tuples and dictionaries; the rest crosses unchanged."""
    files = [write(machines.driver / f"{n}.bin", bytes([n]) * 10) for n in range(5)]
    folder = write(machines.driver / "folder" / "deep" / "file").parent.parent
    config = Config(
        model=files[0],
        inner=Inner(weights=files[1]),
        several=(files[2], folder),
        named={"a": files[3], "0": files[4]},
        text=str(files[0]),
    )
    found = machines.sent(config)
    paths = [found["model"], found["inner"]["weights"], *found["several"], *found["named"].values()]
    assert all(Path(path).is_relative_to(machines.node) for path in paths)
    assert found["text"] == str(files[0]), "a text is a text"
    assert (found["absent"], found["inner"]["name"]) == (None, "inner")
    back = record.from_json(Config, found)
    assert by_content(back) == by_content(config), "the same key on both machines"
    assert Path(found["model"]).name == "0.bin", "suffixes matter to who opens it"
    assert (Path(found["several"][1]) / "deep" / "file").read_bytes() == b"content"


def test_nothing_of_the_driver_is_needed_any_more(machines: Machines) -> None:
    """The node's copies are its own, and it keeps them for the next stage."""
    model = write(machines.driver / "model.bin", b"model")
    config = Config(model=model, inner=Inner(weights=model))
    found = pack(config, storage=machines.storage)
    text = record.dumps(config)
    model.unlink()
    first = json.loads(unpack(text, found, storage=machines.storage, inputs=machines.node))
    for file in Path(machines.storage.url).iterdir():
        file.unlink()
    again = json.loads(unpack(text, found, storage=machines.storage, inputs=machines.node))
    assert first == again
    assert Path(again["model"]).read_bytes() == b"model"


@pytest.mark.parametrize("damage", ["change", "remove", "add"])
def test_a_damaged_copy_of_the_node_is_fetched_again(machines: Machines, damage: str) -> None:
    """It is looked at every time."""
    folder = write(machines.driver / "folder" / "file", b"right").parent
    config = Config(model=folder, inner=Inner(weights=folder))
    place = Path(machines.sent(config)["model"])
    match damage:
        case "change":
            (place / "file").write_bytes(b"wrong!")
        case "remove":
            (place / "file").unlink()
        case "add":
            (place / "extra").write_bytes(b"")
    assert Path(machines.sent(config)["model"]) == place
    assert tree_sha256(place) == tree_sha256(folder)


def test_a_damaged_storage_is_an_error_and_leaves_no_copy(machines: Machines) -> None:
    """Not a wrong result, and no half tree that the next stage would take."""
    folder = write(machines.driver / "folder" / "a", b"right").parent
    write(folder / "b", b"other")
    config = Config(model=folder, inner=Inner(weights=folder))
    found = pack(config, storage=machines.storage)
    damaged = Path(machines.storage.url) / found[0].files["b"]
    damaged.write_bytes(b"OTHER")
    with pytest.raises(IntegrityError, match="damaged"):
        unpack(record.dumps(config), found, storage=machines.storage, inputs=machines.node)
    assert [path for path in machines.node.iterdir() if path.is_dir()] == []


def test_a_path_with_nothing_there_crosses_as_it_is(machines: Machines) -> None:
    """The stage that opens it says what is missing."""
    config = Config(model=Path("none.bin"), inner=Inner(weights=Path("/none")))
    assert pack(config, storage=machines.storage) == ()
    assert machines.sent(config)["model"] == "none.bin"


def test_an_empty_directory_is_one_there_too(machines: Machines) -> None:
    """Nothing is fetched for it."""
    folder = machines.driver / "empty"
    folder.mkdir()
    assert Path(machines.sent(Config(model=folder, inner=Inner(weights=folder)))["model"]).is_dir()


def test_outputs_of_a_stage_go_together(machines: Machines) -> None:
    """An engine opens what its builder left beside it."""
    place = machines.driver / "build" / "key"
    write(place / "record.json", b"{}")
    model = write(place / "files" / "deep" / "model.bin", b"model")
    write(place / "files" / "engine.json", b"manifest")
    found = Path(machines.sent(Config(model=model, inner=Inner(weights=model)))["model"])
    assert found.read_bytes() == b"model"
    assert (found.parent.parent / "engine.json").read_bytes() == b"manifest"
    assert not (found.parent.parent / "record.json").exists()


def test_an_onnx_model_takes_its_external_data_along(machines: Machines) -> None:
    """And nothing else of its folder."""
    onnx = pytest.importorskip("onnx")
    path = external_model(machines.driver / "model.onnx")
    write(machines.driver / "unrelated.bin")
    found = Path(machines.sent(Config(model=path, inner=Inner(weights=path)))["model"])
    names = sorted(file.name for file in found.parent.rglob("*") if file.is_file())
    assert names == ["model.onnx", "weights.bin"]
    loaded = onnx.load(found)
    weights = onnx.numpy_helper.to_array(loaded.graph.initializer[0])
    assert (weights == np.arange(400, dtype=np.float32)).all()


def external_model(path: Path) -> Path:
    onnx = pytest.importorskip("onnx")
    weights = onnx.numpy_helper.from_array(np.arange(400, dtype=np.float32), "w")
    node = onnx.helper.make_node("Add", ["x", "w"], ["y"])
    specs = [onnx.helper.make_tensor_value_info(n, 1, [400]) for n in "xy"]
    graph = onnx.helper.make_graph([node], "g", specs[:1], specs[1:], [weights])
    model = onnx.helper.make_model(graph)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_external_data_that_are_missing_are_told_before_anything_is_sent(
    machines: Machines,
) -> None:
    """With the words of whoever opens such a model."""
    path = external_model(machines.driver / "model.onnx")
    (machines.driver / "weights.bin").unlink()
    with pytest.raises(SourceError, match="external data"):
        machines.sent(Config(model=path, inner=Inner(weights=path)))


def test_what_only_calls_itself_onnx_is_sent_as_a_file(machines: Machines) -> None:
    """The stage says what it thinks of it."""
    path = write(machines.driver / "model.onnx", b"\xff\xff no protobuf")
    found = machines.sent(Config(model=path, inner=Inner(weights=path)))
    assert Path(found["model"]).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("form", ["", "npz:"])
def test_the_data_that_a_user_typed_is_found_again(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Its text is what the data stage opens: relative to where the driver runs, with its form."""
    file = write(machines.driver / "data.npz", b"rows")
    monkeypatch.chdir(machines.driver)
    config = DataConfig(
        data=f"{form}data.npz", files=file, train=f"{form}data.npz", train_files=file
    )
    found = machines.sent(config)
    for name in ("data", "train"):
        assert found[name].startswith(form)
        assert Path(found[name].removeprefix(form)).read_bytes() == b"rows"
        assert Path(found[name].removeprefix(form)).is_relative_to(machines.node)
    assert found["files"] == found["data"].removeprefix(form)


def test_data_that_is_no_file_stays_as_it_is(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where a folder has its name."""
    (machines.driver / "digits").mkdir()
    monkeypatch.chdir(machines.driver)
    assert machines.sent(DataConfig(data="digits"))["data"] == "digits"


def test_a_parcel_for_a_key_that_the_config_does_not_have_is_an_error(machines: Machines) -> None:
    """Nothing is guessed."""
    model = write(machines.driver / "model.bin")
    config = Config(model=model, inner=Inner(weights=model))
    found = pack(config, storage=machines.storage)
    wrong = dataclasses.replace(found[0], at=("elsewhere", "model"))
    with pytest.raises(IntegrityError, match="elsewhere"):
        unpack(record.dumps(config), (wrong,), storage=machines.storage, inputs=machines.node)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(contents=st.lists(st.binary(max_size=50), min_size=1, max_size=5))
def test_any_files_have_the_same_key_on_both_machines(
    tmp_path_factory: pytest.TempPathFactory, contents: list[bytes]
) -> None:
    """Equal contents of different names, empty files, whatever."""
    folder = tmp_path_factory.mktemp("machines")
    files = tuple(write(folder / "driver" / str(n), data) for n, data in enumerate(contents))
    config = Config(model=files[0], inner=Inner(weights=files[-1]), several=files)
    storage = Storage(str(folder / "storage"))
    machines = Machines(driver=folder / "driver", node=folder / "node", storage=storage)
    assert by_content(record.from_json(Config, machines.sent(config))) == by_content(config)


def test_two_stages_of_a_node_fetch_the_same_once(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second finds it whole."""
    model = write(machines.driver / "model.bin")
    config = Config(model=model, inner=Inner(weights=model))
    machines.sent(config)
    monkeypatch.setattr(
        parcels.fs, "staged_directory", lambda _path: pytest.fail("it was fetched again")
    )
    machines.sent(config)
