"""Kernels' compute capabilities as NVIDIA's own tools write them into a library."""

import shutil
import subprocess

import pytest
from tools.wheels import unpack

from gap_runtime.machines.fat_binary import list_kernels

pytestmark = pytest.mark.matrix

KERNEL = ".version 8.8\n.target sm_75\n.address_size 64\n.visible .entry k() { ret; }\n"
MADE_FOR = ("75", "86", "90", "90a", "100f", "103a", "120", "120a", "121a")


def test_what_cudas_tools_write(tmp_path):
    if not shutil.which("gcc"):
        pytest.skip("no gcc, which makes the library")
    tools = next(unpack("nvidia-cuda-nvcc==13.5.*").rglob("ptxas")).parent

    def run(program, *arguments):
        subprocess.run([program, *arguments], check=True, cwd=tmp_path, timeout=60)

    for name in ("ptxas", "fatbinary"):
        (tools / name).chmod(0o755)
    (tmp_path / "k.ptx").write_text(KERNEL)
    images = ["--image3=kind=ptx,sm=75,file=k.ptx"]
    for sm in MADE_FOR:
        run(tools / "ptxas", f"-arch=sm_{sm}", "k.ptx", "-o", f"k{sm}.cubin")
        images.append(f"--image3=kind=elf,sm={sm},file=k{sm}.cubin")
    run(tools / "fatbinary", "--64", "--compress-all", "--create=k.fatbin", *images)
    (tmp_path / "k.s").write_text('.section .nv_fatbin,"a"\n.p2align 3\n.incbin "k.fatbin"\n')
    run("gcc", "-shared", "-o", "k.so", "k.s")
    assert list_kernels(tmp_path / "k.so") == (
        *("7.5", "7.5+PTX", "8.6", "9.0", "9.0a", "10.0", "10.3a", "12.0", "12.0a", "12.1a"),
    )
