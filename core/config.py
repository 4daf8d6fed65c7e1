"""Reads config.json: the numbers that the forward pass depends on."""

from dataclasses import dataclass

from core.files import InputError, shown

LARGEST = 2**31  # the largest integer accepted in a config.json; no published model comes near it


@dataclass(frozen=True)
class Config:
    """The numbers of a config.json that the forward pass depends on, by their Hugging Face names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int


def rope_settings(raw: dict) -> dict:
    """{"rope_type", "rope_theta", "partial_rotary_factor"} of a config.json, as transformers 5 reads them.

    Linear scaling by a factor of 1 gets the type "default": it divides the frequencies by 1. A rope_theta inside
    rope_scaling or rope_parameters has precedence over the older key outside them.
    """
    nested = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if isinstance(nested, dict) and isinstance(nested.get("full_attention"), dict):  # one entry a layer type
        nested = nested["full_attention"]
    if not isinstance(nested, dict):
        nested = {"rope_type": nested}
    outer, kind = raw.get("rope_theta"), nested.get("rope_type", nested.get("type", "default"))
    return {
        "rope_type": "default" if kind == "linear" and nested.get("factor") == 1 else kind,
        "rope_theta": nested.get("rope_theta", 10000.0 if outer is None else outer),
        "partial_rotary_factor": nested.get("partial_rotary_factor", raw.get("partial_rotary_factor")),
    }


def parse_config(raw: dict, where: str = "config.json") -> Config:
    """config.json as a dict -> Config. Raises InputError for settings that this code does not implement.

    Except attention_dropout, which changes training only: training.setup.open_checkpoint warns of it.
    """

    def refuse(what):
        raise InputError(f"{where}: {what}; only plain Qwen2 is implemented")

    if raw.get("model_type") != "qwen2":
        refuse(f'model_type is {shown(raw.get("model_type"))}, not "qwen2"')
    rope = rope_settings(raw)
    if rope["rope_type"] not in ("default", None):
        refuse(f"rope scaling {shown(rope['rope_type'])} is set")
    if rope["partial_rotary_factor"] not in (None, 1.0):
        refuse(f"partial_rotary_factor is {shown(rope['partial_rotary_factor'])}, not 1")
    layer_types = raw.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        refuse(f"layer_types is {shown(layer_types)}, not full_attention everywhere: sliding-window attention")
    if raw.get("use_sliding_window"):
        refuse("use_sliding_window is set: sliding-window attention")
    if not raw.get("is_causal", True):
        refuse("is_causal is false: attention in both directions, as in embedding models")
    if raw.get("hidden_act", "silu") != "silu":
        refuse(f'hidden_act is {shown(raw["hidden_act"])}, not "silu"')
    if raw.get("quantization_config"):
        refuse("quantization_config is set: the weights are quantised")

    def field(name, default=None, kind=int, value=None):
        value = raw.get(name) if value is None else value
        return checked_number(default if value is None else value, name, kind, where)

    heads, size = field("num_attention_heads"), field("hidden_size")
    config = Config(
        vocab_size=field("vocab_size"),
        hidden_size=size,
        intermediate_size=field("intermediate_size"),
        num_hidden_layers=field("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=field("num_key_value_heads", heads),
        head_dim=field("head_dim", size // heads),
        rms_norm_eps=field("rms_norm_eps", 1e-6, float),
        rope_theta=field("rope_theta", 10000.0, float, value=rope["rope_theta"]),
        tie_word_embeddings=field("tie_word_embeddings", False, bool),
        max_position_embeddings=field("max_position_embeddings", 32768),
    )
    if config.num_attention_heads % config.num_key_value_heads:
        refuse(f"{heads} query heads do not divide into {config.num_key_value_heads} key-value heads")
    if config.head_dim % 2:
        refuse(f"head_dim is {config.head_dim}, but rotary embeddings need an even number")
    return config


def checked_number(value: object, name: str, kind: type, where: str) -> int | float | bool:
    """The value as int, float or bool. InputError if it has another type, is not finite, not positive, or too large."""
    what = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
    if value is None:
        raise InputError(f"{where}: {name} is missing; it must be {what}")
    if kind is bool and isinstance(value, bool):
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool) and kind is not bool
    if not number or not abs(value) < float("inf") or kind is int and value != int(value):
        raise InputError(f"{where}: {name} is {shown(value)}, not {what}")
    if value <= 0 or kind is int and value > LARGEST:
        raise InputError(
            f"{where}: {name} is {shown(value)}; it must be {'above 0' if value <= 0 else f'at most {LARGEST}'}"
        )
    return kind(value)
