"""Student and teacher as one module: what learns, what is compared, and what does not fit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from equipoise.compress.objective.divergences import attention_divergence, map_divergence
from equipoise.compress.objective.objectives import PARTS, build_objectives
from equipoise.compress.objective.task_losses import relative_error, task_loss
from equipoise.compress.settings import Objective
from equipoise.data.text import IGNORED
from equipoise.errors import DataError, RecipeError, SourceError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = ("input_ids", "attention_mask")
NONE = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def seeded(make: Any) -> Any:
    """A model whose weights are the same in every run, in training mode without dropout."""
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def bert(*, width: int = 16, layers: int = 2, heads: int = 2, labels: int = 3, **more: Any) -> Any:
    """A tagger."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    config = transformers.BertConfig(
        **sizes, intermediate_size=24, vocab_size=50, num_labels=labels,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **more,
    )  # fmt: skip
    return seeded(lambda: transformers.BertForTokenClassification(config))


def distilbert(*, labels: int = 3) -> Any:
    config = transformers.DistilBertConfig(
        dim=8, n_layers=1, n_heads=4, hidden_dim=16, vocab_size=50, num_labels=labels
    )
    return seeded(lambda: transformers.DistilBertForTokenClassification(config))


def gpt2(*, width: int = 16, layers: int = 2, vocab: int = 50) -> Any:
    config = transformers.GPT2Config(
        n_embd=width, n_layer=layers, n_head=2, vocab_size=vocab, **NONE
    )
    return seeded(lambda: transformers.GPT2LMHeadModel(config))


def llama(*, layers: int, vocab: int = 50) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, vocab_size=vocab, **NONE,
    )  # fmt: skip
    return seeded(lambda: transformers.LlamaForCausalLM(config))


def vit(*, width: int = 16, layers: int = 2, patch: int = 8) -> Any:
    config = transformers.ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24,
        image_size=16, patch_size=patch, num_labels=4,
    )  # fmt: skip
    return seeded(lambda: transformers.ViTForImageClassification(config))


def resnet(*, width: int, kind: str = "basic") -> Any:
    config = transformers.ResNetConfig(
        embedding_size=width, hidden_sizes=[width, 2 * width], depths=[1, 1], layer_type=kind,
        num_labels=4,
    )  # fmt: skip
    return seeded(lambda: transformers.ResNetForImageClassification(config))


def texts(*, labelled: bool = True, classes: int = 3) -> dict[str, Any]:
    """Two texts, one of them padded; the labels count at some of the tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 50, (2, 7), generator=generator)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    label = torch.randint(0, classes, (2, 7), generator=generator)
    label[0, 0], label[1, 3:] = IGNORED, IGNORED
    batch = {"input_ids": tokens * mask, "attention_mask": mask}
    return {**batch, "label": label} if labelled else batch


def pictures(size: int = 16, *, samples: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(samples, 3, size, size, generator=generator)
    return {"pixel_values": pixels, "label": torch.arange(samples) % 4}


def build(student: Any, teacher: Any, batch: dict[str, Any], *, kind: Any, **parts: Any) -> Any:
    """Objectives of the parts with these weights."""
    layers = parts.pop("layers", None)
    return build_objectives(
        student,
        teacher=teacher,
        kind=kind,
        settings=Objective(**{"task": 0.0, **parts}),
        names=[name for name in batch if name != "label"],
        batch=batch,
        layers=layers,
    )


def loss_of(parts: dict[str, Any]) -> Any:
    return sum(total / count for total, count in parts.values())


ALL = {"task": 1.0, "logits": 1.0, "hidden": 1.0, "attention": 1.0}
PAIRS: dict[str, Any] = {
    "bert": (lambda: (bert(), bert(width=24, layers=5, heads=4)), texts, "token-classification"),
    "distilbert from bert": (lambda: (distilbert(), bert()), texts, "token-classification"),
    "gpt2": (lambda: (gpt2(width=8), gpt2(layers=4)), lambda: texts(labelled=False), "causal-lm"),
    "gpt2 from llama": (
        lambda: (gpt2(), llama(layers=3)), lambda: texts(labelled=False), "causal-lm"
    ),
    "vit": (lambda: (vit(width=8), vit(layers=3)), pictures, "classification"),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_every_part_teaches_the_student_and_nothing_else(name: str) -> None:
    """Gradients reach the student and the projections; the teacher has none and is not saved."""
    make, batch_of, kind = PAIRS[name]
    (student, teacher), batch = make(), batch_of()
    objectives = build(student, teacher, batch, kind=kind, **ALL)
    parts = objectives(batch)
    assert list(parts) == ["task", "logits", "hidden", "attention"]
    assert all(t.dtype == c.dtype == torch.float32 for t, c in parts.values())
    assert all(total > 0 and count > 0 for total, count in parts.values())
    loss_of(parts).backward()
    without = [n for n, p in objectives.named_parameters() if p.grad is None or not p.grad.any()]
    # No query changes when all keys are shifted, and padding has no gradient.
    assert all(name.endswith(("key.bias", "k_lin.bias", "k_proj.bias")) for name in without)
    assert all(p.grad is None for p in teacher.parameters())
    assert not teacher.training
    names = {n.partition(".")[0] for n, _ in objectives.named_parameters()}
    assert names <= {"student", "projections"}
    assert set(objectives.state_dict()) >= {f"student.{n}" for n in student.state_dict()}
    ids = {id(p) for p in objectives.parameters()}
    assert not ids & {id(p) for p in teacher.parameters()}


@pytest.mark.parametrize("part", PARTS[1:4])
def test_each_part_alone_makes_a_student_like_its_teacher(part: str) -> None:
    """A few steps on one batch bring it down, without any label."""
    batch = texts(labelled=False)
    student, teacher = bert(width=8), bert(width=16, layers=4)
    objectives = build(student, teacher, batch, kind="token-classification", **{part: 1.0})
    optimizer = torch.optim.Adam(objectives.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        parts = objectives(batch)
        assert list(parts) == [part]
        losses.append(loss_of(parts))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_a_copy_of_the_teacher_is_at_no_distance() -> None:
    """Every part is 0, and so is its gradient."""
    teacher, batch = bert(), texts()
    weights = {**ALL, "task": 0.0}
    parts = build(
        copy.deepcopy(teacher), teacher, batch, kind="token-classification", **weights
    )(batch)  # fmt: skip
    for total, _ in parts.values():
        assert total.item() == pytest.approx(0, abs=1e-4)


def test_logits_are_compared_where_labels_count() -> None:
    """Unlabelled texts give the same at all tokens as labels at all tokens would."""
    student, teacher, free = bert(), bert(width=24), texts(labelled=False)
    labelled = {**free, "label": torch.where(free["attention_mask"] == 1, 1, IGNORED)}
    found = []
    for batch in (free, labelled, texts()):
        objectives = build(student, teacher, batch, kind="token-classification", logits=1.0)
        found.append(objectives(batch)["logits"])
        objectives.close()
    assert found[0][1].item() == found[1][1].item() == 11
    assert found[0][0].item() == found[1][0].item() > 0
    assert found[2][1].item() == 9


@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
def test_labels_change_nothing_of_what_a_teacher_says(kind: Any) -> None:
    """The same number with labels and without."""
    if kind == "causal-lm":
        student, teacher, batch = gpt2(), gpt2(layers=3), texts(labelled=False)
        tokens = torch.where(batch["attention_mask"] == 1, batch["input_ids"], IGNORED)
        labelled = {**batch, "label": torch.cat([tokens[:, 1:], tokens[:, :1] * 0 + IGNORED], 1)}
    else:
        student, teacher, labelled = vit(width=8), vit(), pictures()
        batch = {"pixel_values": labelled["pixel_values"]}
    found = []
    for given in (batch, labelled):
        objectives = build(student, teacher, given, kind=kind, logits=1.0)
        found.append([value.item() for value in objectives(given)["logits"]])
        objectives.close()
    assert found[0] == found[1]


def test_logits_of_classes_are_the_formula() -> None:
    """T^2 KL(teacher || student), in NumPy, over the samples."""
    student, teacher, batch = vit(width=8), vit(), pictures()
    objectives = build(student, teacher, batch, kind="classification", logits=1.0, temperature=3.0)
    total, count = objectives(batch)["logits"]
    scores = [m.eval()(batch["pixel_values"]).logits.detach().double() / 3 for m in
              (student, teacher)]  # fmt: skip
    q, p = (torch.softmax(s, -1).numpy() for s in scores)
    assert total.item() == pytest.approx(9 * (p * np.log(p / q)).sum(), rel=1e-3)
    assert count.item() == 3


class Values(torch.nn.Module):
    """Three values of a vector, and vectors at positions with ``rank`` 3."""

    def __init__(self, *, rank: int = 2, outputs: int = 3) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, outputs)
        self.rank = rank

    def forward(self, x: Any, attention_mask: Any = None) -> Any:
        assert attention_mask is None or attention_mask.dtype == torch.int64
        return self.inner(x if self.rank == 3 else x[:, 0])


@pytest.mark.parametrize("kind", ["regression", "embedding"])
def test_outputs_of_values_are_compared_as_their_task_does(kind: Any) -> None:
    """As if the teacher's outputs were the labels; padding of embeddings does not count."""
    rank = 3 if kind == "embedding" else 2
    student, teacher = seeded(lambda: Values(rank=rank)), Values(rank=rank)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"x": torch.randn(2, 3, 4), "attention_mask": mask}
    found = build(student, teacher, batch, kind=kind, logits=1.0)(batch)["logits"]
    label = teacher(batch["x"]).detach()
    expected = task_loss(kind, outputs={"y": student(batch["x"])}, batch={**batch, "label": label})
    for one, other in zip(found, expected, strict=True):
        assert one.item() == pytest.approx(other.item(), rel=1e-5)
    assert found[1].item() == (3 if kind == "embedding" else 2)


def test_a_regressor_without_labels_learns_values() -> None:
    """Its task is called classification; among the probabilities of one class none differs."""
    student, teacher = seeded(lambda: Values(outputs=1)), Values(outputs=1)
    batch = {"x": torch.randn(2, 3, 4)}
    total, _ = build(student, teacher, batch, kind="classification", logits=1.0)(batch)["logits"]
    expected = ((student(batch["x"]) - teacher(batch["x"])) ** 2).sum()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_hidden_states_are_compared_at_real_tokens_of_evenly_spaced_layers() -> None:
    """Relative squared errors through the projections, in the open."""
    student, teacher, batch = bert(width=8), bert(layers=4), texts()
    objectives = build(student, teacher, batch, kind="token-classification", hidden=1.0)
    total, count = objectives(batch)["hidden"]
    inputs = {name: batch[name] for name in TEXT}
    ours = student(**inputs, output_hidden_states=True).hidden_states
    theirs = teacher(**inputs, output_hidden_states=True).hidden_states
    expected = torch.zeros(())
    for i, j in ((0, 0), (1, 2), (2, 4)):
        projected = objectives.projections[f"{i}_{j}"](ours[i])
        errors = relative_error(projected, theirs[j])
        expected = expected + errors[batch["attention_mask"] == 1].sum()
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)
    assert count.item() == 3 * 11


def test_padding_says_nothing_about_a_student() -> None:
    """Hidden states and attention with more padding are those with less."""
    student, teacher, batch = bert(width=8), bert(layers=4), texts()
    wider = {
        name: torch.nn.functional.pad(t, (0, 5), value=IGNORED if name == "label" else 0)
        for name, t in batch.items()
    }
    objectives = build(student, teacher, batch, kind="token-classification", **ALL)
    for one, other in zip(objectives(batch).values(), objectives(wider).values(), strict=True):
        assert one[0].item() == pytest.approx(other[0].item(), rel=1e-4)
        assert one[1].item() == other[1].item()


def test_layers_may_be_named() -> None:
    """Instead of evenly spaced ones; the input of the first layer has no attention map."""
    student, teacher, batch = bert(), bert(layers=4), texts()
    layers = [(0, 0), (2, 1)]
    parts = build(
        student, teacher, batch, kind="token-classification", hidden=1, attention=1, layers=layers
    )(batch)  # fmt: skip
    inputs = {name: batch[name] for name in TEXT}
    student.set_attn_implementation("eager")
    teacher.set_attn_implementation("eager")
    ours = student(**inputs, output_attentions=True).attentions
    theirs = teacher(**inputs, output_attentions=True).attentions
    expected = attention_divergence(ours[1], theirs[0], mask=batch["attention_mask"])
    assert parts["attention"][0].item() == pytest.approx(expected[0].item(), rel=1e-4)
    assert parts["hidden"][1].item() == 2 * 11
    with pytest.raises(RecipeError, match=r"layers 3 and 1 .* has 0 to 2, the teacher 0 to 4"):
        build(
            student, teacher, batch, kind="token-classification", hidden=1, layers=[(3, 1)]
        )  # fmt: skip


def test_widths_that_are_equal_need_no_projection() -> None:
    """So a student that begins as a copy begins at no distance."""
    objectives = build(bert(), bert(layers=4), texts(), kind="token-classification", hidden=1.0)
    assert not list(objectives.projections.parameters())


def test_projections_begin_the_same_in_every_process() -> None:
    """Whatever has been drawn before."""
    weights = []
    for _ in range(2):
        torch.rand(7)
        made = build(bert(width=8), bert(), texts(), kind="token-classification", hidden=1.0)
        weights.append(torch.cat([p.flatten() for p in made.projections.parameters()]))
    assert weights[0].numel() == 3 * 8 * 16
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


def resnet_maps(model: Any, pixels: Any) -> list[Any]:
    """Of 16 x 16, 8 x 8 and 4 x 4: behind the stem and both stages."""
    stem = model.resnet.embedder.embedder(pixels)
    return [stem, *model(pixels, output_hidden_states=True).hidden_states[1:]]


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_feature_maps_of_convolutional_networks_are_compared(kind: str) -> None:
    """At every size that both have, whatever their widths; the statistics of norms stay."""
    student, teacher = resnet(width=4), resnet(width=8, kind=kind)
    batch = pictures(32)
    before = copy.deepcopy(student.state_dict())
    objectives = build(student, teacher, batch, kind="classification", features=1.0)
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert student.training
    total, count = objectives(batch)["features"]
    total.backward()
    assert student.resnet.embedder.embedder.convolution.weight.grad.any()
    student.eval()
    ours, theirs = (resnet_maps(m, batch["pixel_values"]) for m in (student, teacher))
    expected = sum(map_divergence(a, b)[0].item() for a, b in zip(ours, theirs, strict=True))
    with torch.no_grad():
        again, count = objectives(batch)["features"]
    assert count.item() == 3 * 3
    assert again.item() == pytest.approx(expected, rel=1e-4)


def test_losses_are_float32_under_autocast() -> None:
    """The models compute in bfloat16, and the projections do not."""
    student, teacher, batch = bert(width=8), bert(), texts()
    objectives = build(student, teacher, batch, kind="token-classification", **ALL)
    exact = objectives(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = objectives(batch)
    for part in exact:
        assert half[part][0].dtype == torch.float32
        assert half[part][0].item() == pytest.approx(exact[part][0].item(), rel=0.1, abs=0.01)
        assert half[part][1].item() == exact[part][1].item()
    loss_of(half).backward()
    assert all(p.grad is not None for p in objectives.projections.parameters())


def test_accumulated_parts_are_the_whole_batch() -> None:
    """Sums of gradients over parts are the gradient of the sum."""
    student, teacher, batch = bert(width=8), bert(), texts()
    objectives = build(student, teacher, batch, kind="token-classification", **ALL)

    def gradients(pieces: list[slice]) -> Any:
        objectives.zero_grad()
        for piece in pieces:
            found = objectives({name: tensor[piece] for name, tensor in batch.items()})
            sum(total for total, _ in found.values()).backward()
        return {n: p.grad.clone() for n, p in objectives.named_parameters() if p.grad is not None}

    whole, parts = gradients([slice(None)]), gradients([slice(0, 1), slice(1, 2)])
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, parts[name], rtol=1e-3, atol=1e-5)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of one process."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_it_works_inside_of_distributed_data_parallel() -> None:
    """Hooks are on the modules, so a wrapper around all of them changes nothing."""
    batch = texts()
    objectives = build(bert(width=8), bert(), batch, kind="token-classification", **ALL)
    expected = {n: (t.item(), c.item()) for n, (t, c) in objectives(batch).items()}
    wrapped = torch.nn.parallel.DistributedDataParallel(objectives)
    for _ in range(2):
        found = wrapped(batch)
        assert {n: (t.item(), c.item()) for n, (t, c) in found.items()} == expected
        loss_of(found).backward()
    assert all(p.grad is not None for p in objectives.parameters())


def test_the_student_may_be_wrapped_afterwards() -> None:
    """As sharding does: the module that stands in its place is the one that runs."""
    batch = texts()
    objectives = build(bert(width=8), bert(), batch, kind="token-classification", **ALL)
    calls = []

    class Wrapper(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **inputs: Any) -> Any:
            calls.append(sorted(inputs))
            return self.inner(**inputs)

    expected = objectives(batch)["hidden"][0].item()
    objectives.student = Wrapper(objectives.student)
    assert objectives(batch)["hidden"][0].item() == expected
    assert calls == [sorted(TEXT)]


def test_closed_objectives_leave_the_models_as_they_were() -> None:
    """No hook, attention by the fused kernel, and the config that is saved."""
    student, teacher, batch = bert(width=8), bert(), texts()
    before = [str(m) + m.config.to_json_string() for m in (student, teacher)]
    objectives = build(student, teacher, batch, kind="token-classification", **ALL)
    assert student.config.to_json_string() in before[0]
    objectives(batch)
    objectives.close()
    assert [str(m) + m.config.to_json_string() for m in (student, teacher)] == before
    assert student.config._attn_implementation == teacher.config._attn_implementation == "sdpa"
    for model in (student, teacher):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_without_a_teacher_there_is_the_task_alone() -> None:
    """And a teacher that no part needs is not run."""
    student, batch = bert(), texts()
    for teacher in (None, bert(labels=9)):
        objectives = build(student, teacher, batch, kind="token-classification", task=1.0)
        parts = objectives(batch)
        assert list(parts) == ["task"]
        expected = task_loss(
            "token-classification",
            outputs={"logits": student(**{n: batch[n] for n in TEXT}).logits},
            batch=batch,
        )
        assert parts["task"][0].item() == pytest.approx(expected[0].item(), rel=1e-5)


ID2LABEL = {0: "O", 1: "B-PER", 2: "I-PER"}
MISFITS: dict[str, Any] = {
    "classes": (
        lambda: (bert(labels=7), bert(labels=9)), {"logits": 1.0},
        "teacher BertForTokenClassification has 9 classes, student BertForToken.* 7",
    ),
    "class names": (
        lambda: (bert(id2label={0: "O", 1: "I-PER", 2: "B-PER"}), bert(id2label=ID2LABEL)),
        {"logits": 1.0},
        "class 1 is 'B-PER' for teacher .*, and 'I-PER' for student",
    ),
    "vocabulary": (
        lambda: (gpt2(vocab=60), gpt2()), {"hidden": 1.0},
        "vocabulary of teacher GPT2LMHeadModel has 50 tokens, .* 60",
    ),
    "inputs": (
        lambda: (bert(), Values()), {"logits": 1.0},
        r"teacher Values: the data has inputs \['input_ids', .*forward takes \['x'",
    ),
    "no layers": (
        lambda: (bert(), Tagger()), {"hidden": 1.0},
        "Tagger has no hidden states",
    ),
    "no maps": (
        lambda: (bert(), Tagger()), {"attention": 1.0},
        "Tagger gives no attention maps",
    ),
    "no feature maps": (
        lambda: (bert(), bert()), {"features": 1.0},
        "have no feature maps of one spatial size: they are none and none",
    ),
    "broken": (
        lambda: (bert(max_position_embeddings=3), bert()), {"logits": 1.0},
        r"student BertForTokenClassification: forward failed on input_ids \[2, 7\]",
    ),
    "tensor": (
        lambda: (bert(), Tagger(flat=True)), {"logits": 1.0},
        r"output 'output' of teacher Tagger is \[2, 3\], output 'logits' of student .*\[2, 7, 3\]",
    ),
}  # fmt: skip


class Tagger(torch.nn.Module):
    """A tagger without transformer layers."""

    def __init__(self, *, flat: bool = False) -> None:
        super().__init__()
        self.table, self.flat = torch.nn.Embedding(50, 3), flat

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        scores = self.table(input_ids) * attention_mask[..., None]
        return scores.mean(1) if self.flat else scores


@pytest.mark.parametrize("name", MISFITS)
def test_models_that_do_not_fit_are_told_apart_before_training(name: str) -> None:
    """What differs, in numbers, and nothing is left behind on the models."""
    make, parts, words = MISFITS[name]
    student, teacher = make()
    with pytest.raises(SourceError, match=words) as told:
        build(student, teacher, texts(labelled=False), kind="token-classification", **parts)
    assert told.value.hint
    for model in (student, teacher):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert student.config._attn_implementation == "sdpa"


def test_pictures_cut_into_other_patches_are_other_positions() -> None:
    """Hidden states of 5 positions have no counterparts among 17."""
    with pytest.raises(SourceError, match=r"hidden states of teacher .* \[\(3, 17\)\].*\(3, 5\)"):
        build(vit(), vit(patch=4), pictures(), kind="classification", hidden=1.0)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"logits": 0.5}, "logits has weight 0.5, and there is no teacher"),
        ({}, "every part has weight 0"),
        ({"task": 1.0, "hidden": -1.0}, "hidden is -1.0; it has to be 0 or more"),
        ({"task": float("nan")}, "task is nan"),
        ({"task": 1.0, "temperature": 0.0}, "temperature is 0.0; it has to be more than 0"),
    ],
)
def test_objectives_that_make_no_sense_are_refused(parts: dict[str, float], words: str) -> None:
    """Before any model runs."""
    with pytest.raises(RecipeError, match=words):
        build(bert(), None, texts(), kind="token-classification", **parts)


def test_labels_are_looked_at_before_training() -> None:
    """Missing, and of classes that the student does not have."""
    with pytest.raises(DataError, match="task part of the loss needs labels"):
        build(bert(), None, texts(labelled=False), kind="token-classification", task=1.0)
    with pytest.raises(DataError, match="is not among its 3 classes"):
        build(bert(), None, texts(classes=40), kind="token-classification", task=1.0)
