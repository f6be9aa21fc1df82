"""Modules that no architecture file knows are exported, inferred and grown; known ones are written as ONNX files."""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

import growkit
from growkit_specs import GrowkitError, InvalidTarget, LayerGraph, UnsupportedFormat, UnsupportedModel
from growkit_torch.testing import randomised
from tests.adapters.tiny_models import directory, tiny

VOCAB, POSITIONS = 50, 40
DIFFERENCE = 1e-6
"""Relative to the largest output; weights are stored in float32, and both modules run in float64."""

Sizes = Mapping[str, int]
TOKENS = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


# --- modules -----------------------------------------------------------------------------------------------------


class NanoBlock(nn.Module):
    """Attention in einsums: one matrix for queries, keys and values, an output matrix of three axes."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        hidden, self.heads, self.head_dim = sizes["hidden"], sizes["heads"], sizes["head_dim"]
        self.norm1 = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * self.heads * self.head_dim, bias=False)
        self.out = nn.Parameter(torch.zeros(self.heads, self.head_dim, hidden))
        self.norm2 = nn.LayerNorm(hidden)
        self.up, self.down = nn.Linear(hidden, sizes["ffn"]), nn.Linear(sizes["ffn"], hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, self.head_dim).unbind(2)
        scores = torch.einsum("blhd,bmhd->bhlm", q, k) * self.head_dim**-0.5
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        x = x + torch.einsum("bhlm,bmhd,hdo->blo", weights, v, self.out)
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Nano(nn.Module):
    """A decoder whose head is the token table itself, by a function and not by a parameter of its own."""

    def __init__(self, sizes: Sizes, depth: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, sizes["hidden"]), nn.Embedding(POSITIONS, sizes["hidden"])
        self.blocks = nn.ModuleList(NanoBlock(sizes) for _ in range(depth))
        self.norm = nn.LayerNorm(sizes["hidden"])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.tokens.weight)


class Encoder(nn.Module):
    """torch's own encoder between an embedding and a classifier."""

    def __init__(self, sizes: Sizes, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, sizes["hidden"])
        layer = nn.TransformerEncoderLayer(
            sizes["hidden"], sizes["heads"], sizes["ffn"], batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(sizes["hidden"])
        self.encoder = nn.TransformerEncoder(layer, depth, norm=norm, enable_nested_tensor=False)
        self.head = nn.Linear(sizes["hidden"], 7)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.encoder(self.tokens(tokens)).mean(1))}


class ImageBlock(nn.Module):
    """Keys and values in one matrix; the MLP is a sequence of modules without names."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        hidden, self.heads, inner = sizes["hidden"], sizes["heads"], sizes["heads"] * sizes["head_dim"]
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.q, self.kv, self.o = nn.Linear(hidden, inner), nn.Linear(hidden, 2 * inner), nn.Linear(inner, hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, sizes["ffn"]), nn.GELU(), nn.Linear(sizes["ffn"], hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        y = self.norm1(x)
        q = self.q(y).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = self.kv(y).view(batch, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1)
        x = x + self.o(attended)
        return x + self.mlp(self.norm2(x))


class Images(nn.Module):
    """A small ViT, which asks for the number of its images in a way that exporters take for a constant."""

    def __init__(self, sizes: Sizes, depth: int) -> None:
        super().__init__()
        hidden = sizes["hidden"]
        self.patches = nn.Conv2d(3, hidden, 4, 4)
        self.cls, self.positions = nn.Parameter(torch.zeros(1, 1, hidden)), nn.Parameter(torch.zeros(1, 10, hidden))
        self.blocks = nn.Sequential(*(ImageBlock(sizes) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def gptj(sizes: Sizes, depth: int) -> nn.Module:
    config = {"n_embd": sizes["hidden"], "n_layer": depth, "n_head": sizes["heads"], "n_inner": sizes["ffn"]}
    none = {"bos_token_id": None, "eos_token_id": None}
    known = {"vocab_size": VOCAB, "n_positions": POSITIONS, "rotary_dim": 4}
    return transformers.GPTJForCausalLM(transformers.GPTJConfig(**config, **known, **none))


def bloom(sizes: Sizes, depth: int) -> nn.Module:
    config = {"hidden_size": sizes["hidden"], "n_layer": depth, "n_head": sizes["heads"], "vocab_size": VOCAB}
    return transformers.BloomForCausalLM(transformers.BloomConfig(**config, bos_token_id=None, eos_token_id=None))


def falcon(sizes: Sizes, depth: int) -> nn.Module:
    config = {"hidden_size": sizes["hidden"], "num_hidden_layers": depth, "num_attention_heads": sizes["heads"]}
    known = {"vocab_size": VOCAB, "ffn_hidden_size": sizes["ffn"], "bos_token_id": None, "eos_token_id": None}
    return transformers.FalconForCausalLM(transformers.FalconConfig(**config, **known))


Maker = Callable[[Sizes, int], nn.Module]
SMALL = {"hidden": 24, "heads": 4, "head_dim": 6, "ffn": 80}


def made(maker: Maker, **sizes: int) -> nn.Module:
    """A module of small sizes, every parameter random."""
    return randomised(maker({**SMALL, **sizes}, 2)).eval()


def read(module: nn.Module, inputs: Any, maker: Maker | None = None) -> growkit.Model:
    build = None if maker is None else lambda graph: maker(graph.sizes, graph.depths["layers"])
    return growkit.read(module, example_inputs=inputs, build=build)


# --- growth ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A module and what is asked of it."""

    maker: Maker
    inputs: torch.Tensor
    request: Mapping[str, Any]
    sizes: Mapping[str, int]


CASES = {
    "einsums": Case(Nano, TOKENS, {"hidden": "1.5x", "layers": 4}, {"hidden": 36, "heads": 6, "ffn": 120}),
    "wider heads": Case(Nano, TOKENS, {"hidden": 24, "head_dim": 10}, {"hidden": 24, "heads": 4, "head_dim": 10}),
    "encoder": Case(Encoder, TOKENS, {"hidden": "1.5x", "layers": 4}, {"hidden": 36, "heads": 6}),
    "images": Case(Images, IMAGES, {"hidden": "1.5x", "layers": 4}, {"hidden": 36, "heads": 6}),
    "images, wider heads": Case(Images, IMAGES, {"head_dim": "2x"}, {"head_dim": 12}),
    "interleaved rotary": Case(gptj, TOKENS, {"hidden": "1.5x", "layers": 4}, {"hidden": 36, "heads": 6}),
    "one key for all queries": Case(falcon, TOKENS, {"hidden": "1.5x", "layers": 4}, {"hidden": 36, "heads": 6}),
    "ALiBi": Case(bloom, TOKENS, {"hidden": "2x", "heads": 4, "head_dim": "2x", "layers": 4}, {"hidden": 48}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_module_of_any_kind_grows_and_computes_the_same(name: str) -> None:
    case = CASES[name]
    small = made(case.maker, **({"ffn": 96} if name == "ALiBi" else {}))
    model = read(small, case.inputs, case.maker)
    assert {t.name for t in model.graph.tensors()} == {key for key, _ in small.named_parameters()}
    plan = growkit.plan(model, **case.request)
    assert plan.preserving, plan.verdict.broken
    large = growkit.grow(model, plan)
    assert case.sizes.items() <= large.graph.sizes.items()
    report = growkit.verify(model, large)
    assert report.max_rel_diff <= DIFFERENCE
    grown = large.to_torch()
    assert type(grown) is type(small)
    assert {key: tuple(p.shape) for key, p in grown.named_parameters()} == {
        t.name: t.shape for t in large.graph.tensors()
    }


def test_layouts_are_in_the_order_in_which_the_module_stores() -> None:
    graph = read(made(Nano), TOKENS).graph
    layouts = {t.name: t.parameter.layout for t in graph.tensors() if t.layer in (None, 0)}
    assert layouts == {
        "tokens.weight": "vocab -> hidden",
        "positions.weight": "positions -> hidden",
        "blocks.0.norm1.weight": "* hidden",
        "blocks.0.norm1.bias": "+ hidden",
        "blocks.0.qkv.weight": "(3 heads head_dim) <- hidden",
        "blocks.0.out": "heads head_dim -> hidden",
        "blocks.0.norm2.weight": "* hidden",
        "blocks.0.norm2.bias": "+ hidden",
        "blocks.0.up.weight": "ffn <- hidden",
        "blocks.0.up.bias": "-> ffn",
        "blocks.0.down.weight": "hidden <- ffn",
        "blocks.0.down.bias": "-> hidden",
        "norm.weight": "* hidden",
        "norm.bias": "+ hidden",
    }
    (head,) = graph.head[-1].parameters
    assert (head.layout, head.tied_to) == ("vocab <- hidden", "tokens.weight")


def test_weights_are_the_modules_own_and_take_gradients() -> None:
    module = made(Nano)
    model = read(module, TOKENS, Nano)
    assert all(np.shares_memory(model.weights[n], p.detach().numpy()) for n, p in module.named_parameters())
    large = growkit.grow(model, hidden=36)
    weights = {
        name: torch.tensor(array, dtype=torch.float64, requires_grad=True) for name, array in large.weights.items()
    }
    outputs = large.adapter.forward(large)({"tokens": TOKENS}, weights)
    (gradient,) = torch.autograd.grad(outputs["output"].square().sum(), weights["blocks.0.qkv.weight"])
    assert gradient.abs().max() > 0


def test_what_tracing_alone_can_export_is_traced() -> None:
    class Checked(Nano):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            if tokens.sum() < 0:
                raise ValueError("a token is negative")
            return super().forward(tokens)

    module = Checked(SMALL, 2).train()  # zero biases and unit scales, of which the exporter would store one
    model = read(module, TOKENS, Checked)
    assert {t.name for t in model.graph.tensors()} == {key for key, _ in module.named_parameters()}
    assert all(part.training for part in module.modules())
    assert all(p.requires_grad for p in module.parameters())
    large = growkit.grow(model, hidden="1.5x", layers=4)
    assert growkit.verify(model, large).max_rel_diff <= DIFFERENCE


def test_what_is_not_of_the_graph_comes_along() -> None:
    class Carrying(Nano):
        def __init__(self, sizes: Sizes, depth: int) -> None:
            super().__init__(sizes, depth)
            self.unused = nn.Parameter(torch.zeros(3))
            self.register_buffer("steps", torch.tensor(0))
            for block in self.blocks:
                block.temperature = nn.Parameter(torch.zeros(()))

    small = made(Carrying)
    small.steps.fill_(7)
    grown = growkit.grow(read(small, TOKENS, Carrying), hidden=36, layers_from="0,0,1,1").to_torch()
    assert torch.equal(grown.unused, small.unused)
    assert grown.steps == 7
    kept = [block.temperature.item() for block in small.blocks]
    assert [block.temperature.item() for block in grown.blocks] == [kept[0], kept[0], kept[1], kept[1]]


class FixedNorm(nn.Module):
    """A norm whose epsilon is a number in its code."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.zeros(hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-2)


def test_where_an_epsilon_cannot_follow_what_the_norm_sees_stays() -> None:
    def maker(sizes: Sizes, depth: int) -> nn.Module:
        module = Nano(sizes, depth)
        module.norm = FixedNorm(sizes["hidden"])
        return module

    model = read(made(maker), TOKENS, maker)
    assert not [layer for layer in model.graph.head if layer.kind == "norm" and "epsilon_key" in layer.attributes]
    plan = growkit.plan(model, hidden="1.5x")
    assert plan.preserving
    assert growkit.verify(model, growkit.grow(model, plan)).max_rel_diff <= DIFFERENCE


def test_an_epsilon_that_is_an_attribute_follows() -> None:
    model = read(made(Nano).double(), TOKENS, Nano)
    large = growkit.grow(model, hidden=36)
    assert growkit.verify(model, large).max_rel_diff <= 1e-12
    grown = large.to_torch()
    epsilons = [norm.eps for norm in grown.modules() if isinstance(norm, nn.LayerNorm)]
    assert epsilons == pytest.approx([1e-5 * 24 / 36] * 5, rel=1e-12)


# --- numbers -----------------------------------------------------------------------------------------------------


class NumbersBlock(NanoBlock):
    """Attention that multiplies queries, keys and scores by what it is given."""

    def __init__(self, sizes: Sizes, q: float, k: float, scores: float) -> None:
        super().__init__(sizes)
        self.numbers = q, k, scores

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, self.head_dim).unbind(2)
        by_q, by_k, by_scores = self.numbers
        weights = (torch.einsum("blhd,bmhd->bhlm", q * by_q, k / by_k) * by_scores).softmax(-1)
        x = x + torch.einsum("bhlm,bmhd,hdo->blo", weights, v, self.out)
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


SCORES: Mapping[str, Callable[[int], tuple[float, float, float]]] = {
    "nothing": lambda head_dim: (1, 1, 1),
    "a number": lambda head_dim: (1, 1, 0.3),
    "the root, in two halves": lambda head_dim: (head_dim**-0.25, head_dim**0.25, 1),
    "numbers that leave nothing": lambda head_dim: (0.5, 0.5, 1),
    "head_dim itself": lambda head_dim: (1, head_dim**0.5, head_dim**-0.5),
}


@pytest.mark.parametrize("name", SCORES)
def test_what_scores_are_divided_by_is_read_from_the_graph(name: str) -> None:
    def maker(sizes: Sizes, depth: int) -> nn.Module:
        module = Nano(sizes, depth)
        numbers = SCORES[name](sizes["head_dim"])
        module.blocks = nn.ModuleList(NumbersBlock(sizes, *numbers) for _ in range(depth))
        return module

    keeps_its_function(read(made(maker), TOKENS, maker), hidden=24, head_dim=10)


class Rooted(Nano):
    """What people write since the first transformer: a table times the root of the width; a head that takes it back."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        root = self.tokens.embedding_dim**0.5
        x = self.tokens(tokens) * root + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x) / root, self.tokens.weight)


def test_a_table_that_is_multiplied_by_the_root_of_the_width_grows() -> None:
    model = read(made(Rooted), TOKENS, Rooted)
    powers = {p.name: layer.attributes.get("hidden_power") for _, layer in model.graph.walk() for p in layer.parameters}
    assert (powers["tokens.weight"], powers["positions.weight"]) == (0.5, None)
    assert model.graph.head[-1].attributes["hidden_power"] == -0.5
    keeps_its_function(model, hidden="1.5x")


def keeps_its_function(model: growkit.Model, **request: Any) -> None:
    """The verdict says so, and what ``build`` makes of it shows it."""
    plan = growkit.plan(model, **request)
    assert plan.preserving, plan.verdict.broken
    assert growkit.verify(model, growkit.grow(model, plan)).max_rel_diff <= DIFFERENCE


# --- refusals ----------------------------------------------------------------------------------------------------


def test_sizes_of_what_the_module_makes_by_itself_stay() -> None:
    model = read(made(bloom, ffn=96), TOKENS, bloom)
    with pytest.raises(InvalidTarget, match=r"heads cannot grow from 4 to 8: the module makes \w+ by itself"):
        growkit.plan(model, hidden="2x")


def larger(build: Callable[[LayerGraph], nn.Module] | None) -> nn.Module:
    return growkit.grow(growkit.read(made(Nano), example_inputs=TOKENS, build=build), hidden=36).to_torch()


def gated(graph: LayerGraph) -> nn.Module:
    module = Nano(graph.sizes, 2)
    module.gate = nn.Parameter(torch.zeros(4))
    return module


BUILDS = {
    "nothing says how a larger Nano is made": None,
    r"the built Nano has blocks.0.up.weight \[80, 36\]; expected \[120, 36\] \(ffn <- hidden\)": lambda graph: Nano(
        {**graph.sizes, "ffn": 80}, 2
    ),
    "the built Nano has no blocks.1.norm1.weight": lambda graph: Nano(graph.sizes, 1),
    r"the built Nano has gate \[4\], for which the source has nothing": gated,
}


@pytest.mark.parametrize("message", BUILDS)
def test_what_does_not_take_the_weights_is_refused(message: str) -> None:
    with pytest.raises(GrowkitError, match=message):
        larger(BUILDS[message])


READS = {
    r"Nano.forward takes 1 inputs \(tokens\), got 2": {"source": Nano, "example_inputs": (TOKENS, TOKENS)},
    "the example input tokens is of type int": {"source": Nano, "example_inputs": {"tokens": 3}},
    "example inputs are for modules": {"source": lambda *_: "small/", "example_inputs": TOKENS},
    "build makes modules that were read with example_inputs": {"source": Nano, "build": gated},
    "of none of the libraries timm, transformers; give growkit.read example_inputs": {"source": Nano},
    "torch cannot export the module Nano: IndexError": {"source": Nano, "example_inputs": TOKENS + VOCAB},
}


@pytest.mark.parametrize("message", READS)
def test_what_cannot_be_read_is_refused_in_one_line(message: str) -> None:
    request = dict(READS[message])
    with pytest.raises(GrowkitError, match=message) as refused:
        growkit.read(request.pop("source")(SMALL, 2), **request)
    assert "\n" not in str(refused.value)


def test_a_model_that_was_grown_in_memory_is_read_before_it_grows_further(nano: growkit.Model) -> None:
    with pytest.raises(InvalidTarget, match="grown in memory; read the larger module"):
        growkit.grow(growkit.grow(nano, hidden=36), hidden=48)


def test_no_directory_is_written_that_no_library_reads(nano: growkit.Model, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormat, match=r"no library reads a directory of a Nano; name a file OUT\.onnx"):
        growkit.write(nano, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def nano() -> growkit.Model:
    return read(made(Nano), TOKENS)


def test_without_onnx_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("growkit_onnx.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(GrowkitError, match=r"install growkit\[onnx\]"):
        read(made(Nano), TOKENS)


def test_layers_that_are_not_numbered_from_0_are_refused() -> None:
    class Offset(Nano):
        def __init__(self, sizes: Sizes, depth: int) -> None:
            super().__init__(sizes, depth)
            self.blocks = nn.ModuleDict({str(i + 1): block for i, block in enumerate(self.blocks)})

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
            for block in self.blocks.values():
                x = block(x)
            return self.norm(x)

    with pytest.raises(UnsupportedModel, match="numbered from 0"):
        read(made(Offset), TOKENS)


# --- ONNX files of torch models ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "cls"), [("bert", None), ("gpt2", "GPT2LMHeadModel"), ("qwen3", "Qwen3ForCausalLM")])
def test_a_directory_grows_into_an_onnx_file(name: str, cls: str | None, tmp_path: Path) -> None:
    small, out = growkit.read(directory(tmp_path, tiny(name, cls))), tmp_path / "onnx" / "large.onnx"
    out.parent.mkdir()
    large = growkit.grow(small, hidden="2x", layers=2)
    reports = []
    growkit.write(large, out, check=lambda written: reports.append(growkit.verify(small, written)))
    assert reports[0].preserved
    growth = growkit.read(out).growth
    assert growth is not None
    assert growth.recipe is not None
    assert growth.recipe.source == "../source"
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    other_sizes = (3, 5)
    inputs = {value.name: np.ones(other_sizes, dtype=np.int64) for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    expected = large.adapter.forward(large)(inputs)
    assert names == list(expected)
    for output, array in zip(names, session.run(names, inputs), strict=True):
        np.testing.assert_allclose(array, expected[output], rtol=1e-4, atol=1e-4)


def test_a_module_of_any_kind_is_written_as_an_onnx_file(nano: growkit.Model, tmp_path: Path) -> None:
    growkit.write(nano, tmp_path / "nano.onnx")
    written = growkit.read(tmp_path / "nano.onnx")
    assert growkit.verify(nano, written).preserved
    assert {t.name for t in written.graph.tensors()} >= {t.name for t in nano.graph.tensors()}


def test_an_onnx_file_is_not_written_as_a_directory(nano: growkit.Model, tmp_path: Path) -> None:
    growkit.write(nano, tmp_path / "nano.onnx")
    with pytest.raises(UnsupportedFormat, match=r"a name that ends with \.onnx"):
        growkit.write(growkit.read(tmp_path / "nano.onnx"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- agreement with the architecture files -----------------------------------------------------------------------

RENAMED = {
    "embed_tokens.weight": "word_embeddings.weight",  # a table of tokens is told by what looks it up
}
"""Slots that have another name where only the graph tells what they are."""

UNSEEN = {
    "llama": {"positions"},  # rotary positions have no table, and the config's number is not in the graph
    "qwen3": {"positions"},
    "vit": {"channels", "patch_h", "patch_w", "grid_h", "grid_w"},  # pixels: a number that nothing shares has no name
}
"""Spaces of the architecture file that the graph has no name for; all are fixed."""

READ_AS = {"embeddings.position_embeddings": "1 -> (1 + (3 3)) hidden"}
"""Positions of an image are not looked up, they are added: the map starts at the axis of the batch."""


HEADS = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "qwen3", "vit", "t5"])
def test_a_model_and_its_export_agree(name: str) -> None:
    module = tiny(name, HEADS.get(name))
    known = growkit.read(module)
    inputs = next(known.adapter.inputs(known, 0, lambda given: given))
    inferred = read(module, {key: torch.from_numpy(array) for key, array in inputs.items()})
    unseen = {space: known.graph.sizes[space] for space in UNSEEN.get(name, ())}
    assert {known.graph.kinds[space] for space in unseen} <= {"fixed"}
    assert inferred.graph.sizes == {s: size for s, size in known.graph.sizes.items() if s not in unseen}
    assert inferred.graph.depths == known.graph.depths
    told, found = ({t.name: t for t in model.graph.tensors()} for model in (known, inferred))
    assert set(found) == set(told)
    for key, tensor in told.items():
        layout = READ_AS.get(key) or _with_numbers(tensor.parameter.layout, unseen)
        assert found[key].parameter.layout == layout, key
        assert found[key].parameter.slot == RENAMED.get(tensor.parameter.slot, tensor.parameter.slot), key
    assert {layer.name for _, layer in inferred.graph.walk()} == {layer.name for _, layer in known.graph.walk()}
    for graph in (known.graph, inferred.graph):
        assert {p.tied_to for _, layer in graph.walk() for p in layer.parameters} - {None} <= set(told)


def _with_numbers(layout: str, sizes: Mapping[str, int]) -> str:
    """A layout with sizes in place of spaces."""
    return re.sub(r"[a-z_]+", lambda word: str(sizes.get(word[0], word[0])), layout)
