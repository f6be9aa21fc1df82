"""Configs of published checkpoints: every key is understood, and the parameters are as many as were told."""

import pytest

from growkit_specs import architecture_for

LLAMA_STYLE = {"hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-05, "use_cache": True}
BERT_STYLE = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
}

# name: (class, parameters in all, config)
PUBLISHED = {
    "Llama-2-7B": (
        "LlamaForCausalLM",
        6_738_415_616,
        LLAMA_STYLE
        | {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096}
        | {"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1}
        | {"rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16", "vocab_size": 32000},
    ),
    "Llama-3.2-1B": (
        "LlamaForCausalLM",
        1_235_814_400,
        LLAMA_STYLE
        | {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072}
        | {"num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "head_dim": 64}
        | {"attention_bias": False, "mlp_bias": False, "rope_theta": 500000.0, "rope_scaling": {"factor": 32.0}}
        | {"tie_word_embeddings": True, "vocab_size": 128256, "eos_token_id": [128001, 128008, 128009]},
    ),
    "SmolLM2-135M": (
        "LlamaForCausalLM",
        134_515_008,
        LLAMA_STYLE
        | {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "max_position_embeddings": 8192}
        | {"num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "tie_word_embeddings": True}
        | {"vocab_size": 49152, "is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {}},
    ),
    "Mistral-7B-v0.3": (
        "MistralForCausalLM",
        7_248_023_552,
        LLAMA_STYLE
        | {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "sliding_window": None}
        | {"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 32768},
    ),
    "Qwen2.5-0.5B": (
        "Qwen2ForCausalLM",
        494_032_768,
        LLAMA_STYLE
        | {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "max_window_layers": 24}
        | {"num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "use_mrope": False}
        | {"sliding_window": 32768, "use_sliding_window": False, "tie_word_embeddings": True, "vocab_size": 151936},
    ),
    "Qwen3-0.6B": (
        "Qwen3ForCausalLM",
        596_049_920,
        LLAMA_STYLE
        | {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128}
        | {"num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "max_window_layers": 28}
        | {"attention_bias": False, "sliding_window": None, "tie_word_embeddings": True, "vocab_size": 151936},
    ),
    "bert-base-uncased": (
        "BertForMaskedLM",
        109_514_298,
        BERT_STYLE
        | {"model_type": "bert", "position_embedding_type": "absolute", "type_vocab_size": 2, "vocab_size": 30522},
    ),
    "roberta-base": (
        "RobertaForMaskedLM",
        124_697_433,
        BERT_STYLE
        | {"model_type": "roberta", "max_position_embeddings": 514, "type_vocab_size": 1, "vocab_size": 50265},
    ),
    "distilbert-base-uncased": (
        "DistilBertForMaskedLM",
        66_985_530,
        {"model_type": "distilbert", "activation": "gelu", "dim": 768, "hidden_dim": 3072, "n_heads": 12, "n_layers": 6}
        | {"max_position_embeddings": 512, "sinusoidal_pos_embds": False, "tie_weights_": True, "vocab_size": 30522},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        124_439_808,
        {"model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024}
        | {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-05, "summary_type": "cls_index"}
        | {"vocab_size": 50257},
    ),
    "t5-small": (
        "T5ForConditionalGeneration",
        60_506_624,
        {"model_type": "t5", "d_ff": 2048, "d_kv": 64, "d_model": 512, "num_heads": 8, "num_layers": 6}
        | {"decoder_start_token_id": 0, "initializer_factor": 1.0, "layer_norm_epsilon": 1e-06, "n_positions": 512}
        | {"output_past": True, "relative_attention_num_buckets": 32, "vocab_size": 32128},
    ),
    "flan-t5-base": (
        "T5ForConditionalGeneration",
        247_577_856,
        {"model_type": "t5", "d_ff": 2048, "d_kv": 64, "d_model": 768, "num_heads": 12, "num_layers": 12}
        | {"num_decoder_layers": 12, "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new"}
        | {"is_gated_act": True, "relative_attention_max_distance": 128, "tie_word_embeddings": False}
        | {"n_positions": 512, "output_past": True, "vocab_size": 32128, "task_specific_params": {}},
    ),
    "albert-base-v2": (
        "AlbertModel",
        11_683_584,
        BERT_STYLE
        | {"model_type": "albert", "hidden_act": "gelu_new", "embedding_size": 128, "vocab_size": 30000}
        | {"num_hidden_groups": 1, "inner_group_num": 1, "net_structure_type": 0, "num_memory_blocks": 0}
        | {"down_scale_factor": 1, "gap_size": 0, "max_position_embeddings": 512, "type_vocab_size": 2},
    ),
    "dinov2-base": (
        "Dinov2Model",
        86_580_480,
        {"model_type": "dinov2", "hidden_size": 768, "mlp_ratio": 4, "num_attention_heads": 12, "num_hidden_layers": 12}
        | {"image_size": 518, "patch_size": 14, "layerscale_value": 1.0, "drop_path_rate": 0.0, "use_swiglu_ffn": False}
        | {"apply_layernorm": True, "reshape_hidden_states": True, "out_features": ["stage12"], "out_indices": [12]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_understood(name: str) -> None:
    class_name, parameters, config = PUBLISHED[name]
    graph = architecture_for(str(config["model_type"])).graph(config, class_name)
    assert graph.parameter_count == parameters
