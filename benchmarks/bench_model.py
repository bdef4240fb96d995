"""Decode and prefill rates of whole transformers models, random weights of the real shape.

    python -m benchmarks.bench_model --model llama-3-8b --impl bf16,tinygemm,ours,ours-int8

Each implementation runs in a process of its own with a time limit of its own, and appends a row
to benchmarks/results/model.csv as soon as a figure is known, so that a run that is cut short
still counts. generate(cache_implementation="static") with its default compile, as users call it.
Models are built layer by layer: a layer's bf16 weights are gone before the next one's exist.

    python -m benchmarks.bench_model --model llama-3-8b --impl w4tensor --profile

also writes the kernels of one decode step, with their times, beside the rows. --smoke runs a
tiny model of each kind on the CPU, to try the script.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import rows

MODELS = ("llama-3-8b", "qwen3-30b-a3b")
IMPLS = ("bf16", "tinygemm", "w4tensor", "w4tensor-int8", "w4tensor-int8-integer")
GROUP_SIZE = 128
DECODE_PROMPT = 32
PREFILL_PROMPT = 2048


# building


def model_config(model: str, *, layers: int | None, smoke: bool) -> Any:
    """The transformers config of a model of MODELS, or of a tiny one of its kind."""
    from transformers import LlamaConfig, Qwen3MoeConfig

    if model == "llama-3-8b":
        sizes = dict(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
            max_position_embeddings=8192,
        )
        if smoke:
            sizes |= dict(hidden_size=256, intermediate_size=512, vocab_size=512)
            sizes |= dict(num_attention_heads=4, num_key_value_heads=2)
        kind = LlamaConfig
    else:
        sizes = dict(
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            vocab_size=151936,
            max_position_embeddings=40960,
        )
        if smoke:
            sizes |= dict(hidden_size=256, intermediate_size=512, moe_intermediate_size=128)
            sizes |= dict(num_experts=8, num_experts_per_tok=2, vocab_size=512)
            sizes |= dict(num_attention_heads=4, num_key_value_heads=2)
        kind = Qwen3MoeConfig
    if layers is not None or smoke:
        sizes["num_hidden_layers"] = layers or 2
    # no end token: a random model would stop at it
    return kind(**sizes, tie_word_embeddings=False, eos_token_id=None, dtype=torch.bfloat16)


def build(config: Any, quantize: Callable[[nn.Module], None], device: str) -> nn.Module:
    """The model with random weights; `quantize` is given each layer, and the lm_head, in turn."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for layer in model.model.layers:
        _materialise(layer, device)
        quantize(layer)
    _materialise(model, device)
    # in a container, for a filter sees the modules inside what it is given
    quantize(nn.Sequential(model.lm_head))
    # its frequencies are computed, not loaded
    rotary = type(model.model.rotary_emb)
    with torch.device(device):
        model.model.rotary_emb = rotary(model.config)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.device.type != "meta", f"{name} was not materialised"
    return model.eval()


def _materialise(module: nn.Module, device: str) -> None:
    for owner in module.modules():
        for name, meta in owner._parameters.items():
            if meta is None or meta.device.type != "meta":
                continue
            weight = torch.empty(meta.shape, dtype=meta.dtype, device=device)
            # norms scale by one; matrices as transformers initialises them
            weight = weight.fill_(1) if weight.ndim == 1 else weight.normal_(0, 0.02)
            owner._parameters[name] = nn.Parameter(weight, requires_grad=False)


def quantizer(impl: str) -> Callable[[nn.Module], None]:
    """What makes a layer's weights int4, in place."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    if impl == "bf16":
        return lambda module: None
    if impl == "tinygemm":
        from torchao.quantization.quantize_.workflows import Int4PackingFormat

        stock = Int4WeightOnlyConfig(
            group_size=GROUP_SIZE, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D
        )
        return lambda module: quantize_(module, stock)
    from w4tensor import W4ActQuantConfig, W4CoalescedConfig, with_experts

    config = {
        "w4tensor": W4CoalescedConfig(GROUP_SIZE),
        "w4tensor-int8": W4ActQuantConfig(GROUP_SIZE),
        "w4tensor-int8-integer": W4ActQuantConfig(
            GROUP_SIZE, act_group_size=-1, integer_scales=True
        ),
    }[impl]
    return lambda module: quantize_(module, with_experts(config), filter_fn=None)


# measuring


class Clock:
    """A logits processor: at the first and the last logits it reads the clock and turns `watch`."""

    def __init__(self, last: int, watch: torch.profiler.profile | None = None):
        self._last = last
        self._watch = watch
        self._calls = 0
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._calls in (0, self._last):
            _synchronize()
            if self._watch is not None:
                self._watch.stop() if self._calls else self._watch.start()
            self.times.append(time.perf_counter())
        self._calls += 1
        return scores


def generate(
    model: nn.Module,
    batch: int,
    prompt: int,
    new: int,
    watch: torch.profiler.profile | None = None,
    steps: int | None = None,
) -> tuple[float, float]:
    """Seconds until the first logits, and seconds from there for `steps` more, or for all."""
    from transformers import GenerationConfig, LogitsProcessorList

    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device=model.device)
    clock = Clock(new - 1 if steps is None else steps, watch)
    settings = GenerationConfig(
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        cache_implementation="static",
    )
    _synchronize()
    start = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=settings,
        logits_processor=LogitsProcessorList([clock]),
    )
    return clock.times[0] - start, clock.times[-1] - clock.times[0]


def decode_rate(model: nn.Module, batch: int, new: int, repeats: int = 3) -> tuple[float, float]:
    """Tokens a second of decoding, and what the two calls before cost, which compile."""
    start = time.perf_counter()
    for _ in range(2):
        generate(model, batch, DECODE_PROMPT, new)
    compiling = time.perf_counter() - start
    seconds = statistics.median(
        generate(model, batch, DECODE_PROMPT, new)[1] for _ in range(repeats)
    )
    return batch * (new - 1) / seconds, compiling


def prefill_rate(model: nn.Module, prompt: int, repeats: int = 5) -> float:
    """Prompt tokens a second, from the call of generate to the first logits."""
    generate(model, 1, prompt, 1)
    return prompt / statistics.median(generate(model, 1, prompt, 1)[0] for _ in range(repeats))


def profile(model: nn.Module, new: int, steps: int = 16) -> str:
    """A table of what the device does in one decode step at batch 1.

    new: as decode_rate() had it just now, for which the cache is sized and the step compiled.
    A kernel that starts before the one ahead has ended works at the same time: its wait counts.
    """
    steps = min(steps, new - 1)
    _, seconds = generate(model, 1, DECODE_PROMPT, new, steps=steps)
    activity = torch.profiler.ProfilerActivity
    on_device = torch.cuda.is_available()
    watch = torch.profiler.profile(activities=[activity.CUDA if on_device else activity.CPU])
    generate(model, 1, DECODE_PROMPT, new, watch, steps)
    # {kernel: [microseconds, launches]}
    total: dict[str, list[float]] = {}
    for event in watch.events():
        if getattr(event, "is_user_annotation", False):
            continue
        # the calls that launch kernels are among the events of CUDA
        if on_device and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        spent = event.time_range.elapsed_us() if on_device else event.self_cpu_time_total
        entry = total.setdefault(event.name, [0.0, 0.0])
        entry[0] += spent / steps
        entry[1] += 1 / steps
    table = sorted(((us, calls, name) for name, (us, calls) in total.items()), reverse=True)
    busy = sum(us for us, _, _ in table)
    step = seconds / steps * 1e6
    lines = [
        " ".join(str(value) for value in rows.environment().values()),
        f"one decode step: {step:.0f} us, of which the device works {busy:.0f} us",
        f"{'us':>9s} {'share':>6s} {'calls':>6s}  kernel",
    ]
    lines += [f"{us:9.1f} {us / step:6.1%} {n:6.1f}  {name[:110]}" for us, n, name in table[:60]]
    return "\n".join(lines) + "\n"


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# one implementation in a process of its own


def work(options: argparse.Namespace) -> None:
    """Measure one model in one implementation and append its rows as they come."""
    import transformers

    impl = options.impl

    def record(figure: str, value: float, batch: int = 0, prompt: int = 0) -> None:
        row = rows.Figure(
            **rows.environment(),
            transformers=transformers.__version__,
            model=options.model + ("-smoke" if options.smoke else ""),
            impl=impl,
            figure=figure,
            batch=batch,
            prompt=prompt,
            value=value,
        )
        rows.append(options.out, row)
        print(f"{row.model} {impl}: {figure} {value:.5g} (batch {batch})", flush=True)

    device = "cpu" if options.smoke else "cuda"
    torch.manual_seed(0)
    start = time.perf_counter()
    config = model_config(options.model, layers=options.layers, smoke=options.smoke)
    model = build(config, quantizer(impl), device)
    record("load_s", time.perf_counter() - start)
    if device == "cuda":
        torch.cuda.empty_cache()
        record("weights_gb", torch.cuda.memory_allocated() / 1e9)
        torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        for batch in (int(b) for b in options.batch.split(",")):
            rate, compiling = decode_rate(model, batch, options.new)
            record("decode_tok_s", rate, batch, DECODE_PROMPT)
            record("compile_s", compiling, batch, DECODE_PROMPT)
            # before another prompt, whose cache of another size would compile the step once more
            if batch == 1 and options.profile:
                table = profile(model, options.new)
                path = options.out.parent / f"profile-{options.model}-{impl}.txt"
                path.write_text(table)
                print(f"{path}\n" + "\n".join(table.splitlines()[:14]), flush=True)
            if batch == 1:
                prompt = 64 if options.smoke else PREFILL_PROMPT
                record("prefill_tok_s", prefill_rate(model, prompt), 1, prompt)
                if device == "cuda":
                    record("peak_gb", torch.cuda.max_memory_allocated() / 1e9, 1, prompt)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-3-8b", choices=MODELS)
    parser.add_argument("--impl", default=",".join(IMPLS), help="comma-separated")
    parser.add_argument("--batch", default="1", help="sequences at a time, comma-separated")
    parser.add_argument("--new", type=int, default=129, help="tokens to generate")
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--limit", type=float, default=280, help="seconds for one implementation")
    parser.add_argument("--seconds", type=float, default=570, help="for all of them together")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=rows.RESULTS / "model.csv")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.worker:
        return work(options)
    if not (options.smoke or torch.cuda.is_available()):
        raise SystemExit("bench_model times a GPU and needs a CUDA device (or --smoke)")
    ends = time.monotonic() + options.seconds
    rest = [a for i, a in enumerate(sys.argv[1:]) if a != "--impl" and sys.argv[i] != "--impl"]
    for impl in options.impl.split(","):
        seconds = min(options.limit, ends - time.monotonic())
        if seconds <= 0:
            print(f"out of time before {options.model} {impl}")
            return
        command = [
            sys.executable,
            "-m",
            "benchmarks.bench_model",
            *rest,
            "--worker",
            "--impl",
            impl,
        ]
        try:
            code = subprocess.run(command, timeout=seconds).returncode
            if code:
                print(f"{options.model} {impl}: ended with code {code}", flush=True)
        except subprocess.TimeoutExpired:
            print(f"{options.model} {impl}: stopped after {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
