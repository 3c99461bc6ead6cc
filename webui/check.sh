#!/usr/bin/env bash
# Builds the page afresh and compares it with the committed one; first checks its types.
#   webui/check.sh     needs Node and a done `npm ci` in this folder
set -euo pipefail
cd "$(dirname "$0")"
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
npm run --silent check
SHENHONG_UI_OUT=$fresh npm run --silent build -- --logLevel warn
diff -rq "$fresh" ../src/shenhong/serve/ui || {
    echo "check.sh: the committed page is not what webui/ builds; run 'npm run build' in webui/ and commit" >&2; exit 1; }
