"""Which layers are chosen, and what is said about those that cannot be."""

from __future__ import annotations

import inspect

import pytest
import torch
from conftest import tiny_config
from torch import nn

from qaroma.errors import QaromaError
from qaroma.method.attach import linear_shapes
from qaroma.method.dequantise import dense_rows, dense_weight
from qaroma.method.targets import find_targets, unadaptable
from qaroma.model.base import load_base

OF_A_LAYER = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


@pytest.fixture(scope="module")
def llama(tiny_folder):
    return load_base(tiny_folder, device="cpu")


def test_all_linear_is_everything_but_the_head_in_order(llama, tiny_model):
    expected = [f"model.layers.{layer}.{name}" for layer in range(2) for name in OF_A_LAYER]
    assert find_targets(llama) == expected
    assert find_targets(tiny_model, "all-linear") == expected


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (["down_proj", "mlp.down_proj", "layers.1.self_attn.q_proj"],
         ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]),
        ("model.layers.1.mlp.up_proj", ["model.layers.1.mlp.up_proj"]),
        (r".*\.0\..*\.[qv]_proj", ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]),
    ],
)  # fmt: skip
def test_names_suffixes_and_expressions(llama, targets, expected):
    assert find_targets(llama, targets) == expected


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_prj", r"No linear layer is called 'q_prj'; the nearest are q_proj.*--set growth\.target_modules=q_proj"),
        (["q_proj", "query_key"], r"No linear layer is called 'query_key'"),
        (["qproj", "vproj"], r"'qproj'.*'vproj'"),
        ("proj", r"No linear layer is called 'proj'"),  # a suffix is a whole part of the name
        ("lm_head", r"output head, which is not adapted.*all-linear"),
        ("embed_tokens", r"'embed_tokens' is of type Embedding; expected a linear layer"),
        ("q_proj(", r"regular expression"),
        ([], r"at least one name"),
    ],
)
def test_unknown_targets_are_explained(llama, targets, expected):
    with pytest.raises(QaromaError, match=expected):
        find_targets(llama, targets)


def test_a_model_without_linear_layers():
    with pytest.raises(QaromaError, match=r"has no linear layers.*--model"):
        find_targets(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_conv1d_is_linear_dense_and_in_four_bits(quantization, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 128, "n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 64, "bos_token_id": None}
    GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=2)).save_pretrained(tmp_path)
    model = load_base(tmp_path, quantization=quantization, compute_dtype=torch.float32, device="cpu")
    names = [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert find_targets(model) == names
    shapes = {**dict(zip(names, [(192, 64), (64, 64), (256, 64), (64, 256)], strict=True)), "lm_head": (128, 64)}
    assert linear_shapes(model) == shapes
    for name in names:
        layer, x = model.get_submodule(name), torch.randn(3, shapes[name][1])
        expected = x @ dense_weight(layer, torch.float32).T + layer.bias
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        rows = [dense_rows(layer, start, start + 64, torch.float32) for start in range(0, shapes[name][0], 64)]
        assert torch.equal(torch.cat(rows), dense_weight(layer, torch.float32))


class Router(nn.Linear):
    """A linear layer by its class alone, as Llama 4's."""

    def forward(self, x):
        return super().forward(x).sigmoid(), x


class Scores(nn.Linear):
    def forward(self, x):
        return super().forward(x).softmax(-1)


class MyLinear(nn.Linear):
    """One that computes the same in its own words, as Falcon's."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layer_is_linear_by_what_a_call_of_it_gives(device):
    with torch.device(device):
        model = nn.Sequential(nn.Linear(8, 4), MyLinear(8, 4), Router(8, 4), Scores(8, 4), nn.Embedding(8, 4))
    scores = ["3"] if device == "meta" else []  # without contents the shape of the answer is all there is to see
    assert find_targets(model) == ["0", "1", *scores]
    notes = unadaptable(model)
    assert "1 layers of type Router (2, ...) do more than multiply: they get no adapter." in notes
    with pytest.raises(QaromaError, match="'2' is of type Router; expected a linear layer"):
        find_targets(model, ["0", "2"])


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_layer_of_which_only_the_weight_is_used_stays_as_it_is(quantization, tmp_path):
    from transformers import MambaConfig, MambaForCausalLM
    from transformers.models.mamba import modeling_mamba

    config = MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=1, state_size=8)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    model = load_base(tmp_path, quantization=quantization, device="cpu")
    mixer = "backbone.layers.0.mixer"
    if "self.dt_proj(" in inspect.getsource(modeling_mamba):  # as in transformers 5.4, where it is a layer as any
        assert find_targets(model, "dt_proj") == [f"{mixer}.dt_proj"]
        return
    assert find_targets(model) == [f"{mixer}.{name}" for name in ("in_proj", "x_proj", "out_proj")]
    assert f"1 layers ({mixer}.dt_proj, ...) are never called" in " ".join(unadaptable(model))
    assert model.get_submodule(f"{mixer}.dt_proj").weight.is_floating_point()
    assert model.get_submodule(f"{mixer}.in_proj").weight.is_floating_point() == (quantization == "none")
    with pytest.raises(QaromaError, match=r"'dt_proj' is never called, only its weight is used"):
        find_targets(model, "dt_proj")


def test_a_router_that_is_a_linear_layer_by_its_class_stays_dense(tmp_path):
    """transformers 5.4 would put it into 4 bits, and a plain layer in its place."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "intermediate_size_mlp": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    Llama4ForCausalLM(
        Llama4TextConfig(vocab_size=128, num_local_experts=2, interleave_moe_layer_step=1, **sizes, **heads)
    ).save_pretrained(tmp_path)
    model = load_base(tmp_path, device="cpu")
    feed_forward = model.model.layers[0].feed_forward
    assert type(feed_forward.router).__name__ == "Llama4Router"
    assert feed_forward.router.weight.is_floating_point()
    assert not feed_forward.shared_expert.up_proj.weight.is_floating_point()
    assert model(input_ids=torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_fused_experts_are_left_out_with_a_note_and_refused_by_name():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = tiny_config().to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    model = MixtralForCausalLM(
        MixtralConfig(**{name: sizes[name] for name in names}, num_key_value_heads=2, num_local_experts=2)
    )
    chosen = find_targets(model)
    assert [name for name in chosen if "experts" in name] == []
    assert {name.rpartition(".")[2] for name in chosen} >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    (note,) = unadaptable(model)
    assert note.startswith("4 fused expert weights (model.layers.0.mlp.experts.gate_up_proj")
    with pytest.raises(QaromaError, match="'gate_up_proj' is a fused expert weight"):
        find_targets(model, ["q_proj", "gate_up_proj"])


def test_a_vision_tower_is_left_alone_unless_named():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = nn.Sequential(nn.Linear(4, 4))
            self.language = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            self.head = nn.Linear(4, 8)

        def get_decoder(self) -> nn.Module:
            return self.language

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    model = Both()
    assert find_targets(model) == ["language.0", "language.1"]
    assert find_targets(model, ["vision.0"]) == ["vision.0"]
    assert unadaptable(model) == []
    assert torch.is_tensor(model.head.weight)
