# SPDX-License-Identifier: Apache-2.0
"""The module afd-cuda.so as it was built: what it needs, what it shows, and what the compiler said of its kernels. No GPU."""
import array
import ctypes
import json
import math
import os
import pathlib
import re
import subprocess
import tempfile
import unittest

from sentences import BUILD, ROOT

MODULE = BUILD / "modules/afd-cuda.so"
# Kernels that a decode step spends its time in: no spills, no arrays in local memory, and at most so many bytes of static
# shared memory (what is asked for at a launch is checked under emulation).
HOT = {"tile_kernel": 0, "slices_kernel": 0, "inputs_bf16_kernel": 0, "inputs_fp8_kernel": 0, "attend_split_kernel": 0,
       "attend_chunk_kernel": 0, "join_splits_kernel": 0, "norm_kernel": 128, "rope_kernel": 0, "activation_kernel": 0,
       "convert_kernel": 0, "route_kernel": 0, "activate_kernel": 0, "combine_kernel": 0, "sample_kernel": 17 << 10}
SHARED_BYTES = 48 << 10  # static, of any kernel: what every GPU gives


def readelf(*flags):
    return subprocess.run(["readelf", *flags, MODULE], capture_output=True, text=True, check=True).stdout


def entries(text):
    """(kernel, architecture, bytes of stack, bytes spilled, static shared bytes) of each kernel in the compiler's report."""
    pattern = (r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes "
               r"spill loads.*?Used \d+ registers([^\n]*)")
    for name, arch, stack, stores, loads, rest in re.findall(pattern, text, re.S):
        shared = re.search(r"(\d+) bytes smem", rest)
        yield name, arch, int(stack), int(stores) + int(loads), int(shared[1]) if shared else 0


def faults(text):
    """What must not stand in a report."""
    for name, arch, stack, spilled, shared in entries(text):
        hot = next((hot for hot in HOT if hot in name), None)
        if hot and spilled:
            yield f"{name} {arch}: {spilled} bytes spilled"
        if hot and stack:
            yield f"{name} {arch}: {stack} bytes of local memory"
        budget = HOT.get(hot, SHARED_BYTES)
        if shared > budget:
            yield f"{name} {arch}: {shared} bytes of shared memory, budget {budget}"


def reports():
    return "".join(path.read_text() for path in sorted((BUILD / "modules/cuda").glob("*.cu.txt")))


def option(name):
    options = json.loads(subprocess.run(["meson", "introspect", "--buildoptions", BUILD], capture_output=True, text=True,
                                        check=True).stdout)
    return next(o["value"] for o in options if o["name"] == name)


def nvcc():
    return pathlib.Path(option("nvcc_dir") or os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/nvcc"


class Module(unittest.TestCase):
    def setUp(self):
        if not MODULE.exists():
            self.skipTest("afd-cuda.so was not built: no CUDA 13 was found")

    def test_it_needs_the_c_library_and_nothing_of_cuda_or_cxx(self):
        needed = re.findall(r"NEEDED.*\[(.*)\]", readelf("-d"))
        self.assertEqual([name for name in needed if not re.match(r"(libc|libm|ld-linux-x86-64|libdl|librt|libpthread)\.so", name)], [])
        self.assertIn("libc.so.6", needed)

    def test_it_has_no_runpath(self):
        self.assertNotRegex(readelf("-d"), "RUNPATH|RPATH")

    def test_it_shows_its_entry_and_nothing_else(self):
        symbols = [line.split() for line in readelf("--dyn-syms", "-W").splitlines()]
        shown = [words[7] for words in symbols if len(words) > 7 and words[4] == "GLOBAL" and words[6] != "UND"]
        self.assertEqual(shown, ["afd_module_entry"])

    def test_it_loads_without_a_driver(self):
        self.assertTrue(ctypes.CDLL(str(MODULE)).afd_module_entry)

    def test_a_machine_without_a_driver_is_told_so(self):
        if any(pathlib.Path("/dev").glob("nvidia*")):
            self.skipTest("this machine has a driver")
        if not (BUILD / "examples/afd-generate").exists():
            self.skipTest("a build without tools")
        done = subprocess.run([BUILD / "examples/afd-generate", "--model", ROOT / "tests/golden/bf16-tied", "--ids", "1", "--device",
                               "cuda:0"], capture_output=True, text=True,
                              env=dict(os.environ, AFD_MODULE_DIR=str(BUILD / "modules")))
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"^afd-generate: .*device cuda:0: no driver: [^\n]*\n$")

    def test_hot_kernels_spill_nothing_keep_no_local_array_and_stay_in_their_shared_memory(self):
        text = reports()
        self.assertEqual(list(faults(text)), [])
        seen = {(hot, arch) for name, arch, *_ in entries(text) for hot in HOT if hot in name}
        # Also the PTX: what is compiled of it for newer GPUs is not looked at.
        self.assertEqual(sorted({(hot, "sm_" + arch) for hot in HOT for arch in option("gpu_archs")} - seen), [])

    def test_each_of_these_faults_is_found_when_it_is_planted(self):
        planted = {"spilled": (["-maxrregcount=24"], "float a[64];\n#pragma unroll\nfor (int i = 0; i < 64; i++) a[i] = x[i * n];"
                               " for (int k = 0; k < n; k++) {\n#pragma unroll\nfor (int i = 0; i < 64; i++) a[i] = a[i] * x[k + i]; }"
                               "\n#pragma unroll\nfor (int i = 0; i < 64; i++) x[i + n] = a[i];"),
                   "local memory": ([], "float a[64]; for (int i = 0; i < n; i++) a[i * 7 & 63] = x[i]; x[0] = a[n & 63] + a[n / 2];"),
                   "shared memory": ([], "__shared__ float a[2048]; a[threadIdx.x] = x[n]; __syncthreads(); x[1] = a[n];")}
        for fault, (flags, body) in planted.items():
            with self.subTest(fault), tempfile.TemporaryDirectory() as folder:
                source = pathlib.Path(folder, "planted.cu")
                source.write_text(f"__global__ void norm_kernel(float *x, int n) {{ {body} }}\n")
                arch = option("gpu_archs")[0]
                done = subprocess.run([nvcc(), "-O3", "-Xptxas=-v", *flags, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-c",
                                       source, "-o", "/dev/null"], capture_output=True, text=True, check=True)
                self.assertIn(fault, " ".join(faults(done.stdout + done.stderr)))


class WholeModels(unittest.TestCase):
    """On the emulated GPU. What products round x to is most of the difference (docs/cuda.md)."""
    LIMITS = {"bf16-tied": 0.03, "odd-bf16": 0.03, "moe-bf16": 0.03, "afmoe-bf16": 0.03, "window-off": 0.03, "fp8-moe": 0.03,
              "fp8-ragged": 0.03, "f16-untied": 0.005, "moe-f16": 0.005, "f32-tied": 1e-4, "moe-f32": 1e-4}

    def logits(self, model, device, folder):
        with tempfile.NamedTemporaryFile(suffix=".npy") as file:
            subprocess.run([BUILD / "examples/afd-generate", "--model", ROOT / "tests/golden" / model, "--ids", "1 2 3 4 5 6 7",
                            "--max-tokens", "1", "--device", device, "--logits", file.name], check=True, capture_output=True,
                           env=dict(os.environ, AFD_MODULE_DIR=str(BUILD / folder)))
            data = pathlib.Path(file.name).read_bytes()
        return array.array("f", data[10 + int.from_bytes(data[8:10], "little"):])  # version 1 of the format

    def test_logits_on_the_emulated_gpu_are_near_those_of_the_cpu(self):
        if not (BUILD / "tests/emu/afd-cuda.so").exists() or not (BUILD / "examples/afd-generate").exists():
            self.skipTest("a build without the emulator or without tools")
        for model, limit in self.LIMITS.items():
            with self.subTest(model):
                want, got = self.logits(model, "cpu", "modules"), self.logits(model, "cuda:0", "tests/emu")
                self.assertEqual(len(want), len(got))
                error = math.fsum((a - b) ** 2 for a, b in zip(want, got)) / math.fsum(a * a for a in want)
                self.assertLess(math.sqrt(error), limit)


class Sources(unittest.TestCase):
    def test_words_of_cuda_stand_in_one_header_only(self):
        pattern = r"\basm\b|__shfl|__syncthreads|__shared__|__global__|__device__|threadIdx|blockIdx|<<<|nvcuda::|cuda_runtime\.h"
        for path in sorted((ROOT / "kernels/cuda").glob("*.[ch]*")):
            if path.name != "gpu.h":
                with self.subTest(path.name):
                    self.assertIsNone(re.search(pattern, path.read_text()))

    def test_what_the_fake_cublaslt_calls_by_name_has_the_values_of_the_real_one(self):
        folders = [folder for folder in (option("nvlibs_dir"), str(nvcc().parents[1])) if folder]
        if not any(pathlib.Path(folder, "include/cublasLt.h").exists() for folder in folders):
            self.skipTest("no cublasLt.h: scripts/get-cuda.sh --libs brings it")
        names = re.findall(r"\b(CUB\w+|CUDA_R_\w+) = \d+", (ROOT / "tests/emu/cublasLt.h").read_text())
        self.assertGreater(len(names), 25)
        said = []
        for flags in (["-I", ROOT / "tests/emu"], [f"-I{folder}/include" for folder in folders]):
            with tempfile.TemporaryDirectory() as folder:
                lines = "".join(f'printf("{name} %d\\n", (int){name});\n' for name in names)
                lines += 'printf("%zu", sizeof(cublasLtMatmulHeuristicResult_t));\n'
                pathlib.Path(folder, "values.c").write_text(f"#include <cublasLt.h>\n#include <stdio.h>\nint main(void) {{ {lines} }}\n")
                subprocess.run(["cc", *flags, "values.c", "-o", "values"], cwd=folder, check=True)
                said.append(subprocess.run([f"{folder}/values"], capture_output=True, text=True, check=True).stdout)
        self.assertEqual(*said)

    def test_the_toolkit_script_pins_every_version_and_refuses_wrong_usage(self):
        script = ROOT / "scripts/get-cuda.sh"
        packages = re.findall(r"nvidia-[\w-]+(==[\d.]+)?", script.read_text().split("compiler=")[1].split("\nwanted=")[0])
        self.assertGreaterEqual(len(packages), 7)
        self.assertTrue(all(packages))
        for arguments in ([], ["--libs"], ["a", "b"], ["a", "--libs", "c"]):
            done = subprocess.run([script, *arguments], capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stdout), (2, ""))
            self.assertIn("get-cuda.sh DIR", done.stderr)
