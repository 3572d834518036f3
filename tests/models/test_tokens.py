from valor.models import tokens
from valor.models.loading import messages

TEXTS = ["There is a left pleural effusion.", "No pneumothorax."] * 5


def test_any_language_passes_through_both_ways():
    tokenizer = tokens.chat_tokenizer(TEXTS, vocab=400)
    for text in ("FINDINGS: Naïve µ-opacity ≥ 10 cm, XXXX.", "心臓は正常", "a\tb\n\nc"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_words_of_the_reports_take_fewer_tokens_than_foreign_ones():
    tokenizer = tokens.chat_tokenizer(TEXTS, vocab=400)
    assert len(tokenizer("pleural effusion")["input_ids"]) < len(tokenizer("plkural kffusxon")["input_ids"])


def test_a_prompt_is_a_prefix_of_its_conversation():
    tokenizer = tokens.chat_tokenizer(TEXTS, vocab=400)
    prompt = messages("Describe.")
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    answered = tokenizer.apply_chat_template(
        [*prompt, {"role": "assistant", "content": [{"type": "text", "text": "No pneumothorax."}]}], tokenize=False
    )
    assert asked == "<s><|user|><image>Describe.<|assistant|>"
    assert answered == asked + "No pneumothorax.</s>"


def test_special_tokens_are_set_and_differ():
    tokenizer = tokens.chat_tokenizer(TEXTS, vocab=400)
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert len(set(ids)) == 3
    assert tokenizer.padding_side == "left"
    assert tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id  # the template writes it, once


def test_a_long_sentence_is_cut_with_its_end_kept():
    tokenizer = tokens.sentence_tokenizer(TEXTS, vocab=400, max_tokens=20)
    ids = tokenizer(["effusion " * 100], truncation=True)["input_ids"][0]
    assert len(ids) == 20
    assert ids[-1] == tokenizer.eos_token_id == tokens.EOS_ID != 2
