"""Lexical metrics against their libraries, and their opposites."""

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from valor.metrics.bleu import bleu, bleu_corpus, bleu_counts, bleu_scores
from valor.metrics.gleu import gleu
from valor.metrics.rouge_l import rouge_l
from valor.metrics.words import clean, words

REFS = [
    "Heart size is normal. No pleural effusion or pneumothorax.",
    "Small left pleural effusion with adjacent atelectasis in the left lower lobe.",
    "1. Cardiomegaly. 2. Mild pulmonary edema, XXXX unchanged.",
    "The lungs are clear.",
]
HYPS = [
    "The heart is normal in size. No pleural effusion.",
    "Small right pleural effusion with atelectasis.",
    "Cardiomegaly. Mild pulmonary edema.",
    "The lungs are clear.",
]


def test_words_are_what_r2gen_compares():
    assert words("1. No XXXX change.  2. Lungs (clear)!") == (
        "no",
        "change",
        "lungs",
        "clear",
    )
    assert words("A 3.5 cm right-sided mass") == (
        "a",
        "3.5",
        "cm",
        "right-sided",
        "mass",
    )
    assert words("x-ray, Grade 4.") == (
        "x-ray",
        "grade",
        "4",
    )
    assert words("") == ()


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("cleaned", [True, False])
def test_corpus_bleu_is_sacrebleus(order, cleaned):
    prepare = clean if cleaned else str
    library = BLEU(tokenize="none", smooth_method="none", max_ngram_order=order)
    expected = library.corpus_score([prepare(h) for h in HYPS], [[prepare(r) for r in REFS]]).score / 100
    assert bleu_corpus(refs=REFS, hyps=HYPS, cleaned=cleaned)[f"bleu_{order}"] == pytest.approx(expected)


def test_bleu_counts_resum_to_any_draw():
    counts = bleu_counts(refs=REFS, hyps=HYPS)
    assert counts.shape == (4, 10)
    draw = [0, 0, 3, 2]
    expected = bleu_corpus(refs=[REFS[i] for i in draw], hyps=[HYPS[i] for i in draw])
    resummed = bleu_scores(counts[draw].sum(axis=0))
    assert {k: float(v) for k, v in resummed.items()} == pytest.approx(expected)
    stacked = bleu_scores(np.stack([counts.sum(axis=0), counts[draw].sum(axis=0)]))
    assert stacked["bleu_4"].shape == (2,)


def test_sentence_bleu():
    scores = bleu(refs=REFS, hyps=HYPS)
    assert scores[3] == pytest.approx(1.0)
    assert all(0 <= s <= 1 for s in scores)
    assert bleu(refs=REFS[:1], hyps=[""]) == [0.0]


def test_rouge_l_is_the_librarys():
    scorer = RougeScorer(["rougeL"])
    expected = [scorer.score(clean(r), clean(h))["rougeL"].fmeasure for r, h in zip(REFS, HYPS, strict=True)]
    assert rouge_l(refs=REFS, hyps=HYPS) == pytest.approx(expected)
    assert rouge_l(refs=["clear"], hyps=[""]) == [0.0]


def test_gleu_by_hand_and_bounds():
    # the/lungs/are/clear against the/lungs/clear: 3 + 1 shared of 10 and 6 n-grams.
    assert gleu(refs=["the lungs are clear"], hyps=["the lungs clear"]) == [pytest.approx(4 / 10)]
    assert gleu(refs=["a b"], hyps=["a b"]) == [1.0]
    assert gleu(refs=["a b", "", "a"], hyps=["", "", "b"]) == [0.0, 0.0, 0.0]
    # Repeating a right word earns nothing.
    assert gleu(refs=["effusion"], hyps=["effusion effusion"])[0] < 1.0


def test_gleu_is_nltks_on_the_same_words():
    nltk_gleu = pytest.importorskip("nltk.translate.gleu_score").sentence_gleu
    expected = [nltk_gleu([words(r)], words(h)) for r, h in zip(REFS, HYPS, strict=True)]
    assert gleu(refs=REFS, hyps=HYPS) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [bleu, rouge_l, gleu])
def test_snapshot_and_order(metric):
    snapshot = {
        "bleu": [0.0, 0.0, 0.7788, 1.0],
        "rouge_l": [0.6667, 0.5556, 0.8889, 1.0],
        "gleu": [0.3667, 0.1905, 0.7143, 1.0],
    }
    scores = metric(refs=REFS, hyps=HYPS)
    assert len(scores) == len(REFS)
    assert scores == pytest.approx(snapshot[metric.__name__], abs=5e-5), scores


@pytest.mark.parametrize("metric", [bleu, rouge_l, gleu])
def test_lists_of_different_length_are_refused(metric):
    with pytest.raises(ValueError, match="zip"):
        metric(refs=REFS, hyps=HYPS[:1])
