#!/bin/sh
# fetch-cuda.sh REQUIREMENTS FOLDER: brings the libraries of the wheels that REQUIREMENTS pins into FOLDER, side by side, as
# onnxruntime looks for its provider beside itself. The wheels' Python code stays behind.
set -eu
requirements=$1 folder=$2
wheels=$(mktemp -d)

# The wheel of any one Python does: only its libraries are taken.
pip download --quiet --no-deps --no-cache-dir --require-hashes --only-binary=:all: --python-version=3.12 \
  --dest="$wheels" --requirement="$requirements"
mkdir -p "$folder"
for wheel in "$wheels"/*.whl; do
  python3 -m zipfile --extract "$wheel" "$wheels/content"
done
for library in libonnxruntime.so libonnxruntime_providers_shared.so libonnxruntime_providers_cuda.so \
  libcudart.so libnvrtc.so libnvrtc-builtins.so libcublas.so libcublasLt.so libcurand.so libnccl.so; do
  find "$wheels/content" -name "$library*" -exec mv {} "$folder" \;
done
chmod 644 "$folder"/*
ln -s "$(cd "$folder" && echo libonnxruntime.so.*)" "$folder/libonnxruntime.so"
rm -r "$wheels"
