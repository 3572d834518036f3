"""The same at real size on a GPU: tokens/s, share of the peak FLOP/s, memory and the ratio to stock TRL.

LLaVA-1.5-7B's and a 0.5B model's architecture with random weights, which are float32 under bfloat16's autocast; VALOR
holds those that are frozen in bfloat16, as its stages do (a 7B model's take 27 and 14 GB). The 7B model trains its
projector alone (stage 2), since its optimizer's state does not fit beside it; the 0.5B model trains its language model
too. Variants run one after the other, each in a process of its own. `--device cpu --size tiny` runs the same code
anywhere.

Before the timed steps, a step in float32 must be the same training (`same_step`).
"""

import argparse
import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

from architectures import ARCHITECTURES, Architecture
from lane import Work
from race import Lane, alone, once, require_same_training

PEAK_TFLOPS = {"H100 80GB HBM3": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0}
"""Dense bfloat16 peaks of NVIDIA's data sheets."""


def plan(size: str, variant: str, options: argparse.Namespace) -> Work:
    """Return a lane's work."""
    return Work(
        variant=variant,
        architecture=size,
        source_px=options.source_px,
        generations=options.generations,
        prompts=options.prompts,
        tokens=options.tokens,
        steps=options.rounds + 1,
        checkpointing=True,
        projector_only=size == "7b",
        device=options.device,
        dtype="bfloat16",
    )


def same_step(works: Mapping[str, Work], *, threads: int) -> dict[str, float]:
    """Return the greatest differences between the works in one step in float32, of fewer and shorter completions.

    Timed steps in bfloat16 cannot be compared: it rounds at 1/256, and a token that is sampled otherwise changes the
    rest of its completion. Float32 rarely samples otherwise, and a few short completions keep that rare on a GPU too.

    Raises:
        AssertionError: the variants differ by more than the CPU benchmarks allow.
    """
    lanes, limits = {}, {"prompts": 2, "generations": 4, "tokens": 16}
    for name, work in works.items():
        fewer = {key: min(getattr(work, key), limit) for key, limit in limits.items()}
        exact = dataclasses.replace(work, dtype="float32", steps=1, **fewer)
        lanes[name] = alone(exact, threads=threads)
    return require_same_training(lanes)


def model_flops(work: Work) -> float:
    """Return the FLOPs of an optimizer step as TRL does it, less recomputation: nothing is shared or spared.

    Of stock TRL's time it gives the utilisation (MFU). Of VALOR's, which does a part of this work, it gives a speed.

    A matrix product of n parameters costs 2n a token; attention 4 x width x context more per layer. Generation reads
    prompt and completion once, the loss is one forward pass, and the backward pass costs one more for gradients of
    activations and one for those of the weights that train. The tower runs once in generation and once in the loss.
    """
    size = ARCHITECTURES[work.architecture]
    patches = (size.image_px // size.patch_px) ** 2
    prompt = patches + 32
    sequence = prompt + work.tokens
    tower = _blocks(size.vision[0], size.vision[1], size.vision[3], size.vision[0], patches + 1, gated=False)
    text = _text(size, sequence)
    head = 2 * size.text[0] * (size.vocab or 2048) * work.tokens
    backward = 1 if work.projector_only else 2
    return work.generations * work.prompts * (2 * tower + (text + head) * (2 + backward))


def _text(size: Architecture, tokens: int) -> float:
    width, layers, heads, key_value_heads, mlp = size.text
    return _blocks(width, layers, mlp, width * key_value_heads // heads, tokens, gated=True)


def _blocks(width: int, layers: int, mlp: int, key_value: int, tokens: int, *, gated: bool) -> float:
    parameters = 2 * width * width + 2 * width * key_value + (3 if gated else 2) * width * mlp
    return layers * tokens * (2 * parameters + 4 * width * tokens)


def summary(lane: Lane, peak_tflops: float | None) -> dict[str, Any]:
    """Return a lane's figures."""
    seconds = statistics.median(lane.seconds)
    work = lane.work
    flops = model_flops(work) / seconds
    return {
        "seconds": seconds,
        "completion_tokens_per_s": work.generations * work.prompts * work.tokens / seconds,
        "model_tflops_per_s": flops / 1e12,
        "of_peak": flops / 1e12 / peak_tflops if peak_tflops else None,
        "peak_mb": lane.end["peak_mb"],
    }


def compare(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of stock TRL and VALOR at one size, once one step has shown that they train alike."""
    peak = options.peak_tflops or known_peak(options.device)
    # On a CPU, time is the process's own, and threads that wait for each other spend it too.
    threads = 4 if options.device == "cuda" else 1
    works = {name: plan(size, name, options) for name in ("stock", "valor")}
    differences = same_step(works, threads=threads)
    figures = {name: summary(alone(work, threads=threads), peak) for name, work in works.items()}
    return {
        "work": vars(works["valor"]),
        "differences": differences,
        "figures": figures,
        "ratio": figures["stock"]["seconds"] / figures["valor"]["seconds"],
        "device": device_name(options.device),
    }


def device_name(device: str) -> str:
    """Return what the device calls itself."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else device


def known_peak(device: str) -> float | None:
    """Return the device's peak where its name is known."""
    if device != "cuda":
        return None
    name = device_name(device)
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def main() -> None:
    """Run the sizes that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=ARCHITECTURES, nargs="+", default=["0.5b", "7b"])
    parser.add_argument("--generations", type=int, default=8, help="completions per prompt (default 8)")
    parser.add_argument("--prompts", type=int, default=4, help="prompts per step (default 4)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per completion (default 128)")
    parser.add_argument("--source-px", type=int, default=2048, help="side of the source images (default 2048)")
    parser.add_argument("--rounds", type=int, default=5, help="steps that count, after one that does not (default 5)")
    parser.add_argument("--peak-tflops", type=float, help="of the device in bfloat16 (default: by its name)")
    parser.add_argument("--again", action="store_true", help="measure again what has a result")
    options = parser.parse_args()
    for size in options.size:
        result = once(f"gpu-{size}-{options.device}", lambda s=size: compare(s, options), options)
        for name, found in result["figures"].items():
            share = "unknown" if found["of_peak"] is None else f"{found['of_peak']:.1%}"
            print(
                f"{size} {name}: {found['seconds']:.2f} s/step, stock's work at {share} of the GPU's peak, "
                f"{found['peak_mb']:.0f} MB at most, "
                f"{found['completion_tokens_per_s']:.0f} completion tokens/s",
                flush=True,
            )
        print(f"{size}: stock / valor {result['ratio']:.2f}", flush=True)


if __name__ == "__main__":
    main()
