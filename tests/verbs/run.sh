#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Inside the virtual machine (tests/verbs/vm.sh): conformance and tools over verbs. usage: tests/verbs/run.sh BUILD [conformance|tools [LABEL]]
# Each outcome is one line on stdout: passed, failed or skipped, its name, a reason. Details are on stderr.
set -u
cd "$(dirname "$0")/../.."
BUILD=$(realpath "$1")
tests/verbs/ports.sh || exit 125
case ${2-all} in conformance | all) python3 tests/verbs/conformance.py "$BUILD" "${3-verbs}" ;; esac
case ${2-all} in tools | all) AFD_BUILD=$BUILD python3 tests/tools/sentences.py verbs tests/verbs/inside.py ;; esac
exit 0
