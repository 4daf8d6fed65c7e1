"""config.json as the numbers that shape the forward pass."""

from dataclasses import dataclass

from core.files import InputError


@dataclass(frozen=True)
class Config:
    """The numbers of a config.json that shape the forward pass, under Hugging Face's names."""

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


def parse_config(raw, where="config.json"):
    """config.json as a dict -> Config. What this file does not implement raises InputError instead of being ignored."""

    def refuse(what):
        raise InputError(f"{where}: {what}: this code implements plain Qwen2 only")

    if raw.get("model_type") != "qwen2":
        refuse(f"model_type is {raw.get('model_type')!r}, not 'qwen2'")
    rope = raw.get("rope_parameters") or {}  # transformers >= 5 keeps rope_theta in here
    for scaling in raw.get("rope_scaling") or {}, rope:
        if not isinstance(scaling, dict) or scaling.get("rope_type", scaling.get("type", "default")) != "default":
            refuse(f"rope scaling {scaling} is asked for")
    layer_types = set(raw.get("layer_types") or ["full_attention"])
    if raw.get("use_sliding_window") or layer_types != {"full_attention"}:
        refuse("sliding-window attention is asked for")
    if raw.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act is {raw['hidden_act']!r}, not 'silu'")
    if raw.get("quantization_config"):
        refuse("the weights are quantised")

    def field(name, default=None, kind=int):
        value = default if raw.get(name) is None else raw[name]
        try:
            if (number := kind(value)) == value and number != float("inf"):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
        what = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise InputError(f"{where}: {name} is {'missing; it is' if value is None else f'{value!r}, not'} {what}")

    heads, size = field("num_attention_heads"), field("hidden_size")
    config = Config(
        vocab_size=field("vocab_size"),
        hidden_size=size,
        intermediate_size=field("intermediate_size"),
        num_hidden_layers=field("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=field("num_key_value_heads", heads),
        head_dim=field("head_dim", size // max(heads, 1)),
        rms_norm_eps=field("rms_norm_eps", 1e-6, float),
        rope_theta=field("rope_theta", rope.get("rope_theta", 10000.0), float),
        tie_word_embeddings=field("tie_word_embeddings", False, bool),
        max_position_embeddings=field("max_position_embeddings", 32768),
    )
    for name, value in vars(config).items():
        if value <= 0 and not isinstance(value, bool):
            raise InputError(f"{where}: {name} is {value}; it is above 0")
    if config.num_attention_heads % config.num_key_value_heads:
        refuse(
            f"{config.num_attention_heads} query heads do not divide into {config.num_key_value_heads} key-value heads"
        )
    return config
