"""Operating curves: what a checkpoint's reports become when tokens of findings are made likelier or less likely.

A reward that pays for completeness could do no more than slide a model along SFT's curve. A curve is drawn by adding
`bias` times a token's leaning to the next token's logits: its leaning, in [-1, 1], is how much more often the training
reports' sentences that assert a finding use it than those that deny one, or all of them ("no acute disease").
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

BIASES = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)


def curve(
    *, checkpoint: Path, dataset: Path, evidence: Path, output: Path, max_new_tokens: int, batch_size: int
) -> Mapping[str, float]:
    """Write a table per bias into `output`, `<bias>.npz` (`results.save`)."""
    import torch
    from transformers import LogitsProcessor

    from pipelines.experiments import results
    from pipelines.experiments.analysis import measured, value
    from valor.data.manifest import read_studies
    from valor.models.generate import generate_reports
    from valor.models.loading import load_policy, model_pixels, prompt_of

    model, processor = load_policy(checkpoint)
    leaning = torch.tensor(
        leanings((study.text for study in read_studies(dataset, split="train")), processor.tokenizer, model)
    )
    studies = read_studies(dataset, split="test")
    images = [model_pixels(study, processor) for study in studies]

    class Bias(LogitsProcessor):
        def __init__(self, bias: float):
            self.bias = bias

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            return scores + self.bias * leaning

    found = {}
    for bias in BIASES:
        reports = generate_reports(
            model,
            processor,
            images,
            prompt=prompt_of(checkpoint),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            logits_processor=[Bias(bias)],
        )
        table = results.table_of(studies, reports, evidence=evidence)
        results.save(output / f"{bias:g}.npz", table)
        found[f"f1_micro/{bias:g}"] = value(measured({0: table})["truth_f1_micro"], table)
    return found


def leanings(reports: Iterable[str], tokenizer: Any, model: Any) -> list[float]:
    """Return per token id how it leans, in [-1, 1]: 1 where only assertions use it, -1 where only denials do."""
    from valor.clinical.labeler import NO_FINDING, mentions
    from valor.models.sentences import sentences

    used: dict[bool, Counter[int]] = {True: Counter(), False: Counter()}
    for report in reports:
        for sentence in sentences(report):
            found = mentions(sentence)
            if found:
                asserts = any(m.finding != NO_FINDING and m.label != "negative" for m in found)
                used[asserts].update(set(tokenizer(f" {sentence}", add_special_tokens=False)["input_ids"]))
    whole = {side: sum(counts.values()) or 1 for side, counts in used.items()}
    vocabulary = model.get_output_embeddings().weight.shape[0]
    result = []
    for token in range(vocabulary):
        asserted, denied = used[True][token] / whole[True], used[False][token] / whole[False]
        seen = used[True][token] + used[False][token]
        result.append(math.tanh(math.log((asserted + 1e-5) / (denied + 1e-5)) / 2) if seen >= 5 else 0.0)
    return result
