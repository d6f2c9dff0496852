"""Models that no one here wrote, unmodified, against reverse over reverse.

The whole matrix is `pytest -m models`; it needs `transformers` and `peft`, which build every model
from a small random configuration, offline.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import jetplane as jp
from jetplane.evaluation.plane import PlaneModel
from jetplane.testing import grad_of_grad

os.environ["HF_HUB_OFFLINE"] = "1"
try:
    import transformers as tf
except ImportError:
    tf = None
of_a_library = pytest.mark.skipif(tf is None, reason="the models are those of an optional library")

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore")]  # the libraries' own deprecations

VOCABULARY = 40
SMALL: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GROUPED = SMALL | dict(num_key_value_heads=1)
TOKENS: dict[str, Any] = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)

LANGUAGE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", dict(TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED | dict(sliding_window=4)),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GROUPED | dict(head_dim=8)),
    "opt": ("OPTForCausalLM", "OPTConfig", dict(
        TOKENS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, max_position_embeddings=32,
        word_embed_proj_dim=16,
    )),
    "t5": ("T5ForConditionalGeneration", "T5Config", dict(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0,
    )),
    "bert": ("BertForMaskedLM", "BertConfig", SMALL),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", SMALL),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig", dict(
        vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=32,
    )),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", dict(
        TOKENS, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=10, max_target_positions=16,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )),
}  # fmt: skip

VISION: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "resnet": ("ResNetForImageClassification", "ResNetConfig", 32,
               dict(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")),
    "regnet": ("RegNetForImageClassification", "RegNetConfig", 32,
               dict(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], groups_width=4)),
    "mobilenetv2": ("MobileNetV2ForImageClassification", "MobileNetV2Config", 32,
                    dict(depth_multiplier=0.1, min_depth=4, image_size=32)),
    "efficientnet": ("EfficientNetForImageClassification", "EfficientNetConfig", 32,
                     dict(width_coefficient=0.1, depth_coefficient=0.1, image_size=32, hidden_dim=128)),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", 16,
                 dict(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2)),
    "swin": ("SwinForImageClassification", "SwinConfig", 16,
             dict(image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4)),
    "vit": ("ViTForImageClassification", "ViTConfig", 16,
            dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16,
                 patch_size=4)),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", 16,
                  dict(num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 12], patch_sizes=[3, 3],
                       strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8)),
}  # fmt: skip
ATTENDS = {*LANGUAGE, "vit"} - {"t5"}  # has both implementations of attention


def create(name: str, attention: str) -> nn.Module:
    torch.manual_seed(0)
    model, config, *_, options = (LANGUAGE | VISION)[name]
    built = getattr(tf, config)(**options, **({"num_labels": 3} if name in VISION else {}))
    if hasattr(built, "use_cache"):
        built.use_cache = False
    chosen = attention if name in ATTENDS else "eager"
    module = getattr(tf, model)._from_config(built, attn_implementation=chosen)
    for p in module.parameters():  # away from the zeros and tiny weights of the libraries' initial state
        with torch.no_grad():
            p.add_(0.2 * torch.randn_like(p))
    return module


def batch(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (2, 7))
    if name in VISION:
        size = VISION[name][2]
        labels = torch.randint(0, 3, (2, size, size)) if name == "segformer" else torch.randint(0, 3, (12,))
        return dict(pixel_values=torch.randn(len(labels), 3, size, size).to(dtype), labels=labels)
    if name == "whisper":
        return dict(input_features=torch.randn(2, 8, 20).to(dtype), labels=tokens)
    if name in ("bert", "roberta", "distilbert"):
        mask = torch.ones_like(tokens)
        mask[0, -2:] = 0
        return dict(input_ids=tokens, labels=tokens, attention_mask=mask)
    return dict(input_ids=tokens, labels=tokens)


class Double(TorchFunctionMode):
    """Single precision that a library asks for by name, in softmax, norms and losses, becomes double."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        single = torch.float32
        args = [torch.float64 if a is single else a for a in args]
        return func(*args, **{n: torch.float64 if a is single else a for n, a in (kwargs or {}).items()})


def library_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        torch.manual_seed(5)  # one dropout mask
        return model(**inputs).loss

    return loss


def own_loss(model: nn.Module, inputs: dict[str, Tensor], exact: bool = True) -> Callable[[], Tensor]:
    """From the logits; all in double precision if ``exact``."""
    labels = inputs["labels"]
    targets = labels.flatten()

    def loss() -> Tensor:
        torch.manual_seed(5)
        with Double() if exact else contextlib.nullcontext():
            logits = model(**inputs).logits
            return logits.square().mean() if logits.dim() == 4 else F.cross_entropy(logits.flatten(0, -2), targets)

    return loss


def deviation(found: PlaneModel, wanted: PlaneModel, k: int) -> float:
    pairs = (
        (found.value, wanted.value), (found.slope, wanted.slope[:k]), (found.curvature, wanted.curvature[:k, :k])
    )  # fmt: skip
    return max(float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in pairs)


def compare(
    model: nn.Module,
    loss: Callable[[nn.Module], Callable[[], Tensor]],
    tolerance: float,
    oracle: tuple[nn.Module, Callable[[nn.Module], Callable[[], Tensor]]] | None = None,
) -> None:
    """K = 1 and 3 against the oracle on a copy of the model (in double precision where one is given)."""
    reference, reference_loss = oracle or (copy.deepcopy(model), loss)
    params = [p for p in model.parameters() if p.requires_grad]
    moving = [p for p in reference.parameters() if p.requires_grad]
    g = torch.Generator().manual_seed(2)
    tangents = [0.1 * torch.randn(3, *p.shape, generator=g).to(p.dtype) for p in params]
    wanted = grad_of_grad(reference_loss(reference), moving, [t.to(moving[0].dtype) for t in tangents])
    assert torch.allclose(wanted.curvature, wanted.curvature.mT, rtol=1e-4), "the oracle is asymmetric"
    for k in (3, 1):
        copied = copy.deepcopy(model)
        own = [p for p in copied.parameters() if p.requires_grad]
        found = jp.evaluate(loss(copied), own, [t[:k].clone() for t in tangents])
        assert deviation(found, wanted, k) <= tolerance
        for a, b in zip(copied.buffers(), reference.buffers(), strict=True):  # moved once, by the primal alone
            torch.testing.assert_close(a.double(), b.double(), rtol=max(tolerance, 1e-9), atol=1e-6)


MATRIX = [
    pytest.param(name, attention, mode, id=f"{name}-{attention}-{mode}")
    for name in LANGUAGE | VISION
    for attention in (("sdpa", "eager") if name in ATTENDS else ("eager",))
    for mode in ("eval", "train")
]


@of_a_library
@pytest.mark.parametrize(("name", "attention", "mode"), MATRIX)
def test_library_loss(name: str, attention: str, mode: str):
    model = getattr(create(name, attention).double(), mode)()
    inputs = batch(name, torch.float64)
    # language models take their loss, and most models their softmax, in single precision whatever they are made of
    compare(model, lambda m: library_loss(m, inputs), 3e-5)


@of_a_library
@pytest.mark.parametrize(("name", "attention", "mode"), MATRIX)
def test_loss_in_double_precision(name: str, attention: str, mode: str):
    model = getattr(create(name, attention).double(), mode)()
    inputs = batch(name, torch.float64)
    compare(model, lambda m: own_loss(m, inputs), 1e-9)


@of_a_library
@pytest.mark.parametrize(
    ("name", "attention", "mode"), [p for p in MATRIX if "eval" in p.values or p.values[0] in VISION]
)
def test_single_precision(name: str, attention: str, mode: str):
    if name in ("swin", "efficientnet", "segformer", "convnext") and mode == "train":
        pytest.skip("stochastic depth draws other layers in double precision, where the oracle runs")
    model, exact = create(name, attention), create(name, attention).double()
    single, double = batch(name, torch.float32), batch(name, torch.float64)
    compare(
        getattr(model, mode)(), lambda m: own_loss(m, single, exact=False), 1e-3,
        (getattr(exact, mode)(), lambda m: own_loss(m, double)),
    )  # fmt: skip


@of_a_library
def test_lora_touches_the_adapters_alone():
    peft = pytest.importorskip("peft", reason="adapters are those of an optional library")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    model = peft.get_peft_model(create("llama", "sdpa"), config).double()  # peft makes adapters in single precision
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    inputs = batch("llama", torch.float64)
    compare(model, lambda m: own_loss(m, inputs), 1e-9)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    jp.optim.FoMoHKD(trainable, lr=0.1, k=2, descent="saddle-free").step(own_loss(model, inputs))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("lora" in n for n in changed)


class Packed(nn.Module):
    """Two bidirectional layers over sequences of different lengths."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layers = kind(4, 5, 2, batch_first=True, bidirectional=True, dropout=0.2)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 5, 2]), batch_first=True, enforce_sorted=False)
        out, state = self.layers(packed)
        padded, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
        return padded.sin().sum() + (state[1] if isinstance(state, tuple) else state).square().sum()


class Attending(nn.Module):
    """Masked attention over another sequence, with its weights in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, kdim=4, vdim=4, batch_first=True, add_bias_kv=True)

    def forward(self, x: Tensor) -> Tensor:
        query = x.repeat(1, 1, 2).sin()
        mask = torch.arange(x.shape[1])[None] >= torch.tensor([[3], [5], [4]])
        out, weights = self.attention(query, x, x, key_padding_mask=mask)
        return out.square().sum() + weights.sin().sum()


class Translating(nn.Module):
    """An encoder and a decoder, causal, one norm first and one last."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.core = nn.Transformer(8, 2, 1, 1, 12, 0.1, batch_first=True, norm_first=norm_first)

    def forward(self, x: Tensor) -> Tensor:
        source = x.repeat(1, 1, 2)
        mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=x.dtype)
        return self.core(source, source[:, :3].cos(), tgt_mask=mask, tgt_is_causal=True).sin().sum()


OWN: dict[str, Callable[[], nn.Module]] = {
    "packed lstm": lambda: Packed(nn.LSTM),
    "packed gru": lambda: Packed(nn.GRU),
    "packed rnn": lambda: Packed(nn.RNN),
    "multihead attention": Attending,
    "transformer, norm first": lambda: Translating(True),
    "transformer, norm last": lambda: Translating(False),
}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", OWN)
def test_of_torch_itself(name: str, mode: str):
    torch.manual_seed(0)
    model = getattr(OWN[name]().double(), mode)()
    x = torch.randn(3, 5, 4).double()

    def loss(m: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            torch.manual_seed(5)
            return m(x)

        return run

    compare(model, loss, 1e-9)
