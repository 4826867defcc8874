"""Between Hugging Face `config.json` and our `ModelConfig`, refusing what we do not implement.

Both spellings are read and written: transformers 5 (`rope_parameters`, `dtype`) and transformers 4 (`rope_theta`,
`rope_scaling`, `torch_dtype`). A key that means nothing to `transformers` means nothing here either: it is kept, and
named in a note. What means something there is recorded in `config_keys.json`, which `benchmarks/config_keys.py` derives
from its source; what each such key means here is said by the tables below.
"""

import dataclasses
import difflib
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from convert.families.family import FULL, SLIDING, Family, Number
from convert.families.mixtures import MIXTURES
from convert.families.refused import REFUSED
from convert.families.registry import FAMILIES, WRAPPED
from convert.huggingface.rope import read_ropes, write_ropes
from convert.values import MOST, integer, named, number, shown
from gluprune_jax.errors import OperationError, RequestError, listed
from gluprune_jax.models.config import LayerAttention, ModelConfig
from gluprune_jax.pruning.targets import padded_width

# Keys that the config classes take and that have no effect on the forward pass. They are kept for export.
INERT_KEYS = frozenset(
    """
    _commit_hash assistant_confidence_threshold assistant_lookbehind attention_dropout attn_implementation
    bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty eos_token_id epsilon_cutoff eta_cutoff
    experts_implementation exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label initializer_range label2id length_penalty max_length min_length name_or_path
    no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp
    problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens target_lookbehind task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p use_cache
    """.split()
)

# Keys whose other values would change the function that the model computes, or keep `transformers` from loading it:
# those that config classes of all families take, and those that no config class takes and code that all families share
# looks up nevertheless. Between them stand those of the families' tables.
_ONLY_FOR_ALL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0, None),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "per_layer_config": (None,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False,),
    "tie_word_embeddings": (False, True, None),
    "use_bfloat16": (False,),
}
_ONLY_IN_SHARED_CODE: dict[str, tuple[Any, ...]] = {
    "_heterogeneity_spec": (None,),
    "_rope_type_labels": (None,),
    "attention_chunk_size": (None,),
    "decoder": (None,),
    "distributed_config": (None,),
    "fusion_config": (None, {}),
    "generator": (None,),
    "is_causal": (True,),
    "kv_sharing_modes": (None,),
    "num_kv_shared_layers": (0, None),
    "text_config": (None,),
    "text_encoder": (None,),
    "transformers_weights": (None,),
}


@functools.cache
def _only(model_type: str) -> dict[str, tuple[Any, ...]]:
    """The keys of a family that are accepted with some values alone, and these."""
    return {**_ONLY_FOR_ALL, **dict(sorted(FAMILIES[model_type].only.items())), **_ONLY_IN_SHARED_CODE}


# Those of all families; where they differ, with the values of one.
ONLY_THESE_VALUES: dict[str, tuple[Any, ...]] = {
    key: values for model_type in FAMILIES for key, values in _only(model_type).items()
}

# Keys that shared code looks up and that are nothing to our families: they serve others, training or the key's own
# past. Then the attributes of config classes that a file may set; one that sets another (`to_dict`) breaks the class.
_OF_NO_CONCERN = frozenset(
    """
    _attn_implementation_internal _attn_was_changed _experts_implementation_internal _is_quantized _name_or_path
    _output_attentions _post_init_done _pre_quantization_dtype alibi embed_dim features_only first_k_dense_replace
    init_std initializer_factor items mlp_layer_types mtp_layer_types mtp_mlp_layer_types mtp_per_layer_config
    num_channels num_heads num_mtp_layers number_of_conv_states out_indices tie_last_hidden_states unpadded_vocab_size
    use_alibi use_pretrained_backbone values

    _attn_implementation _experts_implementation base_model_ep_plan base_model_fsdp_plan base_model_pp_plan
    base_model_tp_plan keys_to_ignore_at_inference
    """.split()
)

# What becomes a field of `ModelConfig` in more steps than one, in all families.
_LAYOUT_KEYS = frozenset(
    """
    architectures auto_map gluprune layer_types model_type num_hidden_layers original_max_position_embeddings
    rope_parameters rope_scaling rope_theta
    """.split()
)


@functools.cache
def _architecture_keys(model_type: str) -> frozenset[str]:
    """The keys that say what a family's architecture is, which `write_config` writes anew."""
    family = FAMILIES[model_type]
    numbers = (of.key for of in family.numbers.values())
    tables = (family.keys.values(), family.widths, family.flags.values(), numbers, family.defaults)
    return _LAYOUT_KEYS.union(*tables)


def _recorded(what: str, *parts: str) -> frozenset[str]:
    """Keys that `config_keys.json` has of any version of `transformers`, for a family or for RoPE."""
    table = json.loads(resources.files(__package__).joinpath("config_keys.json").read_text(encoding="utf-8"))
    found = [version[of] for version in table.values() for of in (what, "all")]
    return frozenset(" ".join(keys.get(part, "") for keys in found for part in parts).split())


# What means something to `transformers`, and what is a method or an attribute of its config classes.
_MEANINGFUL = {family: _recorded(family, "takes", "reads") for family in FAMILIES}
_MEMBERS = {family: _recorded(family, "members") for family in FAMILIES}
_HEADS = frozenset(head for family in FAMILIES.values() for head in (family.architecture, *family.heads))
ROPE_KEYS = _recorded("rope", "keys") | {"type"}

_MOST_LAYERS = 10_000  # a damaged config must not cost the memory of a list so long


def read_config(data: Any, where: str = "config.json") -> tuple[ModelConfig, dict[str, Any]]:
    """Turns a parsed `config.json` into our config and the remaining keys, which an export repeats.

    Of a multimodal model it is the text half that is read, as a model of its own.

    Raises:
      RequestError: another model family, or a key or value that we do not implement, all of them named.
      OperationError: it is no config at all.
    """
    if not isinstance(data, Mapping):
        raise OperationError(f"{where} is no model config: it holds {shown(data)} instead of an object")
    data, where = _text_half(data, where)
    family = _family(data, where)
    architectures = data.get("architectures") or []
    ours = family.architecture
    if not _are_names(architectures) or (ours not in architectures and not _HEADS.isdisjoint(architectures)):
        raise RequestError(
            f"{where} has architectures {shown(architectures)}; supported is {[ours]} for {family.model_type}"
        )

    known, keys = {**family.defaults, **data}, family.keys
    if problems := list(_problems(known, family)):
        raise RequestError(f"{where} asks for what is not supported: {listed(problems, 300, '; ', 300)}")

    D = integer(known, keys["hidden_size"], where)
    N = integer(known, keys["num_attention_heads"], where)
    width = integer(known, family.widths[0], where)
    layers = integer(known, "num_hidden_layers", where, most=_MOST_LAYERS)
    K = N if known.get(keys["num_key_value_heads"]) is None else integer(known, keys["num_key_value_heads"], where)
    # A null is as good as nothing only where the class has no number of its own.
    if known.get(keys["head_dim"]) is not None or keys["head_dim"] in family.defaults:
        H = integer(known, keys["head_dim"], where)
    elif D % N:
        raise RequestError(
            f"{where} has hidden_size {D}, which {N} heads do not divide, and no head_dim; give head_dim"
        )
    else:
        H = D // N
    fields: dict[str, Any] = {
        **family.fields,
        "vocab_size": integer(known, keys["vocab_size"], where),
        "hidden_size": D,
        "intermediate_sizes": _logical_widths(known, width, layers, where),
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": H,
        "max_position_embeddings": integer(known, keys["max_position_embeddings"], where),
        "rms_norm_eps": number(known, keys["rms_norm_eps"], where),
        "attention": _attention(data, family, layers, H, where),
        "tie_word_embeddings": bool(known.get(keys["tie_word_embeddings"])),
        **{field: bool(known.get(key)) for field, key in family.flags.items()},
        **{field: _read_number(known, of, where) for field, of in family.numbers.items()},
    }
    try:
        config = _canonical(ModelConfig(**fields))
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error
    rest = {key: value for key, value in data.items() if key not in _architecture_keys(family.model_type)}
    rest = {key: value for key, value in rest.items() if not _is_left_out(key, value, family)}
    return config, rest | {"model_type": family.model_type}


def accepted_without_effect(data: Mapping[str, Any]) -> list[str]:
    """The inert keys of a config that `read_config` took, for the report to the user.

    Those that mean nothing to `transformers` come first. Where such a key is almost one that means something and is not
    given, that one is named with it: like `transformers`, we have taken its default.
    """
    wrapped = WRAPPED.get(data["model_type"])
    whole = data
    data, _ = _text_half(data, "")
    family = FAMILIES[data["model_type"]]
    ours = _architecture_keys(family.model_type) | _only(family.model_type).keys()
    inert = INERT_KEYS | family.inert
    absent = [key for key in _MEANINGFUL[family.model_type] & ours if key not in data]
    strange = [key for key in data if key not in ours | inert]
    strange += [key for key in ("auto_map",) if data.get(key) is not None]
    names = [key for key in sorted(whole) if wrapped and wrapped.wrapper and key in wrapped.wrapper.dropped]
    for key in sorted(strange):
        near = difflib.get_close_matches(key, absent, n=1, cutoff=0.9)
        names.append(named(key) + (f" ({near[0]} is not given)" if near else ""))
    for rope in ("rope_parameters", "rope_scaling"):
        found = {rope: data.get(rope) or {}}
        found |= {f"{rope}.{kind}": found[rope].get(kind) or {} for kind in family.thetas}
        for name, values in found.items():
            names += [f"{name}.{named(key)}" for key in sorted(values) if key not in ROPE_KEYS | family.thetas.keys()]
    return names + sorted(inert & data.keys())


def file_width(widths: Sequence[int], pad_to: int = 1) -> int:
    """The one width that all layers have in a Hugging Face folder: the widest, rounded up to a multiple of `pad_to`."""
    return padded_width(max(widths), pad_to)


def stored_width(data: Mapping[str, Any], where: str = "config.json") -> int:
    """The width that all layers have in the files of a folder whose `config.json` this is.

    Raises:
      RequestError, OperationError: as `read_config`.
    """
    data, where = _text_half(data, where)
    family = _family(data, where)
    return integer({**family.defaults, **data}, family.widths[0], where)


def write_config(config: ModelConfig, rest: Mapping[str, Any], dtype: np.dtype[Any], pad_to: int = 1) -> dict[str, Any]:
    """`config.json` for a model, in both spellings.

    The width is that of the tensors, which are zero-padded to it (`file_width`); where that is not the width of all
    layers, theirs stand under `gluprune`, where `read_config` finds them.

    Args:
      config: the architecture.
      rest: the keys that `read_config` passed on (at least `model_type`).
      dtype: of the weights.
      pad_to: the width is rounded up to a multiple of this.

    Raises:
      RequestError: the family's `config.json` has no words for this architecture.
    """
    family = FAMILIES[rest["model_type"]]
    width = file_width(config.intermediate_sizes, pad_to)
    further = (
        {of.key: _write_number(of, field, config) for field, of in family.numbers.items()}
        | {key: getattr(config, field) for field, key in family.flags.items()}
        | dict.fromkeys(family.widths, width)
        | _write_layers(config, family)
        | write_ropes(config, family)
    )
    data = {
        **rest,
        "architectures": [family.architecture],
        **further,
        **{key: getattr(config, field) for field, key in family.keys.items()},
        **family.written,
        "num_hidden_layers": config.num_hidden_layers,
        "dtype": str(dtype),
        "torch_dtype": str(dtype),
    }
    if set(config.intermediate_sizes) != {width}:
        data["gluprune"] = {"intermediate_sizes": list(config.intermediate_sizes)}
    _check_says(data, dataclasses.replace(config, width_multiple=1), family)
    return dict(sorted(data.items()))


def _check_says(data: Mapping[str, Any], config: ModelConfig, family: Family) -> None:
    """Makes sure that a config says what it shall: a family cannot say all that a `ModelConfig` can be."""
    said, wanted = read_config(data)[0], _canonical(config)
    if said != wanted:
        fields = [field.name for field in dataclasses.fields(config)]
        wrong = [field for field in fields if getattr(said, field) != getattr(wanted, field)]
        raise RequestError(
            f"a model with {listed([f'{field} = {shown(getattr(wanted, field))}' for field in wrong], 300)} cannot be "
            f"written as {family.name}; its config.json would mean "
            f"{shown(getattr(said, wrong[0]))} for {wrong[0]}"
        )


def _canonical(config: ModelConfig) -> ModelConfig:
    """The same model with None for a scale of the scores that is the usual one."""
    usual = config.attention_scale == config.head_dim**-0.5
    return dataclasses.replace(config, attention_scale=None) if usual else config


# ------------------------------------------------------------------------------------------- which model it is


def _family(data: Mapping[str, Any], where: str) -> Family:
    model_type = data.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if isinstance(model_type, str) and model_type in MIXTURES:
        raise RequestError(
            f"{where} has model_type {model_type!r}, a mixture of experts, which is pruned from file to file by its "
            f"weights alone (gluprune prune, or convert.open_mixture), converted (gluprune convert), and not run or "
            f"trained"
        )
    if family is None:
        reason = REFUSED.get(model_type) if isinstance(model_type, str) else None
        code = "; code that it brings (auto_map) is never run" if data.get("auto_map") is not None else ""
        raise RequestError(
            f"{where} has model_type {shown(model_type)}{f': {reason}' if reason else ''}; supported are "
            f"{', '.join(map(repr, [*FAMILIES, *WRAPPED]))}{code}"
        )
    return family


def _text_half(data: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], str]:
    """The config of a multimodal model's text half as one of a text model, or any other config as it is.

    Of the outer config it has the keys that concern the whole model, and those that mean nothing.
    """
    model_type = data.get("model_type")
    family = WRAPPED.get(model_type) if isinstance(model_type, str) else None
    if family is None or family.wrapper is None:
        return data, where
    wrapper, tied = family.wrapper, family.keys["tie_word_embeddings"]
    text = data.get(wrapper.text)
    if not isinstance(text, Mapping) or text.get("model_type", family.model_type) != family.model_type:
        found = shown({"model_type": text["model_type"]} if isinstance(text, Mapping) else text)
        raise RequestError(
            f"{where} has model_type {model_type!r} and {wrapper.text} {found}; of such a model the text half is read, "
            f"which must be of model_type {family.model_type!r}"
        )
    architectures = data.get("architectures") or []
    if not _are_names(architectures):
        raise RequestError(f"{where} has architectures {shown(architectures)}; it must be a list of names")
    ties = [config.get(tied, family.defaults.get(tied, False)) for config in (data, text)]
    if ties[0] != ties[1]:
        raise RequestError(
            f"{where} has {tied} {shown(ties[0])}, and {wrapper.text} {shown(ties[1])}; transformers 5 takes the "
            f"first, transformers 4 the second, so they must be the same"
        )
    inside = _architecture_keys(family.model_type) | family.only.keys() | wrapper.dropped | {wrapper.text}
    outer = {key: value for key, value in data.items() if key not in inside}
    names = [family.architecture if name == wrapper.architecture else name for name in architectures]
    kept = {"model_type": family.model_type, "architectures": names, tied: ties[0]}
    return {**text, **outer, **kept}, f"{where}: {wrapper.text}"


def _problems(known: Mapping[str, Any], family: Family) -> Iterator[str]:
    """What a config asks for and we do not implement."""
    switches = [*family.flags.values(), *(key for key in ("use_sliding_window",) if key in family.defaults)]
    only = {**dict.fromkeys(switches, (False, True, None)), **_only(family.model_type)}
    for key, allowed in only.items():
        if key in known and known[key] not in allowed:
            yield f"{key} = {shown(known[key])} (supported: {' or '.join(repr(value) for value in allowed)})"
    ours = _architecture_keys(family.model_type) | INERT_KEYS | family.inert | _OF_NO_CONCERN | only.keys()
    for key, value in known.items():
        if key not in ours and (key in _MEMBERS[family.model_type] or key.startswith("__")):
            yield f"{named(key)} = {shown(value)} (transformers' config class has a part of that name)"
    layer_types = known.get("layer_types")
    if layer_types is not None:
        layers, names = known.get("num_hidden_layers"), list(family.layer_types)
        supported = f"(supported: a list of {' or '.join(map(repr, names))})"
        if not isinstance(layer_types, list):
            yield f"layer_types = {shown(layer_types)} {supported}"
        elif others := [kind for kind in layer_types if kind not in names]:
            yield f"layer_types = {shown(others)} {supported}"
        elif isinstance(layers, int) and len(layer_types) != layers:
            found = " or ".join(map(repr, dict.fromkeys(layer_types)))
            yield f"layer_types = {len(layer_types)} times {found} (supported: once for each of {layers})"
    ends = known.get("eos_token_id")
    if ends is not None and not all(
        type(end) is int and abs(end) <= MOST for end in (ends if isinstance(ends, list) else [ends])
    ):
        yield f"eos_token_id = {shown(ends)} (supported: a token id up to {MOST}, a list of them, or null)"


def _is_left_out(key: str, value: Any, family: Family) -> bool:
    """Whether a value says no more than leaving the key out, and is of a type that one of the transformers refuses."""
    allowed = _only(family.model_type).get(key)
    return allowed is not None and (value is None or type(value) not in map(type, allowed))


# --------------------------------------------------------------------------------------------- layers, numbers


def _attention(
    data: Mapping[str, Any], family: Family, layers: int, head_dim: int, where: str
) -> tuple[LayerAttention, ...]:
    known = {**family.defaults, **data}
    listed_kinds = known.get("layer_types") if "layer_types" in family.defaults else None
    if listed_kinds is None:
        kinds = family.layer_kinds(known, layers, where)
    else:
        kinds = [family.layer_types[name] for name in listed_kinds]
    if others := [kind for kind in kinds if kind not in (FULL, SLIDING)]:
        raise RequestError(
            f"{where} has no layer_types, which means {others[0]!r} for all {layers} layers; supported is a list of "
            f"{' or '.join(map(repr, family.layer_types))}"
        )
    window = None
    if SLIDING in kinds:
        if not known.get("use_sliding_window", True) and "use_sliding_window" in family.defaults:
            raise RequestError(
                f"{where} has {SLIDING!r} in layer_types and use_sliding_window = {known['use_sliding_window']}; "
                f"such layers need it to be true"
            )
        window = integer(known, "sliding_window", where)
    ropes = read_ropes(data, family, head_dim, where, ROPE_KEYS)
    rotate = family.rotation.read(known, layers, where)
    return tuple(
        LayerAttention(ropes[kind] if rotates else None, window if kind == SLIDING else None)
        for kind, rotates in zip(kinds, rotate, strict=True)
    )


def _write_layers(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The keys of windows and of layers that do not rotate, as far as the family's class knows them."""
    kinds = [FULL if layer.window is None else SLIDING for layer in config.attention]
    window = next((layer.window for layer in config.attention if layer.window is not None), None)
    keys = family.rotation.write([layer.rope is not None for layer in config.attention])
    switched = "use_sliding_window" in family.defaults
    if "layer_types" in family.defaults:
        names = {kind: name for name, kind in reversed([*family.layer_types.items()])}
        keys["layer_types"] = [names.get(kind, kind) for kind in kinds]
        if window is None and not switched and SLIDING in names:
            # transformers 4 makes the mask of such layers even if there are none.
            window = family.defaults["sliding_window"]
    if "sliding_window" in family.defaults:
        keys["sliding_window"] = window
    if switched:
        keys["use_sliding_window"] = window is not None
    return keys


def _read_number(known: Mapping[str, Any], of: Number, where: str) -> float | None:
    if of.optional and known.get(of.key) is None:
        return None
    value = integer(known, of.key, where) if of.whole else number(known, of.key, where)
    return float(value**of.power)


def _write_number(of: Number, field: str, config: ModelConfig) -> float | None:
    """A number that `_read_number` takes for this field of the config, as far as there is one."""
    value: float | None = getattr(config, field)
    if field == "attention_scale" and value is None:
        value = config.head_dim**-0.5
    if value is None or of.power == 1:
        return value
    guess = float(value ** (1 / of.power))
    near = [guess, math.nextafter(guess, 0), math.nextafter(guess, math.inf)]
    tried = [round(guess)] if of.whole else [float(round(guess)), *near]
    return next((one for one in tried if one > 0 and one**of.power == value), tried[0])


def _logical_widths(data: Mapping[str, Any], width: int, layers: int, where: str) -> tuple[int, ...]:
    ours = data.get("gluprune")
    if ours is None:
        return (width,) * layers
    widths = ours.get("intermediate_sizes") if isinstance(ours, Mapping) and len(ours) == 1 else None
    if (
        not isinstance(widths, list)
        or len(widths) != layers
        or not all(type(size) is int and 0 < size <= width for size in widths)
    ):
        raise RequestError(
            f"{where} has gluprune = {shown(ours)}; it must hold intermediate_sizes alone, {layers} whole numbers "
            f"from 1 to {width}"
        )
    return tuple(widths)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
