#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Puts a CUDA toolkit into a folder, from PyPI, at pinned versions, so that any machine can compile
# the GPU module:
#   scripts/get-cuda.sh DIR           the compiler, headers and runtime: what building needs
#   scripts/get-cuda.sh DIR --libs    cuBLASLt and NCCL too
# DIR is then for meson: -Dnvcc_dir=DIR. Nothing outside DIR changes; a
# folder that is complete is left as it is.
set -eu
[ $# -ge 1 ] && [ $# -le 2 ] && [ "${1#-}" = "$1" ] && [ "${2:---libs}" = --libs ] || {
	sed -n 's/^# \{0,1\}//; 3,9p' "$0" >&2
	exit 2
}
dir=$1
# Of CUDA 13.0.2, with the libraries that PyTorch 2.11 brings too.
compiler="nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88
nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85"
libraries="nvidia-cublas==13.1.0.3 nvidia-nccl-cu13==2.28.9"
wanted=$compiler
[ $# = 2 ] && wanted="$compiler $libraries"
stamp=$(echo $wanted)

case " $(cat "$dir/.afd-cuda" 2>/dev/null) " in *" $stamp "*) exit 0 ;; esac
new=$dir.new.$$
trap 'rm -rf "$new"' EXIT INT TERM
# The list is closed (--no-deps), and no package runs code of its own (--only-binary).
python3 -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
	--no-compile --target "$new" $wanted

tree=$new/nvidia/cu13
if [ -d "$new/nvidia/nccl" ]; then
	cp -R "$new/nvidia/nccl/include" "$new/nvidia/nccl/lib" "$tree/"
fi
# What linkers and nvcc's profile look for, and wheels leave out.
[ -e "$tree/lib64" ] || ln -s lib "$tree/lib64"
for library in "$tree"/lib/lib*.so.*; do
	[ -e "$library" ] || continue
	short=${library%%.so.*}.so
	[ -e "$short" ] || ln -s "$(basename "$library")" "$short"
done
echo "$stamp" >"$tree/.afd-cuda"
rm -rf "$dir"
mkdir -p "$(dirname "$dir")"
mv "$tree" "$dir"
