#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs a command in a small virtual machine that has RDMA without hardware: Debian's kernel with soft-RoCE (rdma_rxe) under
# QEMU, which emulates everything, so no KVM, no modules and no privileges are needed here.
#
# usage: tests/verbs/vm.sh COMMAND [ARG...]     exit status: COMMAND's; 125 when the machine failed, 77 when there cannot be one
#        tests/verbs/vm.sh --prepare            only makes the kernel and the first file system, once: downloads 70 MB
#
# COMMAND sees the files of this machine and runs as root. What it writes is gone with the machine, but for what lies in the
# current folder. rxe0 is on the loopback device, at 127.0.0.1; tests/verbs/ports.sh adds two ports on a pair of links.
#
#   AFD_VM_CACHE   where kernel and first file system are kept (default ~/.cache/afd-verbs-vm)
set -euo pipefail

CACHE=${AFD_VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/afd-verbs-vm}
MODULES="virtio_pci 9pnet_virtio 9p overlay crc32_generic rdma_rxe veth sch_netem sch_prio cls_u32"
NEEDED="qemu-system-x86_64 busybox cpio modprobe xz ip"
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT

refuse() { # WHY: there can be no machine here
	printf 'vm.sh: %s\n' "$1" >&2
	exit 77
}

# The first process of the machine: mounts this machine's files under a layer of memory, and runs the job in them. Three
# serial lines: the kernel's log, what the job says, and its exit status.
write_init() {
	cat <<-'INIT'
		#!/bin/busybox sh
		/bin/busybox --install /bin
		mkdir -p /below /above /proc
		mount -t proc proc /proc
		for module in /modules/*.ko; do insmod "$module"; done
		mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro host /below
		mount -t tmpfs memory /above
		cd /above && mkdir changes work root
		mount -t overlay -o lowerdir=/below,upperdir=changes,workdir=work root root
		cd root
		mount -t proc proc proc
		mount -t sysfs sys sys
		mount -t devtmpfs dev dev
		mkdir -p dev/shm dev/pts
		ln -s /proc/self/fd dev/fd
		mount -t tmpfs shm dev/shm
		mount -t devpts pts dev/pts
		mount -t tmpfs run run
		stty -F dev/ttyS1 -opost
		chroot . /bin/bash "$JOB" <dev/null >dev/ttyS1 2>&1
		echo -n $? >dev/ttyS2
		poweroff -f
	INIT
}

# Modules in the order in which they can be loaded.
copy_modules() { # TREE VERSION INTO
	local n=10 line
	modprobe -d "$1" -S "$2" --show-depends -a $MODULES | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' |
		while read -r line; do
			cp "$line" "$3/$n.ko"
			n=$((n + 1))
		done
}

prepare() {
	local tree=$SCRATCH/tree root=$SCRATCH/root package version at
	[ ! -e "$CACHE/kernel" ] || return 0
	mkdir -p "$tree" "$root/bin" "$root/modules" "$CACHE"
	package=$(apt-cache depends linux-image-amd64 2>/dev/null | sed -n 's/ *Depends: //p' | head -n 1)
	[ -n "$package" ] || refuse "no package linux-image-amd64 is known here; run apt-get update"
	(cd "$SCRATCH" && apt-get download -qq "$package") >&2 2>/dev/null || refuse "the package $package cannot be downloaded"
	dpkg -x "$SCRATCH"/linux-image-*.deb "$tree"
	version=$(ls "$tree/lib/modules")
	[ ! -d "$tree/usr/lib/modules" ] || refuse "the package $package has another shape than Debian 12's"
	depmod -b "$tree" "$version"
	cp "$(command -v busybox)" "$root/bin/busybox"
	copy_modules "$tree" "$version" "$root/modules"
	write_init >"$root/init" && chmod +x "$root/init"
	(cd "$root" && find . | cpio --quiet -o -H newc) >"$CACHE/initrd"
	# A kernel that unpacks itself takes longer than all the rest of the start.
	at=$(LC_ALL=C grep -abom 1 -P '\xFD7zXZ\0' "$tree"/boot/vmlinuz-* | cut -d : -f 1) || refuse "the kernel of $package is not packed by xz"
	tail -c "+$((at + 1))" "$tree"/boot/vmlinuz-* | xz -dc --single-stream >"$SCRATCH/kernel" 2>/dev/null || true
	[ -s "$SCRATCH/kernel" ] || refuse "the kernel of $package cannot be unpacked"
	mv "$SCRATCH/kernel" "$CACHE/kernel"
}

write_job() { # COMMAND...
	export -p
	printf 'mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=mmap here %q && cd %q || exit 125\n' "$PWD" "$PWD"
	echo 'ip link set lo up && rdma link add rxe0 type rxe netdev lo || exit 125'
	printf '%q ' "$@"
}

run() { # COMMAND...
	local share=local,security_model=none,multidevs=remap status
	write_job "$@" >"$SCRATCH/job"
	: >"$SCRATCH/console"
	: >"$SCRATCH/status"
	qemu-system-x86_64 -M q35 -accel tcg,thread=multi -cpu max -smp 2 -m 2G -nodefaults -display none -no-reboot \
		-kernel "$CACHE/kernel" -initrd "$CACHE/initrd" \
		-append "console=ttyS0 panic=-1 mitigations=off tsc=reliable JOB=$SCRATCH/job" \
		-virtfs "$share,path=/,mount_tag=host,readonly=on" -virtfs "$share,path=$PWD,mount_tag=here" \
		-serial "file:$SCRATCH/console" -serial stdio -serial "file:$SCRATCH/status" </dev/null || true
	status=$(cat "$SCRATCH/status")
	[ -n "$status" ] || cat "$SCRATCH/console" >&2
	return "${status:-125}"
}

[ $# -gt 0 ] || { sed -n '4,/^set -/s/^# \{0,1\}//p' "$0" >&2 && exit 2; }
[ "$(uname -m)" = x86_64 ] || refuse "the machine is $(uname -m), and only x86_64 is emulated"
[ "$PWD" != / ] || refuse "the current folder is /, which is shared already"
for tool in $NEEDED; do
	command -v "$tool" >/dev/null || PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null || refuse "$tool is not installed"
done
PATH=$PATH:/usr/sbin:/sbin
(prepare) # its own shell: refuse ends it
[ "$1" = --prepare ] || run "$@"
