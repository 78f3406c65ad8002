#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds libafd with its CUDA module for the GPU of this machine, runs on it what can be checked on a GPU only, and measures.
# Needs nvcc 13, meson, ninja, a C and C++ compiler, python3; and no network. The last line is "N passed, N failed, N skipped".
set -u
cd "$(dirname "$0")/../.."

usage() {
	cat <<-'TEXT'
	usage: tests/gpu/run.sh [--emu] [--build DIR] [--out DIR] [--limit S] [PART...]

	  --emu        the emulated GPU instead of one: shows that this script and all it calls work, and nothing of a GPU
	  --build DIR  where to build (default build-gpu; build-gpu-emu with --emu)
	  --out DIR    where the results go: results.tsv, log.txt, ops.json, peers.json (default DIR of --build/results)

	  --limit S    what would begin later than S seconds from the start is skipped (default 450; 3600 with --emu)

	parts, all of them when none is named:
	  words        each word of kernels/cuda/gpu.h on random numbers, against its emulation
	  conformance  the suite of the device seam on cuda:0
	  models       operations at the dimensions of the published models, and whole models' logits, against the CPU
	  repeat       the same bits each time
	  bench        each operation against this GPU's own ceilings, PyTorch and published figures of others
	  sanitizer    words and operations under compute-sanitizer's memcheck, racecheck, initcheck and synccheck, where these work

	Where Jansson, cmocka, xxHash or pkg-config are missing, tests/gpu/pack.sh makes the folder build-pack on a machine with
	a network; bring it along beside the sources.
	TEXT
}

EMU=0 BUILD="" OUT="" LIMIT="" PARTS=()
while [ $# -gt 0 ]; do
	case $1 in
	--emu) EMU=1 ;;
	--build) BUILD=$2 && shift ;;
	--out) OUT=$2 && shift ;;
	--limit) LIMIT=$2 && shift ;;
	--help) usage && exit 0 ;;
	words | conformance | models | sanitizer | repeat | bench) PARTS+=("$1") ;;
	*) echo "tests/gpu/run.sh: $1: no such part or option, see --help" >&2 && exit 2 ;;
	esac
	shift
done
[ ${#PARTS[@]} = 0 ] && PARTS=(words conformance models repeat bench sanitizer)
[ -n "$LIMIT" ] || { [ $EMU = 1 ] && LIMIT=3600 || LIMIT=450; }
[ -n "$BUILD" ] || { [ $EMU = 1 ] && BUILD=build-gpu-emu || BUILD=build-gpu; }
mkdir -p "$BUILD" && BUILD=$(cd "$BUILD" && pwd)
[ -n "$OUT" ] || OUT=$BUILD/results
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd)
RESULTS=$OUT/results.tsv LOG=$OUT/log.txt
: >"$RESULTS"
: >"$LOG"
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
export PYTHONDONTWRITEBYTECODE=1 CMOCKA_MESSAGE_OUTPUT=TAP

say() { printf '== %s (%d s)\n' "$1" "$SECONDS" | tee -a "$LOG"; }

# result OUTCOME NAME [REASON]
result() { printf '%s\t%s\t%s\n' "$1" "$2" "${3-}" >>"$RESULTS"; }

# tap PART NAME SECONDS COMMAND...: counts the cases of a program that speaks TAP.
tap() {
	local part=$1 name=$2 limit=$3 status start=$SECONDS
	shift 3
	[ $((LIMIT - SECONDS)) -gt 5 ] || { result skipped "$part $name" "$LIMIT s are over, see --limit" && return; }
	timeout "$limit" "$@" >"$WORK/out" 2>"$WORK/err"
	status=$?
	{ echo "-- $part $name: $* (exit $status, $((SECONDS - start)) s)" && cat "$WORK/out" "$WORK/err"; } >>"$LOG"
	python3 tests/gpu/outcome.py "$part" "$name" "$status" "$limit" "$WORK/out" "$WORK/err" >>"$RESULTS" ||
		result failed "$part $name" "its outcome cannot be read"
}

# ---- build ----

find_nvcc() {
	local nvcc
	nvcc=${CUDA_HOME:-/usr/local/cuda}/bin/nvcc
	[ -x "$nvcc" ] || nvcc=$(readlink -f "$(command -v nvcc)" 2>/dev/null)
	NVCC_DIR=$(dirname "$(dirname "${nvcc:-/none/none/none}")")
}

# The one architecture of this machine's GPU, as nvcc writes it; the module's PTX is for others.
find_arch() {
	local capability
	capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ')
	case $capability in
	90) ARCH=90a ;;
	[0-9]*) ARCH=$capability ;;
	*) ARCH=90a ;;
	esac
}

# The folder that has lib/libcublasLt.so.13 and its headers: the toolkit, or the wheels that PyTorch brings.
find_cublaslt() {
	local folder
	CUBLASLT=""
	for folder in "$NVCC_DIR" $(python3 -c 'import nvidia; print(*(f"{p}/{d}" for p in nvidia.__path__ for d in ("cu13", "cublas")))' 2>/dev/null); do
		[ -f "$folder/include/cublasLt.h" ] && ls "$folder"/lib*/libcublasLt.so.1[23] >/dev/null 2>&1 && CUBLASLT=$folder && return
	done
}

# What is not installed comes from build-pack.
find_needs() {
	local pack=$PWD/build-pack
	if [ -x "$pack/bin/pkg-config" ]; then
		export PKG_CONFIG=$pack/bin/pkg-config LD_LIBRARY_PATH=$pack/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
	elif ! pkg-config --exists jansson cmocka; then
		echo "tests/gpu/run.sh: jansson or cmocka is missing and there is no build-pack: run tests/gpu/pack.sh on a machine with a network" >&2
		result failed "build: what it needs is there" "no jansson or cmocka, and no build-pack"
		return 1
	fi
}

build() {
	local options=(-Dbuildtype=release -Dtests=enabled -Dtls=disabled) targets
	find_needs || return 1
	if [ $EMU = 1 ]; then
		options+=(-Dcuda=disabled)
		CUBLASLT=$BUILD/tests/emu/libcublasLt-emu.so
		MODULES=$BUILD/tests/emu SIDE=$BUILD/tests/gpu/words-emu.so
		targets="tests/emu/afd-cuda.so tests/emu/libcublasLt-emu.so"
	else
		find_nvcc
		find_arch
		find_cublaslt
		options+=(-Dcuda=enabled -Dnvcc_dir="$NVCC_DIR" -Dgpu_archs="$ARCH" ${CUBLASLT:+-Dnvlibs_dir="$CUBLASLT"})
		MODULES=$BUILD/modules SIDE=$BUILD/tests/gpu/words-gpu.so
		targets="modules/afd-cuda.so tests/gpu/words-gpu.so"
	fi
	# Our own kernels, but where a part says otherwise.
	export AFD_MODULE_DIR=$MODULES AFD_CUDA_PRODUCTS=own
	if [ ! -f "$BUILD/build.ninja" ]; then
		meson setup "$BUILD" "${options[@]}" >>"$LOG" 2>&1 || { tail -n 20 "$LOG" && result failed "build: meson setup" && return 1; }
	fi
	# Of device_cuda, which is about the emulator's faults, some cases only.
	CONFORMANCE=$(ninja -C "$BUILD" -t targets all | sed -n 's/^tests\/conformance\/conformance_\(device_[a-z0-9_]*\): .*/\1/p' |
		grep -vx device_cuda | sort -u)
	targets="$targets examples/afd-generate examples/afd-bench tests/gpu/test_words tests/gpu/words-emu.so tests/gpu/test_dims"
	targets="$targets $(printf 'tests/conformance/conformance_%s ' $CONFORMANCE device_cuda)"
	ninja -C "$BUILD" $targets >>"$LOG" 2>&1 || { tail -n 25 "$LOG" && result failed "build: ninja" && return 1; }
	result passed "build: compiles${ARCH:+ for sm_$ARCH}"
}

# The device's own words for why it cannot; empty when it can.
why_no_gpu() {
	"$BUILD/examples/afd-generate" --model models/tiny-qwen3 --ids 1 --max-tokens 1 --device cuda:0 2>&1 >/dev/null |
		grep -oE 'no driver:.*|driver too old:.*|no device:.*|compute capability.*' | head -n 1
}

# ---- parts ----

part_words() { tap words "on ${SIDE##*/}" 60 "$BUILD/tests/gpu/test_words" "$SIDE" "$BUILD/tests/gpu/words-emu.so"; }

part_conformance() {
	local name
	for name in $CONFORMANCE; do
		# The rest of the suite runs on the emulator in CI, in several orders.
		[ $EMU = 1 ] && case $name in device_rows | device_convert | device_rope) ;; *) continue ;; esac
		AFD_TEST_MODULES=$BUILD/tests/conformance tap conformance "$name" 120 "$BUILD/tests/conformance/conformance_$name" cuda:0
	done
	recordings
	by_cublaslt conformance device_dense 120 "$BUILD/tests/conformance/conformance_device_dense" cuda:0
}

# by_cublaslt PART NAME SECONDS COMMAND...: the same with products by the library, wherever that can.
by_cublaslt() {
	[ -n "$CUBLASLT" ] || { result skipped "$1 $2 by cuBLASLt" "no folder with cublasLt.h and libcublasLt.so" && return; }
	AFD_CUDA_PRODUCTS=cublaslt AFD_CUBLASLT=$CUBLASLT tap "$1" "$2, by cuBLASLt" "$3" "${@:4}"
}

recordings() {
	local only
	for only in "what_depends*" "long_transfers*" "the_descriptor*"; do
		AFD_TEST_ONLY=$only tap conformance "device_cuda, $only" 60 "$BUILD/tests/conformance/conformance_device_cuda" cuda:0
	done
}

part_models() {
	if [ $EMU = 1 ]; then
		AFD_DIMS_SHRINK=32 tap models operations 120 "$BUILD/tests/gpu/test_dims" cuda:0
		tap models logits 120 python3 tests/gpu/models.py --build "$BUILD" --emu
	else
		tap models operations 120 "$BUILD/tests/gpu/test_dims" cuda:0
		by_cublaslt models operations 120 "$BUILD/tests/gpu/test_dims" cuda:0
		tap models logits 180 python3 tests/gpu/models.py --build "$BUILD" --folder "$WORK"
	fi
}

part_repeat() {
	AFD_DIMS_SHRINK=$([ $EMU = 1 ] && echo 32 || echo 4) AFD_DIMS_REPEAT=$([ $EMU = 1 ] && echo 1 || echo 20) \
		tap repeat operations 120 "$BUILD/tests/gpu/test_dims" cuda:0
	tap repeat logits 120 python3 tests/gpu/models.py --build "$BUILD" --folder "$WORK" --repeat \
		$([ $EMU = 1 ] && echo --emu) --only qwen3-8b,qwen3-30b-a3b --dtype bf16
}

# Whether the tool finds the fault that it is for.
sanitizer_works() {
	"$SANITIZER" --tool "$1" --error-exitcode 9 "$WORK/probe" "$1" >"$WORK/probe.txt" 2>&1
	[ $? = 9 ] || { cat "$WORK/probe.txt" >>"$LOG" && return 1; }
}

part_sanitizer() {
	local tool name
	if [ $EMU = 1 ]; then
		result skipped "sanitizer" "compute-sanitizer needs a GPU; the emulator runs under the host's sanitizers in tests/run.sh"
		return
	fi
	SANITIZER=$(command -v compute-sanitizer || ls "$NVCC_DIR"/bin/compute-sanitizer "$NVCC_DIR"/compute-sanitizer/compute-sanitizer \
		/opt/nvidia/*/compute-sanitizer 2>/dev/null | head -n 1)
	[ -n "$SANITIZER" ] || { result skipped "sanitizer" "compute-sanitizer is not installed" && return; }
	"$NVCC_DIR/bin/nvcc" -gencode "arch=compute_$ARCH,code=sm_$ARCH" -o "$WORK/probe" tests/gpu/sanitizer_probe.cu >>"$LOG" 2>&1 ||
		{ result failed "sanitizer: its probe compiles" && return; }
	for tool in memcheck racecheck initcheck synccheck; do
		if ! sanitizer_works $tool; then
			result skipped "sanitizer $tool" "it does not find a planted fault on this machine: $(tail -n 1 "$WORK/probe.txt")"
			continue
		fi
		result passed "sanitizer $tool: a planted fault is found"
		# Its own exit status is a failure even where every case passes.
		AFD_WORDS_ROUNDS=1 tap "sanitizer $tool" words 60 "$SANITIZER" --tool $tool --error-exitcode 9 --log-file "$WORK/san.txt" \
			"$BUILD/tests/gpu/test_words" "$SIDE" "$BUILD/tests/gpu/words-emu.so"
		cat "$WORK/san.txt" >>"$LOG" 2>/dev/null
		AFD_DIMS_SHRINK=32 AFD_TEST_ONLY="*_trinity_mini_*" tap "sanitizer $tool" operations 90 "$SANITIZER" --tool $tool --error-exitcode 9 --log-file "$WORK/san.txt" \
			"$BUILD/tests/gpu/test_dims" cuda:0
		cat "$WORK/san.txt" >>"$LOG" 2>/dev/null
	done
}

# Products of many rows by our kernels and by the library: ops-own-bf16.txt, ops-cublaslt-fp8.txt ...
bench_both_ways() {
	local way dtype rows=64,65,128,256,1024,4096 matrices=6144x4096,4096x12288
	[ $EMU = 1 ] && rows=8 matrices=64x64
	for way in own cublaslt; do
		[ $way = own ] || [ -n "$CUBLASLT" ] || continue
		for dtype in bf16 fp8; do
			AFD_CUDA_PRODUCTS=$way AFD_CUBLASLT=$CUBLASLT timeout 60 "$BUILD/examples/afd-bench" ops --device cuda:0 \
				--matrices $matrices --rows $rows --dtype $dtype --seconds 4 >"$OUT/ops-$way-$dtype.txt" 2>>"$LOG" &&
				result passed "bench: products in $dtype by $way" ||
				result failed "bench: products in $dtype by $way" "see log.txt"
			{ echo "-- products by $way" && cat "$OUT/ops-$way-$dtype.txt"; } >>"$LOG"
		done
	done
}

part_bench() {
	local start=$SECONDS status
	[ $((LIMIT - SECONDS)) -gt 60 ] || { result skipped "bench" "too little is left of $LIMIT s, see --limit" && return; }
	timeout 210 python3 tests/gpu/peers.py --build "$BUILD" --out "$OUT" $([ $EMU = 1 ] && echo --emu) >"$WORK/bench" 2>"$WORK/err"
	status=$?
	{ echo "-- bench (exit $status, $((SECONDS - start)) s)" && cat "$WORK/bench" "$WORK/err"; } >>"$LOG"
	[ $status = 0 ] && result passed "bench: every operation is measured" ||
		result failed "bench: every operation is measured" "exit $status: $(tail -n 1 "$WORK/err")"
	# What one line of a terminal can show of it; all of it is in log.txt.
	sed -n '/^summary/,$p' "$WORK/bench" >"$WORK/summary"
	bench_both_ways
}

# ---- all of it ----

say "build"
start=$SECONDS
if build; then
	printf 'build\t%d\n' $((SECONDS - start)) >>"$WORK/times"
	reason=$(why_no_gpu)
	for part in "${PARTS[@]}"; do
		say "$part"
		start=$SECONDS
		if [ -n "$reason" ]; then
			result skipped "$part" "$reason"
		else
			"part_$part"
		fi
		printf '%s\t%d\n' "$part" $((SECONDS - start)) >>"$WORK/times"
	done
fi

awk -F '\t' '$1 == "failed" { printf "failed: %s%s\n", $2, $3 == "" ? "" : ": " $3 }' "$RESULTS" | cut -c 1-300 | head -n 40
awk -F '\t' '$1 == "skipped" { printf "skipped: %s%s\n", $2, $3 == "" ? "" : ": " $3 }' "$RESULTS" | cut -c 1-300
[ -s "$WORK/summary" ] && cat "$WORK/summary"
printf '%-12s %7s %7s %8s %5s\n' part passed failed skipped s
awk -F '\t' 'NR == FNR { s[$1] = $2; order[++n] = $1; next }
	{ split($2, name, /[ :]/); count[name[1], $1]++ }
	END { for (i = 1; i <= n; i++) { p = order[i]
		printf "%-12s %7d %7d %8d %5d\n", p, count[p, "passed"], count[p, "failed"], count[p, "skipped"], s[p] } }' \
	"$WORK/times" "$RESULTS" 2>/dev/null
echo "$([ $EMU = 1 ] && echo "the emulated GPU" || nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1), $(date -u +%F), $SECONDS s; all of it is in $OUT"
count() { grep -c "^$1	" "$RESULTS"; }
echo "$(count passed) passed, $(count failed) failed, $(count skipped) skipped"
[ "$(count failed)" = 0 ] && [ "$(count passed)" != 0 ]
