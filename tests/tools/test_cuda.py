# SPDX-License-Identifier: Apache-2.0
"""The module afd-cuda.so as it was built: what it needs, what it shows, and what the compiler said of its kernels. No GPU."""
import ctypes
import os
import pathlib
import re
import subprocess
import unittest

from sentences import BUILD, ROOT

MODULE = BUILD / "modules/afd-cuda.so"
# Kernels that a decode step spends its time in: no spills, no arrays in local memory.
HOT = ["tile_kernel", "slices_kernel", "inputs_bf16_kernel", "inputs_fp8_kernel", "attend_split_kernel", "merge_splits_kernel",
       "norm_kernel", "rope_kernel", "activation_kernel", "convert_kernel", "route_kernel", "activate_kernel", "combine_kernel"]
SHARED_BYTES = 48 << 10  # static; what is asked for at a launch is checked under emulation


def readelf(*flags):
    return subprocess.run(["readelf", *flags, MODULE], capture_output=True, text=True, check=True).stdout


def reports():
    """(kernel, stack, spills, static shared memory, registers) of every kernel and architecture."""
    pattern = (r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes "
               r"spill loads.*?Used (\d+) registers([^\n]*)")
    for path in sorted((BUILD / "modules/cuda").glob("*.cu.txt")):
        for name, arch, stack, stores, loads, registers, rest in re.findall(pattern, path.read_text(), re.S):
            shared = re.search(r"(\d+) bytes smem", rest)
            yield f"{name} {arch}", int(stack), int(stores) + int(loads), int(shared[1]) if shared else 0, int(registers)


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

    def test_hot_kernels_spill_nothing_and_keep_no_array_in_local_memory(self):
        seen = set()
        for name, stack, spills, shared, _ in reports():
            hot = next((hot for hot in HOT if hot in name), None)
            seen.add(hot)
            if hot:
                self.assertEqual((name, stack, spills), (name, 0, 0))
        self.assertEqual(sorted(set(HOT) - seen), [])

    def test_no_kernel_has_more_static_shared_memory_than_every_gpu_gives(self):
        found = list(reports())
        self.assertTrue(found)
        for name, _, _, shared, _ in found:
            self.assertLessEqual(shared, SHARED_BYTES, name)


class Sources(unittest.TestCase):
    def test_words_of_cuda_stand_in_one_header_only(self):
        pattern = r"\basm\b|__shfl|__syncthreads|__shared__|__global__|__device__|threadIdx|blockIdx|<<<|nvcuda::|cuda_runtime\.h"
        for path in sorted((ROOT / "kernels/cuda").glob("*.[ch]*")):
            if path.name != "gpu.h":
                with self.subTest(path.name):
                    self.assertIsNone(re.search(pattern, path.read_text()))

    def test_the_toolkit_script_pins_every_version_and_refuses_wrong_usage(self):
        script = ROOT / "scripts/get-cuda.sh"
        packages = re.findall(r"nvidia-[\w-]+(==[\d.]+)?", script.read_text().split("compiler=")[1].split("\nwanted=")[0])
        self.assertGreaterEqual(len(packages), 7)
        self.assertTrue(all(packages))
        for arguments in ([], ["--libs"], ["a", "b"], ["a", "--libs", "c"]):
            done = subprocess.run([script, *arguments], capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stdout), (2, ""))
            self.assertIn("get-cuda.sh DIR", done.stderr)
