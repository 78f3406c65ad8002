#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Prints the header that tells builds apart: build_id.sh VERSION HEADER...
set -e
version=$1
shift
sum=$(cat "$@" | sha256sum | cut -c1-32)
printf '/* Generated. */\n#define AFD__BUILD_ID "afd %s %s"\n' "$version" "$sum"
