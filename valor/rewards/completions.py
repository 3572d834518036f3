"""What TRL hands to a reward: completions as text, and whether the token limit cut them."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a completion: a string, or a conversation whose contents are strings or typed parts."""
    if isinstance(completion, str):
        return completion
    parts = []
    for message in completion:
        content = message["content"]
        if isinstance(content, str):
            parts.append(content)
        else:
            parts += [part["text"] for part in content if part.get("type", "text") == "text"]
    return "\n".join(parts)


def were_cut(
    completion_ids: Sequence[Sequence[int]] | None, *, count: int, eos_token_ids: Collection[int]
) -> list[bool]:
    """Tell of each completion whether it was cut: none of its tokens ends a report.

    Args:
        completion_ids: token ids per completion; None where they are unknown, and then nothing counts as cut.
        count: how many completions there are.
        eos_token_ids: ids that end a report; without any, nothing counts as cut.
    """
    if completion_ids is None or not eos_token_ids:
        return [False] * count
    ends = frozenset(eos_token_ids)
    return [ends.isdisjoint(ids) for ids in completion_ids]
