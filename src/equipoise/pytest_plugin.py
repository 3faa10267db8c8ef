"""The check as a fixture and as a marker of pytest, loaded through the entry point ``pytest11``.

    def test_engine(equipoise_parity):
        equipoise_parity("engine.onnx", against="model.onnx", data="data.npz", min_sqnr_db=30)

    @pytest.mark.equipoise_parity(engine="engine.onnx", against="model.onnx", data="data.npz")
    def test_engine_decides_alike(equipoise_record):
        assert equipoise_record.samples > 100

pytest imports this module at every start, used or not: it imports nothing but pytest, which is
there already.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from equipoise.checks.verdict import CheckRecord

MARKER: Final = "equipoise_parity"
_HELP: Final = (
    f"{MARKER}(engine=, against=, data=, ...): run the test only if the engine agrees with the"
    " model it was made from; the options are those of the fixture of the same name"
)


class ParityCheck:
    """What the fixture ``equipoise_parity`` is: called, it checks an engine."""

    def __call__(  # noqa: PLR0913 - a keyword for every option of the check
        self,
        engine: str | Path,
        *,
        against: str = "",
        data: str = "",
        weights: str | Path | None = None,
        task: str = "",
        samples: int | None = None,
        tokenizer: str | Path | None = None,
        labels: tuple[str, ...] = (),
        metric: str = "",
        atol: float | None = None,
        rtol: float | None = None,
        min_cosine: float | None = None,
        min_sqnr_db: float | None = None,
        max_flips: float | None = None,
        max_drop: float | None = None,
        locked: str | Path | None = None,
        threads: int | None = None,
        target: str = "cpu",
        cache: str | Path | None = None,
    ) -> CheckRecord:
        """Check an engine; end the test as failed, with the verdict, when it does not pass.

        Args:
            engine: A bundle, a directory of ``equipoise build``, or an ``.onnx`` file.
            against: The trained model; a bundle has reference outputs of its own.
            data: Evaluation data; a bundle has golden inputs of its own.
            weights: Weights of a factory or timm model.
            task: Head of a transformers model.
            samples: Only the first so many samples.
            tokenizer: ``tokenizer.json`` for texts.
            labels: Class names in index order.
            metric: Task metric, of labelled data.
            atol: Largest allowed difference.
            rtol: Allowed difference, as a part of the value itself.
            min_cosine: Smallest allowed cosine.
            min_sqnr_db: Smallest allowed signal over noise, in dB.
            max_flips: Largest allowed share of other decisions.
            max_drop: Largest allowed drop of the metric.
            locked: Lock to compare with.
            threads: Threads per operator; all usable cores when None.
            target: Name of the target.
            cache: Directory of stage results; the user's cache when None.

        Raises:
            EquipoiseError: It cannot be checked: a missing file, unfit data.
        """
        __tracebackhide__ = True
        from equipoise.checking import CheckRequest, run_check
        from equipoise.parity.limits import Limits

        request = CheckRequest(
            engines=(Path(engine),),
            against=against,
            data=data,
            weights=_path(weights),
            task=task,
            samples=samples,
            tokenizer=_path(tokenizer),
            labels=tuple(labels),
            metric=metric,
            limits=Limits(
                atol=atol,
                rtol=rtol,
                min_cosine=min_cosine,
                min_sqnr_db=min_sqnr_db,
                max_flips=max_flips,
                max_drop=max_drop,
            ),
            locked=_path(locked),
            threads=threads,
            target=target,
            cache=_path(cache),
        )
        found = run_check(request)
        if not found.passed:
            pytest.fail(found.verdict, pytrace=False)
        return found


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known, so that ``--strict-markers`` lets it through."""
    config.addinivalue_line("markers", _HELP)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let every test with the marker ask for the record, which is what runs the check."""
    for item in items:
        if item.get_closest_marker(MARKER) and isinstance(item, pytest.Function):
            _require_record(item)


def _require_record(item: pytest.Function) -> None:
    if "equipoise_record" not in item.fixturenames:
        item.fixturenames.append("equipoise_record")


@pytest.fixture
def equipoise_parity() -> ParityCheck:
    """A callable that checks an engine and fails the test with the verdict; see ParityCheck."""
    return ParityCheck()


@pytest.fixture
def equipoise_record(request: pytest.FixtureRequest) -> CheckRecord:
    """The record of the check that the marker ``equipoise_parity`` of this test asks for."""
    marker = request.node.get_closest_marker(MARKER)
    if marker is None:
        raise pytest.UsageError(
            f"{request.node.nodeid}: the fixture equipoise_record needs the marker {MARKER} with"
            " engine=, against= and data="
        )
    return ParityCheck()(*marker.args, **_known(marker, node=request.node.nodeid))


def _known(marker: pytest.Mark, *, node: str) -> dict[str, Any]:
    """The options of a marker. One that does not exist is an error before anything is checked."""
    try:
        inspect.signature(ParityCheck()).bind(*marker.args, **marker.kwargs)
    except TypeError as error:
        raise pytest.UsageError(f"{node}: marker {MARKER}: {error}") from error
    return dict(marker.kwargs)
