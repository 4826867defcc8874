#!/usr/bin/env bash
# NumPy 2.4.6 with ml_dtypes 0.6.0: a NaN leaves `np.sort` of bfloat16 unsorted, and `np.median` gives a number.
#
# Expected: as NumPy documents for its floats: NaN last, everything before it sorted, a median of NaN, each NaN once in
#   `np.unique`.
# Happens: of bfloat16 NaN end up anywhere and divide the rest: finite numbers behind one another are out of order, the median
#   of an array with NaN is some number, and `np.unique` repeats NaN.
# Matters: whoever takes the highest of sorted bfloat16 scores, one of them NaN from an overflow or an empty batch, takes
#   neurons that are not the highest, and the NaN that a median in float32 would have shown is not there. Remedy: scores in
#   float32, and a check that all are finite.
# Versions: numpy 2.4.6, ml_dtypes 0.6.0. Seen, Python 3.11:
#   bfloat16: 3 NaN of 64 at 22, 35, 44 after sorting, finite values out of order at 3 places, median 36.5, unique [nan, nan, 1.0]
#   float16: 3 NaN of 64 at 61, 62, 63 after sorting, finite values out of order at 0 places, median nan, unique [1.0, nan]
# Exits 1 once this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet numpy==2.4.6 ml_dtypes==0.6.0

cat >"$work/show.py" <<'EOF'
import sys
import ml_dtypes
import numpy as np

scores = np.random.default_rng(0).permutation(64).astype(np.float32)
scores[[5, 20, 40]] = np.nan
sorts = {}
for dtype in (ml_dtypes.bfloat16, np.float16):
    ordered = np.sort(scores.astype(dtype)).astype(np.float32)
    finite = ordered[~np.isnan(ordered)]
    wrong = int((np.diff(finite) < 0).sum())
    median = float(np.median(scores.astype(dtype)))
    unique = np.unique(np.array([np.nan, np.nan, 1], dtype)).astype(np.float32).tolist()
    places = ", ".join(map(str, np.flatnonzero(np.isnan(ordered))))
    name = np.dtype(dtype).name
    print(
        f"{name}: 3 NaN of 64 at {places} after sorting, finite values out of order at {wrong} places, "
        f"median {median:g}, unique {unique}"
    )
    sorts[name] = wrong == 0 and bool(np.isnan(median)) and len(unique) == 2
sys.exit(0 if sorts == {"bfloat16": False, "float16": True} else 1)
EOF
"$work/venv/bin/python" "$work/show.py"
