"""XLA options with which it compiles tiny programs quickly, and leaves them slow."""

import importlib.metadata

FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones end the process over a flag they lack
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
