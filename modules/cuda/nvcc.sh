#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs nvcc and keeps what it says: nvcc.sh REPORT NVCC FLAG... It is shown when nvcc fails or warns.
report=$1
shift
"$@" >"$report" 2>&1
status=$?
if [ $status != 0 ] || grep -q 'warning' "$report"; then
	grep -v '^ptxas info' "$report" >&2
fi
exit $status
