# SPDX-License-Identifier: Apache-2.0
"""The form of the sources, as CONTRIBUTING.md says it."""
import re
import subprocess
import unittest

from sentences import ROOT

FILE_LINES = 700
FUNCTION_LINES = {"kernels": 120}  # elsewhere 60; tests 60
COLUMNS = 132                      # the aim is 100


def tracked():
    """Files of the repository, or of the tree when it is no repository."""
    try:
        listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True,
                                capture_output=True, check=True)
        paths = [ROOT / line for line in listed.stdout.splitlines()]
    except (OSError, subprocess.CalledProcessError):
        paths = [path for path in ROOT.rglob("*")
                 if not any(part.startswith((".git", "build")) for part in path.relative_to(ROOT).parts)]
    return sorted(path for path in paths if path.is_file())


FILES = tracked()
C_FILES = [path for path in FILES if path.suffix in (".c", ".h", ".cc", ".cu")]
CODE = C_FILES + [path for path in FILES if path.suffix in (".py", ".sh", ".map", ".in") or path.name == "meson.build"]


def functions(text):
    """(name, first line, lines) of each function; one starts where a brace stands alone in the first column."""
    name, start = None, 0
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if line == "{":
            head = " ".join(lines[max(0, number - 6):number - 1])
            names = re.findall(r"(\w+)\s*\(", head)
            name, start = (names[-1] if names else "?"), number
            for candidate in reversed(lines[max(0, number - 6):number - 1]):
                if re.match(r"[a-zA-Z]", candidate):
                    name = (re.search(r"(\w+)\s*\(", candidate) or [None, name])[1]
                    break
        elif line.startswith("}") and name:
            yield name, start, number - start + 1
            name = None


class Style(unittest.TestCase):
    def expect_none(self, places):
        places = [f"{path.relative_to(ROOT)}:{what}" for path, what in places]
        self.assertEqual(places[:12], [], f"{len(places)} places")

    def places(self, files, pattern):
        return [(path, number) for path in files for number, line in enumerate(path.read_text().split("\n"), 1)
                if re.search(pattern, line)]

    def test_every_source_names_its_licence_first(self):
        self.expect_none((path, 1) for path in CODE if path.suffix not in (".in", ".map")
                         and "SPDX-License-Identifier: Apache-2.0" not in "".join(path.read_text().splitlines(True)[:2]))

    def test_no_line_ends_in_white_space(self):
        self.expect_none(self.places(CODE, r"[ \t]$"))

    def test_c_is_indented_with_tabs(self):
        self.expect_none(self.places(C_FILES, r"^ (?!\*)"))

    def test_no_line_is_too_wide(self):
        self.expect_none((path, number) for path in C_FILES for number, line in enumerate(path.read_text().split("\n"), 1)
                         if len(line.expandtabs(8)) > COLUMNS)

    def test_every_file_ends_with_one_newline(self):
        self.expect_none((path, "end") for path in CODE
                         if path.stat().st_size and (path.read_text()[-1:] != "\n" or path.read_text()[-2:] == "\n\n"))

    def test_no_file_holds_two_ideas(self):
        self.expect_none((path, f"{n} lines, limit {FILE_LINES}") for path in C_FILES
                         for n in [path.read_text().count("\n")] if n > FILE_LINES)

    def test_no_function_is_too_long(self):
        self.expect_none((path, f"{start}: {name} has {n} lines, limit {limit}") for path in C_FILES
                         for limit in [FUNCTION_LINES.get(path.relative_to(ROOT).parts[0], 60)]
                         for name, start, n in functions(path.read_text()) if n > limit)

    def test_no_todo_is_without_an_issue(self):
        self.expect_none(self.places(C_FILES, r"\b(TODO|FIXME|XXX)\b(?!\(afd-\d+\))"))

    def test_every_header_of_the_library_is_guarded(self):
        self.expect_none((path, 1) for path in C_FILES if path.suffix == ".h"
                         and not re.search(r"^#ifndef (\w+)\n#define \1$", path.read_text(), re.M))

    def test_public_headers_have_no_bool_long_or_bit_field(self):
        headers = [path for path in C_FILES if path.parent == ROOT / "include/afd"]
        code = [(path, re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S)) for path in headers]
        self.expect_none((path, match[0]) for path, text in code
                         for match in re.finditer(r"\b(bool|long|wchar_t)\b|^\t\w+ \w+ : \d+;", text, re.M))
