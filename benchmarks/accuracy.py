"""What int4 weights and int8 activations cost in accuracy, on real weights.

    python -m benchmarks.accuracy

MiniLM (cosine of the embeddings to the unquantised model's, nearest neighbours kept), a small
Llama that the example trains (perplexity a byte), and the signal-to-noise ratio of one product
against fp64: for Gaussian x and for x with every 128th channel at 30 times, against the product
with the dequantised weight ("product": what activations lose) and with the float weight ("whole").
Prints a markdown table and writes benchmarks/results/accuracy.csv. Needs no GPU.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.rows import RESULTS, Environment, append, environment
from examples import quantize_hf_model as minilm
from examples import train_and_quantize_lm as lm
from w4tensor import W4ActQuantConfig, W4CoalescedConfig
from w4tensor.checks import ACT_GROUP_SIZES
from w4tensor.testing import sqnr_db

GROUP_SIZES = (128, 32)
OUTLIER_EVERY, OUTLIER_FACTOR = 128, 30.0
# of the product whose noise is measured
M, N, K = 64, 512, 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Environment):
    """One configuration: group 0 where nothing is rounded, act_group -1 for one scale a token.

    scales: of the weight, "float" or "integer" (multiples of one unit a row).
    """

    config: str
    group: int = 0
    algorithm: str = ""
    scales: str = ""
    act_group: int = 0
    cosine_median: float
    cosine_min: float
    neighbour_kept: float
    perplexity: float
    product_gaussian_db: float
    product_outliers_db: float
    whole_gaussian_db: float
    whole_outliers_db: float


def configs(group_sizes: list[int], algorithms: list[str]) -> Iterator[W4CoalescedConfig | None]:
    """None for bf16, then W4A16 and W4A8 with every activation group for each weight.

    Integer scales follow the one configuration that takes them, symmetric and per token.
    """
    yield None
    for group_size in group_sizes:
        for algorithm in algorithms:
            yield W4CoalescedConfig(group_size, algorithm)
            for act in ACT_GROUP_SIZES:
                yield W4ActQuantConfig(group_size, algorithm, act_group_size=act)
            if algorithm == "symmetric":
                yield W4ActQuantConfig(group_size, act_group_size=-1, integer_scales=True)


class Noise:
    """One bf16 Linear and two kinds of x for it."""

    def __init__(self, device: str) -> None:
        rng = torch.Generator().manual_seed(0)
        self.linear = nn.Linear(K, N, bias=False)
        self.linear.weight = nn.Parameter(torch.randn(N, K, generator=rng) * K**-0.5)
        self.linear = self.linear.to(device, torch.bfloat16)
        x = torch.randn(M, K, generator=rng)
        outliers = x.clone()
        outliers[:, ::OUTLIER_EVERY] *= OUTLIER_FACTOR
        self.x = [each.to(device, torch.bfloat16) for each in (x, outliers)]

    @torch.inference_mode()
    def decibels(self, config: W4CoalescedConfig | None) -> list[float]:
        """Gaussian and outliers against the dequantised weight, then against the float weight."""
        linear = self.linear if config is None else minilm.quantized(self.linear, config)
        w = self.linear.weight
        if config is not None:
            w = linear.weight.dequantize(torch.float32)
        against = [(x, each) for each in (w, self.linear.weight) for x in self.x]
        return [sqnr_db(linear(x), _product(x, each)) for x, each in against]


def _product(x: Tensor, w: Tensor) -> Tensor:
    return x.double() @ w.double().T


def measure(args: argparse.Namespace) -> list[Row]:
    """Every configuration on every measure."""
    encoder, tokenizer = minilm.load(minilm.default_model(), args.device)
    texts = minilm.sentences(args.sentences)
    reference = minilm.embed(encoder, tokenizer, texts, "MiniLM")
    torch.manual_seed(0)
    training, held_out = lm.texts()
    llama = lm.small_llama().to(args.device)
    lm.train(llama, training, seconds=0, steps=args.steps)
    llama.to(torch.bfloat16)
    noise = Noise(args.device)
    rows = []
    for config in tqdm(
        list(configs(args.group_sizes, args.algorithms)), desc="configurations", disable=None
    ):
        if config is None:
            what = {"config": "bf16"}
            small, small_llama = copy.deepcopy(encoder).to(torch.bfloat16), llama
        else:
            act = getattr(config, "act_group_size", 0)
            what = {"config": "W4A8" if act else "W4A16", "act_group": act}
            what |= {"group": config.group_size, "algorithm": config.algorithm}
            what["scales"] = "integer" if getattr(config, "integer_scales", False) else "float"
            small = minilm.quantized(encoder, config)
            small_llama = lm.quantized(llama, config)
        embeddings = minilm.embed(small, tokenizer, texts, "MiniLM")
        median, least, kept = minilm.compare(embeddings, reference)
        decibels = noise.decibels(config)
        rows.append(
            Row(
                **environment(),
                **what,
                cosine_median=median,
                cosine_min=least,
                neighbour_kept=kept,
                perplexity=lm.perplexity(small_llama, held_out),
                product_gaussian_db=decibels[0],
                product_outliers_db=decibels[1],
                whole_gaussian_db=decibels[2],
                whole_outliers_db=decibels[3],
            )
        )
    return rows


def markdown(rows: list[Row]) -> str:
    """A table for the README."""
    lines = [
        "| config | group | weights by | act group | cosine median / min | neighbour kept "
        "| perplexity | product dB, Gaussian / outliers | whole dB, Gaussian / outliers |",
        "|" + "---|" * 9,
    ]
    for row in rows:
        act = "per token" if row.act_group == -1 else row.act_group
        weights = row.algorithm + (", integer scales" if row.scales == "integer" else "")
        cells = (
            row.config,
            row.group or "-",
            weights or "-",
            act or "-",
            f"{row.cosine_median:.3f} / {row.cosine_min:.3f}",
            f"{row.neighbour_kept:.2f}",
            f"{row.perplexity:.3f}",
            f"{row.product_gaussian_db:.1f} / {row.product_outliers_db:.1f}",
            f"{row.whole_gaussian_db:.1f} / {row.whole_outliers_db:.1f}",
        )
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--group-sizes", type=int, nargs="+", default=GROUP_SIZES)
    parser.add_argument("--algorithms", nargs="+", default=["symmetric", "min_max"])
    parser.add_argument("--sentences", type=int, default=400)
    parser.add_argument("--steps", type=int, default=1000, help="how long to train the Llama")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy.csv")
    args = parser.parse_args()
    rows = measure(args)
    args.out.unlink(missing_ok=True)
    for row in rows:
        append(args.out, row)
    print(markdown(rows))


if __name__ == "__main__":
    main()
