"""Optimizers as users of torch's know them: checkpoints, frozen and empty parameters, other defaults."""

import copy
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import functional as F

import jetplane as jp

OPTIMIZERS = {
    "fgd": lambda net: jp.optim.FGD(net.parameters(), lr=1e-2, momentum=0.5),
    "fomoh": lambda net: jp.optim.FoMoH(net.parameters()),
    "fomoh-kd": lambda net: jp.optim.FoMoHKD(net.parameters(), k=2, descent="saddle-free"),
    "plane search": lambda net: jp.optim.PlaneSearch(net.parameters(), net),
}
each = pytest.mark.parametrize("name", OPTIMIZERS)


def network(seed=0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8, **options), nn.Tanh(), nn.Linear(8, 3, **options))


def train(net, opt, steps):
    weight = net[0].weight
    x = torch.linspace(-1, 1, 24, device=weight.device).reshape(6, 4).to(weight.dtype)
    y = torch.arange(6, device=weight.device) % 3
    return [opt.step(lambda: F.cross_entropy(net(x), y)).item() for _ in range(steps)]


@each
@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoints(name, flat, tmp_path):
    """By names of parameters, written to disk, into another model: training goes on bit for bit."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    net = network()
    opt = OPTIMIZERS[name](net)
    train(net, opt, 4)
    saved = {"model": net.state_dict(), "optimizer": get_optimizer_state_dict(net, opt, options=options)}
    assert not flat or all(isinstance(key, str) for key in saved["optimizer"])
    torch.save(saved, tmp_path / "saved.pt")
    loaded = torch.load(tmp_path / "saved.pt", weights_only=False)
    other = network(1)
    resumed = OPTIMIZERS[name](other)
    other.load_state_dict(loaded["model"])
    if flat and name in ("fgd", "plane search"):  # torch drops what a new optimizer has no state of yet
        with pytest.raises(jp.ShapeError, match="flatten_optimizer_state_dict=False"):
            set_optimizer_state_dict(other, resumed, loaded["optimizer"], options=options)
        return
    set_optimizer_state_dict(other, resumed, loaded["optimizer"], options=options)
    assert train(net, opt, 3) == train(other, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


@each
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoints_of_torch_on_disk(name, tmp_path):
    net = network()
    opt = OPTIMIZERS[name](net)
    train(net, opt, 3)
    dcp.save({"optimizer": get_optimizer_state_dict(net, opt)}, checkpoint_id=tmp_path, no_dist=True)
    assert any(tmp_path.iterdir())


@each
def test_states_of_before_are_loaded(name):
    net, other = network(), network()
    opt, resumed = OPTIMIZERS[name](net), OPTIMIZERS[name](other)
    train(net, opt, 2)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"]["jetplane"] = saved["param_groups"][0].pop("jetplane")
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(saved)
    assert train(net, opt, 2) == train(other, resumed, 2)


@each
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_alike(name, copied):
    net = network()
    opt = OPTIMIZERS[name](net)
    train(net, opt, 2)
    other, twin = copied((net, opt))
    assert train(net, opt, 2) == train(other, twin, 2)


@each
def test_hooks_on_the_state(name):
    net = network()
    opt = OPTIMIZERS[name](net)
    seen = []
    opt.register_state_dict_post_hook(lambda o, s: seen.append("out"))
    opt.register_load_state_dict_post_hook(lambda o: seen.append("in"))
    opt.load_state_dict(opt.state_dict())
    assert seen == ["out", "in"]


@each
def test_frozen_parameters_of_any_kind(name):
    net = network()
    net.table = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    net.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64), requires_grad=False)
    net.far = nn.Parameter(torch.zeros(3, device="meta"), requires_grad=False)
    net.forward = lambda x: net[2](net[1](net[0](x)))
    opt = OPTIMIZERS[name](net)
    losses = train(net, opt, 5)
    assert losses[-1] != losses[0] and not net.table.any()
    opt.load_state_dict(opt.state_dict())
    net.far.requires_grad_()
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(jp.DeviceError, match="one device"):
        train(net, opt, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True) if a.device.type == "cpu")


@each
@pytest.mark.parametrize("used", [False, True])
def test_empty_and_scalar_parameters(name, used):
    net = network()
    net.empty, net.scale = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.tensor(1.0))
    body = nn.Sequential(*list(net)[:3])
    net.forward = lambda x: body(x) * net.scale + (F.linear(x, net.empty).sum() if used else 0)
    losses = train(net, OPTIMIZERS[name](net), 8)
    assert losses[-1] < losses[0] or name.startswith("f") and losses[-1] != losses[0]
    assert net.scale.item() != 1.0


@each
def test_parameters_made_under_inference_mode_are_refused(name):
    with torch.inference_mode():
        net = network()
    with pytest.raises(jp.ArgumentError, match="inference_mode"):
        OPTIMIZERS[name](net)
    ordinary = network()
    opt = OPTIMIZERS[name](ordinary)
    with pytest.raises(jp.ArgumentError, match="inference_mode"):
        opt.add_param_group({"params": list(net.parameters())})
    assert len(opt.param_groups) == 1 and train(ordinary, opt, 1)


@each
def test_another_default_dtype_changes_nothing(name):
    found = []
    for dtype in (torch.float32, torch.float64):
        net = network(dtype=torch.float32)
        opt = OPTIMIZERS[name](net)
        torch.set_default_dtype(dtype)
        try:
            x, y = torch.linspace(-1, 1, 24, dtype=torch.float32).reshape(6, 4), torch.arange(6) % 3
            found.append([opt.step(lambda: F.cross_entropy(net(x), y)).item() for _ in range(4)])  # noqa: B023
        finally:
            torch.set_default_dtype(torch.float32)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@each
def test_another_default_device_changes_nothing(name):
    found = []
    for device in ("cpu", "meta"):
        net = network()
        opt = OPTIMIZERS[name](net)
        x, y = torch.linspace(-1, 1, 24).reshape(6, 4), torch.arange(6) % 3
        with torch.device(device):
            found.append([opt.step(lambda: F.cross_entropy(net(x), y)).item() for _ in range(4)])  # noqa: B023
    assert found[0] == found[1]


@each
@pytest.mark.filterwarnings("ignore:the spread of 6 examples")  # half precision does not tell that they are all
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype):
    net = network(dtype=dtype)
    losses = train(net, OPTIMIZERS[name](net), 10)
    assert losses[-1] != losses[0] and all(torch.isfinite(p).all() for p in net.parameters())


@each
def test_layers_are_frozen_and_unfrozen_between_steps(name):
    net = network()
    net[0].requires_grad_(False)
    opt = OPTIMIZERS[name](net)
    train(net, opt, 2)
    held = net[0].weight.clone()
    assert torch.equal(held, network()[0].weight)
    net[0].requires_grad_()
    train(net, opt, 3)
    assert not torch.equal(held, net[0].weight)
    net[0].requires_grad_(False)
    held = net[0].weight.clone()
    train(net, opt, 2)
    assert torch.equal(held, net[0].weight)


@each
def test_weights_decay_before_the_step_is_added(name):
    changes = []
    for decay in (0.0, 0.5):
        net = network().double()
        opt = OPTIMIZERS[name](net)
        for group in opt.param_groups:
            group["weight_decay"], group["lr"] = decay, 0.1
        before = [p.detach().clone() for p in net.parameters()]
        train(net, opt, 1)
        kept = 1 - 0.1 * decay
        changes.append([p.detach() - kept * b for p, b in zip(net.parameters(), before, strict=True)])
    torch.testing.assert_close(changes[0], changes[1], rtol=1e-9, atol=1e-15)


@each
def test_clipping_bounds_the_norm_over_all_parameters(name):
    net = network().double()
    opt = OPTIMIZERS[name](net)
    opt.clip = 1e-4
    before = torch.cat([p.detach().flatten() for p in net.parameters()])
    train(net, opt, 1)
    change = torch.cat([p.detach().flatten() for p in net.parameters()]) - before
    assert change.norm().item() == pytest.approx(1e-4, rel=1e-6) or name == "plane search" and 0 < change.norm() <= 1e-4


def test_both_modes_of_fomoh_bp_see_one_dropout_mask():
    net = nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.5), nn.Tanh(), nn.Linear(32, 3)).double()
    x, y = torch.randn(6, 4).double(), torch.arange(6) % 3
    opt = jp.optim.FoMoHBP(net.parameters())
    torch.manual_seed(5)
    gradient = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
    torch.manual_seed(5)
    opt.step(lambda: F.cross_entropy(net(x), y))
    assert opt.plane.slope.item() == pytest.approx(sum(g.square().sum().item() for g in gradient), rel=1e-10)


@each
def test_lazy_modules_are_told_and_trained_once_they_have_a_shape(name):
    net = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(jp.ArgumentError, match="one batch"):
        OPTIMIZERS[name](net)
    net(torch.zeros(6, 4))
    assert len(set(train(net, OPTIMIZERS[name](net), 3))) > 1
