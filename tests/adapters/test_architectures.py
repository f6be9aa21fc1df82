"""Every architecture file and every class it lists: read, planned, grown, written, loaded by its library, the same."""

import inspect
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import growkit
from growkit.adapters import read_graph
from growkit_specs import Architecture, InvalidTarget, LayerGraph, UnsupportedModel
from growkit_specs.architecture import architectures
from growkit_torch.libraries import described
from growkit_torch.testing import randomised
from tests.adapters.timm_models import import_timm
from tests.adapters.tiny_models import directory, hidden_and_layers, library_class, library_defaults, loaded, tiny

FILES = list(architectures())
CLASSES = [(name, class_name) for name, file in architectures().items() for class_name in file.classes]
POST_NORM = ("albert", "bert", "distilbert", "roberta")  # no depth and no broken ratio keeps the function
UNCHANGED_BY = 1e-5  # of the largest entry: transformers' RMSNorms and softmax compute in float32

every_file = pytest.mark.parametrize("name", FILES)
every_class = pytest.mark.parametrize(("name", "class_name"), CLASSES, ids=[class_name for _, class_name in CLASSES])


def exact_growth(name: str) -> dict[str, int]:
    """The sizes that keep the function: any ratio and depth before pre-norm, whole ratios after post-norm."""
    return {"hidden": 48} if name in POST_NORM else {"hidden": 36, "layers": 4}


def written(model: growkit.Model, path: Path, **sizes: int) -> growkit.Model:
    """`model` grown to `sizes`, written at `path` and read back."""
    growkit.write(growkit.grow(model, **sizes), path)
    return growkit.read(path)


def config_of(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    return config


def edit_config(path: Path, **changes: Any) -> None:
    (path / "config.json").write_text(json.dumps({**config_of(path), **changes}))


def rename_tensors(path: Path, renamed: Mapping[str, str]) -> None:
    state = load_file(path / "model.safetensors")
    state = {renamed.get(name, name): tensor for name, tensor in state.items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def by_slot(path: Path) -> dict[tuple[str, int | None], np.ndarray]:
    """The tensors of a directory by slot and layer, whatever their names are."""
    model = growkit.read(path)
    return {(t.key, t.layer): np.array(model.weights[t.name]) for t in model.graph.tensors()}


def assert_same_tensors(a: dict[Any, np.ndarray], b: dict[Any, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[slot], b[slot]) for slot in a)


def plain_inputs(module: Any) -> dict[str, torch.Tensor]:
    """Two images, or two sequences of which one is padded."""
    draw, config = torch.Generator().manual_seed(1), getattr(module, "config", None)
    if config is None:
        return {"x": torch.randn(2, module.in_chans, 12, 12, generator=draw, dtype=torch.float64)}
    if module.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, config.num_channels, 12, 12, generator=draw, dtype=torch.float64)}
    ids = torch.randint(2, config.vocab_size, (2, 12), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    types = {"token_type_ids": ids % 2} if hasattr(config, "type_vocab_size") else {}
    decoded = (
        {"decoder_input_ids": ids.flip(0)}
        if "decoder_input_ids" in inspect.signature(module.forward).parameters
        else {}
    )
    return {"input_ids": ids, "attention_mask": mask, **types, **decoded}


def outputs(module: Any, **inputs: torch.Tensor) -> dict[str, np.ndarray]:
    """What the library itself computes, in float64."""
    with torch.no_grad():
        found = module.double()(**inputs)
    found = {"output": found} if torch.is_tensor(found) else found
    return {name: value.numpy() for name, value in found.items() if torch.is_tensor(value)}


def assert_computes_the_same(source: Any, target: Any, grown: growkit.Model, **inputs: torch.Tensor) -> None:
    """Both modules give the same; an output that lives in a grown space is read back first."""
    inputs = inputs or plain_inputs(source)
    before, after = outputs(source, **inputs), outputs(target, **inputs)
    assert before.keys() == after.keys()
    assert grown.growth is not None
    ports = {port.name: port for port in grown.graph.outputs}
    for name, expected in before.items():
        got = after[name]
        if got.shape != expected.shape:
            port = ports[name]
            got = grown.growth.operator.read_matrix(str(port.space), port.through).apply(got, got.ndim - 1)
        largest = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(got, expected, rtol=0, atol=UNCHANGED_BY * largest, err_msg=name)


# --- every file, every class -----------------------------------------------------------------------------------------


def test_every_file_has_a_tiny_model() -> None:
    without = [name for name, file in architectures().items() if not file.tiny]
    assert not without, "a file under architectures/ needs 'tiny', the config of a tiny model"


@every_class
def test_the_library_has_the_class(name: str, class_name: str) -> None:
    file = architectures()[name]
    cls = library_class(file, class_name)
    assert issubclass(cls, torch.nn.Module)
    assert file.library == "timm" or cls.config_class.model_type in file.model_types


@every_class
def test_nothing_changes_where_nothing_grows(name: str, class_name: str, tmp_path: Path) -> None:
    module = tiny(name, class_name)
    path, out = directory(tmp_path, module), tmp_path / "grown"
    source = growkit.read(path)
    assert growkit.plan(source).preserving

    grown = written(source, out)

    assert config_of(out) == config_of(path)
    state = loaded(module, out).state_dict()
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in module.state_dict().items())
    assert growkit.verify(source, grown).max_abs_diff == 0


@every_class
def test_a_directory_grows_exactly(name: str, class_name: str, tmp_path: Path) -> None:
    module = tiny(name, class_name)
    path, out = directory(tmp_path, module), tmp_path / "grown"
    source = growkit.read(path)
    sizes = exact_growth(name)
    assert growkit.plan(source, **sizes).preserving

    grown = written(source, out, **sizes)

    assert growkit.verify(source, grown).preserved
    larger = loaded(module, out)
    assert hidden_and_layers(larger) == (sizes["hidden"], sizes.get("layers", 2))
    assert_computes_the_same(module, larger, grown)


@every_class
def test_a_module_grows_exactly(name: str, class_name: str) -> None:
    module = tiny(name, class_name)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    config = str(getattr(module, "config", None))

    grown = growkit.grow(growkit.read(module), **exact_growth(name))
    larger = grown.to_torch()

    assert type(larger) is type(module)
    assert hidden_and_layers(larger)[0] == exact_growth(name)["hidden"]
    assert str(getattr(module, "config", None)) == config
    assert all(torch.equal(before[key], tensor) for key, tensor in module.state_dict().items())
    assert_computes_the_same(module, larger, grown)


@pytest.mark.parametrize(("name", "class_name"), [case for case in CLASSES if case[0] in POST_NORM])
@pytest.mark.parametrize(
    ("sizes", "because"),
    [({"hidden": 48, "layers": 4}, r"layers: (identity blocks|depth)"), ({"hidden": 36}, "LayerNorm over hidden")],
)
def test_post_norm_is_told_inexact_and_grows(
    name: str, class_name: str, sizes: dict[str, int], because: str, tmp_path: Path
) -> None:
    source = growkit.read(tiny(name, class_name))
    plan = growkit.plan(source, **sizes)
    assert not plan.preserving
    assert any(re.fullmatch(because, reason.condition) for reason in plan.verdict.broken)

    grown = written(source, tmp_path / "grown", **sizes)

    assert not growkit.verify(source, grown).preserved
    assert getattr(transformers, class_name).from_pretrained(tmp_path / "grown").config.hidden_size == sizes["hidden"]


@every_file
def test_a_config_that_omits_a_key_means_the_default(name: str) -> None:
    file = architectures()[name]
    config = library_defaults(file)
    named = {key: value for key, value in file.config.defaults.items() if value is not None}
    assert {key: getattr(config, key) for key in named if hasattr(config, key)} == {
        key: value for key, value in named.items() if hasattr(config, key)
    }
    assert file.sizes({}) == file.sizes(config.to_dict() if hasattr(config, "to_dict") else vars(config))
    for key, values in file.config.supported.items():
        value = getattr(config, key, values[0])
        assert set(value if key in file.config.per_layer and value else [value]) <= set(values)


@pytest.mark.parametrize(
    ("name", "class_name", "config", "parameters"),
    [
        ("albert", "AlbertModel",
         {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}, 11_683_584),  # base
        ("bert", "BertModel", {}, 109_482_240),  # bert-base-uncased
        ("cait", "Cait", {"img_size": 224, "embed_dim": 192, "depth": 24, "num_heads": 4}, 11_956_264),  # XXS24
        ("deit", "DeiTForImageClassificationWithTeacher", {"num_labels": 1000}, 87_338_192),  # base, distilled
        ("dinov2", "Dinov2Model", {"image_size": 518}, 86_580_480),  # base
        ("distilbert", "DistilBertModel", {}, 66_362_880),  # base, uncased
        ("gemma", "GemmaForCausalLM",
         {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8,
          "num_key_value_heads": 1}, 2_506_172_416),  # 2B
        ("gemma2", "Gemma2ForCausalLM", {}, 2_614_341_888),  # 2B
        ("gemma3", "Gemma3ForCausalLM",
         {"hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4, "num_key_value_heads": 1,
          "vocab_size": 262144}, 999_885_952),  # 1B
        ("gpt2", "GPT2LMHeadModel", {}, 124_439_808),
        ("gpt_neox", "GPTNeoXForCausalLM", {}, 20_554_567_680),  # 20B
        ("llama", "LlamaForCausalLM", {}, 6_738_415_616),  # Llama 2 7B
        ("mistral", "MistralForCausalLM", {}, 7_241_732_096),  # 7B
        ("opt", "OPTForCausalLM", {}, 125_239_296),  # 125m
        ("opt", "OPTForCausalLM",
         {"hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
          "word_embed_proj_dim": 512, "do_layer_norm_before": False}, 331_196_416),  # 350m
        ("phi3", "Phi3ForCausalLM", {}, 3_821_079_552),  # mini
        ("qwen2", "Qwen2ForCausalLM",
         {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
          "num_key_value_heads": 2, "tie_word_embeddings": True}, 494_032_768),  # Qwen2.5 0.5B
        ("qwen3", "Qwen3ForCausalLM",
         {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
          "num_key_value_heads": 8, "tie_word_embeddings": True}, 596_049_920),  # 0.6B
        ("roberta", "RobertaModel", {"max_position_embeddings": 514, "type_vocab_size": 1}, 124_645_632),  # base
        ("t5", "T5ForConditionalGeneration", {}, 60_506_624),  # small
        ("vit", "ViTForImageClassification", {"num_labels": 1000}, 86_567_656),  # base, patches of 16
    ],
)  # fmt: skip
def test_published_models_have_their_published_size(
    name: str, class_name: str, config: dict[str, Any], parameters: int
) -> None:
    graph = architectures()[name].graph(config, class_name, has_tensor=lambda tensor: "mask_token" not in tensor)
    assert graph.parameter_count == parameters


@every_file
def test_an_unknown_config_key_is_refused(name: str, tmp_path: Path) -> None:
    path = directory(tmp_path, tiny(name))
    edit_config(path, warp_factor=9)
    with pytest.raises(UnsupportedModel, match=f"'warp_factor' is not understood .*{name}.yaml"):
        growkit.read(path)


@every_file
def test_an_unknown_tensor_is_refused(name: str, tmp_path: Path) -> None:
    path = directory(tmp_path, tiny(name))
    state = load_file(path / "model.safetensors")
    save_file({**state, "adapter.weight": torch.ones(3)}, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=rf"adapter\.weight \[3\] is not understood .*{name}.yaml"):
        growkit.read(path)


# --- names -----------------------------------------------------------------------------------------------------------


def names_under(file: Architecture, config: Mapping[str, Any], class_name: str, **scheme: Any) -> dict[Any, str]:
    graph: LayerGraph = file.graph(config, class_name, **scheme)
    return {(t.key, t.layer): t.name for t in graph.tensors(tied=True)}


SCHEMES = [(name, i) for name, file in architectures().items() for i in range(len(file.naming) + 1)]


@pytest.mark.parametrize(("name", "naming"), SCHEMES)
def test_every_naming_scheme_reads(name: str, naming: int, tmp_path: Path) -> None:
    file = architectures()[name]
    for class_name in file.classes:
        path = directory(tmp_path, tiny(name, class_name), class_name)
        expected = by_slot(path)
        config = described(config_of(path)).config
        names = names_under(file, config, class_name)
        others = names_under(file, config, class_name, naming=naming)
        rename_tensors(path, {names[slot]: others[slot] for slot in names})
        assert_same_tensors(by_slot(path), expected)


@pytest.mark.parametrize(("name", "class_name"), CLASSES)
def test_a_checkpoint_reads_with_and_without_the_base_prefix(name: str, class_name: str, tmp_path: Path) -> None:
    file = architectures()[name]
    path = directory(tmp_path, tiny(name, class_name))
    expected = by_slot(path)
    config = described(config_of(path)).config
    names = names_under(file, config, class_name)
    others = names_under(file, config, class_name, base="" if file.base_of(class_name) else file.base)
    rename_tensors(path, {names[slot]: others[slot] for slot in names})
    assert_same_tensors(by_slot(path), expected)


def test_a_module_is_written_under_the_names_of_files(tmp_path: Path) -> None:
    """transformers 5 renamed ViT's modules and kept the names in files, which every version reads."""
    module = tiny("vit", "ViTForImageClassification")
    path, out = directory(tmp_path, module), tmp_path / "grown"
    growkit.write(growkit.read(module), out)
    assert load_file(out / "model.safetensors").keys() == load_file(path / "model.safetensors").keys()


def test_the_causal_masks_of_old_gpt2_checkpoints_are_left_behind(tmp_path: Path) -> None:
    path, out = directory(tmp_path, tiny("gpt2", "GPT2LMHeadModel")), tmp_path / "grown"
    state = load_file(path / "model.safetensors")
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 20, 20, dtype=torch.uint8) for i in range(2)}
    masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    stripped = {key.removeprefix("transformer."): tensor for key, tensor in state.items()}
    save_file({**stripped, **masks}, path / "model.safetensors", metadata={"format": "pt"})
    edit_config(path, n_ctx=20)

    grown = written(growkit.read(path), out, hidden=36, positions=30)

    assert growkit.verify(growkit.read(path), grown).preserved
    assert load_file(out / "model.safetensors").keys() == stripped.keys()
    assert config_of(out)["n_ctx"] == config_of(out)["n_positions"] == 30


# --- configs follow the growth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, file in architectures().items() if file.config.per_layer])
def test_lists_with_an_entry_per_layer_follow_the_depth(name: str, tmp_path: Path) -> None:
    path, out = directory(tmp_path, tiny(name)), tmp_path / "grown"
    written(growkit.read(path), out, layers=5)
    first, second = config_of(path)["layer_types"]
    assert {first, second} == {"full_attention", "sliding_attention"}
    assert config_of(out)["layer_types"] == [first] * 3 + [second] * 2
    assert config_of(out).get("max_window_layers", 3) == 3


@pytest.mark.parametrize(
    ("name", "pattern"), [("gemma2", {}), ("gemma3", {"sliding_window_pattern": 2}), ("gemma3", {})]
)
def test_lists_that_a_period_gives_are_written_where_the_depth_changes(
    name: str, pattern: dict[str, int], tmp_path: Path
) -> None:
    """Copied layers keep their type, which the period would change."""
    path = directory(tmp_path, tiny(name))
    config = {k: v for k, v in config_of(path).items() if "layer_types" not in k and "pattern" not in k} | pattern
    (path / "config.json").write_text(json.dumps(config))
    source = growkit.read(path)
    types = transformers.AutoModel.from_pretrained(path).config.layer_types

    grown = written(source, tmp_path / "deeper", layers=4)

    assert growkit.verify(source, grown).preserved
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "deeper")
    assert loaded.config.layer_types == [types[0], types[0], types[1], types[1]]
    written(source, tmp_path / "wider", hidden=48)
    assert "layer_types" not in config_of(tmp_path / "wider")


def test_a_layer_type_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path = directory(tmp_path, tiny("gemma2"))
    edit_config(path, layer_types=["full_attention", "linear_attention"])
    with pytest.raises(UnsupportedModel, match=r"layer_types is 'linear_attention' for some layer; .* supports"):
        growkit.read(path)


def test_windows_that_a_threshold_says_follow_the_depth(tmp_path: Path) -> None:
    path, out = directory(tmp_path, tiny("qwen2")), tmp_path / "grown"
    (path / "config.json").write_text(json.dumps({k: v for k, v in config_of(path).items() if k != "layer_types"}))
    source = growkit.read(path)
    assert growkit.verify(source, written(source, out, layers=4)).preserved
    loaded = transformers.AutoModel.from_pretrained(out)
    assert loaded.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2


TIED = [
    ("albert", "AlbertForMaskedLM"),
    ("bert", "BertForMaskedLM"),
    ("roberta", "RobertaForMaskedLM"),
    ("distilbert", "DistilBertForMaskedLM"),
]
TIED += [("gpt2", "GPT2LMHeadModel"), ("llama", "LlamaForCausalLM"), ("mistral", "MistralForCausalLM")]
TIED += [("gemma", "GemmaForCausalLM"), ("gemma2", "Gemma2ForCausalLM"), ("gemma3", "Gemma3ForCausalLM")]
TIED += [("gpt_neox", "GPTNeoXForCausalLM"), ("opt", "OPTForCausalLM"), ("phi3", "Phi3ForCausalLM")]
TIED += [("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(("name", "class_name"), TIED)
def test_a_tie_stays_as_it_is(name: str, class_name: str, tie: bool, tmp_path: Path) -> None:
    module = tiny(name, class_name, tie_word_embeddings=tie)
    path, out = directory(tmp_path, module), tmp_path / "grown"
    source = growkit.read(path)

    grown = written(source, out, **exact_growth(name))

    assert growkit.verify(source, grown).preserved
    loaded = type(module).from_pretrained(out)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is tie
    assert_computes_the_same(module, loaded, grown)


def test_norms_that_share_an_epsilon_with_others_keep_it(tmp_path: Path) -> None:
    """Qwen3's norms over the heads do not grow with hidden; those of Qwen2 are all over hidden."""
    for name, epsilon in (("qwen3", 1e-6), ("gemma3", 1e-6), ("qwen2", 1e-6 * 24 / 36), ("gemma2", 1e-6 * 24 / 36)):
        path = directory(tmp_path, tiny(name), name)
        written(growkit.read(path), tmp_path / f"{name}-grown", hidden=36)
        assert config_of(tmp_path / f"{name}-grown")["rms_norm_eps"] == pytest.approx(epsilon, rel=1e-9)


@pytest.mark.parametrize(("name", "head_dim"), [("mistral", 6), ("qwen2", 6), ("qwen3", 8), ("gemma", 8)])
def test_heads_out_of_ratio_need_a_head_dim_of_their_own(name: str, head_dim: int, tmp_path: Path) -> None:
    module = tiny(name)
    source, out = growkit.read(directory(tmp_path, module)), tmp_path / "grown"
    grown = written(source, out, hidden=36, heads=8)
    assert config_of(out)["head_dim"] == head_dim
    assert_computes_the_same(module, type(module).from_pretrained(out), grown)


def test_gpt2_says_its_ffn_only_where_it_must(tmp_path: Path) -> None:
    source = growkit.read(directory(tmp_path, tiny("gpt2")))
    written(source, tmp_path / "ratio", hidden=36)
    written(source, tmp_path / "own", ffn=120)
    assert config_of(tmp_path / "ratio")["n_inner"] is None
    assert config_of(tmp_path / "own")["n_inner"] == 120


@pytest.mark.parametrize(("size", "grown_size"), [(None, 36), (10, 10)])
def test_a_pooler_follows_hidden_unless_it_has_a_size_of_its_own(
    size: int | None, grown_size: int, tmp_path: Path
) -> None:
    source = growkit.read(directory(tmp_path, tiny("vit", pooler_output_size=size)))
    grown = written(source, tmp_path / "grown", hidden=36)
    assert config_of(tmp_path / "grown")["pooler_output_size"] == grown_size
    assert growkit.verify(source, grown).preserved


def test_names_of_stages_follow_the_depth_of_dinov2(tmp_path: Path) -> None:
    source = growkit.read(directory(tmp_path, tiny("dinov2", out_features=["stage1"])))
    written(source, tmp_path / "wider", hidden=36)
    written(source, tmp_path / "deeper", layers=4)
    assert config_of(tmp_path / "wider")["out_features"] == ["stage1"]
    assert not {"stage_names", "out_features", "out_indices"} & config_of(tmp_path / "deeper").keys()
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "deeper")
    assert loaded.config.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]


LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 4.0]}


def test_rotary_factors_that_are_listed_keep_head_dim() -> None:
    source = growkit.read(tiny("phi3", rope_scaling=LONGROPE, original_max_position_embeddings=10))
    with pytest.raises(InvalidTarget, match=r"head_dim=12: .* short_factor, long_factor for the pairs of head_dim 6"):
        growkit.plan(source, hidden=48, heads=4)
    assert not growkit.plan(source, positions=30).preserving


# --- parts that not every model has ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "class_name", "config"),
    [
        ("vit", "ViTForImageClassification", {"qkv_bias": False}),
        ("vit", "ViTForImageClassification", {"image_size": 14}),  # a rest of two pixels that no patch covers
        ("dinov2", "Dinov2ForImageClassification", {"qkv_bias": False, "use_mask_token": False}),
        ("llama", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", "Qwen3ForCausalLM", {"attention_bias": True}),
        ("llama", "LlamaForSequenceClassification", {"pad_token_id": None}),
        ("gpt2", "GPT2ForSequenceClassification", {"pad_token_id": None}),
        ("distilbert", "DistilBertForMaskedLM", {"sinusoidal_pos_embds": True}),
        ("roberta", "RobertaForCausalLM", {"is_decoder": True}),
        ("gpt_neox", "GPTNeoXForCausalLM", {"use_parallel_residual": False, "attention_bias": False}),
        ("opt", "OPTForCausalLM", {"word_embed_proj_dim": 16}),
        ("opt", "OPTForSequenceClassification", {"word_embed_proj_dim": 16, "enable_bias": False}),
        ("opt", "OPTModel", {"word_embed_proj_dim": 16}),
        ("phi3", "Phi3ForCausalLM", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 10}),
        ("t5", "T5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
        ("t5", "T5EncoderModel", {"feed_forward_proj": "gated-silu"}),
    ],
)
def test_variants_grow_exactly(name: str, class_name: str, config: dict[str, Any], tmp_path: Path) -> None:
    source = growkit.read(directory(tmp_path, tiny(name, class_name, **config)))
    sizes = exact_growth(name)
    assert growkit.plan(source, **sizes).preserving
    assert growkit.verify(source, written(source, tmp_path / "grown", **sizes)).preserved


def test_opt_with_norms_after_the_additions_keeps_whole_ratios(tmp_path: Path) -> None:
    """What OPT 350m is: post-norm, embeddings narrower than hidden, no final norm."""
    module = tiny("opt", "OPTForCausalLM", do_layer_norm_before=False, word_embed_proj_dim=16)
    source = growkit.read(directory(tmp_path, module))
    assert all(layer.through is None for _, layer in source.graph.walk())
    assert not growkit.plan(source, hidden=36).preserving
    grown = written(source, tmp_path / "grown", hidden=48)
    assert growkit.plan(source, hidden=48).preserving
    assert growkit.verify(source, grown).preserved
    assert config_of(tmp_path / "grown")["word_embed_proj_dim"] == 16
    assert_computes_the_same(module, type(module).from_pretrained(tmp_path / "grown"), grown)


def test_sizes_at_which_a_layer_would_vanish_are_refused() -> None:
    source = growkit.read(tiny("opt", "OPTForCausalLM", word_embed_proj_dim=48))
    with pytest.raises(InvalidTarget, match="a config of architecture 'opt' says a model without narrow_embedding, "):
        growkit.plan(source, hidden=48)
    assert growkit.plan(source, hidden=36).preserving


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"add_pooling_layer": False}) for name in ("albert", "bert", "roberta", "vit", "deit")),
        *((name, {"use_mask_token": True}) for name in ("vit", "deit")),
    ],
)
def test_parts_that_only_the_constructor_knows_of(name: str, options: dict[str, bool]) -> None:
    module = tiny(name, options=options)
    grown = growkit.grow(growkit.read(module), **exact_growth(name))
    larger = grown.to_torch()
    assert len(larger.state_dict().keys() - module.state_dict().keys()) == 16 * (larger.config.num_hidden_layers - 2)
    assert_computes_the_same(module, larger, grown)


@pytest.mark.parametrize("class_name", ["ViTForMaskedImageModeling", "DeiTForMaskedImageModeling"])
def test_masked_patches_are_reconstructed_the_same(class_name: str) -> None:
    name = class_name[:4].removesuffix("F").lower()
    module = tiny(name, class_name)
    grown = growkit.grow(growkit.read(module), **exact_growth(name))
    masked = torch.tensor([[True, False, True] * 3, [False] * 9])
    assert_computes_the_same(module, grown.to_torch(), grown, **plain_inputs(module), bool_masked_pos=masked)


@pytest.mark.parametrize("pad", [0, 1, 3])
def test_positions_of_roberta_start_after_the_padding_token(pad: int) -> None:
    source = growkit.read(tiny("roberta", "RobertaForMaskedLM", pad_token_id=pad))
    assert source.graph.attributes["reserved_positions"] == pad + 1
    assert growkit.verify(source, growkit.grow(source, hidden=48, positions=30)).preserved


# --- two stacks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [True, False])
def test_a_head_of_its_own_beside_a_decoder_that_is_scaled_or_not(scaled: bool, tmp_path: Path) -> None:
    """T5 v1.1 has one; transformers 5 says of it that it is tied, and that the decoder's output is not scaled."""
    module = tiny("t5", "T5ForConditionalGeneration", tie_word_embeddings=scaled)
    if not scaled:
        module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.flip(0).clone())
    path, out = directory(tmp_path, module), tmp_path / "grown"
    source = growkit.read(path)
    assert len({"shared.weight", "lm_head.weight"} & source.weights.keys()) == (1 if scaled else 2)

    grown = written(source, out, hidden=36, layers=4)

    loaded = type(module).from_pretrained(out)
    assert (loaded.lm_head.weight is loaded.shared.weight) is scaled
    assert_computes_the_same(module, loaded, grown)
    in_memory = growkit.grow(growkit.read(module), hidden=36, layers=4)
    assert_computes_the_same(module, in_memory.to_torch(), in_memory)


def test_a_decoder_that_is_scaled_only_while_its_head_is_tied_is_not_untied() -> None:
    source = growkit.read(tiny("t5", "T5ForConditionalGeneration"))
    assert growkit.plan(source, hidden=48, method="net2net").preserving
    with pytest.raises(InvalidTarget, match=r"an untied head, which this method needs .* without scaled_lm_head"):
        growkit.plan(source, hidden=36, method="net2net")


@pytest.mark.parametrize(("decoder_layers", "grown_layers"), [(3, 6), (None, 4)])
def test_both_stacks_deepen_in_ratio(decoder_layers: int | None, grown_layers: int, tmp_path: Path) -> None:
    path, out = directory(tmp_path, tiny("t5", num_decoder_layers=decoder_layers)), tmp_path / "grown"
    edit_config(path, num_decoder_layers=decoder_layers)
    grown = written(growkit.read(path), out, layers="2x")
    assert grown.graph.depths == {"encoder": 4, "decoder": grown_layers}
    assert config_of(out)["num_decoder_layers"] == (decoder_layers and grown_layers)
    assert transformers.AutoModel.from_pretrained(out).config.num_decoder_layers == grown_layers


def test_stacks_that_cannot_keep_their_ratio_are_refused() -> None:
    with pytest.raises(InvalidTarget, match=r"layers: decoder would have 4\.5 layers, expected a whole number"):
        growkit.plan(growkit.read(tiny("t5")), layers=3)


def test_positions_that_a_stack_computes_once_stay_in_its_first_block(tmp_path: Path) -> None:
    path, out = directory(tmp_path, tiny("t5")), tmp_path / "grown"
    written(growkit.read(path), out, layers=4, heads=6)
    biases = {n: t for n, t in load_file(out / "model.safetensors").items() if "relative_attention_bias" in n}
    assert biases.keys() == {
        f"{s}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for s in ("encoder", "decoder")
    }
    before = load_file(path / "model.safetensors")
    assert all(torch.equal(bias[:, :4], before[name]) for name, bias in biases.items())


def test_tensors_that_old_t5_checkpoints_repeat_are_left_behind(tmp_path: Path) -> None:
    path, out = directory(tmp_path, tiny("t5")), tmp_path / "grown"
    state = load_file(path / "model.safetensors")
    repeated = {f"{stack}.embed_tokens.weight": state["shared.weight"].clone() for stack in ("encoder", "decoder")}
    cross = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.ones(8, 4)}
    save_file({**state, **repeated, **cross}, path / "model.safetensors", metadata={"format": "pt"})
    source = growkit.read(path)
    assert growkit.verify(source, written(source, out, hidden=36)).preserved
    assert load_file(out / "model.safetensors").keys() == state.keys()


# --- one block that all layers share ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lossless", "stack", "interpolate"])
def test_layers_that_share_a_block_only_run_it_more_often(method: str, tmp_path: Path) -> None:
    path, out = directory(tmp_path, tiny("albert")), tmp_path / "grown"
    source = growkit.read(path)
    plan = growkit.plan(source, layers=5, method=f"width=lossless,depth={method}")
    assert [(r.condition, r.detail) for r in plan.verdict.broken] == [
        ("layers: depth", "2 to 5 layers: they are one block, which runs more often")
    ]

    growkit.write(growkit.grow(source, plan), out)

    before, after = (load_file(folder / "model.safetensors") for folder in (path, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert transformers.AutoModel.from_pretrained(out).config.num_hidden_layers == 5
    assert plan.target.parameter_count == plan.source.parameter_count
    costs = plan.to_json()
    once = costs["target"]["flops_per_token"] - costs["source"]["flops_per_token"]
    assert once == 3 * 2 * (4 * 24 * 24 + 2 * 24 * 40)


def test_a_factorised_embedding_keeps_its_size(tmp_path: Path) -> None:
    grown = written(growkit.read(tiny("albert", "AlbertForMaskedLM")), tmp_path / "grown", hidden=48)
    assert config_of(tmp_path / "grown")["embedding_size"] == grown.graph.sizes["embedding"] == 10
    assert growkit.plan(growkit.read(tmp_path / "grown")).preserving


def test_the_pooler_that_published_alberts_hold_is_left_behind(tmp_path: Path) -> None:
    path, out = directory(tmp_path, tiny("albert", "AlbertForMaskedLM")), tmp_path / "grown"
    state = load_file(path / "model.safetensors")
    pooler = {"albert.pooler.weight": torch.ones(24, 24), "albert.pooler.bias": torch.ones(24)}
    save_file({**state, **pooler}, path / "model.safetensors", metadata={"format": "pt"})
    source = growkit.read(path)
    assert growkit.verify(source, written(source, out, hidden=48)).preserved
    assert load_file(out / "model.safetensors").keys() == state.keys()


# --- timm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lossless", "net2net"])
@pytest.mark.parametrize(
    "sizes", [{"hidden": 36}, {"hidden": 48}, {"hidden": 48, "heads": 4}, {"hidden": 48, "heads": 6}]
)
def test_talking_heads_talk_the_same(method: str, sizes: dict[str, int]) -> None:
    """In float64, exactly where the verdict says so: heads that are added, copied, and wider."""
    source = growkit.read(tiny("cait").double())
    plan = growkit.plan(source, method=method, **sizes)
    assert plan.preserving == (method == "lossless" or sizes["hidden"] == 48)
    report = growkit.verify(source, growkit.grow(source, plan))
    assert report.preserved == plan.preserving
    assert report.rtol == 1e-10


@pytest.mark.parametrize("config", [{"qkv_bias": False}, {"num_classes": 0}, {"global_pool": "avg"}])
def test_timms_variants_grow_exactly(config: dict[str, Any], tmp_path: Path) -> None:
    module = tiny("cait", **config)
    source = growkit.read(directory(tmp_path, module))
    grown = written(source, tmp_path / "grown", hidden=36, layers=4)
    assert growkit.verify(source, grown).preserved
    assert_computes_the_same(module, loaded(module, tmp_path / "grown"), grown)


def test_layers_of_the_class_token_stay() -> None:
    """Every published CaiT has two, whatever the depth of its patches is."""
    plan = growkit.plan(growkit.read(tiny("cait")), layers=3)
    assert plan.target.depths == {"blocks": 3, "blocks_token_only": 1}
    assert plan.preserving


def test_a_module_that_timm_did_not_name_is_written(tmp_path: Path) -> None:
    cait = import_timm().models.Cait
    module = randomised(cait(**architectures()["cait"].tiny)).eval()
    grown = growkit.grow(growkit.read(module), hidden=36)
    growkit.write(grown, tmp_path / "grown")
    assert_computes_the_same(module, loaded(module, tmp_path / "grown"), grown)
    cait(**config_of(tmp_path / "grown")["model_args"]).load_state_dict(load_file(tmp_path / "grown/model.safetensors"))


def test_a_name_of_timms_says_what_the_arguments_leave_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"architecture": "cait_xxs24_224", "num_classes": 10, "global_pool": "token"}
    config["pretrained_cfg"] = {"input_size": [3, 224, 224], "fixed_input_size": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    import_timm()
    graph = read_graph(tmp_path)
    assert (graph.sizes["hidden"], graph.sizes["heads"], graph.sizes["labels"]) == (192, 4, 10)
    assert graph.depths == {"blocks": 24, "blocks_token_only": 2}

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        UnsupportedModel, match=r"model_args does not hold embed_dim, .* 'cait_xxs24_224'; timm cannot be"
    ):
        read_graph(tmp_path)


def test_what_growkit_wrote_is_read_without_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(growkit.read(tiny("cait")), tmp_path / "grown", hidden=36)
    monkeypatch.setitem(sys.modules, "timm", None)
    grown = growkit.read(tmp_path / "grown")
    growkit.write(growkit.grow(grown, hidden=72), tmp_path / "again")
    assert growkit.read(tmp_path / "again").graph.sizes["hidden"] == 72
    assert config_of(tmp_path / "again")["num_features"] == 72
    with pytest.raises(UnsupportedModel, match=r"takes timm to run this model; .* install growkit\[timm\]"):
        grown.to_torch()


def test_timms_modules_that_no_file_knows_are_refused() -> None:
    module = import_timm().create_model("resnet10t")
    with pytest.raises(UnsupportedModel, match="the class 'ResNet' of timm is not known; known: Cait;"):
        growkit.read(module)
    with pytest.raises(UnsupportedModel, match="the module Linear is of none of the libraries timm, transformers"):
        growkit.read(torch.nn.Linear(2, 3))


def test_facts_that_no_argument_says_are_checked() -> None:
    module = tiny("cait")
    module.norm.eps = 1e-3
    with pytest.raises(UnsupportedModel, match=r"epsilon is 0\.001; architecture 'cait' supports 1e-06"):
        growkit.read(module)
    del module.patch_embed.img_size
    with pytest.raises(UnsupportedModel, match=r"Cait: nothing is at patch_embed\.img_size"):
        growkit.read(module)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False; .* supports True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx is True; .* supports False"),
        ("albert", {"num_hidden_groups": 2}, "num_hidden_groups is 2; architecture 'albert' supports 1"),
        ("albert", {"inner_group_num": 2}, "inner_group_num is 2; architecture 'albert' supports 1"),
        ("dinov2", {"use_swiglu_ffn": True}, "use_swiglu_ffn is True; .* supports False"),
        ("vit", {"image_size": [12, 12]}, r"'image_size // patch_size' is computed from \[12, 12\] and 4"),
    ],
)
def test_configs_that_compute_something_else_are_refused(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        growkit.read(tiny(name, **config))


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2"])
def test_positions_of_an_image_do_not_grow(name: str) -> None:
    with pytest.raises(InvalidTarget, match="no size 'positions'; its sizes are hidden, heads, head_dim, ffn, layers"):
        growkit.plan(growkit.read(tiny(name)), positions=20)


def test_ffn_of_dinov2_is_a_multiple_of_hidden() -> None:
    with pytest.raises(InvalidTarget, match=r"ffn=60 is not a multiple of hidden = 24, .* nearest ffn: 48 or 72"):
        growkit.plan(growkit.read(tiny("dinov2")), ffn=60)
