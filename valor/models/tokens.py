"""Byte-level BPE tokenizers of the tiny models (GPT-2's scheme, by the `tokenizers` library).

Every byte is in the alphabet, so real language passes through a vocabulary learned from the phantom's reports: at
more tokens per word, never as an unknown token.
"""

from collections.abc import Iterable
from typing import Any

PAD, BOS, UNUSED, EOS = "<pad>", "<s>", "<unused>", "</s>"
IMAGE, USER, ASSISTANT = "<image>", "<|user|>", "<|assistant|>"
EOS_ID = 3
"""Not 2: a CLIPTextConfig with eos_token_id 2 pools at the largest token id instead of at the end (transformers'
compatibility path), and words behind it become invisible."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A conversation as `<s><|user|><image>PROMPT<|assistant|>REPORT</s>`; a prompt is a prefix of its conversation."""


def chat_tokenizer(texts: Iterable[str], *, vocab: int) -> Any:
    """Return a language model's tokenizer: padding on the left, the chat template, no tokens of its own added."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_train(texts, vocab=vocab, lowercase=False),
        **_special(),
        padding_side="left",
        extra_special_tokens=[IMAGE, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def sentence_tokenizer(texts: Iterable[str], *, vocab: int, max_tokens: int = 77) -> Any:
    """Return a text encoder's tokenizer: lower case, `<s> ... </s>`, cut at `max_tokens` with the end kept."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    model = _train(texts, vocab=vocab, lowercase=True)
    model.post_processor = TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, model.token_to_id(BOS)), (EOS, model.token_to_id(EOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=model, **_special(), model_max_length=max_tokens)


def _special() -> dict[str, str]:
    return {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS}


def _train(texts: Iterable[str], *, vocab: int, lowercase: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase() if lowercase else None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, BOS, UNUSED, EOS, IMAGE, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.token_to_id(EOS) != EOS_ID:
        raise AssertionError(f"{EOS} has id {tokenizer.token_to_id(EOS)}, expected {EOS_ID}")
    return tokenizer
