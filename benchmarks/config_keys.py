"""Which keys of `config.json` the installed `transformers` knows for our families: `config_keys.json` of `convert`.

`convert/huggingface/config.py` decides by that table which keys can change what `transformers` computes. A key can, if
the family's config class takes it, or if code that the family runs looks it up although no config class names it
(`is_causal` turns causal attention off). What is looked up is found in the source: an attribute of something that is
named like a config, or a text that stands where `getattr`, `hasattr` or `get` take a name. That finds more than
matters, but only what is spelt out. What each key means is decided by hand in `convert/huggingface/config.py`, and
`tests/convert/huggingface/test_config.py` fails for a key that nobody decided on.

    python benchmarks/config_keys.py            # prints what the installed version knows
    python benchmarks/config_keys.py --write    # and replaces the table of this version in `convert`

Run it in an environment for each version (5.24 and 4.57 as published); nothing else need be installed.
"""

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parent.parent / "convert" / "huggingface" / "config_keys.json"

# The config class of each model type, and the folder of its code.
FAMILIES = {
    "gemma": ("Gemma", "gemma"),
    "gemma2": ("Gemma2", "gemma2"),
    "gemma3_text": ("Gemma3Text", "gemma3"),
    "granite": ("Granite", "granite"),
    "granitemoehybrid": ("GraniteMoeHybrid", "granitemoehybrid"),
    "llama": ("Llama", "llama"),
    "mistral": ("Mistral", "mistral"),
    "olmo2": ("Olmo2", "olmo2"),
    "olmo3": ("Olmo3", "olmo3"),
    "phi3": ("Phi3", "phi3"),
    "qwen2": ("Qwen2", "qwen2"),
    "qwen3": ("Qwen3", "qwen3"),
    "smollm3": ("SmolLM3", "smollm3"),
}

# What a causal language model runs through from `from_pretrained` to `generate`, as far as the version has it.
SHARED = """
    cache_utils configuration_utils core_model_loading integrations/flash_attention integrations/flex_attention
    integrations/heterogeneity/configuration_utils integrations/heterogeneity/modeling_utils
    integrations/sdpa_attention masking_utils modeling_attn_mask_utils modeling_rope_utils modeling_utils
    models/auto/auto_factory models/auto/configuration_auto quantizers/auto utils/generic utils/output_capturing
""".split()

CONFIG = re.compile(r"(.*\.)?_?((text|decoder|effective|layer|model|base)_)?config(_dict)?")
TAKING = ("__init__", "__post_init__", "convert_rope_params_to_dict")


def looked_up(tree: ast.AST, owner: re.Pattern[str]) -> Iterator[str]:
    """The names that source code looks up on what is spelt like `owner`."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=value, attr=str(name)):
                pass
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[value, ast.Constant(value=str(name)), *_]):
                pass
            case ast.Call(
                func=ast.Attribute(value=value, attr="get" | "pop"), args=[ast.Constant(value=str(name)), *_]
            ):
                pass
            case _:
                continue
        if owner.fullmatch(ast.unparse(value)):
            yield name


def class_body(kind: type) -> list[ast.stmt]:
    source = Path(inspect.getfile(sys.modules[kind.__module__])).read_text(encoding="utf-8")
    (body,) = (n.body for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == kind.__name__)
    return body


def taken(parts: list[type]) -> Iterator[str]:
    """The keys that a config class takes: its fields or parameters, and what it takes out of the rest by name."""
    if dataclasses.is_dataclass(parts[0]):
        yield from (field.name for field in dataclasses.fields(parts[0]))
    for function in itertools.chain.from_iterable(class_body(part) for part in parts):
        if isinstance(function, ast.FunctionDef) and function.name in TAKING:
            parameters = [*function.args.args, *function.args.kwonlyargs]
            yield from (parameter.arg for parameter in parameters if parameter.arg != "self")
            yield from (key for key in looked_up(function, re.compile("kwargs")) if key not in dir(dict))


def _joined(keys: Iterable[str]) -> str:
    return " ".join(sorted(keys))


def generation_keys() -> set[str]:
    """Those of generation, which a model config may hold as well."""
    from transformers import GenerationConfig, PretrainedConfig

    old = getattr(PretrainedConfig, "_get_global_generation_defaults", None)
    return set(old() if old else GenerationConfig._get_default_generation_params())


def table() -> dict[str, Any]:
    import transformers
    from transformers import modeling_rope_utils

    root = Path(transformers.__file__).parent
    rope = getattr(modeling_rope_utils, "RopeParameters", None)
    parts: dict[str, dict[str, set[str]]] = {}
    for family, (name, folder) in FAMILIES.items():
        kind = getattr(transformers, f"{name}Config")
        bases = [base for base in kind.__mro__ if base.__module__.startswith("transformers.")]
        takes = {*taken(bases), *generation_keys()}
        members = {member for member in dir(kind) if not member.startswith("__")}
        paths = [root / f"{module}.py" for module in [*SHARED, f"models/{folder}/modeling_{folder}"]]
        trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
        reads = {key for tree in trees for key in looked_up(tree, CONFIG)}
        reads |= {key for base in bases for node in class_body(base) for key in looked_up(node, re.compile("self"))}
        parts[family] = {
            "takes": takes,
            "reads": {key for key in reads - takes - members if not key.startswith("__")},
            "members": members - takes,
        }
    # What all families have in common stands once.
    common = {
        part: set.intersection(*(keys[part] for keys in parts.values())) for part in ("takes", "reads", "members")
    }
    sets = {"all": common} | {
        family: {part: keys - common[part] for part, keys in of.items()} for family, of in parts.items()
    }
    sets["rope"] = {"keys": set(rope.__annotations__ if rope else ())}
    found = {of: {part: _joined(keys) for part, keys in by_part.items()} for of, by_part in sets.items()}
    return {transformers.__version__: found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"into {TABLE.name}")
    if parser.parse_args().write:
        everything = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
        TABLE.write_text(json.dumps(everything | table(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    else:
        print(json.dumps(table(), indent=1))
