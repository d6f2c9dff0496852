"""Models of which each rank holds a part give the numbers of whole ones: two real processes over gloo."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import Gang
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

import jetplane as jp

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
    "sparse": {},
    "block": {"tangents": "block"},
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
    transformers = pytest.importorskip("transformers")
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


WAYS = {"fsdp": fully_sharded, "tensor parallel": tensor_parallel}


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


def check(answers):
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
        losses, params = answer
        for expected, got in losses:
            assert got == pytest.approx(expected, rel=1e-9)
        for expected, got in params:
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", ["mlp", "gpt2"])
def test_trajectories_of_sharded_models(two, model, way, optimizer):
    check(two.run(trained, model, way, optimizer, {}))


@pytest.mark.parametrize("kind", ["signs", "sphere", "rank-one", "block"])
@pytest.mark.parametrize("way", WAYS)
def test_kinds_of_tangents(two, way, kind):
    check(two.run(trained, "uneven", way, "fomoh-kd", TANGENTS[kind]))
