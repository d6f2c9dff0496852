"""Residual streams: how blocks are found, and the error at the end of the stream against hand-written autograd."""

import copy
import gc
import random
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._pytree import register_pytree_node
from torch.utils.checkpoint import checkpoint

import jetplane as jp
from jetplane.errors import ArgumentError
from jetplane.gradients import Batch, ResidualStream
from jetplane.gradients.residual_blocks import find_blocks
from jetplane.subspace.sources import FastWeights, Subspace

WIDTH, VOCABULARY = 6, 5


def doubled(module, seed=0):
    torch.manual_seed(seed)
    module = module().double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module


class Block(nn.Module):
    """A pre-norm block with two sublayers, of which the first mixes positions."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def attended(self, x):
        h = self.norm1(x)
        return self.dropout((h @ h.mT).softmax(-1) @ self.mix(h))

    def fed(self, x):
        return self.down(F.gelu(self.up(self.norm2(x))))

    def forward(self, x):
        x = x + self.attended(x)
        return x + self.fed(x)


class PostNorm(Block):
    """The same with norms of the sums, one of them without a bias."""

    def __init__(self, dropout=0.0):
        super().__init__(dropout)
        self.norm2 = nn.RMSNorm(WIDTH, eps=1e-3)

    def attended(self, x):
        return self.dropout((x @ x.mT).softmax(-1) @ self.mix(x))

    def fed(self, x):
        return self.down(F.gelu(self.up(x)))

    def forward(self, x):
        x = self.norm1(self.attended(x) + x)
        return self.norm2(x + self.fed(x))


class Language(nn.Module):
    """A small causal transformer's shape."""

    def __init__(self, block=Block, depth=3):
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(4, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def embedded(self, ids):
        return self.token(ids) + self.place(torch.arange(4))

    def forward(self, ids):
        x = self.embedded(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


IDS = torch.randint(VOCABULARY, (3, 4), generator=torch.Generator().manual_seed(3))
GOALS = torch.randint(VOCABULARY, (12,), generator=torch.Generator().manual_seed(4))


def loss_of(model, ids=IDS, goals=GOALS):
    return F.cross_entropy(model(ids).flatten(0, 1), goals)


def batch_of(model, closure, params=None):
    params = [p for p in model.parameters() if p.requires_grad] if params is None else params
    return Batch(closure, params, model, None, None, [], frozenset(range(len(params))), 0)


def estimated(model, closure=None, **settings):
    """By the names of parameters."""
    estimator = ResidualStream(**settings)
    given = batch_of(model, closure or (lambda: loss_of(model)))
    state = estimator.prepare(given, {})
    with torch.no_grad():
        *found, loss = estimator.measure(given, state)
    torch.testing.assert_close(loss, given.closure().detach())
    assert [g.shape for g in (*found, loss)] == list(estimator.shapes(given, state))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return dict(zip(names, found, strict=True))


def exact(model, closure=None):
    names, params = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return dict(zip(names, torch.autograd.grad((closure or (lambda: loss_of(model)))(), params), strict=True))


def same(found, expected, names=None):
    for name in names or expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12, msg=name)


def found_in(model, closure, names=None):
    return find_blocks(closure, model, names)


# --- the formula ----------------------------------------------------------------------------------------------


def by_hand(model, part):
    """``x_i = x_{i-1} + f_i(x_{i-1})`` with f_i of a constant, but for the first block or sublayer."""

    class Hand(nn.Module):
        def forward(self, ids):
            x = model.embedded(ids)
            for n, block in enumerate(model.blocks):
                read = x if n == 0 else x.detach()
                if part == "block":
                    x = x + block.attended(read) + block.fed(read + block.attended(read))
                else:
                    x = x + block.attended(read)
                    x = x + block.fed(x.detach())
            return model.head(model.norm(x))

    return exact(model, lambda: loss_of(Hand()))


def by_hand_past_norms(model, part, carried=True):
    """The same where the derivative of x_i with respect to x_{i-1} is that of the norms; one if not carried."""

    class Hand(nn.Module):
        def forward(self, ids):
            x = model.embedded(ids)
            for n, block in enumerate(model.blocks):
                read = x if n == 0 else x.detach()
                attended = block.attended(read)
                h = block.norm1(read + attended)
                fed = block.fed(h if part == "block" else block.norm1((read + attended).detach()))
                y = block.norm2(h + fed)
                if n > 0:
                    norm1, norm2 = copy.deepcopy(block.norm1), copy.deepcopy(block.norm2)
                    past = norm2(norm1(x + attended.detach()) + fed.detach()) if carried else x
                    y = y + past - past.detach()
                x = y
            return model.head(model.norm(x))

    return exact(model, lambda: loss_of(Hand()))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("part", ["block", "sublayer"])
def test_past_norms_of_the_stream_the_error_goes_by_their_derivative(part, recompute):
    model = doubled(lambda: Language(PostNorm))
    places = {f"blocks.{i}": [(0, 0, (0, 1))] for i in range(3)}
    assert found_in(model, lambda: loss_of(model)) == places
    expected = by_hand_past_norms(model, part)
    same(estimated(model, exact=part, recompute=recompute), expected)
    whole = exact(model)
    same(expected, whole, ["blocks.2.up.weight", "blocks.2.norm2.weight", "norm.weight"])
    constant = by_hand_past_norms(model, part, carried=False)
    name = "blocks.0.down.weight"
    assert not torch.allclose(expected[name], constant[name])
    near, far = (F.cosine_similarity(g[name].flatten(), whole[name].flatten(), 0) for g in (expected, constant))
    assert near > far


def test_norms_that_a_block_reads_by_are_told_from_those_of_its_stream():
    """A norm of the stream is met before a sum that goes around it, and after one that it ends with."""

    class Both(PostNorm):
        def __init__(self):
            super().__init__()
            self.norm3 = nn.LayerNorm(WIDTH)

        def forward(self, x):
            h = self.norm3(x)  # read by the sublayer alone
            return self.norm1(x + self.mix(F.layer_norm(h.sin(), [WIDTH])))

    model = doubled(lambda: Language(Both, 2))
    assert found_in(model, lambda: loss_of(model)) == {f"blocks.{i}": [(0, 0, (2,))] for i in range(2)}

    class Hand(nn.Module):
        def forward(self, ids):
            x = model.blocks[0](model.embedded(ids))
            y, norm = model.blocks[1](x.detach()), copy.deepcopy(model.blocks[1].norm1)
            added = model.blocks[1].mix(F.layer_norm(model.blocks[1].norm3(x).sin(), [WIDTH])).detach()
            past = norm(x + added)
            return model.head(model.norm(y + past - past.detach()))

    hand = Hand()
    params = [p for n, p in model.named_parameters() if "norm2" not in n and "up" not in n and "down" not in n]
    expected = torch.autograd.grad(loss_of(hand), params)
    for settings in ({}, {"recompute": True}, {"exact": "sublayer"}, {"exact": "sublayer", "recompute": True}):
        estimator, given = ResidualStream(**settings), batch_of(model, lambda: loss_of(model), params)
        state = estimator.prepare(given, {})
        with torch.no_grad():
            *found, _ = estimator.measure(given, state)
        for g, e in zip(found, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("part", ["block", "sublayer"])
def test_the_estimate_is_that_of_autograd_with_constants_where_blocks_read(part, recompute):
    model = doubled(Language)
    expected = by_hand(model, part)
    same(estimated(model, exact=part, recompute=recompute), expected)
    whole = exact(model)
    assert not torch.allclose(expected["blocks.0.down.weight"], whole["blocks.0.down.weight"])  # it is biased


@pytest.mark.parametrize("recompute", [False, True])
def test_the_last_block_and_what_follows_it_are_exact(recompute):
    model = doubled(Language)
    whole = exact(model)
    after = [n for n in whole if n.startswith(("blocks.2.", "norm", "head"))]
    same(estimated(model, recompute=recompute), whole, after)
    last = [n for n in after if not n.startswith(("blocks.2.norm1", "blocks.2.mix"))]
    same(estimated(model, exact="sublayer", recompute=recompute), whole, last)


def test_one_block_is_exact_with_all_that_comes_before_it():
    model = doubled(lambda: Language(depth=1))
    for recompute in (False, True):
        same(estimated(model, recompute=recompute), exact(model))


@pytest.mark.parametrize("written", [False, True])
def test_sums_with_what_does_not_depend_on_the_stream_are_read_with_its_derivative(written):
    """As positions that are added to the stream before it is read, and a bias that is added to the stream itself."""

    class Placed(Block):
        def __init__(self):
            super().__init__()
            self.place, self.bias = nn.Parameter(torch.zeros(4, WIDTH)), nn.Parameter(torch.zeros(WIDTH))

        def forward(self, x, read=None):
            read = x if read is None else read
            x = x + self.attended(read + self.place)
            if written:
                x += self.bias
            else:
                x = self.bias + x
            return x + self.fed(x)

        def apart(self, x, read):
            x = x + self.attended(read + self.place) + self.bias
            return x + self.fed(x.detach() + self.bias - self.bias.detach())

    model = doubled(lambda: Language(Placed, 2))

    class Hand(nn.Module):
        def forward(self, ids):
            x = model.embedded(ids)
            x = model.blocks[0].apart(x, x)
            return model.head(model.norm(model.blocks[1].apart(x, x.detach())))

    same(estimated(model, exact="sublayer"), exact(model, lambda: loss_of(Hand())))


# --- blocks are found ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [True, False])
def test_layers_of_torchs_encoder_are_found_and_its_stack_is_left_out(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    model = nn.Sequential(nn.Linear(4, 8), encoder, nn.Linear(8, 2))
    x, maps = torch.randn(2, 5, 4), () if norm_first else (0, 2)  # the ReLU in between is a sublayer's
    assert found_in(model, lambda: model(x)) == {f"1.layers.{i}": [(0, 0, maps)] for i in range(3)}


@pytest.mark.parametrize("norm_first", [True, False])
def test_layers_of_torchs_decoder_keep_the_derivative_of_the_memory(norm_first):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            make = {"dim_feedforward": 8, "dropout": 0.0, "batch_first": True, "norm_first": norm_first}
            self.source, self.goal = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
            encoder, decoder = (
                kind(WIDTH, 2, **make) for kind in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
            )
            self.encoder = nn.TransformerEncoder(encoder, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
            self.decoder = nn.TransformerDecoder(decoder, 2)
            self.head = nn.Linear(WIDTH, VOCABULARY)

        def forward(self, ids):
            return self.head(self.decoder(self.goal(ids.flip(1)), self.encoder(self.source(ids))))

    model = doubled(Both)
    closure = lambda: loss_of(model)  # noqa: E731
    assert set(found_in(model, closure)) == {f"{k}.layers.{i}" for k in ("encoder", "decoder") for i in (0, 1)}
    found, whole = estimated(model), exact(model)
    same(found, whole, [n for n in whole if n.startswith(("decoder.layers.1", "head"))])
    assert bool(found["source.weight"].any())
    with pytest.raises(ArgumentError, match="with recompute a block may read of earlier blocks the stream alone"):
        estimated(model, recompute=True)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "distilbert"])
@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_of_transformers_are_found(kind, recompute):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=11, n_embd=8, n_layer=3, n_head=2, n_positions=8, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        )
        model, names = transformers.GPT2LMHeadModel(config), "transformer.h"
    elif kind == "bert":
        config = transformers.BertConfig(
            vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model, names = transformers.BertForMaskedLM(config), "bert.encoder.layer"
    elif kind == "distilbert":
        config = transformers.DistilBertConfig(
            vocab_size=11, dim=8, hidden_dim=12, n_layers=3, n_heads=2, dropout=0.0, attention_dropout=0.0
        )
        model, names = transformers.DistilBertForMaskedLM(config), "distilbert.transformer.layer"
    else:
        config = transformers.LlamaConfig(
            vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=True,
        )  # fmt: skip
        model, names = transformers.LlamaForCausalLM(config), "model.layers"
    model.double()
    ids, options = torch.randint(11, (2, 6)), {} if "bert" in kind else {"use_cache": False}
    closure = lambda: F.cross_entropy(model(ids, **options).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())  # noqa: E731
    assert list(found_in(model, closure)) == [f"{names}.{i}" for i in range(3)]
    found, whole = estimated(model, closure, recompute=recompute), exact(model, closure)
    assert not {"lm_head.weight", "cls.predictions.decoder.weight", "vocab_projector.weight"} & set(whole)  # tied
    same(found, whole, [n for n in whole if n.startswith(f"{names}.2.")])
    table = next(n for n in whole if "embed_tokens" in n or "wte" in n or "word_embeddings" in n)
    assert F.cosine_similarity(found[table].flatten(), whole[table].flatten(), 0) > 0.5


class Written(Block):
    """A block that adds in place, with the sum's operands in either order."""

    def forward(self, x):
        x = self.attended(x).add_(x)
        y = self.fed(x)
        y += x
        return (y, None)


class Shifted(Language):
    def forward(self, ids):
        x = self.embedded(ids)
        for block in self.blocks:
            x, _ = block(x)
        return self.head(self.norm(x))


def test_sums_that_are_written_in_place():
    model = doubled(lambda: Shifted(Written))
    assert list(found_in(model, lambda: loss_of(model))) == ["blocks.0", "blocks.1", "blocks.2"]
    plain = doubled(Language)
    plain.load_state_dict(model.state_dict())
    for part in ("block", "sublayer"):
        same(estimated(model, exact=part), by_hand(plain, part))


class Wrapped(nn.Module):
    """A residual module around one sublayer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + x


def sublayer():
    return Wrapped(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh()))


def test_the_finest_blocks_along_a_stream_are_taken():
    stack = nn.Sequential(sublayer(), nn.Sequential(sublayer(), sublayer()))
    model = nn.Sequential(nn.Linear(3, WIDTH), stack, nn.Linear(WIDTH, 1))
    x = torch.randn(4, 3)
    assert list(found_in(model, lambda: model(x))) == ["1.0", "1.1.0", "1.1.1"]


@pytest.mark.parametrize("states", [False, True])
def test_a_stack_that_puts_out_its_last_state_twice_or_all_states_is_left_out(states):
    class Stack(nn.ModuleList):
        def forward(self, x):
            every = [x]
            for block in self:
                every.append(block(every[-1]))
            return {"last": every[-1], "states": every if states else every[-1:]}

    stack = Stack(sublayer() for _ in range(3))
    model = nn.ModuleList([nn.Linear(3, WIDTH), stack])
    x = torch.randn(4, 3)
    found = found_in(model, lambda: stack(model[0](x))["last"])
    assert found == {f"1.{n}": [(0, 0, ())] for n in range(3)}


def test_a_skip_around_the_whole_model_hides_no_blocks():
    model = Wrapped(nn.Sequential(nn.Linear(3, WIDTH), sublayer(), sublayer(), nn.Linear(WIDTH, 3)))
    x = torch.randn(4, 3)
    assert list(found_in(model, lambda: model(x))) == ["inner.1", "inner.2"]


def test_a_block_that_adds_more_than_the_blocks_in_it_is_one():
    class Mixed(Block):
        def __init__(self):
            super().__init__()
            self.second = sublayer()

        def forward(self, x):
            return self.second(x + self.attended(x))

    model = nn.Sequential(nn.Linear(3, WIDTH), Mixed(), Mixed())
    x = torch.randn(2, 4, 3)
    assert list(found_in(model, lambda: model(x))) == ["1", "2"]


def _by_alpha(x, f):
    return torch.add(x, f, alpha=0.5)


def _subtracted_by_alpha(x, f):
    return torch.sub(x, f, alpha=2.0)


def _subtracted(x, f):
    return x - f


def _listed(x, f):
    return sum([x, f, 0.5 * f, 2.0])


@pytest.mark.parametrize(
    ("join", "as_plain"),
    [(_by_alpha, lambda f: 0.5 * f), (_subtracted_by_alpha, lambda f: -2 * f), (_subtracted, lambda f: -f),
     (_listed, lambda f: 1.5 * f + 2.0)],
)  # fmt: skip
@pytest.mark.parametrize("part", ["block", "sublayer"])
def test_sums_by_other_functions(join, as_plain, part):
    class Other(Block):
        def forward(self, x):
            x = x + self.attended(x)
            return join(x, self.fed(x))

    class Plain(Block):
        def fed(self, x):
            return as_plain(super().fed(x))

    model, plain = doubled(lambda: Language(Other)), doubled(lambda: Language(Plain))
    assert list(found_in(model, lambda: loss_of(model))) == ["blocks.0", "blocks.1", "blocks.2"]
    same(estimated(model, exact=part), by_hand(plain, part))


def _scaled(x, f):
    return 0.5 * (x + f)


def _activated(x, f):
    return F.silu(x + f)


def _weighed(x, f):
    return torch.add(f, x, alpha=0.5)


def _written_through_a_view(x, f):
    y = x + f
    y[:, 0].add_(1.0)
    return y


def _overwritten(x, f):
    y = x + f
    y[:, 0] = 0.0
    return y


def _of_a_constant(x, f):
    return x + f.detach() * 0 + torch.ones(WIDTH)


@pytest.mark.parametrize("join", [_scaled, _activated, _weighed, _written_through_a_view, _overwritten])
def test_what_is_no_sum_with_the_input_is_no_block(join):
    class Other(Block):
        def forward(self, x):
            return join(x, self.fed(x))

    model = doubled(lambda: Language(Other))
    assert found_in(model, lambda: loss_of(model)) == {}
    with pytest.raises(ArgumentError, match=r"no block of Language.*LocalHeads\(\)"):
        estimated(model)
    with pytest.raises(ArgumentError, match=r"\['blocks.1'\] of blocks are not called, or do not put out"):
        estimated(model, blocks=["blocks.1"])


def test_a_sum_with_what_does_not_depend_on_the_input_is_no_block():
    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.place = nn.Parameter(torch.zeros(WIDTH))

        def forward(self, x):
            return x + self.place

    model = nn.Sequential(nn.Linear(3, WIDTH), Places(), sublayer())
    x = torch.randn(2, 3)
    assert list(found_in(model, lambda: model(x))) == ["2"]


def test_blocks_that_are_named_alone_are_apart():
    model = doubled(Language)
    found = estimated(model, blocks=["blocks.0", "blocks.2"])

    class Hand(nn.Module):
        def forward(self, ids):
            x = model.blocks[1](model.blocks[0](model.embedded(ids)))
            return model.head(model.norm(x + (model.blocks[2](x.detach()) - x.detach())))

    same(found, exact(model, lambda: loss_of(Hand())))
    with pytest.raises(ArgumentError, match=r"does not have, with parameters: \['layers.0'\]"):
        estimated(model, blocks=["layers.0"])


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 3)

    @staticmethod
    def backward(ctx, c):
        return 3 * ctx.saved_tensors[0] ** 2 * c


def test_named_blocks_may_add_what_torch_does_not_see():
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return x + Cubed.apply(self.f(x))

    model = doubled(lambda: Language(Custom))
    assert found_in(model, lambda: loss_of(model)) == {}
    names = [f"blocks.{i}" for i in range(3)]
    same(estimated(model, blocks=names), exact(model), ["blocks.2.f.weight", "head.weight"])


# --- habits of models and closures ------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
def test_micro_batches_are_added_up(recompute):
    model = doubled(Language)

    def in_parts():
        parts = zip(IDS.split(2), GOALS.split(8), strict=True)
        return sum(loss_of(model, i, g) * (len(i) / len(IDS)) for i, g in parts)

    same(estimated(model, in_parts, recompute=recompute), estimated(model))


def test_the_mean_over_shards_is_the_estimate_of_the_batch():
    model = doubled(Language)
    shards = [estimated(model, lambda n=n: loss_of(model, IDS[n : n + 1], GOALS[4 * n : 4 * n + 4])) for n in range(3)]
    whole = estimated(model)
    same({name: sum(s[name] for s in shards) / 3 for name in whole}, whole)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("part", ["block", "sublayer"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpoints_change_nothing(reentrant, part, recompute):
    model = doubled(Language)
    before = estimated(model, exact=part, recompute=recompute)

    class Checkpointed(Language):
        def forward(self, ids):
            x = self.embedded(ids)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.head(self.norm(x))

    model.__class__ = Checkpointed
    if reentrant:  # torch's own answer to `torch.autograd.grad`
        with pytest.raises(RuntimeError, match="use_reentrant"):
            estimated(model, exact=part, recompute=recompute)
    else:
        same(estimated(model, exact=part, recompute=recompute), before)


@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_parameters_have_no_part(recompute):
    model = doubled(Language)
    whole = estimated(model)
    for module in (model.token, model.place, model.blocks[0], model.blocks[1].up, model.head):
        module.requires_grad_(False)
    found = estimated(model, recompute=recompute)
    assert "head.weight" not in found
    # Nothing trains below block 1, so it is taken as the first one: its own part is the same.
    same(found, {name: whole[name] for name in found})


@pytest.mark.parametrize("recompute", [False, True])
def test_a_table_that_is_the_read_out_too_gets_both_parts(recompute):
    untied = doubled(Language)
    with torch.no_grad():
        untied.head.weight.copy_(untied.token.weight)
    parts = estimated(untied)
    tied = copy.deepcopy(untied)
    tied.head.weight = tied.token.weight
    found = estimated(tied, recompute=recompute)
    same(found, {"token.weight": parts["token.weight"] + parts["head.weight"]})


@pytest.mark.parametrize("recompute", [False, True])
def test_one_block_that_is_called_several_times(recompute):
    model = doubled(lambda: Language(depth=1))

    class Repeated(Language):
        def forward(self, ids):
            x = self.embedded(ids)
            for _ in range(3):
                x = self.blocks[0](x)
            return self.head(self.norm(x))

    apart = doubled(Language)
    for block in apart.blocks:
        block.load_state_dict(model.blocks[0].state_dict())
    apart.load_state_dict(model.state_dict(), strict=False)
    parts = estimated(apart)
    model.__class__ = Repeated
    found = estimated(model, recompute=recompute)
    same(found, {n: sum(parts[n.replace("0", str(i), 1)] for i in range(3)) for n in found if n.startswith("blocks")})


def test_losses_of_what_a_block_puts_out_beside_the_stream_are_exact_within_it():
    class Balanced(Block):
        def forward(self, x):
            y = super().forward(x)
            return y, self.up(x).square().mean()

    class Summed(Language):
        def forward(self, ids):
            x, self.balance = self.embedded(ids), 0.0
            for block in self.blocks:
                x, extra = block(x)
                self.balance = self.balance + extra
            return self.head(self.norm(x))

    model = doubled(lambda: Summed(Balanced))
    closure = lambda: loss_of(model) + model.balance  # noqa: E731
    plain = doubled(Language)
    plain.load_state_dict(model.state_dict())
    base, found = by_hand(plain, "block"), estimated(model, closure)
    x = plain.embedded(IDS)
    for block in plain.blocks:
        (own,) = torch.autograd.grad(block.up(x).square().mean(), [block.up.weight])
        name = f"blocks.{[*plain.blocks].index(block)}.up.weight"
        torch.testing.assert_close(found[name], base[name] + own, rtol=1e-9, atol=1e-12)
        x = block(x).detach()
    same(estimated(model, closure, recompute=True), found)


def test_what_a_block_keeps_elsewhere_is_refused_with_recompute():
    class Keeping(Block):
        def forward(self, x):
            self.kept = self.attended(x)
            return x + self.kept + self.fed(x)

    model = doubled(lambda: Language(Keeping))
    closure = lambda: loss_of(model) + model.blocks[0].kept.square().mean()  # noqa: E731
    same(estimated(model, closure), exact(model, closure), ["blocks.2.up.weight"])
    with pytest.raises(ArgumentError, match=r"Take ResidualStream\(recompute=False\)"):
        estimated(model, closure, recompute=True)


@pytest.mark.parametrize("recompute", [False, True])
def test_random_numbers_and_buffers_move_once(recompute):
    class Normed(Block):
        def __init__(self):
            super().__init__(dropout=0.5)
            self.batch = nn.BatchNorm1d(4)

        def forward(self, x):
            return super().forward(x) + self.batch(x)

    model = doubled(lambda: Language(Normed))
    estimator, given = ResidualStream(recompute=recompute), batch_of(model, lambda: loss_of(model))
    state = estimator.prepare(given, {})
    plain = copy.deepcopy(model)
    before = torch.random.get_rng_state()
    *_, loss = estimator.measure(given, state)
    after = torch.random.get_rng_state()
    torch.random.set_rng_state(before)
    torch.testing.assert_close(loss, loss_of(plain).detach())
    assert torch.equal(after, torch.random.get_rng_state())
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_has_the_same_masks_in_both_passes(recompute):
    model = doubled(lambda: Language(lambda: Block(0.5)))
    estimator, given = ResidualStream(recompute=recompute), batch_of(model, lambda: loss_of(model))
    state = estimator.prepare(given, {})
    torch.manual_seed(1)
    found = estimator.measure(given, state)
    torch.manual_seed(1)
    names = [n for n, _ in model.named_parameters()]
    whole = exact(model)
    same(dict(zip(names, found, strict=False)), whole, [n for n in whole if n.startswith(("blocks.2.", "head"))])


def test_nothing_is_left_behind():
    model = doubled(Language)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    hooks = lambda: [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]  # noqa: E731
    before, params = hooks(), [p.clone() for p in model.parameters()]
    for part in ("block", "sublayer"):
        for recompute in (False, True):
            with torch.inference_mode():
                pass
            estimated(model, exact=part, recompute=recompute)
    assert hooks() == before
    assert all(torch.equal(p, q) and bool((p.grad == 1).all()) for p, q in zip(model.parameters(), params, strict=True))


@pytest.mark.parametrize("part", ["block", "sublayer"])
@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_waits_for_the_garbage_collector(part, recompute):
    model = doubled(Language)
    estimator, given = ResidualStream(part, recompute), batch_of(model, lambda: loss_of(model))
    state = estimator.prepare(given, {})

    def tensors():
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        estimator.measure(given, state)
        before = tensors()
        estimator.measure(given, state)
        assert tensors() == before
    finally:
        gc.enable()


def test_an_error_in_a_block_closes_what_was_open():
    model = doubled(Language)
    for part in ("block", "sublayer"):
        for recompute in (False, True):
            estimator, given = ResidualStream(part, recompute), batch_of(model, lambda: loss_of(model))
            state = estimator.prepare(given, {})
            model.blocks[1].fed = lambda x: 1 / 0
            with pytest.raises(ZeroDivisionError):
                estimator.measure(given, state)
            del model.blocks[1].fed
            assert torch.is_grad_enabled()
            assert not model.blocks[1]._forward_hooks and loss_of(model).requires_grad
            assert len(estimator.measure(given, state)) == len(given.params) + 1


def test_with_recompute_one_block_is_kept_at_a_time():
    alive = []

    class Watched(Block):
        def fed(self, x):
            inner = self.up(self.norm2(x))
            alive.append(weakref.ref(inner))
            counts.append(sum(ref() is not None for ref in alive))
            return self.down(F.gelu(inner))

    model = doubled(lambda: Language(Watched, 6))
    estimator, given = ResidualStream(recompute=True), batch_of(model, lambda: loss_of(model))
    counts = []
    state = estimator.prepare(given, {})
    assert max(counts) == 1
    for recompute, most in ((True, 1), (False, 6)):
        alive.clear()
        counts.clear()
        ResidualStream(recompute=recompute).measure(given, state)
        assert max(counts) == most


def test_with_recompute_what_a_block_writes_to_later_is_an_error():
    class Writing(Block):
        def forward(self, x):
            h = self.up(self.norm2(x)).tanh()
            y = x + self.down(h)
            h.zero_()
            return y

    model = doubled(lambda: Language(Writing))
    params = [p for n, p in model.named_parameters() if ".mix" not in n and "norm1" not in n]
    given = batch_of(model, lambda: loss_of(model), params)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ResidualStream().prepare(given, {})
    with pytest.raises(ArgumentError, match="writes to a tensor that the derivative of an earlier function needs"):
        ResidualStream(recompute=True).prepare(given, {})


def test_functions_that_return_the_stream_as_it_is():
    class Same(Block):
        def forward(self, x):
            x = (x + self.attended(x.contiguous())).contiguous().to(torch.double)
            return F.dropout(x + self.fed(x), 0.5, training=False)

    model, plain = doubled(lambda: Language(Same)), doubled(Language)
    same(estimated(model, exact="sublayer"), by_hand(plain, "sublayer"))


# --- what blocks are given and put out ---------------------------------------------------------------------------

both = pytest.mark.parametrize("recompute", [False, True])


def placed(kind):
    """A kind of block that adds positions, or a skip, of the stream's shape to it before it reads it."""

    class Placed(kind):
        def forward(self, x, place):
            return super().forward(x + place)

    return Placed


@both
def test_an_error_goes_to_all_that_a_sum_is_made_of(recompute):
    class Places(Language):
        def __init__(self):
            super().__init__(placed(Block))
            self.near = nn.Parameter(torch.zeros(3, 4, WIDTH))

        def forward(self, ids, cut=lambda x: x):
            x = self.embedded(ids)
            for n, block in enumerate(self.blocks):
                y = cut(x) if n else x
                x = block(y, self.near) + (x - y)
            return self.head(self.norm(x))

    model = doubled(Places)
    state = ResidualStream().prepare(batch_of(model, lambda: loss_of(model)), {})
    assert state["blocks"]["blocks.1"] == [[0, 0, []], [1, 0, []]]
    expected = exact(model, lambda: F.cross_entropy(model(IDS, torch.Tensor.detach).flatten(0, 1), GOALS))
    same(estimated(model, recompute=recompute), expected, [n for n in expected if n != "near"])


@both
def test_an_error_goes_past_norms_to_all_that_a_sum_is_made_of(recompute):
    class Places(Language):
        def __init__(self):
            super().__init__(placed(PostNorm), 2)
            self.near, self.first = nn.Parameter(torch.zeros(3, 4, WIDTH)), Block()

        def forward(self, ids):
            x = self.first(self.embedded(ids))
            for block in self.blocks:
                x = block(x, self.near.sin())
            return self.head(self.norm(x))

    model = doubled(Places)
    whole, found = exact(model), estimated(model, recompute=recompute)
    state = ResidualStream().prepare(batch_of(model, lambda: loss_of(model)), {})
    assert state["blocks"]["blocks.0"] == [[0, 0, [0, 1]], [1, 0, [0, 1]]]

    class Hand(nn.Module):
        def forward(self, ids):
            x = model.first(model.embedded(ids))
            for block in model.blocks:
                norm1, norm2, place = copy.deepcopy(block.norm1), copy.deepcopy(block.norm2), model.near.sin()
                read = x.detach() + place.detach()
                attended = block.attended(read)
                fed = block.fed(block.norm1(read + attended))
                y = block.norm2(block.norm1(read + attended) + fed)
                past = norm2(norm1(x + place + attended.detach()) + fed.detach())
                x = y + past - past.detach()
            return model.head(model.norm(x))

    same(found, exact(model, lambda: loss_of(Hand())), [n for n in whole if n != "near"])
    assert bool(found["near"].any())


class Basic(nn.Module):
    """A block of a ResNet; the shape changes where channels do."""

    def __init__(self, before, after, inplace):
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Conv2d(before, after, 3, 2 if after > before else 1, 1),
            nn.Conv2d(after, after, 3, 1, 1),
        )
        self.norm1, self.norm2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace)
        self.skip = nn.Conv2d(before, after, 1, 2) if after > before else None

    def added(self, x):
        return self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))

    def forward(self, x):
        y = self.added(x)
        y += x if self.skip is None else self.skip(x)
        return self.relu(y)


class Mixed(nn.Module):
    """Sums with or without a norm or a ReLU behind each, in different orders of operands."""

    def __init__(self, draw):
        super().__init__()
        maps = {"none": nn.Identity, "relu": nn.ReLU, "in place": lambda: nn.ReLU(inplace=True)}
        maps |= {"layer": lambda: nn.LayerNorm(WIDTH), "rms": lambda: nn.RMSNorm(WIDTH, eps=1e-3)}
        kinds, self.order = draw.choices(list(maps), k=draw.randint(1, 3)), draw.choice(["x + f", "f + x", "f += x"])
        self.added = nn.ModuleList(nn.Sequential(*sublayer().inner, nn.Linear(WIDTH, WIDTH)) for _ in kinds)
        self.maps = nn.ModuleList(maps[kind]() for kind in kinds)

    def forward(self, x):
        for added, after in zip(self.added, self.maps, strict=True):
            f = added(x)
            if self.order == "f += x":
                f += x
            x = after(f if self.order == "f += x" else x + f if self.order == "x + f" else f + x)
        return x

    def apart(self, x):
        """The block of a constant, with the derivative of its maps for what goes past it."""
        y, past = self(x.detach()), x
        for added, after in zip(self.added, self.maps, strict=True):
            after = nn.ReLU() if isinstance(after, nn.ReLU) else copy.deepcopy(after)
            past = after(past + added(past.detach()).detach())
        return y + past - past.detach()


@pytest.mark.parametrize("seed", range(12))
def test_blocks_of_any_sums_and_maps_agree_with_autograd(seed):
    draw = random.Random(seed)
    blocks = [Mixed(draw) for _ in range(draw.randint(2, 4))]
    model = doubled(lambda: nn.Sequential(nn.Linear(3, WIDTH), *blocks, nn.Linear(WIDTH, 2)), seed)
    x, y = torch.randn(5, 4, 3, dtype=torch.double), torch.randint(2, (20,))

    def hand():
        h = blocks[0](model[0](x))
        for block in blocks[1:]:
            h = block.apart(h)
        return F.cross_entropy(model[-1](h).flatten(0, 1), y)

    closure = lambda: F.cross_entropy(model(x).flatten(0, 1), y)  # noqa: E731
    assert list(found_in(model, closure)) == [str(i + 1) for i in range(len(blocks))]
    expected = exact(model, hand)
    for recompute in (False, True):
        same(estimated(model, closure, recompute=recompute), expected)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("settings", [{}, {"recompute": True}, {"exact": "sublayer"}])
def test_blocks_of_a_resnet(inplace, settings):
    torch.manual_seed(0)
    blocks = [Basic(3, 3, inplace), Basic(3, 3, inplace), Basic(3, 5, inplace), Basic(5, 5, inplace)]
    model = nn.Sequential(nn.Conv2d(1, 3, 3), *blocks, nn.Flatten(), nn.Linear(20, 2)).double()
    x, y = torch.randn(6, 1, 6, 6, dtype=torch.double), torch.randint(2, (6,))
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    found = found_in(model, closure)
    assert list(found) == ["1", "2", "4"] and all(len(maps) == 1 for ((_, _, maps),) in found.values())

    def hand():
        h = model[1](model[0](x))
        for block in model[2:5]:
            if block.skip is not None:
                h = block(h)
                continue
            read = h.detach()
            added = block.added(read)
            out, past = torch.relu(added + read), torch.relu(h + added.detach())
            h = out + past - past.detach()
        return F.cross_entropy(model[6](model[5](h)), y)

    before = copy.deepcopy(model.state_dict())
    expected = exact(model, hand)
    model.load_state_dict(before)
    same(estimated(model, closure, **settings), expected)


@pytest.mark.parametrize("within", [False, True])
def test_checkpoints_change_nothing_where_norms_are_in_the_stream(within):
    class Checked(PostNorm):
        on = False

        def forward(self, x):
            if self.on and within:
                return checkpoint(super().forward, x, use_reentrant=False)
            return super().forward(x)

    class Around(Language):
        on = False

        def forward(self, ids):
            x = self.embedded(ids)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False) if self.on and not within else block(x)
            return self.head(self.norm(x))

    model = doubled(lambda: Around(Checked))
    expected = estimated(model)
    Checked.on = Around.on = True
    for recompute in (False, True):
        same(estimated(model, recompute=recompute), expected)


@both
def test_a_tensor_that_a_block_is_given_twice_is_one_stream(recompute):
    class Twice(Block):
        def forward(self, x, memory):
            return x + self.attended(memory) + self.fed(x + self.attended(memory))

    class Self(Language):
        def forward(self, ids):
            x = self.embedded(ids)
            for block in self.blocks:
                x = block(x, memory=x)
            return self.head(self.norm(x))

    model = doubled(lambda: Self(Twice))
    same(estimated(model, recompute=recompute), by_hand(model, "block"))


def test_a_block_of_several_streams_is_one_in_all_of_its_calls():
    class Two(Block):
        def forward(self, x, y, z):
            read = self.fed(x + y + z)
            return x + read, y + read, z + read

    class Streams(Language):
        def forward(self, ids):
            streams = [self.embedded(ids) * n for n in (1, 2, 3)]
            for _ in range(9):
                streams = self.blocks[0](*streams)
            return self.head(self.norm(sum(streams)))

    model = doubled(lambda: Streams(Two, 1))
    assert found_in(model, lambda: loss_of(model)) == {"blocks.0": [(i, i, ()) for i in range(3)]}


@both
def test_a_sum_that_is_put_out_twice_has_the_error_of_both(recompute):
    class Twice(Block):
        def forward(self, x):
            y = super().forward(x)
            return y, {"again": y}

    class Both(Language):
        def forward(self, ids, cut=lambda x: x):
            x, read = self.embedded(ids), 0.0
            for n, block in enumerate(self.blocks):
                start = cut(x) if n else x
                y, more = block(start)
                past = x - start
                x, read = y + past, read + (more["again"] + past).tanh()
            return self.head(self.norm(x + read))

    model = doubled(lambda: Both(Twice))
    expected = exact(model, lambda: F.cross_entropy(model(IDS, torch.Tensor.detach).flatten(0, 1), GOALS))
    same(estimated(model, recompute=recompute), expected)


@both
def test_what_hooks_of_the_user_keep_of_the_stream_has_its_error(recompute):
    """As features for a loss of their own."""

    class Listed(Language):
        def forward(self, ids):
            x, self.states = self.embedded(ids), []
            for block in self.blocks:
                x = block(x)
                self.states.append(x)
            return self.head(self.norm(x))

    listed, model, states = doubled(Listed), doubled(Language), []
    expected = estimated(listed, lambda: loss_of(listed) + sum(x.tanh().square().mean() for x in listed.states))
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: states.append(out))

    def closure():
        states.clear()
        return loss_of(model) + sum(x.tanh().square().mean() for x in states)

    same(estimated(model, closure, recompute=recompute), expected)


@both
def test_what_hooks_of_the_user_add_to_the_stream_is_exact(recompute):
    class Steered(Language):
        def __init__(self):
            super().__init__()
            self.steer = nn.Linear(WIDTH, WIDTH)

        def forward(self, ids):
            x = self.embedded(ids)
            for block in self.blocks:
                x = block(x)
                x = x if self.by_hook else (x + self.steer(x)).tanh()
            return self.head(self.norm(x))

        by_hook: Any = False

    plain, model = doubled(Steered), doubled(Steered)
    model.by_hook = True
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: (out + model.steer(out)).tanh())
    same(estimated(model, recompute=recompute), estimated(plain))


@both
@pytest.mark.parametrize("same_one", [False, True])
def test_an_input_that_a_block_also_puts_out_keeps_its_error(same_one, recompute):
    class Beside(Block):
        def forward(self, batch):
            put = batch if same_one else dict(batch)
            put["sum"] = super().forward(batch["input"])
            return put

    class Skips(Language):
        inside: Any = False

        def forward(self, ids):
            x, skips = self.embedded(ids), []
            for block in self.blocks:
                out = block({"input": x})
                skips.append(out["input"] if self.inside else x)
                x = out["sum"]
            return self.head(self.norm(x + torch.stack(skips).sum(0).tanh()))

    model = doubled(lambda: Skips(Beside))
    expected = estimated(model)
    model.inside = True
    same(estimated(model, recompute=recompute), expected)


class Output(dict):
    """As those of transformers: items may be set alone."""

    def update(self, *given):
        raise TypeError("not to be updated")


register_pytree_node(
    Output, lambda d: ([*d.values()], [*d]), lambda values, keys: Output(zip(keys, values, strict=True))
)


class Noting(Block):
    """A block that also writes to a list or dictionary that it is given."""

    def forward(self, x, notes):
        h = self.attended(x)
        if isinstance(notes, list):
            notes.append(h.square().mean())
        else:
            notes[len(notes)] = h.square().mean()
        return x + h + self.fed(x + h)


@pytest.mark.parametrize("notes", [list, dict])
def test_lists_and_dictionaries_of_the_model_stay_its_own(notes):
    class Noted(Language):
        def forward(self, ids):
            x, self.notes = self.embedded(ids), notes()
            for block in self.blocks:
                x = block(x, notes=self.notes)
            return self.head(self.norm(x))

    model = doubled(lambda: Noted(Noting))
    terms = lambda: sum(model.notes if notes is list else model.notes.values())  # noqa: E731
    closure = lambda: loss_of(model) + terms()  # noqa: E731
    found, whole = estimated(model, closure), exact(model, closure)
    same(found, whole, [n for n in whole if n.startswith(("blocks.2.", "norm", "head"))])
    with pytest.raises(ArgumentError, match=r"Take ResidualStream\(recompute=False\)"):
        estimated(model, closure, recompute=True)


@both
@pytest.mark.parametrize("returned", [False, True])
@pytest.mark.parametrize("kind", [dict, Output])
def test_a_stream_may_be_in_a_dictionary_that_blocks_write_to(kind, returned, recompute):
    class Batched(Block):
        def forward(self, batch):
            batch["x"] = super().forward(batch["x"])
            return batch

    class Stored(Language):
        def forward(self, ids):
            batch = kind(x=self.embedded(ids), ids=ids)
            for block in self.blocks:
                batch = block(batch) if returned else (block(batch), batch)[1]
            return self.head(self.norm(batch["x"]))

    model = doubled(lambda: Stored(Batched))
    same(estimated(model, recompute=recompute), by_hand(model, "block"))


@both
def test_what_holds_the_stream_holds_after_a_block_what_it_held_before(recompute):
    class Reading(Block):
        def forward(self, batch):
            return super().forward(batch["x"])

    class Kept(Language):
        def forward(self, ids):
            x = self.embedded(ids)
            for block in self.blocks:
                batch = {"x": x}
                y = block(batch)
                x = y + (batch["x"] - x)  # of derivative zero
            return self.head(self.norm(x))

    model = doubled(lambda: Kept(Reading))
    same(estimated(model, recompute=recompute), by_hand(model, "block"))


@both
def test_the_stream_may_be_written_to(recompute):
    class Inside(Block):
        def forward(self, x):
            x += self.attended(x.clone())
            return x.add_(self.fed(x.clone()))

    class Outside(Language):
        def forward(self, ids):
            x = self.embedded(ids)
            for block in self.blocks:
                x = block(x)
                x += 1.0
                x[:, 0] = 0.0
            return self.head(self.norm(x.relu_()))

    written, plain = doubled(lambda: Language(Inside)), doubled(Language)
    same(estimated(written, recompute=recompute), by_hand(plain, "block"))
    model = doubled(Outside)
    whole = exact(model)
    same(estimated(model, recompute=recompute), whole, [n for n in whole if n.startswith(("blocks.2.", "head"))])


def test_a_sum_in_a_narrower_dtype_is_one():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            h = self.f(x.float())
            x += h
            return x

    torch.manual_seed(0)
    model = nn.Sequential(Narrow(), Narrow())
    x = torch.randn(5, WIDTH).bfloat16()
    assert list(found_in(model, lambda: model(x.clone()).sum())) == ["0", "1"]


def test_nested_tensors_are_no_streams():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.block, self.head = sublayer(), sublayer(), nn.Linear(WIDTH, 1)

        def forward(self, x):
            x = self.inside(x)
            x += 1.0
            return self.head(self.block(x.values()))

    torch.manual_seed(0)
    parts = [torch.randn(n, WIDTH) for n in (3, 5)]
    x, model = torch.nested.nested_tensor(parts, layout=torch.jagged), Nested()
    assert found_in(model, lambda: model(x)) == {"block": [(0, 0, ())]}
    same(estimated(model, lambda: model(x).square().mean()), exact(model, lambda: model(x).square().mean()))


@both
def test_complex_numbers_that_a_block_puts_out_keep_their_error(recompute):
    class Waves(Block):
        def forward(self, x):
            return super().forward(x), torch.fft.fft(self.mix(x))

    class Both(Language):
        def forward(self, ids):
            x = self.embedded(ids)
            for block in self.blocks:
                x, waves = block(x)
            self.waves = waves
            return self.head(self.norm(x))

    model = doubled(lambda: Both(Waves))
    closure = lambda: loss_of(model) + model.waves.abs().square().mean()  # noqa: E731
    found, whole = estimated(model, closure, recompute=recompute), exact(model, closure)
    same(found, whole, [n for n in whole if n.startswith(("blocks.2.", "norm", "head"))])


# --- closures that cannot be followed ----------------------------------------------------------------------------


@pytest.mark.parametrize("create", [False, True])
def test_a_derivative_that_the_closure_takes_through_blocks_is_refused(create):
    class Vectors(Language):
        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    model = doubled(Vectors)
    x = torch.randn(3, 4, WIDTH, dtype=torch.double, requires_grad=True)

    def penalized():
        out = model(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=create, retain_graph=True)
        return out.square().mean() + slope.square().mean()

    with pytest.raises(ArgumentError, match=r"the closure, or something that has kept.*ActivityPerturbation\(\)"):
        estimated(model, penalized)
    with pytest.raises(
        ArgumentError, match="with recompute blocks run without graphs, and here the closure takes a der"
    ):
        estimated(model, penalized, recompute=True)


@both
def test_what_a_block_put_out_has_no_derivative_after_the_step(recompute):
    class Kept(Language):
        def forward(self, ids):
            x = self.embedded(ids)
            for block in self.blocks:
                x = block(x)
            self.last = x
            return self.head(self.norm(x))

    model = doubled(Kept)
    estimator, given = ResidualStream(recompute=recompute), batch_of(model, lambda: loss_of(model))
    estimator.measure(given, estimator.prepare(given, {}))
    with pytest.raises(ArgumentError, match="the derivative past a block is an estimate"):
        model.last.sum().backward()


def test_derivatives_that_cross_no_block_are_the_closures_own():
    model = doubled(Language)

    def penalized():
        x = model.embedded(IDS)
        for block in model.blocks:
            x = block(x)
        read = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(model.head(model.norm(read)).sum(), read, create_graph=True)
        return F.cross_entropy(model.head(model.norm(x)).flatten(0, 1), GOALS) + slope.square().mean()

    whole = exact(model, penalized)
    same(estimated(model, penalized), whole, ["head.weight", "norm.weight", "blocks.2.down.weight"])


def test_calls_in_transforms_are_no_blocks():
    model = doubled(Language)
    mapped = lambda: torch.vmap(lambda ids: model(ids[None])[0])(IDS)  # noqa: E731
    with pytest.raises(ArgumentError, match="no block of Language.*outside of torch.func"):
        estimated(model, lambda: F.cross_entropy(mapped().flatten(0, 1), GOALS))
    closure = lambda: loss_of(model) + F.cross_entropy(mapped().flatten(0, 1), GOALS)  # noqa: E731
    with pytest.raises(ArgumentError, match="in each of its calls"):
        estimated(model, closure)
    given = batch_of(model, lambda: loss_of(model))
    state = ResidualStream().prepare(given, {})
    with pytest.raises(ArgumentError, match="in another way than in the first step"):
        ResidualStream().measure(batch_of(model, closure), state)


def test_calls_with_derivatives_of_forward_mode_are_no_blocks():
    class Vectors(Language):
        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    model = doubled(Vectors)
    x, params = torch.randn(3, 4, WIDTH, dtype=torch.double), [*model.blocks.parameters()]

    def slope():
        with forward_ad.dual_level():
            _, tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x))))
            assert tangent is not None
            return tangent.square().mean()

    with pytest.raises(ArgumentError, match="no block of Vectors"):
        estimated(model, slope)
    state = ResidualStream().prepare(batch_of(model, lambda: model(x).square().mean(), params), {})
    with pytest.raises(ArgumentError, match="in another way than in the first step"):
        ResidualStream().measure(batch_of(model, slope, params), state)


def test_with_recompute_both_runs_must_compute_the_same():
    model = doubled(lambda: Language(depth=4))
    runs, longer = [], 1

    def other_loss():
        runs.append(1)
        return loss_of(model) * (1 + 1e-3 * len(runs))

    def other_blocks():
        runs.append(1)
        x = model.embedded(IDS)
        for block in model.blocks[: 4 if len(runs) == longer else 3]:
            x = block(x)
        return F.cross_entropy(model.head(model.norm(x)).flatten(0, 1), GOALS)

    given = batch_of(model, lambda: loss_of(model))
    state = ResidualStream().prepare(given, {})
    estimator = ResidualStream(recompute=True)
    with pytest.raises(jp.RandomClosureError, match=r"gives a loss of .* after .*generators=\[\.\.\.\]"):
        estimator.measure(batch_of(model, other_loss), state)
    for run in (1, 2):
        longer = run
        runs.clear()
        with pytest.raises(jp.RandomClosureError, match="calls other blocks the second time"):
            estimator.measure(batch_of(model, other_blocks), state)


@both
@pytest.mark.parametrize("tied", [False, True])
def test_sparse_derivatives_become_dense(tied, recompute):
    model, plain = doubled(Language), doubled(Language)
    model.token.sparse = True
    for each in (model, plain):
        each.head.weight = each.token.weight if tied else each.head.weight
    found = estimated(model, recompute=recompute)
    assert all(g.layout is torch.strided for g in found.values())
    same(found, estimated(plain))


@both
def test_a_checkpoint_in_a_block(recompute):
    class Within(Block):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    model, plain = doubled(lambda: Language(Within)), doubled(Language)
    same(estimated(model, recompute=recompute), estimated(plain))
    with pytest.raises(ArgumentError, match="a checkpoint within a block would run.*exact='block'"):
        estimated(model, exact="sublayer", recompute=recompute)


@both
@pytest.mark.parametrize("when", ["found", "run", "differentiated"])
def test_other_threads_may_use_the_model(when, recompute):
    """Another thread is within a block while this one leaves one, or takes its derivative."""
    main, inside, done, others = threading.get_ident(), threading.Event(), threading.Event(), []

    def start(which):
        if which == when and watching and not others:
            others.append(pool.submit(lambda: loss_of(model)))
            assert inside.wait(5)

    class Watched(Block):
        def fed(self, x):
            if threading.get_ident() != main:
                inside.set()
                done.wait(5)
            elif self is model.blocks[1]:
                start("found" if state is None else "run")
            return super().fed(x)

    model, watching, state = doubled(lambda: Language(Watched)), False, None
    expected = estimated(model)
    model.get_parameter("blocks.1.mix.weight").register_hook(lambda g: start("differentiated"))
    estimator, given = ResidualStream(recompute=recompute), batch_of(model, lambda: loss_of(model))
    with ThreadPoolExecutor(1) as pool:
        watching = when == "found"
        state = estimator.prepare(given, {})
        watching = True
        found = estimator.measure(given, state)
        done.set()
        torch.testing.assert_close(others[0].result(), loss_of(model))
    names = [n for n, _ in model.named_parameters()]
    same(dict(zip(names, found, strict=False)), expected)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_for_the_way_back_hide_no_blocks():
    model, plain = doubled(Language), doubled(Language)
    called = []
    for block in model.blocks:
        block.register_full_backward_hook(lambda *given: called.append(1))
        block.register_full_backward_pre_hook(lambda *given: called.append(1))
    assert list(found_in(model, lambda: loss_of(model))) == ["blocks.0", "blocks.1", "blocks.2"]
    assert not called and all(b._backward_hooks and b._backward_pre_hooks for b in model.blocks)
    same(estimated(model), estimated(plain))


def test_scripts_are_no_blocks():
    class Scripted(Block):
        def __init__(self):
            super().__init__()
            self.script: Any = torch.jit.script(nn.Linear(WIDTH, WIDTH))

        def fed(self, x):
            return super().fed(self.script(x))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = doubled(lambda: Language(Scripted))
    same(estimated(model), exact(model), ["blocks.2.script.weight", "blocks.2.down.weight"])
    with pytest.raises(ArgumentError, match=r"\['blocks.0.script'\].*model.named_modules"):
        estimated(model, blocks=["blocks.0.script"])


def test_a_block_of_several_names_may_be_named_by_any():
    model = doubled(lambda: Language(depth=1))
    model.blocks.append(model.blocks[0])
    whole = estimated(model)
    for names in (["blocks.1"], ["blocks.1", "blocks.0"]):
        same(estimated(model, blocks=names), whole)


# --- as an estimator of PlaneSearch ------------------------------------------------------------------------------


def optimizer(model, every=4, **settings):
    plan = Subspace([FastWeights(rate=1e-2)], chunk=1, every=every)
    return jp.optim.PlaneSearch(
        model.parameters(), model, gradient=ResidualStream(**settings), subspace=plan, audit="never"
    )


@pytest.mark.parametrize("settings", [{}, {"recompute": True}, {"exact": "sublayer"}])
def test_it_trains(settings):
    torch.manual_seed(0)
    model = Language()
    opt = optimizer(model, **settings)
    ids = torch.randint(VOCABULARY, (32, 4))
    goals = (2 * ids + 1).flatten() % VOCABULARY
    losses = [opt.step(lambda: loss_of(model, ids, goals)).item() for _ in range(64)]
    assert losses[-1] < 0.6 * losses[0]


def test_training_resumes_bit_for_bit():
    torch.manual_seed(0)
    model = Language()
    opt = optimizer(model)
    step = lambda model, opt: opt.step(lambda: loss_of(model))  # noqa: E731
    for _ in range(6):
        step(model, opt)
    again = copy.deepcopy(model)
    other = optimizer(again)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(6):
        assert torch.equal(step(model, opt), step(again, other))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_by_default_fast_weights_follow_it():
    model = Language()
    opt = jp.optim.PlaneSearch(model.parameters(), model, gradient=ResidualStream())
    assert opt.subspace == (FastWeights(),) and opt.every == 16
    before = copy.deepcopy(model.state_dict())
    opt.step(lambda: loss_of(model))
    opt.step(lambda: loss_of(model))
    assert opt.plane is None and any(not torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_a_model_is_needed():
    model = Language()
    opt = jp.optim.PlaneSearch(model.parameters(), gradient=ResidualStream())
    with pytest.raises(ArgumentError, match="needs the model whose blocks it looks for"):
        opt.step(lambda: loss_of(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"exact": "layer"}, "'block' or 'sublayer', got 'layer'"), ({"blocks": "blocks.0"}, "list of names"),
     ({"blocks": [1]}, "list of names"), ({"blocks": []}, "list of names"), ({"blocks": 2}, "list of names"),
     ({"blocks": iter(["blocks.0"])}, "list of names"), ({"recompute": "yes"}, "True or False, got 'yes'")],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ArgumentError, match=message):
        ResidualStream(**settings)


@pytest.mark.parametrize("part", ["block", "sublayer"])
def test_parameters_that_the_loss_does_not_depend_on_stay(part):
    class More(Language):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(2, 2)

    model = doubled(More)
    with pytest.warns(
        jp.JetplaneWarning, match=r"depends on 2 of 38 parameters, shapes \[\(2, 2\), \(2,\)\].*they stay"
    ):
        found = estimated(model, exact=part)
    assert not found["unused.weight"].any() and bool(found["token.weight"].any())


def test_parameters_that_sublayers_apart_would_lose_are_refused():
    """What is added to the stream in a sublayer, and read there alone, is taken for a sublayer of its own."""

    class Convolved(Block):
        def __init__(self):
            super().__init__()
            self.near = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return x + self.fed(x + self.near(x))

    model = doubled(lambda: Language(Convolved))
    kept = [p for n, p in model.named_parameters() if ".mix" not in n and "norm1" not in n]
    for p in model.parameters():
        p.requires_grad_(any(p is q for q in kept))
    same(estimated(model), exact(model), ["blocks.2.near.weight"])
    with pytest.raises(ArgumentError, match='does not reach 6 of 30 parameters where sublayers.*Take exact="block"'):
        estimated(model, exact="sublayer")


@pytest.mark.parametrize("recompute", [False, True])
def test_a_loss_without_derivatives_is_refused(recompute):
    model = doubled(Language)
    with pytest.raises(ArgumentError, match="no derivative of the loss reaches any parameter"):
        estimated(model, lambda: loss_of(model).detach(), recompute=recompute)
    with pytest.raises(jp.LossError, match="must return a scalar loss, got Tensor"):
        estimated(model, lambda: model(IDS), recompute=recompute)


@pytest.mark.parametrize(
    "other",
    [lambda block, x: block(x)[None, 0].mT, lambda block, x: (None, block(x)), lambda block, x: block(x).long()],
)
@pytest.mark.parametrize("settings", [{}, {"recompute": True}, {"exact": "sublayer"}])
def test_a_block_that_puts_out_something_else_is_an_error(other, settings):
    model = doubled(Language)
    estimator, given = ResidualStream(**settings), batch_of(model, lambda: loss_of(model))
    state = estimator.prepare(given, {})
    inner = copy.deepcopy(model.blocks[1])
    model.blocks[1].forward = lambda x: other(inner, x)
    with pytest.raises(ArgumentError, match=r"block blocks.1 is called, or puts out, in another way"):
        estimator.measure(given, state)
    del model.blocks[1].forward
    with pytest.raises(ArgumentError, match=r"block blocks.1 is called, or puts out, in another way"):
        estimator.measure(batch_of(model, lambda: model.blocks[1](IDS).sum()), state)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
