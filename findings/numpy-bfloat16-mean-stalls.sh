#!/usr/bin/env bash
# NumPy 2.4.6 with ml_dtypes 0.6.0: the mean of a million bfloat16 weights is 500 times too small, without a warning.
#
# Expected: as for NumPy's own float16, whose `mean` adds up in float32, or as JAX and PyTorch do for bfloat16: the mean of
#   the values, rounded to the dtype.
# Happens: `mean`, `sum`, `cumsum`, `var` and `std` of a bfloat16 array add up in bfloat16, one by one. Eight bits of
#   precision: once the sum is 256 times a term, adding it changes nothing. The mean of 1,000 times 256 is 65.5.
# Matters: bfloat16 tensors of checkpoints reach NumPy as this dtype (safetensors.numpy, np.asarray of a JAX array). Mean
#   magnitudes and variances of weights, by which neurons are ranked and layers compared, come out the smaller the longer the
#   axis is; of rows of 1,024 the mean is three tenths too small, which looks like a number. Remedy: `astype(np.float32)` first.
# Versions: numpy 2.4.6, ml_dtypes 0.6.0, safetensors 0.8.0. Seen, Python 3.11:
#   bfloat16: mean 3.05e-05 of 0.016, std 0.00143 of 0.0121, sum of 4,096 ones 256, mean of 1,000 times 256 65.5
#   bfloat16: of rows of 1,024 the mean is 0.709 of the right one
#   float16: mean 0.016 of 0.016, std 0.0121 of 0.0121, sum of 4,096 ones 4096, mean of 1,000 times 256 256
#   float16: of rows of 1,024 the mean is 1.000 of the right one
# Exits 1 once this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet numpy==2.4.6 ml_dtypes==0.6.0 safetensors==0.8.0

cat >"$work/show.py" <<'EOF'
import sys
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

values = np.abs(np.random.default_rng(0).standard_normal((1024, 1024)) * 0.02)
found = {}
for dtype in (ml_dtypes.bfloat16, np.float16):
    save_file({"weight": values.astype(dtype)}, sys.argv[1])
    weight = load_file(sys.argv[1])["weight"]
    assert weight.dtype == dtype
    right = weight.astype(np.float32)
    ones, large = np.ones(4096, dtype).sum(), np.full(1000, 256, dtype).mean()
    rows = float(np.mean(weight.mean(1).astype(np.float32)) / right.mean())
    name = np.dtype(dtype).name
    print(
        f"{name}: mean {float(weight.mean()):.3g} of {right.mean():.3g}, std {float(weight.std()):.3g} of "
        f"{right.std():.3g}, sum of 4,096 ones {float(ones):g}, mean of 1,000 times 256 {float(large):g}"
    )
    print(f"{name}: of rows of 1,024 the mean is {rows:.3f} of the right one")
    found[name] = (float(weight.mean()) > 0.9 * right.mean(), float(ones), float(large))
sys.exit(0 if found == {"bfloat16": (False, 256.0, 65.5), "float16": (True, 4096.0, 256.0)} else 1)
EOF
"$work/venv/bin/python" "$work/show.py" "$work/weight.safetensors"
