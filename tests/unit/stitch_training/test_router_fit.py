"""A fitted model sees one text as training saw many, and learns what can be learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from router_gateway.routing.learned.model import standardized
from stitch.errors import InvalidRequest
from stitch_training.labels import LabelledSet, read_labels
from stitch_training.router_classifier import learn_topics
from stitch_training.router_cross_validation import unseen_gains
from stitch_training.router_features import LEAST_TEXTS, learn_view, see, shared_buckets
from stitch_training.router_fit import LEAST_ROWS, Examples, common_topics, fit, gather
from tests.support.labelled_prompts import rows, write


def labelled(
    folder: Path, name: str = "made", seed: int = 0, routes: tuple[str, ...] = ("weak", "strong")
) -> LabelledSet:
    return read_labels(write(folder / f"{name}.jsonl", rows(seed=seed, routes=routes)), routes)


@pytest.fixture
def made(tmp_path: Path) -> LabelledSet:
    return labelled(tmp_path)


def test_words_of_one_text_alone_are_left_out() -> None:
    texts = see(["common rare", "common other"])
    [kept] = shared_buckets(texts).tolist()
    assert LEAST_TEXTS == 2
    assert (texts.frequencies[:, [kept]].toarray() == 1).all()


def test_every_text_has_length_one_and_the_surface_is_standard() -> None:
    texts = see(["a b a", "a b", "b a c and 3 more", ""])
    view = learn_view(texts, shared_buckets(texts))
    lengths = np.sqrt(view.words(texts).power(2).sum(axis=1))
    assert lengths.tolist() == pytest.approx([1, 1, 1, 0])
    assert view.surface(texts).mean(axis=0) == pytest.approx(0, abs=1e-5)


def test_a_view_weighs_a_text_as_the_model_does(made: LabelledSet) -> None:
    examples = gather([made])
    model = fit(examples)
    view = learn_view(examples.texts, model.buckets)
    words = view.words(examples.texts).toarray()
    for row in (0, 7, 31):
        by_hand = words[row] @ (model.weights.astype(np.float32) / view.idf[:, None])
        assert model._words(made.prompts[row]) == pytest.approx(by_hand, abs=1e-3)
        seen = standardized(examples.texts.surface[row], model.surface_mean[1], model.surface_scale[1])
        assert seen == pytest.approx(view.surface(examples.texts)[row], abs=1e-5)


def test_hard_prompts_that_were_never_seen_gain_more(made: LabelledSet) -> None:
    model = fit(gather([made]))
    hard, easy = model.gains("derive the theorem of it"), model.gains("hello and music for holiday")
    assert hard[1] > easy[1] + 0.2
    assert hard[0] == easy[0] == 0


def test_unseen_gains_rank_hard_prompts_first(made: LabelledSet) -> None:
    done: list[int] = []
    gains = unseen_gains(gather([made]), made.prompts, 3, done.append)
    hard = np.array([topic.endswith("hard") for topic in made.topics])
    assert np.median(gains[hard, 1]) > np.quantile(gains[~hard, 1], 0.9)
    assert done == [1, 2, 3]


def test_a_gain_does_not_know_its_own_label(made: LabelledSet) -> None:
    before = unseen_gains(gather([made]), made.prompts, 3)
    others = gather([made])
    turned = Examples(**{**vars(others), "qualities": others.qualities.copy()})
    turned.qualities[5] = 1 - turned.qualities[5]
    # The row's own fold was fitted without it.
    assert unseen_gains(turned, made.prompts, 3)[5].tolist() == before[5].tolist()


def test_sets_that_disagree_keep_their_own_experts(tmp_path: Path) -> None:
    first = labelled(tmp_path, "first")
    turned = [
        {
            **row,
            "prompt": f"Q: {row['prompt']}\nA:",
            "routes": {"weak": row["routes"]["strong"], "strong": row["routes"]["weak"]},
        }
        for row in rows(seed=1)
    ]
    second = read_labels(write(tmp_path / "second.jsonl", turned))
    model = fit(gather([first, second]))
    assert model.sources == ("first", "second")
    assert model.gains("prove the theorem 3?")[1] > 0.2
    assert model.gains("Q: prove the theorem 3?\nA:")[1] < -0.2


def test_a_ladder_of_three_gains_rung_by_rung(tmp_path: Path) -> None:
    routes = ("small", "middle", "large")
    found = labelled(tmp_path, routes=routes)
    gains = fit(gather([found])).gains("prove the matrix theorem")
    assert 0 < gains[1] < gains[2]


def test_two_files_of_one_name_are_refused(made: LabelledSet) -> None:
    with pytest.raises(InvalidRequest, match="name of its own"):
        gather([made, made])


def test_rare_tasks_count_as_their_source() -> None:
    topics = ["set/often"] * LEAST_ROWS + ["set/once"]
    assert common_topics(topics) == ["set/often"] * LEAST_ROWS + ["set"]


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_classes_are_told_apart_in_texts_that_the_classifier_has_not_seen(classes: int) -> None:
    words = ["cat", "dog", "bird"][:classes]
    labels = [words[row % classes] for row in range(60)]
    texts = see([f"the {label} number {row} runs" for row, label in enumerate(labels)])
    view = learn_view(texts, shared_buckets(texts))
    classifier, posterior = learn_topics(view.words(texts), view.surface(texts), labels)
    assert posterior.sum(axis=1) == pytest.approx(1)
    assert [classifier.classes[best] for best in posterior.argmax(axis=1)] == labels
    logits = view.words(texts) @ classifier.word_weights + classifier.bias
    assert [classifier.classes[best] for best in np.asarray(logits).argmax(axis=1)] == labels
