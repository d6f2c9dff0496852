"""Attention by blocks against the dense formula and reverse over reverse; blocks do not divide the lengths."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import jetplane as jp
from jetplane.rules import attention, higher_order


@pytest.fixture
def small_blocks(monkeypatch):
    for name, size in (("QUERIES", 5), ("KEYS", 7), ("SCORES", 0)):
        monkeypatch.setattr(attention, name, size)


def dense(q, k, v, mask=None, causal=False):
    """The formula, with all scores at once."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    blind = scores.detach().isneginf().all(-1, keepdim=True)
    return scores.softmax(-1).masked_fill(blind, 0) @ v


def heads(n=13, keys=13, groups=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, h, m, d, dtype=dtype, generator=generator)
        for h, m, d in ((4, n, 6), (groups, keys, 6), (groups, keys, 3))
    ]


MASKS = {
    "none": None,
    "boolean": (torch.rand(13, 13, generator=torch.Generator().manual_seed(1)) > 0.4).index_fill(
        0, torch.tensor([3]), False
    ),
    "added": torch.randn(4, 13, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
    "one row": torch.rand(2, 1, 1, 13, generator=torch.Generator().manual_seed(3)) > 0.3,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_against_the_dense_formula(mask, causal, small_blocks):
    if causal and mask != "none":
        return  # torch takes one of them
    xs = heads()
    vs = [torch.randn(3, *x.shape).double() for x in xs]
    blocks = jp.jet(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, MASKS[mask], is_causal=causal), xs, vs)
    for got, want in zip(blocks, jp.jet(lambda q, k, v: dense(q, k, v, MASKS[mask], causal), xs, vs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("keys", [13, 4, 1])
def test_blocks_against_reverse_over_reverse(groups, keys, small_blocks):
    leaves = [x.requires_grad_() for x in heads(9, keys, groups)]
    tangents = [torch.randn(2, *x.shape).double() for x in leaves]
    mask = torch.randn(keys, dtype=torch.float64)

    def closure():
        return F.scaled_dot_product_attention(*leaves, mask, enable_gqa=groups < 4).square().sum()

    jp.testing.check_plane(closure, leaves, tangents, 1e-8)


def both(f, *args, few=False, **kwargs):
    """A transform of attention by blocks and of the dense formula, at one point of queries, keys and values."""
    xs = [x[0, :1] if few else x for x in heads(11, 13)]

    def number(attend):
        return lambda *xs: attend(*xs).square().sum()

    return [f(number(attend), tuple(xs), *args, **kwargs) for attend in (F.scaled_dot_product_attention, dense)]


@pytest.mark.parametrize("pairs", ["all", "diagonal", 2])
@pytest.mark.parametrize("order", [1, 2])
def test_pairs_of_a_plane(pairs, order, small_blocks):
    vs = tuple(torch.randn(4, *x.shape).double() for x in heads(11, 13))
    for got, want in zip(*both(jp.jet, vs, pairs, order), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_products_with_a_hessian_and_laplacians(small_blocks):
    vs = tuple(torch.randn(x[0, :1].shape).double() for x in heads(11, 13))
    torch.testing.assert_close(*both(jp.hvp, vs, mode="forward", few=True), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(*both(jp.laplacian, few=True), rtol=1e-10, atol=1e-10)


def test_one_direction_moves_keys_and_another_values(small_blocks):
    q, k, v = (x.requires_grad_() for x in heads())
    zero, one = torch.zeros(1, *k.shape).double(), torch.randn(1, *k.shape).double()
    other = torch.randn(1, *v.shape).double()

    def closure():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum()

    tangents = [torch.cat([one, zero]), torch.cat([torch.zeros_like(other), other])]
    jp.testing.check_plane(closure, [k, v], tangents, 1e-9)


def test_results_have_a_graph(small_blocks):
    xs = [x.requires_grad_() for x in heads()]
    vs = tuple(torch.randn(2, *x.shape).double() for x in xs)
    found = []
    for attend in (F.scaled_dot_product_attention, dense):
        _, first, second = jp.jet(attend, tuple(xs), vs)
        found.append(torch.autograd.grad(first.square().sum() + second.square().sum(), xs))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_evaluations_nest(small_blocks):
    q, k, v = heads(5, 6)
    dq = torch.randn(q.shape).double()
    found = []
    for attend in (F.scaled_dot_product_attention, dense):
        found.append(jp.jvp(lambda k, attend=attend: jp.jvp(lambda q: attend(q, k, v), q, dq)[1].sin(), k, k.cos()))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("axes", [(2, 4), (1, 4), (2, 1)])
def test_batches_are_broadcast_and_split(axes, monkeypatch):
    for name, size in (("QUERIES", 5), ("KEYS", 7), ("SCORES", 70)):  # two heads of one block at a time
        monkeypatch.setattr(attention, name, size)
    q, k, v = heads()
    k = k[: axes[0], : axes[1]]
    vs = [torch.randn(2, *x.shape).double() for x in (q, k, v)]
    for got, want in zip(*(jp.jet(f, (q, k, v), vs) for f in (F.scaled_dot_product_attention, dense)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_queries_that_see_nothing_give_zero(small_blocks):
    seen = torch.zeros(13, 13, dtype=torch.bool)
    seen[4, 9] = seen[5, 0] = True
    q, k, v = heads()
    vs = [torch.randn(2, *x.shape).double() for x in (q, k, v)]
    for mask in (seen, torch.zeros(13, 13).double().masked_fill(~seen, -math.inf)):
        value, first, second = jp.jet(lambda *x, m=mask: F.scaled_dot_product_attention(*x, m), (q, k, v), vs)
        blind = [n for n in range(13) if n not in (4, 5)]
        assert not value[..., blind, :].any() and not first[..., blind, :].any() and not second[..., blind, :].any()
        torch.testing.assert_close(value[..., 4, :], v[..., 9, :])
        torch.testing.assert_close(first[..., 5, :], vs[2][..., 0, :])


def test_blocks_that_no_query_sees_are_skipped(monkeypatch, small_blocks):
    met = []
    of = attention._scores

    def counted(*args):
        met.append(args)
        return of(*args)

    monkeypatch.setattr(attention, "_scores", counted)
    q, k, v = (x[0, 0] for x in heads(20, 20))
    jp.jvp(lambda q: F.scaled_dot_product_attention(q, k, v, is_causal=True), q, q)
    assert len(met) == sum(-(-stop // 5) for stop in (5, 10, 15, 20))


def test_a_mask_that_moves(small_blocks):
    q, k, v = heads()
    bias = torch.randn(13, 13).double()
    tangents = torch.randn(2, 13, 13).double()
    got = jp.jet(lambda b: F.scaled_dot_product_attention(q, k, v, b), bias, tangents)
    for a, b in zip(got, jp.jet(lambda b: dense(q, k, v, b), bias, tangents), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("curvature", ["ggn", "none"])
def test_planes_of_a_transformer_do_not_depend_on_blocks(curvature, monkeypatch):
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    x, y = torch.randn(2, 11, 8).double(), torch.randn(2, 11, 8).double()
    params = list(layer.parameters())

    def plane():
        return jp.evaluate(lambda: F.mse_loss(layer(x), y), params, jp.Directions(3), curvature)

    whole = plane()
    for name, size in (("QUERIES", 4), ("KEYS", 3), ("SCORES", 0)):
        monkeypatch.setattr(attention, name, size)
    blocks = plane()
    torch.testing.assert_close(blocks.slope, whole.slope)
    if curvature == "ggn":
        torch.testing.assert_close(blocks.curvature, whole.curvature)


def test_dropout_has_the_mask_of_the_plain_run(small_blocks):
    q, k, v = heads()
    torch.manual_seed(0)
    plain = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)
    torch.manual_seed(0)
    value, *_ = jp.jet(
        lambda v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.4), v, torch.ones(1, *v.shape).double()
    )
    torch.testing.assert_close(value, plain)


def test_decided_scores_do_not_cancel(small_blocks):
    q, k, v = (x * s for x, s in zip(heads(), (1e8, 1e8, 1.0), strict=True))
    vs = [torch.randn(1, *x.shape).double() for x in (q, k, v)]
    _, first, _ = jp.jet(F.scaled_dot_product_attention, (q, k, v), vs)
    chosen = (q @ k.transpose(-2, -1)).argmax(-1)
    picked = vs[2][0].gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, 3))
    torch.testing.assert_close(first[0], picked)


def test_half_precision_has_coefficients_in_single(small_blocks):
    xs = heads(dtype=torch.bfloat16)
    vs = [torch.randn(1, *x.shape).bfloat16() for x in xs]
    _, first, _ = jp.jet(F.scaled_dot_product_attention, xs, vs)
    _, want, _ = jp.jet(F.scaled_dot_product_attention, [x.double() for x in xs], [t.double() for t in vs])
    assert first.dtype == torch.float32
    torch.testing.assert_close(first.double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_for_some_queries_at_a_time(monkeypatch):
    xs, bias = heads(), torch.randn(4).double()
    mask = create_block_mask(lambda b, h, m, n: m >= n, None, None, 13, 13, device="cpu")

    def attend(q, k, v, bias):
        return flex_attention(q, k, v, lambda s, b, h, m, n: s + bias[h] * (m - n), mask)

    vs = [torch.randn(2, *x.shape).double() for x in (*xs, bias)]
    whole = jp.jet(attend, (*xs, bias), vs)
    monkeypatch.setattr(higher_order, "SCORES", 2 * 4 * 13 * 5)
    for got, want in zip(jp.jet(attend, (*xs, bias), vs), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    distance = torch.arange(13)[:, None] - torch.arange(13)
    moved = (bias[:, None, None] * distance).masked_fill(distance < 0, -math.inf)
    torch.testing.assert_close(whole[0], dense(*xs, moved))


@pytest.mark.parametrize("layer", ["MultiheadAttention", "TransformerEncoderLayer"])
def test_layers_of_torch_against_reverse_over_reverse(layer, small_blocks):
    torch.manual_seed(0)
    x = torch.randn(2, 11, 8).double()
    padded = torch.zeros(2, 11, dtype=torch.bool)
    padded[0, 8:] = True
    if layer == "MultiheadAttention":
        model = torch.nn.MultiheadAttention(8, 2, batch_first=True).double()

        def call():
            return model(x, x, x, key_padding_mask=padded, need_weights=False)[0]
    else:
        model = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()

        def call():
            return model(x, src_key_padding_mask=padded)

    params = list(model.parameters())
    tangents = [torch.randn(2, *p.shape).double() for p in params]
    jp.testing.check_plane(lambda: call().square().sum(), params, tangents, 1e-9)


@pytest.mark.parametrize("architecture", ["Llama", "GPT2"])
def test_models_of_transformers_with_sdpa(architecture, small_blocks):
    tf = pytest.importorskip("transformers", reason="the models are those of an optional library")
    torch.manual_seed(0)
    if architecture == "GPT2":
        config = tf.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0,
                               embd_pdrop=0, attn_pdrop=0)  # fmt: skip
    else:  # grouped queries
        config = tf.LlamaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
                                num_key_value_heads=2, intermediate_size=16, max_position_embeddings=16)  # fmt: skip
    make = tf.GPT2LMHeadModel if architecture == "GPT2" else tf.LlamaForCausalLM
    config.use_cache = False
    tokens = torch.randint(20, (2, 12))
    planes = []
    for chosen in ("sdpa", "eager"):
        torch.manual_seed(0)
        model = make._from_config(config, attn_implementation=chosen).double()
        params = list(model.parameters())
        planes.append(jp.evaluate(lambda m=model: m(tokens).logits.square().mean(), params, jp.Directions(2)))
    torch.testing.assert_close(planes[0].slope, planes[1].slope, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(planes[0].curvature, planes[1].curvature, rtol=1e-5, atol=1e-7)
