"""Fake quantisation: the numbers of the int8 file, gradients through it, and accuracy won back."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from equipoise.compress.fake_layers import round_activation, weight_scale
from equipoise.compress.fake_quantize import attach
from equipoise.data.store import Rows, write_rows
from equipoise.errors import RecipeError
from equipoise.export.config import ExportConfig
from equipoise.export.export import export
from equipoise.quantize.calibrate import CalibrateConfig, calibrate
from equipoise.quantize.grids import weight_grid
from equipoise.quantize.module_ranges import ModuleRangesConfig, as_trained, module_ranges
from equipoise.quantize.quantize import QuantizeConfig, quantize
from equipoise.quantize.schemes import StaticInt8
from equipoise.quantize.static import _fitting_power
from equipoise.runtimes.protocol import SessionSettings
from equipoise.runtimes.registry import session_opener
from equipoise.sources.module_grids import (
    ActivationGrid,
    ModuleGrid,
    ModuleRanges,
    WeightForm,
    read_module_ranges,
)
from equipoise.sources.source import parse_source
from equipoise.sources.torch_model import NamedModule, load_module
from equipoise.spec import TensorSpec
from equipoise.targets.profile import Int8Scheme

MODULES = '''
import torch
from torch import nn

class Pair(nn.Module):
    """Convolutions and normalisations that are not registered in pairs, and a way around."""
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.second = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.norm1, self.norm2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.relu = nn.ReLU()
    def forward(self, x):
        y = self.norm2(self.second(self.relu(self.norm1(self.first(x)))))
        return self.relu(x + y)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.Hardswish())
        self.pair = Pair()
        self.plain = nn.Conv2d(6, 10, (1, 3))
        self.head = nn.Sequential(nn.Linear(10, 16), nn.GELU(), nn.Linear(16, 4, bias=False))
    def forward(self, x):
        x = torch.tanh(self.plain(self.pair(self.stem(x))))
        return self.head(x.mean((2, 3)))

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
    def forward(self, x):
        x = self.norm(x + self.down(torch.nn.functional.gelu(self.up(x))))
        return x + self.attention(x, x, x, need_weights=False)[0]

def random(module):
    torch.manual_seed(0)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.running_mean.normal_()
            child.running_var.uniform_(0.5, 2)
            nn.init.uniform_(child.weight, -1.5, 1.5)
            nn.init.normal_(child.bias)
    return module

def net():
    return random(Net())

def fresh():
    """Normalisations that are all alike and change almost nothing."""
    torch.manual_seed(0)
    return Net()

def tokens():
    return random(Tokens())
'''
SHAPES = {"net": (1, 3, 12, 12), "fresh": (1, 3, 12, 12), "tokens": (1, 5, 8)}
PLAIN = Int8Scheme(
    activation="uint8", weight="int8", per_channel=True, saturates=False, reason="a test", joins=()
)
SCHEMES = {
    "onnxruntime": PLAIN,
    "saturating": replace(PLAIN, saturates=True),
    "tensorrt": replace(
        PLAIN, activation="int8", symmetric=True, bias="float", quantize_outputs=False,
        absorbs_clips=False,
    ),
    "npu": replace(PLAIN, float_products=False, per_tensor=("MatMul",), activation="uint16"),
    "shifts": replace(PLAIN, activation="int8", symmetric=True, power_of_two=True),
    "tensor": replace(PLAIN, per_channel=False),
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """``(name, exporter) -> directory`` with model.onnx, statistics and rows; made once each."""
    folder = tmp_path_factory.mktemp("fake")
    (folder / "fake_nets.py").write_text(MODULES)
    made = {}

    def make(name, exporter="torchscript"):
        if (name, exporter) not in made:
            made[name, exporter] = _export(folder / f"{name}_{exporter}", name, exporter)
        return made[name, exporter]

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder))  # each exporter is a child process
        yield make


def _export(folder, name, exporter):
    import fake_nets

    folder.mkdir()
    save_file(getattr(fake_nets, name)().state_dict(), folder / "weights.safetensors")
    random = np.random.default_rng(2)
    rows = [{"x": random.normal(size=SHAPES[name]).astype("f")} for _ in range(8)]
    write_rows(folder / "rows", rows)
    config = ExportConfig(
        source=source_of(folder, name),
        samples=folder / "rows",
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", *SHAPES[name][1:])),),
        exporter=exporter,
        release=True,
    )
    export(config, output=folder)
    calibrate(CalibrateConfig(model=folder / "model.onnx", samples=folder / "rows"), output=folder)
    return folder


def source_of(folder, name):
    weights = folder / "weights.safetensors"
    return parse_source(f"module:fake_nets:{name}", weights=weights)


def simulated_and_real(folder, name, scheme, tmp_path):
    """``(what is attached, differences of the outputs)`` over the rows, relative to the largest."""
    quantization = QuantizeConfig(
        model=folder / "model.onnx", quantization=as_trained(StaticInt8(min_sqnr_db=-200.0)),
        scheme=scheme, samples=folder / "rows", statistics=folder,
    )  # fmt: skip
    quantize(quantization, output=tmp_path)
    file = tmp_path / "model.onnx"
    config = ModuleRangesConfig(
        model=folder / "model.onnx", scheme=scheme, samples=folder / "rows", quantized=file
    )
    module_ranges(config, output=tmp_path)
    module = load_module(source_of(folder, name))
    rows = Rows(folder / "rows")
    unoptimized = SessionSettings(threads=1, optimize="none")
    pairs = []
    attached = attach(module, read_module_ranges(tmp_path / "ranges.json"))
    with attached, session_opener("onnxruntime")(file, settings=unoptimized) as session:
        for row in [rows[index] for index in range(len(rows))]:
            real = next(iter(session.run(dict(row)).values()))
            with torch.no_grad():
                pairs.append((real, module(torch.from_numpy(row["x"])).numpy()))
        assert attached.unused() == ()
    real, simulated = (np.concatenate(each) for each in zip(*pairs, strict=True))
    return attached, np.abs(real - simulated) / np.abs(real).max()


def is_same(differences, *, tolerance=2e-6) -> bool:
    """Whether outputs agree but for rounding of float32.

    Sums in another order may put a value that lies between two steps on the other one, here and
    there; a grid, a bias or a fold that is not the file's is seen in every output.
    """
    return bool(np.quantile(differences, 0.85) < tolerance and differences.max() < 0.02)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_are_those_of_the_int8_file(exported, scheme, tmp_path) -> None:
    """As the file says it, without kernels that compute otherwise, up to rounding of float32."""
    folder = exported("net")
    attached, differences = simulated_and_real(folder, "net", SCHEMES[scheme], tmp_path)
    # One step of 16 bits is nearer to the rounding of float32, and crossed more often.
    assert is_same(differences, tolerance=5e-5 if scheme == "npu" else 2e-6)
    assert len(attached.modules) == 6
    assert attached.folded == {
        "stem.0": "stem.1", "pair.first": "pair.norm1", "pair.second": "pair.norm2",
    }  # fmt: skip
    assert attached.skipped == ()


@pytest.mark.parametrize(("name", "exporter"), [("net", "dynamo"), ("fresh", "torchscript")])
def test_normalisations_are_found_by_any_exporter(exported, name, exporter, tmp_path) -> None:
    """The one names folded weights after the norm, the other says nothing of it at all."""
    folder = exported(name, exporter)
    attached, differences = simulated_and_real(folder, name, PLAIN, tmp_path)
    assert is_same(differences)
    assert sorted(attached.folded.values()) == ["pair.norm1", "pair.norm2", "stem.1"]


@pytest.mark.slow
def test_attention_that_takes_weights_by_itself_is_named(exported, tmp_path) -> None:
    """What is not simulated is said; nothing is claimed of it."""
    folder = exported("tokens", "dynamo")
    attached, differences = simulated_and_real(folder, "tokens", PLAIN, tmp_path)
    assert attached.modules == ("up", "down")
    assert {one.name for one in attached.skipped} == {"attention", "attention.out_proj"}
    assert not is_same(differences)


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_an_encoder_of_transformers_is_simulated_whole(exporter, tmp_path) -> None:
    """All its products with weights, by the scheme of a real target, texts of any length."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, num_labels=5,
    )  # fmt: skip
    transformers.BertForTokenClassification(config).save_pretrained(tmp_path / "bert")
    random = np.random.default_rng(0)
    rows = [
        {"input_ids": random.integers(1, 100, (1, n)), "attention_mask": np.ones((1, n), np.int64)}
        for n in (4, 7, 9, 12)
    ]
    write_rows(tmp_path / "rows", rows)
    source = parse_source(str(tmp_path / "bert"))
    inputs = tuple(
        TensorSpec(name=name, dtype="int64", shape=("batch", "length")) for name in rows[0]
    )
    config = ExportConfig(
        source=source, samples=tmp_path / "rows", inputs=inputs, exporter=exporter, release=True
    )
    export(config, output=tmp_path)
    float_file = tmp_path / "model.onnx"
    calibrate(CalibrateConfig(model=float_file, samples=tmp_path / "rows"), output=tmp_path)
    scheme = replace(PLAIN, joins=Int8Scheme.joins)
    quantization = QuantizeConfig(
        model=float_file, quantization=as_trained(StaticInt8(min_sqnr_db=-200.0, tables="float")),
        scheme=scheme, samples=tmp_path / "rows", statistics=tmp_path,
    )  # fmt: skip
    (tmp_path / "int8").mkdir()
    quantize(quantization, output=tmp_path / "int8")
    file = tmp_path / "int8" / "model.onnx"
    wanted = ModuleRangesConfig(
        model=float_file, scheme=scheme, samples=tmp_path / "rows", quantized=file
    )
    module_ranges(wanted, output=tmp_path)
    module = load_module(source)
    named = NamedModule(module, names=list(rows[0]), source="bert")
    unoptimized = SessionSettings(threads=1, optimize="none")
    attached = attach(module, read_module_ranges(tmp_path / "ranges.json"))
    with attached, session_opener("onnxruntime")(file, settings=unoptimized) as session:
        assert len(attached.modules) == 13
        for row in rows:
            real, simulated = (next(iter(one(row).values())) for one in (session.run, named.run))
            assert is_same(np.abs(real - simulated) / np.abs(real).max())
        assert attached.unused() == ()
    assert attached.skipped == ()


# Modules by hand.


def grid(name="x", *, scale=0.05, zero=128, dtype="uint8"):
    return ActivationGrid(
        activation=name, scale=float(np.float32(scale)), zero_point=zero, low=0, high=255,
        dtype=dtype,
    )  # fmt: skip


def layer_grid(module, name, *, norm=None, **changes: object):
    """The grids of one layer of ``module``, as an export of it would give them."""
    layer = module.get_submodule(name)
    rows = layer.weight.detach().flatten(1)
    if norm is not None:
        rows = rows * (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach()[:, None]
    plain = ModuleGrid(
        node=f"node_{name}", module=name, input=grid(f"{name}.input"), weight=WeightForm(),
        largest=tuple(rows.abs().amax(1).tolist()),
    )  # fmt: skip
    return replace(plain, **changes)


def ranges_of(*grids: ModuleGrid):
    names = {g.input.activation: g.input.bounds for g in grids}
    return ModuleRanges(modules=grids, activations=names, skipped=(), model_sha256="")


@pytest.fixture
def small():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


@pytest.fixture
def both(small):
    return ranges_of(layer_grid(small, "0"), layer_grid(small, "2"))


def test_state_and_weights_stay_as_they_are(small, both) -> None:
    """While it is on, a checkpoint is that of the plain module."""
    before = copy.deepcopy(small.state_dict())
    x = torch.randn(4, 8)
    plain = small(x)
    with attach(small, both):
        assert not torch.equal(small(x), plain)
        assert list(small.state_dict()) == list(before)
        assert all(torch.equal(small.state_dict()[k], v) for k, v in before.items())
        assert [n for n, _ in small.named_parameters()] == list(before)
    assert torch.equal(small(x), plain)


def test_removing_twice_does_nothing_more(small, both) -> None:
    attached = attach(small, both)
    attached.remove()
    attached.remove()
    assert all("forward" not in m.__dict__ and not m._forward_pre_hooks for m in small.modules())


def test_a_failing_forward_leaves_the_weights_in_place(small, both) -> None:
    weight = small[0].weight
    with attach(small, both), pytest.raises(RuntimeError):
        small(torch.randn(4, 9))
    assert small[0].weight is weight


def test_a_deep_copy_computes_with_its_own_weights(small, both) -> None:
    """As a copy that is kept of the best weights would."""
    with attach(small, both):
        twin = copy.deepcopy(small)
        with torch.no_grad():
            twin[0].weight.mul_(2)
        x = torch.randn(4, 8)
        assert not torch.allclose(twin(x), small(x))
        twin(x).sum().backward()
    assert small[0].weight.grad is None
    assert twin[0].weight.grad is not None


def test_weights_are_rounded_anew_as_they_change(small, both) -> None:
    """The grid follows the weight: twice the weight is twice the output on one grid of inputs."""
    x = torch.randn(4, 8)
    layer = small[0]
    with attach(small, both), torch.no_grad():
        before = layer(x) - layer.bias
        layer.weight.mul_(2)
        assert torch.allclose(layer(x) - layer.bias, 2 * before, atol=1e-6)


def test_autocast_is_off_inside(small, both) -> None:
    """Eight bits of a grid do not fit into the eight bits of bfloat16."""
    x = torch.randn(4, 8)
    with attach(small, both), torch.no_grad():
        plain = small(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = small(x)
    assert torch.equal(plain, inside.float())


def test_gradients_pass_straight_through_within_the_grid() -> None:
    """One where a value is on the grid, none where it is cut off."""
    x = torch.tensor([-100.0, -1.03, 0.0, 2.2, 100.0], requires_grad=True)
    y = round_activation(x, grid(), scale=torch.tensor(0.05))
    assert torch.allclose(y, torch.tensor([-6.4, -1.05, 0.0, 2.2, 6.35]))
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_gradients_of_a_learned_scale_are_those_of_the_paper() -> None:
    """Equation 3 of Esser et al.: rounding error inside, the end of the grid outside."""
    scale = torch.tensor(0.05, requires_grad=True)
    x = torch.tensor([-100.0, 0.33, 0.36, 100.0])
    round_activation(x, grid(), scale=scale).sum().backward()
    inside = sum(round(v / 0.05) - v / 0.05 for v in (0.33, 0.36))
    assert scale.grad.item() == pytest.approx(-128 + inside + 127, abs=1e-4)


@pytest.mark.parametrize("bits", [4, 7, 8])
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_weight_scale_reaches_the_largest_weight(bits, per_channel) -> None:
    rows = torch.randn(5, 9)
    rows[2] = 0
    scale = weight_scale(rows, WeightForm(bits=bits, per_channel=per_channel))
    most = 2 ** (bits - 1) - 1
    if per_channel:
        assert scale[2] == 1
        reach = (rows.abs().amax(1) / most)[[0, 1, 3, 4]]
        assert torch.allclose(scale.flatten()[[0, 1, 3, 4]], reach)
    else:
        assert scale.item() == pytest.approx((rows.abs().max() / most).item())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), tail=st.floats(1, 40), bits=st.sampled_from([7, 8]),
    per_channel=st.booleans(),
)  # fmt: skip
def test_powers_of_two_are_those_that_quantising_picks(seed, tail, bits, per_channel) -> None:
    """The next above, or half of them where few large weights make that cheaper."""
    rows = np.random.default_rng(seed).normal(size=(4, 300)).astype(np.float32)
    rows[:, 0] *= np.float32(tail)
    reach = np.abs(rows).max(axis=1 if per_channel else None)
    axis = 0 if per_channel else None
    wanted = _fitting_power(weight_grid(reach, axis=axis, bits=bits, power_of_two=True), rows)
    form = WeightForm(bits=bits, per_channel=per_channel, power_of_two=True)
    found = weight_scale(torch.from_numpy(rows), form).flatten().numpy()
    assert np.array_equal(found, np.atleast_1d(wanted.scale))


def one_layer(**changes: object):
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(8, 5)).eval()
    return module, ranges_of(layer_grid(module, "0", **changes))


def test_an_integer_bias_is_rounded_to_the_grid_of_the_products() -> None:
    """Its scale is that of the input times that of each channel's weights."""
    module, ranges = one_layer(integer_bias=True, input=grid("x", scale=2.0))
    with attach(module, ranges), torch.no_grad():
        bias = module(torch.zeros(1, 8))[0]
    step = 2.0 * module[0].weight.detach().abs().amax(1) / 127
    assert torch.allclose(bias, (module[0].bias / step).round() * step, atol=1e-7)
    assert (bias - module[0].bias).abs().max() > 1e-4


def test_an_output_is_rounded_before_its_bias_where_the_file_does() -> None:
    """As targets have it that want integers out of every product."""
    output = grid("y", scale=0.25)
    x = torch.randn(6, 8)
    module, ranges = one_layer(output=output, output_before_bias=True)
    with attach(module, ranges), torch.no_grad():
        steps = (module(x) - module[0].bias) / 0.25
        assert torch.allclose(steps, steps.round(), atol=1e-5)
    module, ranges = one_layer(output=output)
    with attach(module, ranges), torch.no_grad():
        steps = module(x) / 0.25
        assert torch.allclose(steps, steps.round(), atol=1e-5)


class Normed(nn.Module):
    def __init__(self, norm) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, bias=False), norm

    def forward(self, x):
        return self.norm(self.conv(x))


class WithActivation(nn.BatchNorm2d):
    """A normalisation with an activation in it, as timm has them."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def stirred(norm):
    torch.manual_seed(4)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, WithActivation])
def test_a_folded_normalisation_keeps_its_statistics_and_learns_the_rest(kind) -> None:
    """In training mode too; its scale gets a gradient through the folded weight."""
    module = Normed(stirred(kind(6))).train()
    ranges = ranges_of(layer_grid(module, "conv", norm=module.norm))
    before = {k: v.clone() for k, v in module.norm.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    with attach(module, ranges) as attached:
        assert attached.folded == {"conv": "norm"}
        y = module(x)
        y.square().sum().backward()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(module.norm.state_dict()[name], before[name])
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    plain = module.eval()(x)
    assert 0 < (plain - y).abs().max() < 0.1 * plain.abs().max()


def test_with_an_activation_that_is_no_clip_the_order_is_kept() -> None:
    """SiLU comes after the rounding of what it reads."""
    module = Normed(stirred(WithActivation(6))).eval()
    output = grid("conv.output", scale=0.5)
    ranges = ranges_of(layer_grid(module, "conv", norm=module.norm, output=output))
    with attach(module, ranges), torch.no_grad():
        folded = module.conv(torch.randn(2, 3, 8, 8))
        assert torch.equal(folded, (folded / 0.5).round() * 0.5)
        assert torch.equal(module.norm(folded), nn.functional.silu(folded))


def test_learned_scales_are_held_apart_and_come_out_as_ranges(small, both) -> None:
    """The module's own state knows nothing of them; who shares a tensor shares a scale."""
    shared = replace(both.modules[1], input=both.modules[0].input)
    ranges = ranges_of(both.modules[0], shared)
    attached = attach(small, ranges, learn_scales=True)
    assert len(list(attached.scales.parameters())) == 1
    assert len(small.state_dict()) == 4
    optimizer = torch.optim.SGD(attached.scales.parameters(), lr=0.1)
    small(torch.randn(16, 8)).square().sum().backward()
    optimizer.step()
    learned = attached.ranges()
    name = both.modules[0].input.activation
    assert learned.modules[0].input.scale == learned.modules[1].input.scale
    assert learned.modules[0].input.scale != both.modules[0].input.scale
    assert learned.activations[name] == learned.modules[0].input.bounds
    attached.remove()
    with torch.no_grad():
        x = torch.randn(4, 8)
        with attach(small, learned):
            fixed = small(x)
        with attach(small, learned, learn_scales=True):
            assert torch.allclose(small(x), fixed, atol=1e-6)


def test_fixed_scales_stay(small, both) -> None:
    attached = attach(small, both)
    assert attached.scales is None
    assert attached.ranges() == both


def test_it_trains_under_distributed_data_parallel(small, both, tmp_path) -> None:
    """Every parameter gets its gradient, the learned scales beside the module included."""
    init = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=init, rank=0, world_size=1)
    try:
        attached = attach(small, both, learn_scales=True)
        held = nn.ModuleDict({"student": small, "scales": attached.scales})
        held.forward = small.forward
        parallel = nn.parallel.DistributedDataParallel(held)
        parallel(torch.randn(4, 8)).sum().backward()
        assert all(p.grad is not None for p in held.parameters())
        assert len(list(held.parameters())) == 6
    finally:
        torch.distributed.destroy_process_group()


def test_the_fused_encoder_layer_is_simulated_too() -> None:
    """In evaluation PyTorch would run it in one piece, with the float weights."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    ranges = ranges_of(layer_grid(encoder, "linear1"), layer_grid(encoder, "linear2"))
    x = torch.randn(1, 4, 8)
    with torch.no_grad():
        plain = encoder(x)
        with attach(encoder, ranges) as attached:
            assert attached.unused() == ("linear1", "linear2")
            assert not torch.equal(encoder(x), plain)
            assert attached.unused() == ()


def test_products_of_transformers_with_turned_weights_are_layers() -> None:
    """GPT-2 stores them as [inputs, outputs]."""
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    turned = nn.Sequential(pytorch_utils.Conv1D(12, 8)).eval()
    nn.init.normal_(turned[0].bias)
    plain = nn.Sequential(nn.Linear(8, 12)).eval()
    with torch.no_grad():
        plain[0].weight.copy_(turned[0].weight.t())
        plain[0].bias.copy_(turned[0].bias)
        x = torch.randn(3, 8)
        wanted = ranges_of(layer_grid(plain, "0", integer_bias=True))
        with attach(plain, wanted), attach(turned, wanted):
            assert torch.allclose(turned(x), plain(x), atol=1e-6)


# What cannot be.


def test_ranges_of_other_weights_are_refused(small, both) -> None:
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(1.5)
    with pytest.raises(RecipeError, match="not those that were exported"):
        attach(small, both)


def test_ranges_of_another_model_are_refused(both) -> None:
    with pytest.raises(RecipeError, match="nothing of this name"):
        attach(nn.ModuleDict({"other": nn.Linear(8, 12)}), both)


def test_layers_that_do_not_fit_are_named_beside_those_that_do(small, both) -> None:
    wrong = replace(both.modules[1], largest=(1.0, 2.0))
    relu = replace(both.modules[1], module="1", node="relu")
    with attach(small, ranges_of(both.modules[0], wrong, relu)) as attached:
        assert attached.modules == ("0",)
    reasons = {one.name: one.reason for one in attached.skipped}
    assert "not those that were exported" in reasons["2"]
    assert "no linear layer" in reasons["1"]


def test_two_at_a_time_are_refused(small, both) -> None:
    with attach(small, both), pytest.raises(RecipeError, match="already"):
        attach(small, both)


def test_powers_of_two_cannot_be_learned(small, both) -> None:
    shifts = replace(both.modules[0], weight=WeightForm(power_of_two=True))
    with pytest.raises(RecipeError, match="powers of two"):
        attach(small, ranges_of(shifts), learn_scales=True)


# Evidence.


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Linear(256, 10)

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv1(x)))
        return self.head(torch.relu(self.norm2(self.conv2(x))).flatten(1))


@pytest.fixture(scope="module")
def digits():
    """``(trained module, train inputs, train labels, test inputs, test labels)``."""
    datasets = pytest.importorskip("sklearn.datasets")
    loaded = datasets.load_digits()
    x = torch.from_numpy(loaded.images.astype(np.float32) / 16)[:, None]
    y = torch.from_numpy(loaded.target)
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    train, test = order[:1200], order[1200:]
    module = Digits().train()
    fit(module, x[train], y[train], steps=150, rate=5e-3)
    return module.eval(), x[train], y[train], x[test], y[test]


def fit(module, x, y, *, steps, rate) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=steps)
    for _ in range(steps):
        some = torch.randint(len(x), (64,))
        loss = nn.functional.cross_entropy(module(x[some]), y[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def accuracy(module, x, y) -> float:
    with torch.no_grad():
        return (module(x).argmax(1) == y).float().mean().item()


def digit_ranges(module, x):
    """Grids from the largest activations, with two bits for weights: three values each."""
    seen = {}
    names = ("conv1", "conv2", "head")
    hooks = [
        module.get_submodule(n).register_forward_pre_hook(
            lambda _, args, n=n: seen.update({n: args[0].max().item()})
        )
        for n in names
    ]
    with torch.no_grad():
        module(x)
    for hook in hooks:
        hook.remove()
    norms = {"conv1": module.norm1, "conv2": module.norm2}
    return ranges_of(
        *(
            layer_grid(
                module, n, norm=norms.get(n), weight=WeightForm(bits=2),
                input=grid(n, scale=seen[n] / 255, zero=0),
            )
            for n in names
        )
    )  # fmt: skip


@pytest.mark.parametrize("learn_scales", [False, True])
def test_a_few_hundred_steps_win_back_what_rounding_lost(digits, learn_scales) -> None:
    """Three values per weight cost tens of points; training under them brings them back."""
    trained, x, y, test_x, test_y = digits
    module = copy.deepcopy(trained)
    before = accuracy(module, test_x, test_y)
    ranges = digit_ranges(module, x)
    with attach(module, ranges, learn_scales=learn_scales) as attached:
        assert len(attached.modules) == 3
        rounded = accuracy(module, test_x, test_y)
        both = nn.ModuleList([module, *([attached.scales] if learn_scales else [])])
        both.forward = module.forward
        fit(both, x, y, steps=300, rate=3e-3)
        recovered = accuracy(module, test_x, test_y)
        learned = attached.ranges()
    assert before > 0.95
    assert rounded < before - 0.1
    assert recovered > before - 0.03
    with attach(module, with_weights_of(module, learned)):
        assert accuracy(module, test_x, test_y) == pytest.approx(recovered, abs=0.003)


def with_weights_of(module, ranges):
    """As ranges read off the export of what was trained."""
    norms = {"conv1": module.norm1, "conv2": module.norm2}
    return replace(
        ranges,
        modules=tuple(
            replace(m, largest=layer_grid(module, m.module, norm=norms.get(m.module)).largest)
            for m in ranges.modules
        ),
    )
