"""The loop: what a plain PyTorch loop computes, however the work is divided."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equipoise.compress.batches import Samples, batches_of
from equipoise.compress.history import Evaluation, stale
from equipoise.compress.optimization import (
    build_optimizer,
    check_settings,
    rate,
    set_training_,
)
from equipoise.compress.settings import Objective, TrainSettings
from equipoise.compress.train import TrainConfig
from equipoise.data.store import Rows
from equipoise.errors import (
    DataError,
    IncompatibleError,
    NonFiniteError,
    RecipeError,
    ResourceError,
    SourceError,
    UsageError,
)
from equipoise.sources.source import Source, parse_source
from equipoise.sources.torch_model import load_module

TOLERANCE = 1e-4


def difference(one: Any, other: Any) -> float:
    """The largest difference of two loss curves, of every part too."""
    assert one.parts.keys() == other.parts.keys()
    curves = [(one.losses, other.losses), *((one.parts[n], other.parts[n]) for n in one.parts)]
    assert all(len(a) == len(b) for a, b in curves)
    return max(float(np.abs(np.subtract(a, b)).max()) for a, b in curves)


def plain_losses(config: TrainConfig) -> list[float]:
    """What PyTorch alone makes of the same batches: mean cross-entropy, AdamW, clipping."""
    import torch

    model, settings = load_module(config.student), config.settings
    inputs = config.data / "training"
    samples = Samples(inputs, names=config.names, labels=config.data / "training_labels")
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
    )
    order = [
        batch
        for epoch in range(math.ceil(settings.epochs))
        for batch in batches_of(samples.lengths, batch_size=16, seed=0, epoch=epoch)
    ]
    losses = []
    for step, indices in enumerate(order):
        batch = {name: torch.from_numpy(array) for name, array in samples.batch(indices).items()}
        logits = model(*(batch[name] for name in config.names))["logits"]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["label"].flatten(), ignore_index=-100
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps=len(order), settings=settings)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_losses_are_those_of_a_plain_loop(bench: Any) -> None:
    """Same batches, gradients, clipping, decay and schedule: the same numbers, and they fall."""
    config = bench.config(settings={"epochs": 6})
    found = bench.train(config)
    assert np.abs(np.subtract(found.losses, plain_losses(config))).max() < 1e-5
    assert found.losses[-1] < 0.5 * found.losses[0]
    assert (found.steps, found.epochs, found.samples) == (30, 6.0, 70)
    assert (found.stopped, found.resumed_at_step, found.processes) == ("finished", 0, 1)
    assert found.step_seconds > 0
    assert [e.step for e in found.evaluations] == list(range(0, 31, 5))


def test_the_best_student_is_what_is_written(bench: Any) -> None:
    """Opened as a source, it has the metric of the record on the validation samples."""
    found = bench.train(bench.config())
    source = parse_source(str(bench.folder / "out/model"), task="token-classification")
    module = load_module(source)
    import torch

    rows, labels = (Rows(bench.folder / "tagger" / p) for p in ("validation", "validation_labels"))
    right = counted = 0
    for row, label in zip(rows, labels, strict=True):
        with torch.no_grad():
            logits = module(*(torch.from_numpy(row[n]) for n in ("input_ids", "attention_mask")))
        guess, true = logits["logits"][0].argmax(-1).numpy(), label["label"]
        right += int((guess == true)[true != -100].sum())
        counted += int((true != -100).sum())
    assert found.best_metric == pytest.approx(right / counted, abs=1e-12)
    assert found.best_metric == max(e.metric for e in found.evaluations) > found.before_metric


@pytest.mark.parametrize("accumulate", [3, 16])
def test_accumulated_parts_learn_what_one_batch_does(bench: Any, accumulate: int) -> None:
    """Normalised by what counts in all parts; a last batch of 14 leaves some parts empty."""
    whole = bench.train(bench.taught())
    parts = bench.train(bench.taught(settings={"accumulate": accumulate}), place="parts")
    assert difference(whole, parts) < TOLERANCE
    assert set(whole.parts) == {"task", "logits"}


def test_an_objective_may_tell_its_counts(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a method ``counts`` no batch runs twice, and the numbers are the same."""
    import torch

    class Objectives(torch.nn.Module):
        forwards = 0

        def __init__(self, student: Any) -> None:
            super().__init__()
            self.student = student

        def counts(self, batch: dict[str, Any]) -> dict[str, Any]:
            return {"task": (batch["label"] != -100).sum().float()}

        def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
            Objectives.forwards += 1
            logits = self.student(batch["input_ids"], batch["attention_mask"])["logits"]
            total = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch["label"].flatten(), reduction="sum"
            )
            return {"task": (total, self.counts(batch)["task"])}

        def close(self) -> None:
            """Nothing is open."""

    whole = bench.train(bench.config())
    monkeypatch.setattr(
        "equipoise.compress.trainee.build_objectives", lambda student, **_: Objectives(student)
    )
    parts = bench.train(bench.config(settings={"accumulate": 2}), place="parts")
    assert difference(whole, parts) < TOLERANCE
    assert Objectives.forwards == 2 * whole.steps


@pytest.mark.usefixtures("on_cpu")
def test_two_processes_learn_what_one_does(bench: Any) -> None:
    """The same loss curve at the same global batch, each part of it, and the same metric."""
    one = bench.train(bench.taught())
    two = bench.train(bench.taught(processes=2), place="two")
    assert difference(one, two) < TOLERANCE
    assert two.processes == 2
    assert [e.metric for e in two.evaluations] == pytest.approx([e.metric for e in one.evaluations])
    for name, tensor in bench.weights().items():
        assert np.abs(tensor - bench.weights("two")[name]).max() < TOLERANCE, name


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (2, {"accumulate": 2}),
        (3, {"accumulate": 2, "batch_size": 7}),
        (2, {"shard": True}),
        (2, {"shard": True, "accumulate": 2}),
    ],
)
def test_any_division_learns_what_one_process_does(
    bench: Any, processes: int, settings: dict[str, Any]
) -> None:
    """Accumulated, sharded, shares that are empty: one loss curve, one model."""
    batch = {"batch_size": settings.get("batch_size", 16)}
    one = bench.train(bench.taught(settings=batch))
    many = bench.train(bench.taught(processes=processes, settings=settings), place="many")
    assert difference(one, many) < TOLERANCE
    for name, tensor in bench.weights().items():
        assert np.abs(tensor - bench.weights("many")[name]).max() < TOLERANCE, name


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
def test_a_transformer_learns_the_same_in_two_processes_sharded_or_not(bench: Any) -> None:
    """A BERT beside a teacher: task, logits, hidden states and attention; a plain directory."""
    transformers = pytest.importorskip("transformers")
    import torch

    for name, seed in (("student", 0), ("teacher", 1)):
        torch.manual_seed(seed)
        config = transformers.BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=16, num_labels=3,
        )  # fmt: skip
        transformers.BertForTokenClassification(config).save_pretrained(bench.folder / name)
    objective = Objective(task=1, logits=1, hidden=1, attention=1)
    config = bench.config(
        student=parse_source(str(bench.folder / "student")),
        teacher=parse_source(str(bench.folder / "teacher")),
        settings={"objective": objective},
    )
    one = bench.train(config)
    assert set(one.parts) == {"task", "logits", "hidden", "attention"}
    for place, shard in (("two", False), ("sharded", True)):
        settings = dataclasses.replace(config.settings, shard=shard)
        found = bench.train(
            dataclasses.replace(config, processes=2, settings=settings), place=place
        )
        assert difference(one, found) < TOLERANCE
    opened = transformers.BertForTokenClassification.from_pretrained(bench.folder / "sharded/model")
    for name, tensor in opened.state_dict().items():
        # It cancels out in the softmax: its gradient is rounding, which Adam scales up.
        if not name.endswith("key.bias"):
            assert np.abs(tensor.numpy() - bench.weights()[name]).max() < TOLERANCE, name


def test_batch_normalisation_trains_and_dropout_does_not(bench: Any) -> None:
    """Without dropout two trainings agree whatever the random numbers, and statistics move."""
    long = {"epochs": 8}
    found = bench.train(bench.config("pictures", settings=long))
    before = load_module(bench.source("pictures")).norm.running_mean.numpy()
    assert np.abs(bench.weights()["norm.running_mean"] - before).max() > 0.01
    assert found.best_metric > 0.7
    with_dropout = bench.train(
        bench.config("pictures", settings={"dropout": True, **long}), place="noise"
    )
    assert difference(found, with_dropout) > 0.01


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
def test_statistics_of_batch_normalisation_are_the_mean_of_all_processes(bench: Any) -> None:
    """One process and two see other shares, and come to near statistics; both learn."""
    settings = {"batch_size": 32, "epochs": 16}
    one = bench.train(bench.config("pictures", settings=settings))
    two = bench.train(bench.config("pictures", settings=settings, processes=2), place="two")
    assert two.best_metric > 0.7 < one.best_metric
    name = "norm.running_mean"
    assert np.abs(bench.weights()[name] - bench.weights("two")[name]).max() < 0.2


def test_dropout_is_drawn_anew_in_each_step_and_from_the_seed(bench: Any) -> None:
    """The same seed gives the same curve, another seed another."""
    config = bench.config("pictures", settings={"dropout": True, "learning_rate": 1e-9})
    first = bench.train(config)
    assert bench.train(config, place="again").losses == first.losses
    halves = first.losses[:5], first.losses[5:]
    assert np.abs(np.subtract(*halves)).min() > 1e-4


def test_patience_ends_training_and_the_best_is_kept(bench: Any) -> None:
    """A rate that learns nothing: two evaluations without a gain are enough."""
    settings = {"patience": 2, "epochs": 9, "learning_rate": 1e-12, "evaluate_every": 0.4}
    found = bench.train(bench.config(settings=settings))
    assert found.stopped == "early"
    assert [e.step for e in found.evaluations] == [0, 2, 4]
    assert found.steps == 4


def test_stale_counts_evaluations_since_the_metric_got_better() -> None:
    """Equal is not better."""
    metrics = [0.5, 0.6, 0.6, 0.5, 0.7]
    evaluations = [Evaluation(step=i, metric=m) for i, m in enumerate(metrics)]
    assert [stale(evaluations[:n]) for n in range(1, 6)] == [0, 0, 1, 2, 0]


def test_evaluations_are_heard(bench: Any) -> None:
    """At once, in the process that trains; an exception ends the run and keeps the checkpoint."""
    from equipoise.compress.train import train

    heard = []

    class EnoughError(BaseException):
        """Of the listener's own."""

    def listen(step: int, metric: float) -> None:
        heard.append((step, metric))
        if step == 5:
            raise EnoughError

    (bench.folder / "out").mkdir()
    with pytest.raises(EnoughError):
        train(bench.config(), output=bench.folder / "out", on_evaluation=listen)
    assert [step for step, _ in heard] == [0, 5]
    again = train(bench.config(), output=bench.folder / "out")
    assert again.resumed_at_step == 5
    assert [(e.step, e.metric) for e in again.evaluations[:2]] == heard


def test_unlabelled_data_is_learned_from_a_teacher(bench: Any) -> None:
    """The metric is the cosine with the teacher, and it rises."""
    for part in ("training", "validation"):
        (bench.folder / "tagger" / f"{part}_labels").rename(bench.folder / f"{part}_labels")
    settings = {"objective": Objective(task=0, logits=1)}
    found = bench.train(bench.taught(settings=settings, metric="cosine"))
    assert found.best_metric > found.before_metric
    assert set(found.parts) == {"logits"}
    with pytest.raises(DataError, match="metric accuracy needs labels"):
        bench.train(bench.taught(settings=settings), place="other")
    with pytest.raises(DataError, match="labels"):
        bench.train(bench.taught(metric="cosine"), place="third")


@pytest.mark.usefixtures("on_cpu")
def test_what_cannot_be_trained_is_refused(bench: Any) -> None:
    """Before anything is computed, each with what is wrong."""
    with pytest.raises(UsageError, match="compares with a teacher, and there is none"):
        bench.train(bench.config(metric="cosine"))
    with pytest.raises(RecipeError, match="no teacher"):
        bench.train(bench.config(settings={"objective": Objective(logits=1)}))
    with pytest.raises(IncompatibleError, match="float16 needs a GPU"):
        bench.train(bench.config(settings={"precision": "float16"}))
    with pytest.raises(
        UsageError, match="batch of 16 samples cannot be taken by 1 processes in 17"
    ):
        bench.train(bench.config(settings={"accumulate": 17}))
    fixed = Source(kind="onnx", name="model.onnx", path=bench.folder / "model.onnx")
    with pytest.raises(SourceError, match=r"model.onnx: .* cannot be trained"):
        bench.train(bench.config(student=fixed))
    with pytest.raises(SourceError, match=r"model.onnx: an ONNX file cannot teach here"):
        bench.train(bench.config(teacher=fixed))
    with pytest.raises(UsageError, match="processes is 0"):
        bench.train(bench.config(processes=0))
    with pytest.raises(DataError, match="no such file"):
        bench.train(bench.config(data=bench.folder / "nowhere"))


def test_another_division_by_the_launcher_is_refused(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``accelerate launch --use_fsdp`` would wrap the model in its own way."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="ACCELERATE_USE_FSDP is set"):
        bench.train(bench.config())


def test_bfloat16_learns_too_and_weights_stay_in_float32(bench: Any) -> None:
    """Its losses are near those of float32, and not the same."""
    exact = bench.train(bench.config())
    found = bench.train(bench.config(settings={"precision": "bfloat16"}), place="half")
    assert 1e-6 < difference(exact, found) < 0.1
    assert {t.dtype for t in bench.weights("half").values()} == {np.dtype(np.float32)}


def test_a_gpu_learns_what_the_cpu_does(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 the same, in half precision nearly; a teacher beside it."""
    if not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    objective = Objective(task=1, logits=1)
    found = {
        precision: bench.train(
            bench.taught(settings={"precision": precision, "objective": objective}),
            place=precision,
        )
        for precision in ("float32", "float16", "bfloat16")
    }
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    cpu = bench.train(bench.taught(settings={"objective": objective}), place="cpu")
    assert difference(cpu, found["float32"]) < 1e-3
    assert 1e-6 < difference(cpu, found["float16"]) < 0.1
    assert 1e-6 < difference(cpu, found["bfloat16"]) < 0.1
    assert found["float16"].best_metric == pytest.approx(cpu.best_metric, abs=0.03)


def test_quantisation_is_simulated_in_training_and_evaluation(bench: Any) -> None:
    """With two-bit weights the losses differ; what is written is the float model all the same."""
    from equipoise.sources.module_grids import (
        ActivationGrid,
        ModuleGrid,
        ModuleRanges,
        WeightForm,
        write_module_ranges,
    )

    weight = load_module(bench.source()).head.weight.detach()
    grid = ModuleGrid(
        node="head",
        module="head",
        input=ActivationGrid(
            activation="states", scale=0.1, zero_point=128, low=0, high=255, dtype="uint8"
        ),
        weight=WeightForm(bits=2),
        largest=tuple(weight.abs().amax(1).tolist()),
    )
    ranges = ModuleRanges(modules=(grid,), activations={}, skipped=(), model_sha256="")
    write_module_ranges(bench.folder / "ranges.json", ranges)
    plain = bench.train(bench.config())
    found = bench.train(bench.config(ranges=bench.folder / "ranges.json"), place="rounded")
    assert found.simulated
    assert not plain.simulated
    assert difference(plain, found) > 1e-3
    head = bench.weights("rounded")["head.weight"]
    assert head.dtype == np.float32
    assert len(np.unique(head)) > head.size // 2


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_diverging_run_stops_and_keeps_its_last_checkpoint(bench: Any, clip: float) -> None:
    """The error names step and part and the checkpoint, which is finite and stays."""
    import safetensors.torch

    settings = {
        "optimizer": "sgd", "learning_rate": 1e30, "clip": clip, "save_every": 1, "warmup": 0.0,
    }  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"training diverged: .* step") as caught:
        bench.train(bench.config(settings=settings))
    kept = list((bench.folder / "checkpoints-out").glob("*/step-*"))
    assert len(kept) == 1
    assert str(kept[0]) in caught.value.hint
    assert "learning rate below 1e+30" in caught.value.hint
    tensors = safetensors.torch.load_file(kept[0] / "model.safetensors")
    assert all(t.isfinite().all() for t in tensors.values())
    assert not (bench.folder / "out/model").exists()


def test_a_loss_that_is_not_finite_names_its_part_and_step(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single NaN among the counted values, in the third step."""
    from equipoise.compress import trainee

    built = trainee.build_objectives

    def poisoned(student: Any, **options: Any) -> Any:
        objectives, calls = built(student, **options), iter(range(100))
        forward = objectives.forward

        def call(batch: dict[str, Any]) -> dict[str, Any]:
            found = dict(forward(batch))
            if next(calls) == 2:
                found["task"] = (found["task"][0] * math.nan, found["task"][1])
            return found

        objectives.forward = call
        return objectives

    monkeypatch.setattr("equipoise.compress.trainee.build_objectives", poisoned)
    with pytest.raises(NonFiniteError, match="loss is nan at step 3, in its part 'task'"):
        bench.train(bench.config())


def test_memory_that_runs_out_is_told_with_what_to_try(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's error of a GPU becomes ours."""
    import torch

    def greedy(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("equipoise.compress.step.Stepper.step", greedy)
    with pytest.raises(ResourceError, match="out of memory at step 0") as caught:
        bench.train(bench.config())
    assert "accumulate" in caught.value.hint


# Rates, groups and modes


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_rate_rises_to_its_peak_and_falls(schedule: Any) -> None:
    """From above 0, linearly, to the peak at the end of the warm-up, and not below 0."""
    settings = TrainSettings(schedule=schedule, warmup=0.2, learning_rate=2.0)
    rates = [rate(step, steps=50, settings=settings) for step in range(50)]
    assert rates[10] == max(rates) == 2.0
    assert np.allclose(np.diff(rates[:11]), 2.0 / 11)
    assert min(rates) > 0
    assert rates[-1] == 2.0 if schedule == "constant" else rates[-1] < 0.1
    assert rates[30] == pytest.approx({"linear": 1.0, "cosine": 1.0, "constant": 2.0}[schedule])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_biases_and_norms_do_not_decay(bench: Any, optimizer: Any) -> None:
    """Every parameter is in one group, matrices in the one that decays."""
    module = bench.models.tagger()
    settings = TrainSettings(optimizer=optimizer, weight_decay=0.1)
    made = build_optimizer(module, settings=settings, fused=True)
    decays = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    for name, parameter in module.named_parameters():
        flat = name.endswith("bias") or "norm" in name
        assert decays[id(parameter)] == (0.0 if flat else 0.1), name


def test_without_dropout_all_but_batch_normalisation_is_as_in_evaluation() -> None:
    """Dropout of every kind is off; recurrent layers train, with no dropout between them."""
    import torch

    module = torch.nn.ModuleDict(
        {
            "dropout": torch.nn.Dropout(),
            "attention": torch.nn.MultiheadAttention(8, 2, dropout=0.5),
            "norm": torch.nn.BatchNorm1d(8),
            "recurrent": torch.nn.LSTM(8, 8, num_layers=2, dropout=0.5),
        }
    )
    set_training_(module, dropout=False)
    training = {name for name, part in module.named_modules() if part.training}
    assert training == {"norm", "recurrent"}
    assert module["recurrent"].dropout == 0
    set_training_(module, dropout=True)
    assert all(part.training for part in module.modules())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"epochs": 0.0}, "epochs is 0.0; it has to be more than 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"clip": -0.5}, "clip is -0.5"),
        ({"warmup": 1.5}, "warmup is 1.5"),
        ({"evaluate_every": math.inf}, "evaluate_every is inf"),
        ({"patience": -1}, "patience is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, Any], message: str) -> None:
    """Which one, its value and what is allowed."""
    with pytest.raises(UsageError, match=message):
        check_settings(TrainSettings(**changes))


# Evaluation


def test_padding_is_cut_off_before_the_metric_sees_it(bench: Any) -> None:
    """In batches of any size, in one process or shared, the metric is that of single samples."""
    import torch

    from equipoise.compress.evaluation import Validator
    from equipoise.data.metrics import get_metric

    module = load_module(bench.source())
    place = bench.folder / "tagger"
    names = ("input_ids", "attention_mask")
    samples = Samples(place / "validation", names=names, labels=place / "validation_labels")
    seen: list[int] = []

    def run(batch: dict[str, Any]) -> dict[str, Any]:
        seen.append(len(batch["input_ids"]))
        return module(batch["input_ids"], batch["attention_mask"])

    def value(batch_size: int, *, rank: int = 0, world: int = 1, totals: Any = None) -> float:
        validator = Validator(
            samples, metric=get_metric("macro-f1", labels=()), batch_size=batch_size, rank=rank,
            world=world, device=torch.device("cpu"), reference=None,
        )  # fmt: skip
        return validator.evaluate(run, summed=lambda t: t if totals is None else totals(t))

    single = value(1)
    assert value(8) == pytest.approx(single, abs=1e-12)
    assert max(seen) == 8
    parts: list[Any] = []
    for rank in range(3):
        value(8, rank=rank, world=3, totals=lambda t: parts.append(t) or t)
    together = get_metric("macro-f1", labels=()).value(torch.stack(parts).sum(0).numpy())
    assert float(together) == pytest.approx(single, abs=1e-12)


def test_without_a_mask_only_samples_of_one_shape_share_a_batch(tmp_path: Path) -> None:
    """A model that sees padding would give other outputs for it."""
    import torch

    from equipoise.compress.evaluation import Validator
    from equipoise.data.metrics import get_metric
    from equipoise.data.store import write_rows

    sizes = [3, 5, 3, 4, 5, 3]
    rows = [{"x": np.full((1, n), i, np.float32)} for i, n in enumerate(sizes)]
    write_rows(tmp_path / "x", rows)
    write_rows(tmp_path / "labels", [{"label": np.array(n % 2)} for n in sizes])
    shapes: list[tuple[int, ...]] = []

    def run(batch: dict[str, Any]) -> dict[str, Any]:
        shapes.append(tuple(batch["x"].shape))
        length = batch["x"].shape[1]
        return {"scores": torch.nn.functional.one_hot(torch.full((len(batch["x"]),), length % 2))}

    validator = Validator(
        Samples(tmp_path / "x", names=("x",), labels=tmp_path / "labels"),
        metric=get_metric("accuracy", labels=()), batch_size=4, rank=0, world=1,
        device=torch.device("cpu"), reference=None,
    )  # fmt: skip
    assert validator.evaluate(run, summed=lambda t: t) == 1.0
    assert sorted(shapes) == [(1, 4), (2, 5), (3, 3)]
