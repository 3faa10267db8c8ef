"""Golden vectors: what is written comes back, and a damaged file is refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from equipoise.bundle.golden import Golden, golden_bytes, read_golden
from equipoise.errors import IntegrityError

arrays = st.dictionaries(
    st.text("abz_/.0", min_size=1, max_size=8).filter(lambda n: not n.startswith(("/", "."))),
    hnp.arrays(
        st.sampled_from([np.float32, np.int64, np.uint8, np.bool_]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
    ),
    min_size=1,
    max_size=2,
)
vectors = st.lists(
    st.builds(
        Golden,
        inputs=arrays,
        outputs=st.dictionaries(st.sampled_from(["int8", "float"]), arrays),
        reference=arrays,
    ),
    min_size=1,
    max_size=12,
)


def same(left: Golden, right: Golden) -> bool:
    """Whether two samples hold equal arrays of equal types under equal names."""
    pairs = (
        (left.inputs, right.inputs),
        (left.reference, right.reference),
        *((left.outputs[n], right.outputs[n]) for n in left.outputs),
    )
    return left.outputs.keys() == right.outputs.keys() and all(
        a.keys() == b.keys()
        and all(
            a[n].dtype == b[n].dtype
            and np.array_equal(a[n], b[n], equal_nan=a[n].dtype.kind == "f")
            for n in a
        )
        for a, b in pairs
    )


@given(written=vectors)
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None
)
def test_vectors_come_back_in_order(tmp_path: Path, written: list[Golden]) -> None:
    """Names with slashes, as exporters give them, and more than ten samples included."""
    path = tmp_path / "golden.npz"
    path.write_bytes(golden_bytes(written))
    found = read_golden(path)
    assert len(found) == len(written)
    assert all(same(a, b) for a, b in zip(written, found, strict=True))


def _good() -> bytes:
    x = {"x": np.zeros((1, 4), dtype=np.float32)}
    return golden_bytes([Golden(inputs=x, outputs={"int8": x}, reference=x)])


def _npz(**values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **values)
    return buffer.getvalue()


def _zip_of_text() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("0/input/x.npy", b"no array")
    return buffer.getvalue()


def _compressed() -> bytes:
    """A kilobyte that is a gigabyte in memory, if anyone unpacks it."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{"0/input/x": np.zeros(1 << 20, np.uint8)})
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"noise" * 100, id="noise"),
        pytest.param(_good()[: len(_good()) // 2], id="cut"),
        pytest.param(_zip_of_text(), id="zip-of-text"),
        pytest.param(_npz(x=np.zeros(3)), id="other-keys"),
        pytest.param(_npz(**{"0/weights/x": np.zeros(3)}), id="other-part"),
        pytest.param(_npz(**{"a/input/x": np.zeros(3)}), id="no-index"),
        pytest.param(_npz(**{"01/input/x": np.zeros(3)}), id="index-of-another-form"),
        pytest.param(_npz(**{"5000/input/x": np.zeros(3)}), id="too-many"),
        pytest.param(_npz(**{"0/engine/x": np.zeros(3)}), id="no-engine"),
        pytest.param(_compressed(), id="compressed"),
        pytest.param(_npz(**{"0/input/x": np.array([{}], dtype=object)}), id="pickle"),
    ],
)
def test_a_file_that_is_none_is_an_integrity_error(tmp_path: Path, content: bytes) -> None:
    """It names the file; pickled objects are never opened."""
    path = tmp_path / "golden.npz"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"golden\.npz"):
        read_golden(path)


def test_one_array_in_the_place_of_an_archive_is_an_integrity_error(tmp_path: Path) -> None:
    """A ``.npy`` under the name of the ``.npz``."""
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    path = tmp_path / "golden.npz"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(IntegrityError, match=r"golden\.npz"):
        read_golden(path)


def test_a_missing_file_is_an_integrity_error(tmp_path: Path) -> None:
    """It names the file."""
    with pytest.raises(IntegrityError, match=r"golden\.npz"):
        read_golden(tmp_path / "golden.npz")


@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None
)
def test_a_flipped_bit_is_refused_or_harmless(tmp_path: Path, position: float, bit: int) -> None:
    """Nothing but an IntegrityError comes out of a damaged file."""
    content = bytearray(_good())
    content[int(position * len(content))] ^= 1 << bit
    path = tmp_path / "golden.npz"
    path.write_bytes(content)
    found: object = None
    try:
        found = read_golden(path)
    except IntegrityError as error:
        found = str(error)
    assert isinstance(found, tuple) or "golden.npz" in str(found)
