"""Train a small Llama, quantise it, compare: python examples/train_and_quantize_lm.py

Byte by byte, on the standard library's documentation and sources, for about a minute, so that
accuracy is judged on weights that have learned something. Prints the perplexity on held-out text,
in bf16 and quantised, and lets each model go on with the same prompt. Runs on a GPU where there
is one, and without.
"""

from __future__ import annotations

import argparse
import copy
import math
import pathlib
import time

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import quantize_
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from w4tensor import W4ActQuantConfig, W4CoalescedConfig

# bytes that a model sees at once
CONTEXT = 128
PROMPT = "The following "


def texts() -> tuple[Tensor, Tensor]:
    """Training and held-out text as uint8: whole topics and files, every tenth held out."""
    from pydoc_data.topics import topics

    sources = sorted(pathlib.Path(argparse.__file__).parent.glob("*.py"))
    pieces = [text.encode() for _, text in sorted(topics.items())]
    pieces += [path.read_bytes() for path in sources]
    held_out = b"".join(pieces[::10])
    training = b"".join(piece for i, piece in enumerate(pieces) if i % 10)
    return (
        torch.frombuffer(bytearray(training), dtype=torch.uint8),
        torch.frombuffer(bytearray(held_out), dtype=torch.uint8),
    )


def small_llama() -> LlamaForCausalLM:
    """1.3 million weights; every Linear has K a multiple of 128."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * CONTEXT,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM, text: Tensor, seconds: float, steps: int | None, batch: int = 8
) -> tuple[int, float]:
    """Train in place for `steps` steps or `seconds` seconds; the steps made and the last loss.

    Muon learns the matrices between the layers in a third of the steps that AdamW takes. The
    learning rates follow half a cosine over the share of steps or time that has gone.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [*model.model.embed_tokens.parameters(), *model.lm_head.parameters()]
    rest += [p for p in model.parameters() if p.ndim == 1]
    optimizers = [
        torch.optim.Muon(matrices, lr=2e-2, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1e-2, betas=(0.9, 0.95)),
    ]
    done = 0.0

    def rate(step: int) -> float:
        return min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * done))

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, rate) for o in optimizers]
    picks = torch.Generator().manual_seed(0)
    model.train()
    start, step, loss = time.perf_counter(), 0, math.nan
    with tqdm(total=100, desc="training", unit="%", leave=False, disable=None) as bar:
        while done < 1:
            first = torch.randint(len(text) - CONTEXT, (batch, 1), generator=picks)
            tokens = text[first + torch.arange(CONTEXT)].long().to(model.device)
            result = model(input_ids=tokens, labels=tokens)
            model.zero_grad()
            result.loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            step, loss = step + 1, result.loss.item()
            gone = step / steps if steps else (time.perf_counter() - start) / seconds
            done = min(1.0, gone)
            for schedule in schedules:
                schedule.step()
            bar.update(round(100 * done) - bar.n)
            bar.set_postfix(loss=f"{loss:.2f}")
    model.eval()
    return step, loss


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, text: Tensor, windows: int = 256) -> float:
    """exp of the mean loss a byte, over `windows` windows spread over the text."""
    first = torch.arange(windows)[:, None] * ((len(text) - CONTEXT) // windows)
    total = 0.0
    for rows in first.split(32):
        tokens = text[rows + torch.arange(CONTEXT)].long().to(model.device)
        logits = model(input_ids=tokens).logits[:, :-1].float()
        total += nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
        ).item()
    return math.exp(total / (windows * (CONTEXT - 1)))


@torch.inference_mode()
def continuation(model: LlamaForCausalLM, prompt: str, count: int) -> str:
    """The prompt and `count` more bytes, greedily."""
    tokens = torch.tensor([list(prompt.encode())], device=model.device)
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return bytes(out[0].tolist()).decode(errors="replace")


def quantized(model: LlamaForCausalLM, config: AOBaseConfig) -> LlamaForCausalLM:
    """A quantised copy."""
    model = copy.deepcopy(model)
    quantize_(model, config)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long to train")
    parser.add_argument("--steps", type=int, help="train so many steps instead")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--algorithm", default="symmetric")
    parser.add_argument("--new-bytes", type=int, default=120)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    training, held_out = texts()
    model = small_llama().to(args.device)
    steps, loss = train(model, training, args.seconds, args.steps)
    size = sum(p.numel() for p in model.parameters())
    print(
        f"a Llama of {size:,} weights, {steps} steps on {len(training):,} bytes, loss {loss:.2f}; "
        f"{len(held_out):,} bytes held out; group_size={args.group_size}, {args.algorithm}"
    )
    model.to(torch.bfloat16)
    weights = {"group_size": args.group_size, "algorithm": args.algorithm}
    models = {
        "bf16": model,
        "W4A16": quantized(model, W4CoalescedConfig(**weights)),
        "W4A8": quantized(model, W4ActQuantConfig(**weights)),
    }
    for name, candidate in models.items():
        print(f"{name:6} perplexity {perplexity(candidate, held_out):.4f} a byte")
    for name, candidate in models.items():
        print(f"{name:6} {continuation(candidate, PROMPT, args.new_bytes)!r}")


if __name__ == "__main__":
    main()
