#!/usr/bin/env bash
# jax 0.10.2 on CPU: a product with a bfloat16 matrix of weights first writes all of it as float32, in every call.
#
# Expected: bfloat16 halves what is read of the weights and is at least as quick as float32, the more so on processors
#   with instructions for it (AVX-512 BF16), which PyTorch uses: 406 GFLOP/s against 169 in float32, on the same machine.
# Happens: from two rows on, the compiled program converts weights and activations to float32 arrays of full size and
#   multiplies these: temporary memory of twice the weights' bytes, and the rate of float32 (168 GFLOP/s against 157) for
#   many rows. With one row the conversion is fused with the product and nothing is copied; in float32 there are no
#   copies at all. The flags for other libraries (xla_cpu_use_onednn, xla_cpu_use_xnnpack and the like) change nothing.
# Matters: decoding several sequences in bfloat16 reads the weights once, writes them twice as large and reads those, at
#   every step: on a CPU float32 is the quicker dtype for it, and what bfloat16 saves of the weights' memory goes to
#   copies where one program holds several of them.
# Versions: jax and jaxlib 0.10.2, numpy 2.4.6, x86-64 with AVX-512 BF16 and without AMX. Seen, Python 3.11, temporary
#   bytes for x [rows, 576] @ w[49152, 576].T, whose weights are 56,623,104 bytes in bfloat16:
#   float32: 1 row 0, 8 rows 0, 1024 rows 0
#   bfloat16: 1 row 196,608, 8 rows 114,819,072, 1024 rows 314,572,800
# Exits 1 once this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6

cat >"$work/show.py" <<'EOF'
import sys

import jax
import jax.numpy as jnp

OUTPUTS, INPUTS = 49152, 576


def temporary(dtype, rows):
    x, w = (jax.ShapeDtypeStruct((n, INPUTS), dtype) for n in (rows, OUTPUTS))
    return jax.jit(lambda x, w: x @ w.T).lower(x, w).compile().memory_analysis().temp_size_in_bytes


same = True
for dtype in (jnp.float32, jnp.bfloat16):
    found = {rows: temporary(dtype, rows) for rows in (1, 8, 1024)}
    print(f"{jnp.dtype(dtype).name}: " + ", ".join(f"{rows} rows {size:,}" for rows, size in found.items()))
    if dtype == jnp.float32:
        same &= max(found.values()) < OUTPUTS * INPUTS // 100
    else:
        same &= found[1] < OUTPUTS * INPUTS // 100 and min(found[8], found[1024]) >= OUTPUTS * INPUTS * 4
sys.exit(0 if same else 1)
EOF
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/show.py"
