#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds libafd and runs every suite of it. The last line is "N passed, N failed, N skipped"; above it stands why a test
# was skipped or failed. Exit 1 when one failed. On a fresh Debian or Ubuntu it installs what it needs, and says so.
set -u
cd "$(dirname "$0")/.."

usage() {
	cat <<-'TEXT'
	usage: tests/run.sh [--all] [--only PART,...] [--skip PART,...] [--no-install]

	  --all            also makes the golden files anew with torch and transformers, runs the slow cases, and writes
	                   docs/test-results.md
	  --only PART,...  these parts only
	  --skip PART,...  all but these
	  --no-install     install nothing; what is missing is skipped with its reason

	parts: plain     unit, conformance, system and fault suites on a release build
	       deferred  the tools with --device deferred (the system suite runs on both devices in plain)
	       tools     what the tools promise, across real processes
	       abi       symbols, headers, struct sizes, an installed copy that was moved
	       style     SPDX lines, white space, sizes of files and functions
	       asan      the suites under AddressSanitizer and UndefinedBehaviorSanitizer
	       tsan      the transport and server suites under ThreadSanitizer
	       fuzz      libFuzzer, 60 s for all targets; with --all ten minutes for each that strangers can reach, and one for
	                 each other (the corpus is replayed in plain and asan)
	       docs      the README, and that the documents list what is there
	       planted   bugs planted into the GPU kernels: the emulated tests must catch each (uses the asan and tsan builds)
	       cuda      the GPU module for all architectures (only with --all; tools looks at the one of the release build)
	       verbs     RDMA for real: over soft-RoCE in a small virtual machine (skipped where there cannot be one)
	       quickstart  examples/quickstart.sh from a fresh build
	       golden    the golden files, made anew (only with --all)
	TEXT
}

ALL=0 INSTALL=1 ONLY="" SKIP=""
while [ $# -gt 0 ]; do
	case $1 in
	--all) ALL=1 ;;
	--only) ONLY=",$2," && shift ;;
	--skip) SKIP=",$2," && shift ;;
	--no-install) INSTALL=0 ;;
	--help) usage && exit 0 ;;
	*) echo "tests/run.sh: $1: no such option, see --help" >&2 && exit 2 ;;
	esac
	shift
done

BUILDS=${AFD_TEST_BUILDS:-$PWD/build-test}
LOGS=$BUILDS/logs
RESULTS=$BUILDS/results.tsv
JOBS=$(nproc)
export PYTHONDONTWRITEBYTECODE=1
mkdir -p "$LOGS"
: >"$RESULTS"
PYTHON=python3
[ -x /usr/bin/python3 ] && PYTHON=/usr/bin/python3 # the one that python3-numpy belongs to

wanted() {
	case $SKIP in *",$1,"*) return 1 ;; esac
	case $ONLY in "" | *",$1,"*) return 0 ;; *) return 1 ;; esac
}

# result OUTCOME NAME [REASON]
result() { printf '%s\t%s\t%s\n' "$1" "$2" "${3-}" >>"$RESULTS"; }

say() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

# logged NAME COMMAND...: output goes to a log; on failure its end is shown.
logged() {
	local log=$LOGS/$1.log
	shift
	"$@" >"$log" 2>&1 && return 0
	echo "-- $* failed; the end of $log:"
	tail -n 25 "$log"
	return 1
}

install_needs() {
	local missing="" sudo="" name
	for name in meson ninja-build gcc g++ libc6-dev libjansson-dev libxxhash-dev libcmocka-dev libssl-dev pkg-config python3 python3-numpy \
		python3-matplotlib python3-pip python3-venv clang cmake abigail-tools iproute2 nftables \
		libibverbs-dev ibverbs-providers qemu-system-x86 busybox-static cpio kmod xz-utils; do
		dpkg-query -W -f '${Status}' "$name" 2>/dev/null | grep -q 'ok installed' || missing="$missing $name"
	done
	[ -z "$missing" ] && return 0
	if [ "$(id -u)" != 0 ]; then
		sudo=sudo
		command -v sudo >/dev/null || { echo "neither root nor sudo; please install:$missing" && return 0; }
	fi
	echo "about to install with apt-get:$missing"
	$sudo apt-get update -q >"$LOGS/apt.log" 2>&1
	DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -q --no-install-recommends $missing >>"$LOGS/apt.log" 2>&1 && return 0
	# One package that this release lacks must not keep the others away.
	for name in $missing; do
		DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -q --no-install-recommends "$name" >>"$LOGS/apt.log" 2>&1 ||
			echo "not installed: $name (see $LOGS/apt.log)"
	done
}

# build NAME OPTION...: configures once, builds always.
build() {
	local name=$1 dir=$BUILDS/$1
	shift
	if [ ! -f "$dir/build.ninja" ]; then
		rm -rf "$dir"
		logged "setup-$name" meson setup "$dir" -Dtests=enabled "$@" || { result failed "build $name: meson setup"; return 1; }
	fi
	logged "build-$name" ninja -C "$dir" -j "$JOBS" || { result failed "build $name: ninja"; return 1; }
	result passed "build $name: compiles"
}

# suites LABEL BUILD MULTIPLIER SUITE...: runs meson suites (all when none is named), and counts their cases.
suites() {
	local label=$1 dir=$BUILDS/$2 multiplier=$3 suite args=()
	shift 3
	for suite in "$@"; do args+=(--suite "$suite"); done
	rm -f "$dir/meson-logs/testlog.json"
	CMOCKA_MESSAGE_OUTPUT=TAP meson test -C "$dir" --no-rebuild --print-errorlogs -t "$multiplier" "${args[@]}" >"$LOGS/$label.log" 2>&1
	if [ ! -s "$dir/meson-logs/testlog.json" ]; then
		result failed "$label: the suites" "no test ran, see $LOGS/$label.log"
		return
	fi
	cp "$dir/meson-logs/testlog.json" "$LOGS/$label.json"
	$PYTHON tests/tools/results.py "$label" "$LOGS/$label.json" >>"$RESULTS" || result failed "$label: results.py"
}

# sentences NAME FILE...: Python tests; each prints its outcomes.
sentences() {
	local name=$1 log file
	shift
	for file in "$@"; do
		log=$LOGS/$name-$(basename "$file" .py)
		AFD_BUILD=$BUILDS/plain AFD_ALL=$ALL $PYTHON tests/tools/sentences.py "$name" "$file" >"$log.tsv" 2>"$log.log"
		local status=$?
		grep -P '^(passed|failed|skipped)\t' "$log.tsv" >>"$RESULTS"
		if [ $status != 0 ] && ! grep -qP '^failed\t' "$log.tsv"; then
			result failed "$name: $(basename "$file")" "exit $status: $(tail -n 1 "$log.log")"
		fi
	done
}

# fuzz_one TARGET SECONDS
fuzz_one() {
	local target=$1 seconds=$2 binary
	binary=$(find "$BUILDS/fuzz" -type f -name "${target}_libfuzzer" | head -n 1)
	rm -rf "$BUILDS/fuzz/corpus-$target" && mkdir -p "$BUILDS/fuzz/corpus-$target"
	if logged "$target" timeout $((seconds + 120)) "$binary" -max_total_time=$seconds -timeout=20 -rss_limit_mb=2048 \
		-artifact_prefix="$LOGS/$target-" "$BUILDS/fuzz/corpus-$target" "tests/fuzz/corpus/${target#fuzz_}"; then
		result passed "fuzz: $target finds nothing in $seconds seconds"
	else
		result failed "fuzz: $target finds nothing in $seconds seconds" "see $LOGS/$target.log and its artifacts there"
	fi
}

part_fuzz() {
	local target seconds long="" running=""
	if ! command -v clang >/dev/null || ! echo 'int LLVMFuzzerTestOneInput(void) { return 0; }' |
		clang -x c -fsanitize=fuzzer,address -o "$LOGS/fuzzer-probe" - 2>/dev/null; then
		result skipped "fuzz: libFuzzer" "clang with -fsanitize=fuzzer is not installed"
		return
	fi
	if [ ! -f "$BUILDS/fuzz/build.ninja" ]; then
		logged setup-fuzz env CC=clang meson setup "$BUILDS/fuzz" -Dtools=false -Dtests=enabled -Dbuildtype=debugoptimized \
			-Db_sanitize=address,undefined -Db_lundef=false -Dfuzzer=true \
			-Dc_args="-fsanitize-ignorelist=$PWD/tests/fuzz/ignore.txt" || { result failed "fuzz: meson setup"; return; }
	fi
	logged build-fuzz ninja -C "$BUILDS/fuzz" -j "$JOBS" $(ls tests/fuzz/fuzz_*.c | sed 's/\.c$/_libfuzzer/') || { result failed "fuzz: ninja"; return; }
	# With --all ten minutes for each of what strangers can reach, at once, and a minute for the others.
	seconds=$((60 / $(ls tests/fuzz/fuzz_*.c | wc -l)))
	[ $ALL = 1 ] && seconds=60
	for target in tests/fuzz/fuzz_*.c; do
		target=$(basename "$target" .c)
		case $ALL$target in
		1fuzz_frame | 1fuzz_link | 1fuzz_stream | 1fuzz_handshake) long="$long $target" ;;
		*) fuzz_one "$target" $seconds ;;
		esac
	done
	for target in $long; do
		fuzz_one "$target" 600 >"$LOGS/$target.said" 2>&1 &
		running="$running $!"
	done
	[ -z "$running" ] || wait $running
	for target in $long; do cat "$LOGS/$target.said"; done
}

# In the virtual machine: what of tests/verbs/run.sh, with that build.
verbs_run() { # LABEL BUILD WHAT
	local log=$LOGS/${1// /-}-$3.log
	timeout 1500 tests/verbs/vm.sh env AFD_ALL=$ALL tests/verbs/run.sh "$BUILDS/$2" "$3" "$1" >"$log" 2>&1 ||
		result failed "$1: the machine runs the $3 to its end" "see $log"
	tr -d '\r' <"$log" | grep -P '^(passed|failed|skipped)\t' >>"$RESULTS" ||
		result failed "$1: the machine runs the $3" "no outcome, see $log"
}

# Conformance and tools over soft-RoCE. The machine is emulated: minutes, and nothing else should run meanwhile.
part_verbs() {
	export AFD_VM_CACHE=${AFD_VM_CACHE:-$BUILDS/verbs-vm}
	if [ ! -e "$BUILDS/plain/modules/afd-verbs.so" ]; then
		result skipped "verbs: soft-RoCE" "this build has no afd-verbs.so: libibverbs-dev is not installed"
		return
	fi
	if ! logged verbs-prepare tests/verbs/vm.sh --prepare; then
		result skipped "verbs: soft-RoCE" "no virtual machine: $(tail -n 1 "$LOGS/verbs-prepare.log")"
		return
	fi
	verbs_run verbs plain conformance
	verbs_run verbs plain tools
	# Emulated, sanitizers take minutes.
	[ $ALL = 1 ] || return 0
	[ ! -e "$BUILDS/asan/modules/afd-verbs.so" ] || verbs_run "asan verbs" asan conformance
	[ ! -e "$BUILDS/tsan/modules/afd-verbs.so" ] || verbs_run "tsan verbs" tsan conformance
}

part_golden() {
	local venv=$BUILDS/venv
	echo "about to install torch (CPU) and transformers into $venv"
	if ! logged venv sh -c "python3 -m venv '$venv' && '$venv/bin/pip' install -q -r tests/golden/requirements.txt"; then
		result failed "golden: the packages of requirements.txt can be installed" "see $LOGS/venv.log"
		return
	fi
	AFD_BUILD=$BUILDS/plain logged golden "$venv/bin/python" tests/golden/make.py --check &&
		result passed "golden: transformers gives the recorded logits" ||
		result failed "golden: transformers gives the recorded logits" "see $LOGS/golden.log"
}

# CUDA: the options of a build with the GPU module. The toolkit is that of the machine, or comes from PyPI.
CUDA=(-Dcuda=disabled)
find_cuda() {
	local dir=${CUDA_HOME:-/usr/local/cuda}
	if [ ! -x "$dir/bin/nvcc" ]; then
		dir=$BUILDS/cuda13
		[ $INSTALL = 1 ] || [ -x "$dir/bin/nvcc" ] || { result skipped "cuda: the GPU module" "no nvcc, and nothing is installed"; return; }
		echo "about to put nvcc and the headers of CUDA into $dir"
		logged get-cuda scripts/get-cuda.sh "$dir" || { result skipped "cuda: the GPU module" "no nvcc: see $LOGS/get-cuda.log"; return; }
	fi
	CUDA=(-Dcuda=enabled -Dnvcc_dir="$dir")
}

write_report() {
	{
		echo "# Results of the tests"
		echo
		echo "Written by \`tests/run.sh --all\` on $(date -u +%F), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)," \
			"$(. /etc/os-release && echo "$PRETTY_NAME"), $(nproc) cores, $SECONDS s."
		echo
		echo "| part | passed | failed | skipped |"
		echo "|---|---|---|---|"
		awk -F '\t' '{ split($2, name, ":"); n[name[1], $1]++; seen[name[1]] = 1 }
			END { for (p in seen) printf "| %s | %d | %d | %d |\n", p, n[p, "passed"], n[p, "failed"], n[p, "skipped"] }' "$RESULTS" | sort
		echo
		echo "$1"
	} >docs/test-results.md
}

[ $INSTALL = 1 ] && say "what is needed" && install_needs
export ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1
DEBUG="-Dbuildtype=debugoptimized -Db_ndebug=false -Dtools=false -Dcuda=disabled"
if wanted plain || wanted tools || wanted abi || wanted deferred || wanted docs || wanted planted || wanted cuda || wanted verbs; then
	say "CUDA toolkit" && find_cuda
fi

if wanted plain || wanted tools || wanted abi || wanted deferred || wanted docs || wanted planted || wanted verbs; then
	say "release build" && build plain -Dbuildtype=release -Dprefix=/usr/local "${CUDA[@]}" -Dgpu_archs=90a || ONLY=",none," # nothing to run then
fi
wanted plain && say "plain suites" && suites plain plain 1
wanted tools && say "tools" && sentences tools tests/tools/test_*.py
wanted deferred && say "tools on the deferred device" &&
	AFD_TEST_DEVICE=deferred sentences deferred tests/tools/test_{layouts,gate,groups,golden,output,kills}.py
wanted abi && say "abi" && sentences abi tests/abi/check.py
wanted style && say "style" && sentences style tests/tools/style.py
wanted docs && say "docs" && sentences docs tests/tools/docs.py
wanted asan && say "AddressSanitizer, UndefinedBehaviorSanitizer" && build asan $DEBUG -Db_sanitize=address,undefined &&
	suites asan asan 5
wanted tsan && say "ThreadSanitizer" && build tsan $DEBUG -Db_sanitize=thread &&
	suites tsan tsan 5 conformance system
wanted planted && say "planted bugs" && sentences planted tests/emu/planted.py
wanted fuzz && say "fuzz" && part_fuzz
wanted verbs && say "verbs in a virtual machine" && part_verbs
wanted quickstart && say "quickstart" && sentences quickstart tests/tools/quickstart.py
[ $ALL = 1 ] && wanted cuda && say "CUDA for all architectures" && build cuda -Dtests=disabled -Dtools=false "${CUDA[@]}" &&
	AFD_BUILD=$BUILDS/cuda $PYTHON tests/tools/sentences.py cuda tests/tools/test_cuda.py 2>"$LOGS/cuda.log" >>"$RESULTS"
[ $ALL = 1 ] && wanted golden && say "golden files, made anew" && part_golden

say "results"
told() { awk -F '\t' -v outcome="$1" '$1 == outcome { printf "%s: %s%s\n", $1, $2, $3 == "" ? "" : ": " $3 }' "$RESULTS" | sort; }
told skipped
awk -F '\t' '{ split($2, name, ":"); n[name[1], $1]++; seen[name[1]] = 1 }
	END { for (p in seen) printf "%-24s %5d passed %3d failed %3d skipped\n", p, n[p, "passed"], n[p, "failed"], n[p, "skipped"] }' \
	"$RESULTS" | sort
told failed # near the end, where whoever keeps the end of the output still has it
echo "the logs are in $LOGS; $SECONDS s"
count() { grep -c "^$1	" "$RESULTS"; }
LINE="$(count passed) passed, $(count failed) failed, $(count skipped) skipped"
[ $ALL = 1 ] && [ -z "$ONLY$SKIP" ] && write_report "$LINE"
echo "$LINE"
[ "$(count failed)" = 0 ] && [ "$(count passed)" != 0 ]
