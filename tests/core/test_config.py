import pytest
from conftest import tiny_config

from core.config import parse_config
from core.files import InputError


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"model_type": "llama"}, "model_type"),
        ({"use_sliding_window": True}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_key_value_heads": 3}, "heads"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": "many"}, 'vocab_size is "many", not a whole number'),
        ({"num_hidden_layers": 5.5}, "num_hidden_layers is 5.5, not a whole number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN, not a number"),
        ({"tie_word_embeddings": "false"}, "not true or false"),
        ({"rope_scaling": "yarn"}, "rope"),
        ({"is_causal": False}, "both directions"),
    ],
)
def test_configs_that_are_not_implemented_are_refused(changes, word):
    config = tiny_config(**changes)
    if config["hidden_size"] is None:
        del config["hidden_size"]
    with pytest.raises(InputError, match=word):
        parse_config(config)


def test_rope_theta_as_transformers_5_writes_it():
    config = tiny_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    del config["rope_theta"]
    assert parse_config(config).rope_theta == 5e5


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_hidden_layers": True}, "num_hidden_layers is true, not a whole number"),
        ({"vocab_size": -5}, "vocab_size is -5; it must be above 0"),
        ({"hidden_size": int("9" * 4000)}, "hidden_size is 9{57}...; it must be at most"),
        ({"rope_theta": float("inf")}, "rope_theta is Infinity, not a number"),
        ({"rope_theta": float("nan")}, "rope_theta is NaN, not a number"),
        ({"rope_theta": [1]}, "rope_theta is .1., not a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, not true or false"),
        ({"layer_types": 5}, "layer_types is 5"),
        ({"layer_types": [{}]}, "layer_types"),
        ({"layer_types": {"full_attention": 1}}, "layer_types"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": [1]}, "rope scaling .1. is set"),
        ({"hidden_size": 33, "num_attention_heads": 1, "num_key_value_heads": 1}, "head_dim is 33"),
        ({"model_type": "x" * 10**6}, "model_type is \"xx+[.][.][.], not"),
    ],
)  # fmt: skip
def test_odd_values_are_one_short_line(changes, words):
    with pytest.raises(InputError, match=words) as e:
        parse_config(tiny_config(**changes))
    assert len(str(e.value)) < 250
