#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs afd-generate on a whole layout: starts every FFN and attention process over shared memory, gives each attention
# group its part of the input, prints the results in input order, and ends what it started, also when it is interrupted.
# One rule holds throughout: the first process that ends badly ends all others, and its exit status and error are ours.
#
# usage: examples/launch.sh LAYOUT --model DIR (--ids "1 2 3" | --batch FILE) [flags of afd-generate]
#
#   LAYOUT  attention and FFN processes; in brackets how many of them make one group:
#           2A:1F            two attention processes, each with its part of --batch; one FFN process
#           1A:2F(tp2)       the FFN in two shards by width; (ep2) by experts; (tp2,ep2) both, four shards
#           4A(tp2):2F(ep2)  two groups of two attention ranks; two FFN shards
#           1A:4F(ep2)       two replicas of two shards
#
#   --threads N     of each process (default: cores divided by processes, at least 1)
#   --max-peers, --gather-us, --metrics and the flags that both tools have go to the FFN processes
#   --via shm       the transport: shm, tcp[:HOST], where there is one verbs[:HOST], or auto[:HOST] (default HOST: 127.0.0.1)
#   --tools DIR     where afd-generate and afd-serve-ffn are (default: the build beside this script, or PATH)
#   {} in the FILE of --logits and --trace stands for the number of the attention group, in --metrics for that of the
#   FFN process; where there are several of them it must be there. --logits takes one sequence of each group.
#
# exit status: 0 done, 1 failed, 2 wrong usage
set -u

refuse() { # WHAT [STATUS]: one line, whatever the values hold
	printf 'launch.sh: %s\n' "${1//$'\n'/ }" >&2
	exit "${2-2}"
}

print_help() { sed -n '4,/^set -u/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0; }

# ---- the layout ----

SIZE='([1-9][0-9]{0,2})' # 1 to 999
LAYOUT_FORM="^${SIZE}A(\(tp$SIZE\))?:${SIZE}F(\((tp|ep)$SIZE(,(tp|ep)$SIZE)?\))?\$"

read_layout() {
	[[ $1 =~ $LAYOUT_FORM ]] || refuse "layout '$1': wanted the form 2A:1F, 2A(tp2):2F(ep2) or 1A:4F(tp2,ep2), 1 to 999 of each"
	local m=("${BASH_REMATCH[@]}")
	N_ATTENTION=${m[1]} ATTENTION_TP=${m[3]:-1} N_FFN=${m[4]} FFN_TP=1 FFN_EP=1
	[ -z "${m[8]}" ] || [ "${m[6]}" != "${m[9]}" ] || refuse "layout '$1': ${m[6]} stands twice"
	[ "${m[6]}" = tp ] && FFN_TP=${m[7]}
	[ "${m[6]}" = ep ] && FFN_EP=${m[7]}
	[ "${m[9]}" = tp ] && FFN_TP=${m[10]}
	[ "${m[9]}" = ep ] && FFN_EP=${m[10]}
	[ $((N_ATTENTION % ATTENTION_TP)) = 0 ] ||
		refuse "layout '$1': $N_ATTENTION attention processes, limit a multiple of tp$ATTENTION_TP"
	[ $((N_FFN % (FFN_TP * FFN_EP))) = 0 ] ||
		refuse "layout '$1': $N_FFN FFN processes, limit a multiple of $((FFN_TP * FFN_EP)) shards"
	N_GROUPS=$((N_ATTENTION / ATTENTION_TP))
}

# ---- the flags ----

find_tools() { # [DIR]: sets TOOLS
	local dir here
	here=$(dirname "${BASH_SOURCE[0]}")
	if [ $# = 1 ]; then
		TOOLS=$1
		[ ! -x "$1/afd-generate" ] || [ ! -x "$1/afd-serve-ffn" ] || return 0
		refuse "--tools $1: no afd-generate and afd-serve-ffn there"
	fi
	for dir in "$here/../build" "$here/../build-quickstart" "$here/../build-test/plain"; do
		[ -x "$dir/examples/afd-generate" ] && TOOLS=$dir/examples && return
	done
	dir=$(command -v afd-generate) || refuse "afd-generate: not found; run meson setup build && ninja -C build, or give --tools DIR" 1
	TOOLS=$(dirname "$dir")
}

# kinds TOOL: fills KIND[flag] with "value" or "alone" from what --help lists, so that new flags need no change here.
kinds() {
	local line
	while IFS= read -r line; do
		[[ $line =~ ^\ \ --([a-z-]+)(\ ?)(\ ?) ]] || continue
		KIND[${BASH_REMATCH[1]}]=alone
		if [ -n "${BASH_REMATCH[2]}" ] && [ -z "${BASH_REMATCH[3]}" ]; then KIND[${BASH_REMATCH[1]}]=value; fi
	done < <("$TOOLS/$1" --help)
	[ -n "${KIND[model]-}" ] || refuse "$TOOLS/$1: cannot be run" 1
}

# take FLAG VALUE WORD...: gives the words of one flag to the tools that have it.
take() {
	local name=$1 value=$2
	shift 2
	case $name in
	ffn | ffn-tp | ffn-ep | listen | attention-tp | attention-group) refuse "--$name: the layout says it" ;;
	via)
		[[ $value =~ ^(shm|(tcp|verbs|auto)(:.+)?)$ ]] || refuse "--via: value '$value', limit shm, tcp[:HOST], verbs[:HOST] or auto[:HOST]"
		VIA=$value
		;;
	tools) [ -n "$value" ] || refuse "--tools: the value is empty" ;;
	help) print_help ;;
	version) exec "$TOOLS/afd-generate" --version ;;
	logits | trace | metrics) FILES[$name]=$value ;;
	model | device | threads | deadline-ms | max-rows | connect-timeout-ms | key | tls | log | quantize-activations)
		GENERATE+=("$@") SERVE+=("$@") GIVEN[$name]=$value ;;
	*)
		GIVEN[$name]=$value
		if [ -n "${OF_GENERATE[$name]-}" ]; then GENERATE+=("$@"); else SERVE+=("$@"); fi
		;;
	esac
}

read_flags() {
	local name word dir=""
	for ((i = 1; i <= $#; i++)); do # before all others: it says which flags there are
		case ${!i} in
		--tools=*) dir=${!i#*=} ;;
		--tools) word=$((i + 1)) && dir=${!word-} ;;
		esac
	done
	find_tools ${dir:+"$dir"}
	local -A KIND=()
	kinds afd-generate
	for name in "${!KIND[@]}"; do OF_GENERATE[$name]=1; done
	kinds afd-serve-ffn
	KIND[via]=value KIND[tools]=value
	while [ $# -gt 0 ]; do
		word=$1
		name=${word#--}
		name=${name%%=*}
		[[ $word == --* ]] || refuse "'$word': flags only after the layout, see --help"
		case ${KIND[${name:-none}]-} in
		"") refuse "--$name: no such flag, see --help" ;;
		alone) [[ $word != *=* ]] || refuse "--$name: it takes no value" && take "$name" yes "$word" ;;
		value)
			if [[ $word == *=* ]]; then
				take "$name" "${word#*=}" "$word"
			else
				[ $# -gt 1 ] || refuse "--$name: a value is missing, see --help"
				take "$name" "$2" "$word" "$2" && shift
			fi
			;;
		esac
		shift
	done
}

# Asks both tools about their flags, before anything is started: with --help they read all and do nothing.
check_flags() {
	local name n
	[ -n "${GIVEN[model]-}" ] || refuse "--model: required"
	[ -n "${GIVEN[ids]+1}${GIVEN[batch]+1}" ] || refuse "--ids, --batch: none given, limit one of them"
	[ "${GIVEN[ids]+1}${GIVEN[batch]+1}" = 1 ] || refuse "--ids, --batch: both given, limit one of them"
	"$TOOLS/afd-generate" "${GENERATE[@]}" --help >/dev/null || exit
	"$TOOLS/afd-serve-ffn" "${SERVE[@]}" --help >/dev/null || exit
	for name in "${!FILES[@]}"; do
		n=$N_RUN
		[ "$name" != metrics ] || n=$N_FFN
		[ -n "${FILES[$name]}" ] || refuse "--$name: the value is empty"
		[ "$n" = 1 ] || [[ ${FILES[$name]} == *"{}"* ]] ||
			refuse "--$name ${FILES[$name]}: one file for $n processes, wanted {} for their number"
	done
}

# ---- the input: group i of n gets entries i*N/n to (i+1)*N/n, so that results stand in input order ----

# Files of the parts in SCRATCH, and on stdout a line per part: its number of entries and the seed of its first.
# What is no batch is left to afd-generate, which says what is wrong with it.
split_batch() { # FILE GROUPS SEED
	python3 - "$1" "$2" "$3" "$SCRATCH" <<-'PY'
	import json, sys
	path, n, seed, scratch = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]

	def refuse(text):
	    raise ValueError(text)

	def unique(pairs):
	    return dict(pairs) if len(dict(pairs)) == len(pairs) else refuse("a key stands twice")

	try:
	    with open(path, encoding="utf-8") as file:
	        entries = json.load(file, parse_constant=refuse, object_pairs_hook=unique)
	except (OSError, ValueError, RecursionError):
	    sys.exit(0)
	if not isinstance(entries, list) or not entries or not (seed.isascii() and seed.isdigit()):
	    sys.exit(0)
	for i in range(n):
	    first, last = i * len(entries) // n, (i + 1) * len(entries) // n
	    with open(f"{scratch}/batch.{i}", "w", encoding="utf-8") as file:
	        json.dump(entries[first:last], file)
	    print(last - first, (int(seed) + first) % 2**64)
	PY
}

# Sets INPUT[i] for the groups that have something to do, SEED[i], RUN and N_RUN.
divide_input() {
	local i=0 n_entries seed
	N_RUN=1 RUN=(0)
	[ -n "${GIVEN[batch]+1}" ] || return 0
	[ "$N_GROUPS" -gt 1 ] || return 0
	command -v python3 >/dev/null || refuse "python3: not found; it divides --batch" 1
	RUN=()
	while read -r n_entries seed; do
		if [ "$n_entries" -gt 1 ] && [ -n "${FILES[logits]+1}" ]; then refuse "--logits: $n_entries sequences in group $i, limit 1"; fi
		if [ "$n_entries" -gt 0 ]; then
			RUN+=("$i")
			INPUT[i]=$SCRATCH/batch.$i SEED[i]=$seed
		fi
		i=$((i + 1))
	done < <(split_batch "${GIVEN[batch]}" "$N_GROUPS" "${GIVEN[seed]:-0}")
	[ $i = 0 ] || [ $i = "$N_GROUPS" ] || refuse "${GIVEN[batch]}: cannot be divided" 1
	[ $i != 0 ] || RUN=(0)
	N_RUN=${#RUN[@]}
}

# ---- processes ----

PIDS=() NAMES=() STATES=() ERRORS=() PARTIAL=() # of every process, in the order of starting
SCRATCH="" TICK="" INTERRUPTED=0 VIA=shm

# start NAME OUT COMMAND...: the process dies with this script even when nobody can tell it to.
start() {
	local name=$1 out=$2 i=${#PIDS[@]} fd
	shift 2
	: >"$out"
	: >"$SCRATCH/stderr.$i"
	exec {fd}<"$SCRATCH/stderr.$i"
	"${DIE_WITH_US[@]}" "$@" </dev/null >>"$out" 2>>"$SCRATCH/stderr.$i" &
	PIDS[i]=$! ERRORS[i]=$fd NAMES[i]=$name STATES[i]=running PARTIAL[i]=""
}

forward_errors() { # PROCESS: what it has written to stderr since the last look
	local line
	while IFS= read -r -u "${ERRORS[$1]}" line; do
		printf '%s%s\n' "${PARTIAL[$1]}" "$line" >&2
		PARTIAL[$1]=""
	done
	PARTIAL[$1]+=$line
}

# Sleeps a moment, then looks at every process. One that ended badly ends this script with its status.
look() {
	local i status
	read -r -t 0.02 -u "$TICK"
	[ "$INTERRUPTED" = 0 ] || exit "$INTERRUPTED"
	for i in "${!PIDS[@]}"; do
		[ "${STATES[i]}" = running ] || continue
		kill -0 "${PIDS[i]}" 2>/dev/null || STATES[i]=ended
		forward_errors "$i"
		[ "${STATES[i]}" = ended ] || continue
		wait "${PIDS[i]}" 2>/dev/null # bash has its own words for a killed one
		status=$?
		if [ $status -gt 128 ]; then refuse "${NAMES[i]}: killed by signal $((status - 128))" 1; fi
		[ $status -le 2 ] || refuse "${NAMES[i]}: exit status $status" 1
		[ $status = 0 ] || exit $status
		[ "$STAGE" != serving ] || [[ ${NAMES[i]} != afd-serve-ffn* ]] || refuse "${NAMES[i]}: ended while it was needed" 1
	done
}

count_running() { # NAME: sets N_RUNNING
	local i
	N_RUNNING=0
	for i in "${!PIDS[@]}"; do
		if [ "${STATES[i]}" = running ] && [[ ${NAMES[i]} == "$1"* ]]; then N_RUNNING=$((N_RUNNING + 1)); fi
	done
}

signal_running() { # SIGNAL
	local i
	for i in "${!PIDS[@]}"; do
		[ "${STATES[i]}" = running ] && kill -"$1" "${PIDS[i]}" 2>/dev/null
	done
}

# On every way out. Servers drain and generators remove unfinished files when they are asked; one that is stuck is killed.
end() {
	local i n
	trap '' INT TERM HUP
	signal_running TERM
	for ((n = 0; n < 250; n++)); do
		for i in "${!PIDS[@]}"; do
			kill -0 "${PIDS[i]}" 2>/dev/null || STATES[i]=ended
		done
		count_running ""
		[ $N_RUNNING != 0 ] || break
		read -r -t 0.02 -u "$TICK"
	done
	signal_running KILL
	wait 2>/dev/null
	[ -z "$SCRATCH" ] || rm -rf "$SCRATCH"
}

prepare() {
	local path
	trap end EXIT # a trap that exits by itself would leave bash unable to see its children end
	trap 'INTERRUPTED=129' HUP
	trap 'INTERRUPTED=130' INT
	trap 'INTERRUPTED=143' TERM
	SCRATCH=$(mktemp -d) || refuse "no folder for scratch files" 1
	mkfifo "$SCRATCH/tick" || refuse "$SCRATCH/tick: cannot be made" 1
	exec {TICK}<>"$SCRATCH/tick"
	DIE_WITH_US=()
	path=$(command -v setpriv) && "$path" --pdeathsig TERM true 2>/dev/null && DIE_WITH_US=("$path" --pdeathsig TERM --)
	[[ $VIA == *:* || $VIA == shm ]] || VIA+=:127.0.0.1
	NAME=launch.$$.${SCRATCH##*.}
}

# address WHO: sets ADDRESS to one where that process can listen. Of a port, servers tell which one they got; an attention
# group must know it before, so it gets one that is free now.
address() {
	local port=0
	if [ "$VIA" = shm ]; then
		ADDRESS=shm:$NAME.$1
		return
	fi
	if [[ $1 == a* ]]; then
		port=$(python3 -c 'import socket, sys; s = socket.create_server((sys.argv[1], 0)); print(s.getsockname()[1])' "${VIA#*:}") ||
			refuse "--via $VIA: no free port" 1
	fi
	ADDRESS=$VIA:$port
}

start_servers() {
	local i shard args ready=() line
	for ((i = 0; i < N_FFN; i++)); do
		shard=$((i % (FFN_TP * FFN_EP)))
		address "f$i"
		args=(--listen "$ADDRESS" --ffn-tp "$((shard % FFN_TP))/$FFN_TP" --ffn-ep "$((shard / FFN_TP))/$FFN_EP")
		[ -z "${FILES[metrics]+1}" ] || args+=(--metrics "${FILES[metrics]//"{}"/$i}")
		start "afd-serve-ffn $i" "$SCRATCH/ready.$i" "$TOOLS/afd-serve-ffn" "${SERVE[@]}" "${args[@]}"
	done
	for ((i = 0; i < N_FFN; i++)); do
		until IFS= read -r line <"$SCRATCH/ready.$i" && [[ $line == "ready "* ]]; do look; done
		ready[i]=${line#ready }
	done
	FFN_FLAGS=()
	for line in "${ready[@]}"; do FFN_FLAGS+=(--ffn "$line"); done
}

start_groups() {
	local group rank args
	for group in "${RUN[@]}"; do
		args=("${GENERATE[@]}" "${FFN_FLAGS[@]}")
		[ -z "${INPUT[group]+1}" ] || args+=(--batch "${INPUT[group]}" --seed "${SEED[group]}")
		[ -z "${FILES[logits]+1}" ] || args+=(--logits "${FILES[logits]//"{}"/$group}")
		[ "$ATTENTION_TP" = 1 ] || address "a$group"
		[ -z "${FILES[trace]+1}" ] || args+=(--trace "${FILES[trace]//"{}"/$group}")
		for ((rank = 0; rank < ATTENTION_TP; rank++)); do
			[ "$ATTENTION_TP" = 1 ] || args+=(--attention-tp "$rank/$ATTENTION_TP" --attention-group "$ADDRESS")
			start "afd-generate $group" "$SCRATCH/out.$group.$rank" "$TOOLS/afd-generate" "${args[@]}"
		done
	done
}

# ---- results ----

print_json() {
	python3 - "${RUN[@]/#/$SCRATCH/out.}" <<-'PY'
	import json, sys
	groups = []
	for path in sys.argv[1:]:
	    with open(f"{path}.0", encoding="utf-8") as file:
	        groups.append(json.load(file))
	# What all groups agree on stands as it is; what they count is added, and the slowest says how long it took.
	out = {key: value for key, value in groups[0].items() if all(group.get(key) == value for group in groups)}
	out["ids"] = [ids for group in groups for ids in group["ids"]]
	out["tokens_per_second"] = sum(group["tokens_per_second"] for group in groups)
	out["seconds"] = max((group["seconds"] for group in groups), key=lambda seconds: seconds["total"])
	peers = {}
	for peer in (peer for group in groups for peer in group["peers"]):
	    sums = peers.setdefault(peer["address"], {"address": peer["address"]})
	    for key, value in peer.items():
	        if key != "address":
	            sums[key] = sums.get(key, 0) + value
	out["peers"] = list(peers.values())
	out["rows"] = sum(group["rows"] for group in groups)
	out["groups"] = groups
	print(json.dumps(out))
	PY
}

print_results() {
	local group
	if [ -n "${GIVEN[json]-}" ]; then
		print_json || refuse "--json: the results cannot be merged" 1
	else
		for group in "${RUN[@]}"; do cat "$SCRATCH/out.$group.0" || exit 1; done
	fi
}

main() {
	local processes
	case ${1-} in
	-h | --help) print_help ;;
	"") refuse "the layout is missing, see --help" ;;
	esac
	read_layout "$1"
	shift
	declare -gA GIVEN=() FILES=() OF_GENERATE=()
	declare -ga GENERATE=() SERVE=() INPUT=() SEED=() RUN=()
	read_flags "$@"
	if [ -n "${GIVEN[json]-}" ] && ! command -v python3 >/dev/null; then refuse "python3: not found; --json needs it" 1; fi
	processes=$((N_ATTENTION + N_FFN))
	[ -n "${GIVEN[threads]+1}" ] || take threads "" --threads $(($(nproc) > processes ? $(nproc) / processes : 1))
	if [ "$N_ATTENTION" -gt 64 ] && [ -z "${GIVEN[max-peers]+1}" ]; then take max-peers "" --max-peers "$N_ATTENTION"; fi
	prepare
	divide_input
	check_flags
	[ "$N_RUN" = "$N_GROUPS" ] ||
		echo "launch.sh: warn: input for $N_RUN of $N_GROUPS attention groups, the others are not started" >&2
	STAGE=serving
	start_servers
	start_groups
	count_running afd-generate
	while [ $N_RUNNING != 0 ]; do
		look
		count_running afd-generate
	done
	STAGE=ending
	signal_running TERM
	count_running ""
	while [ $N_RUNNING != 0 ]; do
		look
		count_running ""
	done
	print_results
}

main "$@"
