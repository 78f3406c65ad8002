#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The promises of docs/abi.md, held against a release build (AFD_BUILD) and against an installed copy of it that was moved.

Run by sentences.py. Standard library only. Tools that may be missing (abidiff, cmake, clang) skip their sentence with the reason.
check.py --record writes tests/abi/libafd.abi anew: only for a release that may change the ABI.
"""
import atexit
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tools"))
from sentences import BUILD, ROOT  # noqa: E402

HEADERS = sorted((ROOT / "include/afd").glob("*.h"))
MAP = ROOT / "lib/libafd.map"
DUMP = HERE / "libafd.abi"
LIBRARY = BUILD / "libafd.so"
MODEL = ROOT / "models/tiny-qwen3"
STRICT = ["-pedantic", "-Wall", "-Wextra", "-Werror"]
SCRATCH = pathlib.Path(tempfile.mkdtemp(prefix="afd-abi-"))
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)


def run(*command, **options):
    """stdout of a command that must succeed."""
    done = subprocess.run([str(word) for word in command], text=True, capture_output=True, timeout=300, **options)
    if done.returncode:
        raise AssertionError(f"{' '.join(map(str, command))}: exit {done.returncode}: {(done.stderr or done.stdout)[-900:]}")
    return done.stdout


def need(tool):
    if not shutil.which(tool):
        raise unittest.SkipTest(f"{tool} is not installed")


def version():
    text = (ROOT / "include/afd/version.h").read_text()
    return [int(re.search(rf"AFD_VERSION_{part}\s+(\d+)", text)[1]) for part in ("MAJOR", "MINOR", "PATCH")]


def exported():
    lines = run("nm", "-D", "--defined-only", LIBRARY).splitlines()
    return {line.split()[2].split("@")[0] for line in lines if line.split()[1] in "TDBRWV"}


def mapped():
    return re.findall(r"^\t(\w+);$", MAP.read_text(), re.M)


def declared():
    """Names of functions that stand after AFD_API in the headers as the compiler sees them."""
    names = set()
    for header in HEADERS:
        text = re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.S)
        text = re.sub(r"^#.*(?:\\\n.*)*", "", text, flags=re.M)
        names.update(re.findall(r"AFD_API\b[^;(]*?\b(afd_\w+)\s*\(", text))
    return names


@functools.lru_cache
def moved():
    """A prefix that was installed under one path and moved to another."""
    destdir = SCRATCH / "destdir"
    run("meson", "install", "-C", BUILD, "--no-rebuild", "--quiet", "--destdir", destdir)
    prefix = next(path.parent for path in destdir.rglob("include") if path.is_dir())
    target = SCRATCH / "moved here"  # with a space: nobody may split it
    shutil.move(prefix, target)
    return target


def libdir():
    return next(moved().rglob("libafd.so")).parent


def package_env():
    return {**os.environ, "PKG_CONFIG_PATH": str(libdir() / "pkgconfig"), "LD_LIBRARY_PATH": str(libdir())}


def package_flags():
    flags = run("pkg-config", "--cflags", "--libs", "afd", env=package_env())
    return [flag.replace("\\ ", " ") for flag in re.findall(r"(?:\\ |\S)+", flags)]


def build_installed(source, language="c11"):
    """The program in source, built by pkg-config against the moved copy."""
    out = SCRATCH / f"{source.stem}-{language}"
    compiler = ["g++", "-x", "c++"] if "++" in language else ["gcc"]
    run(*compiler, f"-std={language}", "-D_GNU_SOURCE", "-Wall", "-Werror", "-O2", source, "-x", "none", "-o", out,
        *package_flags(), env=package_env())
    return out


def dump(path):
    """The types and functions of the headers, as a library made of them alone: no private type can show. That the real
    library exports just these functions is a sentence of its own."""
    source, library = SCRATCH / "headers.c", SCRATCH / "libafd.so"
    bodies = ["#include <afd/afd.h>"]
    for header in HEADERS:
        text = re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.S)
        for declaration in re.findall(r"^AFD_API\s+([^;]+);", text, re.M):
            nothing = re.match(r"void\s+\w", declaration)
            bodies.append(f"{declaration} {{ {'' if nothing else 'return 0; '}}}")
    source.write_text("\n".join(bodies) + "\n")
    run("gcc", "-std=c11", "-g", "-shared", "-fPIC", f"-I{ROOT / 'include'}", f"-Wl,--version-script,{MAP}",
        f"-Wl,-soname,libafd.so.{version()[0]}", "-o", library, source)
    run("abidw", "--no-corpus-path", "--no-comp-dir-path", "--no-show-locs", "--no-elf-needed", "--out-file", path, library)
    path.write_text(re.sub(r" path='[^']*'", "", path.read_text()))
    return path


class Symbols(unittest.TestCase):
    def test_exported_symbols_are_those_of_the_map(self):
        self.assertEqual(exported() - {f"AFD_{version()[0]}.{version()[1]}"}, set(mapped()))

    def test_declared_functions_are_those_of_the_map(self):
        self.assertEqual(declared(), set(mapped()))

    def test_the_map_is_sorted_and_has_no_wildcard(self):
        names = mapped()
        self.assertEqual(names, sorted(names))
        self.assertEqual(re.findall(r"^\t(\S*\*\S*);$", MAP.read_text(), re.M), ["*"])  # local: * alone

    def test_the_newest_node_of_the_map_is_the_version_of_the_header(self):
        nodes = re.findall(r"^AFD_(\d+)\.(\d+) \{", MAP.read_text(), re.M)
        self.assertEqual([int(part) for part in nodes[-1]], version()[:2])

    def test_every_global_of_the_objects_begins_with_afd(self):
        lines = run("nm", "-g", "--defined-only", BUILD / "libafd_all.a", *BUILD.glob("**/lib*kernel*.a")).splitlines()
        names = {line.split()[2] for line in lines if len(line.split()) == 3}
        self.assertGreater(len(names), 50)
        self.assertEqual([name for name in sorted(names) if not name.startswith("afd_")], [])


class Binary(unittest.TestCase):
    def dynamic(self, key):
        return re.findall(rf"\({key}\).*\[(.*)\]", run("readelf", "-d", LIBRARY))

    def test_the_library_needs_libc_libm_and_jansson_only(self):
        needed = {name.split(".so")[0] for name in self.dynamic("NEEDED")}
        self.assertLessEqual(needed, {"libc", "libm", "libjansson", "ld-linux-x86-64"})
        self.assertIn("libjansson", needed)

    def test_the_soname_is_the_major_version(self):
        self.assertEqual(self.dynamic("SONAME"), [f"libafd.so.{version()[0]}"])

    def test_the_library_has_no_runpath(self):
        self.assertEqual(self.dynamic("RUNPATH") + self.dynamic("RPATH"), [])

    def test_the_library_never_exits_aborts_prints_or_touches_signals(self):
        lines = run("nm", "-D", "-u", LIBRARY).splitlines()
        used = {line.split()[-1].split("@")[0] for line in lines}
        banned = {"exit", "_exit", "_Exit", "quick_exit", "abort", "printf", "puts", "putchar", "perror", "fprintf", "vprintf",
                  "vfprintf", "fputs", "fputc", "fwrite", "dprintf", "__printf_chk", "__fprintf_chk", "__vfprintf_chk", "stdout",
                  "stderr", "signal", "sigaction", "atexit", "on_exit", "system", "popen"}
        self.assertIn("free", used)  # the list was read
        self.assertEqual(sorted(used & banned), [])

    def test_a_release_build_has_no_asserts(self):
        self.assertNotIn("__assert_fail", run("nm", "-D", "-u", LIBRARY))


class Headers(unittest.TestCase):
    def compile_alone(self, compiler, language, suffix):
        for header in HEADERS:
            with self.subTest(header.name):
                source = SCRATCH / f"alone{suffix}"
                source.write_text(f"#include <afd/{header.name}>\nint afd_nothing;\n")
                run(compiler, f"-std={language}", *STRICT, "-fsyntax-only", f"-I{ROOT / 'include'}", source)

    def test_every_header_alone_compiles_as_pedantic_c11(self):
        self.compile_alone("gcc", "c11", ".c")

    def test_every_header_alone_compiles_as_pedantic_cpp11(self):
        need("g++")
        self.compile_alone("g++", "c++11", ".cpp")

    def test_every_header_alone_compiles_with_clang(self):
        need("clang")
        self.compile_alone("clang", "c11", ".c")

    def test_headers_include_nothing_but_stddef_stdint_and_each_other(self):
        known = {"stddef.h", "stdint.h"} | {header.name for header in HEADERS}
        for header in HEADERS:
            with self.subTest(header.name):
                self.assertLessEqual(set(re.findall(r"#include [<\"](.*)[>\"]", header.read_text())), known)

    def test_every_header_is_installed(self):
        installed = sorted(path.name for path in (moved() / "include/afd").glob("*.h"))
        self.assertEqual(installed, [header.name for header in HEADERS])


class Dump(unittest.TestCase):
    def test_the_abi_is_that_of_the_stored_dump(self):
        need("abidiff")
        run("abidiff", DUMP, dump(SCRATCH / "now.abi"))

    def test_a_field_that_changes_would_be_noticed(self):
        need("abidiff")
        text, field = dump(SCRATCH / "now.abi").read_text(), "<var-decl name='page_size'"
        at = text.rindex("layout-offset-in-bits='", 0, text.index(field)) + len("layout-offset-in-bits='")
        changed = SCRATCH / "changed.abi"
        changed.write_text(text[:at] + "1" + text[at:])
        with self.assertRaisesRegex(AssertionError, "page_size"):
            run("abidiff", DUMP, changed)


class Installed(unittest.TestCase):
    def run_consumer(self, program):
        self.assertIn("library " + ".".join(map(str, version())), run(program, env=package_env()))

    def test_a_c11_consumer_links_through_pkg_config(self):
        self.run_consumer(build_installed(HERE / "consumer/consumer.c", "c11"))

    def test_a_cpp11_consumer_links_through_pkg_config(self):
        need("g++")
        self.run_consumer(build_installed(HERE / "consumer/consumer.c", "c++11"))

    def link_with_cmake(self, language):
        need("cmake")
        build = SCRATCH / f"cmake-{language}"
        run("cmake", "-G", "Ninja", "-S", HERE / "consumer", "-B", build, f"-DLANGUAGE={language}", f"-DCMAKE_PREFIX_PATH={moved()}")
        run("cmake", "--build", build)
        self.run_consumer(build / "consumer")

    def test_a_c11_consumer_links_through_cmake(self):
        self.link_with_cmake("C")

    def test_a_cpp11_consumer_links_through_cmake(self):
        self.link_with_cmake("CXX")

    def test_no_file_that_was_moved_knows_where_it_was(self):
        for path in [*libdir().rglob("*.pc"), *libdir().rglob("*.cmake")]:
            with self.subTest(path.name):
                self.assertNotIn(str(SCRATCH), path.read_text())
                self.assertNotIn("/usr/local", path.read_text())

    def test_the_moved_tools_find_the_moved_library(self):
        env = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
        for tool in ("afd-inspect", "afd-serve-ffn", "afd-generate", "afd-bench"):
            with self.subTest(tool):
                self.assertIn(".".join(map(str, version())), run(moved() / "bin" / tool, "--version", env=env))

    def test_the_moved_library_finds_its_modules_beside_itself(self):
        if not (libdir() / "afd/afd-deferred.so").exists():
            raise unittest.SkipTest("the build has no module (-Ddeferred=false)")
        env = {key: value for key, value in os.environ.items() if key not in ("LD_LIBRARY_PATH", "AFD_MODULE_DIR")}
        tool = [moved() / "bin/afd-generate", "--model", MODEL, "--ids", "1 2 3", "--max-tokens", "4"]
        self.assertEqual(run(*tool, "--device", "deferred", env=env), run(*tool, env=env))


class Examples(unittest.TestCase):
    """Built as a host would: from the sources, against the moved copy."""

    def run_example(self, name, *args):
        return run(build_installed(ROOT / f"examples/{name}.c"), *args, env=package_env())

    def test_hello_decodes_the_token_of_a_single_process(self):
        alone = run(moved() / "bin/afd-generate", "--model", MODEL, "--ids", "1 2 3", "--max-tokens", "1").strip()
        self.assertEqual(self.run_example("hello", MODEL), f"after 1 2 3 comes {alone}\n")

    def test_own_engine_gives_the_bits_of_a_direct_run(self):
        self.assertIn("bits: equal", self.run_example("own_engine"))

    def test_event_loop_gives_the_bits_of_a_plain_run(self):
        other = ROOT / "tests/golden/sharded-two"
        self.assertIn("bits: equal", self.run_example("event_loop", MODEL, other))


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit(__doc__)
    dump(DUMP)
