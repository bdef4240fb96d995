"""humming-kernels 0.1 as a peer: Linear and experts, int4 weights, 16-bit or int8 activations.

    python -m benchmarks.peer_humming --shapes all --moe all --act bf16,int8token --m 1,16,256

compiles ahead what those points will need, on all cores and without touching the GPU: humming
builds a kernel for each tile from C++ (NVRTC, ten seconds or so) and keeps it under
$HUMMING_CACHE_DIR. Run it beside a benchmark of something else, then measure humming.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import ACTS, Act, Linear, Refused, only
from w4tensor.testing import DENSE_SHAPES, MOE_SHAPES, TOKENS, Int4Codes

# silu(gate) * up, in the C++ that humming puts into its kernel
SILU_MUL = "a / (1.0f + expf(-a)) * b"


def layer_config(n: int, k: int, group_size: int, act: Act, experts: int = 0) -> Any:
    """humming's LayerConfig of a weight [n, k], or of `experts` such weights."""
    from humming.transform import prepare_layer_config

    return prepare_layer_config(**_layer(n, k, group_size, act, experts))


def layer_tensors(codes: Int4Codes, act: Act) -> tuple[Any, dict[str, Tensor]]:
    """The LayerConfig of a weight, and the weight in humming's order: keywords of its forward."""
    from humming import ops
    from humming.transform import prepare_and_transform_humming_tensors

    if codes.zero_point is not None:
        raise Refused("humming is compared with symmetric weights only")
    *stack, n, k = codes.q.shape
    tensors = {
        "weight": ops.pack_weight(codes.q.to(torch.int32), 4),
        "weight_scale": codes.scale.contiguous(),
    }
    layer = _layer(n, k, codes.group_size, act, stack[0] if stack else 0)
    return prepare_and_transform_humming_tensors(tensors, **layer)


@functools.cache
def _let_nvrtc_find_itself() -> None:
    """NVRTC asks for its builtins by name: its folder must be where the compiling process looks."""
    from humming.utils.nvrtc import get_nvrtc_library_path

    # without NVRTC humming compiles with nvcc
    with contextlib.suppress(RuntimeError):
        folders = [os.path.dirname(get_nvrtc_library_path()), os.environ.get("LD_LIBRARY_PATH")]
        os.environ["LD_LIBRARY_PATH"] = ":".join(filter(None, folders))


def _layer(n: int, k: int, group_size: int, act: Act, experts: int) -> dict[str, Any]:
    from humming.schema import HummingInputSchema, HummingWeightSchema

    _let_nvrtc_find_itself()
    return dict(
        shape_n=n,
        shape_k=k,
        weight_schema=HummingWeightSchema(
            b_dtype="uint4", weight_scale_group_size=0 if group_size == k else group_size
        ),
        input_schema=None if act.int8_group is None else HummingInputSchema(a_dtype="int8"),
        num_experts=experts or None,
        # no-ops for most shapes; without them its tiles do not divide the others
        pad_n_to_multiple=128,
        pad_k_to_multiple=128,
        torch_dtype=act.dtype,
        device=torch.cuda.current_device(),
    )


def dense_tiles(config: Any, tokens: Sequence[int]) -> list[list[Any]]:
    """[[above M, up to M, tile], ..]: what its heuristics choose for `tokens`."""
    from humming.tune import get_heuristics_config

    every = get_heuristics_config(config, gemm_type="dense")
    # by default it compiles for every M; its launcher always looks M=1 up
    return [entry for entry in every if any(entry[0] < m <= entry[1] for m in (1, *tokens))]


def moe_tile(config: Any, pairs: int, gemm_type: str) -> dict[str, Any]:
    """What its heuristics choose for this many (token, expert) pairs."""
    from humming.tune import get_heuristics_config

    return get_heuristics_config(config, shape_m=pairs, gemm_type=gemm_type)


class Humming(Linear):
    """A Linear with the tiles of humming's own heuristics."""

    def __init__(self, codes: Int4Codes, act: Act):
        only(act, "bf16", "fp16", "int8token")
        self._config, tensors = layer_tensors(codes, act)
        self._tiles = ""
        self._names = tuple(tensors)
        vars(self).update(tensors)
        # semaphores of its stream-K: one set for each layer
        self.locks = torch.zeros(2048, dtype=torch.int32, device="cuda")

    def prepare(self, tokens: Sequence[int]) -> None:
        from humming.kernel.humming import HummingKernel

        self._tiles = json.dumps(dense_tiles(self._config, tokens))
        HummingKernel.prepare_kernels(self._config.to_str(), '{"gemm_type": "dense"}', self._tiles)

    def __call__(self, x: Tensor) -> Tensor:
        from humming.forward import humming_forward

        return humming_forward(
            self._config,
            x,
            locks=self.locks,
            compute_config='{"gemm_type": "dense"}',
            tuning_config=self._tiles,
            **{name: getattr(self, name) for name in self._names},
        )


class HummingExperts:
    """An experts block of two humming products; sorting the routing is left out of its time.

    Args:
        gate_up, down: codes [E, 2 I, H] and [E, H, I].
        gemm_type: "indexed" gathers tokens inside the products, "grouped_contiguous" before them.
    """

    def __init__(self, gate_up: Int4Codes, down: Int4Codes, act: Act, gemm_type: str = "indexed"):
        only(act, "bf16", "fp16", "int8token")
        self._gemm_type = gemm_type
        self._layers = [layer_tensors(codes, act) for codes in (gate_up, down)]
        self._locks = torch.zeros(2, 2048, dtype=torch.int32, device="cuda")

    def copy(self) -> HummingExperts:
        """The same weights in memory of their own."""
        twin = object.__new__(HummingExperts)
        twin._gemm_type = self._gemm_type
        twin._layers = [
            (config, {name: value.clone() for name, value in tensors.items()})
            for config, tensors in self._layers
        ]
        twin._locks = self._locks.clone()
        return twin

    def route(self, ids: Tensor, weights: Tensor) -> Callable[[Tensor], Tensor]:
        """The block for one routing: ids [T, top_k], weights [T, top_k] fp32."""
        indexed = self._gemm_type == "indexed"
        plan = self._plan_indexed(ids) if indexed else self._plan_grouped(ids)
        tokens, top_k = ids.shape
        order = ids.flatten().argsort(stable=True)
        token_of_row, row_of_pair = order // top_k, order.argsort()

        def block(x: Tensor) -> Tensor:
            h = self._product(0, x if indexed else x[token_of_row], None, plan[0], top_k)
            y = self._product(1, *self._activate(h), plan[1], 1)
            pairs = y if indexed else y[row_of_pair]
            return torch.bmm(weights.to(y.dtype)[:, None], pairs.view(tokens, top_k, -1))[:, 0]

        return block

    def _plan_indexed(self, ids: Tensor) -> list[dict[str, Any]]:
        from humming.testing.data import generate_moe_tensors

        plans = []
        for config, _ in self._layers:
            tile = moe_tile(config, ids.numel(), "indexed")
            _, _, sorted_ids, expert_ids, padded = generate_moe_tensors(
                ids.int(), config.num_experts, "indexed", int(tile["block_shape"][0])
            )
            plans.append(
                dict(
                    tuning_config=json.dumps(tile),
                    sorted_ids=sorted_ids,
                    expert_ids=expert_ids,
                    num_tokens_padded=padded,
                )
            )
        return plans

    def _plan_grouped(self, ids: Tensor) -> list[dict[str, Any]]:
        experts = self._layers[0][0].num_experts
        ends = torch.bincount(ids.flatten(), minlength=experts).cumsum(0)
        layout = torch.nn.functional.pad(ends, (1, 0))
        return [
            dict(
                tuning_config=json.dumps(moe_tile(config, ids.numel(), "grouped_contiguous")),
                expert_layout=layout,
            )
            for config, _ in self._layers
        ]

    def _product(
        self, layer: int, x: Tensor, x_scale: Tensor | None, plan: dict[str, Any], top_k: int
    ) -> Tensor:
        from humming.forward import humming_forward

        config, tensors = self._layers[layer]
        return humming_forward(
            config,
            x,
            input_scale=x_scale,
            locks=self._locks[layer],
            top_k=top_k if self._gemm_type == "indexed" else 1,
            compute_config=json.dumps({"gemm_type": self._gemm_type}),
            **plan,
            **tensors,
        )

    def _activate(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """silu(gate) * up, quantised in the same kernel where the product wants int8."""
        from humming.forward import may_process_input

        y, _, token_scale = may_process_input(
            self._layers[1][0], h, activation_type="binary_split", activation_impl=SILU_MUL
        )
        return y, token_scale


def compile_ahead(specs: Sequence[tuple[Any, str, dict[str, Any]]]) -> int:
    """Compile (layer config, gemm_type, tile) on all cores; the number of different kernels."""
    from humming.kernel.humming import HummingKernel
    from humming.utils.cpu import get_parallel_build_workers

    kernels = {}
    for config, gemm_type, tile in specs:
        layer = json.loads(config.to_str()) | {"gemm_type": gemm_type} | tile
        layer.pop("num_sms", None)
        kernels[json.dumps(layer, sort_keys=True)] = layer

    def build(layer: dict[str, Any]) -> None:
        try:
            HummingKernel(**layer)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"humming: {layer['shape_n']}x{layer['shape_k']}: {text}", flush=True)

    with ThreadPoolExecutor(get_parallel_build_workers()) as pool:
        list(pool.map(build, kernels.values()))
    return len(kernels)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="", help="sizes or models of Linears, or all")
    parser.add_argument("--moe", default="", help="models of experts blocks, or all")
    parser.add_argument("--act", default="bf16", help="bf16, fp16, int8token")
    parser.add_argument("--m", default=",".join(map(str, TOKENS)), help="tokens of the Linears")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("humming asks the device for its tiles and needs a CUDA device")
    shapes, moe = set(options.shapes.split(",")), set(options.moe.split(","))
    tokens = [int(m) for m in options.m.split(",")]
    specs = []
    for act in (ACTS[name] for name in options.act.split(",")):
        for s in DENSE_SHAPES:
            if shapes & {s.name, s.model, "all"}:
                specs += _quietly(_dense_specs, s, act, tokens)
        for b in MOE_SHAPES:
            if moe & {b.name, b.model, "all"}:
                specs += _quietly(_moe_specs, b, act)
    started = time.monotonic()
    n = compile_ahead(specs)
    print(f"humming: {n} kernels in {time.monotonic() - started:.0f} s", flush=True)


def _dense_specs(s, act: Act, tokens: list[int]) -> list[tuple[Any, str, dict[str, Any]]]:
    config = layer_config(s.n, s.k, s.group_size, act)
    return [(config, "dense", tile) for _, _, tile in dense_tiles(config, tokens)]


def _moe_specs(b, act: Act) -> list[tuple[Any, str, dict[str, Any]]]:
    specs = []
    for n, k in ((2 * b.inter, b.hidden), (b.hidden, b.inter)):
        config = layer_config(n, k, b.group_size, act, b.experts)
        for gemm_type in ("indexed", "grouped_contiguous"):
            specs += [
                (config, gemm_type, moe_tile(config, m * b.top_k, gemm_type)) for m in b.tokens
            ]
    return specs


def _quietly(make: Callable, shape: Any, *rest: Any) -> list[tuple[Any, str, dict[str, Any]]]:
    """Its specs; none, and a line, for a shape that humming refuses."""
    try:
        return make(shape, *rest)
    except Exception as error:
        print(f"humming: {shape.name}: {type(error).__name__}: {error}", flush=True)
        return []


if __name__ == "__main__":
    main()
