"""What the interpreter does not show: that the kernels compile for real GPUs, and that nothing needs Triton."""

import os
import subprocess
import sys

import pytest

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from perception.kernels.triton import decode, int4, norm, quantized, rotary, swiglu

def build(kernel, pointers, numbers, constants, **options):
    types = {**pointers, **dict.fromkeys(numbers.split(), "i32"), **dict.fromkeys(constants, "constexpr")}
    types |= {name: "fp32" for name in ("eps", "scale") if name in types and types[name] == "i32"}
    signature = {name: types[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options).asm["cubin"]

x, f, i = "*DTYPE", "*fp32", "*i64"
for half in (16, 32, 64):
    build(rotary._rotate_qk, dict(qkv=x, cos=f, sin=f), "tokens heads head_dim", dict(HEADS=8, HALF=half), num_warps=2)
    build(rotary._rotate_into_cache, dict(qkv=x, cos=f, sin=f, positions=i, keys=x, values=x),
          "tokens heads kv_heads head_dim capacity angles", dict(HEADS=8, HALF=half), num_warps=2)
    build(decode._piece, dict(q=x, keys=x, values=x, lengths=i, partial=f, weight=f),
          "q_row q_head slots kv_heads group head_dim scale",
          dict(PIECES=32, GROUP=16, BLOCK=64, CHANNELS=2 * half, WIDEN=False), num_warps=4, num_stages=2)
    build(decode._combine, dict(partial=f, weight=f, out=x), "head_dim pieces", dict(PIECES=32, CHANNELS=2 * half))
for mean, branch, gain in ((True, True, True), (False, True, False), (True, False, False)):
    build(norm._add_norm, dict(x=x, y=x, weight=x, bias=x, branch=x, gain=x), "width eps",
          dict(MEAN=mean, BRANCH=branch, GAIN=gain, BLOCK=2048), num_warps=4)
build(swiglu._swiglu, dict(gate_up=x, y=x), "hidden", dict(BLOCK=1024))
build(quantized._quantize, dict(x=x, codes="*i8", scale=f), "width", dict(BLOCK=2048), num_warps=8)
build(quantized._rescale, dict(total="*i32", x_scale=f, scale=f, bias=x, y=x), "width", dict(BIAS=True, BLOCK=1024))
four = dict(codes="*u8", scale="*bf16", offset="*bf16")
build(int4._few_rows, dict(x=x, **four, y=x), "width outputs", dict(HALF=32, OUTPUTS=16, BLOCK=128), num_warps=4)
build(int4._unpack, dict(**four, weight=x), "width", dict(HALF=32, BLOCK=128))
print("built")
"""

WITHOUT = """
import sys
sys.modules["triton"] = None
import torch
from perception.kernels.triton import decode, int4, language, norm, rotary, swiglu
assert not language.INSTALLED
x = torch.randn(3, 8)
product = int4.Product4(torch.randn(5, 32))
assert torch.allclose(product(torch.ones(1, 32)), product(torch.ones(20, 32))[:1], atol=1e-5)
assert torch.equal(swiglu.swiglu(x), swiglu.swiglu_plain(x))
assert torch.equal(norm.rms_norm(x, x[0], 1e-5), norm.rms_norm_plain(x, x[0], 1e-5))
print("ran")
"""


def run(code: str, **environment: str) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_kernels_compile_without_a_gpu(capability: int, dtype: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    assert "built" in run(COMPILE.replace("CAPABILITY", str(capability)).replace("DTYPE", dtype))


def test_nothing_needs_triton() -> None:
    assert "ran" in run(WITHOUT)
