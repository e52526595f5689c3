#!/bin/sh
# runtime-root.sh ROOT: makes the root file system under which our processes run, from the Debian image with Node in
# which it is started: Node, the shared libraries that it and native packages load, and nothing else: no shell, no
# package manager, no npm. The same input gives the same bytes, so that images share this layer.
set -eu
root=$1

mkdir -p "$root/etc" "$root/usr/bin" "$root/usr/lib" "$root/usr/lib64" "$root/usr/local/bin" "$root/var/lib/dpkg/status.d"
mkdir -p "$root/proc" "$root/sys" "$root/dev" "$root/run" "$root/app"
mkdir -m 1777 "$root/tmp"
ln -s usr/bin "$root/bin"
ln -s usr/lib "$root/lib"
ln -s usr/lib64 "$root/lib64"
cp "$(command -v node)" "$root/usr/local/bin/node"

# librt is of onnxruntime; with glibc's own libraries it is a stub that the loader still asks for.
libraries=$(ldd "$(command -v node)" | grep -o '/[^ ]*\.so[^ ]*')
libc=$(echo "$libraries" | grep '/libc\.so')
for library in $libraries "$(dirname "$libc")/librt.so.1"; do
  folder=$(dirname "$(readlink -f "$library")")
  mkdir -p "$root$folder"
  cp -L "$library" "$root$folder/"
  # The loader's place is written into every program.
  case $library in */ld-linux*) [ -e "$root$library" ] || cp -L "$library" "$root$library" ;; esac
done

# Scanners read here which Debian packages the libraries are of.
for package in libatomic1 libc6 libgcc-s1 libstdc++6; do
  dpkg-query --status "$package" > "$root/var/lib/dpkg/status.d/$package"
done
cp /etc/os-release "$root/etc/os-release"
echo 'hosts: files dns' > "$root/etc/nsswitch.conf"
printf 'root:x:0:0::/:/sbin/nologin\nmimo:x:10001:10001::/tmp:/sbin/nologin\n' > "$root/etc/passwd"
printf 'root:x:0:\nmimo:x:10001:\n' > "$root/etc/group"
find "$root" -exec touch --no-dereference --date=@0 {} +
