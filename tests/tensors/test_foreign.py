"""torchao's own tensors: their bytes are refused here, and importing w4tensor leaves them alone."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torchao.quantization import (
    Int4PlainInt32Tensor,
    Int4PreshuffledTensor,
    Int4Tensor,
    Int4TilePackedTo4dTensor,
    IntxUnpackedToInt8Tensor,
)

from tests.weights import CLASSES, Case, both_classes, cases, fields
from w4tensor import Int4ActQuantTensor
from w4tensor.errors import PackingError
from w4tensor.layout import LAYOUT_VERSION, padded_k

ops = torch.ops.w4tensor


def native_bytes(n: int, k: int, group_size: int, stack: tuple[int, ...]) -> dict[str, dict]:
    """qdata, scale and zero_point as each native int4 format lays them out."""
    groups = k // group_size

    def data(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.ones(*stack, *shape, dtype=dtype)

    def both(dtype: torch.dtype, zero: torch.dtype, *shape: int) -> dict:
        return {"scale": data(dtype, *shape), "zero_point": data(zero, *shape)}

    bf16, half = torch.bfloat16, torch.float16
    return {
        "Int4Tensor": {"qdata": data(torch.int8, n, -(-k // 2)), **both(bf16, bf16, groups, n)},
        "ExecuTorch": {"qdata": data(torch.uint8, n, -(-k // 2)), **both(bf16, bf16, groups, n)},
        "ExecuTorch coalesced": {
            "qdata": data(torch.uint8, n, -(-k // 2)),
            **both(bf16, bf16, n, groups),
        },
        "TilePackedTo4d": {
            "qdata": torch.ones(-(-n // 8), -(-k // 128), 32, 4, dtype=torch.int32),
            "scale": torch.ones(groups, n, 2, dtype=bf16),
            "zero_point": None,
        },
        "PlainInt32": {
            "qdata": data(torch.int32, n, -(-k // 8)),
            **both(bf16, torch.int8, groups, n),
        },
        "Intx": {"qdata": data(torch.int8, n, k), **both(bf16, torch.int8, n, groups)},
        "tinygemm on a CPU": {
            "qdata": data(torch.uint8, n, -(-k // 2)),
            **both(bf16, half, groups, n),
        },
        # every native element type in the very shape of ours, with our scales
        **{
            f"{dtype} in our shape {codes}": {
                "qdata": data(dtype, n, padded_k(k) // codes),
                **both(bf16, half, n, groups),
            }
            for dtype in (torch.int8, torch.uint8, torch.int32)
            for codes in (1, 2, 4, 8, 16)
        },
    }


def native_shapes(draw) -> tuple:
    group_size = draw(st.sampled_from([16, 32, 64, 128, 256, -1]))
    k = draw(st.sampled_from([1, 8, 100, 300])) if group_size == -1 else 0
    k = k or group_size * draw(st.integers(1, 4))
    groups = 1 if group_size == -1 else k // group_size
    n = draw(st.sampled_from([1, 2, 7, 8, 64, groups, k]))
    stack = draw(st.sampled_from([(), (1,), (3,), (n,), (groups,)]))
    return n, k, k if group_size == -1 else group_size, stack


@given(st.data())
def test_no_shape_lets_native_bytes_pass(data):
    """N = n_groups, N = K, E = N, N = 1 and odd sizes: it is never the shape that decides."""
    n, k, group_size, stack = native_shapes(data.draw)
    x = torch.ones(*stack, 2, k, dtype=torch.bfloat16)
    offs = torch.arange(1, stack[0] + 1, dtype=torch.int32) if stack else None
    for name, native in native_bytes(n, k, group_size, stack).items():
        arguments = native | {"group_size": group_size, "layout_version": LAYOUT_VERSION}
        for act in (None, 32):
            cls = CLASSES[act is not None]
            own = {"act_group_size": act} if act else {}
            calls = [
                lambda cls=cls, own=own, a=arguments: cls(**a, **own),
                lambda a=arguments, act=act: ops.linear(x, bias=None, act_group_size=act, **a),
            ]
            if offs is not None:
                calls.append(
                    lambda a=arguments, act=act: ops.grouped_linear(
                        x[0], offs=offs, act_group_size=act, **a
                    )
                )
            for call in calls:
                with pytest.raises(PackingError) as caught:
                    call()
                error = caught.value
                assert error.field == "qdata.dtype", name
                assert error.found == native["qdata"].dtype and "int" in str(error.expected)
                assert "from_torchao_int4" in str(error)


@both_classes
@pytest.mark.parametrize("transposed", [False, True])
def test_native_scales_are_refused_even_with_our_qdata(cls, transposed):
    """[n_groups, N] beside our bytes: a shape other than N = n_groups gives it away."""
    w = Case(cls, n=24, k=256, group_size=64).weight()
    good = fields(w)
    with pytest.raises(PackingError) as caught:
        cls(**(good | {"scale": w.scale.t().contiguous(), "transposed": transposed}))
    assert caught.value.field == "scale.shape"


def _native_tensors() -> dict[str, torch.Tensor]:
    """torchao's own objects, made without their kernels."""
    bf16 = torch.bfloat16
    q, scale = torch.ones(64, 64, dtype=torch.int8), torch.ones(2, 64, dtype=bf16)
    return {
        "Int4Tensor": Int4Tensor(q, scale, scale, [1, 64], torch.Size([64, 128])),
        "TilePacked": Int4TilePackedTo4dTensor(
            torch.ones(8, 1, 32, 4, dtype=torch.int32),
            torch.ones(2, 64, 2, dtype=bf16),
            [1, 64],
            torch.Size([64, 128]),
        ),
        "PlainInt32": Int4PlainInt32Tensor(
            torch.ones(64, 16, dtype=torch.int32),
            scale,
            torch.ones(2, 64, dtype=torch.int8),
            [1, 64],
            torch.Size([64, 128]),
        ),
        "Intx": IntxUnpackedToInt8Tensor.from_hp(torch.randn(64, 128), (1, 64), torch.int4),
    }


NATIVE = _native_tensors()
natives = pytest.mark.parametrize("native", NATIVE.values(), ids=NATIVE)


@both_classes
@natives
def test_native_tensor_objects_are_refused_by_constructors_and_operators(cls, native):
    good = fields(Case(cls, n=64, k=128).weight())
    for field in ("qdata", "scale", "zero_point"):
        with pytest.raises(PackingError) as caught:
            cls(**(good | {field: native}))
        assert caught.value.field == field and type(native).__name__ in str(caught.value)
    with pytest.raises((PackingError, TypeError)):
        cls.from_codes(native, good["scale"], group_size=64)
    act = 32 if cls is Int4ActQuantTensor else None
    x = torch.randn(2, 128)
    for field in ("qdata", "scale"):
        arguments = {"qdata": good["qdata"], "scale": good["scale"]} | {field: native}
        # their own dispatch meets our operator first, and has no entry for it
        with pytest.raises((PackingError, NotImplementedError)):
            ops.linear(
                x,
                **arguments,
                zero_point=None,
                bias=None,
                group_size=64,
                act_group_size=act,
                layout_version=LAYOUT_VERSION,
            )


@both_classes
@natives
def test_native_tensors_do_not_mix_with_ours(cls, native):
    w = Case(cls, n=64, k=128, dtype=native.dtype).weight()
    for op in (
        lambda: torch.cat((w, native)),
        lambda: torch.cat((native, w)),
        lambda: w.copy_(native),
        lambda: torch.mm(w, native.t()),
        lambda: F.linear(native, w),
        lambda: F.linear(w, native),
        lambda: setattr(torch.nn.Parameter(w, requires_grad=False), "data", native),
    ):
        with pytest.raises(Exception):  # noqa: B017  (whose refusal it is depends on the order)
            op()


def test_the_preshuffled_class_is_still_there():
    assert Int4PreshuffledTensor.__module__.startswith("torchao")


# what importing w4tensor does to others


def in_a_fresh_process(program: str) -> str:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_importing_changes_no_handler_and_no_answer_of_torchao():
    """Every table entry of every torchao class is the very object that it was."""
    said = in_a_fresh_process(
        """
        import io
        import torch
        import torchao.prototype.mx_formats
        from torch import nn
        from torchao.core import config as ao_config
        from torchao.prototype.safetensors import safetensors_utils
        from torchao.quantization import (
            Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig,
            Int8DynamicActivationIntxWeightConfig, Float8WeightOnlyConfig, quantize_,
        )
        from torchao.quantization.transform_module import _QUANTIZE_CONFIG_HANDLER as handlers
        from torchao.utils import TorchAOBaseTensor

        def classes():
            queue, found = [TorchAOBaseTensor], []
            while queue:
                found += (subclasses := queue.pop().__subclasses__())
                queue += subclasses
            return [c for c in found if c.__module__.startswith("torchao")]

        def tables():
            found = {}
            for cls in classes():
                for name in ("_ATEN_OP_TABLE", "_TORCH_FN_TABLE"):
                    for owner, table in getattr(cls, name, {}).items():
                        for func, handler in table.items():
                            found[cls, name, owner, func] = handler
                for name in ("__torch_function__", "__torch_dispatch__", "__new__", "__init__"):
                    found[cls, name] = getattr(cls, name, None)
            for name, value in vars(TorchAOBaseTensor).items():
                found["base", name] = value
            for config, handler in handlers.items():
                found["config", config] = handler
            for name, value in vars(torch.Tensor).items():
                found["Tensor", name] = value
            for name, value in vars(nn.Linear).items():
                found["Linear", name] = value
            found["F.linear"] = torch.nn.functional.linear
            return found

        def lists():
            return (
                dict(safetensors_utils.ALLOWED_CLASSES),
                list(safetensors_utils.ALLOWED_TENSORS_SUBCLASSES),
                set(ao_config.ALLOWED_AO_MODULES),
            )

        def answers():
            torch.manual_seed(0)
            found = []
            for config in (
                Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig(),
                IntxWeightOnlyConfig(), Int8DynamicActivationIntxWeightConfig(),
                Float8WeightOnlyConfig(),
            ):
                model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 128)).to(torch.bfloat16)
                quantize_(model, config)
                with torch.no_grad():
                    found.append(model(torch.randn(4, 128).to(torch.bfloat16)))
                file = io.BytesIO()
                torch.save(model.state_dict(), file)
                file.seek(0)
                found.append(len(torch.load(file, weights_only=True)))
            return found

        results = answers()
        count, before, allowed = len(classes()), tables(), lists()
        import w4tensor

        assert w4tensor.__version__
        after = tables()
        # the handlers of our own configs, and nothing else, are new
        new = {key for key in after.keys() - before.keys()}
        assert {key[0] for key in new} == {"config"}, new
        assert {key[1].__module__ for key in new} == {"w4tensor.config"}
        changed = [key for key, value in before.items() if after.get(key) is not value]
        # bound methods are made anew at each look
        changed = [key for key in changed if after[key] != before[key]]
        assert not changed, changed
        assert len(classes()) == count, classes()
        assert lists() == allowed
        for a, b in zip(results, answers(), strict=True):
            assert a == b if isinstance(a, int) else torch.equal(a, b)
        print(count, len(before))
        """
    )
    count, entries = map(int, said.split()[-2:])
    assert count > 10 and entries > 300


def test_importing_needs_neither_triton_nor_a_device_and_says_nothing():
    said = in_a_fresh_process(
        """
        import sys

        class NoTriton:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "triton":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, NoTriton())
        import torch

        def refuse(*args, **kwargs):
            raise AssertionError("a device was asked")

        for name in ("_lazy_init", "init", "current_device", "get_device_properties",
                     "get_device_capability"):
            setattr(torch.cuda, name, refuse)
        import contextlib, io, logging, warnings
        from torch import nn
        from torchao.quantization import quantize_

        logging.getLogger().addHandler(logging.StreamHandler(out := io.StringIO()))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                import w4tensor
        assert out.getvalue() == ""
        assert "triton" not in sys.modules and not torch.cuda.is_initialized()
        assert not [m for m in sys.modules if m.startswith("w4tensor.kernels")]
        for config in (w4tensor.W4CoalescedConfig(), w4tensor.W4ActQuantConfig()):
            model = nn.Sequential(nn.Linear(256, 64))
            quantize_(model, config)
            assert model(torch.randn(3, 256)).shape == (3, 64)
            if not torch.cuda.is_available():
                print(w4tensor.summary(model))
        assert "triton" not in sys.modules and not torch.cuda.is_initialized()
        print("done")
        """
    )
    assert said.endswith("done\n")


@given(cases())
def test_our_bytes_are_refused_under_another_version(case):
    good = fields(case.weight())
    for version in (0, 2, -1, LAYOUT_VERSION + 100):
        with pytest.raises(PackingError, match="convert with the release that wrote it") as caught:
            case.cls(**(good | {"layout_version": version}))
        assert caught.value.field == "layout_version"
        assert (caught.value.found, caught.value.expected) == (version, LAYOUT_VERSION)
