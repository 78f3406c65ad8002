#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# From nothing to text: installs what is needed, builds, starts one FFN process and two attention processes over shared
# memory, prints what they wrote, how fast, and whether a single process writes the same. Leaves no process behind.
#
#   examples/quickstart.sh [MODEL_DIR]      a checkpoint directory of Hugging Face; default models/tiny-qwen3
#
# models/ has others to try; examples/launch.sh runs any layout of them.
set -eu
CALLED_FROM=$PWD
cd "$(dirname "$0")/.."
case ${1-} in
-h | --help) sed -n '4,9s/^# \{0,1\}//p' "$0" && exit 0 ;;
/*) MODEL=$1 ;;
"") MODEL=models/tiny-qwen3 ;;
*) MODEL=$CALLED_FROM/$1 ;;
esac
BUILD=build-quickstart
TOKENS=48
PROMPTS=("In the beginning" "And the king said unto")
IDS=("1 2 3 4" "5 6 7 8") # of a model without a tokenizer.json

SCRATCH=$(mktemp -d)
SERVER=""
end() {
	[ -z "$SERVER" ] || kill "$SERVER" 2>/dev/null || true
	for child in $(jobs -p); do kill "$child" 2>/dev/null || true; done
	wait 2>/dev/null || true
	rm -rf "$SCRATCH"
}
trap end EXIT
trap 'exit 130' INT TERM

fail() { echo "quickstart: $*" >&2 && exit 1; }

# Debian's names of what is missing.
missing=""
for name in meson ninja-build gcc libc6-dev libjansson-dev libxxhash-dev pkg-config python3 python3-venv; do
	dpkg-query -W -f '${Status}' $name 2>/dev/null | grep -q 'ok installed' || missing="$missing $name"
done
if [ -n "$missing" ]; then
	sudo=""
	if [ "$(id -u)" != 0 ]; then
		command -v sudo >/dev/null || fail "neither root nor sudo; please install:$missing"
		sudo=sudo
	fi
	echo "about to install with apt-get:$missing"
	$sudo apt-get update -q >/dev/null
	DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -q --no-install-recommends $missing >"$SCRATCH/apt.log" 2>&1 ||
		{ tail -n 20 "$SCRATCH/apt.log" && fail "apt-get could not install:$missing"; }
fi

[ -f "$MODEL/config.json" ] || fail "$MODEL: no config.json there"
echo "building into $BUILD"
[ -f $BUILD/build.ninja ] || meson setup $BUILD -Dbuildtype=release -Dtests=disabled >"$SCRATCH/build.log" 2>&1 ||
	{ tail -n 20 "$SCRATCH/build.log" && fail "meson setup failed"; }
ninja -C $BUILD >"$SCRATCH/build.log" 2>&1 || { tail -n 20 "$SCRATCH/build.log" && fail "ninja failed"; }

PYTHON=python3
TEXT=0
if [ -f "$MODEL/tokenizer.json" ]; then
	if [ ! -x $BUILD/venv/bin/python ] || ! $BUILD/venv/bin/python -c 'import tokenizers' 2>/dev/null; then
		echo "about to install with pip into $BUILD/venv: tokenizers"
		python3 -m venv $BUILD/venv && $BUILD/venv/bin/pip install -q --disable-pip-version-check tokenizers >"$SCRATCH/pip.log" 2>&1 || true
	fi
	if $BUILD/venv/bin/python -c 'import tokenizers' 2>/dev/null; then
		PYTHON=$BUILD/venv/bin/python TEXT=1
	else
		echo "the Python package tokenizers cannot be installed: ids are printed instead of text"
	fi
else
	echo "$MODEL has no tokenizer.json: ids are printed instead of text"
fi

encode() { # TEXT -> ids
	$PYTHON - "$MODEL/tokenizer.json" "$1" <<-'PY'
	import sys
	from tokenizers import Tokenizer
	print(*Tokenizer.from_file(sys.argv[1]).encode(sys.argv[2]).ids)
	PY
}

decode() { # "ids" -> text
	$PYTHON - "$MODEL/tokenizer.json" "$1" <<-'PY'
	import sys
	from tokenizers import Tokenizer
	print(Tokenizer.from_file(sys.argv[1]).decode([int(word) for word in sys.argv[2].split()], skip_special_tokens=True))
	PY
}

read_json() { # FILE EXPRESSION of the object `out`
	python3 -c 'import json, sys; out = json.load(open(sys.argv[1])); print(eval(sys.argv[2]))' "$1" "$2"
}

if [ $TEXT = 1 ]; then
	for i in 0 1; do IDS[i]=$(encode "${PROMPTS[i]}"); done
fi
GENERATE=("$BUILD/examples/afd-generate" --model "$MODEL" --max-tokens $TOKENS --temperature 0.7 --top-k 40 --json)
ADDRESS=shm:quickstart.$$

echo "one FFN process and two attention processes over $ADDRESS"
$BUILD/examples/afd-serve-ffn --model "$MODEL" --listen "$ADDRESS" >"$SCRATCH/ready" &
SERVER=$!
for i in 0 1; do
	"${GENERATE[@]}" --ids "${IDS[i]}" --seed $i --ffn "$ADDRESS" --connect-timeout-ms 120000 >"$SCRATCH/split$i" &
	PIDS[i]=$!
done
for i in 0 1; do wait "${PIDS[i]}" || fail "attention process $i failed"; done
kill -TERM $SERVER && wait $SERVER || fail "the FFN process failed"
SERVER=""

EQUAL=yes
for i in 0 1; do
	"${GENERATE[@]}" --ids "${IDS[i]}" --seed $i >"$SCRATCH/whole$i" || fail "the single process failed"
	split=$(read_json "$SCRATCH/split$i" 'str(*out["ids"])') whole=$(read_json "$SCRATCH/whole$i" 'str(*out["ids"])')
	[ "$split" = "$whole" ] || EQUAL=no
	words=$(read_json "$SCRATCH/split$i" '" ".join(map(str, out["ids"][0]))')
	echo
	if [ $TEXT = 1 ]; then
		decode "${IDS[i]} $words"
	else
		echo "${IDS[i]} -> $words"
	fi
done
echo
echo "tokens/s: $(python3 -c 'import json, sys; print(round(sum(json.load(open(f))["tokens_per_second"] for f in sys.argv[1:]), 1))' \
	"$SCRATCH/split0" "$SCRATCH/split1")"
echo "tokens equal to a single process: $EQUAL"
[ $EQUAL = yes ]
