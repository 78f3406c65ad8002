# SPDX-License-Identifier: Apache-2.0
"""The documents say what is there: the README's program and commands, and every parameter, variable, metric and error."""
import re
import subprocess
import unittest

from sentences import BUILD, ROOT

README = (ROOT / "README.md").read_text()
OPERATIONS = (ROOT / "docs/operations.md").read_text()
CONTEXT = (ROOT / "include/afd/context.h").read_text()
TOOLS = [["afd-inspect"], ["afd-serve-ffn"], ["afd-generate"], ["afd-bench"],
         *(["afd-plan", command] for command in ("size", "simulate", "roofline", "report", "calibrate"))]


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.[ch]"))]


def parameters():
    """(struct, field) of every public parameter struct."""
    for header in sorted((ROOT / "include/afd").glob("*.h")):
        text = re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.S)
        for name, body in re.findall(r"^struct (afd_\w+_params) \{(.*?)^\};", text, re.M | re.S):
            for line in body.split(";"):
                for field in re.findall(r"(\w+)\s*(?:\[[^\]]*\])?\s*(?:,|$)", line.strip()):
                    if field != "size" and not field.startswith("_pad"):
                        yield name, field


class Readme(unittest.TestCase):
    def test_the_listing_is_the_example_that_the_tests_run(self):
        hello = (ROOT / "examples/hello.c").read_text()
        listing = re.search(r"```c\n(.*?)```", README, re.S)[1]
        self.assertTrue(hello.endswith(listing))
        self.assertIn("int main", listing)

    def test_every_link_of_every_document_leads_somewhere(self):
        for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "tests").rglob("*.md")]:
            for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
                with self.subTest(f"{path.name}: {target}"):
                    self.assertTrue("://" in target or (path.parent / target).exists())

    def test_the_commands_by_hand_are_there(self):
        for command in set(re.findall(r"build/examples/([a-z-]+)", README)):
            with self.subTest(command):
                self.assertTrue((BUILD / "examples" / command).exists())
        for script in ("examples/quickstart.sh", "examples/launch.sh", "tests/run.sh", ".ci/run"):
            with self.subTest(script):
                self.assertTrue((ROOT / script).stat().st_mode & 0o111)
                subprocess.run(["bash", "-n", ROOT / script], check=True)

    def test_it_fits_on_a_screen_or_two(self):
        self.assertLessEqual(README.count("\n"), 100)


class Operations(unittest.TestCase):
    def expect(self, names):
        names = set(names)
        self.assertTrue(names)
        self.assertEqual(sorted(name for name in names if f"`{name}`" not in OPERATIONS), [])

    def test_every_parameter_is_listed(self):
        self.expect(field for _, field in parameters())

    def test_every_flag_of_every_tool_is_listed(self):
        flags = set()
        for tool, *command in TOOLS:
            done = subprocess.run([BUILD / "examples" / tool, *command, "--help"], text=True, capture_output=True, check=True)
            flags.update(re.findall(r"^\s+(--[a-z0-9-]+)", done.stdout, re.M))
        self.expect(flags)

    def test_every_environment_variable_is_listed(self):
        self.expect(name for path in sources("lib", "kernels", "modules", "examples")
                    for name in re.findall(r'"(AFD_[A-Z_]+)"', path.read_text()))

    def test_every_metric_is_listed(self):
        self.expect(name for path in sources("lib", "modules")
                    for name in re.findall(r'"(afd_\w+_(?:total|seconds|peers|free|sequences|pass|bytes|rows))"', path.read_text()))

    def test_every_error_is_listed(self):
        listed = CONTEXT[CONTEXT.index("Error codes, a closed list"):]
        self.expect(re.findall(r"-(E[A-Z0-9]+)", listed[:listed.index("*/")]))

    def test_no_error_outside_the_closed_list_is_returned(self):
        closed = set(re.findall(r"-(E[A-Z0-9]+)", CONTEXT))
        used = {name for path in sources("lib", "kernels") for name in re.findall(r"return -(E[A-Z0-9]+)\b", path.read_text())}
        used |= {name for path in sources("lib", "kernels") for name in re.findall(r"afd__error\(-(E[A-Z0-9]+)\b", path.read_text())}
        self.assertEqual(sorted(used - closed), [])
