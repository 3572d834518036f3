"""The benchmarks' models: LLaVA's architecture (as in valor/models/tiny.py) with random weights, from tiny to 7B."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from valor.models import tokens


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes of a LLaVA.

    Attributes:
        words: what to call it.
        image_px, patch_px: the tower reads (image_px / patch_px) ** 2 patches.
        vision: (width, layers, heads, MLP width) of the CLIP vision tower.
        text: (width, layers, heads, key-value heads, MLP width) of the Llama language model.
        vocab: the language model's vocabulary; 0: the tokenizer's own.
        tied: whether the language model's head is its embedding.
    """

    words: str
    image_px: int
    patch_px: int
    vision: tuple[int, int, int, int]
    text: tuple[int, int, int, int, int]
    vocab: int = 0
    tied: bool = True


ARCHITECTURES = {
    "tiny": Architecture("ViT 32x2 at 32 px, language model 32x2", 32, 16, (32, 2, 1, 64), (32, 2, 1, 1, 96)),
    "small": Architecture(
        "ViT-B/16 at 224 px, language model of 16M parameters (384 x 8)",
        224,
        16,
        (768, 12, 12, 3072),
        (384, 8, 6, 6, 1152),
    ),
    "0.5b": Architecture(
        "ViT-L/14 at 336 px, language model of 0.5B parameters (896 x 24, as Qwen2-0.5B)",
        336,
        14,
        (1024, 24, 16, 4096),
        (896, 24, 14, 2, 4864),
        vocab=151_936,
    ),
    "7b": Architecture(
        "LLaVA-1.5-7B: ViT-L/14 at 336 px, language model of 6.7B parameters (4096 x 32)",
        336,
        14,
        (1024, 24, 16, 4096),
        (4096, 32, 32, 32, 11_008),
        vocab=32_064,
        tied=False,
    ),
}


def build(name: str, texts: Sequence[str], *, seed: int = 0, device: str = "cpu") -> tuple[Any, Any]:
    """Return (LlavaForConditionalGeneration, LlavaProcessor).

    The image processor resamples as VALOR's ingest does (Lanczos), so that all that is raced sees the same pixels.

    Args:
        name: of ARCHITECTURES.
        texts: what the tokenizer is trained on.
        seed: of the weights.
        device: where the weights are drawn.
    """
    import torch
    from PIL.Image import Resampling
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    from valor.models.tiny import image_processor

    size = ARCHITECTURES[name]
    tokenizer = tokens.chat_tokenizer(texts, vocab=2048)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    vision, text = size.vision, size.text
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision[0],
            num_hidden_layers=vision[1],
            num_attention_heads=vision[2],
            intermediate_size=vision[3],
            projection_dim=vision[0],
            image_size=size.image_px,
            patch_size=size.patch_px,
        ),
        text_config=LlamaConfig(
            vocab_size=size.vocab or len(tokenizer),
            hidden_size=text[0],
            num_hidden_layers=text[1],
            num_attention_heads=text[2],
            num_key_value_heads=text[3],
            intermediate_size=text[4],
            max_position_embeddings=4096,
            tie_word_embeddings=size.tied,
            **ids,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(tokens.IMAGE),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(size.image_px // size.patch_px) ** 2,
        tie_word_embeddings=size.tied,
        **ids,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = LlavaForConditionalGeneration(config)
    for key, value in ids.items():
        setattr(model.generation_config, key, value)
    pixels = image_processor(size.image_px)
    pixels.resample = Resampling.LANCZOS
    processor = LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=size.patch_px,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokens.CHAT_TEMPLATE,
    )
    return model.eval(), processor


def expert(name: str, texts: Sequence[str]) -> Any:
    """Return stage 2's judge with random weights: of CLIP ViT-B/16's size, or tiny beside a tiny policy."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    from valor.clinical.vocabulary import OBSERVATIONS
    from valor.models.expert import Expert
    from valor.models.tiny import image_processor

    tokenizer = tokens.sentence_tokenizer(texts, vocab=2048)
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 64}
    size = tiny if name == "tiny" else {}
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = CLIPConfig(
        text_config=CLIPTextConfig(vocab_size=len(tokenizer), **size, **ids),
        vision_config=CLIPVisionConfig(image_size=224, patch_size=16, **size),
    )
    torch.manual_seed(0)
    calibration = {finding: {"scale": 10.0, "bias": 0.0} for finding in OBSERVATIONS}
    gate = {"measured": True, "masked": [], "calibration": calibration}
    return Expert(CLIPModel(config), tokenizer, image_processor(224), gate=gate)
