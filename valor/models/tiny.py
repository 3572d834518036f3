"""The tiny models' architectures with random weights: a LLaVA (the base) and a CLIP (the expert).

Both are the transformers library's own classes, only small, so everything that loads, trains and serves them is what
a full-size LLaVA or CLIP goes through.
"""

from collections.abc import Sequence
from typing import Any

from valor.models import tokens
from valor.recipe import PhantomBase, PhantomExpert
from valor.recipe.values import heads_of

PIXEL_MEAN, PIXEL_STD = 0.5, 0.25
_MAX_TOKENS = 77


def build_llava(settings: PhantomBase, texts: Sequence[str], *, seed: int) -> tuple[Any, Any]:
    """Return (LlavaForConditionalGeneration, LlavaProcessor) with random weights, evaluation mode.

    The image becomes (image_px / patch_px) ** 2 tokens: the vision tower's last layer without its class token.

    Args:
        settings: sizes.
        texts: what the tokenizer is trained on.
        seed: of the weights.
    """
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = tokens.chat_tokenizer(texts, vocab=settings.vocab)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_vision(settings)),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.text_width,
            intermediate_size=settings.text_width * 3,
            num_hidden_layers=settings.text_layers,
            num_attention_heads=heads_of(settings.text_width),
            num_key_value_heads=heads_of(settings.text_width),
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            **ids,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(tokens.IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(settings.image_px // settings.patch_px) ** 2,
        tie_word_embeddings=True,
        **ids,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    for name, value in ids.items():
        setattr(model.generation_config, name, value)
    processor = LlavaProcessor(
        image_processor=image_processor(settings.image_px),
        tokenizer=tokenizer,
        patch_size=settings.patch_px,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokens.CHAT_TEMPLATE,
    )
    return model.eval(), processor


def build_clip(settings: PhantomExpert, texts: Sequence[str], *, seed: int) -> tuple[Any, Any, Any]:
    """Return (CLIPModel, tokenizer, image processor) with random weights, evaluation mode; arguments as above."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    tokenizer = tokens.sentence_tokenizer(texts, vocab=settings.vocab, max_tokens=_MAX_TOKENS)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.text_width,
        intermediate_size=settings.text_width * 4,
        num_hidden_layers=settings.text_layers,
        num_attention_heads=heads_of(settings.text_width),
        max_position_embeddings=_MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = CLIPConfig(
        text_config=text, vision_config=CLIPVisionConfig(**_vision(settings)), projection_dim=settings.vision_width
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config)
    return model.eval(), tokenizer, image_processor(settings.image_px)


def image_processor(size_px: int) -> Any:
    """Return a CLIP image processor (PIL) that resizes to `size_px` squares and normalises."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"height": size_px, "width": size_px}
    return CLIPImageProcessorPil(
        size=size,
        crop_size=size,
        do_center_crop=False,
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )


def _vision(settings: PhantomBase | PhantomExpert) -> dict[str, Any]:
    return {
        "hidden_size": settings.vision_width,
        "intermediate_size": settings.vision_width * 4,
        "num_hidden_layers": settings.vision_layers,
        "num_attention_heads": heads_of(settings.vision_width),
        "image_size": settings.image_px,
        "patch_size": settings.patch_px,
        "projection_dim": settings.vision_width,
    }
