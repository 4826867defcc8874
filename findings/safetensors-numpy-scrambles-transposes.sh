#!/usr/bin/env bash
# safetensors 0.8.0: `safetensors.numpy` writes an array that is not C-contiguous scrambled, without an error.
#
# Expected: what `load_file` returns equals what was given to `save_file`, as with 0.7.0, or an exception, as
#   `safetensors.torch.save_file` raises for a tensor that is not contiguous.
# Happens: 0.8.0 writes the bytes of the underlying buffer in the order they lie in memory under the shape of the view. The
#   shape is right, no warning, the numbers are in other places. Transposes, Fortran-ordered arrays, column slices, strided
#   and reversed views are all hit; `save` (to bytes) as well as `save_file`.
# Matters: converters between layouts transpose (kernel [in, out] against weight [out, in]) and pruning slices columns of
#   `down_proj`: exactly these views. A square weight, or any slice, passes each check of names, shapes and dtypes.
#   Remedy: `np.ascontiguousarray` before saving.
# Versions: safetensors 0.8.0 and 0.7.0, numpy 2.4.6. Seen, Python 3.11:
#   safetensors 0.7.0: transpose same, fortran same, column slice same, every second same, reversed same
#   safetensors 0.8.0: transpose OTHER, fortran OTHER, column slice OTHER, every second OTHER, reversed OTHER
#   saved [[0, 3], [1, 4], [2, 5]], read back [[0, 1], [2, 3], [4, 5]]
# Exits 1 once this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet numpy==2.4.6
for version in 0.7.0 0.8.0; do
  "$work/venv/bin/pip" install --quiet --no-deps --target "$work/$version" "safetensors==$version"
done

cat >"$work/show.py" <<'EOF'
import sys
import numpy as np
import safetensors
from safetensors.numpy import load, load_file, save, save_file

weight = np.arange(6, dtype=np.float32).reshape(2, 3)
views = {
    "transpose": weight.T,
    "fortran": np.asfortranarray(weight),
    "column slice": weight[:, 1:],
    "every second": weight[:, ::2],
    "reversed": weight[:, ::-1],
}
same = {}
for name, view in views.items():
    save_file({"weight": view}, sys.argv[1])
    back = load_file(sys.argv[1])["weight"]
    assert back.shape == view.shape and back.dtype == view.dtype
    assert np.array_equal(back, load(save({"weight": view}))["weight"])
    same[name] = np.array_equal(back, view)
    if name == "transpose" and not same[name]:
        print(f"saved {view.astype(int).tolist()}, read back {back.astype(int).tolist()}")
print(f"safetensors {safetensors.__version__}: " + ", ".join(f"{n} {'same' if s else 'OTHER'}" for n, s in same.items()))
surprising = safetensors.__version__ == "0.8.0"
sys.exit(0 if set(same.values()) == {not surprising} else 1)
EOF
for version in 0.7.0 0.8.0; do
  PYTHONPATH="$work/$version" "$work/venv/bin/python" "$work/show.py" "$work/array.safetensors"
done
