#!/bin/sh
# install-packages.sh PROCESS PACKAGE...: installs into this folder what PROCESS needs at run time of package-lock.json,
# writes down what that is (sbom.spdx.json), and removes what only developers or other platforms read. PROCESS and
# the PACKAGEs are our workspaces; their sources come later, since Node strips no types below node_modules.
set -eu
process=$1

npm ci --omit=dev --workspace="@mimo/$process"

# npm describes a whole project, and would miss the workspaces and tools that this image leaves out.
for manifest in */package.json; do
  workspace=$(dirname "$manifest")
  case " $* " in *" $workspace "*) ;; *) rm -r "$workspace" ;; esac
done
npm pkg delete devDependencies optionalDependencies allowScripts scripts
npm pkg set --json workspaces="[\"$(echo "$*" | sed 's/ /","/g')\"]"
npm sbom --sbom-format=spdx --sbom-type=application > sbom.spdx.json

# Node runs no TypeScript below node_modules, so what lies there is types, sources of what was compiled, and tests.
find node_modules -type f \( -name '*.ts' -o -name '*.[cm]ts' -o -name '*.map' -o -name '*.c' -o -name '*.cc' \) -delete
platform=$(node --print process.platform) architecture=$(node --print process.arch)
for binaries in node_modules/onnxruntime-node/bin/*/*/*; do
  case $binaries in
    */"$platform/$architecture") ;;
    *) rm -rf "$binaries" ;;
  esac
done
find node_modules -depth -type d -empty -delete
rm package-lock.json .npmrc
