"""Models of which each rank holds a part give the numbers of whole ones: two real processes over gloo."""

import contextlib
import math

import pytest
import torch
import torch.distributed as dist
from cases import Doubled
from ranks import Gang
from torch import nn
from torch.distributed._functional_collectives import (
    all_gather_tensor,
    all_reduce,
    all_to_all_single,
    reduce_scatter_tensor,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F

import jetplane as jp
from jetplane import _sharding as sharded
from jetplane._sharding import Part
from jetplane.directions import laws, random

pytestmark = pytest.mark.filterwarnings("ignore::jetplane.RescueWarning")

OPTIMIZERS = {
    "fgd": lambda p, **kw: jp.optim.FGD(p, lr=2e-3, k=3, weight_decay=0.1, **kw),
    "fomoh": lambda p, **kw: jp.optim.FoMoH(p, lr=0.1, k=3, clip=0.05, **kw),
    "fomoh-kd": lambda p, **kw: jp.optim.FoMoHKD(p, lr=0.3, k=4, descent="saddle-free", clip=0.5, **kw),
}
TANGENTS = {
    "signs": {"law": "rademacher"},
    "sphere": {"law": "sphere"},
    "rank-one": {"tangents": "rank-one"},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    gang = Gang(2, tmp_path_factory.mktemp("gang"))
    yield gang
    gang.stop()


# --- models, their batches, and how they are sharded -------------------------------------------------


class Columns(ColwiseParallel):
    """For GPT-2's Conv1D, whose weight lies the other way round than that of a linear layer."""

    split = {"weight": Shard(1), "bias": Shard(0)}

    def _apply(self, module, device_mesh):
        def partition(name, module, mesh):
            for key, p in list(module.named_parameters()):
                placement = self.split.get(key, Replicate())
                module.register_parameter(key, nn.Parameter(distribute_tensor(p, mesh, [placement])))

        def before(module, inputs, mesh):
            return self._prepare_input_fn(self.input_layouts, self.desired_input_layouts, module, inputs, mesh)

        def after(module, outputs, mesh):
            return self._prepare_output_fn(self.output_layouts, self.use_local_output, module, outputs, mesh)

        return distribute_module(module, device_mesh, partition, before, after)


class Rows(Columns):
    split = {"weight": Shard(0), "bias": Replicate()}

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.desired_input_layouts = (Shard(-1),)


def mlp(widths=(6, 8, 3)):
    torch.manual_seed(3)
    a, b, c = widths
    return nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.LayerNorm(b), nn.Linear(b, c)).double()


def uneven():
    return mlp((6, 7, 3))


def gpt2():
    import transformers

    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return transformers.GPT2LMHeadModel(config).double()


def examples(name):
    generator = torch.Generator().manual_seed(7)
    if name == "gpt2":
        return (torch.randint(40, (4, 9), generator=generator),)
    x = torch.randn(10, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (10,), generator=generator)


def loss_of(net, batch):
    if len(batch) == 1:
        logits = net(input_ids=batch[0]).logits  # its own loss is computed in single precision
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())
    return F.cross_entropy(net(batch[0]), batch[1])


MODELS = {"mlp": mlp, "uneven": uneven, "gpt2": gpt2}


def fully_sharded(net):
    mesh = init_device_mesh("cpu", (2,))
    inner = net.transformer.h if hasattr(net, "transformer") else [m for m in net if isinstance(m, nn.Linear)]
    for block in inner:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def tensor_parallel(net):
    mesh = init_device_mesh("cpu", (2,))
    if not hasattr(net, "transformer"):
        return parallelize_module(
            net,
            mesh,
            {"0": ColwiseParallel(output_layouts=Replicate()), "3": RowwiseParallel(input_layouts=Replicate())},
        )
    whole = {"input_layouts": Replicate(), "output_layouts": Replicate()}
    plan = {
        "transformer.wte": RowwiseParallel(**whole),
        "lm_head": ColwiseParallel(**whole),
        "transformer.h.*.attn.c_attn": Columns(**whole),
        "transformer.h.*.attn.c_proj": Rows(**whole),
        "transformer.h.*.mlp.c_fc": Columns(),
        "transformer.h.*.mlp.c_proj": Rows(input_layouts=Shard(-1), output_layouts=Replicate()),
    }
    parallelize_module(net, mesh, plan)
    net.lm_head.weight = net.transformer.wte.weight  # tied as before
    return net


def sequence_parallel(net):
    """Of the MLP: the layer norm, too, sees a part of the rows."""
    plan = {
        "0": ColwiseParallel(output_layouts=Shard(0)),
        "2": SequenceParallel(sequence_dim=0),
        "3": RowwiseParallel(input_layouts=Shard(0)),
    }
    return parallelize_module(net, init_device_mesh("cpu", (2,)), plan)


WAYS = {"fsdp": fully_sharded, "tensor parallel": tensor_parallel}
EVERY_WAY = WAYS | {"sequence parallel": sequence_parallel}


def shard_of(rank, batch):
    """Unequal parts of a batch."""
    cut = len(batch[0]) // 4 + (len(batch[0]) > 5)
    return tuple(t[:cut] if rank == 0 else t[cut:] for t in batch)


def whole(p):
    with torch.no_grad():
        return (p.full_tensor() if isinstance(p, DTensor) else p).clone()


def trained(rank, model, way, optimizer, settings, steps=3):
    """Losses and parameters of a whole model and of the same one sharded."""
    batch = examples(model)
    alone, net = MODELS[model](), WAYS[way](MODELS[model]())
    single = OPTIMIZERS[optimizer](alone.parameters(), **settings)
    data = way == "fsdp"
    opt = OPTIMIZERS[optimizer](net.parameters(), process_group=dist.group.WORLD if data else None, **settings)
    mine = shard_of(rank, batch) if data else batch
    losses = [
        (
            single.step(lambda: loss_of(alone, batch)).item(),
            opt.step(lambda: loss_of(net, mine), weight=len(mine[0])).item(),
        )
        for _ in range(steps)
    ]
    return losses, [(whole(p), whole(q)) for p, q in zip(alone.parameters(), net.parameters(), strict=True)]


def raised(answers):
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


def check(answers):
    for losses, params in raised(answers):
        for expected, got in losses:
            assert got == pytest.approx(expected, rel=1e-9)
        for expected, got in params:
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", ["mlp", "gpt2"])
def test_trajectories_of_sharded_models(two, model, way, optimizer):
    if model == "gpt2":
        pytest.importorskip("transformers", reason="GPT-2 is that of an optional library")
    check(two.run(trained, model, way, optimizer, {}))


@pytest.mark.parametrize("kind", TANGENTS)
@pytest.mark.parametrize("way", WAYS)
def test_kinds_of_tangents(two, way, kind):
    check(two.run(trained, "uneven", way, "fomoh-kd", TANGENTS[kind]))


# --- one plane ---------------------------------------------------------------------------------------


def full(p):
    return p.full_tensor() if isinstance(p, DTensor) else p


def decayed(net, batch):
    return loss_of(net, batch) + 0.1 * sum(full(p.pow(4).sum()) for p in net.parameters())


def by_hand(net, batch):
    """A parameter that a closure lays out by itself."""
    w = net[0].weight
    if not isinstance(w, DTensor):
        return loss_of(net, batch) + w.pow(2).sum() + w.tanh().sum()
    own = all_reduce(w.to_local().pow(2).sum(), "sum", dist.group.WORLD)
    moved = w.redistribute(placements=[Shard(1)]).redistribute(placements=[Replicate()]).to_local()
    return loss_of(net, batch) + own + moved.tanh().sum()


def given(net):
    """Tangents of the user's own, dense and of low rank."""
    torch.manual_seed(5)
    return [
        jp.LowRank(torch.randn(3, 2, len(p)).double(), torch.randn(3, 2, p.shape[1]).double(), p.shape)
        if p.dim() > 1
        else torch.randn(3, *p.shape, dtype=p.dtype)
        for p in net.parameters()
    ]


PLANES = {
    "hessian": {},
    "diagonal": {"pairs": "diagonal"},
    "gauss-newton": {"curvature": "ggn"},
    "examples": {"curvature": "ggn", "examples": True},
    "in chunks": {"chunk": 2},
    "given": {"directions": given},
    "regularized": {"loss": decayed},
    "regularized gauss-newton": {"loss": decayed, "curvature": "ggn"},
    "by hand": {"loss": by_hand},
    "sparse": {"directions": lambda net: jp.Directions(4, tangents="sparse", density=0.5)},
}


def evaluated(rank, way, settings):
    settings = {"directions": lambda net: jp.Directions(4, seed=1), "loss": loss_of} | PLANES[settings]
    draw, loss = settings.pop("directions"), settings.pop("loss")
    net, batch, planes = mlp(), examples("mlp"), []
    for model in (net, EVERY_WAY[way](mlp())):
        before = [whole(p) for p in model.parameters()]
        params = list(model.parameters())
        planes.append(vars(jp.evaluate(lambda model=model: loss(model, batch), params, draw(net), **settings)))
        assert all(p is q for p, q in zip(params, model.parameters(), strict=True))
        assert all(torch.equal(p, whole(q)) for p, q in zip(before, params, strict=True))
    return planes


@pytest.mark.parametrize("settings", PLANES)
@pytest.mark.parametrize("way", EVERY_WAY)
def test_planes_of_sharded_models(two, way, settings):
    for alone, together in raised(two.run(evaluated, way, settings)):
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-13)


def classes_apart(rank, parallel):
    """Each rank has some of the classes, and the loss finds the largest logit over ranks."""
    net, (x, y) = mlp(), examples("mlp")
    alone = jp.evaluate(lambda: loss_of(net, (x, y)), list(net.parameters()), jp.Directions(4, seed=1))
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(net, mesh, {"3": ColwiseParallel(use_local_output=False)})
    for name, p in list(net.named_parameters()):  # a DTensor meets DTensors only
        if not isinstance(p, DTensor):
            module, _, key = name.rpartition(".")
            net.get_submodule(module).register_parameter(key, nn.Parameter(distribute_tensor(p, mesh, [Replicate()])))
    x, y = (distribute_tensor(t, mesh, [Replicate()]) for t in (x, y))

    def loss():
        with loss_parallel() if parallel else contextlib.nullcontext():
            return F.cross_entropy(net(x), y)

    return vars(alone), vars(jp.evaluate(loss, list(net.parameters()), jp.Directions(4, seed=1)))


@pytest.mark.parametrize("parallel", [False, True])
def test_a_loss_over_classes_that_are_apart(two, parallel):
    for alone, together in raised(two.run(classes_apart, parallel)):
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-13)


def messages_of(rank, way):
    """The collectives that one evaluation makes of jets."""
    from torch.distributed.tensor.debug import CommDebugMode

    net, batch = EVERY_WAY[way](mlp()), examples("mlp")
    with CommDebugMode() as plain, torch.no_grad():
        loss_of(net, batch)
    with CommDebugMode() as carried:
        jp.evaluate(lambda: loss_of(net, batch), list(net.parameters()), jp.Directions(2))
    return [{str(op): n for op, n in mode.get_comm_counts().items()} for mode in (plain, carried)]


@pytest.mark.parametrize("way", ["tensor parallel", "sequence parallel"])
def test_jets_need_the_messages_of_a_plain_pass(two, way):
    for plain, carried in raised(two.run(messages_of, way)):
        assert plain and carried == plain


def carried_by_hand(rank, how):
    """A function of a vector by collectives; the same on one rank; each with its derivatives."""
    group, w, v = dist.group.WORLD, torch.arange(1.0, 9.0).double() / 8, torch.randn(3, 8).double()
    own = slice(4 * rank, 4 * rank + 4)
    weights = torch.arange(8.0).double().reshape(2, 4)
    functions = {
        "gather": (lambda x: all_gather_tensor(x[own].square(), 0, group), lambda x: x.square()),
        "scatter": (
            lambda x: all_gather_tensor(reduce_scatter_tensor(weights[rank].repeat(2) * x, "sum", 0, group), 0, group),
            lambda x: (weights[0] + weights[1]).repeat(2) * x,
        ),
        "exchange": (
            lambda x: all_gather_tensor(all_to_all_single(x[own].sin(), [2, 2], [2, 2], group), 0, group),
            lambda x: x.sin().reshape(2, 2, 2).transpose(0, 1).flatten(),
        ),
        "largest": (
            lambda x: all_reduce(weights[rank] * x[own].square(), "max", group),
            lambda x: 7 * 0 + torch.maximum(weights[0] * x[:4].square(), weights[1] * x[4:].square()),
        ),
        "smallest": (
            lambda x: all_reduce(x[own].square(), "min", group),
            lambda x: torch.minimum(x[:4].square(), x[4:].square()),
        ),
        "ties": (lambda x: all_reduce(x[:4].square(), "max", group), lambda x: x[:4].square()),
        "number": (lambda x: all_reduce(x.prod(), "avg", group), lambda x: x.prod()),
    }
    return [jp.jet(f, w, v) for f in functions[how]]


@pytest.mark.parametrize("how", ["gather", "scatter", "exchange", "largest", "smallest", "ties", "number"])
def test_collectives(two, how):
    for together, alone in raised(two.run(carried_by_hand, how)):
        torch.testing.assert_close(together, alone, rtol=1e-13, atol=1e-14)


# --- drawing a part ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tangents", ["dense", "sparse", "rank-one"])
@pytest.mark.parametrize("law", laws.LAWS)
@pytest.mark.parametrize("shape", [(7,), (64, 6), (5, 7), (8, 3, 5)])
def test_a_part_is_drawn_as_the_whole(monkeypatch, law, tangents, shape):
    source = jp.Directions(3, law, tangents, density=0.5 if tangents == "sparse" else None)
    param, kappa = torch.empty(shape), torch.tensor([1.0, -2.0, 3.0])
    source.prepare([param])
    whole, step = source.draw(0, param), source.combine(0, param, kappa)
    for dim, size in enumerate(shape):
        for start, stop in ((0, size // 2), (size // 2, size), (1, size - 1), (size, size)):
            part = Part(
                param.shape, tuple(slice(start, stop) if d == dim else slice(0, n) for d, n in enumerate(shape))
            )
            with monkeypatch.context() as patch:
                patch.setattr(random, "part_of", lambda p, part=part: part)
                patch.setattr(random, "local", lambda p, part=part: torch.empty(part.shape))
                assert torch.equal(source.draw(0, param), part.of(whole))
                torch.testing.assert_close(source.combine(0, param, kappa), step[part.box])


@pytest.mark.parametrize(("dim", "parts"), [(0, 8), (1, 8)])
def test_the_rest_of_the_whole_is_not_drawn(monkeypatch, dim, parts):
    shape, drawn = (64, 32), []
    gaussian = laws.LAWS["gaussian"]
    counting = laws.Law(2, lambda lanes: (drawn.append(lanes.numel()), gaussian.draw(lanes))[1], 3.0)
    monkeypatch.setitem(laws.LAWS, "gaussian", counting)
    each = shape[dim] // parts
    part = Part(
        torch.Size(shape), tuple(slice(each, 2 * each) if d == dim else slice(0, n) for d, n in enumerate(shape))
    )
    monkeypatch.setattr(random, "part_of", lambda p: part)
    monkeypatch.setattr(random, "local", lambda p: torch.empty(part.shape))
    jp.Directions(1).draw(0, torch.empty(shape))
    assert sum(drawn) <= math.prod(shape) // parts  # a lane gives two numbers


# --- what can go wrong ---------------------------------------------------------------------------------


def refused(rank):
    said, mesh = {}, init_device_mesh("cpu", (2,))
    axes = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "direction"))
    net, batch = tensor_parallel(mlp()), examples("mlp")
    params = list(net.parameters())
    mixed = nn.Parameter(DTensor.from_local(torch.ones(2), mesh, [torch.distributed.tensor.Partial()], run_check=False))
    tries = {
        "compile": lambda: jp.optim.FGD(params, compile=True),
        "auto": lambda: jp.optim.FoMoH(params, chunk="auto"),
        "directions": lambda: jp.optim.FoMoH(params, process_group=axes),
        "plane search": lambda: jp.optim.PlaneSearch(params),
        "backprop": lambda: jp.optim.FoMoHBP(params),
        "newton": lambda: jp.solve_newton(lambda: loss_of(net, batch), params),
        "hessian": lambda: jp.estimate_hessian(lambda: loss_of(net, batch), params, 4),
        "partial": lambda: jp.optim.FGD([mixed]),
    }
    for name, attempt in tries.items():
        try:
            attempt()
        except jp.ArgumentError as error:
            said[name] = str(error)
    return said


def test_what_sharded_models_cannot_have(two):
    for said in raised(two.run(refused)):
        assert said["compile"].startswith(
            "compile=True cannot be had for models that are sharded: parameter 0 of shape"
        )
        assert 'chunk="auto"' in said["auto"] and "shares of the directions" in said["directions"]
        assert "PlaneSearch" in said["plane search"] and "FoMoHBP" in said["backprop"]
        assert "solve_newton" in said["newton"] and "estimates" in said["hessian"]
        assert "expected that this rank holds a box of it" in said["partial"]


def interrupted(rank, way):
    """A closure that fails in the middle of the model: what was raised, and whether all is as before."""
    net, (x, y) = WAYS[way](mlp()), examples("mlp")
    opt = jp.optim.FGD(net.parameters(), k=2)
    before, said = [whole(p) for p in net.parameters()], []
    tries = {
        jp.DerivativeError: lambda h: torch.tensor(h.numpy()),
        ZeroDivisionError: lambda h: h * (1 / 0),
        jp.NonFiniteError: lambda h: h * math.nan,
    }
    for kind, spoil in tries.items():
        handle = net[1].register_forward_hook(lambda module, inputs, h, spoil=spoil: spoil(h))
        try:
            opt.step(lambda: F.cross_entropy(net(x), y))
        except kind:
            said.append(kind)
        handle.remove()
    try:
        opt.step(lambda: full(Doubled.apply(net[0].weight).sum()))
    except jp.DerivativeError as error:
        said.append(str(error))
    same = all(torch.equal(a, whole(p)) for a, p in zip(before, net.parameters(), strict=True))
    loss = F.cross_entropy(net(x), y)  # and the model can go on, by backprop or not
    loss.backward()
    with torch.no_grad():
        alone = F.cross_entropy(mlp()(x), y)
    return (
        said,
        same,
        torch.equal(loss.detach(), alone),
        opt.step(lambda: F.cross_entropy(net(x), y)).item() - alone.item(),
    )


@pytest.mark.parametrize("way", WAYS)
def test_a_failed_step_leaves_a_sharded_model_whole(two, way):
    for said, same, usable, difference in raised(two.run(interrupted, way)):
        assert said[:3] == [jp.DerivativeError, ZeroDivisionError, jp.NonFiniteError]
        assert "Doubled defines its own derivatives" in said[3]
        assert same and abs(difference) < 1e-12
        assert usable or way == "tensor parallel"  # which adds up in another order


def around_the_root(rank, how):
    """Closures by which FSDP2's copies come to be used without the call of the module that owns them."""
    net, (x, y) = mlp(), examples("mlp")
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    opt = jp.optim.FGD(net.parameters())
    with torch.no_grad():
        loss_of(net, (x, y))
    assert not isinstance(net[3].weight, DTensor)  # a pass leaves the root's copies in place
    if how == "method":
        net.score = lambda x: nn.Sequential.forward(net, x)
        register_fsdp_forward_method(net, "score")
        net.reshard()
        closure = lambda: F.cross_entropy(net.score(x), y)  # noqa: E731
    else:  # the root is not called again
        closure = lambda: F.cross_entropy(net[3](net[2](net[1](net[0](x)))), y)  # noqa: E731
    try:
        opt.step(closure)
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize(
    ("how", "said"),
    [("method", "FSDP2 gathered parameters without a call"), ("left", "got mixed torch.Tensor and DTensor")],
)
def test_copies_are_not_taken_for_constants(two, how, said):
    for error in raised(two.run(around_the_root, how)):
        assert said in error


def apart(rank, way):
    """One rank's parameter has moved by itself."""
    net, batch = WAYS[way](mlp()), examples("mlp")
    opt = jp.optim.FGD(net.parameters(), process_group=dist.group.WORLD)
    opt.step(lambda: loss_of(net, batch))
    with torch.no_grad():
        sharded.local(net[3].bias)[:1] += rank
    try:
        opt.step(lambda: loss_of(net, batch))
    except jp.RanksDifferError as error:
        return str(error)


def test_ranks_compare_what_they_hold_alike(two):
    for said in raised(two.run(apart, "tensor parallel")):
        assert "parameter 5" in said and "parameter 4" not in said
    assert two.run(apart, "fsdp") == [None, None]  # each has its own part


# --- both ways, and replicas -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    gang = Gang(4, tmp_path_factory.mktemp("gang"))
    yield gang
    gang.stop()


def on_a_mesh(rank, both):
    """Tensor parallelism along one axis of a mesh and FSDP2 along the other, or FSDP2 with replicas."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    alone, net, (x, y) = uneven(), uneven(), examples("mlp")
    if both:
        plan = {"0": ColwiseParallel(output_layouts=Replicate()), "3": RowwiseParallel(input_layouts=Replicate())}
        parallelize_module(net, mesh["tensor"], plan)
    for layer in (net[0], net[2], net[3]):
        fully_shard(layer, mesh=mesh["data"] if both else mesh)
    fully_shard(net, mesh=mesh["data"] if both else mesh)
    for p in net.parameters():
        assert torch.equal(whole(p)[sharded.part_of(p).box], sharded.local(p))
    group, n = (mesh["data"].get_group(), mesh.get_local_rank("data")) if both else (dist.group.WORLD, rank)
    part = slice(0, 4) if n == 0 else slice(4, None) if both else slice(2 + 2 * n, 4 + 2 * n)
    single = OPTIMIZERS["fomoh-kd"](alone.parameters())
    opt = OPTIMIZERS["fomoh-kd"](net.parameters(), process_group=group)
    losses = [
        (
            single.step(lambda: F.cross_entropy(alone(x), y)).item(),
            opt.step(lambda: F.cross_entropy(net(x[part]), y[part]), weight=len(x[part])).item(),
        )
        for _ in range(3)
    ]
    return losses, [(whole(p), whole(q)) for p, q in zip(alone.parameters(), net.parameters(), strict=True)]


@pytest.mark.parametrize("both", [True, False], ids=["tensor parallel and fsdp", "replicas"])
def test_meshes(four, both):
    check(four.run(on_a_mesh, both))
