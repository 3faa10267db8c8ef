"""Losses of tasks agree with their formulas, and add up however samples are divided."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.compress.objective.task_losses import next_tokens, task_kind, task_loss
from equipoise.data.text import IGNORED
from equipoise.errors import DataError, UsageError

torch = pytest.importorskip("torch")


def draw(*shape: int, seed: int = 0):
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def surprise(scores, classes) -> np.ndarray:
    """Minus the logarithm of the softmax at ``classes``, in float64."""
    exact = scores.double().numpy()
    total = np.log(np.exp(exact).sum(-1))
    return total - np.take_along_axis(exact, np.asarray(classes)[..., None], -1)[..., 0]


@pytest.mark.parametrize(
    ("task", "dtype", "rank", "kind"),
    [
        ("sequence-classification", "int64", 0, "classification"),
        ("image-classification", "", 0, "classification"),
        ("sequence-classification", "float32", 0, "regression"),
        ("token-classification", "int64", 1, "token-classification"),
        ("fill-mask", "int64", 1, "token-classification"),
        ("causal-lm", "", 0, "causal-lm"),
        ("causal-lm", "int64", 1, "causal-lm"),
        ("encoder", "float32", 2, "embedding"),
        ("text-embedding", "", 0, "embedding"),
        ("", "int64", 0, "classification"),
        ("", "int64", 1, "token-classification"),
        ("", "float64", 0, "regression"),
    ],
)
def test_task_and_labels_say_what_is_computed(task, dtype, rank, kind) -> None:
    """A classifier with labels of floats is a regressor, as transformers has it."""
    assert task_kind(task, label_dtype=dtype, label_rank=rank) == kind


@pytest.mark.parametrize(
    ("task", "dtype", "error", "words"),
    [
        ("object-detection", "int64", UsageError, "a model for object-detection cannot be trained"),
        ("", "", UsageError, "nothing says what the model is for.*\n.*--task"),
        ("token-classification", "float32", DataError, "labels are float32.*whole numbers"),
        ("causal-lm", "float32", DataError, "labels are float32.*whole numbers"),
        ("text-embedding", "int64", DataError, "labels are int64.*floating-point vectors"),
    ],
)
def test_tasks_without_a_loss_are_refused(task, dtype, error, words) -> None:
    """And labels of another task."""
    with pytest.raises(error, match=words) as raised:
        task_kind(task, label_dtype=dtype, label_rank=0)
    assert error is DataError or raised.value.hint


def test_classification_is_the_cross_entropy_of_samples() -> None:
    """Summed, of the first output, whatever comes behind it."""
    scores, label = draw(5, 4), torch.tensor([0, 3, 1, 1, 2])
    outputs = {"logits": scores, "states": draw(5, 9)}
    total, count = task_loss("classification", outputs=outputs, batch={"label": label})
    assert total.item() == pytest.approx(surprise(scores, label).sum(), rel=1e-5)
    assert count.item() == 5


def test_tokens_without_a_label_do_not_count() -> None:
    """Special tokens, later pieces of words and padding."""
    scores, label = draw(2, 3, 4), torch.tensor([[0, IGNORED, 2], [IGNORED, IGNORED, 1]])
    total, count = task_loss(
        "token-classification", outputs={"logits": scores}, batch={"label": label}
    )
    expected = surprise(scores, label.clamp_min(0))[(label != IGNORED).numpy()].sum()
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert count.item() == 3


def test_a_batch_without_any_label_has_no_loss_and_a_gradient_of_zero() -> None:
    """Not NaN, which is what a mean would give."""
    scores = draw(1, 3, 4).requires_grad_()
    label = torch.full((1, 3), IGNORED)
    total, count = task_loss(
        "token-classification", outputs={"logits": scores}, batch={"label": label}
    )
    total.backward()
    assert (total.item(), count.item()) == (0, 0)
    assert not scores.grad.any()


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_regression_is_the_squared_error_of_samples(shape) -> None:
    """A label for a model of one output may have the axis of that output or not."""
    given, label = draw(6, 1), draw(6, seed=1)
    total, count = task_loss(
        "regression", outputs={"logits": given}, batch={"label": label.reshape(shape).double()}
    )
    assert total.item() == pytest.approx(float(((given[:, 0] - label) ** 2).sum()), rel=1e-5)
    assert count.item() == 6
    total, _ = task_loss("regression", outputs={"y": draw(2, 3)}, batch={"label": draw(2, 3)})
    assert total.item() == 0


def test_embeddings_are_compared_by_relative_error_at_real_positions() -> None:
    """0 for what is wanted, 1 for nothing, 4 for the opposite; padding does not count."""
    wanted = draw(2, 3, 5)
    given = torch.stack([wanted[0] * torch.tensor([[1.0], [0.0], [-1.0]]), wanted[1] * 7])
    batch = {"label": wanted, "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}
    total, count = task_loss("embedding", outputs={"y": given}, batch=batch)
    assert total.item() == pytest.approx(5)
    assert count.item() == 3
    total, _ = task_loss("embedding", outputs={"y": wanted[0] * 3}, batch={"label": wanted[0]})
    assert total.item() == pytest.approx(3 * 4)


def test_relative_error_of_equal_norms_is_twice_one_minus_cosine() -> None:
    """So it is the cosine, and keeps the scale besides."""
    a, b = (torch.nn.functional.normalize(draw(4, 8, seed=s), dim=-1) for s in (0, 1))
    total, _ = task_loss("embedding", outputs={"y": a}, batch={"label": b})
    assert total.item() == pytest.approx(float((2 - 2 * (a * b).sum(-1)).sum()), rel=1e-5)


def test_a_language_model_foretells_its_own_text() -> None:
    """Without labels: the token behind, where neither is padding on either side."""
    tokens = torch.tensor([[7, 8, 9, 0], [0, 5, 6, 7]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    expected = [[8, 9, IGNORED, IGNORED], [IGNORED, 6, 7, IGNORED]]
    assert next_tokens(tokens, mask=mask).tolist() == expected
    scores = draw(2, 4, 10)
    batch = {"input_ids": tokens, "attention_mask": mask}
    total, count = task_loss("causal-lm", outputs={"logits": scores}, batch=batch)
    given = {**batch, "label": torch.tensor(expected)}
    assert (total, count) == task_loss("causal-lm", outputs={"logits": scores}, batch=given)
    wanted = surprise(scores[[0, 0, 1, 1], [0, 1, 1, 2]], np.array([8, 9, 6, 7])).sum()
    assert total.item() == pytest.approx(wanted, rel=1e-5)
    assert count.item() == 4


def test_next_tokens_are_those_of_the_data_reader() -> None:
    """The reader of texts and the loss make the same labels of a text without padding."""
    from equipoise.data.text import next_tokens as of_rows

    tokens = torch.tensor([[3, 1, 2]])
    assert next_tokens(tokens)[0].tolist() == of_rows(tokens.numpy()).tolist()


def test_a_language_model_in_transformers_has_the_same_loss() -> None:
    """Its own loss of ``labels=input_ids`` is our sum over our count."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=20, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    theirs = model(input_ids=tokens, labels=tokens).loss
    outputs = {"logits": model(input_ids=tokens).logits}
    total, count = task_loss("causal-lm", outputs=outputs, batch={"input_ids": tokens})
    assert (total / count).item() == pytest.approx(theirs.item(), rel=1e-5)


def test_losses_of_half_precision_are_computed_in_float32() -> None:
    """A sum over thousands of tokens in bfloat16 would lose most of them."""
    scores, label = draw(4, 1000, 8).bfloat16(), torch.zeros(4, 1000, dtype=torch.int64)
    total, count = task_loss(
        "token-classification", outputs={"logits": scores}, batch={"label": label}
    )
    assert total.dtype == count.dtype == torch.float32
    assert total.item() == pytest.approx(surprise(scores, label).sum(), rel=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.integers(0, 8), st.sampled_from(["token-classification", "causal-lm"]))
def test_parts_of_a_batch_add_up_to_the_whole(samples: int, cut: int, kind) -> None:
    """Sums and counts, so that processes and accumulated parts change nothing."""
    scores = draw(samples, 4, 3, seed=samples)
    label = torch.randint(0, 3, (samples, 4), generator=torch.Generator().manual_seed(cut))
    label[label == 2] = IGNORED
    whole = task_loss(kind, outputs={"y": scores}, batch={"label": label})
    halves = [
        task_loss(kind, outputs={"y": scores[part]}, batch={"label": label[part]})
        for part in (slice(0, cut), slice(cut, None))
    ]
    for index in (0, 1):
        added = sum(half[index].item() for half in halves)
        assert added == pytest.approx(whole[index].item(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "output", "label", "words"),
    [
        ("classification", (2, 3), torch.tensor([0, 3]), "class 3 is not among its 3 classes"),
        ("classification", (2, 3), torch.tensor([0, -1]), "class -1 is not among"),
        ("classification", (2, 3), torch.tensor([0]), "2 decisions; the labels are .*int64"),
        ("classification", (2, 3), torch.tensor([0.0, 1.0]), "2 decisions; .*float32"),
        ("token-classification", (2, 4, 3), torch.tensor([0, 1]), "which makes 8 decisions"),
        ("regression", (2, 3), torch.zeros(2), r"'y' is \[2, 3\], the labels are \[2\]"),
        ("regression", (2, 1), torch.zeros(3, 1), r"the labels are \[3, 1\]"),
        ("embedding", (2, 5, 4), torch.zeros(2, 4), r"'y' is \[2, 5, 4\], the labels"),
    ],
)
def test_labels_that_do_not_fit_are_named(kind, output, label, words: str) -> None:
    """A class beyond the scores, another number, another dtype."""
    with pytest.raises(DataError, match=words):
        task_loss(kind, outputs={"y": draw(*output)}, batch={"label": label})


def test_missing_labels_say_what_to_do_instead() -> None:
    """A teacher needs none."""
    batch = {"pixel_values": draw(2, 3)}
    with pytest.raises(DataError, match="needs labels, and the data has pixel_values only") as told:
        task_loss("classification", outputs={"y": draw(2, 3)}, batch=batch)
    assert "set task to 0, logits to 1" in told.value.hint
