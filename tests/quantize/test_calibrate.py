"""Calibration: exact statistics in one pass, ranges by every method, and what goes wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from onnx import TensorProto, helper, numpy_helper

from equipoise import fs, onnxio
from equipoise.data.store import Rows, write_rows
from equipoise.errors import DataError, InputError, IntegrityError, RecipeError, SourceError
from equipoise.quantize.accumulate import AccumulateSettings, Accumulator
from equipoise.quantize.calibrate import CalibrateConfig, calibrate
from equipoise.quantize.convergence import convergence
from equipoise.quantize.coverage import measure_coverage
from equipoise.quantize.histogram import Histogram, RunningHistogram
from equipoise.quantize.observe import ObserveSettings, observe_rows, observing
from equipoise.quantize.ranges import (
    ChosenRanges,
    Entropy,
    MinMax,
    MovingAverage,
    Mse,
    Percentile,
    choose_range,
    choose_ranges,
    data_sha256,
    expected_errors,
    load_ranges,
    save_ranges,
)
from equipoise.quantize.statistics import (
    MASK_MAGNITUDE,
    Statistics,
    TensorStatistics,
    read_statistics,
)
from equipoise.quantize.structure import load_structure

METHODS = (MinMax(), MovingAverage(), Percentile(), Entropy(), Mse())
GENERATOR = np.random.default_rng(4)
LOWEST = float(np.finfo(np.float32).min)

floats = st.floats(-1e8, 1e8, width=32, allow_subnormal=False)
samples = npst.arrays(
    np.float32, npst.array_shapes(min_dims=1, max_dims=4, max_side=5), elements=floats
)


def statistics_of(arrays, *, bins: int = 2048, histogram_values: int = 10**6) -> TensorStatistics:
    running = Accumulator(AccumulateSettings(bins=bins, histogram_values=histogram_values))
    for array in arrays:
        running.add(array)
    return running.statistics()


def counted(values: np.ndarray, *, bins: int = 2048) -> Histogram:
    running = RunningHistogram(bins)
    running.cover(float(values.min()), float(values.max()))
    running.add(values)
    return running.snapshot()


# Histograms


@settings(deadline=None)
@given(st.lists(samples, min_size=1, max_size=6), st.sampled_from([8, 64, 2048]))
def test_histogram_that_widened_is_numpy_s_on_its_grid(arrays, bins: int) -> None:
    """Every value lies in the bin that NumPy gives it, however often bins have merged."""
    running = RunningHistogram(bins)
    for array in arrays:
        running.cover(float(array.min()), float(array.max()))
        running.add(array.ravel())
    found = running.snapshot()
    values = np.concatenate([array.ravel() for array in arrays]).astype(np.float64)
    wanted = np.bincount(
        np.floor(values / found.width).astype(np.int64) - found.first, minlength=bins
    )
    np.testing.assert_array_equal(found.counts, wanted)
    assert found.edges[0] <= values.min()
    assert values.max() < found.edges[-1]


@settings(deadline=None)
@given(st.lists(samples, min_size=1, max_size=6), st.randoms())
def test_histogram_is_the_same_in_any_order_and_split(arrays, random) -> None:
    """What comes first does not matter, nor what comes together."""
    shuffled = [*arrays]
    random.shuffle(shuffled)
    one = statistics_of(arrays, bins=64).histogram
    two = statistics_of(shuffled, bins=64).histogram
    whole = counted(np.concatenate([array.ravel() for array in arrays]), bins=64)
    for other in (two, whole):
        assert (one.first, one.exponent) == (other.first, other.exponent)
        np.testing.assert_array_equal(one.counts, other.counts)


@settings(deadline=None)
@given(samples)
def test_folded_histogram_is_that_of_magnitudes(array) -> None:
    """Zero is an edge, so that both sides meet bin on bin; an edge itself may change sides."""
    histogram = counted(array.ravel(), bins=32)
    folded = histogram.folded()
    assert folded.total == histogram.total
    assert folded.edges[-1] >= np.abs(array).max() - histogram.width
    assert histogram.coarser(2).total == histogram.total


def test_a_grid_uses_at_least_half_of_its_bins() -> None:
    """Doubling wastes no more than that, for any spread."""
    for spread in (1e-6, 0.3, 1.0, 7.7, 12345.0):
        found = counted(np.linspace(-spread, 2 * spread, 5000, dtype=np.float32))
        assert np.count_nonzero(found.counts) >= 1024


# Accumulators


def test_statistics_are_numpy_s() -> None:
    """Extremes, for the tensor and for each channel."""
    arrays = [GENERATOR.normal(size=(n, 5, 4, 3)).astype(np.float32) + 2 for n in (1, 4, 2)]
    found, whole = statistics_of(arrays), np.concatenate(arrays).astype(np.float64)
    assert (found.low, found.high, found.count) == (whole.min(), whole.max(), whole.size)
    channels, axes = found.channels, (0, 2, 3)
    assert channels is not None
    assert channels.axis == 1
    np.testing.assert_array_equal(channels.low, whole.min(axis=axes))
    np.testing.assert_array_equal(channels.magnitude, np.abs(whole).max(axis=axes))


@pytest.mark.parametrize(
    ("shapes", "axis", "channels"),
    [
        ([(1, 7), (3, 7)], 1, 7),
        ([(1, 9, 6), (1, 4, 6)], 2, 6),
        ([(1, 6, 9, 2), (1, 6, 4, 4)], 1, 6),
        ([(2, 6), (2, 5)], None, 0),
        ([(4,), (4,)], None, 0),
        ([(), ()], None, 0),
        ([(0, 3), (2, 3)], 1, 3),
    ],
)
def test_channels_need_one_size(shapes, axis, channels) -> None:
    """Axis 1, and the last for sequences of tokens; none where its size changes."""
    arrays = [np.asarray(GENERATOR.normal(size=s), dtype=np.float32) for s in shapes]
    found = statistics_of(arrays)
    assert found.count == sum(array.size for array in arrays)
    assert (None if found.channels is None else found.channels.axis) == axis
    assert (0 if found.channels is None else len(found.channels.low)) == channels


@pytest.mark.parametrize("constant", [LOWEST, -1e9, -np.inf, np.inf, np.nan, MASK_MAGNITUDE])
def test_mask_constants_are_counted_apart(constant: float) -> None:
    """They stretch neither range nor histogram."""
    clean = GENERATOR.normal(size=(2, 4, 8)).astype(np.float32)
    masked = clean.copy()
    masked[:, ::2, 3:] = constant
    running = Accumulator(AccumulateSettings())
    running.add(masked)
    found = running.statistics()
    ordinary = masked[np.abs(masked) < MASK_MAGNITUDE]
    assert found.masked == masked.size - ordinary.size
    assert (found.low, found.high) == (ordinary.min(), ordinary.max())
    assert found.histogram.total == ordinary.size


def test_a_tensor_of_masks_alone_and_one_of_nothing_have_no_range() -> None:
    """(0, 0), and no warning of NumPy."""
    for arrays in ([np.full((2, 3), LOWEST, np.float32)], [np.zeros((0, 3), np.float32)], []):
        found = statistics_of(arrays)
        assert found.count == 0
        assert {choose_range(found, method) for method in METHODS} == {(0.0, 0.0)}


def test_the_share_for_the_histogram_visits_every_channel() -> None:
    """A stride that divides the number of channels would see the same few for ever."""
    array = np.zeros((1, 512, 384), dtype=np.float32)
    array[..., 7] = 50
    found = statistics_of([array], histogram_values=4096).histogram
    assert found.total <= 4096
    share = found.counts[found.edges[:-1] > 25].sum() / found.total
    assert share == pytest.approx(1 / 384, rel=0.2)


def test_moving_average_does_not_lean_towards_its_start() -> None:
    """Of equal samples it is their extremes, after one and after many."""
    for count in (1, 40):
        found = statistics_of([np.array([-2, 3], np.float32)] * count)
        assert (found.moving_low, found.moving_high) == pytest.approx((-2, 3))


# Methods


def some_statistics() -> dict[str, TensorStatistics]:
    """Of the kinds that networks make: bell, ReLU, GELU, one far outlier, shifted, constant."""
    bell = GENERATOR.normal(size=40_000).astype(np.float32)
    outlier = np.append(bell, np.float32(300)).astype(np.float32)
    kinds = {
        "bell": bell,
        "relu": np.maximum(bell, 0),
        "gelu": bell * (bell > -1) * np.clip(bell + 1, 0.02, 1),
        "outlier": outlier,
        "heavy": GENERATOR.standard_t(2.5, size=40_000).astype(np.float32),
        "shifted": bell * 0.01 + 5,
        "negative": -np.abs(bell),
        "constant": np.full(100, 3, dtype=np.float32),
        "zero": np.zeros(100, dtype=np.float32),
    }
    return {name: statistics_of([v.astype(np.float32)]) for name, v in kinds.items()}


KINDS = some_statistics()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.kind)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_every_range_holds_zero_and_lies_within_what_was_seen(method, symmetric, bits) -> None:
    """For every kind of tensor; a symmetric one is balanced."""
    full = choose_ranges(KINDS, MinMax(), symmetric=symmetric)
    for name, (low, high) in choose_ranges(KINDS, method, bits=bits, symmetric=symmetric).items():
        assert full[name][0] <= low <= 0 <= high <= full[name][1], name
        assert name == "zero" or low < high
        assert not symmetric or low == -high


def error(statistics: TensorStatistics, bounds, *, bits: int = 8) -> float:
    low, high = (np.array([end]) for end in bounds)
    return float(expected_errors(statistics.histogram, low, high, bits=bits)[0])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_is_never_worse_than_another_method(symmetric, bits) -> None:
    """On the histogram's own error; within the fineness of the search."""
    for name, statistics in KINDS.items():
        if name == "zero":
            continue
        plain = Mse(clipping_weight=1)
        chosen = choose_range(statistics, plain, bits=bits, symmetric=symmetric)
        best = error(statistics, chosen, bits=bits)
        for method in METHODS:
            other = choose_range(statistics, method, bits=bits, symmetric=symmetric)
            slack = 1.0 if method.kind == "minmax" else 1.05
            assert best <= error(statistics, other, bits=bits) * slack, (name, method.kind)


@settings(deadline=None)
@given(samples, st.sampled_from([2, 4, 8]))
def test_mse_is_never_worse_than_minmax(array, bits: int) -> None:
    """On any values at all."""
    found = statistics_of([array])
    full = choose_range(found, MinMax(), bits=bits)
    if full != (0.0, 0.0):
        best = choose_range(found, Mse(), bits=bits)
        assert error(found, best, bits=bits) <= error(found, full, bits=bits)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("bounds", [(-1.0, 1.5), (0.0, 2.0), (-4.0, 5.0), (-0.2, 0.1)])
def test_expected_error_is_that_of_quantising(bounds, bits: int) -> None:
    """The closed form agrees with rounding and clipping the values themselves."""
    values = GENERATOR.normal(size=200_000).astype(np.float32)
    step = (bounds[1] - bounds[0]) / (2**bits - 1)
    zero = np.rint(-bounds[0] / step)
    levels = np.clip(np.rint(values / step), -zero, 2**bits - 1 - zero)
    errors = np.square(levels * step - values)
    found = statistics_of([values])
    assert error(found, bounds, bits=bits) == pytest.approx(errors.mean(), rel=0.02)
    beyond = np.square(values - np.clip(values, *bounds))
    low, high = (np.array([end]) for end in bounds)
    (weighted,) = expected_errors(found.histogram, low, high, bits=bits, clipping_weight=5)
    assert weighted == pytest.approx(errors.mean() + 4 * beyond.mean(), rel=0.02)


@pytest.mark.parametrize("kind", ["bell", "heavy", "outlier", "gelu"])
def test_a_heavier_weight_cuts_less_off(kind: str) -> None:
    """Down to nothing; a weight below 1 is refused."""
    reach = [
        choose_range(KINDS[kind], Mse(clipping_weight=weight), bits=4)[1]
        for weight in (1, 10, 1000, 1e9)
    ]
    assert reach == sorted(reach)
    assert reach[-1] == pytest.approx(KINDS[kind].high, rel=0.05)
    with pytest.raises(RecipeError, match="clipping_weight is 0"):
        Mse(clipping_weight=0.5)


def test_mse_finds_the_best_clip_of_a_gaussian() -> None:
    """The tabulated optimum of a uniform quantiser with 16 levels: a step of 0.3352 sigma.

    Max, Quantizing for minimum distortion, IRE Trans. Inf. Theory 6, 1960, table II. His levels
    lie half a step beside ours, which hold zero.
    """
    low, high = choose_range(KINDS["bell"], Mse(clipping_weight=1), bits=4)
    assert (high - low) / 15 == pytest.approx(0.3352, rel=0.06)


def test_methods_do_what_they_promise() -> None:
    """An outlier is cut off, a short side is kept, a percentile is one."""
    bell, outlier = KINDS["bell"], KINDS["outlier"]
    assert choose_range(outlier, MinMax())[1] == 300
    for method in (Percentile(), Entropy()):
        assert choose_range(outlier, method, bits=4)[1] < 40, method.kind
    # One value at 300 among 40,000 holds more power than coarse rounding of the rest loses.
    assert choose_range(outlier, Mse())[1] > 250
    plain = Mse(clipping_weight=1)
    assert choose_range(KINDS["heavy"], plain, bits=4)[1] < 0.5 * KINDS["heavy"].high
    low, high = choose_range(KINDS["gelu"], Entropy())
    assert low == pytest.approx(KINDS["gelu"].low)
    assert high > 2
    low, high = choose_range(bell, Percentile(percent=95))
    assert (low, high) == pytest.approx((-1.96, 1.96), rel=0.05)
    low, high = choose_range(bell, Percentile(percent=95), symmetric=True)
    assert high == pytest.approx(1.96, rel=0.05)
    assert choose_range(KINDS["relu"], Entropy())[1] > 2


def test_impossible_settings_are_refused() -> None:
    """With the value and what is allowed."""
    with pytest.raises(RecipeError, match="percent is 40"):
        Percentile(percent=40)
    with pytest.raises(RecipeError, match="2 to 16 bits, not 32"):
        choose_range(KINDS["bell"], MinMax(), bits=32)


# Models


def save(path: Path, nodes, inputs, outputs, weights) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs],
        [
            numpy_helper.from_array(array.astype(np.float32), name)
            for name, array in weights.items()
        ],
    )
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two products with a logarithm between: ragged, with infinities, weights of 40 kB."""
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "w"], ["y"]),
        node("Relu", ["y"], ["r"]),
        node("Log", ["r"], ["z"]),
        node("MatMul", ["y", "v"], ["out"]),
    ]
    weights = {"w": GENERATOR.normal(size=(4, 100)), "v": GENERATOR.normal(size=(100, 100))}
    path = tmp_path_factory.mktemp("model") / "m.onnx"
    shapes = [("z", ["n", 100]), ("out", ["n", 100])]
    return save(path, nodes, [("x", ["n", 4])], shapes, weights)


def rows_of(folder: Path, count: int, *, scale: float = 1.0, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 9, size=count)
    write_rows(
        folder, [{"x": (random.normal(size=(n, 4)) * scale).astype(np.float32)} for n in sizes]
    )
    return folder


def test_ranges_are_those_of_numpy_over_ragged_samples(model: Path, tmp_path: Path) -> None:
    """Least and largest value of every activation; infinities are counted apart."""
    rows = rows_of(tmp_path / "rows", 50)
    record = calibrate(CalibrateConfig(model=model, samples=rows), output=tmp_path)
    found = read_statistics(tmp_path)
    x = np.concatenate([row["x"] for row in Rows(rows)])
    weights = onnxio.initializers(onnx.load(model))
    y = x @ numpy_helper.to_array(weights["w"])
    assert (record.samples, record.tensors, record.notes) == (50, 5, ())
    assert list(found.tensors) == ["x", "y", "r", "z", "out"]
    assert (found.tensors["x"].low, found.tensors["x"].high) == (x.min(), x.max())
    assert found.tensors["y"].low == pytest.approx(y.min(), rel=1e-5)
    assert found.tensors["z"].masked == np.sum(y <= 0)
    assert found.tensors["z"].high == pytest.approx(np.log(y[y > 0]).max(), rel=1e-4)
    channels = found.tensors["y"].channels
    assert channels is not None
    np.testing.assert_allclose(channels.high, y.max(axis=0), atol=1e-5)


def test_groups_of_tensors_give_the_same_as_all_at_once(model: Path, tmp_path: Path) -> None:
    """One tensor at a time, in a pass for each; half of the samples too."""
    rows = rows_of(tmp_path / "rows", 11)
    found = []
    for size in (1, 10**9):
        config = CalibrateConfig(model=model, samples=rows, group_bytes=size)
        calibrate(config, output=tmp_path / str(size))
        found.append(read_statistics(tmp_path / str(size)))
    assert [s.half_samples for s in found] == [5, 5]
    for part in ("tensors", "half"):
        one, two = (getattr(s, part) for s in found)
        assert choose_ranges(one, Mse()) == choose_ranges(two, Mse())
        for name in one:
            np.testing.assert_array_equal(one[name].histogram.counts, two[name].histogram.counts)


def test_only_what_was_asked_for_is_calibrated(model: Path, tmp_path: Path) -> None:
    """In the order of the graph; a name that does not exist is refused with the nearest."""
    rows = rows_of(tmp_path / "rows", 40)
    config = CalibrateConfig(model=model, samples=rows, tensors=("out", "x"))
    assert calibrate(config, output=tmp_path).tensors == 2
    assert list(read_statistics(tmp_path).tensors) == ["x", "out"]
    with pytest.raises(RecipeError, match=r"no float activation 'outt'[^?]*'out'\?"):
        calibrate(
            CalibrateConfig(model=model, samples=rows, tensors=("outt",)), output=tmp_path / "no"
        )
    assert not (tmp_path / "no").exists()


def test_poor_samples_are_said_in_words(model: Path, tmp_path: Path) -> None:
    """Few, all the same, and activations that never change."""
    few = calibrate(
        CalibrateConfig(model=model, samples=rows_of(tmp_path / "few", 3)), output=tmp_path
    )
    assert "3 calibration samples are few" in few.notes[0]
    write_rows(tmp_path / "same", [{"x": np.ones((2, 4), np.float32)}] * 40)
    same = calibrate(CalibrateConfig(model=model, samples=tmp_path / "same"), output=tmp_path)
    assert same.notes[0] == "all 40 calibration samples are the same"
    assert "1 of 5 activations have one value in all samples" in same.notes[1]


def test_what_cannot_be_calibrated_is_a_typed_error(model: Path, tmp_path: Path) -> None:
    """No model, no samples, samples that do not fit, no float activation."""
    rows = rows_of(tmp_path / "rows", 3)
    (tmp_path / "text.onnx").write_bytes(b"no model at all " * 9)
    for path in (tmp_path / "text.onnx", tmp_path / "none.onnx"):
        with pytest.raises(SourceError, match=path.name):
            calibrate(CalibrateConfig(model=path, samples=rows), output=tmp_path)
    with pytest.raises(DataError):
        calibrate(CalibrateConfig(model=model, samples=tmp_path / "none"), output=tmp_path)
    write_rows(tmp_path / "other", [{"a": np.ones((2, 4), np.float32)}])
    with pytest.raises(InputError, match="missing x"):
        calibrate(CalibrateConfig(model=model, samples=tmp_path / "other"), output=tmp_path)
    with pytest.raises(DataError, match=r"statistics\.npz"):
        read_statistics(tmp_path / "nowhere")
    (tmp_path / "statistics.npz").write_bytes(b"PK no archive")
    with pytest.raises(DataError, match=r"statistics\.npz"):
        read_statistics(tmp_path)


def test_structure_has_everything_but_large_weights(model: Path, tmp_path: Path) -> None:
    """It is the file that onnx reads, and truncated files are refused."""
    found, wanted = load_structure(model), onnx.load(model)
    large = [t for t in wanted.graph.initializer if t.ByteSize() > 4096]
    assert [t.name for t in large] == ["v"]
    large[0].ClearField("raw_data")
    assert found == wanted
    whole = model.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 3):
        (tmp_path / "short.onnx").write_bytes(whole[:length])
        with pytest.raises(SourceError, match="not a valid ONNX model"):
            load_structure(tmp_path / "short.onnx")


def test_a_file_is_observed_as_its_model_is(model: Path, tmp_path: Path) -> None:
    """The same values, from a file in one piece and from one with external data."""
    rows = Rows(rows_of(tmp_path / "rows", 4))
    external = tmp_path / "external.onnx"
    onnx.save_model(
        onnx.load(model), external, save_as_external_data=True, location="external.onnx.data",
        size_threshold=100,
    )  # fmt: skip
    names = ("x", "y", "out")
    with observing(onnx.load(model), names) as observe:
        wanted = [observe(row) for row in rows]
    for path in (model, external):
        found: list[dict[str, np.ndarray]] = [{} for _ in rows]
        observe_rows(
            path,
            rows,
            names=names,
            receive=lambda index, values, found=found: found[index].update(values),
            settings=ObserveSettings(group_bytes=1),
        )
        for one, two in zip(found, wanted, strict=True):
            assert list(one) == list(names)
            for name in names:
                np.testing.assert_array_equal(one[name], two[name])


# Were the samples enough, and the right ones


def test_convergence_tells_a_settled_range_from_one_that_moves(model: Path, tmp_path: Path) -> None:
    """Many samples of one kind are enough; a second half of another kind is not."""
    calibrate(
        CalibrateConfig(model=model, samples=rows_of(tmp_path / "many", 400), tensors=("y", "out")),
        output=tmp_path,
    )
    settled = convergence(read_statistics(tmp_path), Mse())
    assert settled.enough
    assert "from 200 to 400 calibration samples" in settled.sentence
    both = [*Rows(rows_of(tmp_path / "a", 40)), *Rows(rows_of(tmp_path / "b", 40, scale=5))]
    write_rows(tmp_path / "both", both)
    calibrate(CalibrateConfig(model=model, samples=tmp_path / "both"), output=tmp_path)
    moving = convergence(read_statistics(tmp_path), MinMax())
    assert not moving.enough
    assert list(moving.moved.values()) == sorted(moving.moved.values(), reverse=True)
    assert "more samples would change them" in moving.sentence


def test_one_sample_says_nothing_about_convergence(model: Path, tmp_path: Path) -> None:
    """In words, and not enough."""
    calibrate(CalibrateConfig(model=model, samples=rows_of(tmp_path / "r", 1)), output=tmp_path)
    found = convergence(read_statistics(tmp_path), MinMax())
    assert not found.enough
    assert "one calibration sample" in found.sentence


def test_coverage_tells_data_alike_from_data_unlike(model: Path, tmp_path: Path) -> None:
    """Other samples of one kind keep within; larger ones do not, and the share is counted."""
    rows = rows_of(tmp_path / "cal", 300)
    calibrate(CalibrateConfig(model=model, samples=rows), output=tmp_path)
    statistics = read_statistics(tmp_path)
    same = rows_of(tmp_path / "same", 50, seed=1)
    found = measure_coverage(model, same, statistics=statistics, settings=ObserveSettings())
    assert found.alike, found.sentence
    large = rows_of(tmp_path / "large", 50, scale=4, seed=2)
    found = measure_coverage(model, large, statistics=statistics, settings=ObserveSettings())
    assert not found.alike
    assert "unlike the calibration data" in found.sentence
    x = np.concatenate([row["x"] for row in Rows(large)])
    seen = statistics.tensors["x"]
    assert found.tensors["x"].outside == np.mean((x < seen.low) | (x > seen.high))
    assert found.tensors["x"].reach > 0.5
    shares = [tensor.outside for tensor in found.tensors.values()]
    assert shares == sorted(shares, reverse=True)
    with pytest.raises(RecipeError, match="no activation was calibrated"):
        measure_coverage(
            model,
            large,
            statistics=Statistics(tensors={}, half={}, samples=0, half_samples=0),
            settings=ObserveSettings(),
        )


# Ranges on disk


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.kind)
def test_saved_ranges_come_back_for_their_model_and_data_alone(
    method, model: Path, tmp_path: Path
) -> None:
    """Equal to the last bit; refused for another model, other data, or another file."""
    hashes = {
        "model_sha256": fs.sha256_file(model),
        "data_sha256": data_sha256(rows_of(tmp_path / "rows", 3)),
    }
    chosen = ChosenRanges(
        **hashes, method=method, bits=8, symmetric=False, ranges=choose_ranges(KINDS, method)
    )
    save_ranges(tmp_path / "r.json", chosen)
    assert load_ranges(tmp_path / "r.json", **hashes) == chosen
    other = data_sha256(rows_of(tmp_path / "rows", 4))
    with pytest.raises(IntegrityError, match="other calibration data"):
        load_ranges(tmp_path / "r.json", **{**hashes, "data_sha256": other})
    with pytest.raises(IntegrityError, match="another model"):
        load_ranges(tmp_path / "r.json", **{**hashes, "model_sha256": other})
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(DataError, match="missing key"):
        load_ranges(tmp_path / "r.json", **hashes)
