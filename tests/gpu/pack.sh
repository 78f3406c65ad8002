#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Brings together what a build and its tests need beside a compiler: headers and libraries of Jansson, cmocka and xxHash, and
# pkg-config, unpacked from Debian's packages into a folder that can be carried to a machine without a network.
# run.sh finds it there. Nothing is installed; a machine with Debian's or Ubuntu's apt-get makes it.
#
# usage: pack.sh [DIR]   (build-pack beside the sources, which git ignores)
set -eu
case ${1-} in -*) echo "usage: pack.sh [DIR]" >&2 && exit 2 ;; esac
dir=${1:-$(cd "$(dirname "$0")/../.." && pwd)/build-pack}
packages="libjansson-dev libjansson4 libcmocka-dev libcmocka0 libxxhash-dev libxxhash0 pkgconf-bin libpkgconf3"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
(cd "$work" && apt-get download -q $packages >"$work/log" 2>&1) || { cat "$work/log" >&2 && exit 1; }
for package in "$work"/*.deb; do
	dpkg-deb -x "$package" "$work/root"
done

rm -rf "$dir"
mkdir -p "$dir/lib" "$dir/bin"
cp -r "$work/root/usr/include" "$dir/include"
for folder in "$work"/root/usr/lib/* "$work"/root/lib/*; do
	[ -d "$folder" ] && cp -rL "$folder"/*.so* "$folder/pkgconfig" "$dir/lib/" 2>/dev/null || true
done
# The folder may lie anywhere: each .pc begins where it is itself.
for pc in "$dir"/lib/pkgconfig/*.pc; do
	{
		echo 'prefix=${pcfiledir}/../..'
		echo 'exec_prefix=${prefix}'
		echo 'libdir=${prefix}/lib'
		echo 'includedir=${prefix}/include'
		grep -vE '^(prefix|exec_prefix|libdir|includedir)=' "$pc" |
			sed -E 's|-L/usr/lib[^ ]*|-L${libdir}|g; s|-I/usr/include|-I${includedir}|g; s|^(Libs: )(-l)|\1-L${libdir} \2|; s|^(Cflags:).*|\1 -I${includedir}|'
	} >"$pc.new"
	mv "$pc.new" "$pc"
done
cp "$work/root/usr/bin/pkgconf" "$dir/bin/pkgconf"
cat >"$dir/bin/pkg-config" <<'SH'
#!/bin/sh
here=$(cd "$(dirname "$0")/.." && pwd)
export PKG_CONFIG_LIBDIR="$here/lib/pkgconfig" LD_LIBRARY_PATH="$here/lib"
exec "$here/bin/pkgconf" "$@"
SH
chmod +x "$dir/bin/pkg-config"
for name in jansson cmocka libxxhash; do
	"$dir/bin/pkg-config" --exists "$name" || { echo "pack.sh: $name is not in what was unpacked" >&2 && exit 1; }
done
echo "$dir: $(du -sk "$dir" | cut -f1) KB of $packages"
