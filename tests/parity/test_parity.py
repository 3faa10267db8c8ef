"""Comparators and tolerances."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.errors import NonFiniteError, ParityError
from equipoise.parity.compare import Comparison, ParityMeter, require_finite
from equipoise.parity.tolerance import NOISE_FACTOR, check_parity, tolerances


def test_meter_gives_the_figures_of_numpy_over_all_samples() -> None:
    """Largest difference, SQNR, mean cosine and top-1 agreement, whatever the shapes."""
    generator = np.random.default_rng(0)
    references = [generator.normal(size=(1, n, 5)) for n in (3, 7)]
    outputs = [r + generator.normal(size=r.shape) * 0.01 for r in references]
    meter = ParityMeter("y")
    for reference, output in zip(references, outputs, strict=True):
        meter.add(reference, output)
    found = meter.result()
    r, o = (np.concatenate([a.ravel() for a in arrays]) for arrays in (references, outputs))
    assert found.max_abs == pytest.approx(np.abs(r - o).max())
    signal, noise = np.square(r).sum(), np.square(r - o).sum()
    assert found.sqnr_db == pytest.approx(10 * np.log10(signal / noise))
    assert found.cosine > 0.999
    assert found.top1_agreement == 1.0


def test_equal_outputs_have_no_noise_and_nan_has_nothing_else() -> None:
    """None stands for exact; NaN is as far away as a float can say."""
    same = np.ones((1, 3))
    exact, broken = ParityMeter("y"), ParityMeter("y")
    exact.add(same, same)
    assert exact.result().sqnr_db is None
    broken.add(same, same * np.nan)
    assert broken.result().max_abs > 1e30
    assert broken.result().cosine == 0.0


def test_shapes_and_names_have_to_agree() -> None:
    """A frozen dimension and a lost output are parity errors that name the output."""
    with pytest.raises(ParityError, match=r"'y' is float64\[1, 2\].*float64\[2, 2\]"):
        ParityMeter("y").add(np.ones((2, 2)), np.ones((1, 2)))
    with pytest.raises(ParityError, match="'y' of the reference"):
        Comparison().add({"y": np.ones(1)}, {"z": np.ones(1)})


def test_tolerance_comes_from_the_noise_floor() -> None:
    """32 floors, and never below a millionth of the largest value."""
    exact = [{"y": np.array([1.0, -100.0])}]
    single = [{"y": np.array([1.0, -100.001], dtype=np.float32)}]
    found = tolerances(single, exact)[0]
    assert found.floor == pytest.approx(0.001, rel=0.05)
    assert found.atol == pytest.approx(NOISE_FACTOR * found.floor)
    assert tolerances(exact, exact)[0].atol == pytest.approx(1e-4)
    meter = ParityMeter("y")
    meter.add(exact[0]["y"], exact[0]["y"] + 0.01)
    check_parity([meter.result()], [found], what="the engine")
    meter.add(exact[0]["y"], exact[0]["y"] + 1.0)
    with pytest.raises(ParityError, match=r"the engine: output 'y' differs.* by 1; allowed 0.03"):
        check_parity([meter.result()], [found], what="the engine")


def test_values_that_are_not_finite_are_counted() -> None:
    """The output, the sample and the share of bad values."""
    with pytest.raises(NonFiniteError, match="'y' of sample 3 has 1 of 2 values"):
        require_finite({"y": np.array([1.0, np.inf])}, sample=3, what="PyTorch")
    require_finite({"n": np.array([1, 2])}, sample=0, what="PyTorch")
