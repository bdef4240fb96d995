"""Who may import whom inside the package, read off the source: imports only go down."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import w4tensor

PACKAGE = Path(w4tensor.__file__).parent

# each part of the package -> the parts it may import
ALLOWED = {
    "errors": set(),
    "layout": {"errors"},
    # dispatch.plan hands problems on, inside the function
    "dispatch": {"errors", "dispatch_act_quant", "dispatch_gemv", "dispatch_hopper"},
    "dispatch_act_quant": {
        "dispatch",
        "dispatch_gemv",
        "dispatch_hopper",
        "dispatch_int8",
        "dispatch_integer",
        "errors",
    },
    "dispatch_experts": {
        "dispatch",
        "dispatch_gemv",
        "dispatch_hopper",
        "errors",
        "plans_experts",
    },
    "plans_experts": {"dispatch_gemv"},
    "dispatch_gemv": {"dispatch"},
    "dispatch_hopper": {"dispatch"},
    "dispatch_int8": {"dispatch", "dispatch_hopper"},
    "dispatch_integer": {"dispatch", "dispatch_hopper"},
    "tables": set(),
    "quantize": {"layout", "errors"},
    "convert": {"layout", "errors"},
    "reference": {"layout"},
    "arch": {"dispatch"},
    "recording": set(),
    "kernels": {"kernels", "layout", "recording"},
    "alike": {"recording"},
    "launch": {
        "moe",
        "kernels",
        "dispatch",
        "dispatch_act_quant",
        "dispatch_experts",
        "dispatch_gemv",
        "dispatch_hopper",
        "dispatch_int8",
        "plans_experts",
        "arch",
        "reference",
        "layout",
    },
    "moe": {
        "kernels",
        "dispatch",
        "dispatch_gemv",
        "plans_experts",
        "arch",
        "reference",
        "layout",
        "errors",
    },
    "checks": {"reference", "layout", "errors"},
    "ops": {"alike", "checks", "launch", "moe", "reference", "layout", "errors"},
    "tensors": {"tensors", "checks", "ops", "quantize", "convert", "reference", "layout", "errors"},
    "hf_experts": {"tensors"},
    "config": {"hf_experts", "tensors", "checks", "quantize", "layout", "errors"},
    "summary": {"config", "hf_experts", "tensors", "arch", "dispatch"},
    "hf": {"config", "hf_experts", "tensors", "summary", "errors"},
    "testing": {"quantize", "reference", "layout"},
    "__init__": {"config", "errors", "summary", "tensors"},
}
# what a part may not import from outside
BANNED = {
    "dispatch": {"torch", "triton"},
    "dispatch_act_quant": {"torch", "triton"},
    "dispatch_experts": {"torch", "triton"},
    "dispatch_gemv": {"torch", "triton"},
    "dispatch_hopper": {"torch", "triton"},
    "dispatch_int8": {"torch", "triton"},
    "dispatch_integer": {"torch", "triton"},
    "plans_experts": {"torch", "triton"},
    "errors": {"torch", "triton"},
    "alike": {"triton"},
    "recording": {"triton"},
    "layout": {"triton"},
    "quantize": {"triton"},
    "reference": {"triton"},
    "checks": {"triton"},
    "ops": {"triton"},
    "tensors": {"triton"},
    "config": {"triton"},
    "hf_experts": {"triton"},
    "summary": {"triton"},
}


def imports(source: str) -> set[str]:
    """Dotted names that `source` imports anywhere but under TYPE_CHECKING."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            deeper = {f"{module}.{alias.name}" for alias in node.names}
            found |= deeper if module == "w4tensor" else {module}
    return found


def violations(part: str, source: str) -> list[str]:
    wrong = []
    for name in imports(source):
        root, _, rest = name.partition(".")
        if root == "w4tensor" and rest.split(".")[0] not in ALLOWED[part]:
            wrong.append(f"{part} imports {name}")
        if root in BANNED.get(part, ()):
            wrong.append(f"{part} imports {name}")
    return wrong


def files() -> list[tuple[str, Path]]:
    return [
        (path.relative_to(PACKAGE).with_suffix("").parts[0], path)
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


@pytest.mark.parametrize("part,path", files(), ids=lambda v: getattr(v, "name", v))
def test_imports_go_down(part, path):
    assert part in ALLOWED, f"{path.name}: say in ALLOWED what it may import"
    assert violations(part, path.read_text()) == []


@pytest.mark.parametrize(
    "part,source",
    [
        ("layout", "from w4tensor.tensors import CudaCoalescedInt4Tensor"),
        ("kernels", "from w4tensor.config import W4CoalescedConfig"),
        ("reference", "import w4tensor.kernels.gemm"),
        ("dispatch", "def f():\n    import torch"),
        ("config", "from w4tensor import launch"),
    ],
)
def test_an_import_that_turns_around_is_caught(part, source):
    assert violations(part, source) != []


def test_no_drawer_for_things_without_a_home():
    assert not {"utils", "common", "helpers"} & {path.stem for _, path in files()}


def test_importing_the_package_needs_neither_triton_nor_a_device():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "def refuse(*a, **k): raise RuntimeError('asked a device')\n"
        "torch.cuda._lazy_init = refuse\n"
        "torch.cuda.get_device_properties = refuse\n"
        "import w4tensor, torch.nn.functional as F\n"
        "w = w4tensor.CudaCoalescedInt4Tensor.from_hp(torch.randn(8, 128))\n"
        "print(tuple(F.linear(torch.randn(2, 128), w).shape))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 8)"
